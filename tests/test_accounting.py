"""Epsilon against published vectors, closed forms, two other accountants, and properties that any bound must have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedcollm_privacy import accounting
from fedcollm_privacy.accounting import (
    ACCOUNTANT,
    GDP_FLOOR,
    Steps,
    calibrate_noise_multiplier,
    epsilon,
    epsilon_of,
    gdp_mu,
    privacy_profile,
    rdp_epsilon,
    renyi_divergences,
)
from fedcollm_privacy.errors import InvalidValue

# (sigma, q, steps, delta, epsilon by PLD at discretisation 1e-4), dp-accounting 0.6.0, add or remove one.
PLD = [
    (1.0, Fraction(1, 100), 1000, 1e-5, 1.828244),
    (1.0, Fraction(1, 100), 10000, 1e-5, 6.187745),
    (1.1, Fraction(256, 60000), 14062, 1e-5, 2.381686),
    (0.8, Fraction(5, 1000), 1000, 1e-6, 2.004112),
    (1.5, Fraction(4, 100), 2250, 1e-5, 6.768787),
    (0.6, Fraction(1, 100), 100, 1e-5, 3.815599),
    (0.5, Fraction(1, 10), 30, 1e-5, 18.239426),
    (1.0, Fraction(1, 10), 60, 1e-5, 5.572689),
    (2.0, Fraction(1, 10), 100, 1e-5, 2.337400),
    (1.0, Fraction(1, 5), 50, 1e-5, 10.127951),
    (4.0, Fraction(1), 10, 1e-5, 3.341409),
    (10.0, Fraction(1), 100, 1e-5, 4.377178),
    (1.3, Fraction(1, 1000), 100000, 1e-6, 1.228317),
    (1.0, Fraction(1, 8), 24, 1e-3, 2.917687),
    (0.7, Fraction(1, 4), 20, 1e-3, 10.453270),
    # TensorFlow Privacy's own tests (its PLD column).
    (0.7, Fraction(1, 100), 120, 1e-5, 2.4612381),
    (0.35, Fraction(1, 100), 120, 1e-5, 18.6977407),
    (0.7, Fraction(1), 2, 1e-5, 10.1224946),
    (0.35, Fraction(1), 2, 1e-5, 24.7160779),
]
# (sigma, q, steps, delta, epsilon by RDP over dp-accounting's orders, by PLD at 1e-4 when one unit is replaced)
RDP_AND_REPLACE_ONE = [
    (1.0, Fraction(1, 100), 1000, 1e-5, 2.101367, 2.843446),
    (1.0, Fraction(1, 100), 10000, 1e-5, 6.712757, 10.880807),
    (1.1, Fraction(256, 60000), 14062, 1e-5, 2.596556, 4.221358),
    (0.8, Fraction(5, 1000), 1000, 1e-6, 2.626538, 2.402410),
    (1.5, Fraction(4, 100), 2250, 1e-5, 7.329335, 13.488479),
    (0.6, Fraction(1, 100), 100, 1e-5, 4.831307, 3.982145),
    (0.5, Fraction(1, 10), 30, 1e-5, 21.052951, 20.092775),
    (1.0, Fraction(1, 10), 60, 1e-5, 6.336596, 7.917088),
    (2.0, Fraction(1, 10), 100, 1e-5, 2.580571, 4.368097),
    (1.0, Fraction(1, 5), 50, 1e-5, 11.340185, 15.410927),
    (4.0, Fraction(1), 10, 1e-5, 3.617100, 7.511276),
    (10.0, Fraction(1), 100, 1e-5, 4.728507, 9.997256),
    (1.3, Fraction(1, 1000), 100000, 1e-6, 1.322587, 2.257324),
    (1.0, Fraction(1, 8), 24, 1e-3, 3.613198, 4.270759),
    (0.7, Fraction(1, 4), 20, 1e-3, 12.446228, 14.179816),
]
# TensorFlow Privacy's own tests, its RDP column; without sampling in the last two.
RDP_TF = [
    (0.7, Fraction(1, 100), 120, 3.2392676),
    (0.35, Fraction(1, 100), 120, 22.6248601),
    (0.7, Fraction(1), 2, 10.8602036),
    (0.35, Fraction(1), 2, 26.2880374),
]
# Microsoft's prv_accountant tests, by way of Opacus: upper bounds with an error of 0.01, delta 1e-6.
PRV_MICROSOFT = [
    (0.8, Fraction(1, 1000), 1000, 0.477771266),
    (1.5, Fraction(1, 1000), 1000, 0.099820660),
    (2.0, Fraction(1, 1000), 100, 0.029104537),
    (0.8, Fraction(1, 20), 100, 6.741051939),
    (1.5, Fraction(1, 20), 1000, 6.209969246),
    (2.0, Fraction(1, 20), 1000, 4.172799867),
    (3.0, Fraction(1, 20), 1000, 2.527574326),
    (2.0, Fraction(1, 5), 100, 5.672055609),
    (3.0, Fraction(1, 5), 100, 3.381220510),
    (1.5, Fraction(1, 1000), 20000, 0.437005109),
    (1.5, Fraction(1, 20), 20000, 38.306617914),
    (3.0, Fraction(1, 20), 50000, 24.942005644),
]
# Analytic Gaussian mechanism (Balle and Wang 2018): (sigma, delta, epsilon).
ANALYTIC = [
    (1.0, 1e-5, 4.377178095681),
    (2.0, 1e-5, 1.993091404415),
    (4.0, 1e-5, 0.926341503998),
    (0.5, 1e-5, 9.997256146434),
    (10.0, 1e-6, 0.396857377644),
]
SIGMAS = st.floats(0.5, 5.0)
RATES = st.fractions(Fraction(1, 50), Fraction(1), max_denominator=1000)
DELTAS = st.sampled_from([1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
FEW = settings(max_examples=15, deadline=None)
FEWER = settings(max_examples=6, deadline=None)  # several distributions an example


def rounding(steps: int, rate: Fraction = Fraction(1, 10)) -> float:
    """What the coarser discretisation may add; where a step's privacy loss is narrow, it shows more."""
    return max(2e-3, (2e-6 if rate >= Fraction(1, 300) else 4e-6) * steps)


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta", "expected"), PLD)
def test_epsilon_is_the_published_one_and_never_below_it(
    sigma: float, rate: Fraction, steps: int, delta: float, expected: float
) -> None:
    value = epsilon(sigma, rate, steps, delta)
    assert expected - 1e-6 <= value <= expected + rounding(steps, rate)


