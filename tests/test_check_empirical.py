"""The empirical checks on clean plans, and on the shipped step after it was broken in one of four ways.

Which check finds which break (`test_the_table_is_true` is this table; patches are on the shipped module):

======================================  ==========  =============  ===========  ================
break                                   step-audit  one-run-audit  one-run-sum  poisson-sampling
======================================  ==========  =============  ===========  ================
noise divided by sqrt(batch), claim .75    found        found          found           -
noise divided by sqrt(batch), claim 5.5    found          -            found           -
90 % of sigma                              found          -            found           -
a fixed noise seed                         found          -              -           found
shuffled instead of Poisson sampling         -            -              -           found
======================================  ==========  =============  ===========  ================

One run cannot refute a claim above 2.6 with the confidence that is asked for, whatever happens; the check says so. The
sum's attack does not look for noise that is used again, the step's does. A fixed seed of the operating system's
stream repeats the sampling of every round, which is why the sampling's look finds it too.

How sure the verdicts are. Noise comes from the operating system, so each run of these tests draws anew. Bounds of sound
steps exceed their claims far less often than their confidence says: both errors would have to be 3.5 standard
deviations off together, 1e-6; one run at sigma 4 would need 150 right guesses where 117 +- 7 are expected, 1e-5. The
sampling's p-value has no such reserve, so its level is 1e-6 here. Breaks that are found are found with more room.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy import stats

import fedcollm_privacy
from fedcollm_audits import check_empirical, one_run
from fedcollm_audits.check_empirical import (
    CHECKS,
    FALSE_ALARMS,
    audit_the_run,
    audit_the_sampling,
    audit_the_step,
    audit_the_sum,
    installed_code,
    least_visible_fault,
)
from fedcollm_audits.confidence import gaussian_mu
from fedcollm_audits.evidence import Envelope, Evidence, LedgerExport
from fedcollm_audits.planned import Planned, planned_of
from fedcollm_audits.real_sum import honest_part, real_secure_sum, smallest_round
from fedcollm_audits.sampling_audit import _dispersion, audit_sampling, judge_sampling, steps_entered
from fedcollm_audits.verdict import Finding
from fedcollm_privacy import dp_sgd
from fedcollm_privacy.adaptive import AdaptivePlan
from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.messages import NoisySum
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom
from fedcollm_privacy.secure_sum import MaskedSum

RUN: dict[str, Callable[[Evidence], Finding]] = {check.name: check.run for check in CHECKS}
STEP, ONE, SUM, SAMPLING = "step-audit", "one-run-audit", "one-run-sum", "poisson-sampling"


@pytest.fixture(autouse=True)
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_empirical.FALSE_ALARMS, SAMPLING, 1e-6)  # type: ignore[arg-type]


def plan(**changes: Any) -> DpPlan:
    fields: dict[str, Any] = {
        "unit": "record",
        "max_records_per_unit": 1,
        "max_grad_norm": 0.7,
        "noise_multiplier": 1.0,
        "sample_rate": Fraction(1, 10),
        "expected_batch_size": 100,
        "steps_per_round": 10,
        "rounds": 6,
        "delta": 1e-5,
    }
    return DpPlan(**(fields | changes))


def gradient_plan(**changes: Any) -> DpPlan:
    """One-step rounds whose noise is that of two honest sites together."""
    fields = {"noise": "distributed", "release": "gradient", "least_honest": 2, "steps_per_round": 1, "rounds": 60}
    return plan(**(fields | changes))


def planned(of: DpPlan, **changes: Any) -> Planned:
    return Planned(**({"plan": of, "claim": of.epsilon(of.steps), "sites": ("a",)} | changes))


def coins(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def audited(check: str, of: DpPlan, calls: int = 100) -> Finding:
    """One check's audit, with as many calls of the step as the fault needs that is looked for."""
    if check == STEP:
        return audit_the_step(planned(of), coins(), calls=calls)
    if check == ONE:
        return audit_the_run(planned(of), coins())
    if check == SAMPLING:
        return audit_the_sampling(planned(of))
    shares = replace(of, noise="distributed", release="gradient", least_honest=2, steps_per_round=1, rounds=of.steps)
    return audit_the_sum(planned(shares), calls=calls, real_rounds=1)


