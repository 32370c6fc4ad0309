"""Second and third opinions on the epsilon of a committed schedule, before it is written into a ledger.

The charge comes from the privacy loss distributions of `accounting` (PLD). It must not lie above what Rényi DP
(dp-accounting, RDP) or the privacy random variables of Gopi et al. 2021 (Opacus, PRV) allow, and not below what PRV
says it must be at least: one library's mistake then stops the run instead of entering the ledger.

Opacus also ships an accountant built on the central limit theorem. It under-reports (1.50 for a true 3.82 at sigma 0.6,
q 0.01, 100 steps) and is used nowhere; `tests/test_cross_checks.py` keeps it out.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedcollm_privacy import _validate
from fedcollm_privacy.accounting import Steps, epsilon_of, rdp_epsilon
from fedcollm_privacy.errors import InvalidValue, PrivacyViolation

__all__ = ["MAX_PRV_CELLS", "CrossCheck", "cross_check", "prv_epsilon"]

# PRV's guaranteed error in epsilon; what it reports is its estimate plus this.
_PRV_ERROR = 0.01
# One cell takes about a microsecond: a check stays below half a second, on the machines at hand.
MAX_PRV_CELLS = 400_000
# warnings.catch_warnings changes the whole process, so only one thread at a time may do it here.
_QUIET = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossCheck:
    """Upper bounds on one epsilon by three methods, found to agree.

    Attributes:
        pld: what is charged.
        prv: by Opacus, its error of 0.01 included; None when it was not computed.
        rdp: by dp-accounting over its default orders.
        prv_missing: why there is no ``prv``; empty when there is one.
    """

    pld: float
    prv: float | None
    rdp: float
    prv_missing: str = ""


def prv_epsilon(schedule: Sequence[Steps], delta: float) -> float:
    """Upper bound on epsilon by Opacus' PRV accountant, 0.01 above its estimate; 0.0 for no steps.

    Add or remove one, Poisson sampling. Time and memory grow with the schedule: seconds for 50,000 steps at epsilon 25.

    Raises:
        InvalidValue: delta is not in (0, 1].
        ArithmeticError, RuntimeError, ValueError: from Opacus, where its grid does not carry the schedule.
    """
    _validate.positive(delta=delta)
    _validate.in_range(0, 1, delta=delta)
    from opacus.accountants import PRVAccountant  # brings torch: seconds that opening a ledger need not take

    accountant = PRVAccountant()
    accountant.history = [(s.noise_multiplier, float(s.sample_rate), s.steps) for s in schedule if s.steps]
    if not accountant.history:
        return 0.0
    with _QUIET, warnings.catch_warnings(), np.errstate(all="ignore"):
        # Logarithms of zero at the edge of the support, quadrature and orders at the end of their range.
        warnings.simplefilter("ignore")
        value = float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))
    if not math.isfinite(value):
        raise ArithmeticError(f"PRV epsilon is {value}")
    return max(0.0, value)


def cross_check(schedule: Sequence[Steps], delta: float) -> CrossCheck:
    """The PLD epsilon of a committed schedule, after PRV and RDP did not contradict it.

    Add or remove one. Asked again for the same schedule, it answers from memory. PRV is left out, with the reason in
    the answer, where its grid would exceed `MAX_PRV_CELLS` or where Opacus gives up; RDP is always there.

    Tolerances: the PLD may exceed either bound by what its grid of 1e-3 may add, 0.002 + 4e-6 a step; it may be below
    PRV by PRV's error of 0.01 and 0.002 + 0.005 % for PRV's delta error and rounding. Over 159 random plans with
    epsilon up to 63, the difference was 0.009 to 0.0124.

    Raises:
        PrivacyViolation: the methods contradict each other.
        InvalidValue: delta is not in (0, 1), or the schedule holds something else than `Steps`.
    """
    return _cross_check(tuple(schedule), delta)


@lru_cache(maxsize=256)
def _cross_check(schedule: tuple[Steps, ...], delta: float) -> CrossCheck:
    pld = epsilon_of(schedule, delta)
    rdp = rdp_epsilon(schedule, delta)
    prv, missing = _prv_or_reason(schedule, delta)
    above = 2e-3 + 4e-6 * sum(block.steps for block in schedule)
    if not pld <= rdp + above:
        raise _contradiction(pld, "above the RDP bound", rdp, delta)
    if prv is not None and not pld <= prv + above:
        raise _contradiction(pld, "above the PRV bound", prv, delta)
    if prv is not None and not pld >= prv - _PRV_ERROR - (2e-3 + 5e-5 * prv):
        raise _contradiction(pld, "below what PRV allows, its upper bound being", prv, delta)
    return CrossCheck(pld=pld, prv=prv, rdp=rdp, prv_missing=missing)


def _prv_or_reason(schedule: tuple[Steps, ...], delta: float) -> tuple[float | None, str]:
    steps = sum(block.steps for block in schedule)
    # As Opacus lays out its grid: twice the reach of the privacy loss, over the mesh that gives its error.
    reach = rdp_epsilon(schedule, delta / 4000) + 3
    cells = 2 * reach * math.sqrt(steps * math.log(12_000 / delta) / 2) / _PRV_ERROR
    if not cells <= MAX_PRV_CELLS:
        return None, f"its grid would hold {cells:.2g} cells, more than {MAX_PRV_CELLS}"
    try:
        return prv_epsilon(schedule, delta), ""
    except InvalidValue:
        raise
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return None, f"Opacus gave up: {type(error).__name__}: {error}"


def _contradiction(pld: float, relation: str, bound: float, delta: float) -> PrivacyViolation:
    return PrivacyViolation(
        f"two accountants contradict each other: PLD gives epsilon {pld:.6g} at delta {delta:.3g}, {relation} "
        f"{bound:.6g}. Nothing was written; install the versions in constraints.txt, or report the plan"
    )