@pytest.mark.parametrize(("sigma", "rate", "steps", "expected"), PRV_MICROSOFT)
def test_epsilon_is_within_the_error_of_microsofts_accountant(
    sigma: float, rate: Fraction, steps: int, expected: float
) -> None:
    # The printed value is an upper bound that is at most 0.02 above the lower one.
    assert expected - 0.021 <= epsilon(sigma, rate, steps, 1e-6) <= expected + rounding(steps, rate)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta"),
    [
        (1.0, Fraction(1, 10), 60, 1e-5),
        (2.0, Fraction(1, 10), 100, 1e-5),
        (0.7, Fraction(1, 4), 20, 1e-3),
        (1.5, Fraction(4, 100), 2250, 1e-5),
    ],
)
def test_opacus_prv_agrees_within_its_own_error(sigma: float, rate: Fraction, steps: int, delta: float) -> None:
    accountant = PRVAccountant()
    accountant.history = [(sigma, float(rate), steps)]
    prv = accountant.get_epsilon(delta, eps_error=0.01)
    assert prv - 0.021 <= epsilon(sigma, rate, steps, delta) <= prv + rounding(steps)


@pytest.mark.parametrize(("sigma", "delta", "expected"), ANALYTIC)
@pytest.mark.parametrize("steps", [1, 4, 100])
def test_without_sampling_it_is_the_analytic_gaussian(sigma: float, delta: float, expected: float, steps: int) -> None:
    value = epsilon(sigma * math.sqrt(steps), Fraction(1), steps, delta)
    assert expected - 1e-6 <= value <= expected + 1e-3


