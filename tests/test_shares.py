"""Shares against a second implementation of GF(2^128), itself checked with GCM's vector; commitments and boxes against
hashlib and PyCryptodome's cipher.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, ClassVar

import numpy as np
import pytest
from Crypto.Cipher import ChaCha20_Poly1305
from Crypto.Protocol import SecretSharing
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedcollm_privacy import shares as shares_module
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.shares import commit, join, join_many, open_box, seal_box, split

PLAN = hashlib.sha256(b"plan").hexdigest()
OTHER_PLAN = hashlib.sha256(b"another plan").hexdigest()
SECRET = hashlib.sha256(b"secret").digest()
KEY = hashlib.sha256(b"key").digest()
ALPHA = 1e-7  # per check on fresh randomness
NAMES = ("delta", "alpha", "hotel", "bravo", "golf", "charlie", "foxtrot", "echo")  # in no order
REDUCTION = (1 << 128) | 0b10000111  # x^128 + x^7 + x^2 + x + 1


def times(a: int, b: int) -> int:
    """The product in GF(2^128): carry-less, then reduced by long division."""
    product = reduce(lambda total, bit: total ^ (a << bit), (bit for bit in range(128) if b >> bit & 1), 0)
    for bit in range(254, 127, -1):
        if product >> bit & 1:
            product ^= REDUCTION << (bit - 128)
    return product


def inverse(a: int) -> int:
    """a^(2^128 - 2), by Fermat."""
    result, square = 1, a
    for _ in range(127):
        square = times(square, square)
        result = times(result, square)
    return result


def polynomial_through(points: Sequence[tuple[int, int]]) -> list[int]:
    """Coefficients, constant first, of the one polynomial of least degree through the points (Lagrange)."""
    total = [0] * len(points)
    for x, y in points:
        basis, scale = [1], y
        for other, _ in points:
            if other != x:
                shifted, scaled = [0, *basis], [times(other, c) for c in basis] + [0]
                basis = [one ^ two for one, two in zip(shifted, scaled, strict=True)]
                scale = times(scale, inverse(x ^ other))
        total = [one ^ times(scale, two) for one, two in zip(total, basis, strict=True)]
    return total


def value_at(coefficients: Sequence[int], x: int) -> int:
    return reduce(lambda total, c: times(total, x) ^ c, reversed(coefficients), 0)


def halves(value: bytes) -> tuple[int, int]:
    return int.from_bytes(value[:16], "big"), int.from_bytes(value[16:], "big")


def whole(pair: Iterable[int]) -> bytes:
    return b"".join(half.to_bytes(16, "big") for half in pair)


def points_of(shares: dict[str, bytes], holders: Sequence[str], half: int) -> list[tuple[int, int]]:
    return [(sorted(holders).index(holder) + 1, halves(share)[half]) for holder, share in shares.items()]


def chosen(shares: dict[str, bytes], names: Iterable[str]) -> dict[str, bytes]:
    return {name: shares[name] for name in names}


def flipped(data: bytes, bit: int) -> bytes:
    return (int.from_bytes(data, "big") ^ (1 << bit)).to_bytes(len(data), "big")


class TestField:
    def test_the_tests_field_is_that_of_gcm(self) -> None:
        # McGrew and Viega, The Galois/Counter Mode of Operation, test case 2; GCM writes the lowest power first.
        def reflected(text: str) -> int:
            return int(f"{int(text, 16):0128b}"[::-1], 2)

        product = times(reflected("66e94bd4ef8a2c3b884cfa59ca342b2e"), reflected("0388dace60b6a392f328c2b971b2fe78"))
        assert product == reflected("5e2ec746917062882c85b0685353deb7")

    @given(st.integers(1, 2**128 - 1), st.integers(0, 2**128 - 1))
    def test_the_librarys_field_is_the_same(self, a: int, b: int) -> None:
        one, other = SecretSharing._Element(a), SecretSharing._Element(b)
        assert int(one * other) == times(a, b)
        assert int(one + other) == a ^ b
        assert times(a, int(one.inverse())) == 1
        assert one.encode() == a.to_bytes(16, "big")

    def test_the_librarys_randomness_is_the_operating_systems(self) -> None:
        assert SecretSharing.rng is os.urandom


class TestShares:
    @pytest.mark.parametrize("count", range(2, 9))
    def test_every_subset_of_t_gives_the_secret(self, count: int) -> None:
        holders = NAMES[:count]
        for threshold in range(2, count + 1):
            secret = os.urandom(32)
            shares = split(secret, threshold=threshold, holders=holders)
            assert shares.keys() == set(holders)
            subsets = {"-".join(names): chosen(shares, names) for names in itertools.combinations(holders, threshold)}
            assert set(join_many(subsets, threshold=threshold, holders=holders).values()) == {secret}

    @pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(31) + b"\x01", bytes(16) + b"\x80" + bytes(15)])
    def test_secrets_at_the_edges_come_back_whole(self, secret: bytes) -> None:
        shares = split(secret, threshold=3, holders=NAMES)
        assert join(shares, threshold=3, holders=NAMES) == secret

    def test_the_order_of_holders_and_shares_does_not_matter(self) -> None:
        shares = split(SECRET, threshold=3, holders=NAMES)
        few = dict(reversed(list(chosen(shares, NAMES[2:6]).items())))
        assert join(few, threshold=3, holders=NAMES[::-1]) == SECRET

    @pytest.mark.parametrize(("threshold", "count"), [(2, 2), (2, 5), (4, 7), (8, 8)])
    def test_shares_lie_on_a_polynomial_with_the_secret_at_zero(self, threshold: int, count: int) -> None:
        holders = NAMES[:count]
        shares = split(SECRET, threshold=threshold, holders=holders)
        for half in (0, 1):
            points = points_of(shares, holders, half)
            coefficients = polynomial_through(points[-threshold:])
            assert coefficients[0] == halves(SECRET)[half]
            assert [value_at(coefficients, x) for x, _ in points] == [y for _, y in points]

    @pytest.mark.parametrize(("threshold", "count"), [(2, 2), (3, 6), (5, 8), (20, 30)])
    def test_join_agrees_with_the_librarys_combine(self, threshold: int, count: int) -> None:
        holders = [f"site-{number:02}" for number in range(count)]
        # Not from `split`: any points have a polynomial.
        shares = {holder: os.urandom(32) for holder in random.Random(count).sample(holders, threshold)}
        expected = b"".join(
            SecretSharing.Shamir.combine([(x, y.to_bytes(16, "big")) for x, y in points_of(shares, holders, half)])
            for half in (0, 1)
        )
        assert join(shares, threshold=threshold, holders=holders) == expected

    @pytest.mark.parametrize(("threshold", "count"), [(2, 3), (4, 6), (6, 6)])
    def test_fewer_than_t_shares_fit_every_secret_exactly_once(
        self, threshold: int, count: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Perfect secrecy: whatever the secret, one and only one choice of coefficients gives these t-1 shares.

        The coefficients are found by the second implementation and given to `split` for its random ones.
        """
        holders = NAMES[:count]
        seen = chosen(split(SECRET, threshold=threshold, holders=holders), holders[: threshold - 1])
        for candidate in (bytes(32), b"\xff" * 32, SECRET, flipped(SECRET, 0), *(os.urandom(32) for _ in range(4))):
            polynomials = [
                polynomial_through([(0, halves(candidate)[half]), *points_of(seen, holders, half)]) for half in (0, 1)
            ]
            queue = [c.to_bytes(16, "big") for coefficients in polynomials for c in reversed(coefficients[1:])]
            assert len(queue) == 2 * (threshold - 1)
            with monkeypatch.context() as patched:
                patched.setattr(SecretSharing, "rng", lambda size, queue=queue: queue.pop(0))
                shares = split(candidate, threshold=threshold, holders=holders)
            assert queue == []  # so many random coefficients there are, and no fewer
            assert chosen(shares, seen) == seen
            assert join(shares, threshold=threshold, holders=holders) == candidate

    def test_one_share_of_one_secret_is_uniform(self) -> None:
        draws = [split(SECRET, threshold=2, holders=NAMES[:2]) for _ in range(4000)]
        for holder in NAMES[:2]:
            drawn = np.frombuffer(b"".join(shares[holder] for shares in draws), dtype=np.uint8)
            assert stats.chisquare(np.bincount(drawn, minlength=256)).pvalue > ALPHA
            ones = np.unpackbits(drawn.reshape(-1, 32), axis=1).sum(axis=0, dtype=np.int64)
            assert np.abs(ones - 2000).max() < stats.norm.isf(ALPHA / 512) * 4000**0.5 / 2

    def test_the_two_halves_have_independent_polynomials(self) -> None:
        shares = split(SECRET[:16] * 2, threshold=2, holders=NAMES)
        assert all(share[:16] != share[16:] for share in shares.values())

    def test_exactly_the_first_t_shares_are_used(self) -> None:
        shares = split(SECRET, threshold=3, holders=NAMES)
        first, *_, last = sorted(NAMES)
        for order in (shares, dict(reversed(shares.items()))):
            assert join({**order, last: bytes(32)}, threshold=3, holders=NAMES) == SECRET
            assert join({**order, first: bytes(32)}, threshold=3, holders=NAMES) != SECRET

    def test_join_many_is_join_and_interpolates_once_per_set_of_holders(self, monkeypatch: pytest.MonkeyPatch) -> None:
        secrets = {f"site-{number}": os.urandom(32) for number in range(12)}
        shares = {name: split(secret, threshold=3, holders=NAMES) for name, secret in secrets.items()}
        del shares["site-4"][min(NAMES)]  # one left out, as where its commitment did not fit
        interpolated: list[Sequence[int]] = []
        once = shares_module._lagrange_at_zero
        monkeypatch.setattr(shares_module, "_lagrange_at_zero", lambda xs: (interpolated.append(xs), once(xs))[1])
        assert join_many(shares, threshold=3, holders=NAMES) == secrets
        assert interpolated == [[1, 2, 3], [2, 3, 4]]

    def test_nothing_is_joined_from_fewer_than_t(self) -> None:
        shares = split(SECRET, threshold=4, holders=NAMES)
        for few in (chosen(shares, NAMES[:3]), {}):
            with pytest.raises(ProtocolError, match="needed: 4"):
                join(few, threshold=4, holders=NAMES)
            with pytest.raises(ProtocolError, match="site-2"):
                join_many({"site-1": shares, "site-2": few}, threshold=4, holders=NAMES)

    def test_a_share_of_a_stranger_is_refused(self) -> None:
        shares = split(SECRET, threshold=3, holders=NAMES)
        with pytest.raises(ProtocolError, match="holds none"):
            join({**shares, "mallory": bytes(32)}, threshold=3, holders=NAMES)

    @pytest.mark.parametrize("share", [b"", bytes(31), bytes(33), "0" * 32, None])
    @pytest.mark.parametrize("place", [0, -1])
    def test_a_share_of_another_form_is_refused_even_where_it_is_not_used(self, share: Any, place: int) -> None:
        shares = split(SECRET, threshold=3, holders=NAMES)
        with pytest.raises(ProtocolError, match="32 bytes"):
            join({**shares, sorted(NAMES)[place]: share}, threshold=3, holders=NAMES)

    @pytest.mark.parametrize("threshold", [1, 0, -1, 9, 2.0, True, float("nan")])
    def test_a_threshold_out_of_range_is_refused(self, threshold: Any) -> None:
        with pytest.raises(InvalidValue, match="threshold"):
            split(SECRET, threshold=threshold, holders=NAMES)
        with pytest.raises(InvalidValue, match="threshold"):
            join({}, threshold=threshold, holders=NAMES)

    @pytest.mark.parametrize("holders", [("a", "b", "a"), "ab", ("a", ""), ("a", "b/c"), ("a", 7)])
    def test_a_list_of_holders_of_another_form_is_refused(self, holders: Any) -> None:
        with pytest.raises(InvalidValue, match="holder"):
            split(SECRET, threshold=2, holders=holders)

    @pytest.mark.parametrize("secret", [SECRET[:31], SECRET + b"x", SECRET.hex(), bytearray(SECRET)])
    def test_a_secret_of_another_form_is_refused_and_not_shown(self, secret: Any) -> None:
        for refused in (
            lambda: split(secret, threshold=2, holders=NAMES),
            lambda: commit(secret, PLAN, "seed"),
            lambda: seal_box(secret, b"", plan_digest=PLAN, sender="a", receiver="b"),
            lambda: open_box(secret, b"", plan_digest=PLAN, sender="a", receiver="b"),
        ):
            with pytest.raises(InvalidValue, match="32 bytes") as caught:
                refused()
            assert repr(SECRET)[2:12] not in str(caught.value)
            assert SECRET.hex()[:8] not in str(caught.value)


