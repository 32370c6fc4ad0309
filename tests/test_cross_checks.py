"""Second opinions on epsilon: they agree with published values and with each other, and a wrong epsilon is stopped."""

from __future__ import annotations

import ast
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant
from scipy.integrate import quad

from fedcollm_privacy import accounting, cross_checks
from fedcollm_privacy.accounting import Steps, epsilon_of, rdp_epsilon, renyi_divergences
from fedcollm_privacy.cross_checks import CrossCheck, cross_check, prv_epsilon
from fedcollm_privacy.errors import InvalidValue, PrivacyViolation

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("secure_fedcollm", "privacy/fedcollm_privacy", "audits/fedcollm_audits")
    for path in (ROOT / folder).rglob("*.py")
)
# (sigma, q, steps, delta, epsilon by Opacus RDP, epsilon by Opacus PRV)
OPACUS = [
    (1.0, Fraction(1, 100), 1000, 1e-5, 2.101365, 1.838372),
    (1.0, Fraction(1, 100), 10000, 1e-5, 6.712738, 6.198044),
    (1.1, Fraction(256, 60000), 14062, 1e-5, 2.596556, 2.391744),
    (0.8, Fraction(5, 1000), 1000, 1e-6, 2.626536, 2.014295),
    (1.5, Fraction(4, 100), 2250, 1e-5, 7.32911117143, 6.779132),
    (0.6, Fraction(1, 100), 100, 1e-5, 4.830866, 3.826008),
    (0.5, Fraction(1, 10), 30, 1e-5, 21.000351, 18.250682),
    (1.0, Fraction(1, 10), 60, 1e-5, 6.331062, 5.583081),
    (2.0, Fraction(1, 10), 100, 1e-5, 2.580569, 2.347555),
    (1.0, Fraction(1, 5), 50, 1e-5, 11.286437, 10.138562),
    (4.0, Fraction(1), 10, 1e-5, 3.617100, 3.351598),
    (1.3, Fraction(1, 1000), 100000, 1e-6, 1.322587, 1.237044),
    (1.0, Fraction(1, 8), 24, 1e-3, 3.610083, 2.928101),
    (0.7, Fraction(1, 4), 20, 1e-3, 12.396560, 10.464391),
]
# Opacus' and Microsoft's own tests of PRV.
PRV = [
    (1.5, Fraction(4, 100), 2249, 1e-5, 6.777395712150674),
    (0.8, Fraction(1, 1000), 1000, 1e-6, 0.477771266),
    (1.5, Fraction(1, 1000), 1000, 1e-6, 0.099820660),
    (2.0, Fraction(1, 1000), 100, 1e-6, 0.029104537),
    (0.8, Fraction(1, 20), 100, 1e-6, 6.741051939),
    (1.5, Fraction(1, 20), 1000, 1e-6, 6.209969246),
    (2.0, Fraction(1, 20), 1000, 1e-6, 4.172799867),
    (3.0, Fraction(1, 20), 1000, 1e-6, 2.527574326),
    (2.0, Fraction(1, 5), 100, 1e-6, 5.672055609),
    (3.0, Fraction(1, 5), 100, 1e-6, 3.381220510),
    (1.5, Fraction(1, 1000), 20000, 1e-6, 0.437005109),
]


def steps(sigma: float, rate: Fraction, count: int) -> Steps:
    return Steps(noise_multiplier=sigma, sample_rate=rate, steps=count)


MIXED = [steps(1.0, Fraction(1, 20), 20), steps(1.2, Fraction(1, 20), 20), steps(0.9, Fraction(2, 25), 15)]
QUICK = [steps(4.0, Fraction(1), 10)]


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    cross_checks._cross_check.cache_clear()


@pytest.mark.parametrize(("sigma", "rate", "count", "delta", "_", "expected"), OPACUS)
def test_prv_epsilon_is_the_published_one(
    sigma: float, rate: Fraction, count: int, delta: float, _: float, expected: float
) -> None:
    assert prv_epsilon([steps(sigma, rate, count)], delta) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("sigma", "rate", "count", "delta", "expected"), PRV)
def test_prv_epsilon_is_that_of_its_authors_tests(
    sigma: float, rate: Fraction, count: int, delta: float, expected: float
) -> None:
    assert prv_epsilon([steps(sigma, rate, count)], delta) == pytest.approx(expected, abs=1e-7)


def rdp_over(orders: list[float], schedule: list[Steps], delta: float) -> tuple[float, float]:
    """Epsilon and best order by our divergences and the conversion of Canonne et al. 2020, written out."""
    return min(
        (value + math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1), order)
        for value, order in zip(renyi_divergences(schedule, orders), orders, strict=True)
    )


