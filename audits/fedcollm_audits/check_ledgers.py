"""The ledgers' entries: one unbroken, signed chain a site, in the order of a careful site, with no round missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from fedcollm_audits import shapes, signatures, strict_json
from fedcollm_audits.check_budget import BUDGET
from fedcollm_audits.check_heads import HEADS
from fedcollm_audits.evidence import Evidence, LedgerExport
from fedcollm_audits.ledger_exports import exports, finished, sound_exports
from fedcollm_audits.notes import Notes, asked
from fedcollm_audits.verdict import Check

__all__ = ["CHECKS"]

_GENESIS: Final = "0" * 64


def _body(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("digest", "signature")}


def _digest_fits(body: Mapping[str, Any], digest: object) -> bool:
    if body.get("schema") == 1:
        return strict_json.fits_old_digest(body, digest)
    return strict_json.digest(body) == digest


def _chain(evidence: Evidence, notes: Notes) -> None:
    for site, export in exports(evidence, notes):
        if export.opening and (wrong := shapes.OPENING(export.opening)):
            notes.problem(f"Site {site}: the line that opens its ledger {wrong}.")
        previous, schema, time = _GENESIS, 1, ""
        for position, entry in enumerate(export.entries, start=1):
            where = f"Site {site}, entry {position}"
            if wrong := shapes.entry_problem(entry):
                notes.problem(f"{where} {wrong}.")
            for sentence in _link_problems(export, entry, position, previous):
                notes.problem(f"{where}: {sentence}.")
            if entry.get("schema") == 1 and schema == 2:
                notes.problem(f"{where}: falls back to schema 1, which has no signatures.")
            try:
                datetime.fromisoformat(str(entry.get("time")))
            except ValueError:
                notes.problem(f"{where}: its time is none.")
            if str(entry.get("time")) < time:  # all times have one form, so they sort as texts
                notes.problem(f"{where}: its time {entry.get('time')} is before the entry before it ({time}).")
            previous, time = str(entry.get("digest")), str(entry.get("time"))
            schema = 2 if entry.get("schema") == 2 else schema
        notes.saw(f"Site {site}: {len(export.entries)} entries, the last digest is {previous[:16]}.")


def _link_problems(export: LedgerExport, entry: Mapping[str, Any], position: int, previous: str) -> Iterator[str]:
    body = _body(entry)
    if body.get("seq") != position:
        yield f"says that it is entry {body.get('seq')!r:.40}"
    if body.get("previous") != previous:
        yield "does not follow the entry before it"
    if not _digest_fits(body, entry.get("digest")):
        yield "its content does not fit its digest"
    opening = export.opening or export.entries[0]
    if body.get("site") != opening.get("site"):
        yield f"is an entry of the site {body.get('site')!r:.80}"
    if body.get("kind") == "PLAN" and export.opening and body.get("ledger") != export.opening.get("ledger"):
        yield "is of another ledger"


def _signatures(evidence: Evidence, notes: Notes) -> None:
    count = 0
    for site, export in sound_exports(evidence, notes):
        keys, said = evidence.site_keys(site), export.opening.get("public_key")
        if not keys:
            notes.problem(f"Site {site}: no roster that lies here names it, so no key can be believed to be its own.")
            continue
        if export.opening and said not in keys:
            notes.problem(f"Site {site}: its ledger is opened under a key that no roster gives it.")
        unsigned = [entry["seq"] for entry in export.entries if entry["schema"] == 1]
        if unsigned:
            notes.gap(f"Site {site}: entries 1 to {max(unsigned)} are of schema 1, before there were signatures.")
        for position, entry in enumerate(export.entries, start=1):
            if entry["schema"] == 1:
                continue
            message, signature = strict_json.canonical(_body(entry)), bytes.fromhex(entry["signature"])
            if not any(signatures.holds(key, message, signature, purpose="ledger_entry") for key in keys):
                notes.problem(f"Site {site}, entry {position} ({entry['kind']}): not signed by the site's key.")
            count += 1
    if evidence.ledgers:
        notes.saw(f"{count} entries' signatures were verified under the keys of the rosters.", signatures=count)
    if evidence.ledgers and not evidence.governance:
        notes.saw("No governance key was given: that these keys are the sites' own rests on the rosters alone.")


def _order(evidence: Evidence, notes: Notes) -> None:
    for site, export in sound_exports(evidence, notes):
        planned: dict[str, Mapping[str, Any]] = {}
        charge: dict[str, tuple[float, float]] = {}
        opened: dict[str, Mapping[str, Any]] = {}
        steps: Counter[str] = Counter()
        latest: dict[str, int] = {}
        aborted: set[str] = set()
        for position, entry in enumerate(export.entries, start=1):
            where, run = f"Site {site}, entry {position} ({entry['kind']} of run {entry['run_id']})", entry["run_id"]
            plan = planned.get(run)
            if run in aborted:
                notes.problem(f"{where}: the run was given up before.")
            if entry["kind"] == "PLAN":
                notes.require(plan is None, f"{where}: the run has a plan already.")
                planned[run] = entry
                charge[run] = (entry["epsilon"], entry["delta"])
                continue
            if plan is None or plan["data_set"] != entry["data_set"]:
                notes.problem(f"{where}: no PLAN of this run on this data set stands before it.")
                continue
            if entry["kind"] == "RESERVE":
                steps[run] += entry["steps"]
                _reserved(notes, where, entry, plan, steps[run], latest.get(run, 0))
                latest[run] = entry["server_round"]
                opened[entry["digest"]] = entry
                charge[run] = (entry["epsilon"], entry["delta"])
            elif entry["kind"] == "SETTLE":
                reserved = opened.pop(entry["reservation"], None)
                sound = reserved is not None and reserved["run_id"] == run
                notes.require(sound, f"{where}: settles a reservation that is not open.")
            else:
                left = [e["server_round"] for e in opened.values() if e["run_id"] == run]
                notes.require(not left, f"{where}: the reservation of round {left[:1]} is still open.")
                due = (0, 0) if entry["kind"] == "ABORT" and not steps[run] else charge[run]
                said = (entry["epsilon"], entry["delta"])
                if entry["kind"] == "ABORT":
                    aborted.add(run)
                    notes.require(said == due, f"{where}: leaves {said} charged where it is {due}.")
                    charge[run] = due
        for entry in opened.values():
            if finished(evidence, export, entry["run_id"]):
                notes.problem(
                    f"Site {site}, entry {entry['seq']}: the reservation of round {entry['server_round']} of run "
                    f"{entry['run_id']} was never settled, though the run is over."
                )
        notes.saw(f"Site {site}: {len(planned)} runs, {sum(steps.values())} steps reserved, {len(opened)} left open.")


def _reserved(
    notes: Notes, where: str, entry: Mapping[str, Any], plan: Mapping[str, Any], steps: int, latest: int
) -> None:
    notes.require(entry["plan_digest"] == plan["plan_digest"], f"{where}: reserves for another plan than the run's.")
    notes.require(
        entry["steps_so_far"] == steps, f"{where}: says {entry['steps_so_far']} steps so far, they add up to {steps}."
    )
    notes.require(
        entry["server_round"] >= latest, f"{where}: goes back from round {latest} to {entry['server_round']}."
    )
    a_round = plan["plan"].get("steps_per_round")
    if a_round is not None:
        notes.require(
            entry["steps"] == a_round, f"{where}: reserves {entry['steps']} steps, the plan has {a_round} a round."
        )


def _complete(evidence: Evidence, notes: Notes) -> None:
    if evidence.private is False and not evidence.ledgers:
        notes.gap("The run declares itself not private: no site had anything to pay.")
        return
    if "transcript.jsonl" in evidence.broken:
        notes.problem(
            f"transcript.jsonl {evidence.broken['transcript.jsonl']}: what the ledgers should hold is not known."
        )
    ledgers = dict(sound_exports(evidence, notes))
    if not evidence.ledgers:
        return
    round_of = {event["plan"]: event["server_round"] for event in evidence.events("plan")}
    uploads = Counter((event["site"], event["server_round"]) for event in evidence.events("upload"))
    seen = set(uploads)
    for event in evidence.events("agreed"):
        seen |= {(site, round_of.get(event["plan"], 0)) for site in event["set"]["survivors"]}
    kept = {event["server_round"] for event in evidence.events("kept")}
    seen |= {(site, server_round) for site in ledgers for server_round in kept}
    ends: dict[int, tuple[str, tuple[str, ...]]] = {r: ("kept", ()) for r in kept}
    ends |= {e["server_round"]: (e["event"], tuple(e["cohort"])) for e in evidence.events("opened", "lost")}
    missing = {site for site, _ in seen} | set(evidence.predicate.get("sites", {})) - set(evidence.ledgers)
    for site in sorted(missing - set(evidence.ledgers)):
        rounds = sorted(r for s, r in seen if s == site)
        notes.problem(f"Site {site} took part (rounds {rounds[:5]}), but no export of its ledger lies here.")
    for site, export in ledgers.items():
        reserved: dict[int, list[Mapping[str, Any]]] = {}
        settled = {}
        for entry in export.of_run(evidence.run_id):
            if entry["kind"] == "RESERVE":
                reserved.setdefault(entry["server_round"], []).append(entry)
            elif entry["kind"] == "SETTLE":
                settled[entry["reservation"]] = entry
        for server_round in sorted({r for s, r in seen if s == site} | set(reserved)):
            wanted = max(uploads[site, server_round], (site, server_round) in seen)
            found = reserved.get(server_round, [])
            where = f"Site {site}, round {server_round}"
            if len(found) < wanted:
                notes.problem(
                    f"{where}: the transcript shows {wanted} upload{'s' * (wanted > 1)} of it, its ledger has "
                    f"{len(found)} reservations: steps were taken that nobody was charged for."
                )
            outcomes = [settled[e["digest"]]["outcome"] if e["digest"] in settled else "" for e in found]
            _require_outcome(notes, where, outcomes, ends.get(server_round), site, (site, server_round) in seen)
    notes.saw(f"{len(seen)} uploads and agreements in the transcript were looked up in {len(ledgers)} ledgers.")


def _require_outcome(
    notes: Notes, where: str, outcomes: list[str], end: tuple[str, tuple[str, ...]] | None, site: str, took_part: bool
) -> None:
    event, cohort = end if end is not None else ("", ())
    included = event == "opened" and site in cohort
    if outcomes.count("included") > included:
        notes.problem(f"{where}: its ledger says {outcomes}, but the transcript shows no opening that it was in.")
    if not outcomes or not took_part or end is None:
        return
    due = "included" if included else "lost" if event == "lost" else "left_out"
    if outcomes[-1] == "":
        notes.problem(f"{where}: its reservation has no SETTLE.")
    elif outcomes[-1] == "failed":
        if included:
            notes.gap(
                f"{where}: its update was opened, its ledger says that it broke off; it was charged all the same."
            )
    elif outcomes[-1] != due:
        notes.problem(f"{where}: its ledger says {outcomes[-1]}, the transcript says {due}.")


CHECKS: tuple[Check, ...] = (
    Check(
        name="ledger-chain",
        group="ledger",
        question="Every ledger is one unbroken chain of well-formed entries.",
        why="An entry that was edited, taken out or put in breaks the chain of digests behind it.",
        run=asked(_chain),
    ),
    Check(
        name="ledger-signatures",
        group="ledger",
        question="Every entry is signed by the key that the roster gives the site.",
        why="Without the site's key nobody, the server included, can write or rewrite what the site says it spent.",
        run=asked(_signatures),
    ),
    Check(
        name="ledger-order",
        group="ledger",
        question="Every run was planned before it reserved, reserved before it settled, and settled all it reserved.",
        why="A budget protects only if it is taken before the data is touched, and once for every touch.",
        run=asked(_order),
    ),
    HEADS,
    Check(
        name="ledger-complete",
        group="ledger",
        question="Every round that the transcript shows a site in is paid for in that site's ledger.",
        why="A round trained without a reservation costs privacy that no sum of charges shows.",
        run=asked(_complete),
    ),
    BUDGET,
)
