"""Ciphertexts as words: their sum is SEAL's own, bit for bit, and it can be taken back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tenseal import sealapi

import fedcollm_privacy
from fedcollm_privacy import ckks
from fedcollm_privacy.ciphertext_sum import CiphertextSum, words_of
from fedcollm_privacy.ckks import CkksParameters, Words, parameters_for, seal_context, to_ciphertext, to_words
from fedcollm_privacy.ckks_secret import generate
from fedcollm_privacy.errors import InvalidValue, ProtocolError

PARAMETERS = parameters_for(10, 13)
DEGREE, MODULUS = PARAMETERS.poly_modulus_degree, PARAMETERS.modulus
FORMS = [
    PARAMETERS,
    CkksParameters(),
    parameters_for(100, 18),
    CkksParameters(poly_modulus_degree=8192),
    CkksParameters(poly_modulus_degree=16384, coeff_mod_bit_sizes=(60,)),
]
PACKAGE_PARENT = str(Path(next(iter(fedcollm_privacy.__path__))).parent)


def random_words(parameters: CkksParameters, rng: np.random.Generator) -> Words:
    """Any ciphertext: uniform words, the extremes among them."""
    words_2N = rng.integers(0, parameters.modulus, (2, parameters.poly_modulus_degree), dtype=np.uint64)
    places = rng.integers(0, parameters.poly_modulus_degree, (2, 100))
    words_2N[:, places[0]], words_2N[:, places[1]] = parameters.modulus - 1, 0
    return words_2N


def in_seal(ciphertext: Any) -> list[int]:
    """SEAL's own view of the words, through its binding and not through its stream."""
    array = ciphertext.dyn_array()
    return [array[index] for index in range(array.size())]


def summed(*uploads: Words, parameters: CkksParameters = PARAMETERS) -> CiphertextSum:
    total = CiphertextSum(parameters, 1)
    for words_2N in uploads:
        total.add(0, words_2N)
    return total


@pytest.mark.parametrize("parameters", FORMS, ids=lambda p: f"{p.poly_modulus_degree}-{p.coeff_mod_bit_sizes}")
def test_the_sum_of_words_is_seals_sum_bit_for_bit(parameters: CkksParameters) -> None:
    rng = np.random.default_rng(1)
    evaluator, uploads = sealapi.Evaluator(seal_context(parameters)), [random_words(parameters, rng) for _ in range(5)]
    theirs = to_ciphertext(uploads[0], parameters)
    for words_2N in uploads[1:]:
        evaluator.add_inplace(theirs, to_ciphertext(words_2N, parameters))
    (ours,) = summed(*uploads, parameters=parameters).chunks()
    assert np.frombuffer(ours, dtype="<u8").tolist() == in_seal(theirs)
    for words_2N in uploads[1:]:
        evaluator.sub_inplace(theirs, to_ciphertext(words_2N, parameters))
    assert in_seal(theirs) == uploads[0].reshape(-1).tolist()


@pytest.mark.parametrize("parameters", FORMS, ids=lambda p: f"{p.poly_modulus_degree}-{p.coeff_mod_bit_sizes}")
def test_words_are_those_that_seal_encrypted_and_go_back_to_what_it_decrypts(parameters: CkksParameters) -> None:
    key, context = generate(parameters)
    seal_ctx, plaintext, again = seal_context(parameters), sealapi.Plaintext(), sealapi.Plaintext()
    encrypted = sealapi.Ciphertext()
    slots = np.random.default_rng(2).integers(-4095, 4096, parameters.slots) * (1 + 0.5j)
    sealapi.CKKSEncoder(seal_ctx).encode(slots.tolist(), 2.0**parameters.lsb_bits, plaintext)
    public = ckks._load_public_key(parameters, context.public_key)
    sealapi.Encryptor(seal_ctx, public).encrypt(plaintext, encrypted)
    words_2N = to_words(encrypted, parameters)
    assert words_2N.reshape(-1).tolist() == in_seal(encrypted)
    assert int(words_2N.max()) < parameters.modulus
    back = to_ciphertext(words_2N, parameters)
    for ours, theirs in ((back.scale, encrypted.scale), (back.parms_id(), encrypted.parms_id())):
        assert ours == theirs
    assert back.is_ntt_form()
    decryptor = sealapi.Decryptor(seal_ctx, key._seal_key)
    decryptor.decrypt(encrypted, plaintext)
    decryptor.decrypt(back, again)
    decoded = np.asarray(sealapi.CKKSEncoder(seal_ctx).decode_complex(again))
    assert (decoded == np.asarray(sealapi.CKKSEncoder(seal_ctx).decode_complex(plaintext))).all()
    # Far from any other message, also where the noise of a large N would not leave integers exact.
    assert np.abs(decoded - slots).max() < 1


def test_seal_too_refuses_words_that_are_not_below_the_modulus() -> None:
    for value in (MODULUS, 2**63, 2**64 - 1):
        words_2N = random_words(PARAMETERS, np.random.default_rng(3))
        words_2N[1, 5] = value
        with pytest.raises(ProtocolError):
            to_ciphertext(words_2N, PARAMETERS)
    transparent = random_words(PARAMETERS, np.random.default_rng(3))
    transparent[1] = 0
    with pytest.raises(ProtocolError, match="transparent"):
        to_ciphertext(transparent, PARAMETERS)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=8), st.randoms(use_true_random=False))
