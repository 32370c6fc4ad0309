"""The statement: signed by everybody it speaks for, and bound to the very files, ledgers and rounds it is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fedcollm_audits import signatures, strict_json
from fedcollm_audits.check_budget import caps_of
from fedcollm_audits.check_claims import CLAIMS
from fedcollm_audits.check_heads import prefix_roots
from fedcollm_audits.evidence import Envelope, Evidence, LedgerExport
from fedcollm_audits.ledger_exports import exports
from fedcollm_audits.notes import Notes, asked
from fedcollm_audits.statement_of import envelope_of, took_part, unstated_in
from fedcollm_audits.verdict import Check

__all__ = ["CHECKS"]

_STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE: Final = "urn:secure-fedcollm:privacy-statement:1"
_SUBJECTS: Final = (
    "config.yaml",
    *(f"{w}_adapter/{name}" for w in ("llm", "slm") for name in ("adapter_config.json", "adapter_model.safetensors")),
)


def _signed(evidence: Evidence, notes: Notes) -> None:
    envelope = envelope_of(evidence, notes)
    if envelope is None:
        return
    kind = envelope.payload_type
    notes.require(kind == signatures.DSSE_TYPE, f"The payload is of the type {kind!r:.80}.")
    if strict_json.canonical(envelope.statement) != envelope.payload:
        notes.problem("The payload is not in its canonical spelling (RFC 8785).")
    signed = signatures.pae(kind, envelope.payload)
    valid = set()
    for key, signature in envelope.signatures:
        if signatures.holds(key, signed, signature):
            valid.add(key)
        else:
            notes.problem(f"The signature by the key {key!r:.20} does not hold for this payload.")
    stated = set(evidence.predicate.get("rosters", []))
    named = [r for r in evidence.rosters.values() if {r.digest, r.file_digest} & stated]
    used = [
        e["roster"] if e["event"] == "start" else e["terms"]["roster_digest"] for e in evidence.events("start", "plan")
    ]
    last = evidence.rosters.get(used[-1]) if used else None
    if last is None or last not in named:
        notes.problem("The roster of the last round does not lie here or is not named, so nobody's key is known.")
        return
    for roster in named:
        if evidence.governance and not roster.governed:
            notes.problem(f"The roster {roster.digest[:16]} is not signed by the governance.")
    there = {*evidence.predicate.get("sites", ()), *took_part(evidence)}
    if not evidence.events("plan"):  # nothing was exchanged: a roster may be filled up with sites that never were
        there |= {*evidence.predicate["data"].get("sites", ())}
    needed = {site: party for site, party in last.sites.items() if site in there} or dict(last.sites)
    unstated = unstated_in(evidence)
    for who, party in {"the server": last.server, **needed}.items():
        if who in unstated and party.public_key not in valid:
            notes.gap(f"{who} took part and did not sign the statement, which says so and claims nothing for it.")
        else:
            notes.require(party.public_key in valid, f"{who} ({party.name}) did not sign the statement.")
    for site in sorted(set(last.sites) - set(needed)):
        notes.saw(f"{site} stands in the roster and left no trace in this run: the statement does not speak for it.")
    parties = {p.public_key for roster in named for p in (roster.server, *roster.sites.values())}
    for key in sorted(valid - parties):
        notes.problem(f"A stranger's key, {key[:16]}, signed the statement.")
    notes.saw(
        f"{len(valid)} signatures hold; the roster {last.digest[:16]} has {len(last.sites)} sites and the server."
    )
    if not evidence.governance:
        notes.saw("No governance key was given: that these keys are the parties' own rests on the rosters alone.")


def _bound(evidence: Evidence, notes: Notes) -> None:
    envelope = envelope_of(evidence, notes)
    if envelope is None:
        return
    statement, predicate = envelope.statement, evidence.predicate
    for field, due in (("_type", _STATEMENT_TYPE), ("predicateType", _PREDICATE_TYPE)):
        notes.require(statement.get(field) == due, f"The payload's {field} is {statement.get(field)!r:.80}, not {due}.")
    _subjects(evidence, notes, statement)
    _transcript(evidence, notes, envelope)
    named = {event["roster"] for event in evidence.events("start")}
    named |= {event["terms"]["roster_digest"] for event in evidence.events("plan")}
    known = {r.file_digest: r.digest for r in evidence.rosters.values()}
    if named != {known.get(digest, digest) for digest in predicate.get("rosters", [])}:
        notes.problem("The rosters that the statement names are not those of the transcript's rounds.")
    for roster in sorted(named - set(evidence.rosters)):
        notes.problem(f"The roster {roster[:16]} does not lie here.")
    for which in ("slm", "llm"):
        path = evidence.run_dir / f"{which}_adapter" / "README.md"
        card = strict_json.read_bytes(path, 2**24) if path.exists() or path.is_symlink() else b""
        notes.require(envelope.digest.encode() in card, f"The model card of {which} does not name this statement.")
    stated = predicate.get("sites", {})
    ledgers = dict(exports(evidence, Notes()))
    charged, unstated = {s for s, x in ledgers.items() if any(x.of_run(evidence.run_id))}, unstated_in(evidence)
    for site in sorted({*stated, *unstated, *charged, *(took_part(evidence) if evidence.private else ())}):
        if site in unstated and site not in stated:
            notes.gap(
                f"Site {site}: the statement claims nothing for it. "
                + ("Its ledger lies here: look there for what it was charged." if site in charged else "Ask it why.")
            )
        elif site not in stated:
            if evidence.private:
                what = "has a ledger of this run" if site in charged else "took part in this run"
                notes.problem(f"Site {site}: {what} and does not stand in the statement.")
        elif site not in ledgers:
            notes.gap(
                f"Site {site}: no export of its ledger lies here, so what the statement says of it has no witness."
            )
        else:
            _ledger(evidence, notes, site, stated[site], ledgers[site])
    notes.saw(f"The payload's SHA-256 is {envelope.digest}.", payload=envelope.digest)


def _subjects(evidence: Evidence, notes: Notes, statement: Mapping[str, Any]) -> None:
    subjects = {row["name"]: row["digest"]["sha256"] for row in statement["subject"]}
    if set(subjects) != set(_SUBJECTS):
        notes.problem(f"The statement is about {sorted(subjects)}, not about {sorted(_SUBJECTS)}.")
    for name, digest in sorted(subjects.items()):
        if name not in _SUBJECTS:
            continue
        path = evidence.run_dir / name
        if path.is_symlink() or not path.is_file():
            notes.problem(f"{name} is missing, or no regular file.")
            continue
        found = strict_json.file_digest(path)
        notes.require(found == digest, f"{name} has the SHA-256 {found[:16]}, the statement says {digest!s:.16}.")


def _transcript(evidence: Evidence, notes: Notes, envelope: Envelope) -> None:
    said = evidence.predicate["transcript"]
    count, lines = said["events"], evidence.transcript
    if type(count) is not int or not 0 < count <= len(lines):
        notes.problem(f"The statement covers {count!r:.20} events; the transcript here has {len(lines)}: it was cut.")
        return
    if lines[count - 1].get("digest") != said["head"]:
        notes.problem(f"Event {count} of the transcript is not the one that the statement was made after.")
    for event in lines[count:]:
        # A run that was cut while its statement was signed begins once more; nothing is trained after that.
        if event.get("event") not in ("statement", "tree_heads", "start"):
            notes.problem(f"Event {event.get('seq')} ({event.get('event')!r:.40}) came after the statement.")
    named = [event["statement"] for event in lines if event.get("event") == "statement"]
    if named != [envelope.digest]:
        notes.problem(f"The transcript names {len(named)} statements ({str(named)[:80]}), not this one and no other.")


def _ledger(evidence: Evidence, notes: Notes, site: str, row: Mapping[str, Any], export: LedgerExport) -> None:
    said, where, entries = row["ledger"], f"Site {site}", export.entries
    size = said["tree_size"]
    if export.opening.get("ledger") != said["ledger"]:
        notes.problem(f"{where}: the statement is about another ledger than the one shown.")
    if type(size) is not int or not 0 < size <= len(entries):
        notes.problem(f"{where}: the statement covers {size!r:.20} entries, the ledger here has {len(entries)}.")
    else:
        head = entries[size - 1].get("digest")
        notes.require(head == said["head"], f"{where}: entry {size} is not the one that the statement was made after.")
        root = prefix_roots([bytes.fromhex(entry["digest"]) for entry in entries[:size]])[-1]
        notes.require(root == said["tree_root"], f"{where}: the first {size} entries have another root than is stated.")
    planned = [entry for entry in export.of_run(evidence.run_id) if entry["kind"] == "PLAN"]
    if len(planned) != 1:
        notes.problem(f"{where}: its ledger has {len(planned)} plans of this run.")
        return
    entry = planned[0]
    due = {
        "plan": entry["plan"], "plan_digest": entry["plan_digest"], "caps": caps_of(entry),
        "policy": entry.get("policy", ""),
    }  # fmt: skip
    for field, value in due.items():
        notes.require(row.get(field) == value, f"{where}: the statement's {field} is not its ledger's.")
    noted = [e for e in export.of_run(evidence.run_id) if e["kind"] == "STATEMENT"]
    digest = "" if evidence.envelope is None else evidence.envelope.digest
    if [e["statement"] for e in noted] != [digest]:
        notes.problem(f"{where}: its ledger notes {len(noted)} statements of this run, not this one and no other.")
    for e in noted:
        if type(size) is int and e["seq"] <= size:
            notes.problem(f"{where}: the statement covers the entry that notes it.")
        if (e["epsilon"], e["delta"]) != (row["epsilon"], row["delta"]):
            notes.problem(f"{where}: its ledger notes epsilon {e['epsilon']}, the statement says {row['epsilon']}.")


CHECKS: tuple[Check, ...] = (
    Check(
        name="statement-signed",
        group="statement",
        question="Server and every site signed the privacy statement with the keys of the roster, and nobody else did.",
        why="A statement that a site did not sign is somebody else's claim about it.",
        run=asked(_signed),
    ),
    Check(
        name="statement-bound",
        group="statement",
        question="The statement is about these files, these ledgers and this transcript, and they name it in return.",
        why="A true statement about another run, or about an earlier state of this one, would prove nothing here.",
        run=asked(_bound),
    ),
    CLAIMS,
)
