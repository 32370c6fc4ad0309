"""What a committed number of DP-SGD steps costs: privacy loss distributions by dp-accounting, an upper bound.

The plan is fixed before the first gradient, so the privacy loss distribution of the subsampled Gaussian composes
over its steps (Koskela et al. 2020; Doroshenko et al. 2022). Accountants based on the central limit theorem
under-report and are absent. Sampling is Poisson; the neighbouring relation is add-or-remove-one of the plan's unit.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from importlib.metadata import version

import dp_accounting
from dp_accounting.pld import PLDAccountant

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue

__all__ = ["ACCOUNTANT", "calibrate_noise_multiplier", "epsilon"]

# Ten times coarser than the library's default and 6x faster, rounded pessimistically: epsilon rises by 1e-3 at most for
# q/sigma >= 0.02 and up to 2,000 steps, by 0.4 % at q/sigma = 0.004, by 14 % at q/sigma = 0.0007.
_DISCRETIZATION = 1e-3
ACCOUNTANT = f"dp-accounting {version('dp-accounting')} PLD (discretization {_DISCRETIZATION})"


def _event(noise_multiplier: float, sample_rate: Fraction, steps: int) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(float(sample_rate), gaussian)
    return dp_accounting.SelfComposedDpEvent(step, steps)


def _fresh() -> PLDAccountant:
    return PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, _DISCRETIZATION)


@lru_cache(maxsize=1024)
def epsilon(noise_multiplier: float, sample_rate: Fraction, steps: int, delta: float) -> float:
    """Upper bound on epsilon at ``delta`` after ``steps`` Poisson-subsampled Gaussian steps; 0.0 for no steps.

    Args:
        noise_multiplier: sigma, noise standard deviation in units of the clipping bound.
        sample_rate: q as an exact rational in (0, 1].
        steps: how often the mechanism ran.
        delta: target delta in (0, 1).

    Raises:
        InvalidValue: an argument is out of range (NaN included).
    """
    _validate.positive(noise_multiplier=noise_multiplier)
    _validate.integer_at_least(0, steps=steps)
    _validate_rate_and_delta(sample_rate, delta)
    if steps == 0:
        return 0.0
    return float(_fresh().compose(_event(noise_multiplier, sample_rate, steps)).get_epsilon(delta))


@lru_cache(maxsize=256)
def calibrate_noise_multiplier(*, target_epsilon: float, delta: float, sample_rate: Fraction, steps: int) -> float:
    """The smallest sigma (within 1e-3, from above) that keeps ``epsilon(...)`` at or below ``target_epsilon``.

    Raises:
        InvalidValue: an argument is out of range, or the target needs a sigma outside [0.2, 1e4].
    """
    _validate.positive(epsilon=target_epsilon)
    _validate.integer_at_least(1, steps=steps)
    _validate_rate_and_delta(sample_rate, delta)
    try:
        sigma = dp_accounting.calibrate_dp_mechanism(
            _fresh,
            lambda value: _event(value, sample_rate, steps),
            target_epsilon=target_epsilon,
            target_delta=delta,
            bracket_interval=dp_accounting.ExplicitBracketInterval(0.2, 1e4),
            tol=1e-3,
        )
    except ValueError as error:  # what the library raises when the interval holds no solution
        raise InvalidValue(
            "privacy.epsilon",
            target_epsilon,
            "a budget that needs a noise_multiplier in [0.2, 1e4]; a larger one is no protection, a smaller one "
            "drowns the training: change the steps, the batch or the budget",
        ) from error
    return float(sigma)


def _validate_rate_and_delta(sample_rate: Fraction, delta: float) -> None:
    _validate.positive(delta=delta)
    if not delta < 1:
        raise InvalidValue("delta", delta, "a number in (0, 1)")
    if not isinstance(sample_rate, Fraction) or not 0 < sample_rate <= 1:
        raise InvalidValue("sample_rate", sample_rate, "a Fraction in (0, 1]")
