"""What a run folder's records are made of: signed, chained and canonical, and how to break them.

Written with other libraries than the auditor's (``cryptography`` signs, ``rfc8785`` spells, dp-accounting charges) and
without the trainer, so that the auditor's checks are tried against the format and not against the trainer's habits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcollm_privacy import accounting

Line = dict[str, Any]
CODE = "c0de" * 16
SITES = ("ash", "beech", "cedar", "dogwood", "elm", "fir", "gum", "hazel", "ivy", "juniper", "kapok", "larch", "maple",
         "neem", "oak", "pine")  # fmt: skip
START = datetime(2026, 1, 31, 12, tzinfo=UTC)


def jcs(value: Any) -> bytes:
    return rfc8785.dumps(value)


def sha(value: Any) -> str:
    return hashlib.sha256(value if isinstance(value, bytes) else jcs(value)).hexdigest()


def key_of(name: str) -> Ed25519PrivateKey:
    """The same key for a name everywhere."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"key of " + name.encode()).digest())


def public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def sign(key: Ed25519PrivateKey, purpose: str, message: bytes) -> str:
    return key.sign(b"fedcollm/v1/" + purpose.encode() + b"\x00" + message).hex()


def tree_root(leaves: Sequence[bytes]) -> str:
    """RFC 6962, section 2.1, by its recursive definition."""

    def root(part: Sequence[bytes]) -> bytes:
        if len(part) == 1:
            return hashlib.sha256(b"\x00" + part[0]).digest()
        k = 1 << (len(part) - 1).bit_length() - 1
        return hashlib.sha256(b"\x01" + root(part[:k]) + root(part[k:])).digest()

    return (root(leaves) if leaves else hashlib.sha256(b"").digest()).hex()


def rechained(entries: Sequence[Line], key: Ed25519PrivateKey | None) -> list[Line]:
    """Entries numbered, linked and digested anew; signed with ``key``, or with their old signatures."""
    found, previous = [], "0" * 64
    for seq, entry in enumerate(entries, start=1):
        body = {k: v for k, v in entry.items() if k not in ("digest", "signature")} | {"seq": seq, "previous": previous}
        previous = sha(body)
        signature = entry.get("signature") if key is None else sign(key, "ledger_entry", jcs(body))
        found.append({**body, "digest": previous, "signature": signature})
    return found


class Book:
    """A site's ledger while it is written."""

    def __init__(self, site: str, on_entry: Callable[[Line], Line | None]) -> None:
        self.site, self.key, self.on_entry = site, key_of(site), on_entry
        self.ledger = sha(b"ledger" + hashlib.sha256(site.encode()).digest())
        self.entries: list[Line] = []
        self.heads: list[Line] = []
        self.now = START

    @property
    def data_set(self) -> str:
        return sha(f"data of {self.site}".encode())

    def append(self, kind: str, run_id: str, **fields: Any) -> str:
        entry: Line | None = {
            "kind": kind, "schema": 2, "site": self.site, "time": self.now.isoformat(), "run_id": run_id,
            "data_set": self.data_set, **fields,
        }  # fmt: skip
        entry = self.on_entry(entry) if entry is not None else None
        if entry is None:
            return "f" * 64
        body = {**entry, "seq": len(self.entries) + 1, "previous": self.head}
        digest = sha(body)
        self.entries.append({**body, "digest": digest, "signature": sign(self.key, "ledger_entry", jcs(body))})
        return digest

    @property
    def head(self) -> str:
        return str(self.entries[-1]["digest"]) if self.entries else "0" * 64

    def root(self) -> str:
        return tree_root([bytes.fromhex(entry["digest"]) for entry in self.entries])


