"""The plan: what it refuses, what its digest covers, and that calibration keeps the promise for the whole run."""

from __future__ import annotations

import dataclasses
import json
import math
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.messages import DpTerms
from fedcollm_privacy.plan import DpPlan, calibrate, nominal_size

PERSON: dict[str, Any] = {
    "unit": "person",
    "max_records_per_unit": 4,
    "max_grad_norm": 0.5,
    "noise_multiplier": 1.25,
    "sample_rate": Fraction(32, 1200),
    "expected_batch_size": 32,
    "steps_per_round": 5,
    "rounds": 8,
    "delta": 1e-5,
}
REQUEST: dict[str, Any] = {
    "target_epsilon": 6.0,
    "delta": 1e-5,
    "unit": "record",
    "max_records_per_unit": 1,
    "max_grad_norm": 1.0,
    "expected_batch_size": 64,
    "steps_per_round": 3,
    "rounds": 4,
    "units": 1237,
}
INTEGERS = ["max_records_per_unit", "expected_batch_size", "steps_per_round", "rounds"]
GRADIENT = PERSON | {"steps_per_round": 1, "rounds": 40, "release": "gradient", "least_honest": 4}


@settings(deadline=None)
@given(st.integers(1, 10**9))
def test_nominal_size_keeps_two_significant_digits(units: int) -> None:
    expected = Context(prec=2, rounding=ROUND_HALF_EVEN).create_decimal(units)
    assert Decimal(nominal_size(units)) == expected
    assert abs(nominal_size(units) - units) <= units / 20


@pytest.mark.parametrize(("units", "nominal"), [(1, 1), (7, 7), (99, 99), (104, 100), (996, 1000), (1237, 1200)])
def test_nominal_size_of_some_sites(units: int, nominal: int) -> None:
    assert nominal_size(units) == nominal


@pytest.mark.parametrize("units", [0, -1, 1.5, math.nan, True])
def test_a_site_without_units_has_no_plan(units: Any) -> None:
    with pytest.raises(InvalidValue, match="units"):
        nominal_size(units)
    with pytest.raises(InvalidValue, match="units"):
        calibrate(**(REQUEST | {"units": units}))


def test_a_calibrated_plan_costs_at_most_its_target_for_all_steps() -> None:
    plan = calibrate(**REQUEST)
    assert plan.steps == 12
    assert plan.sample_rate == Fraction(64, 1200)
    # An accountant of our own making, on the library's finer grid.
    step = dp_accounting.PoissonSampledDpEvent(64 / 1200, dp_accounting.GaussianDpEvent(plan.noise_multiplier))
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    exact = PLDAccountant(relation, 1e-4).compose(step, 12).get_epsilon(1e-5)
    assert 6.0 - 0.05 <= exact <= 6.0
    assert exact <= plan.epsilon(12) <= 6.0
    assert plan.epsilon(13) > plan.epsilon(12) > plan.epsilon(3) > plan.epsilon(0) == 0.0


def test_the_exact_number_of_units_is_not_in_the_plan() -> None:
    plans = {calibrate(**(REQUEST | {"units": units})).digest for units in (1151, 1200, 1237, 1249)}
    assert len(plans) == 1


@pytest.mark.parametrize("units", [10, 1237, 50_000])
def test_delta_is_held_to_a_tenth_of_one_unit_and_to_1e_5(units: int) -> None:
    request = REQUEST | {"units": units, "expected_batch_size": 5, "target_epsilon": 2.0}
    most = min(1e-5, 1 / (10 * units))
    assert calibrate(**(request | {"delta": most})).delta == most
    for delta in (1.001 * most, 1 / units, 0.4, math.nan):
        with pytest.raises(InvalidValue, match=r"privacy\.delta.*10 N"):
            calibrate(**(request | {"delta": delta}))


@pytest.mark.parametrize("delta", [0.0, -1e-5])
def test_delta_must_be_positive(delta: float) -> None:
    with pytest.raises(InvalidValue, match="delta"):
        calibrate(**(REQUEST | {"delta": delta}))


