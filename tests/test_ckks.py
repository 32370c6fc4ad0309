"""CKKS: parameters by proof, forged keys refused, integers out of the decryptor and never floats."""

from __future__ import annotations

import ast
import copy
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tenseal import sealapi

import fedcollm_privacy
from fedcollm_privacy import ckks, ckks_parameters
from fedcollm_privacy.ciphertext_sum import CiphertextSum, words_of
from fedcollm_privacy.ckks import (
    CkksParameters,
    PublicContext,
    Words,
    encrypt,
    encrypt_grid,
    load_object,
    parameters_for,
    save_object,
    seal_context,
    to_ciphertext,
    to_words,
    unpack,
)
from fedcollm_privacy.ckks_secret import SecretKey, decrypt_sum, generate
from fedcollm_privacy.errors import InvalidValue, OpeningRefused, ProtocolError
from fedcollm_privacy.messages import QuantizedUpdate, RoundPlan
from fedcollm_privacy.roster import MAX_SITES

from .secure_sums import round_plan

PARAMETERS = CkksParameters()
KEY, CONTEXT = generate(PARAMETERS)
CHUNK = PARAMETERS.chunk_parameters
DEGREES = [4096, 8192, 16384, 32768]
STD = {(60,): 2**13.4, (60, 49): 2**9.4}
"""Of one fresh encryption at N = 4096, in units of noise; `test_noise_is_what_the_margin_assumes` measures it."""


def plan(**changes: Any) -> RoundPlan:
    fields: dict[str, Any] = {"max_contributors": 100, "ckks": PARAMETERS, "key_digest": CONTEXT.digest}
    return round_plan(**(fields | changes))


def quantized(grid: Any, **changes: Any) -> QuantizedUpdate:
    whole = np.array(grid, dtype=np.int32)
    return QuantizedUpdate(plan=plan(**({"dimension": len(whole)} | changes)), grid=whole)


def sealed(grid: Any) -> list[Words]:
    return list(encrypt(quantized(grid), CONTEXT))


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", DEGREES)
def test_security_table_is_seals(degree: int) -> None:
    allowed = sealapi.CoeffModulus.MaxBitCount(degree, sealapi.SEC_LEVEL_TYPE.TC128)
    assert allowed == ckks_parameters._MODULUS_BITS_FOR_128[degree]
    special = min(60, allowed - 60)
    CkksParameters(poly_modulus_degree=degree, coeff_mod_bit_sizes=(60, special))
    if special < 60:
        with pytest.raises(InvalidValue, match="128-bit"):
            CkksParameters(poly_modulus_degree=degree, coeff_mod_bit_sizes=(60, special + 1))


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("sizes", [(60,), (60, 49), (60, 30)])
def test_the_modulus_is_the_prime_that_seal_takes(degree: int, sizes: tuple[int, ...]) -> None:
    parameters = CkksParameters(poly_modulus_degree=degree, coeff_mod_bit_sizes=sizes)
    data_level = seal_context(parameters).first_context_data().parms().coeff_modulus()
    assert [prime.value() for prime in data_level] == [parameters.modulus]
    assert parameters.modulus == sealapi.CoeffModulus.Create(degree, list(sizes))[0].value()
    assert parameters.modulus % (2 * degree) == 1
    assert 2**59 < parameters.modulus < 2**60


def room(contributors: int, value_bits: int) -> float:
    """The best margin that the known forms could give, in deviations; 0 where nothing fits."""
    best, worst = 0.0, contributors * (2 ** (value_bits - 1) - 1)
    field_bits = max(4, worst.bit_length() + 1)
    for sizes, fields in (((60,), 2), ((60, 49), 2), ((60,), 1)):
        # Half the modulus is 2^59, of which sqrt(2) is for real and imaginary part together.
        lsb_bits = 59 - fields * field_bits
        if fields * field_bits <= 52 and lsb_bits >= 1:
            best = max(best, 0.25 * 2**lsb_bits / (STD[sizes] * contributors**0.5))
    return best