# ---------------------------------------------------------------- the shipped step


@pytest.mark.parametrize("sigma", [0.6, 1.0, 4.0])
def test_what_the_shipped_step_leaks_is_within_the_claim_and_not_far_below(sigma: float) -> None:
    of = plan(noise_multiplier=sigma)
    step, one = audit_the_step(planned(of), coins(), calls=400), audited(ONE, of)
    for found in (step, one):
        assert found.status == "pass"
        assert found.details["claim"] == pytest.approx(of.epsilon(60))
        (bound,) = found.details["bounds"]
        assert set(bound) == {"name", "lower", "confidence", "claim"}
        assert bound["lower"] <= bound["claim"]
    assert step.details["bounds"][0]["lower"] > 0.6 * of.epsilon(60)
    assert any("probability 1/10, which was not audited" in line for line in step.evidence)
    assert any("sigma" in line and "T 60" in line for line in one.evidence)


@pytest.mark.parametrize(
    "of", [plan(), gradient_plan(), plan(sample_rate=Fraction(1)), plan(sample_rate=Fraction(1, 3))]
)
def test_the_shipped_sampling_is_poisson(of: DpPlan) -> None:
    found = audit_the_sampling(planned(of))
    assert found.status == "pass"
    assert audit_sampling(of).steps >= 60


def test_sums_of_the_shipped_steps_leak_what_is_claimed_of_sums_through_the_real_secure_sum() -> None:
    of = gradient_plan()
    found = audit_the_sum(planned(of), real_rounds=6)
    assert found.status == "pass"
    names = [bound["name"] for bound in found.details["bounds"]]
    assert [name.startswith("opened by the real secure sum") for name in names] == [False, False, True, True]
    assert found.details["bounds"][0]["lower"] > 0.6 * of.epsilon(60)
    assert found.details["bounds"][2]["claim"] == pytest.approx(of.epsilon(6))
    assert any("10 rounds went through masks" in line and "every sum was exact" in line for line in found.evidence)


def test_with_distributed_noise_the_step_audit_is_about_the_honest_sites_together() -> None:
    of = gradient_plan(least_honest=3)
    found = audit_the_step(planned(of), coins(), calls=400)
    assert found.status == "pass"
    assert found.details["bounds"][0]["lower"] > 0.6 * of.epsilon(60)
    alone = replace(of, least_honest=1, noise_multiplier=of.site_noise_multiplier)
    assert audit_the_step(planned(alone, claim=of.epsilon(60)), coins(), calls=100).status == "fail"


# ---------------------------------------------------------------- the shipped step, broken


def with_less_noise(patch: pytest.MonkeyPatch, share: Callable[[DpPlan], float]) -> None:
    shipped = dp_sgd.noisy_sum

    def broken(**asked: Any) -> NoisySum:
        right = asked["plan"]
        return shipped(**(asked | {"plan": replace(right, noise_multiplier=share(right) * right.noise_multiplier)}))

    patch.setattr(dp_sgd, "noisy_sum", broken)
    patch.setattr(one_run, "noisy_sum", broken)


def divided_by_the_root_of_the_batch(patch: pytest.MonkeyPatch) -> None:
    with_less_noise(patch, lambda of: 1 / math.sqrt(of.expected_batch_size))


def ninety_percent(patch: pytest.MonkeyPatch) -> None:
    with_less_noise(patch, lambda of: 0.9)


def fixed_seed(patch: pytest.MonkeyPatch) -> None:
    """Every stream of "the operating system" starts from the same key."""

    def init(self: SecureRandom) -> None:
        self._stream = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()
        self.seeded = False

    patch.setattr(SecureRandom, "__init__", init)


def shuffled(patch: pytest.MonkeyPatch) -> None:
    """Epochs over a shuffled list, batches of one size: what training code does that knows nothing of privacy."""
    lists: dict[int, list[int]] = {}

    def sample(of: DpPlan, records_of_unit: Sequence[Sequence[int]], random: SecureRandom) -> list[list[int]]:
        size = round(len(records_of_unit) * of.sample_rate)
        batch, left = [], lists.setdefault(len(records_of_unit), [])
        for _ in range(size):
            if not left:
                left.extend(np.random.default_rng().permutation(len(records_of_unit)).tolist())
            batch.append(list(records_of_unit[left.pop()]))
        return batch

    patch.setattr(dp_sgd, "_sample", sample)


