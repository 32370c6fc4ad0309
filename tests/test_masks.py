"""Masks against the RFCs' and NIST's vectors, PyCryptodome's cipher, Python's integers, and scipy's distributions.

Keys are fixed, so statistics come out the same every time; their thresholds leave sound masks a wide margin.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
from Crypto.Cipher import AES
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from fedcollm_privacy import masks
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.masks import (
    MaskSum,
    add_mod,
    agree,
    derive,
    encode_labels,
    mask_words,
    pair_mask_key,
    self_mask_key,
    share_key,
    subtract_mod,
)

PLAN = hashlib.sha256(b"plan").hexdigest()
KEY = hashlib.sha256(b"key").digest()
SECRET = hashlib.sha256(b"secret").digest()
CKKS_PRIME = 2**60 - 2**14 + 1  # as large as SEAL's 60-bit primes
MODULI = (2, 3, 5, 2**16 + 1, 2**32, 2**59 + 1, CKKS_PRIME, 2**60, 2**60 + 1, 2**62 + 1, 2**63 - 25, 2**63)

# RFC 7748, section 5.2 (two vectors) and 6.1 (from both sides)
X25519_VECTORS = (
    (
        "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
        "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
    ),
    (
        "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
        "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
        "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
    ),
    (
        "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
    ),
    (
        "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
    ),
)
# The points of low order on curve and twist, and non-canonical forms of them (Bernstein, https://cr.yp.to/ecdh.html)
LOW_ORDER = (
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
)
# RFC 5869, appendix A.1 to A.3: secret, salt, info, the first 32 bytes of the output (HKDF's output is a prefix)
HKDF_VECTORS = (
    (
        b"\x0b" * 22,
        bytes(range(13)),
        bytes(range(0xF0, 0xFA)),
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
    ),
    (
        bytes(range(0x50)),
        bytes(range(0x60, 0xB0)),
        bytes(range(0xB0, 0x100)),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c",
    ),
    (b"\x0b" * 22, b"", b"", "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"),
)


def slow_words(key: bytes, chunk: int, count: int, modulus: int) -> list[int]:
    """The mask as its docstring defines it, word by word, over another library's cipher."""
    stream = AES.new(key, AES.MODE_CTR, nonce=chunk.to_bytes(8, "big"), initial_value=0)
    power_of_two = modulus & (modulus - 1) == 0
    bits = modulus.bit_length() - 1 if power_of_two else modulus.bit_length()
    words: list[int] = []
    while len(words) < count:
        word = int.from_bytes(stream.encrypt(bytes(8)), "little") % 2**bits
        if word < modulus:
            words.append(word)
    return words


def unrelated(one: np.ndarray, other: np.ndarray, bits: int) -> bool:
    """Whether two arrays of uniform words differ in half of their bits and do not correlate, within 6 deviations."""
    total = bits * len(one)
    distance = int(np.bitwise_count(one ^ other).sum())
    correlation = float(np.corrcoef(one.astype(np.float64), other.astype(np.float64))[0, 1])
    return abs(distance - total / 2) < 6 * (total / 4) ** 0.5 and abs(correlation) < 6 / len(one) ** 0.5


class TestAgree:
    @pytest.mark.parametrize(("private", "public", "shared"), X25519_VECTORS)
    def test_rfc_7748(self, private: str, public: str, shared: str) -> None:
        key = X25519PrivateKey.from_private_bytes(bytes.fromhex(private))
        assert agree(key, bytes.fromhex(public)).hex() == shared

    def test_rfc_7748_iterated(self) -> None:
        k = u = (9).to_bytes(32, "little")
        for round_number in range(1000):
            k, u = agree(X25519PrivateKey.from_private_bytes(k), u), k
            if round_number == 0:
                assert k.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
        assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"

    @pytest.mark.parametrize("public", LOW_ORDER)
    @pytest.mark.parametrize("top_bit", [0, 0x80])
    def test_low_order_points_are_refused(self, public: bytes, top_bit: int) -> None:
        with pytest.raises(ProtocolError, match="low order"):
            agree(X25519PrivateKey.generate(), public[:31] + bytes([public[31] | top_bit]))

    @pytest.mark.parametrize("public", [b"", bytes(31), bytes([9]) * 33, "9" * 32, None])
    def test_a_key_of_another_length_is_refused(self, public: Any) -> None:
        with pytest.raises(ProtocolError, match="32 bytes"):
            agree(X25519PrivateKey.generate(), public)