def one_step_delta(sigma: float, rate: float, eps: float) -> float:
    """Exact delta of one Poisson-subsampled Gaussian, both directions, from the densities' crossing point."""
    edge = sigma**2 * math.log((math.exp(eps) - (1 - rate)) / rate) + 0.5
    removed = (
        (1 - rate) * norm.sf(edge / sigma) + rate * norm.sf((edge - 1) / sigma) - math.exp(eps) * norm.sf(edge / sigma)
    )
    if math.exp(-eps) <= 1 - rate:
        return float(removed)
    edge = sigma**2 * math.log((math.exp(-eps) - (1 - rate)) / rate) + 0.5
    mixture = (1 - rate) * norm.cdf(edge / sigma) + rate * norm.cdf((edge - 1) / sigma)
    return float(max(removed, norm.cdf(edge / sigma) - math.exp(eps) * mixture))


@FEW
@given(sigma=SIGMAS, rate=RATES, delta=DELTAS)
def test_one_step_is_the_closed_form(sigma: float, rate: Fraction, delta: float) -> None:
    value = epsilon(sigma, rate, 1, delta)
    if one_step_delta(sigma, float(rate), 1e-12) <= delta:
        assert value <= 1e-3
        return
    exact = brentq(lambda eps: one_step_delta(sigma, float(rate), eps) - delta, 1e-12, 60, xtol=1e-9)
    assert exact - 1e-6 <= value <= exact + 1e-3


@FEW
@given(sigma=SIGMAS, rate=RATES, steps=st.integers(1, 400), delta=DELTAS)
def test_pld_is_below_rdp(sigma: float, rate: Fraction, steps: int, delta: float) -> None:
    step = dp_accounting.PoissonSampledDpEvent(float(rate), dp_accounting.GaussianDpEvent(sigma))
    rdp = RdpAccountant().compose(step, steps).get_epsilon(delta)
    assert 0 <= epsilon(sigma, rate, steps, delta) <= rdp + rounding(steps)


@FEWER
@given(sigma=SIGMAS, rate=RATES, steps=st.integers(1, 60), delta=DELTAS, more=st.integers(1, 100))
def test_more_steps_less_noise_larger_batches_and_smaller_delta_cost_more(
    sigma: float, rate: Fraction, steps: int, delta: float, more: int
) -> None:
    value = epsilon(sigma, rate, steps, delta)
    grain = 2e-3  # two roundings of the discretisation
    assert epsilon(sigma, rate, steps + more, delta) >= value - grain
    assert epsilon(sigma * 1.2, rate, steps, delta) <= value + grain
    assert epsilon(sigma, rate / 2, steps, delta) <= value + grain
    assert epsilon(sigma, rate, steps, delta / 10) >= value - grain


def test_no_steps_cost_nothing() -> None:
    assert epsilon(1.0, Fraction(1, 10), 0, 1e-5) == 0.0


def test_the_accountants_name_says_library_version_method_and_grid() -> None:
    assert ACCOUNTANT.startswith("dp-accounting 0.")
    assert "PLD" in ACCOUNTANT
    assert "0.001" in ACCOUNTANT


# (target, delta, rate, steps)
PLANS = [
    (8.0, 1e-5, Fraction(1, 10), 100),
    (3.0, 1e-5, Fraction(1, 10), 100),
    (1.0, 1e-5, Fraction(1, 20), 1000),
    (8.0, 1e-3, Fraction(1, 8), 24),
    (0.5, 1e-6, Fraction(1), 10),
    (30.0, 1e-5, Fraction(1, 2), 20),
]


@pytest.mark.parametrize(("target", "delta", "rate", "steps"), PLANS)
def test_calibration_meets_the_target_and_wastes_nothing(
    target: float, delta: float, rate: Fraction, steps: int
) -> None:
    sigma = calibrate_noise_multiplier(target_epsilon=target, delta=delta, sample_rate=rate, steps=steps)
    assert epsilon(sigma, rate, steps, delta) <= target
    assert epsilon(sigma - 1e-2, rate, steps, delta) > target


