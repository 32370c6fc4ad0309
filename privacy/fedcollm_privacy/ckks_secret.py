"""The secret half of CKKS: key generation and decryption to integers. Only the decryptor imports this.

A CKKS decryption is the exact result plus noise that depends on the secret key: whoever sees the raw floats of one
ciphertext can compute the key (Li and Micciancio 2021, Eurocrypt). So the rounding happens here, in the function that
decrypts, and what leaves is the exact integer sum, which carries no noise, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

from fedcollm_privacy.ckks import (
    CkksParameters,
    PublicContext,
    Words,
    save_object,
    seal_context,
    to_ciphertext,
    unpack,
)
from fedcollm_privacy.ckks_parameters import RESIDUAL_LIMIT
from fedcollm_privacy.errors import OpeningRefused, ProtocolError

__all__ = ["SecretKey", "decrypt_sum", "generate"]


class SecretKey:
    """A round's CKKS secret key: cannot be shown, pickled, copied, compared or saved.

    Python cannot promise that memory is wiped; SEAL overwrites its own copy when the last reference goes.
    """

    __slots__ = ("_seal_key", "parameters")

    def __init__(self, seal_key: Any, parameters: CkksParameters) -> None:
        self._seal_key = seal_key
        self.parameters = parameters

    def __repr__(self) -> str:
        return "SecretKey(<hidden>)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a SecretKey is not serialisable")

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("a SecretKey is not comparable")

    __hash__ = None  # type: ignore[assignment]


def generate(parameters: CkksParameters) -> tuple[SecretKey, PublicContext]:
    """A fresh key pair from the operating system's randomness (SEAL seeds its generator there)."""
    seal_ctx = seal_context(parameters)
    generator = sealapi.KeyGenerator(seal_ctx)
    public_key = sealapi.PublicKey()
    generator.create_public_key(public_key)
    secret = SecretKey(generator.secret_key(), parameters)
    return secret, PublicContext(parameters=parameters, public_key=save_object(public_key))


def decrypt_sum(key: SecretKey, chunks: Iterable[Words], *, dimension: int, largest: int) -> NDArray[np.int64]:
    """The exact integer sum, int64 [dimension].

    Args:
        key: the round's key.
        chunks: the sum's ciphertexts, uint64 [2, N] each, without masks; taken one at a time.
        dimension: number of coordinates d; padding after them is dropped.
        largest: no coordinate's magnitude may exceed this.

    Raises:
        OpeningRefused: malformed or too few or many ciphertexts, a number `RESIDUAL_LIMIT` or more away from an
            integer (another key, a mask left on, a changed ciphertext), or a coordinate out of range. Always the same
            text.
    """
    parameters = key.parameters
    count, size = parameters.chunk_count(dimension), parameters.chunk_parameters
    seal_ctx = seal_context(parameters)
    decryptor, encoder = sealapi.Decryptor(seal_ctx, key._seal_key), sealapi.CKKSEncoder(seal_ctx)
    total, opened, sound = np.zeros(count * size, dtype=np.int64), 0, True
    # The verdict falls after the last chunk, so that the time to a refusal does not tell which chunk was refused.
    for chunk in chunks:
        plaintext = sealapi.Plaintext()
        try:
            decryptor.decrypt(to_ciphertext(chunk, parameters), plaintext)
            slots = np.asarray(encoder.decode_complex(plaintext))
            rounded_2S = _round_or_refuse(np.stack([slots.real, slots.imag]), parameters)
        except ProtocolError:
            rounded_2S, sound = np.zeros((2, parameters.slots), dtype=np.int64), False
        if opened < count:
            total[opened * size : (opened + 1) * size] = unpack(rounded_2S, parameters)
        opened += 1
    total = total[:dimension]
    if not sound or opened != count or max(int(total.max()), -int(total.min())) > largest:
        raise OpeningRefused
    return total


def _round_or_refuse(decrypted_2S: NDArray[np.float64], parameters: CkksParameters) -> NDArray[np.int64]:
    rounded_2S = np.rint(decrypted_2S)
    in_range = np.abs(rounded_2S).max() < 2.0 ** (parameters.fields * parameters.field_bits - 1)
    exact = np.abs(decrypted_2S - rounded_2S).max() < RESIDUAL_LIMIT
    if not (in_range and exact):
        raise OpeningRefused
    return rounded_2S.astype(np.int64)
