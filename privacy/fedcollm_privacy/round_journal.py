"""What a site must not forget between two breaths: the plans it accepted, the set it signed, the shares it gave.

One SQLite file a site, one writer, on disk before anything is answered. No secret stands in it: mask keys and shares
live in memory only, so a site that was restarted is lost to the round it was in, and cannot be talked into answering
that round a second time. Whoever deletes the file makes the site forget; it belongs into the site's backups.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from fedcollm_privacy.durable import Connection, make_file, transaction
from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.messages import RoundPlan

__all__ = ["RoundJournal"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS accepted (run_id TEXT, server_round INTEGER, attempt INTEGER, plan TEXT,
    PRIMARY KEY (run_id, server_round, attempt));
CREATE TABLE IF NOT EXISTS signed (run_id TEXT, server_round INTEGER, plan TEXT, survivors TEXT,
    PRIMARY KEY (run_id, server_round));
CREATE TABLE IF NOT EXISTS unmasked (run_id TEXT, server_round INTEGER, plan TEXT, survivors TEXT,
    PRIMARY KEY (run_id, server_round));
"""


class RoundJournal:
    """The durable memory of one site.

    Args:
        path: made with its folder when absent.

    Raises:
        LedgerError: the file cannot be read or written; then nothing is answered.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        make_file(path, "nothing is answered without it; choose a folder you may write")
        with self._transaction() as db:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)

    def accept(self, plan: RoundPlan) -> None:
        """Record that this plan is taken part in, once.

        Raises:
            ProtocolError: it was answered before; another plan of the same or a later round or attempt was; or a
                survivor set of this or a later round was signed: that round's update may have been opened.
        """
        with self._transaction() as db:
            query = "SELECT max(server_round) FROM signed WHERE run_id = ?"
            (signed,) = db.execute(query, (plan.run_id,)).fetchone()
            if signed is not None and plan.server_round <= signed:
                raise ProtocolError(
                    f"the survivors of round {signed} of this run were signed; its update may have been opened, and a "
                    "second one of that round is not given"
                )
            latest = db.execute(
                "SELECT server_round, attempt FROM accepted WHERE run_id = ? "
                "ORDER BY server_round DESC, attempt DESC LIMIT 1",
                (plan.run_id,),
            ).fetchone()
            if latest is not None and (plan.server_round, plan.attempt) <= tuple(latest):
                raise ProtocolError(
                    f"round {plan.server_round}, attempt {plan.attempt} was answered before, or a later one was"
                )
            db.execute(
                "INSERT INTO accepted VALUES (?, ?, ?, ?)",
                (plan.run_id, plan.server_round, plan.attempt, plan.digest),
            )

    def sign(self, plan: RoundPlan, survivors_digest: str) -> None:
        """Record which survivor set is signed in a round; the same one may be signed again, another never.

        Raises:
            ProtocolError: another set was signed, in this attempt or an earlier one.
        """
        with self._transaction() as db:
            known = self._signed(db, plan)
            if known is None:
                row = (plan.run_id, plan.server_round, plan.digest, survivors_digest)
                db.execute("INSERT INTO signed VALUES (?, ?, ?, ?)", row)
            elif known != (plan.digest, survivors_digest):
                raise ProtocolError("this site has signed another survivor set in this round")

    def unmask(self, plan: RoundPlan, survivors_digest: str) -> None:
        """Record that this round's shares are given now, for this set; at most once a round, whatever the attempt.

        Raises:
            ProtocolError: they were given before, or the site has not signed this set.
        """
        with self._transaction() as db:
            if self._signed(db, plan) != (plan.digest, survivors_digest):
                raise ProtocolError("this site has not signed that survivor set")
            given = db.execute(
                "SELECT 1 FROM unmasked WHERE run_id = ? AND server_round = ?", (plan.run_id, plan.server_round)
            ).fetchone()
            if given is not None:
                raise ProtocolError("this round's shares were given before; they are given once")
            db.execute(
                "INSERT INTO unmasked VALUES (?, ?, ?, ?)",
                (plan.run_id, plan.server_round, plan.digest, survivors_digest),
            )

    @staticmethod
    def _signed(db: Connection, plan: RoundPlan) -> tuple[str, str] | None:
        query = "SELECT plan, survivors FROM signed WHERE run_id = ? AND server_round = ?"
        row = db.execute(query, (plan.run_id, plan.server_round)).fetchone()
        return None if row is None else (str(row[0]), str(row[1]))

    def _transaction(self) -> AbstractContextManager[Connection]:
        return transaction(self._path, "a round journal", "nothing is answered until it is restored")