def test_taking_back_restores_the_sum_in_any_order(steps: list[tuple[int, int]], random: Any) -> None:
    """Some uploads stay; chunks of others are added and, in another order, taken back."""
    pool = [random_words(PARAMETERS, np.random.default_rng(seed)) for seed in range(4)]
    total = CiphertextSum(PARAMETERS, 3 * PARAMETERS.chunk_parameters)
    for chunk in range(3):
        total.add(chunk, pool[chunk])
    before = list(total.chunks())
    for chunk, which in steps:
        total.add(chunk, pool[which])
    back = list(steps)
    random.shuffle(back)
    for chunk, which in back:
        total.take_back(chunk, pool[which])
    assert list(total.chunks()) == before
    assert before == [pool[chunk].tobytes() for chunk in range(3)]


def test_a_sum_that_begins_with_taking_back_comes_out_right_too() -> None:
    one, two = (random_words(PARAMETERS, np.random.default_rng(seed)) for seed in (5, 6))
    total = CiphertextSum(PARAMETERS, 1)
    total.take_back(0, one)
    total.add(0, two)
    total.add(0, one)
    assert list(total.chunks()) == [two.tobytes()]


def test_a_sum_holds_one_upload_whatever_the_number_of_sites() -> None:
    total = CiphertextSum(PARAMETERS, 5 * PARAMETERS.chunk_parameters - 3)
    chunks = list(total.chunks())
    assert [len(chunk) for chunk in chunks] == [PARAMETERS.ciphertext_bytes] * 5
    assert not any(any(chunk) for chunk in chunks)
    assert total._total_C2N.nbytes == 5 * PARAMETERS.ciphertext_bytes


def raw(words_2N: Words) -> bytes:
    return words_2N.astype("<u8").tobytes()


def test_words_come_from_their_bytes_read_only() -> None:
    words_2N = random_words(PARAMETERS, np.random.default_rng(7))
    again = words_of(raw(words_2N), PARAMETERS)
    assert (again == words_2N).all()
    with pytest.raises(ValueError, match="read-only"):
        again[0, 0] = 1


@pytest.mark.parametrize("length", [0, -1, -8, 8, 1, 2**20])
def test_another_length_is_refused(length: int) -> None:
    true = raw(random_words(PARAMETERS, np.random.default_rng(7)))
    bad = true[:length] if length <= 0 else true + bytes(length)
    with pytest.raises(ProtocolError, match=f"allowed: {PARAMETERS.ciphertext_bytes}"):
        words_of(bad, PARAMETERS)


def test_a_ciphertext_of_another_degree_is_refused() -> None:
    larger = CkksParameters(poly_modulus_degree=8192)
    with pytest.raises(ProtocolError, match="allowed"):
        words_of(raw(random_words(larger, np.random.default_rng(7))), PARAMETERS)


@pytest.mark.parametrize("value", [MODULUS, MODULUS + 1, 2**60, 2**63, 2**64 - 1])
@pytest.mark.parametrize("place", [(0, 0), (0, DEGREE - 1), (1, 0), (1, DEGREE - 1), (1, 1234)])
def test_a_word_that_is_not_below_the_modulus_is_refused(value: int, place: tuple[int, int]) -> None:
    words_2N = random_words(PARAMETERS, np.random.default_rng(7))
    words_2N[place] = MODULUS - 1
    words_of(raw(words_2N), PARAMETERS)
    words_2N[place] = value
    with pytest.raises(ProtocolError, match="not below the modulus"):
        words_of(raw(words_2N), PARAMETERS)


def test_a_ciphertext_that_hides_nothing_is_refused() -> None:
    words_2N = random_words(PARAMETERS, np.random.default_rng(7))
    words_2N[1] = 0
    with pytest.raises(ProtocolError, match="transparent"):
        words_of(raw(words_2N), PARAMETERS)
    words_2N[1, 99] = 1
    words_of(raw(words_2N), PARAMETERS)
    words_2N[0] = 0  # c0 alone may be anything: it is masked
    words_of(raw(words_2N), PARAMETERS)


def test_words_that_were_not_checked_do_not_reach_the_sum() -> None:
    total = summed(random_words(PARAMETERS, np.random.default_rng(8)))
    before = list(total.chunks())
    beyond = np.full((2, DEGREE), MODULUS, dtype=np.uint64)
    for bad in (beyond, beyond[:, 1:] - 1, (beyond - 1).astype(np.int64)):
        for change in (total.add, total.take_back):
            with pytest.raises((InvalidValue, ValueError)):
                change(0, bad)
    assert list(total.chunks()) == before


def test_the_process_that_adds_knows_neither_seal_nor_torch_nor_a_secret_half() -> None:
    program = (
        "import sys; sys.path.append(sys.argv[1]); import fedcollm_privacy.aggregator_process; "
        "print(*sorted({name.split('.')[0] for name in sys.modules})); "
        "print(*sorted(name for name in sys.modules if name.startswith('fedcollm_privacy')))"
    )
    finished = subprocess.run(
        [sys.executable, "-I", "-c", program, PACKAGE_PARENT], capture_output=True, text=True, check=True, timeout=60
    )
    libraries, modules = (set(line.split()) for line in finished.stdout.splitlines())
    assert "numpy" in libraries
    assert not libraries & {"tenseal", "torch", "zstandard", "Crypto", "sqlite3"}
    for secret in ("ckks", "ckks_secret", "decryptor", "contributor", "peer_shares", "shares", "coordinator"):
        assert f"fedcollm_privacy.{secret}" not in modules
