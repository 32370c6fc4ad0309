"""What sites say of themselves at a run's end, by messages alone; who is silent is named, and nothing is claimed."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jcs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcollm_audits import evidence as audit_evidence
from fedcollm_audits.audit import CHECKS
from fedcollm_privacy.dsse import Envelope
from fedcollm_privacy.endorsement import site_claims
from fedcollm_privacy.errors import FedCollmError, LedgerError, ProtocolError
from fedcollm_privacy.ledger import Ledger
from secure_fedcollm.assembly import Assembly, assemble
from secure_fedcollm.claims import parse_claims, traces
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.models import base_digest_of
from secure_fedcollm.privacy_config import PrivacyConfig
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.run import run
from secure_fedcollm.strict_build import build
from secure_fedcollm.transport import Reply, Transport

from .ledgers import PLAN
from .site_policies import write_policies
from .test_endorsement import of_site, ran
from .test_run import SMALL, predicate_of, write_notes

STATEMENT_CHECKS = {"statement-signed", "statement-bound", "statement-true"}
RECORD_CHECKS = [check for check in CHECKS if check.group not in ("empirical", "leakage")]
Assembled = Callable[..., tuple[Assembly, RunFolder]]


@dataclasses.dataclass
class Deaf:
    """A transport that loses some questions on the way, and counts them."""

    inner: Transport
    lost: Mapping[str, Collection[str]]
    """By site: the operations that do not reach it; ``*`` is any."""
    counted: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)

    @property
    def sites(self) -> tuple[str, ...]:
        return self.inner.sites

    def ask(self, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Reply]:
        through = {}
        for site, body in bodies.items():
            if {operation, "*"} & set(self.lost.get(site, ())):
                self.counted[site, operation] += 1
                yield Reply(site=site, body=None, code="no answer")
            else:
                through[site] = body
        yield from self.inner.ask(operation, through)


@pytest.fixture
def assembled(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Assembled]:
    """A federation of small real models, ready to run; its secure sum is closed at the end."""
    monkeypatch.setenv("FEDCOLLM_HOME", str(tmp_path / "home"))
    made: list[Assembly] = []

    def start(*overrides: str, sites: int = 3, output: str = "out") -> tuple[Assembly, RunFolder]:
        notes = write_notes(tmp_path / f"notes{sites}.jsonl", sites, 40)
        plain = compose_config(
            [
                f"data.path={notes}",
                "data.partition=column",
                "data.site_field=site",
                f"model.slm={tiny_checkpoint('llama')}",
                f"model.llm={tiny_checkpoint('llama', width=64)}",
                f"output_dir={tmp_path / output}",
                *SMALL,
                "distillation.steps=2",
                *overrides,
            ]
        )
        config = build(Config, plain)
        digest = base_digest_of(str(config.model.slm), "float32")
        write_policies(tmp_path / "home", [f"s{site:02d}" for site in range(sites)], notes, digest)
        folder = RunFolder.create(config.output_dir, config.name, plain)
        made.append(assemble(config, folder, RunProgress(quiet=True)))
        return made[-1], folder

    yield start
    for parts in made:
        parts.federation.secure_sum.close()


def through(parts: Assembly, lost: Mapping[str, Collection[str]], **changes: Any) -> tuple[Assembly, Deaf]:
    """The same federation over a transport that loses some questions, those of the secure sum too."""
    deaf = Deaf(parts.federation.transport, lost)
    parts.federation.secure_sum._channel = deaf  # type: ignore[attr-defined]
    return dataclasses.replace(parts, federation=dataclasses.replace(parts.federation, transport=deaf), **changes), deaf


def answers(folder: Path) -> dict[str, str]:
    found = audit_evidence.read(folder)
    return {check.name: check.run(found).status for check in RECORD_CHECKS}


# ---------------------------------------------------------------- what a site says


def test_a_sites_claims_are_what_its_ledger_and_plan_give_when_worked_out_anew(tmp_path: Path) -> None:
    ledger = ran(tmp_path)
    assert site_claims(ledger, PLAN, "run-1", persons_known=False) == of_site(ledger)


def test_no_claims_of_a_run_or_plan_that_the_ledger_does_not_know(tmp_path: Path) -> None:
    ledger = ran(tmp_path)
    with pytest.raises(LedgerError):
        site_claims(ledger, PLAN, "run-2", persons_known=False)
    with pytest.raises(LedgerError):
        site_claims(ledger, dataclasses.replace(PLAN, noise_multiplier=9.0), "run-1", persons_known=False)


PRIVACY = PrivacyConfig(
    epsilon=8.0,
    delta=1e-5,
    cap_epsilon=8.0,
    cap_delta=1e-5,
    unit=PLAN.unit,
    max_records_per_unit=1,
    max_grad_norm=PLAN.max_grad_norm,
    expected_batch_size=PLAN.expected_batch_size,
    clipping=PLAN.clipping,
    noise="local",
    least_honest=1,
    ledger_dir=None,
    insecure_test_seed=None,
)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ledger: Ledger = ran(tmp_path_factory.mktemp("told"))
    return site_claims(ledger, PLAN, "run-1", persons_known=False)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for name, part in items for place in ((*path, name), *places(part, (*path, name)))]


JUNK = (None, True, -1, 1e300, "", "x", "0" * 63, [], ["x"], {}, {"a": [1]}, "\x1b[2J")


def test_true_claims_are_taken_as_they_are(told: dict[str, Any]) -> None:
    assert parse_claims(jcs.canonicalize(told), PRIVACY, told["epsilon"]) == told


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 9999), junk=st.sampled_from(JUNK), drop=st.booleans())
def test_altered_claims_are_refused_or_still_have_every_field_that_is_published(
    told: dict[str, Any], place: int, junk: Any, drop: bool
) -> None:
    altered = copy.deepcopy(told)
    everywhere = places(altered)
    *path, last = everywhere[place % len(everywhere)]
    holder: Any = altered
    for step in path:
        holder = holder[step]
    if drop:
        del holder[last]
    else:
        holder[last] = junk
    try:
        kept = parse_claims(jcs.canonicalize(altered), PRIVACY)
    except ProtocolError:
        return
    assert set(kept) == set(told)
    assert kept["plan"] == told["plan"]
    assert isinstance(kept["epsilon"], int | float)
    assert math.isfinite(kept["epsilon"])
    assert told["epsilon"] * (1 - 1e-6) <= kept["epsilon"] <= 1e9, "never less than the plan's steps cost"


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.1},
        {"delta": 1e-9},
        {"steps_reserved": 1.5},
        {"plan_digest": "0" * 64},
        {"more": 1},
        {"views": {"one_update_seen": 1.0}},
        {"privacy_profile": {}},
        {"ledger": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_claims_that_do_not_fit_the_run_are_refused(told: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        parse_claims(jcs.canonicalize(told | change), PRIVACY)


def test_claims_of_another_unit_or_smaller_than_was_told_before_are_refused(told: dict[str, Any]) -> None:
    raw = jcs.canonicalize(told)
    with pytest.raises(ProtocolError, match="unit"):
        parse_claims(raw, dataclasses.replace(PRIVACY, unit="person", max_records_per_unit=2))
    with pytest.raises(ProtocolError, match="epsilon"):
        parse_claims(raw, PRIVACY, told["epsilon"] * 1.01)
    for other in (b"", b"[]", b"\xff", b"[" * 100_000, json.dumps(told).encode(), raw + b" "):
        with pytest.raises(ProtocolError):
            parse_claims(other, PRIVACY)


def test_every_event_that_names_a_site_leaves_its_trace() -> None:
    events = [
        {"event": "enrolled", "sites": ["a"]},
        {"event": "upload", "site": "b"},
        {"event": "summed", "cohort": ["c"]},
        {"event": "tree_heads", "run_id": "run-1", "heads": {"d": {}}, "refused": {"x": "no head"}},
        {"event": "tree_heads", "run_id": "run-2", "heads": {"y": {}}, "refused": {}},
        {"event": "faults", "sites": ["z"]},
    ]
    assert traces(events, "run-1") == {"a", "b", "c", "d"}


# ---------------------------------------------------------------- whole runs


def test_a_silent_site_is_named_and_nothing_is_claimed_for_it(assembled: Assembled, tmp_path: Path) -> None:
    """A server without site objects: one site is silent at the end, one never came, the others tell and sign."""
    here, folder = assembled(sites=5)
    ledgers = dict(here.ledgers)
    gone = {"ledgers": {}, "plans": {}, "data_sets": {}, "deployed": True}
    names = [f"s{i:02d}" for i in range(5)]
    nobody = {**{name: ["claims"] for name in names[:4]}, "s04": ["*"]}
    parts, deaf = through(here, nobody, **gone)
    parts = dataclasses.replace(parts, federation=dataclasses.replace(parts.federation, sites=()))
    with pytest.raises(FedCollmError, match="resume the run when the sites are back"):
        run(parts, folder, RunProgress(quiet=True))
    assert not folder.finished
    deaf.lost, deaf.counted = {"s03": ["claims"], "s04": ["*"]}, Counter()
    summary = run(parts, folder, RunProgress(quiet=True))

    out, predicate = tmp_path / "out", predicate_of(tmp_path / "out")
    assert (deaf.counted["s03", "claims"], deaf.counted["s04", "claims"]) == (3, 1), "asked again, and not for ever"
    assert predicate["unstated"] == ["s03"]
    assert predicate["private"] is True
    assert list(predicate["sites"]) == names[:3]
    assert predicate["data"]["sites"] == names[:4]
    assert "s04" not in json.dumps(predicate["sites"]) + json.dumps(predicate["unstated"])
    assert summary is not None
    assert summary["unstated"] == ["s03"]
    assert list(summary["sites"]) == names[:3]
    assert all("epsilon_cap" not in row for row in summary["sites"].values()), "the site's own affair"
    assert "all roles shared one machine" not in json.dumps(summary["claims"])
    for text in (summary["note"], predicate["claim"], (out / "slm_adapter" / "README.md").read_text()):
        assert "Nothing is claimed for the data of s03" in text
    assert "NOTHING IS CLAIMED FOR s03" in (out / "statement.html").read_text()
    envelope = Envelope.from_bytes((out / "statement.json").read_bytes())
    key_of = {party.public_key.hex(): party.name for party in (parts.roster.server, *parts.roster.sites)}
    assert [key_of[signature.keyid] for signature in envelope.signatures] == [parts.roster.server.name, *names[:3]]

    (out / "ledgers").mkdir()
    for name in names[:4]:
        ledgers[name].file.export(out / "ledgers" / f"{name}.jsonl")
    found = answers(out)
    assert {name for name, status in found.items() if status == "not shown"} == STATEMENT_CHECKS
    assert {name for name, status in found.items() if status == "fail"} == set()


def test_a_site_that_has_no_head_stops_an_embedded_run(assembled: Assembled) -> None:
    parts, folder = assembled()
    parts, _ = through(parts, {"s01": ["head"]})
    with pytest.raises(FedCollmError, match=r"nothing is trained: .*s01 \(no head\)"):
        run(parts, folder, RunProgress(quiet=True))


def test_a_run_that_was_stopped_between_rounds_ends_where_an_uninterrupted_one_does(
    assembled: Assembled, tmp_path: Path
) -> None:
    seeded = ("data.declared=public", "privacy.insecure_test_seed=5")
    whole, folder = assembled(*seeded, output="whole")
    assert run(whole, folder, RunProgress(quiet=True)) is not None

    parts, folder = assembled(*seeded, output="stopped")
    rounds: list[int] = []
    assert run(parts, folder, RunProgress(quiet=True), stop=lambda: rounds.append(1) or len(rounds) == 2) is None
    assert not folder.finished
    assert [row["server_round"] for row in folder.metrics()] == [0, 1]
    summary = run(parts, folder, RunProgress(quiet=True))
    assert summary is not None
    assert summary["rounds_lost"] == 0
    for which in ("slm", "llm"):
        name = f"{which}_adapter/adapter_model.safetensors"
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_watcher_is_told_of_every_round(assembled: Assembled) -> None:
    told: list[tuple[str, Any]] = []

    class Watching:
        def round(self, server_round: int, attempt: int) -> None:
            told.append(("round", (server_round, attempt)))

        def round_done(self, outcome: Any) -> None:
            told.append(("done", outcome.outcome))

    parts, folder = assembled("federation.rounds=1", "data.declared=public", "privacy.insecure_test_seed=5")
    run(parts, folder, RunProgress(quiet=True, told=lambda kind: told.append(("stage", kind))), watch=Watching())
    evaluate = ("stage", "evaluate")
    assert told[:4] == [evaluate, ("round", (1, 1)), evaluate, ("done", "opened")]