# Analytic Gaussian: sigma for (epsilon, delta), exact.
@pytest.mark.parametrize(
    ("target", "delta", "expected"),
    [
        (1.0, 1e-5, 3.730631634816),
        (2.0, 1e-5, 1.993812445644),
        (8.0, 1e-5, 0.600229072199),
        (0.5, 1e-6, 8.057618480725),
    ],
)
def test_calibration_finds_the_analytic_sigma(target: float, delta: float, expected: float) -> None:
    sigma = calibrate_noise_multiplier(target_epsilon=target, delta=delta, sample_rate=Fraction(1), steps=1)
    assert expected - 1e-6 <= sigma <= expected + 1e-2


def test_calibration_gives_the_same_sigma_every_time() -> None:
    # A resumed run calibrates again and must find its own plan.
    plan: dict[str, Any] = {"target_epsilon": 8.0, "delta": 1e-4, "sample_rate": Fraction(1, 7), "steps": 33}
    assert calibrate_noise_multiplier(**plan) == calibrate_noise_multiplier(**plan)


@pytest.mark.parametrize("target", [1e-9, 1e4])
def test_a_budget_that_no_sensible_noise_meets_is_refused_by_name(target: float) -> None:
    with pytest.raises(InvalidValue, match=r"privacy\.epsilon.*noise_multiplier"):
        calibrate_noise_multiplier(target_epsilon=target, delta=1e-5, sample_rate=Fraction(1, 2), steps=2)


VALID = {"noise_multiplier": 1.0, "sample_rate": Fraction(1, 10), "steps": 10, "delta": 1e-5}
NEVER = [math.nan, math.inf, -math.inf, -1, "1", None]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, value) for field in VALID for value in NEVER],
        ("noise_multiplier", 0),
        ("noise_multiplier", True),
        ("sample_rate", 0.1),
        ("sample_rate", Fraction(0)),
        ("sample_rate", Fraction(11, 10)),
        ("steps", 10.0),
        ("steps", 10.5),
        ("steps", True),
        ("delta", 0.0),
        ("delta", 1),
        ("delta", 1.5),
    ],
)
def test_whatever_is_out_of_range_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=field):
        epsilon(**(VALID | {field: value}))
    target: dict[str, Any] = {"target_epsilon": 3.0, "delta": 1e-5, "sample_rate": Fraction(1, 10), "steps": 10}
    if field in target:
        with pytest.raises(InvalidValue, match=field):
            calibrate_noise_multiplier(**(target | {field: value}))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -8.0, True, "8"])
def test_a_target_that_is_no_positive_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidValue, match="epsilon"):
        calibrate_noise_multiplier(target_epsilon=value, delta=1e-5, sample_rate=Fraction(1, 10), steps=10)


def test_asking_again_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    # The ledger asks inside a transaction, once a round.
    first = epsilon(1.1, Fraction(256, 60000), 14062, 1e-5)
    monkeypatch.setattr("fedcollm_privacy.accounting.PLDAccountant", None)
    assert epsilon(1.1, Fraction(256, 60000), 14062, 1e-5) == first


# ---------------------------------------------------------------- schedules


def steps(sigma: float, rate: Fraction, count: int) -> Steps:
    return Steps(noise_multiplier=sigma, sample_rate=rate, steps=count)


MIXED = [steps(1.0, Fraction(1, 20), 20), steps(1.2, Fraction(1, 20), 20), steps(0.9, Fraction(2, 25), 15)]
BLOCKS = st.builds(steps, st.floats(0.7, 5.0), RATES, st.integers(0, 40))
SCHEDULES = st.lists(BLOCKS, min_size=1, max_size=3)


@pytest.fixture
def fine_grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library's own discretisation, at which published values were computed."""
    accounting._composed.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(accounting, "_DISCRETIZATION", 1e-4)
        yield
    accounting._composed.cache_clear()


@pytest.mark.usefixtures("fine_grid")
def test_a_mixed_schedule_costs_the_published_epsilon_on_the_published_grid() -> None:
    assert epsilon_of(MIXED, 1e-5) == pytest.approx(3.736199, abs=1e-6)


