"""What a site refused, and why: a log of its own, for its administrator. Nothing in it goes to the server.

One canonical JSON object a line: ``time`` (UTC), ``run_id``, ``server_round`` (null before a run's first), ``rule``
(the policy's field) and ``reason``. Lines are only ever added; one that a crash left half written is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedcollm_privacy.durable import make_file
from fedcollm_privacy.errors import LedgerError
from fedcollm_privacy.messages import canonical_json

__all__ = ["RefusalLog", "read_refusals"]

_FIELDS = {"time", "run_id", "server_round", "rule", "reason"}
_MAX_TEXT = 2000  # a server writes part of the reasons, and must not fill the disk with one
_LONGEST_LINE = 2**16


class RefusalLog:
    """The refusals of one site. A refusal is on disk when `record` returns.

    Args:
        path: made with its folder when absent, with mode 600.

    Raises:
        LedgerError: the file cannot be opened or made; then nothing is answered.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        make_file(path, "nothing is answered without it; choose a folder you may write")

    def record(
        self,
        *,
        rule: str,
        reason: str,
        run_id: str,
        server_round: int | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Add a refusal.

        Args:
            rule: the policy's field that said no.
            reason: in words, with what was asked and what is allowed.
            run_id: of the run.
            server_round: of the round; None at the start of a run.
            clock: Unix time in seconds.

        Raises:
            LedgerError: it could not be written; then nothing is answered.
        """
        entry = {
            "time": datetime.fromtimestamp(int(clock()), UTC).isoformat(),
            "run_id": _clean(run_id),
            "server_round": server_round,
            "rule": _clean(rule),
            "reason": _clean(reason),
        }
        line = canonical_json(entry) + b"\n"
        try:
            with self._path.open("r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                start = max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE)
                file.seek(start)
                end = start + _whole_lines(file.read(_LONGEST_LINE))
                file.truncate(end)
                file.seek(end)
                if file.write(line) != len(line):
                    raise OSError(0, "no space is left")
                os.fsync(file.fileno())
        except OSError as error:
            raise LedgerError(
                f"the refusal log {self._path} cannot be written ({error.strerror}); nothing is answered until it can: "
                "make room, or give the folder back its rights"
            ) from error

    def entries(self) -> list[dict[str, Any]]:
        """All refusals, the oldest first; LedgerError as `read_refusals`."""
        return read_refusals(self._path)


def read_refusals(path: Path) -> list[dict[str, Any]]:
    """The refusals in a log, the oldest first; a line that a crash left half written is left out.

    Raises:
        LedgerError: the file cannot be read, or a whole line in it is no refusal.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"{path} cannot be read ({error.strerror}): give a refusal log that you may read") from error
    found = []
    for number, line in enumerate(data[: _whole_lines(data)].splitlines(), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or set(entry) != _FIELDS:
            raise LedgerError(f"{path}, line {number} is no refusal: the file was altered, or is no refusal log")
        found.append(entry)
    return found


def _whole_lines(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def _clean(text: str) -> str:
    # A lone surrogate has no bytes, and a refusal must not fail on what a server wrote.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")[:_MAX_TEXT]
