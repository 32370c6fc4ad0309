"""Adding ciphertexts without any cryptography library and without a key: what the aggregator's process runs.

On the wire a ciphertext is its words and nothing else: two polynomials of N 64-bit little-endian words below q, in NTT
form. Scale, level, form and parameters belong to the round's plan and cannot be forged in an upload, and no parser of
SEAL ever sees a stranger's byte. The sum of CKKS ciphertexts is the sum of their words modulo q (Cheon et al. 2017,
section 3.3), here bit for bit what SEAL's evaluator gives (tests/test_ciphertext_sum.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.ckks_parameters import CkksParameters
from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.masks import add_mod, subtract_mod

__all__ = ["CiphertextSum", "words_of"]

Words = NDArray[np.uint64]


def words_of(data: bytes, parameters: CkksParameters) -> Words:
    """The words of one ciphertext, uint64 [2, N], read-only, from untrusted bytes.

    Raises:
        ProtocolError: another length, a word not below q, or a transparent ciphertext (c1 = 0: its message lies open).
    """
    if len(data) != parameters.ciphertext_bytes:
        raise ProtocolError(f"a ciphertext of {len(data)} bytes; allowed: {parameters.ciphertext_bytes}")
    words_2N = np.frombuffer(data, dtype="<u8").reshape(2, parameters.poly_modulus_degree)
    if int(words_2N.max()) >= parameters.modulus:
        raise ProtocolError("a ciphertext with a word that is not below the modulus")
    if not words_2N[1].any():
        raise ProtocolError("a transparent ciphertext: it hides nothing")
    return words_2N


class CiphertextSum:
    """A running sum of uploads, chunk by chunk. Memory: the words of one upload, whatever the number of uploads."""

    def __init__(self, parameters: CkksParameters, dimension: int) -> None:
        self._parameters = parameters
        shape = (parameters.chunk_count(dimension), 2, parameters.poly_modulus_degree)
        self._total_C2N = np.zeros(shape, dtype=np.uint64)

    def add(self, chunk: int, words_2N: Words) -> None:
        """Add one upload's ciphertext ``chunk``."""
        self._total_C2N[chunk] = add_mod(self._total_C2N[chunk], words_2N, self._parameters.modulus)

    def take_back(self, chunk: int, words_2N: Words) -> None:
        """Undo one `add` exactly."""
        self._total_C2N[chunk] = subtract_mod(self._total_C2N[chunk], words_2N, self._parameters.modulus)

    def chunks(self) -> Iterator[bytes]:
        """The sum's ciphertexts."""
        for total_2N in self._total_C2N:
            yield total_2N.astype("<u8", copy=False).tobytes()
