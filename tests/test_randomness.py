"""The keystream against NIST's vector and `cryptography`, the draws against scipy's distributions.

Statistical thresholds are set so that sound randomness fails one of them less than once in a million runs.
"""

from __future__ import annotations

import itertools
import math
import types
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fedcollm_privacy.randomness as randomness_module
from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.randomness import SecureRandom

DRAWS = 1_000_000
ALPHA = 1e-7  # per check
SIGMAS = float(stats.norm.isf(ALPHA / 2))

# NIST SP 800-38A, F.5.5 CTR-AES256.Encrypt
NIST_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
NIST_COUNTER = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
NIST_PLAINTEXT = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
NIST_CIPHERTEXT = bytes.fromhex(
    "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
    "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
)


class FixedWords:
    """Stands for the keystream: gives the chosen 64-bit words, then fails."""

    def __init__(self, words: list[int]) -> None:
        self._bytes = np.array(words, dtype="<u8").tobytes()

    def update(self, zeros: bytes) -> bytes:
        taken, self._bytes = self._bytes[: len(zeros)], self._bytes[len(zeros) :]
        if len(taken) != len(zeros):
            raise AssertionError("more words were drawn than given")
        return taken


def with_words(words: list[int]) -> SecureRandom:
    random = SecureRandom()
    random._stream = FixedWords(words)  # type: ignore[assignment]
    return random


@pytest.fixture
def nist_random(monkeypatch: pytest.MonkeyPatch) -> SecureRandom:
    chosen = {32: NIST_KEY, 16: NIST_COUNTER}
    monkeypatch.setattr(randomness_module, "os", types.SimpleNamespace(urandom=chosen.__getitem__))
    return SecureRandom()


def test_the_keystream_is_aes_256_ctr_by_nists_vector(nist_random: SecureRandom) -> None:
    keystream = bytes(p ^ c for p, c in zip(NIST_PLAINTEXT, NIST_CIPHERTEXT, strict=True))
    expected = [int.from_bytes(keystream[i : i + 8], "little") >> 11 for i in range(0, 64, 8)]
    assert [int(x) for x in nist_random._integers_53(8)] == expected


def test_every_draw_continues_one_stream(nist_random: SecureRandom) -> None:
    encryptor = Cipher(algorithms.AES(NIST_KEY), modes.CTR(NIST_COUNTER)).encryptor()
    words = np.frombuffer(encryptor.update(bytes(8 * 40)), dtype="<u8") >> np.uint64(11)
    mask = nist_random.poisson_mask(Fraction(1, 3), 7)
    normals = nist_random.normals(9)
    subset = nist_random.subset(12, 4)
    assert mask.tolist() == [Fraction(int(w), 2**53) < Fraction(1, 3) for w in words[:7]]
    # Box and Muller's transform once more, in plain Python; an odd count throws its last draw away.
    pairs = [
        (math.sqrt(-2 * math.log((int(u) + 1) / 2**53)), 2 * math.pi * int(v) / 2**53)
        for u, v in zip(words[7:12], words[12:17], strict=True)
    ]
    expected = [r * math.cos(a) for r, a in pairs] + [r * math.sin(a) for r, a in pairs]
    np.testing.assert_allclose(normals, expected[:9], rtol=1e-12, atol=1e-15)
    assert subset.tolist() == sorted(sorted(range(12), key=lambda i: int(words[17 + i]))[:4])


def test_a_million_normals_are_standard_normal() -> None:
    draws = SecureRandom().normals(DRAWS)
    assert draws.shape == (DRAWS,)
    assert draws.dtype == np.float64
    assert stats.kstest(draws, stats.norm.cdf).pvalue > ALPHA
    assert abs(draws.mean()) < SIGMAS / math.sqrt(DRAWS)
    assert abs(draws.var() - 1) < SIGMAS * math.sqrt(2 / DRAWS)
    # Fourth moment: 3 with variance 96/n; tails that are cut or doubled show here.
    assert abs((draws**4).mean() - 3) < SIGMAS * math.sqrt(96 / DRAWS)


def test_draws_of_one_stream_are_uncorrelated_in_value_and_in_size() -> None:
    draws = SecureRandom().normals(DRAWS)
    half = DRAWS // 2
    for one, two in (
        (draws[:-1], draws[1:]),
        (draws[:half], draws[half:]),  # cosine and sine of the same radius
        (draws[:half] ** 2, draws[half:] ** 2),
    ):
        assert abs(np.corrcoef(one, two)[0, 1]) < SIGMAS / math.sqrt(len(one))


