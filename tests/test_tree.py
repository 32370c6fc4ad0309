"""The trees are those of Certificate Transparency; only what the earlier tree truly grew into verifies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pymerkle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.tree import (
    consistency_proof,
    inclusion_proof,
    tree_root,
    verify_consistency,
    verify_inclusion,
)

# Leaves, roots and proofs of the Certificate Transparency project's own tests.
CT_LEAVES = tuple(
    bytes.fromhex(digits)
    for digits in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
)
CT_ROOTS = (
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
CT_CONSISTENCY = (
    (1, 1, ()),
    (
        1,
        8,
        (
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ),
    ),
    (
        6,
        8,
        (
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ),
    ),
    (
        2,
        5,
        (
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ),
    ),
)
CT_INCLUSION = (
    (0, 1, ()),
    (
        0,
        8,
        (
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ),
    ),
    (
        5,
        8,
        (
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ),
    ),
    (2, 3, ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",)),
    (
        1,
        5,
        (
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ),
    ),
)
MOST = 40
LEAVES = [b"entry %d" % number for number in range(MOST)]
HASH = 32


# RFC 6962, section 2.1, word for word: the yardstick.
def largest_power_below(n: int) -> int:
    power = 1
    while power * 2 < n:
        power *= 2
    return power


def mth(entries: list[bytes]) -> bytes:
    if not entries:
        return hashlib.sha256().digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = largest_power_below(len(entries))
    return hashlib.sha256(b"\x01" + mth(entries[:k]) + mth(entries[k:])).digest()


def path(m: int, entries: list[bytes]) -> list[bytes]:
    if len(entries) == 1:
        return []
    k = largest_power_below(len(entries))
    if m < k:
        return [*path(m, entries[:k]), mth(entries[k:])]
    return [*path(m - k, entries[k:]), mth(entries[:k])]


def subproof(m: int, entries: list[bytes], known: bool) -> list[bytes]:
    if m == len(entries):
        return [] if known else [mth(entries)]
    k = largest_power_below(len(entries))
    if m <= k:
        return [*subproof(m, entries[:k], known), mth(entries[k:])]
    return [*subproof(m - k, entries[k:], False), mth(entries[:k])]


# The same recursions without hashes: on which side each node of a proof is put.
def inclusion_shape(index: int, size: int) -> str:
    if size == 1:
        return ""
    k = largest_power_below(size)
    return inclusion_shape(index, k) + "r" if index < k else inclusion_shape(index - k, size - k) + "l"


def consistency_shape(first: int, second: int, known: bool = True) -> str:
    if first == second:
        return "" if known else "o"
    k = largest_power_below(second)
    if first <= k:
        return consistency_shape(first, k, known) + "r"
    return consistency_shape(first - k, second - k, False) + "l"


def consistent(first: int, second: int, /, **changed: Any) -> bool:
    arguments = {
        "first": first,
        "first_root": tree_root(LEAVES[:first]),
        "second": second,
        "second_root": tree_root(LEAVES[:second]),
        "proof": consistency_proof(LEAVES[:second], first),
    }
    return verify_consistency(**(arguments | changed))


def included(index: int, size: int, /, **changed: Any) -> bool:
    arguments = {
        "leaf": LEAVES[index],
        "index": index,
        "size": size,
        "root": tree_root(LEAVES[:size]),
        "proof": inclusion_proof(LEAVES[:size], index),
    }
    return verify_inclusion(**(arguments | changed))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def altered_proofs(proof: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
    """Each node flipped in one bit, dropped, doubled, exchanged with the next; a foreign node at each place."""
    altered = [(*proof, bytes(HASH)), (bytes(HASH), *proof)]
    for place, node in enumerate(proof):
        before, after = proof[:place], proof[place + 1 :]
        altered += [(*before, flipped(node, place * 7 % 256), *after), (*before, *after), (*before, node, node, *after)]
        altered += [(*before, other, *after) for other in (node[:-1], node + b"\x00", b"")]
        if after:
            altered.append((*before, after[0], node, *after[1:]))
    return altered


@pytest.mark.parametrize("size", range(9))
def test_roots_are_those_of_certificate_transparency(size: int) -> None:
    assert tree_root(CT_LEAVES[:size]).hex() == CT_ROOTS[size]


@pytest.mark.parametrize(("first", "second", "proof"), CT_CONSISTENCY)
def test_consistency_proofs_are_those_of_certificate_transparency(
    first: int, second: int, proof: tuple[str, ...]
) -> None:
    published = tuple(bytes.fromhex(node) for node in proof)
    assert consistency_proof(CT_LEAVES[:second], first) == published
    roots = {"first_root": bytes.fromhex(CT_ROOTS[first]), "second_root": bytes.fromhex(CT_ROOTS[second])}
    assert verify_consistency(first=first, second=second, proof=published, **roots)


@pytest.mark.parametrize(("index", "size", "proof"), CT_INCLUSION)
def test_inclusion_proofs_are_those_of_certificate_transparency(index: int, size: int, proof: tuple[str, ...]) -> None:
    published = tuple(bytes.fromhex(node) for node in proof)
    assert inclusion_proof(CT_LEAVES[:size], index) == published
    root = bytes.fromhex(CT_ROOTS[size])
    assert verify_inclusion(leaf=CT_LEAVES[index], index=index, size=size, root=root, proof=published)


@pytest.mark.parametrize("size", range(MOST + 1))
def test_roots_and_proofs_are_what_the_rfc_s_recursion_gives(size: int) -> None:
    entries = LEAVES[:size]
    assert tree_root(entries) == mth(entries)
    for first in range(size + 1):
        expected = subproof(first, entries, True) if first else []
        assert list(consistency_proof(entries, first)) == expected
        assert consistent(first, size)
    for index in range(size):
        assert list(inclusion_proof(entries, index)) == path(index, entries)
        assert included(index, size)


def test_a_second_library_gives_the_same_roots_and_inclusion_proofs_and_verifies_ours() -> None:
    tree = pymerkle.InmemoryTree(algorithm="sha256")
    tree.append_entries(LEAVES)
    for size in range(1, MOST + 1):
        entries = LEAVES[:size]
        assert tree.get_root(size) == tree_root(entries)
        for index in range(size):
            theirs = tree.prove_inclusion(index + 1, size)  # counted from one, the leaf's own hash first
            ours = inclusion_proof(entries, index)
            assert tuple(theirs.path[1:]) == ours
            theirs.path = [theirs.path[0], *ours]
            pymerkle.verify_inclusion(tree.get_leaf(index + 1), tree_root(entries), theirs)
        for first in range(1, size + 1):
            # Its consistency proofs go down to a single leaf and are not the RFC's; they relate the same roots.
            theirs = tree.prove_consistency(first, size)
            pymerkle.verify_consistency(tree_root(LEAVES[:first]), tree_root(entries), theirs)


@given(leaves=st.lists(st.binary(max_size=80), max_size=200), data=st.data())
@settings(max_examples=60)
def test_any_log_s_proofs_hold_for_its_own_growth(leaves: list[bytes], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(leaves)))
    heads = {"first_root": tree_root(leaves[:first]), "second_root": tree_root(leaves)}
    proof = consistency_proof(leaves, first)
    assert verify_consistency(first=first, second=len(leaves), proof=proof, **heads)
    assert verify_consistency(first=first, second=len(leaves), proof=list(proof), **heads)
    if leaves:
        index = data.draw(st.integers(0, len(leaves) - 1))
        of = {"index": index, "size": len(leaves), "root": tree_root(leaves), "proof": inclusion_proof(leaves, index)}
        assert verify_inclusion(leaf=leaves[index], **of)
        assert not verify_inclusion(leaf=leaves[index] + b"\x00", **of)


@given(data=st.data())
@settings(max_examples=100)
def test_a_rewritten_past_is_never_consistent(data: st.DataObject) -> None:
    second = data.draw(st.integers(1, MOST))
    first = data.draw(st.integers(1, second))
    rewritten = list(LEAVES[:second])
    rewritten[data.draw(st.integers(0, first - 1))] += b"!"
    changed = {"second_root": tree_root(rewritten), "proof": consistency_proof(rewritten, first)}
    assert not consistent(first, second, **changed)
    # The control: the rewritten log is consistent with its own past.
    assert consistent(first, second, first_root=tree_root(rewritten[:first]), **changed)


@pytest.mark.parametrize("second", range(1, 18))
def test_a_consistency_proof_altered_anywhere_is_refused(second: int) -> None:
    for first in range(second + 1):
        for proof in altered_proofs(consistency_proof(LEAVES[:second], first)):
            assert not consistent(first, second, proof=proof), (first, second)


@pytest.mark.parametrize("size", range(1, 18))
def test_an_inclusion_proof_altered_anywhere_is_refused(size: int) -> None:
    for index in range(size):
        for proof in altered_proofs(inclusion_proof(LEAVES[:size], index)):
            assert not included(index, size, proof=proof), (index, size)


def test_every_bit_of_proof_and_roots_counts() -> None:
    for bit in range(8 * HASH):
        for place, node in enumerate(nodes := consistency_proof(LEAVES[:13], 6)):
            assert not consistent(6, 13, proof=(*nodes[:place], flipped(node, bit), *nodes[place + 1 :]))
        for place, node in enumerate(nodes := inclusion_proof(LEAVES[:13], 6)):
            assert not included(6, 13, proof=(*nodes[:place], flipped(node, bit), *nodes[place + 1 :]))
        for first in (0, 4, 6, 13):
            assert not consistent(first, 13, first_root=flipped(tree_root(LEAVES[:first]), bit))
        for first in (4, 6, 13):  # every tree extends the empty one, so there the later root says nothing
            assert not consistent(first, 13, second_root=flipped(tree_root(LEAVES[:13]), bit))
        assert not included(6, 13, root=flipped(tree_root(LEAVES[:13]), bit))


def test_a_proof_holds_for_another_size_only_where_the_rfc_s_recursion_combines_it_alike() -> None:
    shapes = {
        (first, second): consistency_shape(first, second) for second in range(2, 24) for first in range(1, second)
    }
    coincidences = 0
    for (first, second), shape in shapes.items():
        roots = {"first_root": tree_root(LEAVES[:first]), "second_root": tree_root(LEAVES[:second])}
        proof = consistency_proof(LEAVES[:second], first)
        for (other_first, other_second), other in shapes.items():
            held = verify_consistency(first=other_first, second=other_second, proof=proof, **roots)
            assert held == (shape == other), (first, second, other_first, other_second)
            coincidences += held and (first, second) != (other_first, other_second)
    assert coincidences  # which is why a head's signature covers its size


def test_an_inclusion_proof_holds_for_another_place_only_where_the_rfc_s_recursion_combines_it_alike() -> None:
    shapes = {(index, size): inclusion_shape(index, size) for size in range(1, 24) for index in range(size)}
    coincidences = 0
    for (index, size), shape in shapes.items():
        of = {"leaf": LEAVES[index], "root": tree_root(LEAVES[:size]), "proof": inclusion_proof(LEAVES[:size], index)}
        for (other_index, other_size), other in shapes.items():
            held = verify_inclusion(index=other_index, size=other_size, **of)
            assert held == (shape == other), (index, size, other_index, other_size)
            # Within one tree, the place is certain.
            assert not held or size != other_size or index == other_index
            coincidences += held and size != other_size
    assert coincidences


def test_altered_sizes_with_the_true_roots_of_those_sizes_are_refused() -> None:
    for first in range(1, 17):
        for second in range(first + 1, 18):
            proof = consistency_proof(LEAVES[:second], first)
            for other in (first - 1, first + 1):
                assert not consistent(other, second, proof=proof)
            if second - 1 >= first:
                assert not consistent(first, second - 1, proof=proof)
            assert not consistent(first, second + 1, proof=proof)


def test_equal_sizes_need_equal_roots_and_no_proof() -> None:
    for size in (0, 1, 5, 8):
        assert consistent(size, size)
        assert consistent(size, size, proof=[])
        assert not consistent(size, size, proof=[tree_root(LEAVES[:size])])
        assert not consistent(size, size, first_root=bytes(HASH))
        assert not consistent(size, size, second_root=bytes(HASH))
    assert not consistent(0, 0, first_root=bytes(HASH), second_root=bytes(HASH))


def test_every_tree_extends_the_empty_one_and_nothing_needs_proving() -> None:
    assert consistent(0, 7)
    assert consistent(0, 7, proof=[])
    assert not consistent(0, 7, first_root=tree_root(LEAVES[:1]))
    assert not consistent(0, 7, proof=inclusion_proof(LEAVES[:7], 0))
    assert not consistent(0, 0, second_root=tree_root(LEAVES[:1]))


@pytest.mark.parametrize("proof", [(), (bytes(HASH),), (bytes(HASH), bytes(HASH))])
def test_a_made_up_proof_of_a_grown_tree_is_refused(proof: tuple[bytes, ...]) -> None:
    for first in range(1, 9):
        for second in range(first + 1, 10):
            assert not consistent(first, second, proof=proof)


MALFORMED_SIZES = (-1, -(2**70), 2**64, 2**100_000, 1.0, 6.0, float("nan"), True, None, "6", b"6")
MALFORMED_HASHES = (b"", bytes(31), bytes(33), bytearray(32), "0" * 32, "0" * 64, None, 0, [])
MALFORMED_PROOFS = (
    None,
    0,
    b"",
    "",
    bytes(HASH),
    {},
    [None],
    [[]],
    ["0" * 64],
    [bytes(31)],
    [bytearray(32)],
    [0] * 3,
    iter([bytes(HASH)]),
)


@pytest.mark.parametrize(
    "holds", [lambda **changed: consistent(6, 13, **changed), lambda **changed: consistent(4, 13, **changed)]
)
def test_malformed_arguments_of_a_consistency_check_are_false_and_never_raise(holds: Callable[..., bool]) -> None:
    assert holds()
    for size in MALFORMED_SIZES:
        assert holds(first=size) is False
        assert holds(second=size) is False
        assert holds(first=size, second=size) is False
    for value in MALFORMED_HASHES:
        assert holds(first_root=value) is False
        assert holds(second_root=value) is False
    for proof in MALFORMED_PROOFS:
        assert holds(proof=proof) is False
    assert holds(first=13, second=6) is False
    assert consistent(5, 5, first=True, second=True) is False
    assert consistent(0, 5, proof=None) is False
    assert consistent(0, 5, proof=b"") is False
    assert consistent(0, 5, second_root=b"") is False
    assert consistent(0, 5, second=-1) is False


def test_malformed_arguments_of_an_inclusion_check_are_false_and_never_raise() -> None:
    assert included(6, 13)
    for size in MALFORMED_SIZES:
        assert included(6, 13, index=size) is False
        assert included(6, 13, size=size) is False
    for value in MALFORMED_HASHES:
        assert included(6, 13, root=value) is False
    for proof in MALFORMED_PROOFS:
        assert included(6, 13, proof=proof) is False
    for leaf in (bytearray(LEAVES[6]), "entry 6", None, 6):
        assert included(6, 13, leaf=leaf) is False
    assert included(6, 13, index=13) is False
    assert included(0, 1, size=0) is False


def test_a_place_outside_the_tree_is_refused_even_where_the_hashes_agree() -> None:
    root = tree_root(LEAVES[:1])
    assert verify_inclusion(leaf=LEAVES[0], index=0, size=1, root=root, proof=())
    for index in (-1, 1, 2):
        assert not verify_inclusion(leaf=LEAVES[0], index=index, size=1, root=root, proof=())
    assert not verify_consistency(first=13, first_root=root, second=6, second_root=root, proof=())


def test_what_could_change_after_the_check_is_no_root() -> None:
    assert not included(6, 13, root=bytearray(tree_root(LEAVES[:13])))
    assert not consistent(6, 13, first_root=bytearray(tree_root(LEAVES[:6])))
    assert not consistent(6, 13, second_root=bytearray(tree_root(LEAVES[:13])))


def test_sizes_end_where_the_rfc_s_64_bits_end() -> None:
    # The first leaf of 2**63 + 1 to 2**64 leaves has 64 nodes to its right, here made up.
    proof = tuple(bytes([number]) * HASH for number in range(64))
    root = hashlib.sha256(b"\x00" + LEAVES[0]).digest()
    for node in proof:
        root = hashlib.sha256(b"\x01" + root + node).digest()
    of = {"leaf": LEAVES[0], "index": 0, "root": root, "proof": proof}
    assert verify_inclusion(size=2**63 + 1, **of)
    assert verify_inclusion(size=2**64 - 1, **of)
    assert not verify_inclusion(size=2**64, **of)
    assert not verify_inclusion(size=2**63, **of)


def node_is_a_leaf(root_of: Callable[[list[bytes]], bytes]) -> bool:
    """Whether the two-leaf tree has the root of a tree whose one leaf is the pair of leaf hashes."""
    pair = b"".join(root_of([leaf]) for leaf in LEAVES[:2])
    return root_of([pair]) == root_of(LEAVES[:2])


def without_prefixes(leaves: list[bytes]) -> bytes:
    if len(leaves) == 1:
        return hashlib.sha256(leaves[0]).digest()
    k = largest_power_below(len(leaves))
    return hashlib.sha256(without_prefixes(leaves[:k]) + without_prefixes(leaves[k:])).digest()


def test_a_node_cannot_be_passed_off_as_a_leaf() -> None:
    assert node_is_a_leaf(without_prefixes)  # the attack succeeds where leaves and nodes are hashed alike
    assert not node_is_a_leaf(tree_root)


def test_a_last_leaf_counted_twice_is_another_tree() -> None:
    # Trees that double a lone last node (CVE-2012-2459) give both the same root.
    for size in range(1, MOST):
        assert tree_root(LEAVES[:size]) != tree_root([*LEAVES[:size], LEAVES[size - 1]])


@pytest.mark.parametrize("first", [-1, 6, 2.0, True, None])
def test_no_proof_is_made_from_a_size_that_the_log_never_had(first: Any) -> None:
    with pytest.raises(InvalidValue, match="first"):
        consistency_proof(LEAVES[:5], first)


@pytest.mark.parametrize("index", [-1, 5, 2.0, True, None])
def test_no_proof_is_made_of_a_leaf_that_is_not_there(index: Any) -> None:
    with pytest.raises(InvalidValue, match="index"):
        inclusion_proof(LEAVES[:5], index)
    with pytest.raises(InvalidValue, match="index"):
        inclusion_proof([], index)


def test_making_roots_and_proofs_leaves_the_entries_as_they_are() -> None:
    entries = list(LEAVES[:9])
    tree_root(entries)
    consistency_proof(entries, 3)
    inclusion_proof(entries, 3)
    assert entries == LEAVES[:9]
