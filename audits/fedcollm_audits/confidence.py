"""Lower bounds on privacy loss from counted guesses, each true with a stated confidence whatever the mechanism.

A bound of an audit says "this much leaks at least". None of them says that no more leaks.
"""

from __future__ import annotations

import math

from scipy import stats

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue

__all__ = ["clopper_pearson_epsilon", "gaussian_mu", "one_run_epsilon", "one_run_p_value", "rate_upper_bound"]

_BISECTIONS = 60
_LARGEST_EPSILON = 64.0
"""Where the search ends; exp(-64) is a chance of guessing wrong that no audit could count."""


def rate_upper_bound(events: int, trials: int, significance: float) -> float:
    """Clopper and Pearson's (1934) one-sided upper bound on an event's probability; 1.0 where all trials were events.

    Args:
        events: how often it happened.
        trials: in so many independent trials.
        significance: probability with which the bound may be wrong, in (0, 1).
    """
    _count(trials, events=events)
    _open_interval(significance=significance)
    return 1.0 if events == trials else float(stats.beta.ppf(1 - significance, events + 1, trials - events))


def clopper_pearson_epsilon(
    *, true_positives: int, false_positives: int, positives: int, negatives: int, delta: float, significance: float
) -> float:
    """Epsilon that a test of "included or not" shows at least (Jagielski, Ullman, Oprea 2020, section 4.1).

    Args:
        true_positives: of ``positives`` independent trials with the canary, how many the test called included.
        false_positives: of ``negatives`` independent trials without it, how many the test called included.
        positives: trials with the canary.
        negatives: trials without it.
        delta: of the guarantee that is tested.
        significance: probability with which the bound may be wrong, half for either rate.

    Returns:
        ``ln((TPR_l - delta) / FPR_u)``, 0.0 where that is negative or undefined.
    """
    _count(positives, true_positives=true_positives)
    _validate.in_range(0, 1, delta=delta)
    hit = 1 - rate_upper_bound(positives - true_positives, positives, significance / 2) - delta
    alarm = rate_upper_bound(false_positives, negatives, significance / 2)
    return max(0.0, math.log(hit / alarm)) if hit > 0 else 0.0


def gaussian_mu(
    *, false_positives: int, negatives: int, false_negatives: int, positives: int, significance: float
) -> float:
    """The largest mu for which the trials refute mu-GDP (Nasr et al. 2023, section 4.2): PhiInv(1-FPR) - PhiInv(FNR).

    A mu-GDP mechanism allows no test a higher value (Dong, Roth, Su 2022, definition 2.6), so this bounds its mu from
    below whatever its shape. Trials must be independent, but need not have equal probabilities: the trade-off function
    is convex, and an average of unequal probabilities is at least as concentrated as of equal ones (Hoeffding 1956).

    Args:
        false_positives: of ``negatives`` trials without the canary, how many the test called included.
        negatives: trials without the canary.
        false_negatives: of ``positives`` trials with the canary, how many the test called not included.
        positives: trials with the canary.
        significance: probability with which the bound may be wrong, half for either rate.

    Returns:
        mu, negative where the test is worse than a coin, minus infinity where it says nothing.
    """
    alarm = rate_upper_bound(false_positives, negatives, significance / 2)
    miss = rate_upper_bound(false_negatives, positives, significance / 2)
    return float(stats.norm.isf(alarm) - stats.norm.ppf(miss))


def one_run_p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How probable so many right guesses are at most under (epsilon, delta) (Steinke, Nasr, Jagielski 2023, thm. 5.2).

    ``P[V >= v] <= beta + 2 m delta alpha``, in one run of the mechanism.

    Args:
        canaries: m; each was included by its own fair coin.
        guesses: r, about how many canaries a guess was made; the choice may depend on all that was seen.
        correct: v, how many of the guesses are right.
        epsilon: of the guarantee that is tested.
        delta: of the same.
    """
    _count(canaries, guesses=guesses)
    _count(guesses, correct=correct)
    _validate.at_least(0, epsilon=epsilon)
    _validate.in_range(0, 1, delta=delta)
    # The chance of a right guess is e^eps / (1 + e^eps), written so that nothing overflows.
    right = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(correct - 1, guesses, right))
    cumulated = stats.binom.cdf(range(-1, correct), guesses, right)
    # P[v > Bin >= v - i] / i for i = 1..v.
    alpha = max((float(cumulated[correct] - cumulated[correct - i]) / i for i in range(1, correct + 1)), default=0.0)
    return min(1.0, beta + 2 * canaries * delta * alpha)


def one_run_epsilon(*, canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """The largest epsilon that one run's guesses refute; 0.0 if they refute none. Arguments as in `one_run_p_value`.

    Args:
        significance: probability with which the bound may be wrong. The number of guesses must be fixed beforehand.
    """
    _open_interval(significance=significance)

    def refuted(epsilon: float) -> bool:
        return (
            one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
            < significance
        )

    low, high = 0.0, _LARGEST_EPSILON
    if not refuted(low):
        return 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _count(most: int, **fields: int) -> None:
    _validate.integer_at_least(1, trials=most)
    for name, value in fields.items():
        _validate.integer_at_least(0, **{name: value})
        if value > most:
            raise InvalidValue(name, value, f"at most the number of trials, {most}")


def _open_interval(**fields: float) -> None:
    for name, value in fields.items():
        _validate.positive(**{name: value})
        if not value < 1:
            raise InvalidValue(name, value, "a number in (0, 1)")
