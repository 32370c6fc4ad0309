"""The one-run audit: published vectors, mechanisms whose leak is known exactly, the shipped steps, and broken ones.

How sure the verdicts are. Coins and noise come from the operating system, so each run of these tests draws anew.

* That a sound run exceeds its claim: with 200 guesses at sigma 4 it takes 148 right ones, and 400 simulated runs gave
  117 on average with a standard deviation of 7.1: about 1e-5. At smaller sigma the claim is out of any reach.
* That a broken one stays within: with the noise over sqrt(batch), 148 suffice, and the simulated runs gave 186 to 200.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedcollm_audits import one_run
from fedcollm_audits.one_run import (
    audit_one_run,
    audit_through_the_sum,
    epsilon_lower_bound,
    grids_added,
    p_value,
)
from fedcollm_privacy import dp_sgd
from fedcollm_privacy.dp_sgd import noisy_sum
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.messages import NoisySum, RoundPlan
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom

from .secure_sums import Round, random_grids, round_plan

SURE = 1 - 1e-5


def plan(**changes: Any) -> DpPlan:
    fields: dict[str, Any] = {
        "unit": "record",
        "max_records_per_unit": 1,
        "max_grad_norm": 0.7,
        "noise_multiplier": 4.0,
        "sample_rate": Fraction(1, 10),
        "expected_batch_size": 100,
        "steps_per_round": 60,
        "rounds": 1,
        "delta": 1e-5,
    }
    return DpPlan(**(fields | changes))


def gradient_plan(**changes: Any) -> DpPlan:
    """One-step rounds whose noise is that of three honest sites together."""
    fields = {"noise": "distributed", "release": "gradient", "least_honest": 3, "steps_per_round": 1, "rounds": 60}
    return plan(**(fields | {"noise_multiplier": 1.0} | changes))


def round_of(of: DpPlan, dimension: int) -> RoundPlan:
    """Of three sites, on the grid that the plan promises."""
    return round_plan(
        dimension=dimension,
        clip=of.gradient_clip,
        value_bits=18,
        min_contributors=3,
        max_contributors=3,
        max_colluding=0,
        dp=of.terms,
        release="gradient",
        noise_multiplier=of.noise_multiplier,
        least_honest=of.least_honest,
    )


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize(
    ("m", "r", "v", "epsilon", "delta", "expected"),
    [
        (100, 100, 75, 0.5, 0.0, 0.0048047394854397),
        (100, 100, 75, 0.5, 1e-5, 0.0049025641670988),
        (1000, 100, 95, 2.0, 1e-5, 0.0178246346430714),
        (1000, 200, 190, 2.0, 1e-5, 0.0016273316215569),
        (10000, 500, 480, 2.0, 1e-5, 0.0037245552388433),
        (100, 20, 20, 2.0, 0.0, 0.0789800317708314),
    ],
)
def test_p_values_are_the_published_ones(m: int, r: int, v: int, epsilon: float, delta: float, expected: float) -> None:
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "expected"),
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
def test_bounds_are_the_published_ones(m: int, r: int, v: int, delta: float, expected: float) -> None:
    assert epsilon_lower_bound(m, r, v, delta, 0.05) == pytest.approx(expected, abs=1e-6)


def test_the_bound_is_where_the_p_value_crosses_the_significance_and_more_right_guesses_bound_more() -> None:
    bounds = [epsilon_lower_bound(1000, 100, v, 1e-5, 0.05) for v in range(60, 101, 5)]
    assert bounds == sorted(bounds)
    for v, bound in zip(range(60, 101, 5), bounds, strict=True):
        assert p_value(1000, 100, v, bound + 1e-6, 1e-5) >= 0.05
        assert bound == 0.0 or p_value(1000, 100, v, bound - 1e-6, 1e-5) < 0.05


# Mechanisms that are (epsilon, delta)-DP by construction. All randomised-response answers are guessed as they are.


def randomised_response(rng: np.random.Generator, runs: int, epsilon: float, delta: float) -> NDArray[np.int64]:
    """20 guesses about 100 coins, each told truly with probability e^eps / (1 + e^eps)."""
    return rng.binomial(20, 1 / (1 + math.exp(-epsilon)), runs)


def each_told_outright(rng: np.random.Generator, runs: int, epsilon: float, delta: float) -> NDArray[np.int64]:
    """Each coin is told outright with probability delta, and known to be; guesses are about those first."""
    outright = np.minimum(rng.binomial(100, delta, runs), 20)
    return outright + rng.binomial(20 - outright, 1 / (1 + math.exp(-epsilon)))


def all_told_outright(rng: np.random.Generator, runs: int, epsilon: float, delta: float) -> NDArray[np.int64]:
    """With probability delta everything is published."""
    return np.where(rng.random(runs) < delta, 20, rng.binomial(20, 1 / (1 + math.exp(-epsilon)), runs))


@pytest.mark.parametrize("delta", [0.0, 1e-3, 1e-2])
@pytest.mark.parametrize("epsilon", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("mechanism", [randomised_response, each_told_outright, all_told_outright])
def test_no_mechanism_of_that_epsilon_and_delta_is_guessed_better_than_the_p_value(
    mechanism: Callable[..., NDArray[np.int64]], epsilon: float, delta: float
) -> None:
    runs = 200_000
    correct = mechanism(np.random.default_rng(1), runs, epsilon, delta)
    for v in range(21):
        bound = p_value(100, 20, v, epsilon, delta)
        assert np.mean(correct >= v) <= bound + 5 * math.sqrt(bound * (1 - bound) / runs) + 1e-5


def test_the_bound_of_a_randomised_response_is_wrong_as_seldom_as_it_says() -> None:
    correct = randomised_response(np.random.default_rng(2), 20_000, 1.0, 0.0)
    wrong = np.isin(correct, [v for v in range(21) if epsilon_lower_bound(100, 20, v, 0.0, 0.05) > 1.0])
    assert 0.0 < wrong.mean() <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / 20_000)


# ---------------------------------------------------------------- the shipped steps


@pytest.mark.parametrize(
    ("sigma", "claim", "least"), [(0.6, 16.2466, 1.2), (1.0, 5.5727, 0.1), (4.0, 0.7522, 0.0)], ids=str
)
def test_a_run_as_it_ships_leaks_no_more_than_its_claim(sigma: float, claim: float, least: float) -> None:
    found = audit_one_run(plan(noise_multiplier=sigma))
    assert found.claimed_epsilon == pytest.approx(claim, abs=1e-3)
    assert least <= found.epsilon_lower_bound <= found.claimed_epsilon
    assert not found.exceeds_claim
    assert (found.canaries, found.guesses) == (1000, 200)
    assert 400 < found.included < 600
    assert found.p_value == pytest.approx(p_value(1000, 200, found.correct, found.claimed_epsilon, 1e-5))
    assert "200 guesses about 1,000 canaries" in found.conditions


def test_rounds_are_one_run_and_persons_count_once() -> None:
    found = audit_one_run(
        plan(noise_multiplier=0.6, steps_per_round=15, rounds=4, unit="person", max_records_per_unit=3), canaries=600
    )
    assert 1.0 < found.epsilon_lower_bound <= found.claimed_epsilon == pytest.approx(16.2466, abs=1e-3)


def breaking(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., NoisySum]:
    def broken(**asked: Any) -> NoisySum:
        return noisy_sum(**(asked | change(asked)))

    return broken


def noise_over_the_square_root_of_the_batch(asked: dict[str, Any]) -> dict[str, Any]:
    right = asked["plan"]
    return {"plan": replace(right, noise_multiplier=right.noise_multiplier / math.sqrt(right.expected_batch_size))}


def test_noise_divided_by_the_square_root_of_the_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "noisy_sum", breaking(noise_over_the_square_root_of_the_batch))
    found = audit_one_run(plan())
    assert found.exceeds_claim
    assert found.epsilon_lower_bound > 1.5 > found.claimed_epsilon
    assert found.p_value < 0.05


def test_every_unit_in_every_batch_in_place_of_a_poisson_sample_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `step_audit` cannot see: it is told who is in the step. Here the sum shows all of a unit's 60 steps."""
    monkeypatch.setattr(dp_sgd, "_sample", lambda plan, records_of_unit, random: [list(r) for r in records_of_unit])
    assert audit_one_run(plan()).exceeds_claim


