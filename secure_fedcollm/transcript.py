"""What the server did and saw, one chained JSON line an event; sizes and digests, never contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.messages import canonical_json

__all__ = ["Transcript"]


class Transcript:
    """Append-only file of events; each line holds the digest of the line before it.

    Args:
        path: made when absent; a torn last line (a crash while writing) is cut off.

    Raises:
        ProtocolError: the chain of an existing file does not hold.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seq, self._head = 0, "0" * 64
        self._attempts: Counter[int] = Counter()
        self._statements: set[str] = set()
        path.touch()
        good = 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            entry = json.loads(line)
            digest = entry.pop("digest")
            if entry["previous"] != self._head or hashlib.sha256(canonical_json(entry)).hexdigest() != digest:
                raise ProtocolError(f"{path}, line {self._seq + 1}: the transcript was altered")
            self._seq, self._head = entry["seq"], digest
            self._count(entry["event"], entry)
            good += len(line)
        if good < path.stat().st_size:
            os.truncate(path, good)

    @property
    def head(self) -> str:
        """Digest of the last line; 64 zeros at the start."""
        return self._head

    @property
    def events(self) -> int:
        """How many lines there are."""
        return self._seq

    def attempts(self, server_round: int) -> int:
        """How often a round was planned so far, crashes included."""
        return self._attempts[server_round]

    def names_statement(self, digest: str) -> bool:
        """Whether the statement with this digest was signed already."""
        return digest in self._statements

    def record(self, event: str, **facts: Any) -> None:
        """Append one event; on disk when this returns."""
        entry = {"seq": self._seq + 1, "previous": self._head, "event": event, **facts}
        digest = hashlib.sha256(canonical_json(entry)).hexdigest()
        with self._path.open("ab") as file:
            file.write(canonical_json({**entry, "digest": digest}) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._seq, self._head = entry["seq"], digest
        self._count(event, facts)

    def _count(self, event: str, facts: Mapping[str, Any]) -> None:
        self._attempts[facts.get("server_round", 0)] += event == "plan"
        if event == "statement":
            self._statements.add(facts["statement"])