def test_a_mixed_schedule_costs_no_less_on_our_grid() -> None:
    assert 3.736199 <= epsilon_of(MIXED, 1e-5) <= 3.736199 + 2e-3
    assert rdp_epsilon(MIXED, 1e-5) == pytest.approx(4.430086, abs=1e-6)


@pytest.mark.usefixtures("fine_grid")
@pytest.mark.parametrize(
    ("sigma", "rate", "count", "delta", "expected"),
    [
        (0.8, Fraction(1, 1000), 1000, 1e-6, 0.46769),
        (1.5, Fraction(1, 20), 1000, 1e-6, 6.19970),
        (2.0, Fraction(1, 5), 100, 1e-6, 5.66179),
        (3.0, Fraction(1, 20), 100, 1e-6, 0.75788),
        (2.0, Fraction(1, 10), 100, 1e-5, 2.337400),
        (4.0, Fraction(1), 10, 1e-5, 3.341409),
    ],
)
def test_on_the_published_grid_the_published_digits_come_out(
    sigma: float, rate: Fraction, count: int, delta: float, expected: float
) -> None:
    assert epsilon_of([steps(sigma, rate, count)], delta) == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize(("sigma", "rate", "count", "delta", "_", "expected"), RDP_AND_REPLACE_ONE)
def test_replacing_a_unit_costs_the_published_epsilon_and_never_less(
    sigma: float, rate: Fraction, count: int, delta: float, _: float, expected: float
) -> None:
    value = epsilon_of([steps(sigma, rate, count)], delta, relation="replace_one")
    assert expected - 1e-6 <= value <= expected + rounding(count, rate)


@pytest.mark.usefixtures("fine_grid")
@pytest.mark.parametrize(
    ("sigma", "rate", "count", "expected"),
    [
        (2.0, Fraction(1, 10), 100, 4.368097),
        (1.1, Fraction(256, 60000), 14062, 4.221358),
        (10.0, Fraction(1), 100, 9.997256),
    ],
)
def test_replacing_a_unit_costs_the_published_digits_on_the_published_grid(
    sigma: float, rate: Fraction, count: int, expected: float
) -> None:
    value = epsilon_of([steps(sigma, rate, count)], 1e-5, relation="replace_one")
    assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("sigma", "rate", "count", "delta", "expected", "_"), RDP_AND_REPLACE_ONE)
def test_rdp_epsilon_is_the_published_one(
    sigma: float, rate: Fraction, count: int, delta: float, expected: float, _: float
) -> None:
    assert rdp_epsilon([steps(sigma, rate, count)], delta) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("sigma", "rate", "count", "expected"), RDP_TF)
def test_rdp_epsilon_is_that_of_tensorflow_privacy(sigma: float, rate: Fraction, count: int, expected: float) -> None:
    assert rdp_epsilon([steps(sigma, rate, count)], 1e-5) == pytest.approx(expected, abs=1e-6)


def test_renyi_divergences_are_those_of_the_librarys_tests() -> None:
    values = renyi_divergences([steps(2.5, Fraction(1, 100), 50)], [1.5, 2.5, 5, 50, 100])
    expected = (6.70579741e-4, 1.08548710e-3, 2.18075656e-3, 2.38460375e-2, 167.416308)
    assert values == pytest.approx(expected, rel=1e-4)


@FEWER
@given(sigma=SIGMAS, rate=RATES, order=st.integers(2, 12), count=st.integers(1, 50))
def test_renyi_divergence_is_the_binomial_sum(sigma: float, rate: Fraction, order: int, count: int) -> None:
    q = float(rate)
    terms = (
        math.comb(order, k) * (1 - q) ** (order - k) * q**k * math.exp((k * k - k) / (2 * sigma**2))
        for k in range(order + 1)
    )
    expected = count * math.log(math.fsum(terms)) / (order - 1)
    assert renyi_divergences([steps(sigma, rate, count)], [order])[0] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_an_order_without_a_value_is_infinite_and_never_small() -> None:
    # At sigma 1, q 0.1 the series of order 1.1 does not converge.
    assert renyi_divergences([steps(1.0, Fraction(1, 10), 1)], [1.1]) == (math.inf,)


