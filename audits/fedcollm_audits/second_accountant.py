"""Epsilon by two ways that share no code with the accountant that charged: PRV from below, Rényi DP from above.

From below: the privacy random variables of Gopi et al. 2021 as Opacus computes them, at the low end of their error. A
charge below that promises more than the steps keep. From above: Rényi divergences of the Poisson-subsampled Gaussian
by the closed formula at whole orders (Mironov, Talwar and Zhang 2019, section 3.3), converted by proposition 12 of
Canonne, Kamath and Steinke 2020, in numpy and nothing else. A charge above that harms nobody but is not what it says.
"""

from __future__ import annotations

import math
import threading
import warnings
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue

__all__ = ["MAX_CELLS", "Bounds", "bounds", "divergence", "lower_delta", "lower_epsilon", "rdp_budget", "rdp_epsilon"]

_ERROR: Final = 0.01
MAX_CELLS: Final = 4_000_000
"""PRV's grid may hold so many cells, about a microsecond each; beyond, there is no bound from below."""
_ORDERS: Final = (*range(2, 65), *range(66, 129, 2), *range(132, 257, 4), *range(264, 1025, 8))
# Opacus' warnings are silenced for the whole process, so only one thread at a time may do it.
_QUIET = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What an honest charge lies between.

    Attributes:
        lower: no charge below it covers the steps; None where PRV gave none, for the reason in ``missing``.
        upper: by Rényi DP.
    """

    lower: float | None
    upper: float
    missing: str = ""


def bounds(sigma: float, rate: Fraction, steps: int, delta: float) -> Bounds:
    """Bounds on epsilon at ``delta`` for so many equal Poisson-subsampled Gaussian steps; computed once a schedule.

    Raises:
        InvalidValue: an argument is out of range.
    """
    _validate.positive(noise_multiplier=sigma, delta=delta)
    _validate.integer_at_least(1, steps=steps)
    _validate.in_range(0, 0.5, delta=delta)
    if not 0 < rate <= 1:
        raise InvalidValue("sample_rate", rate, "in (0, 1]")
    upper = rdp_epsilon(sigma, float(rate), steps, delta)
    lower, missing = lower_epsilon(sigma, rate, steps, delta)
    return Bounds(lower=lower, upper=upper, missing=missing)


@lru_cache(maxsize=1024)
def lower_epsilon(sigma: float, rate: Fraction, steps: int, delta: float) -> tuple[float | None, str]:
    """The low end of PRV's estimate of epsilon, or None and why there is none."""
    reach = rdp_epsilon(sigma, float(rate), steps, delta / 4000) + 3
    cells = 2 * reach * math.sqrt(steps * math.log(12_000 / delta) / 2) / _ERROR
    if not cells <= MAX_CELLS:
        return None, f"PRV's grid would hold {cells:.2g} cells, more than {MAX_CELLS}"
    try:
        low = float(_composed(sigma, rate, steps, delta).compute_epsilon(delta, delta / 1000, _ERROR)[0])
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return None, f"Opacus gave up ({type(error).__name__}: {error!s:.100})"
    return (max(0.0, low), "") if math.isfinite(low) else (None, f"PRV gave {low}")


def lower_delta(sigma: float, rate: Fraction, steps: int, delta: float, epsilon: float) -> float | None:
    """A bound from below on delta at ``epsilon``, by the same PRV as `lower_epsilon`; None where it has none.

    Its error is that of Gopi et al. 2021: 0.01 in epsilon and a thousandth of ``delta``.
    """
    if lower_epsilon(sigma, rate, steps, delta)[0] is None:
        return None
    estimate = float(_composed(sigma, rate, steps, delta).compute_delta_estimate(epsilon + _ERROR))
    return max(0.0, estimate - delta / 1000) if math.isfinite(estimate) else None


@lru_cache(maxsize=32)
def _composed(sigma: float, rate: Fraction, steps: int, delta: float) -> Any:
    from opacus.accountants import PRVAccountant  # brings torch: seconds that other checks need not take

    accountant = PRVAccountant()
    accountant.history = [(sigma, float(rate), steps)]
    with _QUIET, warnings.catch_warnings(), np.errstate(all="ignore"):
        # Logarithms of zero at the edge of the support, quadrature and orders at the end of their range.
        warnings.simplefilter("ignore")
        return accountant._get_dprv(eps_error=_ERROR, delta_error=delta / 1000)


def rdp_epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    """Upper bound on epsilon at ``delta`` by the best of many whole orders."""
    found = math.inf
    for order, one in zip(_ORDERS, _divergences(sigma, rate), strict=True):
        converted = steps * one + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        found = min(found, converted)
    return max(0.0, found)


@lru_cache(maxsize=1024)
def _divergences(sigma: float, rate: float) -> tuple[float, ...]:
    return tuple(_whole(sigma, rate, order) for order in _ORDERS)


def _whole(sigma: float, rate: float, order: int) -> float:
    """log(sum_k C(a, k) (1 - q)^(a - k) q^k exp(k (k - 1) / (2 sigma^2))) / (a - 1), in logarithms."""
    if rate >= 1:
        return order / (2 * sigma**2)
    k = np.arange(order + 1, dtype=np.float64)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, order + 1)))])
    chosen = factorials[-1] - factorials - factorials[::-1]
    terms = chosen + (order - k) * math.log1p(-rate) + k * math.log(rate) + k * (k - 1) / (2 * sigma**2)
    return max(0.0, _log_sum(terms) / (order - 1))


@lru_cache(maxsize=1024)
def divergence(sigma: float, rate: float, order: float) -> float:
    """One step's Rényi divergence at any order above 1, by the trapezoid rule on the integral that defines it.

    The integrand is smooth and dies out like a Gaussian, so the rule converges faster than any power of its step.
    """
    _validate.positive(noise_multiplier=sigma, sample_rate=rate)
    if not (1 < order <= 1024 and rate <= 1):
        raise InvalidValue("order", (order, rate), "an order in (1, 1024] and a rate of at most 1")
    if rate == 1:
        return order / (2 * sigma**2)
    # The integrand's mass lies within the Gaussians at 0 and at the order; forty deviations beyond leave nothing.
    z = np.linspace(-40 * sigma, order + 40 * sigma, 200_001)
    mixture = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * sigma**2))
    logs = order * mixture - z**2 / (2 * sigma**2) - math.log(sigma) - math.log(2 * math.pi) / 2
    return max(0.0, (_log_sum(logs) + math.log(z[1] - z[0])) / (order - 1))


def rdp_budget(order: float, target_epsilon: float, delta: float) -> float:
    """The divergence at ``order`` that implies (epsilon, delta); Canonne, Kamath and Steinke 2020, proposition 12."""
    return target_epsilon - math.log1p(-1 / order) + (math.log(delta) + math.log(order)) / (order - 1)


def _log_sum(logs: NDArray[np.float64]) -> float:
    highest = float(logs.max())
    return highest + math.log(float(np.exp(logs - highest).sum()))