SMALL_CLAIM = plan(noise_multiplier=4.0)
TABLE: list[tuple[str, Callable[[pytest.MonkeyPatch], None], DpPlan, set[str]]] = [
    ("noise over sqrt(batch), claim 0.75", divided_by_the_root_of_the_batch, SMALL_CLAIM, {STEP, ONE, SUM}),
    ("noise over sqrt(batch), claim 5.5", divided_by_the_root_of_the_batch, plan(), {STEP, SUM}),
    ("90 % of sigma", ninety_percent, plan(), {STEP, SUM}),
    ("fixed noise seed", fixed_seed, plan(), {STEP, SAMPLING}),
    ("shuffled", shuffled, plan(), {SAMPLING}),
]


# What a check does not see is shown by `make slow`: it takes as long as what it sees.
CELLS = [
    pytest.param(
        *row[1:], check, id=f"{check}-{row[0]}", marks=[] if check in row[3] | {SAMPLING} else [pytest.mark.slow]
    )
    for check in (STEP, ONE, SUM, SAMPLING)
    for row in TABLE
]


@pytest.mark.parametrize(("broken", "of", "finders", "check"), CELLS)
def test_the_table_is_true(
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[pytest.MonkeyPatch], None],
    of: DpPlan,
    finders: set[str],
    check: str,
) -> None:
    broken(monkeypatch)
    found = audited(check, of, calls=600 if broken is ninety_percent else 100)
    assert found.status == ("fail" if check in finders else "pass"), found.evidence[0]
    if found.status == "fail" and check != SAMPLING:
        assert "MORE than" in found.evidence[0]
        assert any(bound["lower"] > bound["claim"] for bound in found.details["bounds"])


def test_a_step_that_refuses_fails_the_check_and_does_not_end_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecureRandom, "normals", lambda self, count: np.zeros(count))
    found = RUN[STEP](evidence(plan()))
    assert found.status == "fail"
    assert "0 times the planned variance" in found.evidence[0]


def test_another_number_than_the_exact_sum_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = MaskedSum.open

    def one_more(self: MaskedSum, uploads: Any) -> Any:
        opened = shipped(self, uploads)
        return replace(opened, total=opened.total + 1)

    monkeypatch.setattr(MaskedSum, "open", one_more)
    found = audit_the_sum(planned(gradient_plan()), calls=4, real_rounds=1)
    assert found.status == "fail"
    assert "exact sum" in found.evidence[0]


def test_colluders_are_left_with_the_honest_sites_part() -> None:
    of = gradient_plan()
    grid = smallest_round(of, dimension=4)
    assert (grid.max_contributors, grid.max_colluding, grid.min_contributors) == (3, 1, 3)
    assert smallest_round(gradient_plan(least_honest=5), dimension=4).max_contributors == 5
    sums = [NoisySum(grid=np.full(4, 10**i), grid_step=grid.grid_step) for i in range(3)]
    assert honest_part(one_run.grids_added)(grid, sums).tolist() == [11] * 4
    with real_secure_sum(grid) as opened:
        assert opened(grid, sums).tolist() == [111] * 4


# ---------------------------------------------------------------- power


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "observations"), [(0.75, 800_000), (1.0, 320_000), (4.0, 800_000)])
def test_the_fault_that_is_said_to_be_visible_is_found_in_95_of_100_audits(sigma: float, observations: int) -> None:
    """Audits by their counts alone: the best threshold on Gaussians, both errors binomial."""
    rng, share, trials = np.random.default_rng(0), least_visible_fault(sigma, observations, 0.9995), observations // 4
    assert 0.5 < share < 1.0

    def found(of: float) -> float:
        wrong = rng.binomial(trials, stats.norm.sf(1 / (2 * of * sigma)), (300, 2)).tolist()
        bounds = [
            gaussian_mu(
                false_positives=alarms,
                negatives=trials,
                false_negatives=misses,
                positives=trials,
                significance=0.0005 / 2,
            )
            for alarms, misses in wrong
        ]
        return float(np.mean(np.array(bounds) > 1 / sigma))

    assert found(share) >= 0.95
    assert found(1 - (1 - share) / 2) < 0.9


