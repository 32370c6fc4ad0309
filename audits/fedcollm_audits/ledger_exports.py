"""Which ledgers there are to look at, and what a check says where there are none."""

from __future__ import annotations

from collections.abc import Iterator

from fedcollm_audits import shapes
from fedcollm_audits.evidence import Evidence, LedgerExport
from fedcollm_audits.notes import Notes

__all__ = ["exports", "finished", "sound_exports"]


def exports(evidence: Evidence, notes: Notes) -> Iterator[tuple[str, LedgerExport]]:
    """Every export, by site; unreadable ones become problems, none at all a gap."""
    for name, reason in evidence.broken.items():
        if name.endswith(".jsonl") and name != "transcript.jsonl":
            notes.problem(f"{name} {reason}.")
    if not evidence.ledgers:
        declared = " The run declares itself not private." if evidence.private is False else ""
        notes.gap(f"No export of a ledger lies here or was given.{declared}")
    yield from sorted(evidence.ledgers.items())


def sound_exports(evidence: Evidence, notes: Notes) -> Iterator[tuple[str, LedgerExport]]:
    """Exports whose entries all have the fields of their kind; of the others nothing can be said but that."""
    for site, export in exports(evidence, notes):
        bad = next((i for i, entry in enumerate(export.entries, start=1) if shapes.entry_problem(entry)), 0)
        if bad:
            notes.problem(
                f"Site {site}: entry {bad} is malformed (see ledger-chain), so its ledger cannot be followed."
            )
        else:
            yield site, export


def finished(evidence: Evidence, export: LedgerExport, run_id: str) -> bool:
    """Whether a run is over: it has a statement, in this ledger or in the folder."""
    if any(entry["kind"] in ("STATEMENT", "ABORT") for entry in export.of_run(run_id)):
        return True
    return run_id == evidence.run_id and evidence.envelope is not None
