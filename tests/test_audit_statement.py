"""The statement: signed by all, bound to this run, and true; and no value anywhere can be changed unnoticed."""

from __future__ import annotations

import base64
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .audit_answers import CHECKS, failing, findings, open_questions, reasons
from .run_folders import build
from .run_records import CODE, Line, jcs

EVERYBODY = ("server", "ash", "beech", "cedar")


@pytest.mark.parametrize(
    "edit",
    [
        lambda payload: payload["predicate"]["sites"]["beech"].update(epsilon=0.01),
        lambda payload: payload["predicate"].update(claim="everything is private"),
        lambda payload: payload["subject"][0]["digest"].update(sha256="0" * 64),
    ],
)
@pytest.mark.parametrize("signers", [None, ("mallory",), ("mallory", "server")])
def test_a_statement_edited_afterwards_is_caught(
    tmp_path: Path, edit: Callable[[Line], Any], signers: tuple[str, ...] | None
) -> None:
    built = build(tmp_path / "run")
    built.edit_statement(edit, signers)
    assert failing(tmp_path / "run") >= {"statement-signed", "statement-bound"}
    untouched = {c.name for c in CHECKS if c.group in ("ledger", "plan", "transcript", "artefacts")}
    assert not failing(tmp_path / "run") & untouched


def test_a_statement_edited_and_signed_again_by_everybody_is_still_not_the_one_that_was_noted(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    built.edit_statement(lambda payload: payload["predicate"].update(claim="another"), EVERYBODY)
    assert failing(tmp_path / "run") == {"statement-bound"}


@pytest.mark.parametrize(
    ("signers", "reason"),
    [
        (EVERYBODY[1:], "the server (server) did not sign"),
        (EVERYBODY[:-1], "cedar (cedar) did not sign"),
        ((), "did not sign"),
        ((*EVERYBODY, "mallory"), "A stranger's key"),
    ],
)
def test_a_statement_not_signed_by_exactly_its_parties_is_caught_by_that_check_alone(
    tmp_path: Path, signers: tuple[str, ...], reason: str
) -> None:
    build(tmp_path / "run", signers=signers)
    assert failing(tmp_path / "run") == {"statement-signed"}
    assert reason in reasons(tmp_path / "run", "statement-signed")


@pytest.mark.parametrize(("kept", "caught"), [(True, set()), (False, {"statement-signed"})])
def test_sites_that_only_fill_up_a_roster_need_not_sign_where_nothing_was_exchanged(
    tmp_path: Path, kept: bool, caught: set[str]
) -> None:
    build(
        tmp_path / "run",
        private=False,
        kept=kept,
        signers=("server", "ash"),
        on_statement=lambda s: s["data"].update(sites=["ash"]),
    )
    assert failing(tmp_path / "run") == caught


def _envelope(change: Callable[[Line], Any]) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        envelope = json.loads((run / "statement.json").read_bytes())
        change(envelope)
        (run / "statement.json").write_bytes(jcs(envelope))

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda run: (run / "statement.json").unlink(),
        lambda run: (run / "statement.json").write_bytes(b"{}"),
        lambda run: (run / "statement.json").write_bytes(b"\xff"),
        _envelope(lambda envelope: envelope.update(payloadType="text/plain")),
        _envelope(lambda envelope: envelope.update(extra=1)),
        _envelope(lambda envelope: envelope.update(payload="?")),
        _envelope(lambda envelope: envelope["signatures"][0].update(sig="A" * 88)),
        _envelope(lambda envelope: envelope["signatures"][0].update(keyid="0" * 64)),
        _envelope(lambda envelope: envelope.update(payload=base64.b64encode(b"[]").decode())),
        lambda run: next((run / "rosters").iterdir()).unlink(),
    ],
)
def test_an_envelope_that_does_not_hold_fails(tmp_path: Path, edit: Callable[[Path], Any]) -> None:
    built = build(tmp_path / "run")
    edit(built.folder)
    assert "statement-signed" in failing(tmp_path / "run")