def test_where_nothing_would_be_visible_the_check_says_so() -> None:
    assert least_visible_fault(1000.0, 40, 0.9995) == 0.0
    found = audit_the_step(planned(plan(noise_multiplier=1000.0)), coins(), canaries=10, calls=4)
    assert any("would not even find a step without any" in line for line in found.evidence)


def test_one_run_says_what_it_can_show_at_most() -> None:
    assert any("cannot refute a claim of 5.573" in line for line in audited(ONE, plan()).evidence)
    assert any("could have shown" in line for line in audited(ONE, SMALL_CLAIM).evidence)


def test_a_long_run_is_shortened_and_the_claim_with_it() -> None:
    of = plan(rounds=100, noise_multiplier=4.0)
    found = audit_the_run(planned(of), coins(), canaries=100, guesses=20)
    assert found.details["claim"] == pytest.approx(of.epsilon(400))
    assert any("Only 400 of 1000 steps" in line for line in found.evidence)


# ---------------------------------------------------------------- coins


def test_the_canaries_coins_are_those_of_the_given_generator_and_the_operating_systems_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[NDArray[np.bool_]] = []
    shipped = check_empirical._steps_of_a_run
    monkeypatch.setattr(
        check_empirical,
        "_steps_of_a_run",
        lambda of, canaries, included: (seen.append(included), shipped(of, canaries, included))[1],
    )
    few = planned(plan(rounds=1, steps_per_round=1))
    for generator in (coins(7), coins(7), check_empirical._operating_system(), check_empirical._operating_system()):
        audit_the_run(few, generator, canaries=64, guesses=10)
    assert np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[2], seen[3])


# ---------------------------------------------------------------- the sampling's statistics


def drawn(rng: np.random.Generator, steps: int, units: int, q: float) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = rng.random((steps, units)) < q
    return mask


@pytest.mark.parametrize(("steps", "units", "q"), [(60, 500, 0.05), (60, 500, 0.5), (200, 2500, 0.01)])
def test_poisson_samples_are_called_broken_as_seldom_as_the_p_value_says(steps: int, units: int, q: float) -> None:
    rng, runs = np.random.default_rng(0), 400
    found = [judge_sampling(drawn(rng, steps, units, q), Fraction(q)).p_value for _ in range(runs)]
    for level in (0.05, 0.2):
        assert np.mean(np.array(found) < level) <= level + 3 * math.sqrt(level / runs)


@pytest.mark.slow
def test_dispersions_are_calibrated_in_the_tails_too() -> None:
    """The level that the check uses, counted."""
    rng, runs = np.random.default_rng(1), 10_000
    for count, trials, q in ((60, 500, 0.05), (500, 60, 0.05), (500, 60, 0.1)):
        totals = rng.binomial(trials, q, (runs, count))
        p_values = np.array([_dispersion(row, trials, q)[1] for row in totals])
        assert np.mean(p_values < 0.0005) <= 0.0005 * 2.5
        assert np.mean(p_values < 0.05) == pytest.approx(0.05, abs=0.01)


def test_every_way_to_sample_otherwise_is_seen() -> None:
    rng, steps, units, size = np.random.default_rng(2), 60, 500, 25
    rate = Fraction(1, 20)
    epochs = np.concatenate([rng.permutation(units) for _ in range(3)]).reshape(steps, size)
    shuffle, fixed_size = np.zeros((2, steps, units), dtype=np.bool_)
    for step in range(steps):
        shuffle[step, epochs[step]] = True
        fixed_size[step, rng.choice(units, size, replace=False)] = True
    rounds = np.repeat(drawn(rng, 6, units, 0.05), 10, axis=0)
    again = np.tile(drawn(rng, 10, units, 0.05), (6, 1))
    more = drawn(rng, steps, units, 0.06)
    for wrong, spread in ((shuffle, 0.0), (fixed_size, None), (rounds, None), (again, None), (more, None)):
        found = judge_sampling(wrong, rate)
        assert found.p_value < 1e-6
        assert spread is None or found.unit_spread == spread
    assert judge_sampling(fixed_size, rate).batch_spread == 0.0
    everybody = np.ones((3, 9), dtype=np.bool_)
    assert judge_sampling(everybody, Fraction(1)).p_value == 1.0
    everybody[1, 4] = False
    assert judge_sampling(everybody, Fraction(1)).p_value == 0.0


