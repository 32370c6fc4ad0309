"""The filter for plans that may change: what it admits is within its target, at the published price."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp

from fedcollm_privacy.accounting import Steps, epsilon_of
from fedcollm_privacy.adaptive import AdaptivePlan, RdpFilter, best_order
from fedcollm_privacy.cross_checks import prv_epsilon
from fedcollm_privacy.errors import BudgetExceeded, InvalidValue

PLAN = AdaptivePlan(order=5.1, target_epsilon=3.0, delta=1e-5, unit="record")


def steps(sigma: float, rate: Fraction, count: int) -> Steps:
    return Steps(noise_multiplier=sigma, sample_rate=rate, steps=count)


def most_steps(order: float, target: float, sigma: float, rate: Fraction) -> int:
    """How many steps the filter admits at an order, by bisection."""
    budget = RdpFilter(AdaptivePlan(order=order, target_epsilon=target, delta=1e-5, unit="record"))
    low, high = 0, 5000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if budget.admits(steps(sigma, rate, middle)) else (low, middle)
    return low


# (target epsilon, sigma, q, order, steps by the filter, steps by PRV for a committed schedule), delta 1e-5
PRICE = [
    (1.0, 2.0, Fraction(1, 20), 15.0, 65, 81),
    (3.0, 1.0, Fraction(1, 20), 5.1, 41, 67),
    (8.0, 0.8, Fraction(1, 20), 3.0, 161, 216),
    (3.0, 1.0, Fraction(1, 100), 6.7, 2195, 2649),
    (8.0, 0.7, Fraction(1, 10), 2.7, 14, 23),
]


@pytest.mark.parametrize(("target", "sigma", "rate", "order", "by_filter", "by_prv"), PRICE)
def test_the_filter_admits_the_published_number_of_steps(
    target: float, sigma: float, rate: Fraction, order: float, by_filter: int, by_prv: int
) -> None:
    assert most_steps(order, target, sigma, rate) == by_filter
    chosen = best_order(target, 1e-5, steps(sigma, rate, 1))
    assert most_steps(chosen, target, sigma, rate) == by_filter
    assert chosen == pytest.approx(order, rel=0.07), "the optimum is flat"


@pytest.mark.parametrize(("target", "sigma", "rate", "order", "by_filter", "by_prv"), PRICE)
def test_a_committed_schedule_may_take_the_published_number_of_steps(
    target: float, sigma: float, rate: Fraction, order: float, by_filter: int, by_prv: int
) -> None:
    assert prv_epsilon([steps(sigma, rate, by_prv)], 1e-5) <= target
    assert prv_epsilon([steps(sigma, rate, by_prv + 1)], 1e-5) > target
    assert 1.17 < by_prv / by_filter < 1.65, "the price of being free to change"


BLOCKS = st.builds(
    steps,
    st.floats(0.6, 5.0),
    st.fractions(Fraction(1, 100), Fraction(1), max_denominator=200),
    st.integers(0, 30),
)


@settings(max_examples=8, deadline=None)
@given(blocks=st.lists(BLOCKS, min_size=1, max_size=6), order=st.sampled_from([2, 4, 8, 20]))
def test_what_was_admitted_is_within_the_target_and_what_was_refused_is_not(blocks: list[Steps], order: int) -> None:
    plan = AdaptivePlan(order=float(order), target_epsilon=20.0, delta=1e-5, unit="record")
    budget = RdpFilter(plan)
    admitted: list[Steps] = []

    def divergence(*more: Steps) -> float:  # by Opacus, a second implementation; whole orders are exact in both
        return sum(
            float(
                compute_rdp(q=float(b.sample_rate), noise_multiplier=b.noise_multiplier, steps=b.steps, orders=[order])[
                    0
                ]
            )
            for b in (*admitted, *more)
        )

    for block in blocks:
        before = budget.divergence
        fits = budget.admits(block)
        assert budget.divergence == before, "asking spends nothing"
        assert fits == (divergence(block) <= plan.rdp_budget)
        if fits:
            budget.spend(block)
            admitted.append(block)
        else:
            with pytest.raises(BudgetExceeded, match="Nothing was spent now"):
                budget.spend(block)
        assert budget.divergence == pytest.approx(divergence(), rel=1e-6, abs=1e-12)
    assert epsilon_of(admitted, 1e-5) <= plan.target_epsilon + 2e-3


def test_steps_may_be_chosen_by_what_is_left() -> None:
    # An analyst who halves the noise while it still fits, and then takes single steps to the end.
    budget = RdpFilter(PLAN)
    taken = []
    for sigma in (4.0, 2.0, 1.0, 0.5, 0.25):
        for _ in range(20):
            if budget.admits(steps(sigma, Fraction(1, 20), 1)):
                budget.spend(steps(sigma, Fraction(1, 20), 1))
                taken.append(steps(sigma, Fraction(1, 20), 1))
    assert len(taken) >= 60
    assert budget.divergence <= PLAN.rdp_budget
    assert epsilon_of(taken, PLAN.delta) <= PLAN.target_epsilon
    assert not budget.admits(steps(0.25, Fraction(1, 20), 1))


def test_the_filter_goes_on_from_what_was_spent_before() -> None:
    earlier = (steps(1.0, Fraction(1, 20), 30), steps(1.0, Fraction(1, 20), 10))
    budget = RdpFilter(PLAN, earlier)
    budget.spend(steps(1.0, Fraction(1, 20), 1))
    assert not budget.admits(steps(1.0, Fraction(1, 20), 1))
    assert budget.admits(steps(1.0, Fraction(1, 20), 0)), "a skipped round costs nothing"
    with pytest.raises(BudgetExceeded, match=r"epsilon 3 at delta 1e-05.*order 5\.1"):
        RdpFilter(PLAN, (*earlier, steps(1.0, Fraction(1, 20), 2)))


def test_an_order_at_which_nothing_is_known_admits_nothing() -> None:
    # At sigma 1, q 0.1 the library's series of order 1.4 does not converge.
    plan = AdaptivePlan(order=1.4, target_epsilon=40.0, delta=1e-5, unit="record")
    assert RdpFilter(plan).divergence == 0.0
    assert not RdpFilter(plan).admits(steps(1.0, Fraction(1, 10), 1))


@pytest.mark.parametrize(("order", "expected"), [(2.0, 20.0), (5.1, 3.0), (32.0, 0.8)])
def test_the_budget_converts_back_to_the_target(order: float, expected: float) -> None:
    plan = AdaptivePlan(order=order, target_epsilon=expected, delta=1e-5, unit="person")
    back = plan.rdp_budget + math.log((order - 1) / order) - (math.log(1e-5) + math.log(order)) / (order - 1)
    assert back == pytest.approx(expected, abs=1e-12)


def test_every_field_of_the_plan_is_in_its_digest() -> None:
    changes: list[dict[str, Any]] = [{"order": 5.2}, {"target_epsilon": 3.1}, {"delta": 2e-5}, {"unit": "person"}]
    digests = {dataclasses.replace(PLAN, **change).digest for change in changes}
    assert len(digests | {PLAN.digest}) == 5
    assert set(PLAN.as_dict()) == {field.name for field in dataclasses.fields(PLAN)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, value) for field in ("order", "target_epsilon", "delta") for value in (math.nan, math.inf, 0.0, "1")],
        ("order", 1.0),
        ("order", 0.5),
        ("order", True),
        ("delta", 0.6),
        ("unit", "token"),
        ("neighboring_relation", "replace_one"),
    ],
)
def test_a_plan_that_promises_nothing_definite_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=field):
        dataclasses.replace(PLAN, **{field: value})


def test_an_order_whose_conversion_eats_the_whole_target_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"order = 2\.0.*best_order"):
        AdaptivePlan(order=2.0, target_epsilon=3.0, delta=1e-5, unit="record")


@pytest.mark.parametrize(("target", "delta"), [(1e-4, 1e-5), (math.nan, 1e-5), (3.0, 0.0), (3.0, 0.7), (-1.0, 1e-5)])
def test_no_order_is_chosen_for_an_impossible_target(target: float, delta: float) -> None:
    with pytest.raises(InvalidValue, match=r"target_epsilon|delta"):
        best_order(target, delta, steps(1.0, Fraction(1, 20), 1))
