"""An administrator says no: it holds in whole runs, is written down with its rule, and the server learns one word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from fedcollm_privacy.contributor import SumPolicy
from fedcollm_privacy.dsse import Envelope, verify_payload
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import BudgetExceeded, ConfigError, FedCollmError, PolicyRefused, SignatureInvalid
from fedcollm_privacy.identity import PublicIdentity, SigningKey, load_public
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.refusals import read_refusals
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.site_policy import DataSetRule, PlanRules
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.home import identity_of
from secure_fedcollm.models import base_digest_of
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.run import run_embedded
from secure_fedcollm.strict_build import build

from .site_policies import write_policies, write_policy
from .test_run import SMALL, write_notes

SITES = ("s00", "s01", "s02")
Start = Callable[..., dict[str, Any]]


@pytest.fixture
def notes(tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Private notes of three sites, and a policy for each."""
    monkeypatch.setenv("FEDCOLLM_HOME", str(tmp_path / "home"))
    path = write_notes(tmp_path / "notes.jsonl", 3, 40)
    write_policies(tmp_path / "home", SITES, path, base_digest_of(str(tiny_checkpoint("llama")), "float32"))
    return path


@pytest.fixture
def start(tmp_path: Path, notes: Path, tiny_checkpoint: Callable[..., Path]) -> Start:
    def launch(*overrides: str, output: str = "out") -> dict[str, Any]:
        given = [
            f"data.path={notes}",
            "data.partition=column",
            "data.site_field=site",
            f"model.slm={tiny_checkpoint('llama')}",
            f"model.llm={tiny_checkpoint('llama', width=64)}",
            f"output_dir={tmp_path / output}",
            *SMALL,
            "distillation.steps=1",
            *overrides,
        ]
        if "private=false" in overrides:
            given = [o for o in given if not o.startswith("privacy.")] + ["~privacy"]
        plain = compose_config(given)
        config = build(Config, plain)
        return run_embedded(config, RunFolder.create(config.output_dir, config.name, plain), RunProgress(quiet=True))

    return launch


def policy_of(home: Path, site: str, notes: Path, base: str, **changes: Any) -> None:
    server = load_public(home / "keys" / "server.pub")
    write_policy(home / "policies" / f"{site}.yaml", site, server, base, str(notes.resolve()), **changes)


def rule(notes: Path, **changes: Any) -> DataSetRule:
    fields: dict[str, Any] = {"name": "notes", "location": str(notes.resolve()), "unit": "record"}
    return DataSetRule(**(fields | {"caps": (Cap(epsilon=100.0, delta=0.1),)} | changes))


NOES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "valid_until": lambda notes: {"valid_until": date(2020, 1, 1)},
    "base_models": lambda notes: {"base_models": ("ab" * 32,)},
    "data_sets": lambda notes: {"data_sets": (rule(notes, location="/elsewhere/notes.jsonl"),)},
    "data_sets[0].unit": lambda notes: {"data_sets": (rule(notes, unit="person"),)},
    "plans.max_epsilon": lambda notes: {"plans": PlanRules(max_epsilon=1.0, max_delta=0.1, noise=("local",))},
    "plans.max_delta": lambda notes: {"plans": PlanRules(max_epsilon=99.0, max_delta=1e-9, noise=("local",))},
    "plans.noise": lambda notes: {"plans": PlanRules(max_epsilon=99.0, max_delta=0.1, noise=("distributed",))},
}


@pytest.mark.parametrize("no", NOES)
def test_one_administrators_no_stops_the_run_before_anything_is_committed(
    start: Start, notes: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path], no: str
) -> None:
    home = tmp_path / "home"
    policy_of(home, "s01", notes, base_digest_of(str(tiny_checkpoint("llama")), "float32"), **NOES[no](notes))
    with pytest.raises(PolicyRefused) as refusal:
        start()
    assert refusal.value.rule == no
    (logged,) = read_refusals(home / "ledgers" / "s01.refusals.jsonl")
    assert logged["rule"] == no
    assert not list((home / "ledgers").glob("*[0-9].sqlite"))


def test_a_missing_policy_refuses_and_says_how_to_write_one(start: Start, tmp_path: Path) -> None:
    (tmp_path / "home" / "policies" / "s02.yaml").unlink()
    with pytest.raises(PolicyRefused, match="fedcollm policy new"):
        start()
    assert not (tmp_path / "home" / "ledgers" / "s00.sqlite").exists()