def test_a_batch_larger_than_the_site_is_refused_and_an_equal_one_is_not() -> None:
    request = REQUEST | {"units": 50, "delta": 1e-5, "target_epsilon": 50.0}
    assert calibrate(**(request | {"expected_batch_size": 50})).sample_rate == 1
    with pytest.raises(InvalidValue, match=r"privacy\.expected_batch_size.*smallest site"):
        calibrate(**(request | {"expected_batch_size": 51}))


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf, 1e-9, 1e5])
def test_a_budget_that_cannot_be_met_is_refused(target: float) -> None:
    with pytest.raises(InvalidValue, match="epsilon"):
        calibrate(**(REQUEST | {"target_epsilon": target}))


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [0, -1, 2.0, 2.5, math.nan, True, "2", Fraction(2)])
def test_counts_are_integers(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=field):
        DpPlan(**(PERSON | {field: value}))
    if field != "max_records_per_unit":
        with pytest.raises(InvalidValue, match=field):
            calibrate(**(REQUEST | {field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unit", "user"),
        ("unit", "Record"),
        ("neighboring_relation", "replace_one"),
        ("clipping", "adaptive"),
        ("noise", "none"),
        ("release", "model"),
        ("randomness", "42"),
        *[("least_honest", value) for value in (0, -1, 2.0, math.nan, True)],
        *[("max_grad_norm", value) for value in (0, -1.0, math.nan, math.inf, "1", True)],
        *[("noise_multiplier", value) for value in (0, -1.0, math.nan, math.inf, "1", True)],
        *[("sample_rate", value) for value in (0.1, 1, Fraction(0), Fraction(-1, 2), Fraction(3, 2), "1/2")],
        *[("delta", value) for value in (0, 0.0, -1e-5, 0.6, 1.0, math.nan, "1e-5")],
    ],
)
def test_a_plan_with_a_value_out_of_range_does_not_exist(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=field):
        DpPlan(**(PERSON | {field: value}))


def test_a_record_is_one_record() -> None:
    with pytest.raises(InvalidValue, match="max_records_per_unit"):
        DpPlan(**(PERSON | {"unit": "record"}))


def test_a_plan_cannot_be_changed() -> None:
    plan = DpPlan(**PERSON)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.noise_multiplier = 0.1  # type: ignore[misc]


def test_the_digest_changes_with_every_field() -> None:
    changes: dict[str, Any] = {
        "unit": "record",
        "max_records_per_unit": 3,
        "max_grad_norm": 0.5000001,
        "noise_multiplier": 1.2500001,
        "sample_rate": Fraction(32, 1201),
        "expected_batch_size": 33,
        "steps_per_round": 8,
        "rounds": 5,
        "delta": 1.1e-5,
        "clipping": "automatic",
        "noise": "distributed",
        "least_honest": 2,
        "release": "gradient",
        "randomness": "insecure_test_seed",
    }
    fields = {field.name for field in dataclasses.fields(DpPlan)} - {"neighboring_relation"}  # one value only, today
    assert set(changes) == fields
    single = PERSON | {"max_records_per_unit": 1}
    one_step = PERSON | {"steps_per_round": 1}
    released = one_step | {"release": "gradient"}
    digests = {DpPlan(**start).digest for start in (PERSON, single, one_step)}
    starts = {"unit": single, "release": one_step, "noise": released}
    for field, value in changes.items():
        start = starts.get(field, PERSON)
        digests.add(DpPlan(**(start | {field: value})).digest)
    # steps_per_round=8 alone and rounds=5 alone have other totals; swapped, the total is equal and the plan is not.
    digests.add(DpPlan(**(PERSON | {"steps_per_round": 8, "rounds": 5})).digest)
    assert len(digests) == 3 + len(changes) + 1
    assert all(len(digest) == 64 for digest in digests)


def test_equal_plans_have_equal_digests_however_the_rate_is_written() -> None:
    assert DpPlan(**PERSON).digest == DpPlan(**(PERSON | {"sample_rate": Fraction(8, 300)})).digest


def test_as_dict_holds_every_field_and_comes_back_through_json() -> None:
    plan = DpPlan(**PERSON)
    values = json.loads(json.dumps(plan.as_dict(), allow_nan=False))
    assert set(values) == {field.name for field in dataclasses.fields(DpPlan)}
    assert values["sample_rate"] == "2/75"
    assert DpPlan(**(values | {"sample_rate": Fraction(values["sample_rate"])})) == plan


def test_the_terms_are_what_all_sites_share_and_nothing_of_one_sites_own() -> None:
    terms = DpPlan(**PERSON).terms
    shared = {field.name for field in dataclasses.fields(DpTerms)}
    assert dataclasses.asdict(terms) == {"clipping": "flat", "noise": "local"} | {
        name: value for name, value in PERSON.items() if name in shared
    }
    # Noise and rate follow from a site's size; the rounds and delta are its budget; release and honest sites stand in
    # the round's plan beside the terms.
    own = {"noise_multiplier", "sample_rate", "delta", "rounds", "least_honest", "release", "randomness"}
    assert {field.name for field in dataclasses.fields(DpPlan)} == shared | own | {"neighboring_relation"}
    for name, value in {
        "noise_multiplier": 2.0,
        "sample_rate": Fraction(1, 3),
        "delta": 1e-6,
        "rounds": 3,
        "least_honest": 2,
        "randomness": "insecure_test_seed",
    }.items():
        assert DpPlan(**(PERSON | {name: value})).terms == terms, name
    assert DpPlan(**(PERSON | {"steps_per_round": 1, "release": "gradient"})).terms == dataclasses.replace(
        terms, steps_per_round=1
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unit", "record"),
        ("max_records_per_unit", 3),
        ("max_grad_norm", 0.25),
        ("expected_batch_size", 33),
        ("steps_per_round", 1),
        ("clipping", "automatic"),
        ("noise", "distributed"),
    ],
)
def test_plans_that_differ_in_what_is_shared_have_other_terms(name: str, value: Any) -> None:
    start = PERSON | {"max_records_per_unit": 1} if name == "unit" else PERSON
    start = GRADIENT if name == "noise" else start
    one, two = DpPlan(**start).terms, DpPlan(**(start | {name: value})).terms
    assert getattr(two, name) == value
    assert dataclasses.replace(one, **{name: value}) == two != one


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unit", "user"),
        ("clipping", "adaptive"),
        ("noise", "none"),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", math.nan),
        ("max_records_per_unit", 0),
        ("expected_batch_size", 2.0),
        ("steps_per_round", True),
    ],
)
def test_terms_that_no_plan_could_have_do_not_exist(name: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=name):
        dataclasses.replace(DpPlan(**PERSON).terms, **{name: value})


