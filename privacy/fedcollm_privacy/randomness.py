"""Secret randomness for sampling and noise: AES-256-CTR keyed by the operating system.

Opacus' secure mode needs a library that no current torch can load, and torch's own generator gives two sites with
one seed the same noise. So the keystream comes from `cryptography`, keyed afresh for every site and round.

What this does not give yet: protection against attacks on the floating-point representation of Gaussian samples
(Mironov 2012; Holohan and Braghin 2021). The statement of every run says so.
"""

from __future__ import annotations

import math
import os
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedcollm_privacy.errors import InvalidValue

__all__ = ["SecureRandom"]


class SecureRandom:
    """A stream of secret random numbers. There is no way to seed it.

    Each instance has its own 256-bit key from the operating system, so streams of two sites or rounds are unrelated.
    """

    __slots__ = ("_stream",)

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def __repr__(self) -> str:
        return "SecureRandom(<hidden>)"

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