@pytest.mark.parametrize(("sigma", "rate", "count", "delta", "expected", "_"), OPACUS)
def test_opacus_rdp_is_the_published_one_and_our_bounds_lie_on_its_two_sides(
    sigma: float, rate: Fraction, count: int, delta: float, expected: float, _: float
) -> None:
    accountant = RDPAccountant()
    accountant.history = [(sigma, float(rate), count)]
    assert accountant.get_epsilon(delta) == pytest.approx(expected, abs=1e-6)
    schedule = [steps(sigma, rate, count)]
    assert epsilon_of(schedule, delta) <= expected + 2e-3 + 4e-6 * count
    # Opacus tries more orders and is exact at broken ones.
    assert expected - 1e-6 <= rdp_epsilon(schedule, delta) <= 1.005 * expected


@settings(max_examples=25, deadline=None)
@given(
    sigma=st.floats(0.5, 5.0),
    rate=st.fractions(Fraction(1, 100), Fraction(9, 10), max_denominator=100),
    order=st.floats(1.5, 12.0),
)
def test_divergences_are_never_below_the_integral_that_defines_them(sigma: float, rate: Fraction, order: float) -> None:
    # dp-accounting adds the series' terms without their signs: too large at broken orders, exact at whole ones.
    q = float(rate)

    def integrand(x: float) -> float:
        ratio = 1 - q + q * math.exp((2 * x - 1) / (2 * sigma**2))
        return math.exp(order * math.log(ratio) - x * x / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

    for tried, tolerance in ((order, math.inf), (float(round(order)), 1e-6)):
        order = tried
        edges = (-20 * sigma, order + 20 * sigma)
        integral = quad(integrand, *edges, points=[0.0, order], epsabs=0, epsrel=1e-11, limit=500)[0]
        exact = math.log(integral) / (order - 1)
        value = renyi_divergences([steps(sigma, rate, 1)], [order])[0]
        assert exact * (1 - 1e-6) - 1e-10 <= value <= exact * (1 + tolerance) + 1e-10


def test_opacus_documented_example_of_two_blocks() -> None:
    schedule = [steps(1.0, Fraction(1, 100000), 10), steps(3.0, Fraction(1, 10000), 4)]
    value, best = rdp_over([float(order) for order in range(2, 33)], schedule, 1e-5)
    assert (round(value, 3), best) == (0.336, 23)


@pytest.mark.parametrize(
    ("records", "batch", "sigma", "epochs", "delta", "expected", "order"),
    [(60_000, 150, 1.3, 15, 1e-5, 0.7242234, 19), (100_000, 100, 1.0, 30, 1e-7, 1.4154988, 13)],
)
def test_tensorflow_privacys_epoch_examples(
    records: int, batch: int, sigma: float, epochs: int, delta: float, expected: float, order: int
) -> None:
    orders = [*RDPAccountant.DEFAULT_ALPHAS, 128.0, 256.0, 512.0]
    value, best = rdp_over(orders, [steps(sigma, Fraction(batch, records), epochs * records // batch)], delta)
    assert value == pytest.approx(expected, abs=1e-6)
    assert best == order


def test_a_mixed_schedule_is_checked_and_has_the_published_epsilons() -> None:
    check = cross_check(MIXED, 1e-5)
    assert check.prv == pytest.approx(3.746522, abs=1e-6)
    assert check.rdp == pytest.approx(4.430086, abs=1e-6)
    assert check.pld == epsilon_of(MIXED, 1e-5) == pytest.approx(3.736199, abs=1e-3)
    assert check.prv_missing == ""


BLOCKS = st.builds(
    steps,
    st.floats(0.5, 20.0),
    st.fractions(Fraction(1, 100), Fraction(1), max_denominator=500),
    st.integers(0, 60),
)


@settings(max_examples=8, deadline=None)
@given(schedule=st.lists(BLOCKS, min_size=1, max_size=3), delta=st.sampled_from([1e-7, 1e-5, 1e-3]))
def test_three_methods_agree_on_any_plan(schedule: list[Steps], delta: float) -> None:
    check = cross_check(schedule, delta)
    count = sum(block.steps for block in schedule)
    assert check.pld <= check.rdp + 2e-3 + 4e-6 * count
    if check.prv is None:
        assert "grid would hold" in check.prv_missing
        return
    # PRV reports its estimate plus 0.01.
    assert check.prv - 0.0125 - 1e-4 * check.prv <= check.pld <= max(0.0, check.prv - 0.01) + 0.002 + 4e-6 * count
    assert check.prv - 0.01 <= check.rdp + 1e-6


@pytest.mark.parametrize("factor", [0.99, 1.02, 0.0, math.nan, math.inf])
def test_an_epsilon_that_is_off_by_little_is_stopped(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    true = epsilon_of(QUICK, 1e-5)
    monkeypatch.setattr(cross_checks, "epsilon_of", lambda *_: true * factor)
    with pytest.raises(PrivacyViolation, match=r"contradict.*Nothing was written"):
        cross_check(QUICK, 1e-5)


def test_an_epsilon_above_rdp_is_stopped_even_without_prv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_checks, "MAX_PRV_CELLS", 0)
    schedule = [steps(1.0, Fraction(1, 10), 60)]
    assert cross_check(schedule, 1e-5).prv is None
    cross_checks._cross_check.cache_clear()
    monkeypatch.setattr(cross_checks, "epsilon_of", lambda *_: 6.4)
    with pytest.raises(PrivacyViolation, match="above the RDP bound"):
        cross_check(schedule, 1e-5)


@pytest.mark.parametrize(("sigma", "count"), [(0.6, 100), (1.0, 1000), (0.8, 1000)])
def test_what_the_limit_theorem_says_would_be_stopped(
    monkeypatch: pytest.MonkeyPatch, sigma: float, count: int
) -> None:
    schedule = [steps(sigma, Fraction(1, 100), count)]
    with pytest.warns(UserWarning, match="can underestimate"):
        accountant = GaussianAccountant()
    accountant.history = [(sigma, 0.01, count)]
    claimed = float(accountant.get_epsilon(1e-5))
    assert claimed < epsilon_of(schedule, 1e-5) - 0.1
    monkeypatch.setattr(cross_checks, "epsilon_of", lambda *_: claimed)
    with pytest.raises(PrivacyViolation, match="below what PRV allows"):
        cross_check(schedule, 1e-5)


def test_a_plan_too_large_for_prv_says_so_and_keeps_rdp() -> None:
    check = cross_check([steps(3.0, Fraction(1, 20), 50_000)], 1e-6)
    assert check.prv is None
    assert "more than 400000" in check.prv_missing
    assert check.pld == pytest.approx(24.942 - 0.01, abs=0.02)
    assert check.rdp > check.pld


@pytest.mark.parametrize("error", [OverflowError("x"), ValueError("x"), RuntimeError("x"), ZeroDivisionError("x")])
def test_where_opacus_gives_up_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> float:
        raise error

    monkeypatch.setattr(PRVAccountant, "get_epsilon", fail)
    check = cross_check(QUICK, 1e-5)
    assert check.prv is None
    assert check.prv_missing == f"Opacus gave up: {type(error).__name__}: x"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_prv_epsilon_that_is_no_number_counts_as_given_up(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda *_, **__: value)
    assert "Opacus gave up" in cross_check(QUICK, 1e-5).prv_missing


def test_no_steps_cost_nothing_by_any_method() -> None:
    nothing = CrossCheck(pld=0.0, prv=0.0, rdp=0.0)
    assert cross_check([], 1e-5) == cross_check([steps(1.0, Fraction(1, 2), 0)], 1e-5) == nothing
    assert rdp_epsilon([], 1e-5) == 0.0


@pytest.mark.parametrize("delta", [math.nan, 0.0, -1e-5, 1.5, "1"])
def test_delta_is_a_probability(delta: Any) -> None:
    for ask in (cross_check, prv_epsilon):
        with pytest.raises(InvalidValue, match="delta"):
            ask(QUICK, delta)


def test_asking_again_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    first = cross_check(QUICK, 1e-5)
    monkeypatch.setattr(cross_checks, "epsilon_of", None)
    assert cross_check(list(QUICK), 1e-5) == first


# What computes epsilon from a limit theorem, in every library that is installed.
LIMIT_THEOREM = {
    "GaussianAccountant",
    "compute_eps_poisson",
    "compute_eps_uniform",
    "compute_mu_poisson",
    "compute_mu_uniform",
    "create_accountant",  # by a word in a configuration
    "get_gdp_parameter_estimate",
    "register_accountant",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_source_can_reach_an_accountant_by_the_limit_theorem(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").removeprefix("prometheus_client.registry")  # it knows nothing of privacy
            names = {*module.split("."), *(alias.name for alias in node.names)}
            if node.module == "opacus.accountants":
                assert names <= {"opacus", "accountants", "PRVAccountant"}, path
        elif isinstance(node, ast.Attribute):
            names = {node.attr}
        elif isinstance(node, ast.Name):
            names = {node.id}
        assert not names & (LIMIT_THEOREM | {"gdp", "registry"} if not isinstance(node, ast.Name) else LIMIT_THEOREM)


def test_no_module_of_ours_holds_such_an_accountant() -> None:
    for module in (accounting, cross_checks):
        assert not LIMIT_THEOREM & set(vars(module))
