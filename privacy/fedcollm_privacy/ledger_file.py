"""A ledger's file: entries, the heads that the server counter-signed, and the salt that names data sets.

`Ledger` decides what is written; this module writes it, reads it, and takes it elsewhere. To read, no key is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedcollm_privacy.durable import Connection, make_file, transaction
from fedcollm_privacy.entries import (
    GENESIS,
    SCHEMA_VERSION,
    body_of,
    entry_bytes,
    entry_digest,
    entry_time,
    leaves,
    verify_chain,
)
from fedcollm_privacy.errors import LedgerError
from fedcollm_privacy.identity import PublicIdentity, SigningKey
from fedcollm_privacy.messages import canonical_json
from fedcollm_privacy.reservation import Ran
from fedcollm_privacy.tree import consistency_proof, tree_root
from fedcollm_privacy.tree_heads import HeadRequest, SignedHead, WitnessedHead, head_problems, require_witnessed

__all__ = ["LedgerFile"]

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS entries (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, digest TEXT NOT NULL UNIQUE,
    signature TEXT) STRICT;
CREATE TABLE IF NOT EXISTS heads (seq INTEGER PRIMARY KEY, head TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS ran (reservation TEXT PRIMARY KEY, ran TEXT NOT NULL) STRICT
"""
_EXPORT = 2