@given(st.integers(0, 24), st.floats(0.5, 1), st.integers(2, 24), st.floats(16, 1e4))
def test_proven_sums_fit_their_field_and_the_modulus(bits: int, part: float, value_bits: int, margin: float) -> None:
    contributors = max(1, int(part * 2**bits))
    try:
        parameters = parameters_for(contributors, value_bits, margin=margin)
    except InvalidValue:
        # Refusals are not lazy: nothing of the same form would have left clearly more room.
        assert room(2 * contributors, value_bits) < 2 * margin
        return
    worst = contributors * (2 ** (value_bits - 1) - 1)
    assert worst < 2 ** (parameters.field_bits - 1)
    packed = sum(worst * 2 ** (parameters.field_bits * field) for field in range(parameters.fields))
    modulus = seal_context(parameters).first_context_data().parms().coeff_modulus()[0].value()
    # sqrt(2): real and imaginary part at their worst together. Forty deviations of noise on top.
    noise = STD[parameters.coeff_mod_bit_sizes] * contributors**0.5
    assert 2**0.5 * packed * 2**parameters.lsb_bits + 40 * noise < modulus / 2
    assert 0.25 * 2**parameters.lsb_bits / noise >= margin
    assert parameters.margin(contributors) >= margin >= ckks_parameters.MIN_MARGIN
    allowed = sealapi.CoeffModulus.MaxBitCount(parameters.poly_modulus_degree, sealapi.SEC_LEVEL_TYPE.TC128)
    assert sum(parameters.coeff_mod_bit_sizes) <= allowed
    parameters.prove(contributors, value_bits)


def test_fewer_primes_and_more_fields_come_first() -> None:
    """Bytes first by fields, then time by primes; the field is no wider than the sum, the margin has the rest."""
    assert parameters_for(100, 13) == CkksParameters()
    assert parameters_for(128, 13) == CkksParameters()
    fifteen = CkksParameters(coeff_mod_bit_sizes=(60,), lsb_bits=29, field_bits=15)
    assert parameters_for(4, 13) == parameters_for(3, 13) == fifteen
    assert parameters_for(10, 13) == CkksParameters(coeff_mod_bit_sizes=(60,), lsb_bits=25, field_bits=17)
    assert parameters_for(10, 13, margin=300).coeff_mod_bit_sizes == (60, 49)
    assert parameters_for(129, 13) == CkksParameters(coeff_mod_bit_sizes=(60,), lsb_bits=38, field_bits=21, fields=1)


@pytest.mark.parametrize(("contributors", "value_bits"), [(1000, 40), (2**20, 20), (3, 60)])
def test_refused_numbers_come_with_value_bits_that_work(contributors: int, value_bits: int) -> None:
    with pytest.raises(InvalidValue, match=rf"secure_sum\.value_bits.*{contributors} contributors") as refusal:
        parameters_for(contributors, value_bits)
    most = int(str(refusal.value).split("at most ")[1].split()[0])
    parameters_for(contributors, most)
    with pytest.raises(InvalidValue, match="value_bits"):
        parameters_for(contributors, most + 1)


@pytest.mark.parametrize(("contributors", "value_bits"), [(2**45, 4), (2**30, 13), (2**40, 2)])
def test_refused_numbers_come_with_contributors_where_no_value_bits_would_do(
    contributors: int, value_bits: int
) -> None:
    with pytest.raises(InvalidValue, match=r"^contributors.*deviations; or a smaller margin") as refusal:
        parameters_for(contributors, value_bits)
    most = int(str(refusal.value).split("about ")[1].split()[0])
    assert most > 1000
    parameters_for(most, value_bits)
    with pytest.raises(InvalidValue):
        parameters_for(4 * most, value_bits)


@given(st.integers(3, MAX_SITES), st.integers(4, 18))
def test_whatever_a_plan_of_a_whole_roster_may_ask_for_has_parameters(contributors: int, value_bits: int) -> None:
    assert parameters_for(contributors, value_bits).poly_modulus_degree == 4096
    parameters_for(MAX_SITES, 18)


@pytest.mark.parametrize(
    ("contributors", "value_bits", "margin", "field"),
    [
        (0, 13, 16, "contributors"),
        (3.0, 13, 16, "contributors"),
        (True, 13, 16, "contributors"),
        (3, 1, 16, "value_bits"),
        (3, 13.0, 16, "value_bits"),
        (3, 13, 15.9, "margin"),
        (3, 13, float("nan"), "margin"),
    ],
)
def test_nobody_gets_parameters_for_nothing_or_below_the_margin(
    contributors: Any, value_bits: Any, margin: float, field: str
) -> None:
    with pytest.raises(InvalidValue, match=field):
        parameters_for(contributors, value_bits, margin=margin)