def test_a_payload_in_another_spelling_fails(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    envelope = json.loads((built.folder / "statement.json").read_bytes())
    spaced = json.dumps(json.loads(base64.b64decode(envelope["payload"]))).encode()
    envelope["payload"] = base64.b64encode(spaced).decode()
    (built.folder / "statement.json").write_bytes(jcs(envelope))
    assert "canonical" in reasons(tmp_path / "run", "statement-signed")


def test_a_run_without_any_promise_needs_no_statement(tmp_path: Path) -> None:
    built = build(tmp_path / "run", private=False)
    (built.folder / "statement.json").unlink()
    assert not failing(tmp_path / "run")
    assert {"statement-signed", "statement-bound", "statement-true"} <= open_questions(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("config.yaml", {"statement-bound"}),
        ("slm_adapter/adapter_config.json", {"statement-bound"}),
        ("llm_adapter/README.md", {"statement-bound"}),
    ],
)
@pytest.mark.parametrize("how", ["edit", "unlink"])
def test_files_that_the_statement_is_not_about_are_caught_by_that_check_alone(
    tmp_path: Path, name: str, caught: set[str], how: str
) -> None:
    built = build(tmp_path / "run")
    path = built.folder / name
    path.write_text(path.read_text().replace("2", "3") if name.endswith("json") else "name: b\n")
    if how == "unlink":
        path.unlink()
    assert failing(tmp_path / "run") == caught


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s["transcript"].update(head="0" * 64), "not the one that the statement was made after"),
        (lambda s: s["transcript"].update(events=999), "it was cut"),
        (lambda s: s["transcript"].update(events=5), "came after the statement"),
        (lambda s: s.update(rosters=["0" * 64]), "rosters that the statement names"),
        (lambda s: s["sites"]["beech"]["ledger"].update(head="0" * 64), "Site beech: entry 7 is not the one"),
        (lambda s: s["sites"]["beech"]["ledger"].update(tree_root="0" * 64), "another root"),
        (lambda s: s["sites"]["beech"]["ledger"].update(tree_size=99), "covers 99 entries"),
        (lambda s: s["sites"]["beech"]["ledger"].update(ledger="0" * 64), "another ledger"),
        (lambda s: s["sites"]["beech"].update(policy="0" * 64), "policy is not its ledger's"),
        (lambda s: s["sites"]["beech"].update(caps=[]), "caps is not its ledger's"),
        (lambda s: s["sites"]["beech"].update(plan_digest="0" * 64), "plan_digest is not its ledger's"),
        (lambda s: s["sites"].update(beech=s["sites"]["ash"]), "Site beech"),
        (lambda s: s["sites"].pop("beech"), "does not stand in the statement"),
    ],
)
def test_a_statement_about_something_else_is_caught(tmp_path: Path, change: Callable[[Line], Any], reason: str) -> None:
    build(tmp_path / "run", on_statement=change)
    assert "statement-bound" in failing(tmp_path / "run")
    assert failing(tmp_path / "run") <= {"statement-bound", "statement-true", "statement-signed"}
    assert reason in reasons(tmp_path / "run", "statement-bound")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s["sites"]["beech"].update(epsilon=0.15), "the claim is epsilon 0.15"),
        (lambda s: s["sites"]["beech"].update(epsilon=5.0), "its ledger was charged"),
        (lambda s: s["sites"]["beech"].update(delta=1e-6), "its ledger was charged"),
        (lambda s: s["sites"]["beech"].update(steps_reserved=2), "its ledger reserved 3"),
        (lambda s: s["sites"]["beech"]["views"].update(one_update_seen=0.1), "the view of one update"),
        (lambda s: s["sites"]["beech"]["views"].update(only_sums_and_models_seen=0.1), "the view of sums"),
        (lambda s: s["sites"]["beech"].update(gdp_mu=0.01), "mu 0.01"),
        (lambda s: s["sites"]["beech"]["privacy_profile"].update({"0.1": 1e-9}), "the profile gives delta 1e-09"),
        (lambda s: s["sites"]["beech"].update(other_units={"two": 0.01}), "less than one unit"),
        (lambda s: s["sites"]["beech"].pop("gdp_mu"), "gdp_mu"),
        (lambda s: s["rounds"].update(opened=2), "counts 2 rounds opened"),
        (lambda s: s["rounds"].update(lost=1), "and 1 lost"),
        (lambda s: s["rounds"].update(planned=4), "the configuration 3"),
        (lambda s: s.update(unit="record"), "its plan protects a person"),
        (lambda s: s.update(data={"declared": "public"}), "declares the data"),
        (lambda s: s.update(private="yes"), "does not say whether"),
        (lambda s: s.update(private=False), "gives sites an epsilon"),
        (lambda s: s.update(sites={}), "names no site"),
        *((lambda s, field=field: s.pop(field), f"does not say {field}")
          for field in ("claim", "server", "covered", "not_covered", "assumptions", "nist_sp_800_226", "dp_fy_ml",
                        "views")),
    ],
)  # fmt: skip
def test_a_statement_that_is_not_true_is_caught(tmp_path: Path, change: Callable[[Line], Any], reason: str) -> None:
    build(tmp_path / "run", on_statement=change)
    found = failing(tmp_path / "run")
    assert "statement-true" in found
    assert found <= {"statement-true", "statement-bound"}
    assert reason in reasons(tmp_path / "run", "statement-true")


