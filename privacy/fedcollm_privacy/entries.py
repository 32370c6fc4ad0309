"""What a ledger's entries say by themselves: whether their chain and signatures hold, and what they add up to.

Apart from the ledger, so that an exported ledger can be checked without its file and without any accountant. The form
of an entry is described in ``docs/formats.md``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import SignatureInvalid
from fedcollm_privacy.identity import PublicIdentity
from fedcollm_privacy.messages import canonical_json

__all__ = [
    "GENESIS",
    "SCHEMA_VERSION",
    "Cap",
    "Spent",
    "body_of",
    "caps_of",
    "charges",
    "entry_bytes",
    "entry_digest",
    "entry_time",
    "leaves",
    "open_reservations",
    "total",
    "verify_chain",
    "window_start",
]

GENESIS = "0" * 64
SCHEMA_VERSION = 2
"""Since 2, entries are signed and in RFC 8785's form. Entries of schema 1 stay as they were written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """What a data set may spend over all runs.

    Attributes:
        epsilon: the sum of the runs' charges may reach it.
        delta: likewise, in (0, 1).
        days: counts the runs that were planned, or reserved steps, in the last so many days; None: all there ever were.
    """

    epsilon: float
    delta: float
    days: int | None = None

    def __post_init__(self) -> None:
        _validate.positive(epsilon=self.epsilon, delta=self.delta)
        _validate.in_range(0, 1, delta=self.delta)
        if self.days is not None:
            _validate.integer_at_least(1, days=self.days)
            _validate.in_range(1, 36_500, days=self.days)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a run, or all runs on a data set, have been charged so far; zeros for nothing."""

    epsilon: float
    delta: float
    steps: int


def body_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What digest and signature cover: the entry without the two."""
    return {key: value for key, value in entry.items() if key not in ("digest", "signature")}


def entry_bytes(body: Mapping[str, Any]) -> bytes:
    """The bytes of an entry's body; ValueError for NaN and whatever else has no form."""
    if body.get("schema") == 1:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    return canonical_json(body)


def entry_digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of an entry's body, the previous entry's digest included."""
    return hashlib.sha256(entry_bytes(body)).hexdigest()


def leaves(entries: Iterable[Mapping[str, Any]]) -> list[bytes]:
    """What the ledger's tree is made over: the 32 bytes of every entry's digest."""
    return [bytes.fromhex(entry["digest"]) for entry in entries]


def verify_chain(entries: Sequence[Mapping[str, Any]], identity: PublicIdentity | None) -> list[str]:
    """Problems in a list of exported entries, in words; empty when chain and signatures hold.

    Checks that sequence numbers have no gap, that every digest is that of its body, that every body names the digest
    before it, that schemas never fall, and that every entry since schema 2 is signed by ``identity``. It cannot show
    that entries are missing at the end, nor that unsigned entries of schema 1 are those that were written, unless a
    signed one follows them; tree heads kept elsewhere do.

    Args:
        entries: with ``digest`` and, since schema 2, ``signature``.
        identity: who signs; None checks no signature.
    """
    problems = []
    previous, schema = GENESIS, 1
    for position, entry in enumerate(entries, start=1):
        body = body_of(entry)
        if body.get("seq") != position:
            problems.append(f"entry {position}: sequence number is {body.get('seq')!r}")
        if body.get("previous") != previous:
            problems.append(f"entry {position}: does not follow the entry before it")
        if type(body.get("schema")) is not int or body["schema"] not in range(schema, SCHEMA_VERSION + 1):
            problems.append(f"entry {position}: schema {body.get('schema')!r} after schema {schema}")
        else:
            schema = body["schema"]
        if schema < 2 and "signature" in entry:
            problems.append(f"entry {position}: signed, in a schema without signatures")
        try:
            if entry_digest(body) != entry.get("digest"):
                problems.append(f"entry {position}: content does not match its digest")
            elif schema >= 2 and identity is not None:
                identity.verify("ledger_entry", entry_bytes(body), _signature(entry))
        except SignatureInvalid:
            problems.append(f"entry {position}: not signed by the site's key")
        except ValueError:  # NaN has no canonical form; no signature, or none in hex
            problems.append(f"entry {position}: content or signature is malformed")
        previous = str(entry.get("digest"))
    return problems


def _signature(entry: Mapping[str, Any]) -> bytes:
    text = str(entry.get("signature"))
    signature = bytes.fromhex(text)
    if signature.hex() != text:  # capitals or spaces: another spelling of the same bytes
        raise ValueError("a signature has one spelling")
    return signature


def charges(entries: Iterable[Mapping[str, Any]], data_set: str, since: datetime | None = None) -> dict[str, Spent]:
    """Per run, its latest charge on a data set: PLAN and RESERVE entries carry it, ABORT may take it back.

    Args:
        entries: in order.
        data_set: its commitment.
        since: leaves out runs without a PLAN or RESERVE entry at or after this time. What closes a run later is no new
            use of the data, and could not be refused.
    """
    latest: dict[str, Spent] = {}
    recent = set()
    for entry in entries:
        if entry.get("data_set") != data_set:
            continue
        used = entry["kind"] in ("PLAN", "RESERVE")
        if since is None or (used and datetime.fromisoformat(entry["time"]) >= since):
            recent.add(entry["run_id"])
        if entry["kind"] in ("PLAN", "RESERVE", "ABORT"):
            before = latest.get(entry["run_id"])
            steps = entry.get("steps_so_far", before.steps if before else 0)
            latest[entry["run_id"]] = Spent(epsilon=entry["epsilon"], delta=entry["delta"], steps=steps)
    return {run: spent for run, spent in latest.items() if run in recent}


def caps_of(planned: Mapping[str, Any]) -> list[Cap]:
    """The caps that stand in a PLAN entry."""
    if planned["schema"] == 1:
        return [Cap(epsilon=planned["cap_epsilon"], delta=planned["cap_delta"])]
    return [Cap(**cap) for cap in planned["caps"]]


def open_reservations(entries: Sequence[Mapping[str, Any]], run_id: str) -> list[Mapping[str, Any]]:
    """The run's RESERVE entries that are not settled."""
    settled = {entry["reservation"] for entry in entries if entry["kind"] == "SETTLE"}
    of_run = [entry for entry in entries if entry["kind"] == "RESERVE" and entry["run_id"] == run_id]
    return [entry for entry in of_run if entry["digest"] not in settled]


def window_start(cap: Cap, now: datetime) -> datetime | None:
    """When the time a cap looks back on begins; None for ever."""
    return None if cap.days is None else now - timedelta(days=cap.days)


def entry_time(seconds: float, last: Mapping[str, Any] | None) -> datetime:
    """The time of the next entry, to the second; never before the last entry's, whatever the clock says."""
    now = datetime.fromtimestamp(seconds, UTC).replace(microsecond=0)
    return now if last is None else max(now, datetime.fromisoformat(last["time"]))


def total(spent: Iterable[Spent]) -> Spent:
    """The sum of charges: basic composition."""
    spent = list(spent)
    return Spent(
        epsilon=math.fsum(c.epsilon for c in spent),
        delta=math.fsum(c.delta for c in spent),
        steps=sum(c.steps for c in spent),
    )