def test_a_sum_that_these_parameters_cannot_hold_is_refused_with_what_to_change() -> None:
    PARAMETERS.prove(128, 13)
    with pytest.raises(InvalidValue, match=r"secure_sum\.value_bits.*at most 12 .*fewer contributors"):
        PARAMETERS.prove(129, 13)
    with pytest.raises(InvalidValue, match=r"value_bits"):
        PARAMETERS.prove(1, 21)
    with pytest.raises(InvalidValue, match=r"^contributors.*take fewer contributors, or a larger lsb_bits"):
        PARAMETERS.prove(150, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"poly_modulus_degree": 2048},
        {"coeff_mod_bit_sizes": (60, 50)},
        {"coeff_mod_bit_sizes": (59, 49)},
        {"coeff_mod_bit_sizes": (60, 29)},
        {"coeff_mod_bit_sizes": ()},
        {"coeff_mod_bit_sizes": (40, 30, 30)},
        {"coeff_mod_bit_sizes": (60.0,)},
        {"lsb_bits": 20},
        {"lsb_bits": 0},
        {"field_bits": 21},
        {"field_bits": 3},
        {"fields": 3},
        {"fields": 0},
        {"field_bits": 20.0},
        {"lsb_bits": True},
    ],
)
def test_parameters_outside_the_proof_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        CkksParameters(**changes)


def noise(parameters: CkksParameters, chunks: int, value: int = 0) -> np.ndarray[Any, Any]:
    """Straight from SEAL, not through our rounding: float64 [2 * chunks, slots], fresh encryptions under a new key."""
    key, context = generate(parameters)
    seal_ctx = seal_context(parameters)
    decryptor, encoder = sealapi.Decryptor(seal_ctx, key._seal_key), sealapi.CKKSEncoder(seal_ctx)
    grid = np.full(parameters.chunk_parameters, value, dtype=np.int32)
    exact, found = ckks._pack(grid, parameters), []
    for _ in range(chunks):
        (words_2N,) = encrypt_grid(grid, context)
        plaintext = sealapi.Plaintext()
        decryptor.decrypt(to_ciphertext(words_2N, parameters), plaintext)
        slots = np.asarray(encoder.decode_complex(plaintext)) - exact
        found += [slots.real, slots.imag]
    return np.stack(found) * 2.0**parameters.lsb_bits


@pytest.mark.parametrize("sizes", list(STD))
def test_noise_is_what_the_margin_assumes(sizes: tuple[int, ...]) -> None:
    parameters = CkksParameters(coeff_mod_bit_sizes=sizes, lsb_bits=19)
    assumed = ckks_parameters._NOISE_STD_AT_4096[len(sizes)]
    means, worsts = [], []
    for _ in range(7):
        found = noise(parameters, 24)
        means.append(float(found.std()))
        worsts.append(float(np.sqrt(np.square(found).mean(0)).max()) / means[-1])
    assert np.mean(means) == pytest.approx(STD[sizes], rel=0.03)
    assert np.mean(means) < assumed < 1.1 * STD[sizes]
    assert max(means) < 1.02 * assumed
    assert parameters.margin(1) == pytest.approx(0.25 * 2**19 / assumed)
    # How bad the worst slot is, is up to the key: 2.4 (one prime) or 3.0 (two) for half of them, 3.6 the worst of 60.
    assert 2 < np.median(worsts) < 3.7
    assert max(worsts) < 4.5
    assert ckks_parameters.MIN_MARGIN / np.median(worsts) > 4.3


@pytest.mark.parametrize("sizes", list(STD))
def test_noise_grows_with_the_degree_as_the_margin_says(sizes: tuple[int, ...]) -> None:
    parameters = CkksParameters(poly_modulus_degree=8192, coeff_mod_bit_sizes=sizes, lsb_bits=19)
    assert float(noise(parameters, 12).std()) == pytest.approx(2 * STD[sizes], rel=0.05)


@pytest.mark.parametrize(("contributors", "value_bits"), [(5, 18), (3, 18), (100, 18), (100, 13)])
def test_the_noise_is_no_larger_under_the_largest_values(contributors: int, value_bits: int) -> None:
    """The encoder computes in float64: what it rounds must stay small beside the encryption's own noise."""
    parameters = parameters_for(contributors, value_bits)
    largest = 2 ** (parameters.field_bits - 1) - 1
    assumed = ckks_parameters._NOISE_STD_AT_4096[len(parameters.coeff_mod_bit_sizes)]
    assert float(noise(parameters, 6, largest).std()) < 1.05 * assumed