@FEWER
@given(schedule=SCHEDULES, delta=DELTAS)
def test_one_history_costs_the_same_however_it_is_written(schedule: list[Steps], delta: float) -> None:
    value = epsilon_of(schedule, delta)
    assert epsilon_of(schedule[::-1], delta) == value
    halves = [
        steps(b.noise_multiplier, b.sample_rate, part) for b in schedule for part in (b.steps // 2, -(-b.steps // 2))
    ]
    assert epsilon_of(halves, delta) == value
    skipped = [steps(0.5, Fraction(1), 0), *schedule]
    assert epsilon_of(skipped, delta) == value
    assert value <= rdp_epsilon(schedule, delta) + 2e-3


@FEWER
@given(sigma=SIGMAS, rate=RATES, count=st.integers(1, 100), delta=DELTAS)
def test_one_block_costs_what_the_plan_is_charged(sigma: float, rate: Fraction, count: int, delta: float) -> None:
    assert epsilon_of([steps(sigma, rate, count)], delta) == epsilon(sigma, rate, count, delta)


@FEWER
@given(schedule=SCHEDULES, delta=DELTAS)
def test_being_replaced_costs_no_less_than_being_added_or_removed(schedule: list[Steps], delta: float) -> None:
    assert epsilon_of(schedule, delta, relation="replace_one") >= epsilon_of(schedule, delta) - 2e-3


def test_a_schedule_without_steps_costs_nothing() -> None:
    for schedule in ([], [steps(1.0, Fraction(1, 2), 0)]):
        assert epsilon_of(schedule, 1e-5) == 0.0
        assert epsilon_of(schedule, 1e-5, max_records=3) == 0.0
        assert privacy_profile(schedule, [0.0, 1.0]) == (0.0, 0.0)
        assert gdp_mu(schedule) == 0.0
        assert rdp_epsilon(schedule, 1e-5) == 0.0
        assert renyi_divergences(schedule, [2.0]) == (0.0,)


@pytest.mark.parametrize(
    ("records", "expected"), [(1, 4.76592), (2, 10.70811), pytest.param(3, 17.54603, marks=pytest.mark.slow)]
)
def test_a_person_with_several_records_costs_the_published_epsilon(records: int, expected: float) -> None:
    value = epsilon_of([steps(1.0, Fraction(1, 20), 200)], 1e-5, max_records=records)
    assert expected - 1e-5 <= value <= expected + 1e-3


def test_a_person_whose_records_all_enter_has_that_many_times_the_sensitivity() -> None:
    value = epsilon_of([steps(30.0, Fraction(1), 400)], 1e-5, max_records=2)
    assert value == pytest.approx(epsilon(15.0, Fraction(1), 400, 1e-5), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relation": "replace_one", "max_records": 2}, "max_records = 2.*add_or_remove_one"),
        ({"relation": "bounded"}, r"relation.*replace_one"),
        ({"max_records": 0}, "max_records"),
        ({"max_records": 2.0}, "max_records"),
        ({"delta": math.nan}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"schedule": [(1.0, 0.1, 10)]}, "schedule.*Steps"),
    ],
)
def test_a_question_about_a_schedule_that_has_no_answer_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        epsilon_of(**({"schedule": MIXED, "delta": 1e-5} | arguments))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, value) for field in ("noise_multiplier", "sample_rate", "steps") for value in NEVER],
        ("noise_multiplier", 0.0),
        ("sample_rate", 0.1),
        ("sample_rate", Fraction(3, 2)),
        ("steps", 1.0),
    ],
)
def test_steps_that_cannot_be_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=field):
        Steps(**({"noise_multiplier": 1.0, "sample_rate": Fraction(1, 10), "steps": 10} | {field: value}))


@pytest.mark.parametrize("order", [1.0, 0.5, -2.0, math.nan, math.inf, True])
def test_renyi_orders_are_above_one(order: Any) -> None:
    with pytest.raises(InvalidValue, match="order"):
        renyi_divergences(MIXED, [2.0, order])


