"""Epsilon against published vectors, closed forms, two other accountants, and properties that any bound must have."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedcollm_privacy.accounting import ACCOUNTANT, calibrate_noise_multiplier, epsilon
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


@FEW
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