class TestDerive:
    @pytest.mark.parametrize(("secret", "salt", "info", "output"), HKDF_VECTORS)
    def test_rfc_5869(self, secret: bytes, salt: bytes, info: bytes, output: str) -> None:
        assert masks._hkdf(secret, salt, info).hex() == output

    @pytest.mark.parametrize("labels", [(), ("mask", "clinic-1", "clinic-2"), ("self", "a" * 64)])
    def test_equals_hmac_by_hand(self, labels: tuple[str, ...]) -> None:
        info = b"fedcollm/v1" + b"".join(bytes([0, len(label)]) + label.encode() for label in labels)
        extracted = hmac.new(bytes.fromhex(PLAN), SECRET, hashlib.sha256).digest()
        expected = hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()
        assert derive(SECRET, PLAN, *labels) == expected

    def test_the_named_keys_are_bound_as_they_say(self) -> None:
        assert pair_mask_key(SECRET, PLAN, "b", "a") == derive(SECRET, PLAN, "mask", "a", "b")
        assert pair_mask_key(SECRET, PLAN, "a", "b") == pair_mask_key(SECRET, PLAN, "b", "a")
        assert self_mask_key(SECRET, PLAN, "a") == derive(SECRET, PLAN, "self", "a")
        assert share_key(SECRET, PLAN, "b", "a") == derive(SECRET, PLAN, "share", "b", "a")

    def test_every_secret_plan_role_pair_and_direction_has_its_own_mask(self) -> None:
        other_secret = bytes([SECRET[0] ^ 1]) + SECRET[1:]
        other_plan = hashlib.sha256(b"another plan").hexdigest()
        keys = [
            key
            for secret, plan in itertools.product((SECRET, other_secret), (PLAN, other_plan))
            for key in (
                pair_mask_key(secret, plan, "a", "b"),
                pair_mask_key(secret, plan, "a", "c"),
                pair_mask_key(secret, plan, "b", "c"),
                self_mask_key(secret, plan, "a"),
                self_mask_key(secret, plan, "b"),
                share_key(secret, plan, "a", "b"),
                share_key(secret, plan, "b", "a"),
            )
        ]
        words = [mask_words(key, chunk, 512, 2**60) for key in keys for chunk in (0, 1, 2**32, 2**64 - 1)]
        assert len(set(keys)) == 28
        assert all(unrelated(one, other, bits=60) for one, other in itertools.combinations(words, 2))

    @given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=4), st.lists(st.text("ab", min_size=1), max_size=4))
    @example(["a", "bc"], ["ab", "c"])
    @example(["a"], ["a", "a"])
    def test_no_two_lists_of_labels_have_one_encoding(self, one: list[str], other: list[str]) -> None:
        assert (encode_labels(*one) == encode_labels(*other)) == (one == other)

    @pytest.mark.parametrize(
        "plan", ["", PLAN[1:], PLAN + "0", PLAN[1:] + "g", PLAN[2:] + " 0", PLAN.upper(), PLAN.encode(), 7]
    )
    def test_a_digest_of_another_form_is_refused(self, plan: Any) -> None:
        with pytest.raises(InvalidValue, match="plan_digest"):
            derive(SECRET, plan, "self", "a")

    @pytest.mark.parametrize("label", ["", "ü", "a" * 65, "a/b", 7])
    def test_a_label_that_is_no_public_name_is_refused(self, label: Any) -> None:
        with pytest.raises(InvalidValue, match="label"):
            self_mask_key(SECRET, PLAN, label)

    def test_a_site_is_no_pair(self) -> None:
        with pytest.raises(InvalidValue, match="another site"):
            pair_mask_key(SECRET, PLAN, "a", "a")