# ---------------------------------------------------------------- whose noise, seen by whom


def epsilon_of(sigma: float, steps: int) -> float:
    """By dp-accounting alone."""
    step = dp_accounting.PoissonSampledDpEvent(32 / 1200, dp_accounting.GaussianDpEvent(sigma))
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    return float(PLDAccountant(relation, 1e-3).compose(step, steps).get_epsilon(1e-5))


def test_the_plans_event_is_what_its_epsilon_is_of() -> None:
    plan = DpPlan(**PERSON)
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    assert PLDAccountant(relation, 1e-3).compose(plan.event).get_epsilon(1e-5) == plan.epsilon(plan.steps)


def test_several_local_steps_have_one_view() -> None:
    """The other sites' noise is absent inside them, whatever anybody hopes of the sum."""
    plan = DpPlan(**(PERSON | {"least_honest": 4}))
    assert plan.site_noise_multiplier == 1.25
    assert plan.epsilon(40) == plan.epsilon_one_update(40) == plan.epsilon_sum_only(40) == epsilon_of(1.25, 40)


def test_a_released_gradient_with_local_noise_is_better_protected_in_a_sum() -> None:
    plan = DpPlan(**GRADIENT)
    assert plan.site_noise_multiplier == 1.25
    assert plan.epsilon(40) == plan.epsilon_one_update(40) == epsilon_of(1.25, 40)
    assert plan.epsilon_sum_only(40) == epsilon_of(2.5, 40)


def test_distributed_noise_claims_the_sums_view_and_tells_the_other() -> None:
    plan = DpPlan(**(GRADIENT | {"noise": "distributed"}))
    assert plan.site_noise_multiplier == 0.625
    assert plan.epsilon(40) == plan.epsilon_sum_only(40) == epsilon_of(1.25, 40)
    assert plan.epsilon_one_update(40) == epsilon_of(0.625, 40) > plan.epsilon(40)


def test_only_one_step_rounds_release_gradients_and_distribute_noise() -> None:
    with pytest.raises(InvalidValue, match="steps_per_round"):
        DpPlan(**(GRADIENT | {"steps_per_round": 2}))
    with pytest.raises(InvalidValue, match="noise"):
        DpPlan(**(PERSON | {"noise": "distributed"}))
    with pytest.raises(InvalidValue, match="noise"):
        DpPlan(**(PERSON | {"steps_per_round": 1, "noise": "distributed"}))


@pytest.mark.parametrize("noise", ["local", "distributed"])
def test_a_released_gradients_range_holds_the_longest_noise_beside_the_sum(noise: str) -> None:
    plan = DpPlan(**(GRADIENT | {"noise": noise, "expected_batch_size": 320, "sample_rate": Fraction(320, 1200)}))
    longest = math.sqrt(106 * math.log(2))  # Box and Muller's radius at the smallest 53-bit uniform
    assert plan.gradient_clip >= plan.max_grad_norm * (20 + longest * plan.site_noise_multiplier)