@pytest.mark.parametrize("of", [plan(unit="person", max_records_per_unit=3), gradient_plan()])
def test_who_enters_is_who_the_step_sampled(monkeypatch: pytest.MonkeyPatch, of: DpPlan) -> None:
    """Seen from the loss function against what the sampler gave out."""
    sampled: list[set[int]] = []
    shipped = dp_sgd._sample

    def sample(*asked: Any) -> list[list[int]]:
        units = shipped(*asked)
        sampled.append({records[0] // of.max_records_per_unit for records in units})
        return units

    monkeypatch.setattr(dp_sgd, "_sample", sample)
    entered = steps_entered(of, units=40, steps=13)
    assert [set(row.nonzero()[0].tolist()) for row in entered] == sampled
    assert len(entered) >= 13


def test_seeded_sampling_is_not_audited() -> None:
    with pytest.raises(InvalidValue, match="operating_system"):
        steps_entered(plan(randomness="insecure_test_seed"), units=40, steps=1)


# ---------------------------------------------------------------- which plan


def entry(of: DpPlan | AdaptivePlan, **changes: Any) -> dict[str, Any]:
    claim = of.epsilon(of.steps) if isinstance(of, DpPlan) else of.target_epsilon
    return {"kind": "PLAN", "run_id": "r", "plan": of.as_dict(), "epsilon": claim, "delta": 1e-5} | changes


def evidence(*plans: DpPlan | AdaptivePlan, entries: Sequence[dict[str, Any]] = (), **more: Any) -> Evidence:
    rows = [*(entry(of) for of in plans), *entries]
    ledgers = {
        f"site-{i}": LedgerExport(path=Path(f"site-{i}.jsonl"), opening={}, entries=(row,), heads=())
        for i, row in enumerate(rows)
    }
    fields: dict[str, Any] = {
        "run_dir": Path(),
        "config": {},
        "summary": {"run_id": "r"},
        "transcript": (),
        "ledgers": ledgers,
        "rosters": {},
        "envelope": None,
        "broken": {},
    }
    return Evidence(**(fields | more))


def test_the_plan_with_the_least_noise_is_audited_and_the_others_are_named() -> None:
    found = planned_of(evidence(plan(noise_multiplier=2.0), plan(), plan(noise_multiplier=3.0), plan()))
    assert isinstance(found, Planned)
    assert found.plan == plan()
    assert found.sites == ("site-1", "site-3")
    assert [text.split(",")[0] for text in found.others] == ["site-0 with sigma 2", "site-2 with sigma 3"]
    told = audit_the_step(found, coins(), canaries=10, calls=4).evidence
    assert sum(line.startswith("Not audited, no less noise: site-") for line in told) == 2


def test_a_plan_is_read_as_canonical_json_writes_it() -> None:
    row = entry(plan(max_grad_norm=1.0))
    row["plan"] |= {"max_grad_norm": 1, "noise_multiplier": 1}
    found = planned_of(evidence(entries=[row], config={"secure_sum": {"value_bits": 16}}))
    assert isinstance(found, Planned)
    assert found.plan == plan(max_grad_norm=1.0)
    assert found.value_bits == 16


def test_a_ledger_that_claims_less_than_its_plan_costs_is_refuted_by_the_attack() -> None:
    found = planned_of(evidence(entries=[entry(plan(), epsilon=1.0)]))
    assert isinstance(found, Planned)
    assert found.claim == 1.0
    assert audit_the_step(found, coins(), calls=100).status == "fail"


def test_a_ledger_that_claims_more_is_held_to_what_its_plan_costs() -> None:
    found = planned_of(evidence(entries=[entry(plan(), epsilon=99.0)]))
    assert isinstance(found, Planned)
    assert found.claim == pytest.approx(plan().epsilon(60))


ADAPTIVE = AdaptivePlan(order=8.0, target_epsilon=4.0, delta=1e-5, unit="record")


@pytest.mark.parametrize("check", [STEP, ONE, SUM, SAMPLING])
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (evidence(), "no claim"),
        (evidence(entries=[entry(plan(), run_id="another run")]), "no claim"),
        (evidence(plan(randomness="insecure_test_seed")), "known seed"),
        (evidence(ADAPTIVE), "adaptive"),
        (evidence(plan(noise_multiplier=0.1)), "no attack could refute"),
    ],
    ids=["no ledger", "another run", "seeded", "adaptive", "hardly any noise"],
)
def test_where_no_plan_can_be_audited_nothing_is_shown(check: str, given: Evidence, reason: str) -> None:
    found = RUN[check](given)
    assert found.status == "not shown"
    assert reason in found.evidence[0]


