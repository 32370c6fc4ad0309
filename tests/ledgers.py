"""Ledgers for tests: plans that cost little, keys that are always the same, a clock that obeys.

Imports no test framework and no torch, so that processes of the tests' own start quickly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jcs
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcollm_privacy.adaptive import AdaptivePlan
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Cap, Ledger
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.reservation import Ran, Reservation

PLAN = DpPlan(
    unit="record",
    max_records_per_unit=1,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    sample_rate=Fraction(1, 10),
    expected_batch_size=10,
    steps_per_round=2,
    rounds=3,
    delta=1e-5,
)
NOISIER = dataclasses.replace(PLAN, noise_multiplier=4.0)
ADAPTIVE = AdaptivePlan(order=9.0, target_epsilon=2.0, delta=1e-5, unit="record")
RAN = Ran(
    steps=2,
    noise_multiplier=2.0,
    max_grad_norm=1.0,
    sample_rate="1/10",
    sampling="poisson",
    clipping="flat",
    randomness="operating_system",
    code="c" * 64,
)
WIDE = (Cap(epsilon=100.0, delta=1e-3),)
DAY = 86_400.0


class Clock:
    """Unix time that stands still until it is moved."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def private_of(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def key_of(name: str, secret: str | None = None) -> SigningKey:
    """The party's key, the same in every process; another one of the same name for another secret."""
    return SigningKey(name, private_of(secret or name))


def path_in(folder: Path, site: str = "north") -> Path:
    return folder / "ledgers" / f"{site}.sqlite"


def ledger_at(folder: Path, site: str = "north", **clock: Any) -> Ledger:
    return Ledger(path_in(folder, site), key_of(site), **clock)


def commit(
    ledger: Ledger,
    run_id: str,
    plan: DpPlan | AdaptivePlan = PLAN,
    *,
    data_set: str = "notes",
    caps: Sequence[Cap] = WIDE,
    policy: str = "",
) -> str:
    return ledger.commit_plan(run_id=run_id, data_set=data_set, plan=plan, caps=caps, policy=policy)


def upto(epsilon: float, delta: float = 1e-3, days: int | None = None) -> tuple[Cap]:
    return (Cap(epsilon=epsilon, delta=delta, days=days),)


def reserve(ledger: Ledger, run_id: str, server_round: int = 1, plan: DpPlan = PLAN) -> Reservation:
    return ledger.reserve(run_id=run_id, plan=plan, server_round=server_round)


def reserve_adaptive(
    ledger: Ledger, run_id: str, round_plan: DpPlan = PLAN, server_round: int = 1, plan: AdaptivePlan = ADAPTIVE
) -> Reservation:
    return ledger.reserve_adaptive(run_id=run_id, plan=plan, round_plan=round_plan, server_round=server_round)


def settle(ledger: Ledger, run_id: str, reservation: Reservation, outcome: str = "included") -> str:
    return ledger.settle(run_id=run_id, reservation=reservation.entry, outcome=outcome, ran=RAN)


def filled(folder: Path, **clock: Any) -> Ledger:
    """Two plans and two settled reservations: six entries."""
    ledger = ledger_at(folder, **clock)
    commit(ledger, "run-1")
    commit(ledger, "run-2", NOISIER)
    for number in (1, 2):
        settle(ledger, "run-1", reserve(ledger, "run-1", number))
    return ledger


def kinds(ledger: Ledger) -> list[str]:
    return [entry["kind"] for entry in ledger.entries()]


def sql(folder: Path, *statements: str) -> None:
    db = sqlite3.connect(path_in(folder))
    with db:
        for statement in statements:
            db.execute(statement)
    db.close()


def body_bytes(entry: dict[str, Any]) -> bytes:
    """What an entry's digest and signature cover, spelled by a second library."""
    body = {name: value for name, value in entry.items() if name not in ("digest", "signature")}
    if body["schema"] == 1:
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    spelled: bytes = jcs.canonicalize(body)
    return spelled


def signature_of(private: Ed25519PrivateKey, purpose: str, message: bytes) -> str:
    return private.sign(b"fedcollm/v1/" + purpose.encode() + b"\0" + message).hex()


def rechained(entries: Sequence[dict[str, Any]], private: Ed25519PrivateKey | None = None) -> list[dict[str, Any]]:
    """The entries with sequence numbers, digests and links that fit; what changed is signed if there is a key."""
    chain: list[dict[str, Any]] = []
    previous = "0" * 64
    for number, entry in enumerate(entries, start=1):
        new = {**entry, "seq": number, "previous": previous}
        new["digest"] = previous = hashlib.sha256(body_bytes(new)).hexdigest()
        if private is not None and new["schema"] >= 2 and new["digest"] != entry["digest"]:
            new["signature"] = signature_of(private, "ledger_entry", body_bytes(new))
        chain.append(new)
    return chain
