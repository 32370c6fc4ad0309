"""Audit bounds against published and independently computed values, and against mechanisms of known leakage."""

from __future__ import annotations

import itertools
import math

import pytest
from scipy import stats

from fedcollm_audits.confidence import (
    clopper_pearson_epsilon,
    gaussian_mu,
    one_run_epsilon,
    one_run_p_value,
    rate_upper_bound,
)
from fedcollm_privacy.errors import InvalidValue

# The one-run numbers equal those of jax_privacy's own test formula.


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "epsilon", "delta", "expected"),
    [
        (100, 100, 75, 0.5, 0.0, 0.0048047394854397),
        (100, 100, 75, 0.5, 1e-5, 0.0049025641670988),
        (1000, 100, 95, 2.0, 1e-5, 0.0178246346430714),
        (1000, 200, 190, 2.0, 1e-5, 0.0016273316215569),
        (10000, 500, 480, 2.0, 1e-5, 0.0037245552388433),
        (100, 20, 20, 2.0, 0.0, 0.0789800317708314),
    ],
)
def test_one_run_p_values_are_the_published_ones(
    canaries: int, guesses: int, correct: int, epsilon: float, delta: float, expected: float
) -> None:
    ours = one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
    assert ours == pytest.approx(expected, abs=1e-15, rel=1e-12)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "expected"),
    [
        (100, 100, 75, 0.0, 0.702214),
        (100, 100, 100, 0.0, 3.492965),
        (1000, 1000, 600, 1e-5, 0.297227),
        (1000, 100, 100, 1e-5, 3.465376),
        (1000, 100, 95, 1e-5, 2.165176),
        (1000, 1000, 1000, 1e-5, 5.782283),
        (5000, 500, 490, 1e-5, 3.335670),
        (10000, 1000, 999, 1e-5, 5.179432),
        (200, 40, 40, 1e-5, 2.548240),
        (500, 60, 58, 1e-5, 2.177204),
    ],
)
def test_one_run_bounds_are_the_published_ones(
    canaries: int, guesses: int, correct: int, delta: float, expected: float
) -> None:
    ours = one_run_epsilon(canaries=canaries, guesses=guesses, correct=correct, delta=delta, significance=0.05)
    assert ours == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(
    ("guesses", "cap"), [(10, 1.0519), (20, 1.8227), (50, 2.7847), (100, 3.4930), (500, 5.1144), (1000, 5.8091)]
)
def test_even_perfect_guesses_bound_only_so_much(guesses: int, cap: float) -> None:
    ours = one_run_epsilon(canaries=guesses, guesses=guesses, correct=guesses, delta=0.0, significance=0.05)
    assert ours == pytest.approx(cap, abs=6e-5)
    assert ours == pytest.approx(-math.log(0.05 ** (-1 / guesses) - 1), abs=1e-9)


def test_the_one_run_p_value_is_the_definition_summed_by_hand() -> None:
    """Theorem 5.2 of Steinke et al. with sums of binomial probabilities, for all counts of a small case."""
    epsilon, delta, canaries = 0.7, 1e-3, 12
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    for guesses, correct in itertools.product(range(1, 9), range(9)):
        if correct > guesses:
            continue
        chance = [math.comb(guesses, k) * right**k * (1 - right) ** (guesses - k) for k in range(guesses + 1)]
        alpha = max((sum(chance[correct - i : correct]) / i for i in range(1, correct + 1)), default=0.0)
        expected = min(1.0, sum(chance[correct:]) + 2 * canaries * delta * alpha)
        ours = one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
        assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("true_positives", "false_positives", "trials", "expected"),
    [(90, 5, 100, 1.987962), (100, 0, 100, 3.281336), (500, 0, 500, 4.905584), (300, 10, 500, 2.723424)],
)
def test_clopper_pearson_bounds_are_the_published_ones(
    true_positives: int, false_positives: int, trials: int, expected: float
) -> None:
    ours = clopper_pearson_epsilon(
        true_positives=true_positives,
        false_positives=false_positives,
        positives=trials,
        negatives=trials,
        delta=1e-5,
        significance=0.05,
    )
    assert ours == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.97])
def test_the_upper_bound_of_a_rate_is_too_low_no_more_often_than_stated(rate: float) -> None:
    """Exact coverage: the probability of all counts whose bound is below the true rate."""
    trials, significance = 200, 0.02
    missed = [k for k in range(trials + 1) if rate_upper_bound(k, trials, significance) < rate]
    assert sum(float(stats.binom.pmf(k, trials, rate)) for k in missed) <= significance


def test_the_upper_bound_is_scipys_exact_interval() -> None:
    for events in (0, 1, 17, 39, 40):
        theirs = stats.binomtest(events, 40, alternative="less").proportion_ci(0.97, method="exact").high
        assert rate_upper_bound(events, 40, 0.03) == pytest.approx(float(theirs), rel=1e-9)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("threshold", [0.5, *(pytest.param(t, marks=pytest.mark.slow) for t in (0.2, 0.9))])
def test_the_bound_of_mu_is_too_high_no_more_often_than_stated(mu: float, threshold: float) -> None:
    """Exact: over all pairs of counts of a Gaussian mechanism with that mu, 60 trials of either kind."""
    trials, significance = 60, 0.1
    alarms = stats.binom.pmf(range(trials + 1), trials, stats.norm.sf(threshold * mu))
    misses = stats.binom.pmf(range(trials + 1), trials, stats.norm.cdf((threshold - 1) * mu))
    wrong = sum(
        float(alarms[i] * misses[j])
        for i, j in itertools.product(range(trials + 1), repeat=2)
        if gaussian_mu(
            false_positives=i, negatives=trials, false_negatives=j, positives=trials, significance=significance
        )
        > mu
    )
    assert wrong <= significance


def test_with_very_many_trials_the_bound_of_mu_is_mu() -> None:
    trials = 10**9
    ours = gaussian_mu(
        false_positives=round(trials * float(stats.norm.sf(0.7))),
        negatives=trials,
        false_negatives=round(trials * float(stats.norm.cdf(-0.7))),
        positives=trials,
        significance=0.05,
    )
    assert 1.399 < ours < 1.4


def test_guesses_that_say_nothing_bound_nothing() -> None:
    nothing = {"positives": 10, "negatives": 10, "significance": 0.05}
    assert clopper_pearson_epsilon(true_positives=0, false_positives=10, delta=0.0, **nothing) == 0.0
    assert clopper_pearson_epsilon(true_positives=5, false_positives=5, delta=1.0, **nothing) == 0.0
    assert gaussian_mu(false_positives=10, false_negatives=0, **nothing) == -math.inf
    assert gaussian_mu(false_positives=0, false_negatives=10, **nothing) == -math.inf
    assert gaussian_mu(false_positives=5, false_negatives=5, **nothing) < 0
    assert one_run_epsilon(canaries=10, guesses=10, correct=5, delta=1e-5, significance=0.05) == 0.0
    assert one_run_epsilon(canaries=10, guesses=1, correct=0, delta=1e-5, significance=0.05) == 0.0


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(InvalidValue, match="correct"):
        one_run_p_value(canaries=10, guesses=5, correct=6, epsilon=1.0, delta=0.0)
    with pytest.raises(InvalidValue, match="guesses"):
        one_run_epsilon(canaries=10, guesses=11, correct=6, delta=0.0, significance=0.05)
    with pytest.raises(InvalidValue, match="events"):
        rate_upper_bound(-1, 5, 0.05)
    for significance in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidValue, match="significance"):
            rate_upper_bound(1, 5, significance)
