"""Secret randomness for sampling and noise: AES-256-CTR keyed by the operating system.

Opacus' secure mode needs a library that no current torch can load, and torch's own generator gives two sites with
one seed the same noise. So the keystream comes from `cryptography`, keyed afresh for every site and round.

Against attacks on the floating-point representation of Gaussian samples (Mironov 2012; Holohan and Braghin 2021) the
noise is rounded to the lattice of the sums it is added to (`dp_sgd`): what leaves is an integer, whatever the data.
What remains of float64: no draw is beyond 8.58 standard deviations (an ideal one would be with probability 1e-17).
"""

from __future__ import annotations

import hashlib
import math
import os
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedcollm_privacy.errors import InvalidValue

__all__ = ["SecureRandom"]


class SecureRandom:
    """A stream of secret random numbers.

    Each instance has its own 256-bit key from the operating system, so streams of two sites or rounds are unrelated.

    Attributes:
        seeded: whether this is the repeatable stream of a test, which protects nobody.
    """

    __slots__ = ("_stream", "seeded")

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
        self.seeded = False

    @classmethod
    def insecure_for_tests(cls, seed: int, purpose: str) -> SecureRandom:
        """A repeatable stream, a function of its arguments. What it touches is NOT PRIVATE, as plan and outputs say."""
        random = cls()
        key = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
        random._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        random.seeded = True
        return random

    def __repr__(self) -> str:
        return "SecureRandom(INSECURE TEST SEED)" if self.seeded else "SecureRandom(<hidden>)"

    def _integers_53(self, count: int) -> NDArray[np.uint64]:
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        return words >> np.uint64(11)

    def poisson_mask(self, rate: Fraction, count: int) -> NDArray[np.bool_]:
        """Independent coins, bool [count], each true with probability floor(rate * 2^53) / 2^53.

        Rounding the rate down can only strengthen the guarantee that is accounted at ``rate``.

        Raises:
            InvalidValue: rate is not in (0, 1].
        """
        if not 0 < rate <= 1:
            raise InvalidValue("sample_rate", rate, "a rational in (0, 1]")
        threshold = math.floor(rate * 2**53)
        return self._integers_53(count) < np.uint64(threshold)

    def normals(self, count: int) -> NDArray[np.float64]:
        """Independent standard normal draws, float64 [count], by Box and Muller (1958) on 53-bit uniforms."""
        pairs = (count + 1) // 2
        uniforms = self._integers_53(2 * pairs).astype(np.float64)
        # The first uniform is moved into (0, 1] so that its logarithm is finite.
        radius = np.sqrt(-2.0 * np.log((uniforms[:pairs] + 1.0) * 2.0**-53))
        angle = 2.0 * np.pi * 2.0**-53 * uniforms[pairs:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def subset(self, items: int, size: int) -> NDArray[np.int64]:
        """A uniformly random subset of ``range(items)`` with at most ``size`` members, sorted, int64."""
        if items <= size:
            return np.arange(items)
        # Ties among 53-bit keys have probability below items^2 / 2^53 and only skew an order that is already random.
        return np.sort(np.argsort(self._integers_53(items), kind="stable")[:size])
