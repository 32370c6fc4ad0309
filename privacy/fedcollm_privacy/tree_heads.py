"""Heads of a site's ledger: what its entries hash to, signed by the site and counter-signed by the server.

The head is the root of an RFC 6962 tree over the entries. Once the server has counter-signed one, the site can neither
take entries back nor show two versions of its ledger without contradicting a signature that both sides keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.identity import PublicIdentity, SigningKey
from fedcollm_privacy.messages import canonical_json
from fedcollm_privacy.tree import tree_root

__all__ = ["HeadRequest", "SignedHead", "WitnessedHead", "countersigned", "head_problems", "require_witnessed"]

_LARGEST = 2**53 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRequest:
    """Server to site: your ledger's head, please, and that it extends the one of ``tree_size`` entries (0: of none)."""

    run_id: str
    server_round: int
    tree_size: int

    def __post_init__(self) -> None:
        _head_fields(self.run_id, self.server_round, self.tree_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedHead:
    """Site to server: the ledger's head.

    Attributes:
        ledger: which ledger, SHA-256 of its salt.
        server_round: after which round; 0 before the first.
        tree_root: hex.
        consistency: RFC 6962 proof that this tree extends the one the request names.
        signature: for ``tree_head``, over `content`.
    """

    ledger: str
    site: str
    run_id: str
    server_round: int
    tree_size: int
    tree_root: str
    consistency: tuple[bytes, ...]
    signature: bytes

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)
        _validate.hex_digest(ledger=self.ledger, tree_root=self.tree_root)
        _head_fields(self.run_id, self.server_round, self.tree_size)

    @property
    def content(self) -> bytes:
        """What is signed."""
        return _content(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class WitnessedHead:
    """Server to site: the same head with the server's signature, for the purpose ``witnessed_head``; kept by both."""

    ledger: str
    site: str
    run_id: str
    server_round: int
    tree_size: int
    tree_root: str
    signature: bytes
    witness: bytes

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)
        _validate.hex_digest(ledger=self.ledger, tree_root=self.tree_root)
        _head_fields(self.run_id, self.server_round, self.tree_size)

    @property
    def content(self) -> bytes:
        """What both sign."""
        return _content(self)

    def as_fields(self) -> dict[str, object]:
        """The head and both signatures as they stand in JSON."""
        return {"head": _fields(self), "signature": self.signature.hex(), "witness": self.witness.hex()}


def countersigned(head: SignedHead, server: SigningKey) -> WitnessedHead:
    """The head with the server's signature; whoever calls has checked it."""
    return WitnessedHead(
        ledger=head.ledger,
        site=head.site,
        run_id=head.run_id,
        server_round=head.server_round,
        tree_size=head.tree_size,
        tree_root=head.tree_root,
        signature=head.signature,
        witness=server.sign("witnessed_head", head.content),
    )


def require_witnessed(head: WitnessedHead, site: PublicIdentity, server: PublicIdentity) -> None:
    """Refuse a head that is not the site's, or that either has not signed.

    Raises:
        ProtocolError: `SignatureInvalid` among them.
    """
    if head.site != site.name:
        raise ProtocolError(f"the head is of site {head.site}'s ledger")
    site.verify("tree_head", head.content, head.signature)
    server.verify("witnessed_head", head.content, head.witness)


def head_problems(
    kept: Sequence[Mapping[str, Any]], leaves: Sequence[bytes], ledger: str, site: PublicIdentity
) -> list[str]:
    """Problems in the heads that a ledger or its export holds, in words; empty when its entries bear all of them out.

    Whose key the server's is, the roster says.

    Args:
        kept: as they stand in JSON, with ``server_key``; untrusted.
        leaves: of the ledger's entries.
        ledger: which one.
        site: whose.
    """
    problems = []
    for number, line in enumerate(kept, start=1):
        try:
            signature, witness = bytes.fromhex(line["signature"]), bytes.fromhex(line["witness"])
            head = WitnessedHead(**line["head"], signature=signature, witness=witness)
            server = PublicIdentity(name="server", public_key=bytes.fromhex(line["server_key"]))
            require_witnessed(head, site, server)
        except (KeyError, TypeError, ValueError, ProtocolError):
            problems.append(f"head {number}: malformed, of another site, or not signed by both")
            continue
        size = head.tree_size
        if head.ledger != ledger:
            problems.append(f"head {number}: of another ledger")
        elif size > len(leaves) or tree_root(leaves[:size]).hex() != head.tree_root:
            problems.append(f"it had {size} entries when the server counter-signed them, and not these")
    return problems


def _head_fields(run_id: str, server_round: int, tree_size: int) -> None:
    _validate.public_name(run_id=run_id)
    _validate.integer_at_least(0, server_round=server_round, tree_size=tree_size)
    _validate.in_range(0, _LARGEST, server_round=server_round, tree_size=tree_size)


def _fields(head: SignedHead | WitnessedHead) -> dict[str, object]:
    names = ("ledger", "run_id", "server_round", "site", "tree_root", "tree_size")
    return {name: getattr(head, name) for name in names}


def _content(head: SignedHead | WitnessedHead) -> bytes:
    return canonical_json(_fields(head))
