"""Merkle trees over a log's entries, as in Certificate Transparency (RFC 6962, section 2.1).

With the root of a tree that somebody else has countersigned, a log can show that it only ever grew (consistency) and
that one entry stands in it (inclusion), without showing the other entries. Leaves and inner nodes are hashed under
different prefixes, so that no node can be passed off as a leaf.

A root does not say how many leaves it has: some proofs hold for neighbouring sizes too. Whoever signs a root signs its
size with it, and whoever verifies takes both from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedcollm_privacy.errors import InvalidValue

__all__ = ["consistency_proof", "inclusion_proof", "tree_root", "verify_consistency", "verify_inclusion"]

_EMPTY_ROOT = hashlib.sha256(b"").digest()
_SIZES = 2**64  # RFC 6962 counts leaves in a uint64; more would only cost a verifier time


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """The tree's root, 32 bytes; SHA-256 of nothing for no leaves."""
    return _root(_leaf_hashes(leaves))


def consistency_proof(leaves: Sequence[bytes], first: int) -> tuple[bytes, ...]:
    """That the tree over all leaves extends the tree over the first ``first`` (RFC 6962, section 2.1.2).

    Args:
        leaves: all of them.
        first: size of the earlier tree; the proof is empty for 0 and for all leaves.

    Raises:
        InvalidValue: ``first`` is no integer from 0 to the number of leaves.
    """
    start, end = 0, len(leaves)
    _require_in_range("first", first, end)
    if first == 0:
        return ()
    hashes, proof = _leaf_hashes(leaves), list[bytes]()
    while first != end:
        split = _split(start, end)
        if first <= split:
            proof.append(_root(hashes[split:end]))
            end = split
        else:
            proof.append(_root(hashes[start:split]))
            start = split
    # A subtree that begins at 0 is the whole earlier tree, whose root the verifier has.
    if start > 0:
        proof.append(_root(hashes[start:end]))
    return tuple(reversed(proof))


def verify_consistency(
    *, first: int, first_root: bytes, second: int, second_root: bytes, proof: Sequence[bytes]
) -> bool:
    """Whether a tree's first ``first`` leaves are those of the earlier tree (RFC 9162, section 2.1.4.2).

    Args:
        first: size of the earlier tree. Every tree extends that of size 0, with an empty proof.
        first_root: its root.
        second: size of the later tree, below 2**64.
        second_root: its root.
        proof: list or tuple, untrusted.

    Returns:
        False for whatever does not hold, malformed arguments included; nothing raises.
    """
    if not (_is_size(first) and _is_size(second) and _are_hashes((first_root, second_root)) and _are_hashes(proof)):
        return False
    if first == 0:
        return not proof and first_root == _EMPTY_ROOT and (second > 0 or second_root == _EMPTY_ROOT)
    if first >= second:
        return first == second and not proof and first_root == second_root
    if first & (first - 1) == 0:
        proof = (first_root, *proof)  # the earlier tree is one complete subtree, so the proof leaves it out
    if not proof:
        return False
    here, last = first - 1, second - 1
    while here & 1:
        here, last = here >> 1, last >> 1
    earlier = later = proof[0]
    for node in proof[1:]:
        if last == 0:
            return False
        if here & 1 or here == last:
            earlier, later = _node_hash(node, earlier), _node_hash(node, later)
            while here and not here & 1:
                here, last = here >> 1, last >> 1
        else:
            later = _node_hash(later, node)
        here, last = here >> 1, last >> 1
    return last == 0 and earlier == first_root and later == second_root


def inclusion_proof(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """That leaf ``index``, counted from 0, stands in the tree over all leaves (RFC 6962, section 2.1.1).

    Raises:
        InvalidValue: there is no such leaf.
    """
    start, end = 0, len(leaves)
    _require_in_range("index", index, end - 1)
    hashes, proof = _leaf_hashes(leaves), list[bytes]()
    while end - start > 1:
        split = _split(start, end)
        if index < split:
            proof.append(_root(hashes[split:end]))
            end = split
        else:
            proof.append(_root(hashes[start:split]))
            start = split
    return tuple(reversed(proof))


def verify_inclusion(*, leaf: bytes, index: int, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether ``leaf`` stands at ``index`` in the tree of this size and root (RFC 9162, section 2.1.3.2).

    Args:
        leaf: the entry itself, not its hash.
        index: counted from 0.
        size: number of leaves, below 2**64.
        root: the tree's root.
        proof: list or tuple, untrusted.

    Returns:
        False for whatever does not hold, malformed arguments included; nothing raises.
    """
    if not (_is_size(index) and _is_size(size) and index < size and _are_hashes((root,)) and _are_hashes(proof)):
        return False
    if type(leaf) is not bytes:
        return False
    here, last = index, size - 1
    found = _leaf_hash(leaf)
    for node in proof:
        if last == 0:
            return False
        if here & 1 or here == last:
            found = _node_hash(node, found)
            while here and not here & 1:
                here, last = here >> 1, last >> 1
        else:
            found = _node_hash(found, node)
        here, last = here >> 1, last >> 1
    return last == 0 and found == root


def _leaf_hash(leaf: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + leaf).digest()


def _node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _leaf_hashes(leaves: Sequence[bytes]) -> list[bytes]:
    return [_leaf_hash(leaf) for leaf in leaves]


def _root(hashes: list[bytes]) -> bytes:
    if not hashes:
        return _EMPTY_ROOT
    while len(hashes) > 1:
        # A lone last node goes up as it is: the RFC's split at the largest power of two, level by level.
        lone = hashes[-1:] if len(hashes) % 2 else []
        pairs = zip(hashes[::2], hashes[1::2], strict=False)
        hashes = [_node_hash(left, right) for left, right in pairs] + lone
    return hashes[0]


def _split(start: int, end: int) -> int:
    return start + (1 << (end - start - 1).bit_length() - 1)


def _require_in_range(field: str, value: int, highest: int) -> None:
    if type(value) is not int or not 0 <= value <= highest:
        allowed = f"an integer from 0 to {highest}" if highest >= 0 else "nothing: there are no leaves"
        raise InvalidValue(field, value, allowed)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _SIZES


def _are_hashes(nodes: object) -> bool:
    return isinstance(nodes, list | tuple) and all(type(node) is bytes and len(node) == 32 for node in nodes)
