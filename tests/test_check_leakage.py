"""The leakage checks on run folders: a memorising control without DP fails them, its private twin does not.

Folders are made here: tiny base models in ``base_models``, adapters trained on the embedded hospitals' records (made
small: 16 patients a hospital, 100 candidates a secret) by the shipped training. The LLM is trained on the records
directly, as no federation does it, so that it has something to give away.

How sure the verdicts are. The private twins' noise is fresh at every run; that their secrets rank so high by chance
that the test fails is 1e-4 (the check's own level would be 0.6 %). The control is a function of its seeds.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from fedcollm_audits import check_empirical, check_leakage
from fedcollm_audits.check_leakage import CHECKS, FALSE_ALARMS, beyond_dp, chance_of_ranks, newly_first
from fedcollm_audits.evidence import Evidence, LedgerExport
from fedcollm_audits.verdict import Finding
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.plan import calibrate
from fedcollm_privacy.randomness import SecureRandom
from secure_fedcollm import embedded
from secure_fedcollm.cli import compose_config
from secure_fedcollm.exposure import Exposure
from secure_fedcollm.records import Record
from secure_fedcollm.tokenization import tokenize
from secure_fedcollm.training import (
    LocalTraining,
    Paid,
    prove_records_independent,
    records_of_units,
    train_non_private,
    train_private,
)

PATIENTS, CANDIDATES, LENGTH, R = 16, 100, 64, 16
STEPS, PRIVATE_STEPS, BATCH = 100, 40, 24
SURE = 1e-4
HOW = LocalTraining(learning_rate=0.005, batch_tokens=8192)
RUN: Mapping[str, Callable[[Evidence], Finding]] = {check.name: check.run for check in CHECKS}


@pytest.fixture(scope="module", autouse=True)
def small_hospitals() -> Any:
    """A few patients of the embedded hospitals, with one note each; everything else stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "PATIENTS_PER_SITE", PATIENTS)
        patch.setattr(embedded, "NOTES_PER_PATIENT", (1,))
        patch.setattr(embedded, "PUBLIC_RECORDS", 40)
        patch.setattr(embedded, "SECRET_CANDIDATES", CANDIDATES)
        yield


def config(private: bool) -> dict[str, Any]:
    experiment = "embedded" if private else "embedded_non_private"
    changes = [f"adapter.r={R}", "adapter.lora_alpha=32", "adapter.target_modules=[all-linear]"]
    changes += ["data.held_out_fraction=0.5", f"data.max_length={LENGTH}"]
    return compose_config([f"experiment={experiment}", *changes, *(["privacy.epsilon=1.0"] if private else [])])


def evidence_of(run: Path, plain: Mapping[str, Any], entries: tuple[dict[str, Any], ...] = (), **more: Any) -> Evidence:
    ledger = LedgerExport(path=run / "ledgers" / "a.jsonl", opening={}, entries=entries, heads=())
    fields: dict[str, Any] = {
        "run_dir": run,
        "config": plain,
        "summary": {"run_id": "r"},
        "transcript": (),
        "ledgers": {"a": ledger} if entries else {},
        "rosters": {},
        "envelope": None,
        "broken": {},
    }
    return Evidence(**(fields | more))


def claim(epsilon: float) -> dict[str, Any]:
    return {"kind": "PLAN", "run_id": "r", "epsilon": epsilon, "delta": 1e-5}


@pytest.fixture(scope="module")
def released(
    load_tiny: Callable[..., Any], tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], Evidence]:
    """``released(private)``: the folder of a run whose both models were trained on all sites' records."""
    made: dict[bool, Evidence] = {}

    def train(run: Path, name: str, architecture: str, private: bool) -> None:
        shutil.copytree(tiny_checkpoint(architecture), run / "base_models" / name)
        adapted = load_tiny(architecture, r=R, lora_alpha=32, target_modules=["all-linear"])
        spec = adapted.shared_spec("factor_average")
        data = embedded.load_embedded(0, 0.5)
        records: tuple[Record, ...] = tuple(record for site in data.sites for record in site.train)
        tokens = tokenize(records, adapted.tokenizer, max_length=LENGTH, append_eos=True)
        if not private:
            train_non_private(
                adapted=adapted,
                spec=spec,
                tokens=tokens,
                steps=STEPS,
                batch_size=BATCH,
                seed=0,
                how=HOW,
                on_step=lambda: None,
            )
        else:
            plan = calibrate(
                target_epsilon=1.0,
                delta=1e-5,
                unit="person",
                max_records_per_unit=3,
                max_grad_norm=1.0,
                expected_batch_size=BATCH,
                steps_per_round=PRIVATE_STEPS,
                rounds=1,
                units=len(records_of_units(tokens)),
            )
            ledger = Ledger(run / f"{name}.sqlite", SigningKey.generate("a"))
            ledger.commit_plan(run_id="r", data_set="d", plan=plan, caps=(Cap(epsilon=1.01, delta=1e-4),))
            paid = Paid(
                plan=plan,
                reservation=ledger.reserve(run_id="r", plan=plan, server_round=1),
                independence=prove_records_independent(adapted, spec, tokens.pad_token_id),
                random=SecureRandom(),
            )
            train_private(adapted=adapted, spec=spec, tokens=tokens, paid=paid, how=HOW, on_step=lambda: None)
        adapted.save(run / f"{name}_adapter")

    def make(private: bool) -> Evidence:
        if private not in made:
            run = tmp_path_factory.mktemp("private" if private else "control")
            plain = config(private)
            (run / "config.yaml").write_text(yaml.safe_dump(plain))
            train(run, "slm", "llama", private)
            train(run, "llm", "gpt2", private)
            made[private] = evidence_of(run, plain, (claim(1.0),) if private else ())
        return made[private]

    return make


