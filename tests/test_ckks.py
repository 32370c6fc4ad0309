"""CKKS: parameters by proof, hostile ciphertexts refused, integers out of the decryptor and never floats."""

from __future__ import annotations

import ast
import copy
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tenseal import sealapi

import fedcollm_privacy
from fedcollm_privacy import ckks
from fedcollm_privacy.ckks import (
    CiphertextSum,
    CkksParameters,
    PublicContext,
    load_ciphertext,
    parameters_for,
    save_object,
    seal,
    seal_context,
    unpack,
)
from fedcollm_privacy.ckks_secret import SecretKey, decrypt_sum, generate
from fedcollm_privacy.errors import InvalidValue, OpeningRefused, ProtocolError
from fedcollm_privacy.messages import QuantizedUpdate, RoundPlan

PARAMETERS = CkksParameters()
KEY, CONTEXT = generate(PARAMETERS)
CHUNK = PARAMETERS.chunk_parameters


def plan(**changes: Any) -> RoundPlan:
    fields: dict[str, Any] = {
        "run_id": "r",
        "server_round": 1,
        "attempt": 1,
        "spec_digest": "",
        "dimension": 5,
        "clip": 1.0,
        "value_bits": 13,
        "min_contributors": 3,
        "max_contributors": 100,
        "key_digest": CONTEXT.digest,
        "nonce": "",
    }
    return RoundPlan(**(fields | changes))


def sealed(grid: np.ndarray[Any, Any]) -> tuple[bytes, ...]:
    chosen = plan(dimension=len(grid))
    return seal(QuantizedUpdate(plan=chosen, grid=grid), CONTEXT, "a").chunks


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [4096, 8192, 16384, 32768])
def test_security_table_is_seals(degree: int) -> None:
    allowed = sealapi.CoeffModulus.MaxBitCount(degree, sealapi.SEC_LEVEL_TYPE.TC128)
    special = min(60, allowed - 60)
    CkksParameters(poly_modulus_degree=degree, coeff_mod_bit_sizes=(60, special))
    if special < 60:
        with pytest.raises(InvalidValue, match="128-bit"):
            CkksParameters(poly_modulus_degree=degree, coeff_mod_bit_sizes=(60, special + 1))


@given(st.integers(1, 3000), st.integers(2, 20))
def test_proven_sums_fit_their_field_and_the_modulus(contributors: int, value_bits: int) -> None:
    try:
        parameters = parameters_for(contributors, value_bits)
    except InvalidValue:
        parameters = None
    if parameters is None:
        # Refusals are not lazy: what fits twice over, at a number of sites that the noise allows, is accepted.
        assert contributors > 128 or 2 * contributors * 2 ** (value_bits - 1) > 2**19
        return
    worst = contributors * (2 ** (value_bits - 1) - 1)
    assert worst < 2 ** (parameters.field_bits - 1)
    packed = worst + worst * 2**parameters.field_bits
    modulus = seal_context(parameters).first_context_data().parms().coeff_modulus()[0].value()
    # sqrt(2): real and imaginary part at their worst together.
    assert 2**0.5 * packed * 2**parameters.lsb_bits + 2**20 < modulus / 2
    assert parameters.margin(contributors) >= 16


def test_a_hundred_sites_at_thirteen_bits_are_proven() -> None:
    assert parameters_for(100, 13) == CkksParameters()
    assert parameters_for(128, 13) == CkksParameters()