class TestCommit:
    @pytest.mark.parametrize("labels", [(), ("seed", "a"), ("share", "a", "b" * 64)])
    def test_is_the_hash_of_all_its_parts(self, labels: tuple[str, ...]) -> None:
        encoded = b"".join(bytes([0, len(label)]) + label.encode() for label in labels)
        parts = b"fedcollm/v1/commitment" + bytes([0, len(labels)]) + encoded + bytes.fromhex(PLAN) + SECRET
        assert commit(SECRET, PLAN, *labels) == hashlib.sha256(parts).digest()

    def test_every_part_is_bound(self) -> None:
        arguments = [
            (SECRET, PLAN, "share", "a", "b"),
            (SECRET, OTHER_PLAN, "share", "a", "b"),
            (SECRET, PLAN, "share", "b", "a"),
            (SECRET, PLAN, "seed", "a", "b"),
            (SECRET, PLAN, "share", "a"),
            (SECRET, PLAN, "share", "ab"),
            (SECRET, PLAN),
        ]
        assert len({commit(*each) for each in arguments}) == len(arguments)

    def test_a_changed_share_is_seen_in_its_commitment_and_in_nothing_else(self) -> None:
        shares = split(SECRET, threshold=2, holders=NAMES[:3])
        victim = min(shares)
        commitment = commit(shares[victim], PLAN, "share", "owner", victim)
        for bit in range(256):
            changed = flipped(shares[victim], bit)
            assert commit(changed, PLAN, "share", "owner", victim) != commitment
            if bit % 32 == 0:  # it joins to another secret without a word
                assert join({**shares, victim: changed}, threshold=2, holders=NAMES[:3]) != SECRET

    def test_arguments_of_another_form_are_refused(self) -> None:
        for bad in ((SECRET, PLAN[1:], "a"), (SECRET, PLAN, ""), (b"", PLAN, "a"), (SECRET + SECRET, PLAN, "a")):
            with pytest.raises(InvalidValue):
                commit(*bad)