# --- packing and sums -----------------------------------------------------------------------------------------------


@given(hnp.arrays(np.int32, st.integers(1, CHUNK), elements=st.integers(-(2**19) + 1, 2**19 - 1)))
def test_unpacking_undoes_packing(grid: np.ndarray[Any, Any]) -> None:
    slots = ckks._pack(grid, PARAMETERS)
    again = unpack(np.stack([slots.real, slots.imag]).astype(np.int64), PARAMETERS)
    assert (again[: len(grid)] == grid).all()
    assert not again[len(grid) :].any()


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_any_length_opens_exactly(length: int) -> None:
    grid = np.random.default_rng(length).integers(-4095, 4096, length)
    assert (decrypt_sum(KEY, sealed(grid), dimension=length, largest=4095) == grid).all()


@pytest.mark.parametrize(
    ("sites", "value_bits"), [(3, 18), (3, 13), (8, 17), (16, 16), (16, 18), (64, 14), (128, 13), (5, 15)]
)
def test_encrypted_sums_equal_integer_sums(sites: int, value_bits: int) -> None:
    parameters = parameters_for(sites, value_bits)
    key, context = generate(parameters)
    chosen = round_plan(
        dimension=parameters.chunk_parameters + 50,
        max_contributors=sites,
        value_bits=value_bits,
        ckks=parameters,
        key_digest=context.digest,
    )
    high = np.full(chosen.dimension, chosen.levels, dtype=np.int32)
    alternating = high * (-1) ** np.arange(chosen.dimension, dtype=np.int32)
    some = np.random.default_rng(sites).integers(-chosen.levels, chosen.levels + 1, chosen.dimension, dtype=np.int32)
    for grid in (some, high, -high, alternating):
        total = CiphertextSum(parameters, chosen.dimension)
        for _ in range(sites):
            for number, words_2N in enumerate(encrypt(QuantizedUpdate(plan=chosen, grid=grid), context)):
                total.add(number, words_2N)
        opened = decrypt_sum(
            key,
            (words_of(chunk, parameters) for chunk in total.chunks()),
            dimension=chosen.dimension,
            largest=sites * chosen.levels,
        )
        assert (opened == sites * grid.astype(np.int64)).all()


def test_a_ciphertext_is_its_words_at_eight_bytes_a_parameter() -> None:
    chunks = sealed(np.random.default_rng(0).integers(-4095, 4096, 3 * CHUNK))
    for words_2N in chunks:
        assert words_2N.dtype == np.uint64
        assert words_2N.shape == (2, PARAMETERS.poly_modulus_degree)
        assert words_2N.nbytes == PARAMETERS.ciphertext_bytes
    assert sum(words_2N.nbytes for words_2N in chunks) == 8 * 3 * CHUNK


def test_equal_updates_have_unequal_ciphertexts() -> None:
    one, two = sealed(np.zeros(5))[0], sealed(np.zeros(5))[0]
    # Two random words of 60 bits are equal once in 10^18.
    assert not (one == two).any()


# --- encrypting refuses, and before it has made anything --------------------------------------------------------------


def test_encrypting_refuses_another_key_than_the_plans() -> None:
    _, other = generate(PARAMETERS)
    with pytest.raises(ProtocolError, match="nothing was encrypted"):
        encrypt(quantized(np.zeros(5)), other)


@pytest.mark.parametrize("grid", [[4096, 0, 0, 0, 0], [0, 0, 0, 0, -4096], [2**31 - 1] * 5, [0] * 4, [0] * 6])
def test_encrypting_refuses_values_off_the_grid_and_other_lengths(grid: list[int]) -> None:
    with pytest.raises(InvalidValue, match="grid"):
        encrypt(quantized(grid, dimension=5), CONTEXT)


def test_encrypting_refuses_a_sum_that_could_overflow() -> None:
    with pytest.raises(InvalidValue, match="value_bits"):
        encrypt(quantized(np.zeros(5), value_bits=14), CONTEXT)


# --- the public context -----------------------------------------------------------------------------------------------