class LedgerFile:
    """One SQLite file, opened and found sound.

    Args:
        path: an existing file; `for_site` makes one.

    Raises:
        LedgerError: the file is not a ledger, or its chain, a signature or a counter-signed head contradicts it.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise LedgerError(f"{path} does not exist: give the path of a site's ledger")
        self.path = path
        with self.transaction() as db:
            meta = dict(db.execute("SELECT key, value FROM meta"))
            if meta.get("schema") == "1":
                _upgrade(db)
        try:
            schema, self.site = int(meta["schema"]), meta["site"]
            self._salt = bytes.fromhex(meta["salt"])
            key = meta.get("public_key")
            self.identity = None if key is None else PublicIdentity(name=self.site, public_key=bytes.fromhex(key))
        except (KeyError, ValueError) as error:
            raise LedgerError(
                f"{path} was altered: its own description is damaged; restore it from a backup"
            ) from error
        if not 1 <= schema <= SCHEMA_VERSION:
            raise LedgerError(f"{path} has schema {schema}, this program reads up to {SCHEMA_VERSION}; upgrade")
        # Without the salt that named its data sets, a ledger would take every data set for a new one.
        self.ledger = hashlib.sha256(b"ledger" + self._salt).hexdigest()
        problems = self._problems()
        if problems:
            raise LedgerError(f"{path} was altered ({problems[0]}); nothing is spent on it until it is restored")

    @classmethod
    def for_site(cls, path: Path, identity: PublicIdentity) -> LedgerFile:
        """The site's ledger; made with its folder when absent, file mode 600, brought to this schema when older.

        Raises:
            LedgerError: see the class; or the ledger is of another site or key.
        """
        make_file(path, "set privacy.ledger_dir to a folder you may write")
        description = {
            "schema": str(SCHEMA_VERSION),
            "site": identity.name,
            "salt": os.urandom(32).hex(),
            "public_key": identity.public_key.hex(),
        }
        with _transaction(path) as db:
            _make_tables(db)
            # Before anything is written: an older ledger of another site must not get this site's key.
            found = dict(db.execute("SELECT key, value FROM meta")).get("site", identity.name)
            if found != identity.name:
                raise LedgerError(f"{path} is the ledger of site {found!r}, not of {identity.name!r}")
            for key, value in description.items():
                db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
            _upgrade(db)
        opened = cls(path)
        if opened.identity != identity:
            raise LedgerError(
                f"{path} is signed with another key of {identity.name} than the one at hand; use that key, or begin a "
                "new ledger in another folder and tell whoever audits this site"
            )
        return opened

    @classmethod
    def restored(cls, backup: Path, path: Path) -> LedgerFile:
        """A new ledger file from `back_up`'s output, found sound; the server will notice if it is an old one.

        Raises:
            LedgerError: the backup is damaged or no backup, or ``path`` exists.
        """
        if path.exists():
            raise LedgerError(f"{path} exists and is never overwritten: move it away first")
        try:
            lines = [json.loads(line) for line in backup.read_text(encoding="utf-8").split("\n") if line]
            opening, rest = lines[0], lines[1:]
            if opening["kind"] != "LEDGER" or opening["format"] != _EXPORT or "salt" not in opening:
                raise LedgerError(
                    f"{backup} holds no salt: `fedcollm ledger export --backup` writes what can be restored"
                )
            meta = {"schema": str(SCHEMA_VERSION)} | {k: str(opening[k]) for k in ("site", "salt")}
            if opening["public_key"] is not None:  # of schema 1, never opened with a key
                meta["public_key"] = str(opening["public_key"])
            entries = [line for line in rest if line["kind"] != "HEAD"]
            heads = [_kept_form(line) for line in rest if line["kind"] == "HEAD"]
            rows = [
                (seq, entry_bytes(body_of(e)).decode(), e["digest"], e.get("signature"))
                for seq, e in enumerate(entries, start=1)
            ]
        except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise LedgerError(f"{backup} is damaged or no backup of a ledger; take another one") from error
        make_file(path, "choose a folder you may write")
        try:
            with _transaction(path) as db:
                _make_tables(db)
                db.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
                db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?)", rows)
                db.executemany("INSERT INTO heads (head) VALUES (?)", [(head,) for head in heads])
            return cls(path)
        except LedgerError:
            path.unlink(missing_ok=True)  # half a ledger is none, and would block the next try
            raise

    def transaction(self) -> AbstractContextManager[Connection]:
        """Exclusive, on disk when it ends, whole or not at all."""
        return _transaction(self.path)

    @staticmethod
    def read(db: Connection) -> list[dict[str, Any]]:
        """All entries in order, each with ``digest`` and, since schema 2, ``signature``."""
        rows = db.execute("SELECT body, digest, signature FROM entries ORDER BY seq").fetchall()
        try:
            return [
                {**json.loads(body), "digest": digest} | ({} if signature is None else {"signature": signature})
                for body, digest, signature in rows
            ]
        except (ValueError, TypeError, RecursionError) as error:
            raise LedgerError("the ledger was altered: an entry is unreadable; restore it from a backup") from error

    def entries(self) -> list[dict[str, Any]]:
        """As `read`, in a transaction of its own."""
        with self.transaction() as db:
            return self.read(db)

    def append(
        self,
        db: Connection,
        entries: Sequence[Mapping[str, Any]],
        content: Mapping[str, Any],
        key: SigningKey,
        now: float,
    ) -> str:
        """Add one signed entry inside a transaction; gives its digest."""
        last = entries[-1] if entries else None
        body = {
            "schema": SCHEMA_VERSION,
            "seq": len(entries) + 1,
            "previous": GENESIS if last is None else last["digest"],
            "site": self.site,
            "time": entry_time(now, last).isoformat(timespec="seconds"),
            **content,
        }
        digest, raw = entry_digest(body), entry_bytes(body)
        signature = key.sign("ledger_entry", raw).hex()
        db.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", (body["seq"], raw.decode(), digest, signature))
        return digest

    def commitment(self, data_set: str) -> str:
        """The name under which a data set stands in the ledger: HMAC-SHA256 under the ledger's own salt."""
        return hmac.new(self._salt, data_set.encode(), "sha256").hexdigest()

    def heads(self) -> list[dict[str, Any]]:
        """The counter-signed heads in order: ``head``, ``signature``, ``witness``, ``server_key``."""
        with self.transaction() as db:
            rows = db.execute("SELECT head FROM heads ORDER BY seq").fetchall()
        try:
            return [json.loads(head) for (head,) in rows]
        except (ValueError, RecursionError) as error:
            raise LedgerError("the ledger was altered: a head is unreadable; restore it from a backup") from error

    def show_head(self, request: HeadRequest, key: SigningKey) -> SignedHead:
        """The ledger's signed head, with the proof that it extends the one the server counter-signed last.

        Raises:
            LedgerError: the server has counter-signed more entries than there are: this file is an old copy.
        """
        known = leaves(self.entries())
        if request.tree_size > len(known):
            raise LedgerError(
                f"the server has counter-signed {request.tree_size} entries, {self.path} has {len(known)}: it is "
                "an old copy; restore the newest one"
            )
        head = SignedHead(
            ledger=self.ledger,
            site=self.site,
            run_id=request.run_id,
            server_round=request.server_round,
            tree_size=len(known),
            tree_root=tree_root(known).hex(),
            consistency=consistency_proof(known, request.tree_size),
            signature=b"",
        )
        return replace(head, signature=key.sign("tree_head", head.content))

    def keep_head(self, head: WitnessedHead, server: PublicIdentity) -> None:
        """Keep a counter-signed head of this ledger.

        Raises:
            LedgerError: it is not a head of this ledger.
            ProtocolError: not signed by both.
        """
        if self.identity is None:
            raise LedgerError(f"{self.path} was never opened with a key; it has no heads")
        require_witnessed(head, self.identity, server)
        known = leaves(self.entries())[: head.tree_size]
        if head.ledger != self.ledger or len(known) < head.tree_size or tree_root(known).hex() != head.tree_root:
            raise LedgerError("the server counter-signed another ledger's head")
        kept = canonical_json(head.as_fields() | {"server_key": server.public_key.hex()}).decode()
        with self.transaction() as db:
            db.execute("INSERT INTO heads (head) VALUES (?)", (kept,))

    def note_ran(self, reservation: str, ran: Ran) -> None:
        """Remember, beside the entries, that a reservation's steps were taken: it may be settled after a crash only."""
        with self.transaction() as db:
            text = canonical_json(ran.as_dict()).decode()
            db.execute("INSERT OR REPLACE INTO ran VALUES (?, ?)", (reservation, text))

    def noted_ran(self, reservation: str) -> Ran | None:
        """What `note_ran` was told; None for steps that were not finished."""
        with self.transaction() as db:
            row = db.execute("SELECT ran FROM ran WHERE reservation = ?", (reservation,)).fetchone()
        return None if row is None else Ran(**json.loads(row[0]))

    def export(self, path: Path) -> None:
        """Write the ledger for an auditor, without its salt; see ``docs/formats.md``.

        Raises:
            LedgerError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._lines({}))
        except OSError as error:
            raise LedgerError(f"{path} cannot be written ({error.strerror}): choose another place") from error

    def back_up(self, path: Path) -> None:
        """Write all there is, the salt included, to a new file of mode 600.

        Raises:
            LedgerError: the file exists or cannot be written.
        """
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(self._lines({"salt": self._salt.hex()}))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LedgerError(f"{path} cannot be written ({error.strerror}): choose a new file elsewhere") from error

    def _lines(self, more: Mapping[str, str]) -> bytes:
        opening = {
            "kind": "LEDGER",
            "format": _EXPORT,
            "ledger": self.ledger,
            "site": self.site,
            "public_key": None if self.identity is None else self.identity.public_key.hex(),
            **more,
        }
        heads = [{"kind": "HEAD", **head} for head in self.heads()]
        # An entry of schema 1 keeps its own spelling of numbers, which its digest depends on.
        lines = (canonical_json(opening), *map(entry_bytes, self.entries()), *map(canonical_json, heads))
        return b"".join(line + b"\n" for line in lines)

    def _problems(self) -> list[str]:
        kept = self.heads()  # before the entries, which another process may be adding to
        entries = self.entries()
        problems = verify_chain(entries, self.identity)
        if any(entry.get("ledger", self.ledger) != self.ledger for entry in entries):
            problems.append("its salt is not the one its entries were made with")
        if problems or self.identity is None:  # of schema 1, never opened with a key: it has no heads
            return problems
        return head_problems(kept, leaves(entries), self.ledger, self.identity)


def _transaction(path: Path) -> AbstractContextManager[Connection]:
    free = "nothing is trained. Free its disk or end the other run that holds it"
    return transaction(path, "a ledger", f"{free}; if it is damaged, restore it from a backup")


def _make_tables(db: Connection) -> None:
    for table in _TABLES.split(";"):
        db.execute(table)


def _upgrade(db: Connection) -> None:
    """Schema 1 to 2: room for signatures and heads. No entry is touched."""
    _make_tables(db)
    columns = {row[1] for row in db.execute("PRAGMA table_info(entries)")}
    if "signature" not in columns:
        db.execute("ALTER TABLE entries ADD COLUMN signature TEXT")
        db.execute("UPDATE meta SET value = ? WHERE key = 'schema' AND value = '1'", (str(SCHEMA_VERSION),))


def _kept_form(line: Mapping[str, Any]) -> str:
    return canonical_json({name: line[name] for name in ("head", "signature", "witness", "server_key")}).decode()
