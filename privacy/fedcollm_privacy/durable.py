"""A SQLite file of the site's own: one writer at a time, on disk before a transaction returns, whole or not at all."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedcollm_privacy.errors import LedgerError

__all__ = ["Connection", "make_file", "transaction"]

Connection = sqlite3.Connection


def make_file(path: Path, otherwise: str) -> None:
    """Make the file and its folder when absent, readable and writable by its owner only.

    Raises:
        LedgerError: that cannot be done; ``otherwise`` says what to do.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise LedgerError(f"{path} cannot be opened or made: {error.strerror}; {otherwise}") from error


@contextmanager
def transaction(path: Path, what: str, otherwise: str) -> Iterator[Connection]:
    """A connection inside a transaction, committed when the block ends and rolled back when it raises.

    The lock is taken before the first read: of two processes that look and then write, one sees what the other wrote.

    Args:
        path: of the file.
        what: the file is, for the error.
        otherwise: what does not happen then, and what to do.

    Raises:
        LedgerError: the file cannot be used.
    """
    try:
        db = sqlite3.connect(path, timeout=30, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        finally:
            db.close()  # whatever was not committed is rolled back
    except sqlite3.Error as error:
        raise LedgerError(f"{path} cannot be used as {what}: {error}; {otherwise}") from error