def test_public_context_survives_its_bytes() -> None:
    again = PublicContext.from_bytes(CONTEXT.to_bytes())
    assert again == CONTEXT
    assert again.digest == CONTEXT.digest


def test_malformed_public_contexts_are_refused() -> None:
    raw = CONTEXT.to_bytes()
    (length,) = struct.unpack_from("<I", raw)
    header, key = raw[4 : 4 + length], raw[4 + length :]
    _, single = generate(CkksParameters(coeff_mod_bit_sizes=(60,)))
    weak, other = header.replace(b"[60,49]", b"[60,60]"), header.replace(b"[60,49]", b"[60]")
    assert header not in (weak, other)
    for bad in (
        b"",
        raw[:-1],
        raw + b"\x00",
        struct.pack("<I", length + 1) + header + b" " + key,
        struct.pack("<I", length) + weak + key,
        struct.pack("<I", len(other)) + other + key,
        struct.pack("<I", length) + header + single.public_key,
        struct.pack("<I", length) + header.replace(b'"lsb', b'"lsp') + key,
        struct.pack("<I", 2**32 - 1) + header + key,
        struct.pack("<I", 2) + b"[]" + key,
        struct.pack("<I", length) + header + key * 3,
        struct.pack("<I", length) + header + save_object(to_ciphertext(sealed([0])[0], PARAMETERS)),
    ):
        with pytest.raises(ProtocolError):
            PublicContext.from_bytes(bad)


# --- hostile keys: all that a site takes from its server in SEAL's own format -----------------------------------------


def seal_stream(body: bytes) -> bytes:
    """SEAL's 16-byte header (magic, size, version 4.3, no compression, total length) before a body."""
    return struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 0, 0, 16 + len(body)) + body


def forged() -> Callable[..., bytes]:
    """A builder of uncompressed key streams around the true public key, field by field: its form is a ciphertext's."""
    true = load_object(sealapi.PublicKey(), seal_context(PARAMETERS), CONTEXT.public_key)
    array = true.data().dyn_array()
    true_words = [array[index] for index in range(array.size())]
    true_id = true.parms_id()

    def build(
        *, parms_id=true_id, ntt=1, size=2, degree=4096, primes=2, scale=1.0, correction=1, words=None, count=None
    ) -> bytes:
        words = true_words if words is None else words(true_words)
        head = struct.pack("<4Q", *parms_id) + struct.pack("<BQQQdQ", ntt, size, degree, primes, scale, correction)
        length = struct.pack("<Q", len(words) if count is None else count)
        return seal_stream(head + seal_stream(length + struct.pack(f"<{len(words)}Q", *words)))

    return build


@pytest.mark.parametrize("scale", [1.0, 0.5, float("nan"), float("inf")])
def test_the_forger_of_these_tests_can_make_a_true_key_whose_scale_is_of_no_account(scale: float) -> None:
    context = PublicContext(parameters=PARAMETERS, public_key=forged()(scale=scale))
    chunks = list(encrypt_grid(np.arange(5, dtype=np.int32), context))
    assert (decrypt_sum(KEY, chunks, dimension=5, largest=9) == np.arange(5)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"ntt": 0},
        {"size": 1},
        {"size": 3},
        {"size": 2**60},
        {"degree": 8192},
        {"primes": 1},
        {"primes": 3},
        {"scale": 0.0},
        {"correction": 2},
        {"parms_id": (0, 0, 0, 0)},
        {"parms_id": (1, 2, 3, 4)},
        {"words": lambda words: [2**64 - 1] * 16384},
        {"words": lambda words: words[:8192]},
        {"words": lambda words: []},
        {"count": 2**40},
        {"count": 2**63},
        {"count": 16383},
    ],
    ids=lambda change: "-".join(change),
)
def test_forged_keys_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        PublicContext(parameters=PARAMETERS, public_key=forged()(**change))


def test_bytes_that_are_not_one_stream_are_refused() -> None:
    key = CONTEXT.public_key
    for bad in (b"", key[:16], key[:-1], key + b"\x00", bytes(100), bytes(2**17), key[:8] + bytes(8) + key[16:]):
        with pytest.raises(ProtocolError):
            load_object(sealapi.PublicKey(), seal_context(PARAMETERS), bad)