def test_a_run_that_ignores_its_data_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "_sample", lambda plan, records_of_unit, random: [])
    assert audit_one_run(plan(noise_multiplier=1.0)).epsilon_lower_bound < 0.75


# ---------------------------------------------------------------- the sum of several sites


def test_the_sum_of_three_sites_leaks_no_more_than_is_claimed_of_sums() -> None:
    chosen = gradient_plan()
    found = audit_through_the_sum(chosen, round_plan=round_of(chosen, 500), calls=200, confidence=SURE)
    for one in (found.step, found.one_run):
        assert one.claimed_epsilon == pytest.approx(5.5727, abs=1e-3)
        assert one.epsilon_lower_bound <= one.claimed_epsilon
        assert not one.exceeds_claim
    assert found.step.epsilon_lower_bound > 0.6 * found.step.claimed_epsilon
    # So sure, one run of 500 canaries shows nothing at all (2 m delta is 0.01). At the usual 95 % it does.
    assert 0.1 < epsilon_lower_bound(500, 200, found.one_run.correct, 1e-5, 0.05) < 5.57


def one_share_missing(round_plan: RoundPlan, sums: Sequence[NoisySum]) -> NDArray[np.int64]:
    """Two sites' grids. The third has no records here, so all that is missing is its share of the noise."""
    return grids_added(round_plan, sums[:2])


