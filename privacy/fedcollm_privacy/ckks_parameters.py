"""CKKS parameters with the proof that a sum of so many sites is exact; no cryptography library is needed for it.

A site's integers are packed two *fields* to a number and two numbers (real, imaginary part) to a slot, and encrypted
at scale ``2**lsb_bits``, far above the encryption noise. Rounding after decryption then gives the exact integer sum.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue

__all__ = ["RESIDUAL_LIMIT", "CkksParameters", "parameters_for"]

RESIDUAL_LIMIT = 0.25
"""A decrypted number further than this from an integer, in packed units, is refused."""

_MODULUS_BITS_FOR_128 = {4096: 109, 8192: 218, 16384: 438, 32768: 881}
"""Largest total modulus at 128-bit security, ternary secret: Homomorphic Encryption Standard (2018), table 1."""

_MIN_MARGIN = 16.0
_NOISE_STD_AT_4096 = 2**9.45
"""Measured per component of one fresh public-key encryption with a special prime (tests/test_ckks.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CkksParameters:
    """What sites, aggregator and decryptor share; every instance has 128-bit security and cannot wrap modulo q.

    Attributes:
        poly_modulus_degree: N; N/2 complex slots.
        coeff_mod_bit_sizes: the one prime of the ciphertext, and the special prime, which only keys hold.
        lsb_bits: log2 of the scale; one grid step is ``2**lsb_bits`` units of noise.
        field_bits: signed bits of one coordinate's sum.
        fields: coordinates packed into one number.
    """

    poly_modulus_degree: int = 4096
    coeff_mod_bit_sizes: tuple[int, ...] = (60, 49)
    lsb_bits: int = 19
    field_bits: int = 20
    fields: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if any(type(item) is not int for item in (value if isinstance(value, tuple) else (value,))):
                raise InvalidValue(name, value, "integers")
        allowed_bits = _MODULUS_BITS_FOR_128.get(self.poly_modulus_degree)
        if allowed_bits is None:
            degrees = " | ".join(map(str, _MODULUS_BITS_FOR_128))
            raise InvalidValue("poly_modulus_degree", self.poly_modulus_degree, degrees)
        sizes = self.coeff_mod_bit_sizes
        if len(sizes) != 2 or not all(30 <= size <= 60 for size in sizes):
            raise InvalidValue("coeff_mod_bit_sizes", sizes, "one data prime and one special prime, 30 to 60 bits")
        if sum(sizes) > allowed_bits:
            allowed = f"at most {allowed_bits} bits in all at N = {self.poly_modulus_degree} (128-bit security)"
            raise InvalidValue("coeff_mod_bit_sizes", sizes, allowed)
        _validate.at_least(1, lsb_bits=self.lsb_bits, fields=self.fields)
        _validate.at_least(4, field_bits=self.field_bits)
        if self.fields * self.field_bits > 52:
            raise InvalidValue("fields", self.fields, f"at most {52 // self.field_bits}: a float64 is exact to 2^52")
        # Real and imaginary parts below 2^(fields*field_bits - 1) give polynomial coefficients below
        # 2^(fields*field_bits - 1 + lsb_bits + 1/2). SEAL takes the largest prime of so many bits (checked in ckks.py),
        # so q/2 is above 2^(bits - 5/4), and half a bit and more is left for the noise.
        if self.fields * self.field_bits + self.lsb_bits > sizes[0] - 1:
            allowed = f"at most {sizes[0] - 1 - self.fields * self.field_bits}, or a sum could wrap modulo q"
            raise InvalidValue("lsb_bits", self.lsb_bits, allowed)

    @property
    def slots(self) -> int:
        """Complex slots of one ciphertext."""
        return self.poly_modulus_degree // 2

    @property
    def chunk_parameters(self) -> int:
        """Coordinates in one ciphertext."""
        return self.slots * 2 * self.fields

    @property
    def max_ciphertext_bytes(self) -> int:
        """Two polynomials of 64-bit words, and room for the stream's headers."""
        return 2 * 8 * self.poly_modulus_degree + 1024

    @property
    def max_public_key_bytes(self) -> int:
        """As a ciphertext, but over both primes."""
        return 2 * self.max_ciphertext_bytes

    def chunk_count(self, dimension: int) -> int:
        """Ciphertexts for ``dimension`` coordinates.

        >>> CkksParameters().chunk_count(8193)
        2
        """
        return -(-dimension // self.chunk_parameters)

    def margin(self, contributors: int) -> float:
        """Standard deviations of noise between an exact sum of ``contributors`` and the residual limit."""
        noise = _NOISE_STD_AT_4096 * (self.poly_modulus_degree / 4096) * math.sqrt(contributors)
        return RESIDUAL_LIMIT * 2.0**self.lsb_bits / noise

    def prove(self, contributors: int, value_bits: int) -> None:
        """Every sum of up to ``contributors`` updates of ``value_bits`` signed bits opens exactly, or this refuses.

        Raises:
            InvalidValue: names the setting to change.
        """
        _validate.at_least(1, contributors=contributors)
        _validate.in_range(2, self.field_bits, value_bits=value_bits)
        carry_bits = (contributors - 1).bit_length()
        if value_bits + carry_bits > self.field_bits:
            allowed = (
                f"at most {self.field_bits - carry_bits} with up to {contributors} contributors, or their sum could "
                f"overflow its {self.field_bits} bits; take fewer bits or fewer contributors"
            )
            raise InvalidValue("secure_sum.value_bits", value_bits, allowed)
        if not self.margin(contributors) >= _MIN_MARGIN:
            allowed = (
                f"a number that leaves {_MIN_MARGIN:g} standard deviations of noise below the residual limit "
                f"(here {self.margin(contributors):.1f}); take fewer contributors, or a larger lsb_bits with smaller "
                "fields"
            )
            raise InvalidValue("contributors", contributors, allowed)


def parameters_for(contributors: int, value_bits: int) -> CkksParameters:
    """The parameters for sums of up to ``contributors`` updates of ``value_bits`` signed bits, proven.

    N = 4096 and 109 modulus bits (128-bit security), 8 bytes per parameter. Up to 128 contributors at 13 bits.

    >>> parameters_for(100, 13).coeff_mod_bit_sizes
    (60, 49)

    Raises:
        InvalidValue: no exact sum for these; names what to change.
    """
    parameters = CkksParameters()
    parameters.prove(contributors, value_bits)
    return parameters