def test_true_ciphertexts_of_another_form_have_no_words() -> None:
    context = seal_context(PARAMETERS)
    encoder, evaluator = sealapi.CKKSEncoder(context), sealapi.Evaluator(context)
    encryptor = sealapi.Encryptor(context, ckks._load_public_key(PARAMETERS, CONTEXT.public_key))
    plaintext, right, wrong_scale, three, plain = (
        sealapi.Plaintext(),
        sealapi.Ciphertext(),
        sealapi.Ciphertext(),
        sealapi.Ciphertext(),
        sealapi.Ciphertext(),
    )
    encoder.encode([1.0], 2.0**PARAMETERS.lsb_bits, plaintext)
    encryptor.encrypt(plaintext, right)
    to_words(right, PARAMETERS)
    evaluator.transform_from_ntt(right, plain)
    encoder.encode([1.0], 2.0**18, plaintext)
    encryptor.encrypt(plaintext, wrong_scale)
    evaluator.multiply(wrong_scale, wrong_scale, three)
    larger = CkksParameters(poly_modulus_degree=8192)
    (foreign,) = encrypt_grid(np.zeros(5, dtype=np.int32), generate(larger)[1])
    for bad in (plain, wrong_scale, three, to_ciphertext(foreign, larger), sealapi.Ciphertext()):
        with pytest.raises(ProtocolError):
            to_words(bad, PARAMETERS)


# --- the secret half --------------------------------------------------------------------------------------------------


def test_a_secret_key_cannot_be_shown_copied_compared_or_hashed() -> None:
    assert repr(KEY) == str(KEY) == "SecretKey(<hidden>)"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy, hash, lambda key: key == KEY, lambda key: key != 1, vars):
        with pytest.raises(TypeError):
            attempt(KEY)


def test_another_key_opens_nothing() -> None:
    other, _ = generate(PARAMETERS)
    with pytest.raises(OpeningRefused):
        decrypt_sum(other, sealed(np.arange(5)), dimension=5, largest=100)


def test_a_total_out_of_range_opens_nothing() -> None:
    chunks = sealed([4095, 0, 0, 0, 0])
    assert decrypt_sum(KEY, chunks, dimension=5, largest=4095)[0] == 4095
    with pytest.raises(OpeningRefused):
        decrypt_sum(KEY, chunks, dimension=5, largest=4094)


def with_word(words_2N: Words, polynomial: int, value: int) -> Words:
    changed = words_2N.copy()
    changed[polynomial, 77] = value
    return changed


def test_one_bad_chunk_among_good_ones_opens_nothing_and_is_not_told_by_the_time() -> None:
    first, second, third = sealed(np.arange(3 * CHUNK) % 4096)
    other = sealed([1])[0]
    right = (first, second, third)
    assert decrypt_sum(KEY, right, dimension=3 * CHUNK, largest=4095).tolist() == [i % 4096 for i in range(3 * CHUNK)]
    for chunks in (
        (),
        right[:2],
        (*right, other),
        (np.zeros_like(first), second, third),
        (with_word(first, 0, PARAMETERS.modulus), second, third),
        (with_word(first, 1, 2**64 - 1), second, third),
        (with_word(first, 0, int(first[0, 77]) ^ 1), second, third),
        (first, second[:, :2048], third),
        (first, second[:1], third),
        (first, np.stack([second[0], np.zeros_like(second[1])]), third),
        (first, np.stack([second[0], other[1]]), third),
        (first, second, second[::-1]),
    ):
        taken = []

        def handed_over(chunks: tuple[Words, ...] = chunks, taken: list[Words] = taken) -> Iterator[Words]:
            for chunk in chunks:
                taken.append(chunk)
                yield chunk

        with pytest.raises(OpeningRefused):
            decrypt_sum(KEY, handed_over(), dimension=3 * CHUNK, largest=4095)
        assert len(taken) == len(chunks)


def encrypted_fraction(fraction: float) -> Words:
    context, plaintext, ciphertext = seal_context(PARAMETERS), sealapi.Plaintext(), sealapi.Ciphertext()
    sealapi.CKKSEncoder(context).encode([complex(7 + fraction, 0)] * 2048, 2.0**PARAMETERS.lsb_bits, plaintext)
    key = ckks._load_public_key(PARAMETERS, CONTEXT.public_key)
    sealapi.Encryptor(context, key).encrypt(plaintext, ciphertext)
    return to_words(ciphertext, PARAMETERS)