@pytest.mark.parametrize(("contributors", "value_bits", "says"), [(129, 13, "at most 12"), (5000, 4, "deviations")])
def test_refused_parameters_say_what_to_change(contributors: int, value_bits: int, says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        parameters_for(contributors, value_bits)


@pytest.mark.parametrize(
    "changes",
    [
        {"poly_modulus_degree": 2048},
        {"coeff_mod_bit_sizes": (60, 50)},
        {"coeff_mod_bit_sizes": (60,)},
        {"coeff_mod_bit_sizes": (40, 30, 30)},
        {"lsb_bits": 20},
        {"field_bits": 21},
        {"fields": 3},
        {"fields": 0},
        {"field_bits": 20.0},
        {"lsb_bits": True},
    ],
)
def test_parameters_outside_the_proof_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        CkksParameters(**changes)


# --- packing and sums -----------------------------------------------------------------------------------------------


@given(hnp.arrays(np.int64, st.integers(1, CHUNK), elements=st.integers(-(2**19) + 1, 2**19 - 1)))
def test_unpacking_undoes_packing(grid: np.ndarray[Any, Any]) -> None:
    slots = ckks._pack(grid, PARAMETERS)
    again = unpack(np.stack([slots.real, slots.imag]).astype(np.int64), PARAMETERS)
    assert (again[: len(grid)] == grid).all()
    assert not again[len(grid) :].any()


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_any_length_opens_exactly(length: int) -> None:
    grid = np.random.default_rng(length).integers(-4095, 4096, length)
    assert (decrypt_sum(KEY, sealed(grid), dimension=length, largest=4095) == grid).all()


def test_noise_is_what_the_margin_assumes() -> None:
    # Straight from SEAL, not through our rounding: the residual of 24 fresh encryptions of zero.
    decryptor, encoder = (
        sealapi.Decryptor(seal_context(PARAMETERS), KEY._seal_key),
        sealapi.CKKSEncoder(seal_context(PARAMETERS)),
    )
    residuals = []
    for _ in range(24):
        plaintext = sealapi.Plaintext()
        decryptor.decrypt(load_ciphertext(sealed(np.zeros(5, dtype=np.int64))[0], PARAMETERS), plaintext)
        slots = np.asarray(encoder.decode_complex(plaintext))
        residuals += [slots.real, slots.imag]
    std = float(np.std(residuals)) * 2**PARAMETERS.lsb_bits
    assert 2**9.2 < std < 2**9.5
    assert 0.25 * 2**PARAMETERS.lsb_bits / (std * 128**0.5) > 15.5


def test_eight_bytes_a_parameter() -> None:
    grid = np.random.default_rng(0).integers(-4095, 4096, 32 * CHUNK)
    assert sum(map(len, sealed(grid))) / len(grid) <= 8.1


def test_equal_updates_have_unequal_ciphertexts() -> None:
    grid = np.zeros(5, dtype=np.int64)
    assert sealed(grid) != sealed(grid)


def test_a_bad_chunk_leaves_the_running_sum_as_it_was() -> None:
    grid = np.arange(CHUNK + 5) % 4096
    total = CiphertextSum(PARAMETERS, len(grid))
    total.add(sealed(grid))
    good, bad = sealed(grid), b"\x00" * 200
    for upload in ((good[0], bad), good[:1], (*good, good[0]), ()):
        with pytest.raises(ProtocolError):
            total.add(upload)
    total.add(good)
    assert (decrypt_sum(KEY, tuple(total.chunks()), dimension=len(grid), largest=9000) == 2 * grid).all()


# --- sealing refuses ------------------------------------------------------------------------------------------------


def test_sealing_refuses_another_key_than_the_plans() -> None:
    _, other = generate(PARAMETERS)
    update = QuantizedUpdate(plan=plan(), grid=np.zeros(5, dtype=np.int64))
    with pytest.raises(ProtocolError, match="nothing was encrypted"):
        seal(update, other, "a")


@pytest.mark.parametrize("grid", [[4096, 0, 0, 0, 0], [-4096, 0, 0, 0, 0], [0] * 4, [0] * 6])
def test_sealing_refuses_values_off_the_grid_and_other_lengths(grid: list[int]) -> None:
    update = QuantizedUpdate(plan=plan(), grid=np.array(grid, dtype=np.int64))
    with pytest.raises(InvalidValue, match="grid"):
        seal(update, CONTEXT, "a")


def test_sealing_refuses_a_sum_that_could_overflow() -> None:
    update = QuantizedUpdate(plan=plan(value_bits=14), grid=np.zeros(5, dtype=np.int64))
    with pytest.raises(InvalidValue, match="value_bits"):
        seal(update, CONTEXT, "a")


# --- the public context -----------------------------------------------------------------------------------------------


def test_public_context_survives_its_bytes() -> None:
    again = PublicContext.from_bytes(CONTEXT.to_bytes())
    assert again == CONTEXT
    assert again.digest == CONTEXT.digest


def test_malformed_public_contexts_are_refused() -> None:
    raw = CONTEXT.to_bytes()
    (length,) = struct.unpack_from("<I", raw)
    header, key = raw[4 : 4 + length], raw[4 + length :]
    weak = header.replace(b"[60,49]", b"[60,60]")
    assert weak != header
    for bad in (
        b"",
        raw[:-1],
        raw + b"\x00",
        struct.pack("<I", length + 1) + header + b" " + key,
        struct.pack("<I", length) + weak + key,
        struct.pack("<I", length) + header.replace(b'"lsb', b'"lsp') + key,
        struct.pack("<I", 2**32 - 1) + header + key,
        struct.pack("<I", 2) + b"[]" + key,
        struct.pack("<I", length) + header + key * 3,
        struct.pack("<I", length) + header + sealed(np.zeros(1, dtype=np.int64))[0],
    ):
        with pytest.raises(ProtocolError):
            PublicContext.from_bytes(bad)


# --- hostile ciphertexts ----------------------------------------------------------------------------------------------


def seal_stream(body: bytes) -> bytes:
    """SEAL's 16-byte header (magic, size, version 4.3, no compression, total length) before a body."""
    return struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 0, 0, 16 + len(body)) + body


