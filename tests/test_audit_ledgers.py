"""Ledgers: a clean run passes, and every planted break is caught by the check that is there for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .audit_answers import CHECKS, at, failing, findings, open_questions, reasons
from .run_folders import build
from .run_records import Book, Line, charge, jcs, key_of, plan_of, public, rechained, sha, sign, tree_root

Edit = Callable[[list[Line]], Any]


def test_names_are_unique_and_every_check_says_what_a_yes_means() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS) == 17
    assert all(check.question.endswith(".") and check.why.endswith(".") for check in CHECKS)
    assert {check.group for check in CHECKS} == {"ledger", "plan", "transcript", "artefacts", "statement"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sites": 5, "lost": (2,), "left_out": "elm"},
        {"distributed": True},
        {"earlier": (400, 20)},
        {"governed": True},
        {"rounds": 1},
    ],
)
def test_a_clean_run_passes_everything(tmp_path: Path, options: dict[str, Any]) -> None:
    build(tmp_path / "run", **options)
    governance = public(key_of("governance")) if options.get("governed") else None
    assert {f.status for f in findings(tmp_path / "run", governance=governance).values()} == {"pass"}


def test_a_run_that_declares_itself_not_private_fails_nothing_and_leaves_open_what_it_did_not_promise(
    tmp_path: Path,
) -> None:
    build(tmp_path / "run", private=False)
    assert not failing(tmp_path / "run")
    assert open_questions(tmp_path / "run") == {c.name for c in CHECKS if c.group in ("ledger", "plan")}


def test_a_baseline_without_exchange_fails_nothing(tmp_path: Path) -> None:
    build(tmp_path / "run", kept=True)
    assert not failing(tmp_path / "run")
    assert open_questions(tmp_path / "run") == {"openings", "adapters-linked"}


def test_where_no_ledger_was_given_nothing_about_ledgers_is_shown(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    for site in built.sites:
        (built.folder / "ledgers" / f"{site}.jsonl").unlink()
    said = open_questions(tmp_path / "run")
    assert said >= {"ledger-chain", "ledger-heads", "ledger-complete", "budget-prefix", "epsilon-recomputed"}
    assert "statement-bound" in said
    assert not failing(tmp_path / "run")


@pytest.mark.parametrize(
    ("edit", "resign", "caught"),
    [
        # Whoever has the file only.
        (lambda entries: entries[0].update(accountant="x"), None, {"ledger-chain", "ledger-signatures"}),
        (lambda entries: entries.pop(3), None, {"ledger-chain", "ledger-heads", "ledger-order", "statement-bound"}),
        (lambda entries: entries.reverse(), None, {"ledger-chain", "ledger-heads", "ledger-order"}),
        # Whoever rebuilds the chain without the site's key.
        (lambda entries: entries[0].update(accountant="x"), False, {"ledger-signatures", "ledger-heads"}),
        # The site itself.
        (lambda entries: entries[0].update(accountant="x"), True, {"ledger-heads", "statement-bound"}),
        (lambda entries: entries.insert(0, entries.pop(1)), True, {"ledger-heads", "ledger-order", "statement-bound"}),
        (lambda entries: entries.__delitem__(slice(5, None)), True, {"ledger-heads", "ledger-complete"}),
        (lambda entries: entries.__delitem__(slice(1, 3)), True, {"ledger-heads", "ledger-complete", "ledger-order"}),
    ],
    ids=["edit", "delete", "reorder", "edit-rechain", "edit-resign", "reorder-resign", "truncate", "delete-resign"],
)
def test_a_ledger_rewritten_afterwards_is_caught_also_when_its_own_site_signs_again(
    tmp_path: Path, edit: Edit, resign: bool | None, caught: set[str]
) -> None:
    built = build(tmp_path / "run")
    built.edit_ledger("beech", edit, resign=resign)
    assert failing(tmp_path / "run") >= caught
    untouched = {c.name for c in CHECKS if c.group in ("transcript", "artefacts")} | {"statement-signed"}
    assert not failing(tmp_path / "run") & untouched
    for name in caught:
        assert "beech" in reasons(tmp_path / "run", name)


def test_a_cut_at_the_end_is_caught_by_the_heads(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    built.edit_ledger("beech", lambda entries: entries.__delitem__(slice(-3, None)))
    assert "cut or rolled back" in reasons(tmp_path / "run", "ledger-heads")
    assert "ledger-chain" not in failing(tmp_path / "run")


def test_a_ledger_rolled_back_with_its_own_heads_contradicts_the_transcript(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    lines = built.lines("ledgers/beech.jsonl")
    entries = [line for line in lines if line["kind"] not in ("LEDGER", "HEAD")][:3]
    heads = [line for line in lines if line["kind"] == "HEAD" and line["head"]["tree_size"] <= 3]
    built.write("ledgers/beech.jsonl", [lines[0], *entries, *heads])
    assert "cut or rolled back" in reasons(tmp_path / "run", "ledger-heads")
    assert "missing in its export" in reasons(tmp_path / "run", "ledger-heads")


def test_a_fork_that_site_and_server_both_signed_is_caught(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    lines = built.lines("ledgers/beech.jsonl")
    entries = [line for line in lines if line["kind"] not in ("LEDGER", "HEAD")]
    for entry in entries[-2:]:
        entry["time"] = "2026-01-31T13:00:00+00:00"
    entries = rechained(entries, key_of("beech"))
    heads = []
    for line in (line for line in lines if line["kind"] == "HEAD"):
        size = line["head"]["tree_size"]
        head = line["head"] | {"tree_root": tree_root([bytes.fromhex(entry["digest"]) for entry in entries[:size]])}
        both = {"signature": sign(key_of("beech"), "tree_head", jcs(head)),
                "witness": sign(key_of("server"), "witnessed_head", jcs(head))}  # fmt: skip
        heads.append({**line, "head": head, **both})
    built.write("ledgers/beech.jsonl", [lines[0], *entries, *heads])
    assert failing(tmp_path / "run") == {"ledger-heads", "statement-bound"}
    assert "forked" in reasons(tmp_path / "run", "ledger-heads")


def _change_heads(event: Line, change: Callable[[Line], Any]) -> list[Line]:
    if event["event"] == "tree_heads" and event["server_round"] == 2:
        change(event)
    return [event]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: e["refused"].update(beech="rolled_back"), "refused"),
        (lambda e: e["heads"]["beech"].update(witness="0" * 128), "not signed by the server"),
        (lambda e: e["heads"]["beech"].update(signature="0" * 128), "not signed by the site"),
        (lambda e: e["heads"].update(beech=e["heads"]["ash"]), "another site"),
        (lambda e: e["heads"].pop("beech"), "missing in the transcript"),
        (lambda e: e["heads"]["beech"]["head"].update(tree_size=1), "fewer than"),
        (lambda e: e["heads"]["beech"]["head"].update(tree_size=99), "cut or rolled back"),
        (lambda e: e["heads"]["beech"]["head"].update(ledger="1" * 64), "another ledger"),
    ],
)
def test_heads_that_do_not_hold_are_caught_by_that_check_alone(
    tmp_path: Path, change: Callable[[Line], Any], reason: str
) -> None:
    build(tmp_path / "run", on_event=lambda event: _change_heads(event, change))
    assert failing(tmp_path / "run") == {"ledger-heads"}
    assert reason in reasons(tmp_path / "run", "ledger-heads")


@pytest.mark.parametrize(("rounds", "status"), [(3, "pass"), (2, "not shown")])
def test_a_site_that_gave_no_head_once_is_asked_again(tmp_path: Path, rounds: int, status: str) -> None:
    """Its next head covers the entries all the same; without a next one, a cut at the end would not show."""

    def silent(event: Line) -> None:
        event["heads"].pop("beech")
        event["refused"]["beech"] = "no head"

    built = build(tmp_path / "run", rounds=rounds, on_event=lambda event: _change_heads(event, silent))
    lines = built.lines("ledgers/beech.jsonl")
    kept = [line for line in lines if line["kind"] != "HEAD" or line["head"]["server_round"] != 2]
    built.write("ledgers/beech.jsonl", kept)
    assert not failing(tmp_path / "run")
    assert findings(tmp_path / "run")["ledger-heads"].status == status


def test_an_over_spend_hidden_in_round_7_is_caught_by_that_check_alone(tmp_path: Path) -> None:
    def on_entry(entry: Line) -> Line | None:
        hidden = entry["site"] == "beech" and (entry.get("server_round") == 7 or entry.get("reservation") == "f" * 64)
        return None if hidden else entry

    build(tmp_path / "run", rounds=8, on_entry=on_entry)
    assert failing(tmp_path / "run") == {"ledger-complete"}
    assert "Site beech, round 7" in reasons(tmp_path / "run", "ledger-complete")


def test_a_missing_export_is_caught_by_that_check_alone(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    (built.folder / "ledgers" / "beech.jsonl").unlink()
    assert failing(tmp_path / "run") == {"ledger-complete"}
    assert "Site beech took part (rounds [1, 2, 3])" in reasons(tmp_path / "run", "ledger-complete")
    assert "statement-bound" in open_questions(tmp_path / "run")


@pytest.mark.parametrize("outcome", ["left_out", "lost"])
def test_an_outcome_that_the_transcript_contradicts_is_caught(tmp_path: Path, outcome: str) -> None:
    build(tmp_path / "run", on_entry=at("beech", "SETTLE", lambda entry: entry.update(outcome=outcome)))
    assert failing(tmp_path / "run") == {"ledger-complete"}


def test_a_site_that_calls_a_lost_round_included_is_caught(tmp_path: Path) -> None:
    change = at("beech", "SETTLE", lambda entry: entry.update(outcome="included"))
    build(tmp_path / "run", lost=(2,), on_entry=change)
    assert failing(tmp_path / "run") == {"ledger-complete"}


def test_a_site_that_broke_off_after_its_update_was_used_leaves_the_question_open(tmp_path: Path) -> None:
    build(tmp_path / "run", on_entry=at("beech", "SETTLE", lambda entry: entry.update(outcome="failed", ran=None)))
    assert not failing(tmp_path / "run")
    assert open_questions(tmp_path / "run") == {"ledger-complete"}


def test_a_reservation_never_settled_is_caught(tmp_path: Path) -> None:
    settled: list[Line] = []

    def on_entry(entry: Line) -> Line | None:
        if (entry["site"], entry["kind"]) == ("beech", "SETTLE"):
            settled.append(entry)
            return None if len(settled) == 3 else entry
        return entry

    build(tmp_path / "run", on_entry=on_entry)
    assert failing(tmp_path / "run") == {"ledger-complete", "ledger-order"}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda entry: entry.update(steps_so_far=9), "RESERVE"),
        (lambda entry: entry.update(plan_digest="1" * 64), "RESERVE"),
        (lambda entry: entry.update(reservation="1" * 64), "SETTLE"),
        (lambda entry: entry.update(data_set="1" * 64), "SETTLE"),
    ],
)
def test_entries_out_of_order_are_caught(tmp_path: Path, change: Callable[[Line], Any], kind: str) -> None:
    build(tmp_path / "run", on_entry=at("beech", kind, change))
    assert "ledger-order" in failing(tmp_path / "run")
    assert failing(tmp_path / "run") <= {"ledger-order", "ledger-complete", "epsilon-recomputed", "statement-true",
                                         "plan-is-what-ran"}  # fmt: skip


def test_nothing_may_follow_an_abort_and_an_abort_takes_nothing_back_that_was_reserved(tmp_path: Path) -> None:
    def given_up(book: Book) -> None:
        if book.site == "beech":
            book.append("ABORT", "run-0123456789ab", epsilon=0, delta=0)

    build(tmp_path / "run", on_planned=given_up)
    assert "given up before" in reasons(tmp_path / "run", "ledger-order")


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(records=812),
        lambda entry: entry.pop("delta"),
        lambda entry: entry.update(epsilon="1"),
        lambda entry: entry.update(schema=3),
        lambda entry: entry.update(time="yesterday"),
        lambda entry: entry.update(site="ash"),
        lambda entry: entry.update(ledger="1" * 64),
        lambda entry: entry.update(time="2039-01-31T12:00:00+00:00"),
    ],
)
def test_malformed_entries_are_caught(tmp_path: Path, change: Callable[[Line], Any]) -> None:
    build(tmp_path / "run", on_entry=at("beech", "PLAN", change))
    assert "ledger-chain" in failing(tmp_path / "run")
    assert "Site beech, entry" in reasons(tmp_path / "run", "ledger-chain")


def test_an_entry_of_an_unknown_kind_is_caught(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    built.edit_ledger("beech", lambda entries: entries[3].update(kind="GIFT"), resign=True)
    assert "unknown kind" in reasons(tmp_path / "run", "ledger-chain")


@pytest.mark.parametrize("spelled", ["as it was digested", "canonically"])
def test_entries_of_schema_1_leave_the_question_of_signatures_open(tmp_path: Path, spelled: str) -> None:
    """A ledger that began before signatures: digests over Python's spelling, one cap, nothing of what ran."""

    built = build(tmp_path / "run")
    lines = built.lines("ledgers/beech.jsonl")
    plan = plan_of(1, 2)
    text = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}
    old = {
        "kind": "PLAN", "schema": 1, "seq": 1, "previous": "0" * 64, "site": "beech",
        "time": "2025-01-01T00:00:00+00:00", "run_id": "old", "data_set": lines[1]["data_set"],
        "ledger": lines[0]["ledger"], "plan": plan,
        "plan_digest": sha(json.dumps(plan, **text).encode()), "epsilon": charge(plan), "delta": 1e-5,
        "cap_epsilon": 5.0, "cap_delta": 1e-4, "steps": 2, "accountant": "PLD",
        "cross_check": {"prv": None, "rdp": 1.5},
    }  # fmt: skip
    old["digest"] = sha(json.dumps(old, **text).encode())
    entries, previous = [old], old["digest"]
    for seq, line in enumerate(lines[1:9], start=2):
        body = {k: v for k, v in line.items() if k not in ("digest", "signature")} | {"seq": seq, "previous": previous}
        if body["kind"] == "SETTLE":
            body["reservation"] = entries[-1]["digest"]
        previous = sha(body)
        entries.append({**body, "digest": previous, "signature": sign(key_of("beech"), "ledger_entry", jcs(body))})
    built.write("ledgers/beech.jsonl", [lines[0], *entries])
    if spelled == "as it was digested":
        content = [jcs(lines[0]), json.dumps(old).encode(), *map(jcs, entries[1:])]
        (built.folder / "ledgers" / "beech.jsonl").write_bytes(b"\n".join(content) + b"\n")
    said = findings(tmp_path / "run")
    for name in ("ledger-chain", "ledger-order", "budget-prefix", "epsilon-recomputed"):
        assert said[name].status == "pass", said[name]
    assert said["ledger-signatures"].status == "not shown"
    assert "entries 1 to 1 are of schema 1" in said["ledger-signatures"].evidence[0]


