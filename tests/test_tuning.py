"""The price of selection against the paper's own formulas, and the drawn numbers of trials against scipy's laws."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp import rdp_privacy_accountant as library
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedcollm_privacy.accounting import Steps, rdp_epsilon, renyi_divergences
from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.randomness import SecureRandom
from fedcollm_privacy.tuning import TrialLaw, selected_epsilon

DELTA = 1e-5
BASE = (Steps(noise_multiplier=1.0, sample_rate=Fraction(1, 20), steps=200),)
ORDERS = tuple(float(order) for order in RdpAccountant()._orders)


def tnb(expected: float, eta: float) -> TrialLaw:
    return TrialLaw(kind="truncated_negative_binomial", expected=expected, eta=eta)


def poisson(expected: float) -> TrialLaw:
    return TrialLaw(kind="poisson", expected=expected)


LAWS = (tnb(10, 0), tnb(10, 0.5), tnb(10, 1), tnb(3, 2.5), tnb(50, 1), tnb(1, 1), tnb(200, 0), poisson(1), poisson(10))


@pytest.mark.parametrize(
    ("law", "published"),
    [(tnb(10, 0), 8.23), (tnb(10, 0.5), 8.78), (tnb(10, 1), 9.25), (poisson(10), 10.52), (tnb(50, 1), 11.08)],
)
def test_the_reference_figures_come_out(law: TrialLaw, published: float) -> None:
    assert rdp_epsilon(BASE, DELTA) == pytest.approx(5.37, abs=0.005)
    assert selected_epsilon(BASE, law, DELTA) == pytest.approx(published, abs=0.005)


def test_composing_all_trials_costs_what_the_reference_says() -> None:
    assert rdp_epsilon(BASE * 10, DELTA) == pytest.approx(17.92, abs=0.005)
    assert rdp_epsilon(BASE * 50, DELTA) == pytest.approx(52.93, abs=0.005)


def to_epsilon(orders: Any, divergences: Any) -> float:
    """Canonne, Kamath and Steinke (2020), proposition 12."""
    values = divergences + np.log1p(-1 / orders) - (math.log(DELTA) + np.log(orders)) / (orders - 1)
    return max(0.0, float(np.min(values)))


def by_the_paper(schedule: tuple[Steps, ...], law: TrialLaw) -> float:
    """Theorems 2 and 6, order by order, on our own divergences and with no use of the library's selection."""
    orders = np.array(ORDERS)
    base = np.array(renyi_divergences(schedule, ORDERS))
    if law.eta is not None:
        hat = np.min((1 - 1 / orders) * base + math.log(1 / law.gamma) / orders)
        return to_epsilon(orders, base + (1 + law.eta) * hat + math.log(law.expected) / (orders - 1))
    result = []
    for order, divergence in zip(orders, base, strict=True):
        allowed = math.log1p(1 / (order - 1))
        exponents = (orders - 1) * (base - allowed + np.log1p(-1 / orders)) - np.log(orders)
        by_divergence = 0.5 * np.log1p(-np.exp(-base))  # total variation by Bretagnolle and Huber
        tail = math.exp(min(np.min(exponents[orders > 1.01]), np.min(by_divergence), 0.0))
        result.append(divergence + law.expected * tail + math.log(law.expected) / (order - 1))
    return to_epsilon(orders, np.array(result))


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize(
    "schedule",
    [
        BASE,
        (Steps(noise_multiplier=4.0, sample_rate=Fraction(1), steps=10),),
        (
            Steps(noise_multiplier=1.2, sample_rate=Fraction(1, 20), steps=20),
            Steps(noise_multiplier=0.9, sample_rate=Fraction(2, 25), steps=15),
        ),
    ],
    ids=["subsampled", "full batch", "unequal"],
)
def test_the_price_is_the_papers_theorem(schedule: tuple[Steps, ...], law: TrialLaw) -> None:
    ours, paper = selected_epsilon(schedule, law, DELTA), by_the_paper(schedule, law)
    # The library also uses that divergences grow with the order, which can only help.
    assert paper * 0.995 <= ours <= paper * (1 + 1e-6)
    # A theorem that forgets a factor is told apart: with eta halved, or trials uncounted, the figure differs.
    if law.eta is not None and law.eta > 0 and law.expected > 2:
        assert by_the_paper(schedule, tnb(law.expected, law.eta / 2)) < ours * 0.99


@settings(max_examples=8)
@given(expected=st.floats(1, 300), eta=st.floats(0, 5))
def test_selecting_costs_more_than_one_trial_and_more_trials_cost_more(expected: float, eta: float) -> None:
    one = rdp_epsilon(BASE, DELTA)
    price = selected_epsilon(BASE, tnb(expected, eta), DELTA)
    assert price >= one
    assert selected_epsilon(BASE, tnb(min(500, expected * 1.5), eta), DELTA) >= price
    assert selected_epsilon(BASE, tnb(expected, eta + 0.5), DELTA) >= price