class TestMaskWords:
    def test_nist_sp_800_38a_f_5_5(self) -> None:
        key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
        plaintext = bytes.fromhex(
            "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
            "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
        )
        stream = masks._keystream(key, bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"))
        assert stream.update(plaintext).hex() == (
            "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
            "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
        )

    @given(
        key=st.binary(min_size=32, max_size=32),
        chunk=st.integers(0, 2**64 - 1),
        count=st.integers(1, 70),
        modulus=st.sampled_from(MODULI) | st.integers(2, 2**63),
    )
    @example(key=KEY, chunk=2**64 - 1, count=70, modulus=2**62 + 1)
    @example(key=KEY, chunk=1, count=1, modulus=2**63)
    def test_equals_the_definition_word_by_word(self, key: bytes, chunk: int, count: int, modulus: int) -> None:
        words = mask_words(key, chunk, count, modulus)
        assert words.dtype == np.uint64
        assert words.tolist() == slow_words(key, chunk, count, modulus)

    @pytest.mark.parametrize("modulus", MODULI)
    def test_a_long_chunk_equals_the_definition_and_a_shorter_one_is_its_prefix(self, modulus: int) -> None:
        long = mask_words(KEY, 7, 4096, modulus)
        assert long.tolist() == slow_words(KEY, 7, 4096, modulus)
        for count in (1, 2, 3, 1000, 4095):
            np.testing.assert_array_equal(mask_words(KEY, 7, count, modulus), long[:count])

    @pytest.mark.parametrize("modulus", [2, 3, 5, 11, 1000, 1024])
    def test_small_moduli_are_uniform(self, modulus: int) -> None:
        # 1000 words of 1024 would show a reduction by % in place of rejection.
        counts = np.bincount(mask_words(KEY, 0, 1_000_000, modulus).astype(np.int64), minlength=modulus)
        assert len(counts) == modulus
        assert 1e-4 < stats.chisquare(counts).pvalue < 1 - 1e-4

    @pytest.mark.parametrize("modulus", [3 * 2**58, 3 * 2**61])
    def test_large_moduli_are_uniform(self, modulus: int) -> None:
        words = mask_words(KEY, 0, 300_000, modulus)
        high = np.bincount((words // np.uint64(modulus // 384)).astype(np.int64), minlength=384)
        low = np.bincount((words % np.uint64(256)).astype(np.int64), minlength=256)
        assert len(high) == 384
        assert all(1e-4 < stats.chisquare(counts).pvalue < 1 - 1e-4 for counts in (high, low))

    @pytest.mark.parametrize("through_derive", [False, True], ids=["key", "seed"])
    def test_keys_one_bit_apart_give_unrelated_masks_for_every_bit(self, through_derive: bool) -> None:
        def mask(secret: bytes) -> np.ndarray:
            return mask_words(self_mask_key(secret, PLAN, "a") if through_derive else secret, 0, 1024, 2**60)

        base = mask(KEY)
        for bit in range(256):
            flipped = (int.from_bytes(KEY, "big") ^ (1 << bit)).to_bytes(32, "big")
            assert unrelated(base, mask(flipped), bits=60), bit

    @pytest.mark.parametrize("arguments", [{"chunk": -1}, {"chunk": 2**64}, {"chunk": True}, {"count": 0}])
    def test_a_place_out_of_range_is_refused(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(InvalidValue, match=next(iter(arguments))):
            mask_words(**{"key": KEY, "chunk": 0, "count": 1, "modulus": 2, **arguments})

    @pytest.mark.parametrize("modulus", [1, 0, -5, 2**63 + 1, 2.0, float("nan"), True])
    def test_a_modulus_out_of_range_is_refused(self, modulus: Any) -> None:
        for refused in (
            lambda: mask_words(KEY, 0, 1, modulus),
            lambda: MaskSum([(KEY, 1)], modulus),
            lambda: add_mod(np.zeros(1, np.uint64), np.zeros(1, np.uint64), modulus),
        ):
            with pytest.raises(InvalidValue, match="modulus"):
                refused()


class TestMaskSum:
    @pytest.mark.parametrize("modulus", MODULI)
    def test_equals_the_sum_of_python_integers(self, modulus: int) -> None:
        choice = random.Random(modulus)
        for size in (1, 2, 3, 15, 16, 17, 18, 45):
            terms = [(choice.randbytes(32), choice.choice((1, -1))) for _ in range(size)]
            summed = MaskSum(terms, modulus)
            # Back and forth, and by counts that leave the cipher inside a block.
            for index, count in ((3, 9), (0, 5), (3, 9), (2**64 - 1, 8), (3, 4)):
                columns = zip(*(slow_words(key, index, count, modulus) for key, _ in terms), strict=True)
                expected = [
                    sum(sign * word for (_, sign), word in zip(terms, column, strict=True)) % modulus
                    for column in columns
                ]
                assert summed.chunk(index, count).tolist() == expected

    @pytest.mark.parametrize("modulus", MODULI)
    @pytest.mark.parametrize("signs", [(1,), (-1,), (1, -1), (1, 1, -1)])
    def test_the_largest_words_never_overflow(
        self, modulus: int, signs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(masks, "_first_below", lambda _, count, q: np.full(count, q - 1, dtype=np.uint64))
        for size in range(1, 70):
            terms = [(KEY, sign) for sign, _ in zip(itertools.cycle(signs), range(size), strict=False)]
            expected = sum(sign * (modulus - 1) for _, sign in terms) % modulus
            assert MaskSum(terms, modulus).chunk(0, 3).tolist() == [expected] * 3

    @pytest.mark.parametrize("modulus", [CKKS_PRIME, 2**59 + 1, 2**63])
    def test_pairwise_masks_vanish_from_the_sum_of_all_and_of_no_fewer(self, modulus: int) -> None:
        sites = [f"site-{number}" for number in range(7)]
        private = {site: X25519PrivateKey.generate() for site in sites}
        public = {site: key.public_key().public_bytes_raw() for site, key in private.items()}
        uploads = {}
        for site in sites:
            terms = [
                (pair_mask_key(agree(private[site], public[peer]), PLAN, site, peer), 1 if site < peer else -1)
                for peer in sites
                if peer != site
            ]
            uploads[site] = MaskSum(terms, modulus)
        for chunk in (0, 5):
            total = np.zeros(50, dtype=np.uint64)
            for number, site in enumerate(sites, start=1):
                total = add_mod(total, uploads[site].chunk(chunk, 50), modulus)
                assert np.count_nonzero(total) == (50 if number < len(sites) else 0)

    def test_memory_is_a_few_arrays_whatever_the_number_of_terms(self) -> None:
        count = 2**16
        summed = MaskSum([(bytes([number]) * 32, 1 - 2 * (number % 2)) for number in range(64)], CKKS_PRIME)
        tracemalloc.start()
        try:
            summed.chunk(0, count)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 8 * 8 * count

    def test_none_of_its_texts_shows_a_key(self) -> None:
        texts = [repr(MaskSum([(KEY, 1), (SECRET, -1)], 2**60)), str(MaskSum([(KEY, 1)], 2**60))]
        for term in ((KEY + b"x", 1), (KEY[:31], -1), (1, KEY), (KEY.hex(), 1), (KEY, 0), (KEY, "1"), (KEY, True)):
            with pytest.raises(InvalidValue, match=r"key|sign") as caught:
                MaskSum([term], 2**60)  # type: ignore[list-item]
            texts.append(str(caught.value))
        for refused in (lambda: mask_words(KEY[:31], 0, 1, 2), lambda: derive(KEY[:31], PLAN, "self", "a")):
            with pytest.raises(InvalidValue, match="32 bytes") as caught:
                refused()
            texts.append(str(caught.value))
        assert len(texts) == 11
        for text in texts:
            assert repr(KEY)[2:12] not in text
            assert KEY.hex()[:8] not in text

    @pytest.mark.parametrize("sign", [0, 2, -2, 1.0, True, None, np.int64(1)])
    def test_another_sign_is_refused(self, sign: Any) -> None:
        with pytest.raises(InvalidValue, match="sign"):
            MaskSum([(KEY, 1), (SECRET, sign)], 2**60)

    def test_a_sum_of_no_mask_is_refused(self) -> None:
        with pytest.raises(InvalidValue, match="at least one mask"):
            MaskSum([], 2**60)

    @pytest.mark.parametrize(("index", "count"), [(-1, 1), (2**64, 1), (0, 0), (0.0, 1), (0, 1.0)])
    def test_a_place_out_of_range_is_refused(self, index: Any, count: Any) -> None:
        with pytest.raises(InvalidValue, match=r"chunk|count"):
            MaskSum([(KEY, 1)], 2**60).chunk(index, count)


class TestModularArithmetic:
    @given(st.data())
    @settings(max_examples=300)
    def test_equals_python_integers(self, data: st.DataObject) -> None:
        modulus = data.draw(st.sampled_from(MODULI) | st.integers(2, 2**63))
        edges = sorted({0, 1, modulus // 2, (modulus + 1) // 2, modulus - 2, modulus - 1})
        word = st.sampled_from(edges) | st.integers(0, modulus - 1)
        pairs = data.draw(st.lists(st.tuples(word, word), max_size=8)) + list(itertools.product(edges, edges))
        a, b = (np.array(column, dtype=np.uint64) for column in zip(*pairs, strict=True))
        assert add_mod(a, b, modulus).tolist() == [(x + y) % modulus for x, y in pairs]
        assert subtract_mod(a, b, modulus).tolist() == [(x - y) % modulus for x, y in pairs]

    def test_empty_arrays_are_allowed(self) -> None:
        empty = np.zeros(0, dtype=np.uint64)
        assert add_mod(empty, empty, 5).shape == subtract_mod(empty, empty, 5).shape == (0,)

    @pytest.mark.parametrize("operation", [add_mod, subtract_mod])
    def test_what_could_give_a_wrong_sum_is_refused(self, operation: Any) -> None:
        good = np.array([1, 2], dtype=np.uint64)
        for bad in (np.array([1, 5], np.uint64), np.array([1, 2]), good[:1], good[None], np.array([1.0, 2.0]), [1, 2]):
            for pair in ((good, bad), (bad, good)):
                with pytest.raises(InvalidValue, match="words"):
                    operation(*pair, 5)
