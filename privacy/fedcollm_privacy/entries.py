"""What a ledger's entries say by themselves: whether their chain holds, and what they add up to.

Apart from the ledger, so that an exported ledger can be checked without its file and without any accountant.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from fedcollm_privacy.messages import canonical_json

__all__ = ["GENESIS", "Spent", "charges", "entry_digest", "total", "verify_chain"]

GENESIS = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a run, or all runs on a data set, have been charged so far; zeros for nothing."""

    epsilon: float
    delta: float
    steps: int


def entry_digest(body: dict[str, Any]) -> str:
    """SHA-256 of an entry's canonical JSON, the previous entry's digest included."""
    return hashlib.sha256(canonical_json(body)).hexdigest()


def verify_chain(entries: list[dict[str, Any]]) -> list[str]:
    """Problems in a list of exported entries, in words; empty when the chain holds.

    Checks that sequence numbers have no gap, that every digest is that of its body, and that every body names the
    digest before it. It cannot show that entries are missing at the end.
    """
    problems = []
    previous = GENESIS
    for position, entry in enumerate(entries, start=1):
        body = {key: value for key, value in entry.items() if key != "digest"}
        if body.get("seq") != position:
            problems.append(f"entry {position}: sequence number is {body.get('seq')!r}")
        if body.get("previous") != previous:
            problems.append(f"entry {position}: does not follow the entry before it")
        try:
            sound = entry_digest(body) == entry.get("digest")
        except ValueError:  # NaN has no canonical form
            sound = False
        if not sound:
            problems.append(f"entry {position}: content does not match its digest")
        previous = str(entry.get("digest"))
    return problems


def charges(entries: list[dict[str, Any]], data_set: str) -> dict[str, Spent]:
    """Per run, its latest charge on a data set; PLAN and RESERVE entries carry it, and it never falls."""
    latest: dict[str, Spent] = {}
    for entry in entries:
        if entry["kind"] in ("PLAN", "RESERVE") and entry["data_set"] == data_set:
            latest[entry["run_id"]] = Spent(
                epsilon=entry["epsilon"], delta=entry["delta"], steps=entry.get("steps_so_far", 0)
            )
    return latest


def total(spent: list[Spent]) -> Spent:
    """The sum of charges: basic composition."""
    return Spent(
        epsilon=math.fsum(c.epsilon for c in spent),
        delta=math.fsum(c.delta for c in spent),
        steps=sum(c.steps for c in spent),
    )