def test_a_residual_of_a_quarter_opens_nothing() -> None:
    assert (decrypt_sum(KEY, [encrypted_fraction(0.2)], dimension=2048, largest=7) == 7).all()
    for fraction in (0.3, 0.5, -0.3):
        with pytest.raises(OpeningRefused):
            decrypt_sum(KEY, [encrypted_fraction(fraction)], dimension=2048, largest=8)


def recovered_coefficients(published: np.ndarray[Any, Any], ciphertext: Any) -> int:
    """Key recovery from one published decryption (Li and Micciancio 2021): s = (m - c0) / c1, word by word mod q."""
    context, plaintext = seal_context(PARAMETERS), sealapi.Plaintext()
    sealapi.CKKSEncoder(context).encode(published.tolist(), 2.0**PARAMETERS.lsb_bits, plaintext)
    modulus = context.first_context_data().parms().coeff_modulus()[0].value()
    message, cipher, secret = plaintext.dyn_array(), ciphertext.dyn_array(), KEY._seal_key.data().dyn_array()
    degree, hits = PARAMETERS.poly_modulus_degree, 0
    for index in range(degree):
        guess = (message[index] - cipher[index]) * pow(cipher[degree + index], -1, modulus) % modulus
        hits += guess == secret[index]
    return hits


def test_key_recovery_works_on_raw_floats_and_fails_on_what_we_publish() -> None:
    # Small values in the low field only: the float64 decoding is then exact, as in float CKKS set-ups.
    grid = np.zeros(CHUNK, dtype=np.int64)
    grid[: CHUNK // 2] = np.random.default_rng(3).integers(-100, 101, CHUNK // 2)
    total = CiphertextSum(PARAMETERS, CHUNK)
    for _ in range(3):
        total.add(0, sealed(grid)[0])
    chunks = [words_of(chunk, PARAMETERS) for chunk in total.chunks()]
    ciphertext, plaintext = to_ciphertext(chunks[0], PARAMETERS), sealapi.Plaintext()
    sealapi.Decryptor(seal_context(PARAMETERS), KEY._seal_key).decrypt(ciphertext, plaintext)
    raw = np.asarray(sealapi.CKKSEncoder(seal_context(PARAMETERS)).decode_complex(plaintext))
    assert recovered_coefficients(raw, ciphertext) == PARAMETERS.poly_modulus_degree
    ours = decrypt_sum(KEY, chunks, dimension=CHUNK, largest=300)
    assert (ours == 3 * grid).all()
    assert recovered_coefficients(ckks._pack(ours, PARAMETERS), ciphertext) == 0


def test_decryption_gives_integers_only() -> None:
    assert decrypt_sum(KEY, sealed(np.arange(5)), dimension=5, largest=9).dtype == np.int64


def test_without_memfd_a_temporary_file_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    grid = np.arange(5)
    assert (decrypt_sum(KEY, sealed(grid), dimension=5, largest=9) == grid).all()
    with pytest.raises(ProtocolError):
        PublicContext(parameters=PARAMETERS, public_key=b"\x00" * 100)
    assert list(tmp_path.iterdir()) == []


def test_no_file_descriptor_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    decrypt_sum(KEY, sealed(np.arange(5)), dimension=5, largest=9)
    with pytest.raises(ProtocolError):
        PublicContext(parameters=PARAMETERS, public_key=CONTEXT.public_key[:-1])
    assert len(os.listdir("/proc/self/fd")) == before


# --- who imports what -------------------------------------------------------------------------------------------------


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_tenseal_is_in_two_modules_and_the_secret_half_in_one() -> None:
    sources = Path(next(iter(fedcollm_privacy.__path__))).glob("*.py")
    imports = {source.stem: imports_of(source) for source in sources}
    with_tenseal = {name for name, found in imports.items() if any(word.startswith("tenseal") for word in found)}
    with_secret = {name for name, found in imports.items() if "fedcollm_privacy.ckks_secret" in found}
    assert with_tenseal == {"ckks", "ckks_secret"}
    assert with_secret == {"decryptor"}


def test_the_public_half_has_no_way_to_a_secret_key() -> None:
    source = Path(str(ckks.__file__)).read_text()
    for word in ("KeyGenerator", "Decryptor(", "SecretKey(", "decode_complex"):
        assert word not in source
    assert SecretKey.__module__ == "fedcollm_privacy.ckks_secret"