def test_nothing_trained_costs_nothing() -> None:
    assert selected_epsilon([], tnb(10, 1), DELTA) == 0
    none = Steps(noise_multiplier=1.0, sample_rate=Fraction(1, 20), steps=0)
    assert selected_epsilon([none], poisson(10), DELTA) == 0
    assert selected_epsilon([none, *BASE], tnb(10, 1), DELTA) == selected_epsilon(BASE, tnb(10, 1), DELTA)


@settings(max_examples=60)
@given(expected=st.floats(1.0001, 500), eta=st.one_of(st.just(0.0), st.floats(0.01, 20)))
def test_gamma_is_the_librarys_and_gives_the_mean(expected: float, eta: float) -> None:
    law = tnb(expected, eta)
    assert law.gamma == pytest.approx(library._gamma_truncated_negative_binomial(eta, expected), rel=1e-6)
    assert library._truncated_negative_binomial_mean(law.gamma, eta) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_law_is_scipys(law: TrialLaw) -> None:
    counts = np.arange(0, 400)
    if law.eta is None:
        expected = stats.poisson(law.expected).pmf(counts)
    elif law.expected == 1:
        expected = (counts == 1).astype(float)
    elif law.eta == 0:
        expected = stats.logser(1 - law.gamma).pmf(counts)
    else:
        whole = stats.nbinom(law.eta, law.gamma)
        expected = np.where(counts > 0, whole.pmf(counts), 0) / (1 - whole.pmf(0))
    ours = [law.probability(int(count)) for count in counts]
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_drawn_numbers_follow_the_law(law: TrialLaw) -> None:
    random = SecureRandom.insecure_for_tests(7, "trials")
    draws = np.array([law.draw(random) for _ in range(4000)])
    edges = [count for count in range(200) if law.probability(count) * len(draws) >= 8]
    observed = [int(np.sum(draws == count)) for count in edges]
    chances = [law.probability(count) for count in edges]
    rest = 1 - sum(chances)
    if rest * len(draws) >= 8:
        observed.append(len(draws) - sum(observed))
        chances.append(rest)
    if len(observed) == 1:
        assert observed[0] == len(draws)
        return
    scaled = np.array(chances) / sum(chances) * sum(observed)
    assert stats.chisquare(observed, scaled).pvalue > 1e-6
    # The check sees a law that is off by a trial.
    assert stats.chisquare(np.roll(observed, 1), scaled).pvalue < 1e-6


class Coins:
    """Stands for the stream: all coins the same."""

    def __init__(self, face: bool) -> None:
        self.face = face

    def poisson_mask(self, rate: Fraction, count: int) -> Any:
        assert (rate, count) == (Fraction(1, 2), 53)
        return np.full(count, self.face)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_rarest_draws_end(law: TrialLaw) -> None:
    assert law.draw(Coins(False)) == (0 if law.kind == "poisson" else 1)  # type: ignore[arg-type]
    longest = law.draw(Coins(True))  # type: ignore[arg-type]
    assert longest == 1 if law.expected == 1 and law.eta is not None else longest > 2 * law.expected
    assert law.probability(longest) < 1e-13 or law.expected == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "binomial", "expected": 10.0, "eta": 1.0}, "kind"),
        ({"kind": "truncated_negative_binomial", "expected": 0.5, "eta": 1.0}, "expected"),
        ({"kind": "truncated_negative_binomial", "expected": math.nan, "eta": 1.0}, "expected"),
        ({"kind": "truncated_negative_binomial", "expected": 501.0, "eta": 1.0}, "expected"),
        ({"kind": "truncated_negative_binomial", "expected": 10.0, "eta": -0.5}, "eta"),
        ({"kind": "truncated_negative_binomial", "expected": 10.0, "eta": math.nan}, "eta"),
        ({"kind": "truncated_negative_binomial", "expected": 10.0, "eta": math.inf}, "eta"),
        ({"kind": "truncated_negative_binomial", "expected": 10.0}, "eta"),
        ({"kind": "poisson", "expected": 10.0, "eta": 1.0}, "eta"),
        ({"kind": "poisson", "expected": True}, "expected"),
    ],
)
def test_impossible_laws_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        TrialLaw(**fields)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan, -1e-5])
def test_impossible_deltas_are_refused(delta: float) -> None:
    with pytest.raises(InvalidValue, match="delta"):
        selected_epsilon(BASE, tnb(10, 1), delta)


def test_a_foreign_schedule_and_a_poisson_gamma_are_refused() -> None:
    with pytest.raises(InvalidValue, match="schedule"):
        selected_epsilon([(1.0, 0.05, 200)], tnb(10, 1), DELTA)  # type: ignore[list-item]
    with pytest.raises(InvalidValue, match="kind"):
        _ = poisson(10).gamma
    with pytest.raises(InvalidValue, match="trials"):
        tnb(10, 1).probability(-1)
