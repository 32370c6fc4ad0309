"""How well scores tell members from others: AUC and true positives at a low false positive rate, with intervals.

Statistics only; what scores there are, and of whom, is `leakage`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedcollm_audits.confidence import rate_upper_bound
from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue

__all__ = ["Interval", "MembershipInference", "auc_interval", "infer_membership", "tpr_interval"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate, and where the truth lies with the stated confidence, both ends together."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipInference:
    """How well an attack's scores tell members from controls.

    Attributes:
        auc: probability that a member scores above a control, ties half; 0.5 is a coin.
        tpr: share of members above the threshold that a share ``fpr`` of controls exceeds.
        fpr: of ``tpr``.
        p_value: of so large an AUC where members and controls do not differ (Mann and Whitney 1947, one-sided).
        confidence: of both intervals, each on its own.
        member_scores, control_scores: one for a unit, larger is more like a member; for who wants to compute it again.
    """

    auc: Interval
    tpr: Interval
    fpr: float
    p_value: float
    confidence: float
    member_scores: tuple[float, ...] = field(repr=False)
    control_scores: tuple[float, ...] = field(repr=False)


def auc_interval(members: Sequence[float], controls: Sequence[float], confidence: float) -> Interval:
    """AUC with DeLong's variance (DeLong et al. 1988; by midranks, Sun and Xu 2014), on the logit scale.

    Where no score contradicts the others that variance is zero. Then the interval is Clopper and Pearson's: how many
    members, and how many controls, could behave otherwise.
    """
    placed_m, placed_n = _placements(members, controls)
    m, n, auc = placed_m.size, placed_n.size, float(placed_m.mean())
    deviation = math.sqrt(placed_m.var(ddof=1) / m + placed_n.var(ddof=1) / n)
    if deviation == 0 or auc in (0.0, 1.0):
        significance = (1 - confidence) / 4
        agree = (1 - rate_upper_bound(0, m, significance)) * (1 - rate_upper_bound(0, n, significance))
        return Interval(estimate=auc, low=auc * agree, high=1 - (1 - auc) * agree)
    margin = float(stats.norm.isf((1 - confidence) / 2)) * deviation / (auc * (1 - auc))
    logit = math.log(auc / (1 - auc))
    return Interval(estimate=auc, low=_expit(logit - margin), high=_expit(logit + margin))


def tpr_interval(members: Sequence[float], controls: Sequence[float], fpr: float, confidence: float) -> Interval:
    """True positives at a false positive rate, with an interval that is exact for continuous scores, if wide.

    What share of controls in general exceeds the i-th largest of n is Beta(i, n + 1 - i) distributed. So there is a
    control that surely fewer than ``fpr`` exceed, and one that surely more do; Clopper and Pearson's bounds of the
    members above them are the ends. Fewer than ln((1 - confidence) / 4) / ln(1 - fpr) controls (436 at 1 % and 95 %
    confidence) have no such control at the lower end: it is 0.
    """
    above, below = np.asarray(members, dtype=np.float64), -np.sort(-np.asarray(controls, dtype=np.float64))
    m, n, significance = above.size, below.size, (1 - confidence) / 4

    def hits(place: int) -> int:
        return int((above > below[place]).sum())

    places = np.arange(1, n + 1)
    surely_fewer = int((stats.beta.sf(fpr, places, n + 1 - places) <= significance).sum())
    surely_more = int((stats.beta.cdf(fpr, places, n + 1 - places) > significance).sum())
    low = 1 - rate_upper_bound(m - hits(surely_fewer - 1), m, significance) if surely_fewer else 0.0
    high = rate_upper_bound(hits(surely_more), m, significance) if surely_more < n else 1.0
    # What lies `fpr * n` controls from the top, rounded down so that no more exceed it.
    estimate = hits(min(n - 1, math.floor(fpr * n + 1e-9))) / m
    return Interval(estimate=estimate, low=low, high=high)


def infer_membership(
    members: Sequence[float], controls: Sequence[float], *, fpr: float = 0.01, confidence: float = 0.95
) -> MembershipInference:
    """Judge an attack by its scores.

    Args:
        members: scores of units that were trained on, at least two; independent of each other.
        controls: scores of units that were not, at least two, otherwise alike.
        fpr: false positive rate at which true positives are counted.
        confidence: of the intervals.

    Raises:
        InvalidValue: too few scores, one that is not finite, or a rate or confidence outside (0, 1).
    """
    for name, scores in (("members", members), ("controls", controls)):
        if len(scores) < 2 or not np.isfinite(scores).all():
            raise InvalidValue(name, f"<{len(scores)} scores>", "at least two finite scores")
    for name, value in (("fpr", fpr), ("confidence", confidence)):
        _validate.positive(**{name: value})
        if not value < 1:
            raise InvalidValue(name, value, "a number in (0, 1)")
    return MembershipInference(
        auc=auc_interval(members, controls, confidence),
        tpr=tpr_interval(members, controls, fpr, confidence),
        fpr=fpr,
        p_value=float(stats.mannwhitneyu(members, controls, alternative="greater").pvalue),
        confidence=confidence,
        member_scores=tuple(members),
        control_scores=tuple(controls),
    )


def _placements(members: Sequence[float], controls: Sequence[float]) -> tuple[Float64, Float64]:
    """For every member the share of controls below it, for every control that of members above it; ties half."""
    m, n = len(members), len(controls)
    ranks = stats.rankdata(np.concatenate([members, controls]))
    over = (ranks[:m] - stats.rankdata(members)) / n
    under = 1 - (ranks[m:] - stats.rankdata(controls)) / m
    return over, under


def _expit(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))