def test_a_cap_of_the_policy_holds_although_the_run_would_allow_more(
    start: Start, notes: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    home, base = tmp_path / "home", base_digest_of(str(tiny_checkpoint("llama")), "float32")
    policy_of(home, "s01", notes, base, data_sets=(rule(notes, caps=(Cap(epsilon=7.0, delta=0.1),)),))
    with pytest.raises(BudgetExceeded, match="its cap is epsilon 7"):
        start("privacy.cap_epsilon=1000")
    (logged,) = read_refusals(home / "ledgers" / "s01.refusals.jsonl")
    assert logged["rule"] == "data_sets.caps"
    # The site that had committed its plan already gets it back: nothing was ever reserved.
    for site in SITES:
        path = home / "ledgers" / f"{site}.sqlite"
        kinds = [entry["kind"] for entry in LedgerFile(path).entries()]
        assert kinds == {"s00": ["PLAN", "ABORT"], "s01": [], "s02": []}[site]
    policy_of(home, "s01", notes, base, data_sets=(rule(notes, caps=(Cap(epsilon=8.0, delta=0.1, days=30),)),))
    summary = start("privacy.cap_epsilon=8.5", output="second")
    assert summary["sites"]["s00"]["spent_on_data_set"] <= 8.0
    with pytest.raises(BudgetExceeded, match="in 30 days"):
        start("privacy.cap_epsilon=1000", output="third")


def test_a_policy_that_turns_stricter_during_a_run_leaves_the_site_out_with_one_word(
    start: Start, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secure_fedcollm import site_guard

    checked = site_guard.SiteGuard.check_round

    def strict(self: Any, plan: Any) -> None:
        if plan.server_round == 2 and self.policy.site == "s02":
            raise PolicyRefused("opening.min_contributors", "asks for secrets of the house")
        checked(self, plan)

    monkeypatch.setattr(site_guard.SiteGuard, "check_round", strict)
    start()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["before", "opened", "lost"]
    (logged,) = read_refusals(tmp_path / "home" / "ledgers" / "s02.refusals.jsonl")
    assert (logged["rule"], logged["server_round"]) == ("opening.min_contributors", 2)
    seen = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert b"secrets of the house" not in seen


def test_a_policy_that_wants_more_sites_than_a_round_has_declines_it(
    start: Start, notes: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    base = base_digest_of(str(tiny_checkpoint("llama")), "float32")
    policy_of(tmp_path / "home", "s00", notes, base, opening=SumPolicy(min_contributors=4, max_colluding=1))
    with pytest.raises(FedCollmError, match="all 2 rounds were lost"):
        start()
    logged = read_refusals(tmp_path / "home" / "ledgers" / "s00.refusals.jsonl")
    assert [entry["server_round"] for entry in logged] == [1, 2]


def test_no_exception_is_needed_where_nothing_is_trained_and_one_is_where_nothing_protects(
    start: Start, notes: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    base = base_digest_of(str(tiny_checkpoint("llama")), "float32")
    for site in SITES:
        policy_of(tmp_path / "home", site, notes, base, exceptions=())
    start("method=zero_shot", "federation.rounds=0")
    with pytest.raises(PolicyRefused, match="exceptions"):
        start("private=false", output="open")


@pytest.mark.parametrize("overrides", [["data.partition=iid"], ["method=centralised_slm", "distillation.steps=0"]])
def test_private_records_are_never_charged_to_a_ledger_that_is_not_their_sites(
    start: Start, overrides: list[str]
) -> None:
    with pytest.raises(ConfigError, match="would be charged to"):
        start(*overrides)


def test_a_ledger_that_was_rolled_back_between_two_runs_stops_the_next_one(start: Start, tmp_path: Path) -> None:
    ledger = tmp_path / "home" / "ledgers" / "s01.sqlite"
    start("privacy.epsilon=2")
    shutil.copy(ledger, tmp_path / "old.sqlite")
    start("privacy.epsilon=2", output="second")
    before = LedgerFile(ledger).entries()
    shutil.copy(tmp_path / "old.sqlite", ledger)
    with pytest.raises(FedCollmError, match=r"s01 \(no head\)"):
        start("privacy.epsilon=2", output="third")
    assert len(LedgerFile(ledger).entries()) < len(before)
    transcript = (tmp_path / "third" / "transcript.jsonl").read_text()
    assert '"refused":{"s01":"no head"}' in transcript
    # So does a new ledger under the same key, which a site could pretend to have always had.
    ledger.unlink()
    with pytest.raises(FedCollmError, match=r"s01 \(no head\)|s01 \(contradicts\)"):
        start("privacy.epsilon=2", output="fourth")


def test_the_statement_carries_the_signatures_of_all_and_of_nobody_else(start: Start, tmp_path: Path) -> None:
    start()
    out = tmp_path / "out"
    envelope = Envelope.from_bytes((out / "statement.json").read_bytes())
    (path,) = (out / "rosters").glob("*.json")
    roster = Roster.from_bytes(path.read_bytes())
    keys = {party.public_key.hex(): party for party in (roster.server, *roster.sites)}
    assert {signature.keyid for signature in envelope.signatures} == set(keys)
    for signature in envelope.signatures:
        verify_payload(keys[signature.keyid], envelope.payload, signature.signature)
        with pytest.raises(SignatureInvalid):
            verify_payload(keys[signature.keyid], envelope.payload + b" ", signature.signature)
    for site in SITES:
        opened = LedgerFile(tmp_path / "home" / "ledgers" / f"{site}.sqlite")
        assert opened.entries()[-1]["kind"] == "STATEMENT"
        assert opened.heads()[-1]["head"]["tree_size"] == len(opened.entries())


def test_keys_stay_out_of_the_runs_folder_and_in_the_owners_hands(start: Start, tmp_path: Path) -> None:
    start()
    keys = tmp_path / "home" / "keys"
    assert {path.name for path in keys.glob("*.key")} == {f"{name}.key" for name in ("server", *SITES)}
    for path in keys.glob("*.key"):
        assert path.stat().st_mode & 0o777 == 0o600
        secret = path.read_bytes().splitlines()[2]
        for file in (tmp_path / "out").rglob("*"):
            assert not file.is_file() or secret not in file.read_bytes()
    (keys / "s01.pub").unlink()  # as after a crash between the two files
    again = identity_of("s01")
    assert isinstance(again, SigningKey)
    assert again.public == load_public(keys / "s01.pub")
    assert isinstance(again.public, PublicIdentity)
