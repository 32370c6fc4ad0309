"""The statement to look at, and what a check says where there is none."""

from __future__ import annotations

from fedcollm_audits.evidence import Envelope, Evidence
from fedcollm_audits.notes import Notes

__all__ = ["envelope_of"]


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