@pytest.mark.parametrize(
    "edit",
    [
        lambda summary: summary.update(private=False),
        lambda summary: summary.update(run_id="another"),
        lambda summary: summary.update(rounds_lost=1),
        lambda summary: summary["sites"]["beech"].update(epsilon=0.1),
        lambda summary: summary["sites"]["beech"].update(steps=1),
        lambda summary: summary["sites"].pop("beech"),
        lambda summary: summary["sites"].update(mallory={"epsilon": 1.0}),
    ],
)
def test_a_summary_that_says_something_else_is_caught_by_that_check_alone(
    tmp_path: Path, edit: Callable[[Line], Any]
) -> None:
    built = build(tmp_path / "run")
    summary = json.loads((built.folder / "summary.json").read_text())
    edit(summary)
    (built.folder / "summary.json").write_text(json.dumps(summary))
    assert failing(tmp_path / "run") == {"statement-true"}


def test_a_run_that_calls_itself_private_without_plans_is_caught(tmp_path: Path) -> None:
    build(tmp_path / "run", private=False, on_statement=lambda s: s.update(private=True))
    assert failing(tmp_path / "run") >= {"statement-true", "plan-is-what-ran"}


def test_other_code_than_the_one_that_ran_is_caught(tmp_path: Path) -> None:
    build(tmp_path / "run", on_statement=lambda s: s.update(code=CODE.replace("c", "d")))
    assert failing(tmp_path / "run") == {"plan-is-what-ran"}


# Any value at all.


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in _places(each, (*path, key)))]


def _replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    value = copy.copy(value)
    value[path[0]] = _replaced(value[path[0]], path[1:], other)
    return value


JUNK = st.sampled_from([None, True, 0, -1, 1.5, "", "x", "0" * 64, "9" * 300, [], ["x"], {}, {"a": [1]}])


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "run"
    build(folder, rounds=2, lost=(2,))
    return folder


@settings(max_examples=120)
@given(data=st.data())
def test_no_value_can_be_changed_unnoticed_and_none_makes_a_check_raise(sound_run: Path, data: st.DataObject) -> None:
    run = sound_run.with_name("changed")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(sound_run, run)
    name = data.draw(
        st.sampled_from(["transcript.jsonl", "ledgers/beech.jsonl", "statement.json", "payload", "roster"])
    )
    junk = data.draw(JUNK)
    path = next((run / "rosters").iterdir()) if name == "roster" else run / name.replace("payload", "statement.json")
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    if name == "payload":
        lines = [json.loads(base64.b64decode(lines[0]["payload"]))]
    number = data.draw(st.integers(0, len(lines) - 1))
    place = data.draw(st.sampled_from(_places(lines[number])))
    changed = _replaced(lines[number], place, junk)
    if jcs(changed) == jcs(lines[number]):
        return
    lines[number] = changed
    content = b"\n".join(jcs(line) for line in lines)
    if name == "payload":
        envelope = json.loads(path.read_bytes()) | {"payload": base64.b64encode(content).decode()}
        content = jcs(envelope)
    path.write_bytes(content + (b"\n" if name.endswith("jsonl") else b""))
    assert any(finding.status == "fail" for finding in findings(run).values()), (name, number, place, junk)