def only_one_share(round_plan: RoundPlan, sums: Sequence[NoisySum]) -> NDArray[np.int64]:
    return grids_added(round_plan, sums[:1])


def test_one_missing_share_of_the_noise_is_found_by_the_step_audit_and_not_by_one_run() -> None:
    chosen = gradient_plan()
    found = audit_through_the_sum(
        chosen, round_plan=round_of(chosen, 500), calls=300, confidence=SURE, opened=one_share_missing
    )
    assert found.step.exceeds_claim
    assert found.step.epsilon_lower_bound > 1.15 * found.step.claimed_epsilon
    assert epsilon_lower_bound(500, 200, 200, 1e-5, 0.05) < 5.57  # what one run can show ends below the claim
    assert not found.one_run.exceeds_claim


def test_the_sum_that_a_real_secure_sum_opens_is_audited_too(tmp_path: Path) -> None:
    """Three sites, masks, CKKS, the aggregator's process: what the decryptor gives out is what is looked at."""
    chosen = gradient_plan(rounds=8, noise_multiplier=0.5, sample_rate=Fraction(1, 2))
    grid = round_of(chosen, 300)
    federation, opened_rounds = Round.of(tmp_path, random_grids(3, 300, 18)), 0

    def opened(asked: RoundPlan, sums: Sequence[NoisySum]) -> NDArray[np.int64]:
        nonlocal opened_rounds
        opened_rounds += 1
        for participant, site in zip(federation.participants.values(), sums, strict=True):
            participant.grid = site.grid.astype(np.int32)
        total = federation.run(server_round=opened_rounds, value_bits=18, clip=asked.clip, max_colluding=0).total
        assert np.array_equal(total, grids_added(asked, sums))
        return total

    try:
        found = audit_through_the_sum(chosen, round_plan=grid, calls=4, guesses=60, opened=opened)
    finally:
        federation.close()
    assert opened_rounds == 8 + 4
    assert 0.5 < found.one_run.epsilon_lower_bound <= found.one_run.claimed_epsilon
    assert found.step.epsilon_lower_bound > 0


def test_a_round_that_is_not_what_the_plan_promises_is_not_audited() -> None:
    chosen = gradient_plan()
    other = round_of(replace(chosen, noise_multiplier=0.9), 100)
    with pytest.raises(ProtocolError, match="plan promises"):
        audit_through_the_sum(chosen, round_plan=other, calls=4, guesses=20)


# ---------------------------------------------------------------- what it refuses


def test_a_plan_that_releases_the_other_thing_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"plan\.release"):
        audit_one_run(gradient_plan())
    with pytest.raises(InvalidValue, match=r"plan\.release"):
        audit_through_the_sum(plan(), round_plan=round_of(gradient_plan(), 10))


def test_seeded_noise_is_not_audited() -> None:
    with pytest.raises(InvalidValue, match="operating_system"):
        audit_one_run(plan(randomness="insecure_test_seed"))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("canaries", {"canaries": 5}),
        ("guesses", {"guesses": 0}),
        ("guesses", {"guesses": 3}),
        ("guesses", {"guesses": 102}),
        ("significance", {"confidence": 1.0, "guesses": 2}),
    ],
)
def test_impossible_arguments_are_refused(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=field):
        audit_one_run(plan(steps_per_round=1), **({"canaries": 100, "guesses": 10} | changes))


def test_the_coins_are_no_function_of_any_seed() -> None:
    """Canaries' coins decide the bound; a seed that the mechanism shares would void it (JAX-Privacy #362)."""
    np.random.seed(0)
    first = SecureRandom().poisson_mask(Fraction(1, 2), 64)
    np.random.seed(0)
    assert not np.array_equal(first, SecureRandom().poisson_mask(Fraction(1, 2), 64))
    assert one_run.SecureRandom is SecureRandom


def test_the_score_tells_in_from_out_as_the_density_does() -> None:
    chosen = plan(noise_multiplier=1.3, sample_rate=Fraction(1, 4))
    seen = np.random.default_rng(0).normal(size=(5, 7))
    absent, present = stats.norm(0, 1.3).pdf(seen), stats.norm(1, 1.3).pdf(seen)
    expected = np.log((0.75 * absent + 0.25 * present) / absent).sum(axis=0)
    assert one_run._log_likelihood_ratio(chosen, seen) == pytest.approx(expected)
    whole = one_run._log_likelihood_ratio(replace(chosen, sample_rate=Fraction(1)), seen)
    assert whole == pytest.approx(np.log(present / absent).sum(axis=0))