@pytest.mark.parametrize("changes", [{"sample_rate": "1/0"}, {"rounds": 0}, {"noise_multiplier": None}, {"more": 1}])
def test_an_entry_that_holds_no_plan_fails(changes: dict[str, Any]) -> None:
    row = entry(plan())
    row["plan"] |= changes
    found = RUN[STEP](evidence(entries=[row]))
    assert found.status == "fail"
    assert "site-0 holds no plan" in found.evidence[0]


def test_of_a_run_that_sends_updates_the_same_steps_are_summed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_the_sum, "__kwdefaults__", {**audit_the_sum.__kwdefaults__, "calls": 4, "real_rounds": 2})
    found = RUN[SUM](evidence(plan()))
    assert found.status == "pass"
    assert "does not rest on the sum" in found.evidence[1]
    assert len(found.details["bounds"]) == 4


# ---------------------------------------------------------------- the code that ran


def settle(code: str | None, **changes: Any) -> dict[str, Any]:
    ran = None if code is None else {"steps": 1, "code": code}
    return {"kind": "SETTLE", "run_id": "r", "seq": 3, "outcome": "included", "ran": ran} | changes


def with_code(ledger: str | None, statement: str | None) -> Evidence:
    rows = (entry(plan()), settle(ledger))
    export = LedgerExport(path=Path("a.jsonl"), opening={}, entries=rows, heads=())
    stated = {"predicate": {} if statement is None else {"code": statement}}
    envelope = Envelope(payload_type="x", payload=b"", statement=stated, signatures=())
    return evidence(ledgers={"a": export}, envelope=envelope)


def test_the_codes_digest_is_that_of_the_documented_bytes() -> None:
    folder = os.path.dirname(fedcollm_privacy.__file__)
    text = b""
    for name in sorted(name for name in os.listdir(folder) if name.endswith(".py")):
        with open(os.path.join(folder, name), "rb") as file:
            content = file.read()
        text += name.encode("ascii") + bytes([0]) + bytes.fromhex(f"{len(content):016x}") + content
    assert installed_code() == hashlib.sha256(text).hexdigest()


def test_the_code_is_what_ran_only_where_ledger_and_statement_say_so() -> None:
    check, here, other = RUN["code-is-what-ran"], installed_code(), "0" * 64
    assert check(with_code(here, here)).status == "pass"
    for told in ((other, here), (here, other), (other, other)):
        found = check(with_code(*told))
        assert found.status == "fail"
        assert "Other code ran" in found.evidence[0]
    for told in ((None, here), (here, None), (None, None)):
        assert check(with_code(*told)).status == "not shown"
    assert check(evidence()).status == "not shown"


# ---------------------------------------------------------------- the checks as a whole


def test_the_checks_run_as_they_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_the_step, "__kwdefaults__", {"canaries": 50, "calls": 40})
    found = [check.run(evidence(plan())).status for check in CHECKS]
    assert found == ["pass", "pass", "pass", "pass", "not shown"]
    assert {check.group for check in CHECKS} == {"empirical"}
    assert set(FALSE_ALARMS) == {STEP, ONE, SUM, SAMPLING}