def test_the_event_is_what_the_library_composes() -> None:
    block = steps(1.0, Fraction(1, 10), 60)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3).compose(block.event)
    assert accountant.get_epsilon(1e-5) == epsilon(1.0, Fraction(1, 10), 60, 1e-5)
    assert isinstance(steps(1.0, Fraction(1, 10), 0).event, dp_accounting.NoOpDpEvent)


# ---------------------------------------------------------------- privacy profile and mu-GDP


def gdp_delta(mu: float, eps: float) -> float:
    """Delta of mu-GDP (Dong et al. 2022, corollary 2.13)."""
    return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu)))


def test_the_profile_has_the_deltas_of_the_librarys_tests() -> None:
    assert privacy_profile([steps(math.sqrt(3), Fraction(1), 3)], [1.0])[0] == pytest.approx(0.126936, abs=1e-3)
    assert privacy_profile([steps(0.5, Fraction(1, 5), 3)], [1.0])[0] == pytest.approx(0.15594, abs=1e-3)


@FEWER
@given(schedule=SCHEDULES, delta=DELTAS)
def test_the_profile_and_epsilon_are_one_curve(schedule: list[Steps], delta: float) -> None:
    value = epsilon_of(schedule, delta)
    at, below, nowhere = privacy_profile(schedule, [value, value / 2, 1e4])
    assert at <= delta * (1 + 1e-6)
    assert below >= at
    assert nowhere <= 1e-13


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, "1", None])
def test_the_profile_is_for_epsilons_from_zero(value: Any) -> None:
    with pytest.raises(InvalidValue, match="epsilon"):
        privacy_profile(MIXED, [1.0, value])


@pytest.mark.parametrize(
    ("sigma", "count"), [(1.0, 1), (10.0, 100), (4.0, 10), (50.0, 5000), (100.0, 1), (0.3, 3), (2.0, 7)]
)
def test_without_sampling_mu_is_exact_from_above(sigma: float, count: int) -> None:
    exact = math.sqrt(count) / sigma
    assert exact <= gdp_mu([steps(sigma, Fraction(1), count)]) <= exact * 1.0025


@FEWER
@given(schedule=SCHEDULES, epsilons=st.lists(st.floats(0, 1), min_size=20, max_size=20))
def test_mu_gdp_lies_above_the_whole_profile(schedule: list[Steps], epsilons: list[float]) -> None:
    mu = gdp_mu(schedule)
    reach = epsilon_of(schedule, GDP_FLOOR) * 1.1
    points = [0.0, *(value * reach for value in epsilons)]
    for eps, delta in zip(points, privacy_profile(schedule, points), strict=True):
        assert delta <= max(gdp_delta(mu, eps) if mu else 0.0, GDP_FLOOR)


def test_a_smaller_mu_would_not_do() -> None:
    mu = 0.99 * gdp_mu(MIXED)
    points = [eps / 10 for eps in range(100)]
    deltas = privacy_profile(MIXED, points)
    assert any(delta > max(gdp_delta(mu, eps), GDP_FLOOR) for eps, delta in zip(points, deltas, strict=True))


def test_mu_is_not_that_of_the_limit_theorem() -> None:
    # Where the limit theorem says epsilon 1.505, the truth is 3.816.
    schedule = [steps(0.6, Fraction(1, 100), 100)]
    limit = 0.01 * math.sqrt(100 * math.expm1(1 / 0.6**2))
    assert brentq(lambda eps: gdp_delta(limit, eps) - 1e-5, 0, 10) == pytest.approx(1.505, abs=0.2)
    mu = gdp_mu(schedule)
    assert brentq(lambda eps: gdp_delta(mu, eps) - 1e-5, 0, 10) >= 3.8155


def test_mu_of_a_schedule_without_protection_is_refused() -> None:
    with pytest.raises(InvalidValue, match="at most epsilon 500"):
        gdp_mu([steps(0.1, Fraction(1), 10)])