@dataclass
class Built:
    """A run folder with all its keys, to be broken."""

    folder: Path
    run_id: str
    sites: tuple[str, ...]
    books: dict[str, Book] = field(default_factory=dict)

    def lines(self, name: str) -> list[Line]:
        return [json.loads(line) for line in (self.folder / name).read_bytes().splitlines()]

    def write(self, name: str, lines: Sequence[Line]) -> None:
        (self.folder / name).write_bytes(b"".join(jcs(line) + b"\n" for line in lines))

    def edit_ledger(self, site: str, edit: Callable[[list[Line]], Any], *, resign: bool | None = None) -> None:
        """Edit the exported entries; ``resign=None`` leaves chain and signatures, False rebuilds the chain only."""
        lines = self.lines(f"ledgers/{site}.jsonl")
        entries = [line for line in lines if line["kind"] not in ("LEDGER", "HEAD")]
        edit(entries)
        if resign is not None:
            entries = rechained(entries, key_of(site) if resign else None)
        heads = [line for line in lines if line["kind"] == "HEAD"]
        self.write(f"ledgers/{site}.jsonl", [lines[0], *entries, *heads])

    def edit_transcript(self, edit: Callable[[list[Line]], Any], *, rechain: bool = True) -> None:
        lines = self.lines("transcript.jsonl")
        edit(lines)
        self.write("transcript.jsonl", chained(lines) if rechain else lines)

    def edit_statement(self, edit: Callable[[Line], Any], signers: Sequence[str] | None = None) -> None:
        """Edit the payload; signed anew by ``signers``, or with the old signatures."""
        envelope = json.loads((self.folder / "statement.json").read_bytes())
        payload = json.loads(base64.b64decode(envelope["payload"]))
        edit(payload)
        envelope["payload"] = base64.b64encode(jcs(payload)).decode()
        if signers is not None:
            envelope["signatures"] = dsse_signatures(jcs(payload), signers)
        (self.folder / "statement.json").write_bytes(jcs(envelope))


def chained(lines: Sequence[Line]) -> list[Line]:
    found, previous = [], "0" * 64
    for seq, line in enumerate(lines, start=1):
        body = {k: v for k, v in line.items() if k != "digest"} | {"seq": seq, "previous": previous}
        previous = sha(body)
        found.append({**body, "digest": previous})
    return found


def dsse_signatures(payload: bytes, signers: Sequence[str]) -> list[Line]:
    kind = b"application/vnd.in-toto+json"
    pae = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
    keys = [key_of(name) for name in signers]
    return [{"keyid": public(key), "sig": base64.b64encode(key.sign(pae)).decode()} for key in keys]


def specs() -> Line:
    def spec(names: Sequence[str], width: int) -> Line:
        shapes = [[2, width] if "lora_A" in name else [width, 2] for name in names]
        return {"names": list(names), "shapes": shapes, "base_model": "ba5e" * 16}

    small = [f"base_model.model.layers.{i}.q_proj.lora_{ab}.default.weight" for i in range(2) for ab in "AB"]
    return {"slm": spec(small, 5), "llm": spec([*small, *(n.replace("q_", "v_") for n in small)], 7),
            "shared": spec([n for n in small if "lora_B" in n], 5)}  # fmt: skip


def size_of(spec: Line) -> int:
    return sum(math.prod(shape) for shape in spec["shapes"])


def plan_of(index: int, rounds: int, *, distributed: bool = False, **changes: Any) -> Line:
    """A site's plan; every site has another size."""
    return {
        "unit": "person", "max_records_per_unit": 4, "max_grad_norm": 1.0, "noise_multiplier": 2.5,
        "sample_rate": f"1/{16 + index}", "expected_batch_size": 32, "steps_per_round": 1, "rounds": rounds,
        "delta": 1e-5, "clipping": "flat", "noise": "distributed" if distributed else "local",
        "least_honest": 2 if distributed else 1, "release": "gradient" if distributed else "update",
        "randomness": "operating_system", "neighboring_relation": "add_or_remove_one", **changes,
    }  # fmt: skip


def charge(plan: Line, steps: int | None = None, sigma: float | None = None) -> float:
    total = max(plan["rounds"] * plan["steps_per_round"], steps or 0)
    return accounting.epsilon(sigma or plan["noise_multiplier"], Fraction(plan["sample_rate"]), total, plan["delta"])