class TestBox:
    WHERE: ClassVar = {"plan_digest": PLAN, "sender": "alpha", "receiver": "bravo"}

    def test_opens_for_whom_it_was_sealed(self) -> None:
        for plaintext in (b"", b"x", os.urandom(64), os.urandom(100_000)):
            assert open_box(KEY, seal_box(KEY, plaintext, **self.WHERE), **self.WHERE) == plaintext

    def test_is_chacha20_poly1305_with_what_it_binds(self) -> None:
        cipher = ChaCha20_Poly1305.new(key=KEY, nonce=bytes(12))
        cipher.update(b"fedcollm/v1/box" + bytes.fromhex(PLAN) + b"\x00\x05alpha\x00\x05bravo")
        assert seal_box(KEY, SECRET, **self.WHERE) == b"".join(cipher.encrypt_and_digest(SECRET))

    @pytest.mark.parametrize(
        "elsewhere",
        [
            {"plan_digest": OTHER_PLAN},
            {"sender": "charlie"},
            {"receiver": "charlie"},
            {"sender": "bravo", "receiver": "alpha"},
            {"sender": "alphab", "receiver": "ravo"},
        ],
    )
    def test_is_bound_to_plan_sender_and_receiver(self, elsewhere: dict[str, str]) -> None:
        box = seal_box(KEY, SECRET, **self.WHERE)
        with pytest.raises(ProtocolError, match="does not open"):
            open_box(KEY, box, **{**self.WHERE, **elsewhere})

    def test_every_changed_byte_bit_length_and_key_is_refused_with_one_text(self) -> None:
        box = seal_box(KEY, SECRET, **self.WHERE)
        attempts: list[tuple[bytes, Any]] = [(KEY, flipped(box, bit)) for bit in range(8 * len(box))]
        attempts += [(KEY, box[:place] + bytes([box[place] ^ 0xFF]) + box[place + 1 :]) for place in range(len(box))]
        attempts += [(KEY, box[:length]) for length in range(len(box))]
        attempts += [(KEY, box + b"\x00"), (KEY, b"\x00" + box), (KEY, None), (KEY, box.hex())]
        attempts += [(flipped(KEY, bit), box) for bit in range(256)]
        texts = set()
        for key, attempt in attempts:
            with pytest.raises(ProtocolError) as caught:
                open_box(key, attempt, **self.WHERE)
            assert caught.value.__suppress_context__
            texts.add(str(caught.value))
        assert texts == {"the box from alpha to bravo does not open; leave alpha out"}

    @pytest.mark.parametrize("use", [seal_box, open_box])
    @pytest.mark.parametrize("bad", [{"plan_digest": "x"}, {"sender": ""}, {"receiver": "a/b"}])
    def test_arguments_of_another_form_are_refused(self, use: Callable[..., bytes], bad: dict[str, str]) -> None:
        with pytest.raises(InvalidValue, match=next(iter(bad)) if "plan_digest" in bad else "label"):
            use(KEY, bytes(32), **{**self.WHERE, **bad})
