"""The server's memory of every site's ledger: it counter-signs a head only if it extends the one before.

One SQLite file over all runs. A ledger that was rolled back, forked or begun anew under the same key contradicts it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from fedcollm_privacy.durable import Connection, make_file, transaction
from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.identity import PublicIdentity, SigningKey
from fedcollm_privacy.tree import tree_root, verify_consistency
from fedcollm_privacy.tree_heads import SignedHead, WitnessedHead, countersigned

__all__ = ["HeadWitness"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS heads (seq INTEGER PRIMARY KEY, site_key TEXT NOT NULL, ledger TEXT NOT NULL,
    tree_size INTEGER NOT NULL, tree_root TEXT NOT NULL, run_id TEXT NOT NULL, server_round INTEGER NOT NULL,
    signature TEXT NOT NULL) STRICT
"""


class HeadWitness:
    """What the server has counter-signed.

    Args:
        path: made with its folder when absent.
        key: the server's.

    Raises:
        LedgerError: the file cannot be used; then nothing is counter-signed.
    """

    def __init__(self, path: Path, key: SigningKey) -> None:
        self._path, self._key = path, key
        make_file(path, "no ledger's head is counter-signed without it; choose a folder you may write")
        with self._transaction() as db:
            db.execute(_SCHEMA)

    def seen(self, site: PublicIdentity) -> int:
        """How many entries of the site's ledger are counter-signed; 0 for a site never met."""
        with self._transaction() as db:
            return self._last(db, site)[1]

    def countersign(self, head: SignedHead, site: PublicIdentity, *, run_id: str, server_round: int) -> WitnessedHead:
        """Sign a head that is the site's, of this round, and extends all that was signed before; on disk first.

        Raises:
            ProtocolError: it is not; the text tells what contradicts what.
        """
        if (head.site, head.run_id, head.server_round) != (site.name, run_id, server_round):
            raise ProtocolError("the head is of another site, run or round")
        site.verify("tree_head", head.content, head.signature)
        with self._transaction() as db:
            ledger, size, root = self._last(db, site)
            if ledger not in ("", head.ledger):
                raise ProtocolError(
                    f"site {site.name} shows another ledger than the one whose {size} entries were counter-signed"
                )
            extends = verify_consistency(
                first=size,
                first_root=bytes.fromhex(root),
                second=head.tree_size,
                second_root=bytes.fromhex(head.tree_root),
                proof=head.consistency,
            )
            if not extends:
                raise ProtocolError(
                    f"the ledger of site {site.name} does not extend the {size} entries that were counter-signed: it "
                    "was rolled back or forked. Ask the site's administrator; nothing of it is counter-signed"
                )
            db.execute(
                "INSERT INTO heads (site_key, ledger, tree_size, tree_root, run_id, server_round, signature) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(site.public_key.hex(), head.ledger, head.tree_size, head.tree_root),
                    *(run_id, server_round, head.signature.hex()),
                ),
            )
        return countersigned(head, self._key)

    @staticmethod
    def _last(db: Connection, site: PublicIdentity) -> tuple[str, int, str]:
        row = db.execute(
            "SELECT ledger, tree_size, tree_root FROM heads WHERE site_key = ? ORDER BY seq DESC LIMIT 1",
            (site.public_key.hex(),),
        ).fetchone()
        return ("", 0, tree_root([]).hex()) if row is None else (str(row[0]), int(row[1]), str(row[2]))

    def _transaction(self) -> AbstractContextManager[Connection]:
        return transaction(self._path, "the server's memory of ledger heads", "nothing is counter-signed")
