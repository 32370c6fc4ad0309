"""CKKS parameters with the proof that a sum of so many sites is exact; no cryptography library is needed for it.

A site's integers are packed two *fields* to a number and two numbers (real, imaginary part) to a slot, and encrypted
at scale ``2**lsb_bits``, far above the encryption noise. Rounding after decryption then gives the exact integer sum.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue

__all__ = ["MIN_MARGIN", "RESIDUAL_LIMIT", "CkksParameters", "parameters_for"]

RESIDUAL_LIMIT = 0.25
"""A decrypted number further than this from an integer, in packed units, is refused."""

_MODULUS_BITS_FOR_128 = {4096: 109, 8192: 218, 16384: 438, 32768: 881}
"""Largest total modulus at 128-bit security, ternary secret: Homomorphic Encryption Standard (2018), table 1."""

MIN_MARGIN = 16.0
"""Standard deviations of noise below the residual limit. The slot where a key is worst has three times the mean
deviation, at most 3.6 times with 60 keys: even there four are left to a false refusal, eight to a wrong integer."""

_DATA_PRIMES = {
    4096: 2**60 - 2**14 + 1,
    8192: 2**60 - 2**14 + 1,
    16384: 2**60 - 3 * 2**15 + 1,
    32768: 2**60 - 2**18 + 1,
}
"""The largest 60-bit prime that is 1 modulo 2N: the modulus q of all ciphertexts, the one that SEAL takes."""

_NOISE_STD_AT_4096 = {1: 2**13.45, 2: 2**9.45}
"""Measured per component of one fresh public-key encryption, by number of primes (tests/test_ckks.py). A special prime
takes noise away and half of the encryption's time."""