# ---------------------------------------------------------------- a control that leaks, and its private twin


def test_secrets_that_a_model_learnt_without_dp_are_found_in_both_models(released: Callable[[bool], Evidence]) -> None:
    found = RUN["planted-secrets"](released(False))
    assert found.status == "fail"
    assert "knows planted secrets" in found.evidence[0]
    for name in ("slm", "llm"):
        row = found.details[name]
        assert row["p_value"] < 1e-6
        assert row["bits"] > 4 > row["bits_before"]
        assert row["bits_of_controls"] == pytest.approx(1.4, abs=0.1)
    assert "without differential privacy" in found.evidence[-1]


def test_the_private_twin_knows_no_secret(
    released: Callable[[bool], Evidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(check_leakage.FALSE_ALARMS, "planted-secrets", SURE)  # type: ignore[arg-type]
    found = RUN["planted-secrets"](released(True))
    assert found.status == "pass"
    assert all(found.details[name]["p_value"] > SURE for name in ("slm", "llm"))
    assert all(found.details[name]["bits"] < 4 for name in ("slm", "llm"))


def test_members_of_the_private_twin_cannot_be_told(released: Callable[[bool], Evidence]) -> None:
    found = RUN["membership"](released(True))
    assert found.status == "pass"
    assert found.details["claim"] == {"epsilon": 1.0, "delta": 1e-5}
    assert any("allows 0.0272 of members" in line for line in found.evidence)


def test_a_run_that_says_it_is_private_and_shows_its_members_fails(
    released: Callable[[bool], Evidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control's models in a folder whose config and ledger promise epsilon 0.1, then 8: two rules, one each.

    Of 32 units the first rule cannot be sure with the error that an audit allows itself, so it gets a larger one here.
    """
    control = released(False)
    plain = config(True)
    run = control.run_dir
    loose = RUN["membership"](evidence_of(run, plain, (claim(8.0),)))
    assert loose.status == "fail"
    assert "AUC above 0.55" in loose.evidence[0]
    assert any("only the AUC rule can" in line for line in loose.evidence)
    monkeypatch.setitem(check_leakage.FALSE_ALARMS, "membership", 0.4)  # type: ignore[arg-type]
    strict = RUN["membership"](evidence_of(run, plain, (claim(0.1),)))
    assert strict.status == "fail"
    assert "than the claimed epsilon allows" in strict.evidence[0]


def test_of_a_run_without_dp_membership_refutes_nothing_and_is_told(released: Callable[[bool], Evidence]) -> None:
    found = RUN["membership"](released(False))
    assert found.status == "not shown"
    assert "members can be told" in found.evidence[0]
    assert found.details["slm loss"]["auc"]["low"] > 0.6


# ---------------------------------------------------------------- what cannot be shown, and why


def changed(evidence: Evidence, **data: Any) -> Evidence:
    plain = copy.deepcopy(dict(evidence.config))
    plain["data"] |= data
    return evidence_of(evidence.run_dir, plain)


@pytest.mark.parametrize("check", sorted(RUN))
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"declared": "private"}, "not the auditor's"),
        ({"task": "text", "path": "hub:someone/notes", "site_field": "s", "unit_field": "p"}, "fetches nothing"),
        ({"task": "text", "path": "gone.jsonl", "site_field": "s", "unit_field": "p"}, "cannot be made again"),
    ],
)
def test_without_the_records_nothing_is_shown(tmp_path: Path, check: str, data: dict[str, Any], reason: str) -> None:
    found = RUN[check](changed(evidence_of(tmp_path, config(True)), **data))
    assert found.status == "not shown"
    assert reason in found.evidence[0]


@pytest.mark.parametrize("check", sorted(RUN))
def test_models_that_do_not_lie_there_are_not_fetched(tmp_path: Path, check: str) -> None:
    plain = config(True)
    plain["model"] |= {"slm": "gpt2", "llm": "gpt2-medium"}
    found = RUN[check](evidence_of(tmp_path, plain))
    assert found.status == "not shown"
    assert "base_models/slm" in found.evidence[0]
    for name in ("slm", "llm"):
        (tmp_path / "base_models" / name).mkdir(parents=True)
    assert "nothing was released" in RUN[check](evidence_of(tmp_path, plain)).evidence[0]


@pytest.mark.parametrize("check", sorted(RUN))
def test_records_of_another_release_are_noticed_by_their_secrets(tmp_path: Path, check: str) -> None:
    """Or members and others would be confused, and the attack would find nothing."""
    told = [{"site": "st-anselm", "prompt": "Door code:", "secret": " 0000"}]
    found = RUN[check](evidence_of(tmp_path, config(True), summary={"run_id": "r", "secrets": told}))
    assert found.status == "not shown"
    assert "other secrets" in found.evidence[0]


def test_without_exchange_the_first_sites_records_are_the_members(tmp_path: Path) -> None:
    plain = compose_config(["experiment=embedded", "method=standalone"])
    data = check_leakage._data(check_leakage.build(check_leakage.Config, plain), evidence_of(tmp_path, plain))
    assert not isinstance(data, Finding)
    assert [site.name for site in data.sites] == ["st-anselm"]
    assert {secret.site for secret in data.secrets} == {"st-anselm"}


# ---------------------------------------------------------------- the rules


def ranked(*ranks: int, candidates: int = 1000) -> tuple[Exposure, ...]:
    return tuple(
        Exposure(
            site="a",
            prompt="code:",
            secret=" 1",
            repetitions=1,
            candidates=candidates,
            rank=rank,
            exposure=math.log2(candidates / rank),
        )
        for rank in ranks
    )


def test_secrets_newly_first_are_as_improbable_as_a_binomial_says() -> None:
    before = ranked(*[500] * 8)
    assert newly_first(ranked(*[500] * 8), before) == (0, 1.0)
    first, chance = newly_first(ranked(1, *[500] * 7), before)
    assert (first, chance) == (1, pytest.approx(1 - 0.999**8))
    first, chance = newly_first(ranked(1, 1, *[500] * 6), before)
    assert (first, chance) == (2, pytest.approx(stats.binom.sf(1, 8, 0.001)))
    assert newly_first(ranked(1, 500), ranked(1, 500)) == (0, 1.0)  # the base model knew it already
    assert newly_first(ranked(1, 50, candidates=200), ranked(100, 100, candidates=200)) == (0, 1.0)


def test_ranks_of_models_that_know_nothing_fail_as_seldom_as_promised() -> None:
    rng = np.random.default_rng(0)
    runs, level = 4000, FALSE_ALARMS["planted-secrets"]

    def alarm() -> bool:
        models = [
            chance_of_ranks(ranked(*rng.integers(1, 1001, 8).tolist()), ranked(*rng.integers(1, 1001, 8).tolist()))
            for _ in range(2)
        ]
        return 2 * min(models) < level

    assert np.mean([alarm() for _ in range(runs)]) <= level + 4 * math.sqrt(level / runs)


@pytest.mark.parametrize(("epsilon", "controls"), [(0.5, 300), (1.0, 50), (2.0, 1000)])
def test_no_mechanism_within_dp_is_called_beyond_it_more_often_than_the_significance(
    epsilon: float, controls: int
) -> None:
    """The worst that epsilon allows: members score high e^epsilon times as often, and nothing tells more."""
    rng, runs, significance = np.random.default_rng(1), 1000, 0.05
    high = 0.5 / math.exp(epsilon)

    def scores(count: int, share: float) -> list[float]:
        return np.where(rng.random(count) < share, 1 + rng.random(count), rng.random(count)).tolist()

    wrong = [
        beyond_dp(
            scores(400, math.exp(epsilon) * high),
            scores(controls, high),
            epsilon=epsilon,
            delta=0.0,
            significance=significance,
        )[0]
        for _ in range(runs)
    ]
    assert np.mean(wrong) <= significance + 4 * math.sqrt(significance / runs)


def test_members_who_stand_apart_are_beyond_a_small_epsilon_and_never_beyond_a_large_one() -> None:
    members, controls = [2.0 + i / 1000 for i in range(300)], [i / 300 for i in range(300)]
    beyond, tpr, fpr = beyond_dp(members, controls, epsilon=1.0, delta=1e-5, significance=0.001)
    assert beyond
    assert tpr > 0.95
    assert 0.01 < fpr < 0.06
    for epsilon in (8.0, 1e6):
        assert not beyond_dp(members, controls, epsilon=epsilon, delta=1e-5, significance=0.001)[0]


def test_the_shares_of_error_are_within_what_a_whole_audit_may_be_wrong_by() -> None:
    assert sum(FALSE_ALARMS.values()) + sum(check_empirical.FALSE_ALARMS.values()) <= 0.01
    names = {check.name for check in CHECKS}
    assert names == set(FALSE_ALARMS)
