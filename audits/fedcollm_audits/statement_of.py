"""The statement to look at, what a check says where there is none, and of whom it has to speak."""

from __future__ import annotations

from collections.abc import Mapping

from fedcollm_audits.evidence import Envelope, Evidence
from fedcollm_audits.notes import Notes

__all__ = ["envelope_of", "took_part", "unstated_in"]


def envelope_of(evidence: Evidence, notes: Notes) -> Envelope | None:
    """The envelope; None with a problem where it cannot be read or a private run has none, else with a gap."""
    if "statement.json" in evidence.broken:
        notes.problem(f"statement.json {evidence.broken['statement.json']}.")
        return None
    if evidence.envelope is None:
        if evidence.private:
            notes.problem("The run calls itself private and has no statement.")
        else:
            notes.gap("No statement lies here.")
    return evidence.envelope


def took_part(evidence: Evidence) -> frozenset[str]:
    """Sites that the transcript shows in the run: enrolled, uploading, in a sum, or with a ledger head of this run.

    Names that no roster knows, and events of another form, are for the transcript's own checks.
    """
    found: set[str] = set()
    for event in evidence.events("enrolled", "upload", "agreed", "summed", "opened", "lost", "tree_heads"):
        agreed = event.get("set")
        found.add(str(event.get("site")))
        for told in (event.get("sites"), event.get("cohort"), event.get("heads")):
            found |= _names(told)
        found |= _names(agreed.get("sharers")) if isinstance(agreed, Mapping) else set()
    known = {site for roster in evidence.rosters.values() for site in roster.sites}
    return frozenset(known & found)


def unstated_in(evidence: Evidence) -> frozenset[str]:
    """Sites that took part and for which the statement says that it claims nothing; empty where it names none."""
    return frozenset(_names(evidence.predicate.get("unstated")))


def _names(told: object) -> set[str]:
    return {name for name in told if isinstance(name, str)} if isinstance(told, list | Mapping) else set()