def test_two_instances_are_unrelated_even_under_equal_seeds() -> None:
    streams = []
    for _ in range(2):
        # What makes two sites draw equal noise with torch's or numpy's global generator.
        torch.manual_seed(42)
        np.random.seed(42)
        streams.append(SecureRandom().normals(DRAWS // 2))
    assert not np.intersect1d(streams[0][:10_000], streams[1][:10_000]).size
    assert abs(np.corrcoef(streams[0], streams[1])[0, 1]) < SIGMAS / math.sqrt(DRAWS // 2)
    masks = [SecureRandom().poisson_mask(Fraction(1, 2), 256).tolist() for _ in range(2)]
    assert masks[0] != masks[1]


def test_a_stream_cannot_be_seeded_printed_or_extended() -> None:
    with pytest.raises(TypeError):
        SecureRandom(42)  # type: ignore[call-arg]
    random = SecureRandom()
    assert repr(random) == str(random) == "SecureRandom(<hidden>)"
    with pytest.raises(AttributeError):
        random.seed = 42  # type: ignore[attr-defined]


@pytest.mark.parametrize("rate", [Fraction(1, 1000), Fraction(1, 3), Fraction(64, 1200), Fraction(999, 1000)])
def test_poisson_masks_have_their_rate_and_independent_coins(rate: Fraction) -> None:
    mask = SecureRandom().poisson_mask(rate, DRAWS)
    assert mask.dtype == np.bool_
    assert stats.binom.ppf(ALPHA, DRAWS, float(rate)) <= mask.sum() <= stats.binom.isf(ALPHA, DRAWS, float(rate))
    both = (mask[: DRAWS // 2] & mask[DRAWS // 2 :]).sum()
    assert stats.binom.ppf(ALPHA, DRAWS // 2, float(rate) ** 2) <= both
    assert both <= stats.binom.isf(ALPHA, DRAWS // 2, float(rate) ** 2)


def test_batch_sizes_vary_like_a_binomial_and_are_not_fixed() -> None:
    random = SecureRandom()
    sizes = [int(random.poisson_mask(Fraction(1, 10), 400).sum()) for _ in range(2000)]
    # Sampling a fixed number without replacement would give one size only.
    low, high = stats.chi2.ppf([ALPHA, 1 - ALPHA], 1999)
    assert low * 0.99 < 1999 * np.var(sizes, ddof=1) / (400 * 0.1 * 0.9) < high * 1.01


def test_rate_one_takes_everything() -> None:
    assert SecureRandom().poisson_mask(Fraction(1), 100_000).all()
    assert with_words([2**64 - 1, 0]).poisson_mask(Fraction(1), 2).all()


@settings(deadline=None)
@given(st.fractions(min_value=Fraction(1, 2**40), max_value=1))
def test_the_coin_falls_exactly_at_the_rounded_down_threshold(rate: Fraction) -> None:
    threshold = rate.numerator * 2**53 // rate.denominator
    below, at = threshold - 1, min(threshold, 2**53 - 1)
    # The 11 low bits of a word must not matter.
    words = [below << 11, (below << 11) | 2047, at << 11, (at << 11) | 2047]
    expected = [True, True, at < threshold, at < threshold]
    assert with_words(words).poisson_mask(rate, 4).tolist() == expected
    # What is sampled is never more than what the accountant is told.
    assert Fraction(threshold, 2**53) <= Fraction(float(rate))


@pytest.mark.parametrize("rate", [Fraction(0), Fraction(-1, 2), Fraction(1001, 1000)])
def test_impossible_rates_are_refused(rate: Fraction) -> None:
    with pytest.raises(InvalidValue, match="sample_rate"):
        SecureRandom().poisson_mask(rate, 3)


def test_extreme_words_give_finite_normals() -> None:
    low, high = 0, 2**64 - 1
    for first, second in itertools.product((low, high), repeat=2):
        draws = with_words([first, second]).normals(2)
        assert np.isfinite(draws).all()
    # The largest radius that 53 bits allow.
    assert abs(with_words([low, low]).normals(1)[0] - math.sqrt(106 * math.log(2))) < 1e-12


def test_nothing_asked_is_nothing_drawn() -> None:
    random = with_words([])
    assert random.normals(0).shape == (0,)
    assert random.poisson_mask(Fraction(1, 2), 0).shape == (0,)


def test_subsets_are_uniform() -> None:
    random = SecureRandom()
    subsets: dict[tuple[int, ...], int] = dict.fromkeys(itertools.combinations(range(6), 2), 0)
    for _ in range(15_000):
        subsets[tuple(random.subset(6, 2).tolist())] += 1
    assert len(subsets) == 15
    assert stats.chisquare(list(subsets.values())).pvalue > ALPHA


@settings(deadline=None)
@given(items=st.integers(0, 60), size=st.integers(1, 60))
def test_subsets_are_sorted_distinct_and_of_the_right_size(items: int, size: int) -> None:
    subset: np.ndarray[Any, Any] = SecureRandom().subset(items, size)
    assert len(subset) == min(items, size)
    assert (np.diff(subset) > 0).all()
    assert all(0 <= i < items for i in subset)