def test_schema_1_may_not_follow_schema_2(tmp_path: Path) -> None:
    built = build(tmp_path / "run", sites=3)

    def unsigned(entries: list[Line]) -> None:
        for entry in entries[-1:]:
            entry["schema"] = 1
            entry.pop("signature")

    built.edit_ledger("beech", unsigned)
    assert "falls back to schema 1" in reasons(tmp_path / "run", "ledger-chain")


# Caps.

EPSILON = charge(plan_of(0, 3))


def _cap(factor: float, days: int | None = None) -> list[Line]:
    return [{"epsilon": 100.0, "delta": 1e-3, "days": None}, {"epsilon": factor * EPSILON, "delta": 1e-3, "days": days}]


def _never_ran(book: Book) -> None:
    book.append("ABORT", "earlier-1", epsilon=0, delta=0)


@pytest.mark.parametrize(
    ("options", "crossed"),
    [
        ({"earlier": (1,), "caps": _cap(2.0)}, False),
        ({"earlier": (1,), "caps": _cap(1.5)}, True),
        # Given up at once, so that the sum at the end is within the cap again.
        ({"earlier": (1,), "caps": _cap(1.5), "on_planned": _never_ran}, True),
        ({"earlier": (1,), "caps": _cap(2.0), "on_planned": _never_ran}, False),
        ({"earlier": (10,), "caps": _cap(1.5, 30)}, True),
        ({"earlier": (30,), "caps": _cap(1.5, 30)}, True),
        ({"earlier": (31,), "caps": _cap(1.5, 30)}, False),
        ({"earlier": (45, 20, 10), "caps": _cap(2.5, 30)}, True),
        ({"earlier": (60, 45, 10), "caps": _cap(2.5, 30)}, False),
        ({"caps": [{"epsilon": 9.0, "delta": 9e-6, "days": None}]}, True),
        ({"caps": [{"epsilon": 9.0, "delta": 1e-5, "days": None}]}, False),
    ],
)
def test_a_cap_crossed_at_any_moment_is_caught_by_that_check_alone(
    tmp_path: Path, options: dict[str, Any], crossed: bool
) -> None:
    build(tmp_path / "run", **options)
    assert failing(tmp_path / "run") == ({"budget-prefix"} if crossed else set())


def test_a_charge_that_falls_is_caught(tmp_path: Path) -> None:
    build(tmp_path / "run", on_entry=at("beech", "PLAN", lambda entry: entry.update(epsilon=2 * entry["epsilon"])))
    assert "falls from" in reasons(tmp_path / "run", "budget-prefix")


def test_keys_that_the_governance_did_not_sign_are_not_believed(tmp_path: Path) -> None:
    build(tmp_path / "run")
    caught = {"ledger-signatures", "ledger-heads", "openings", "statement-signed"}
    assert failing(tmp_path / "run", governance=public(key_of("governance"))) == caught


def test_a_stranger_in_the_sites_place_is_not_believed(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    built.edit_ledger("beech", lambda entries: None, resign=False)
    lines = built.lines("ledgers/beech.jsonl")
    entries = rechained(lines[1:9], key_of("mallory"))
    built.write("ledgers/beech.jsonl", [{**lines[0], "public_key": public(key_of("mallory"))}, *entries, *lines[9:]])
    assert failing(tmp_path / "run") == {"ledger-signatures"}
    assert sha(b"") not in reasons(tmp_path / "run", "ledger-signatures")