def forged() -> Callable[..., bytes]:
    """A builder of uncompressed ciphertext streams around one true ciphertext, field by field."""
    true = load_ciphertext(sealed(np.arange(5))[0], PARAMETERS)
    array = true.dyn_array()
    true_words = [array[index] for index in range(array.size())]
    true_id = true.parms_id()

    def build(
        *, parms_id=true_id, ntt=1, size=2, degree=4096, primes=1, scale=2.0**19, correction=1, words=None, count=None
    ) -> bytes:
        words = true_words if words is None else words(true_words)
        head = struct.pack("<4Q", *parms_id) + struct.pack("<BQQQdQ", ntt, size, degree, primes, scale, correction)
        length = struct.pack("<Q", len(words) if count is None else count)
        return seal_stream(head + seal_stream(length + struct.pack(f"<{len(words)}Q", *words)))

    return build


def test_the_forger_of_these_tests_can_make_a_true_ciphertext() -> None:
    assert (decrypt_sum(KEY, [forged()()], dimension=5, largest=9) == np.arange(5)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"ntt": 0},
        {"size": 1},
        {"size": 3},
        {"size": 2**60},
        {"degree": 8192},
        {"primes": 2},
        {"scale": 2.0**18},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"scale": 0.0},
        {"correction": 2},
        {"parms_id": (0, 0, 0, 0)},
        {"parms_id": (1, 2, 3, 4)},
        {"words": lambda words: words[:4096] + [0] * 4096},
        {"words": lambda words: [0] * 8192},
        {"words": lambda words: [2**64 - 1] * 8192},
        {"words": lambda words: words[:4096]},
        {"words": lambda words: []},
        {"count": 2**40},
        {"count": 2**63},
        {"count": 8191},
    ],
    ids=str,
)
def test_forged_ciphertexts_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        load_ciphertext(forged()(**change), PARAMETERS)


def test_true_ciphertexts_of_another_form_are_refused() -> None:
    context = seal_context(PARAMETERS)
    encoder, evaluator = sealapi.CKKSEncoder(context), sealapi.Evaluator(context)
    encryptor = sealapi.Encryptor(context, ckks._load_public_key(PARAMETERS, CONTEXT.public_key))
    plaintext, wrong_scale, three = sealapi.Plaintext(), sealapi.Ciphertext(), sealapi.Ciphertext()
    encoder.encode([1.0], 2.0**18, plaintext)
    encryptor.encrypt(plaintext, wrong_scale)
    evaluator.multiply(wrong_scale, wrong_scale, three)
    larger = CkksParameters(poly_modulus_degree=8192)
    _, other = generate(larger)
    smaller = plan(key_digest=other.digest, max_contributors=3)
    update = QuantizedUpdate(plan=smaller, grid=np.zeros(5, dtype=np.int64))
    true = sealed(np.zeros(5, dtype=np.int64))[0]
    for bad in (
        save_object(wrong_scale),
        save_object(three),
        seal(update, other, "a").chunks[0],
        CONTEXT.public_key,
        true + b"\x00",
        true[:-1],
        true[:16],
        b"",
        bytes(2**20),
    ):
        with pytest.raises(ProtocolError):
            load_ciphertext(bad, PARAMETERS)


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
    chunks = sealed(np.array([4095, 0, 0, 0, 0]))
    assert decrypt_sum(KEY, chunks, dimension=5, largest=4095)[0] == 4095
    with pytest.raises(OpeningRefused):
        decrypt_sum(KEY, chunks, dimension=5, largest=4094)


def encrypted_fraction(fraction: float) -> bytes:
    context, plaintext, ciphertext = seal_context(PARAMETERS), sealapi.Plaintext(), sealapi.Ciphertext()
    sealapi.CKKSEncoder(context).encode([complex(7 + fraction, 0)] * 2048, 2.0**PARAMETERS.lsb_bits, plaintext)
    key = ckks._load_public_key(PARAMETERS, CONTEXT.public_key)
    sealapi.Encryptor(context, key).encrypt(plaintext, ciphertext)
    return save_object(ciphertext)


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
        total.add(sealed(grid))
    chunks = tuple(total.chunks())
    ciphertext, plaintext = load_ciphertext(chunks[0], PARAMETERS), sealapi.Plaintext()
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
        load_ciphertext(b"\x00" * 100, PARAMETERS)
    assert list(tmp_path.iterdir()) == []


def test_no_file_descriptor_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    decrypt_sum(KEY, sealed(np.arange(5)), dimension=5, largest=9)
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