_CANDIDATES = (((60,), 2), ((60, 49), 2), ((60,), 1), ((60, 49), 1))
"""Primes and fields, cheapest first: one prime encrypts in two thirds of the time, two fields halve the bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CkksParameters:
    """What sites, aggregator and decryptor share; every instance has 128-bit security and cannot wrap modulo q.

    Attributes:
        poly_modulus_degree: N; N/2 complex slots.
        coeff_mod_bit_sizes: the one prime of the ciphertext, and perhaps a special prime, which only keys hold.
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
        if len(sizes) not in _NOISE_STD_AT_4096 or sizes[0] != 60 or not all(30 <= size <= 60 for size in sizes):
            raise InvalidValue("coeff_mod_bit_sizes", sizes, "60 bits, and perhaps a special prime of 30 to 60")
        if sum(sizes) > allowed_bits:
            allowed = f"at most {allowed_bits} bits in all at N = {self.poly_modulus_degree} (128-bit security)"
            raise InvalidValue("coeff_mod_bit_sizes", sizes, allowed)
        _validate.at_least(1, lsb_bits=self.lsb_bits, fields=self.fields)
        _validate.at_least(4, field_bits=self.field_bits)
        if self.fields * self.field_bits > 52:
            raise InvalidValue("fields", self.fields, f"at most {52 // self.field_bits}: a float64 is exact to 2^52")
        # Real and imaginary parts below 2^(fields*field_bits - 1) give polynomial coefficients below
        # 2^(fields*field_bits - 1 + lsb_bits + 1/2); q/2 is above 2^(60 - 5/4), and half a bit and more is left for
        # the noise.
        if self.fields * self.field_bits + self.lsb_bits > sizes[0] - 1:
            allowed = f"at most {sizes[0] - 1 - self.fields * self.field_bits}, or a sum could wrap modulo q"
            raise InvalidValue("lsb_bits", self.lsb_bits, allowed)

    @property
    def modulus(self) -> int:
        """q: every word of a ciphertext is below it (SEAL's own prime, as `fedcollm_privacy.ckks` checks)."""
        return _DATA_PRIMES[self.poly_modulus_degree]

    @property
    def slots(self) -> int:
        """Complex slots of one ciphertext."""
        return self.poly_modulus_degree // 2

    @property
    def chunk_parameters(self) -> int:
        """Coordinates in one ciphertext."""
        return self.slots * 2 * self.fields

    @property
    def ciphertext_bytes(self) -> int:
        """Two polynomials of N 64-bit words: the exact length of a ciphertext on the wire."""
        return 2 * 8 * self.poly_modulus_degree

    @property
    def max_public_key_bytes(self) -> int:
        """Two polynomials over all primes, and room for the headers of SEAL's stream."""
        return len(self.coeff_mod_bit_sizes) * self.ciphertext_bytes + 2048

    def chunk_count(self, dimension: int) -> int:
        """Ciphertexts for ``dimension`` coordinates.

        >>> CkksParameters().chunk_count(8193)
        2
        """
        return -(-dimension // self.chunk_parameters)

    def margin(self, contributors: int) -> float:
        """Standard deviations of noise between an exact sum of ``contributors`` and the residual limit."""
        fresh = _NOISE_STD_AT_4096[len(self.coeff_mod_bit_sizes)] * (self.poly_modulus_degree / 4096)
        return RESIDUAL_LIMIT * 2.0**self.lsb_bits / (fresh * math.sqrt(contributors))

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
        if not self.margin(contributors) >= MIN_MARGIN:
            allowed = (
                f"a number that leaves {MIN_MARGIN:g} standard deviations of noise below the residual limit "
                f"(here {self.margin(contributors):.1f}); take fewer contributors, or a larger lsb_bits with smaller "
                "fields"
            )
            raise InvalidValue("contributors", contributors, allowed)


def parameters_for(contributors: int, value_bits: int, *, margin: float = MIN_MARGIN) -> CkksParameters:
    """The cheapest parameters under which every sum of up to ``contributors`` updates is proven exact.

    N = 4096 throughout. The field is as wide as the sum needs, and what is left of the modulus goes to the margin. 8
    bytes a parameter with two fields in a number, 16 with one.

    Args:
        contributors: n, the most updates in a sum.
        value_bits: signed bits of one coordinate of an update.
        margin: standard deviations of noise to be left below the residual limit, at least `MIN_MARGIN`.

    >>> parameters_for(100, 13).coeff_mod_bit_sizes, parameters_for(10, 13).coeff_mod_bit_sizes
    ((60, 49), (60,))

    Raises:
        InvalidValue: no exact sum for these; says how many contributors or bits would do.
    """
    _validate.integer_at_least(1, contributors=contributors)
    _validate.integer_at_least(2, value_bits=value_bits)
    _validate.at_least(MIN_MARGIN, margin=margin)
    found = _cheapest(contributors, value_bits, margin)
    if found is not None:
        found.prove(contributors, value_bits)
        return found
    bits = next((b for b in range(value_bits - 1, 1, -1) if _cheapest(contributors, b, margin)), None)
    if bits is not None:
        allowed = f"at most {bits} with up to {contributors} contributors at a margin of {margin:g} deviations"
        raise InvalidValue("secure_sum.value_bits", value_bits, allowed)
    most = max((2**e for e in range(contributors.bit_length()) if _cheapest(2**e, value_bits, margin)), default=0)
    allowed = f"about {most} at {value_bits} bits and a margin of {margin:g} deviations; or a smaller margin"
    raise InvalidValue("contributors", contributors, allowed)


def _cheapest(contributors: int, value_bits: int, margin: float) -> CkksParameters | None:
    field_bits = max(4, value_bits + (contributors - 1).bit_length())
    for sizes, fields in _CANDIDATES:
        lsb_bits = sizes[0] - 1 - fields * field_bits
        if fields * field_bits <= 52 and lsb_bits >= 1:
            parameters = CkksParameters(
                coeff_mod_bit_sizes=sizes, lsb_bits=lsb_bits, field_bits=field_bits, fields=fields
            )
            if parameters.margin(contributors) >= margin:
                return parameters
    return None
