"""The masks of secure aggregation: X25519, HKDF-SHA256, AES-256-CTR, uniform words modulo q.

Bonawitz et al. (2017, CCS): sites u and v share a key and add the same mask with opposite signs, so that pairwise
masks vanish from the sum of all; a mask of the site's own hides its upload even where a pairwise key is handed out.
A masked word is uniform modulo q whatever is under it, as long as one of its masks is unknown.

Every key is bound to the digest of the round's plan, to its role and to the names of those who share it. Masks are
addressed by chunk, one chunk for one ciphertext, so that nobody ever holds a whole mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue, ProtocolError

__all__ = [
    "MaskSum",
    "add_mod",
    "agree",
    "derive",
    "encode_labels",
    "mask_words",
    "pair_mask_key",
    "plan_bytes",
    "require_32_bytes",
    "self_mask_key",
    "share_key",
    "subtract_mod",
]

_PROTOCOL = b"fedcollm/v1"


def agree(private_key: X25519PrivateKey, public_key: bytes) -> bytes:
    """The 32-byte X25519 shared secret (RFC 7748, section 6.1). It is no key yet: give it to `derive`.

    Raises:
        ProtocolError: the peer's key is not 32 bytes, or a point of low order, with which anybody knows the secret.
    """
    if not isinstance(public_key, bytes) or len(public_key) != 32:
        raise ProtocolError("a peer's X25519 key is not 32 bytes; leave that site out of the round")
    try:
        return private_key.exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:
        raise ProtocolError("a peer's X25519 key is a point of low order; leave that site out of the round") from None


def derive(secret: bytes, plan_digest: str, *labels: str) -> bytes:
    """A 32-byte key for one purpose in one round: HKDF-SHA256 (RFC 5869).

    Salt is the plan's digest, info is the protocol's name and then `encode_labels`.

    Args:
        secret: 32 bytes, a shared secret or a seed.
        plan_digest: of the round's plan, 64 hex digits.
        labels: the key's purpose and who uses it, public names.

    Raises:
        InvalidValue: an argument has another form; no text shows the secret.
    """
    require_32_bytes("secret", secret)
    return _hkdf(secret, plan_bytes(plan_digest), _PROTOCOL + encode_labels(*labels))


def pair_mask_key(secret: bytes, plan_digest: str, site: str, peer: str) -> bytes:
    """The key of the mask that ``site`` and its ``peer``, another site, share; the same from both sides."""
    if site == peer:
        raise InvalidValue("peer", peer, "another site than the one it is paired with")
    return derive(secret, plan_digest, "mask", min(site, peer), max(site, peer))


def self_mask_key(seed: bytes, plan_digest: str, site: str) -> bytes:
    """The key of the mask that ``site`` adds alone, from its 32-byte seed b."""
    return derive(seed, plan_digest, "self", site)


def share_key(secret: bytes, plan_digest: str, sender: str, receiver: str) -> bytes:
    """The key of the one box of shares from ``sender`` to ``receiver``; the way back has another."""
    return derive(secret, plan_digest, "share", sender, receiver)


def plan_bytes(plan_digest: str) -> bytes:
    """The 32 bytes of a plan's digest, 64 lower-case hex digits."""
    _validate.hex_digest(plan_digest=plan_digest)
    return bytes.fromhex(plan_digest)


def encode_labels(*labels: str) -> bytes:
    """Each label, a public name, after its length in 2 bytes: no two lists of labels have one encoding.

    >>> encode_labels("a", "bc") == encode_labels("ab", "c")
    False
    """
    for label in labels:
        _validate.public_name(label=label)
    return b"".join(len(label).to_bytes(2, "big") + label.encode("ascii") for label in labels)


def require_32_bytes(name: str, value: bytes) -> None:
    """Refuse what is not 32 bytes; the text shows nothing of it."""
    if not isinstance(value, bytes) or len(value) != 32:
        raise InvalidValue(name, "<hidden>", "32 bytes")


def mask_words(key: bytes, chunk: int, count: int, modulus: int) -> NDArray[np.uint64]:
    """One chunk of the mask that ``key`` stands for: uniform in [0, modulus), uint64 [count].

    The AES-256-CTR keystream (NIST SP 800-38A) whose first counter block is the chunk's number in 8 bytes, big-endian,
    and 8 zero bytes, is read as 64-bit little-endian words. Of each the low ``(modulus - 1).bit_length()`` bits are
    kept; what is not below the modulus then is rejected. The mask is the first ``count`` accepted words.

    Args:
        key: 32 bytes, of `pair_mask_key` or `self_mask_key`.
        chunk: number of the chunk, below 2^64.
        count: words in the chunk; a shorter chunk is a prefix of a longer one.
        modulus: q, 2 to 2^63.

    Raises:
        InvalidValue: an argument is out of range; no text shows the key.
    """
    require_32_bytes("key", key)
    _require_modulus(modulus)
    _validate.integer_at_least(1, count=count)
    return _first_below(_keystream(key, _counter_block(chunk)), count, modulus)


class MaskSum:
    """The sum of signed masks modulo q, chunk by chunk: what a site adds to its upload, or what is left to take off.

    Holds one cipher context per term and, during `chunk`, a few arrays of its length. For one thread at a time.

    Args:
        terms: each mask's key and its sign, +1 or -1. At least one: the sum of none would mask nothing.
        modulus: q, 2 to 2^63.

    Raises:
        InvalidValue: no term, another sign, a key that is not 32 bytes, or a modulus out of range.
    """

    __slots__ = ("_minus", "_modulus", "_plus")

    def __init__(self, terms: Sequence[tuple[bytes, int]], modulus: int) -> None:
        _require_modulus(modulus)
        if not terms:
            raise InvalidValue("terms", 0, "at least one mask")
        streams: dict[int, list[CipherContext]] = {1: [], -1: []}
        for key, sign in terms:
            if type(sign) is not int or sign not in streams:
                # Not its value: key and sign could have changed places.
                raise InvalidValue("sign", type(sign).__name__, "the integer +1 or -1")
            require_32_bytes("key", key)
            streams[sign].append(_keystream(key, _counter_block(0)))
        self._plus, self._minus, self._modulus = streams[1], streams[-1], modulus

    def __repr__(self) -> str:
        return f"MaskSum(<{len(self._plus)} added, {len(self._minus)} subtracted, hidden>)"

    def chunk(self, index: int, count: int) -> NDArray[np.uint64]:
        """Chunk ``index`` of the sum, in [0, modulus), uint64 [count]; in any order, any number of times."""
        block = _counter_block(index)
        _validate.integer_at_least(1, count=count)
        added, subtracted = (self._sum(streams, block, count) for streams in (self._plus, self._minus))
        return subtract_mod(added, subtracted, self._modulus)

    def _sum(self, streams: list[CipherContext], block: bytes, count: int) -> NDArray[np.uint64]:
        # So many words below the modulus fit into 64 bits: 16 of 60 bits, 2 of 63.
        fitting = (2**64 - 1) // (self._modulus - 1)
        total, held = np.zeros(count, dtype=np.uint64), 0
        for stream in streams:
            if held == fitting:
                total %= self._modulus
                held = 1
            stream.reset_nonce(block)  # 0.5 µs, where a new context takes 7
            total += _first_below(stream, count, self._modulus)
            held += 1
        return total % self._modulus


def add_mod(a: NDArray[np.uint64], b: NDArray[np.uint64], modulus: int) -> NDArray[np.uint64]:
    """``(a + b) mod modulus`` of two uint64 arrays of one shape, both below the modulus <= 2^63.

    Raises:
        InvalidValue: another type or shape, or a word not below the modulus.
    """
    _require_residues(a, b, modulus)
    total = a + b  # below 2^64
    # Where the total is below the modulus, the difference wraps to 2^63 or more; elsewhere it is the smaller one.
    reduced: NDArray[np.uint64] = np.minimum(total, total - np.uint64(modulus))
    return reduced


def subtract_mod(a: NDArray[np.uint64], b: NDArray[np.uint64], modulus: int) -> NDArray[np.uint64]:
    """``(a - b) mod modulus``; otherwise as `add_mod`."""
    _require_residues(a, b, modulus)
    difference = a - b  # wraps to more than 2^63 where a < b, and adding the modulus wraps it back
    reduced: NDArray[np.uint64] = np.minimum(difference, difference + np.uint64(modulus))
    return reduced


def _hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(secret)


def _keystream(key: bytes, counter_block: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(counter_block)).encryptor()


def _first_below(stream: CipherContext, count: int, modulus: int) -> NDArray[np.uint64]:
    accepted = _next_below(stream, count, modulus)
    while len(accepted) < count:
        # At most half of the words are rejected, on average.
        accepted = np.concatenate([accepted, _next_below(stream, 2 * (count - len(accepted)), modulus)])
    return accepted[:count]


def _next_below(stream: CipherContext, drawn: int, modulus: int) -> NDArray[np.uint64]:
    low_bits = np.uint64((1 << (modulus - 1).bit_length()) - 1)
    words: NDArray[np.uint64] = np.frombuffer(stream.update(bytes(8 * drawn)), dtype="<u8") & low_bits
    return words if int(words.max()) < modulus else words[words < modulus]


def _counter_block(chunk: int) -> bytes:
    _validate.integer_at_least(0, chunk=chunk)
    if chunk >= 2**64:
        raise InvalidValue("chunk", chunk, "an integer below 2^64")
    return chunk.to_bytes(8, "big") + bytes(8)


def _require_modulus(modulus: int) -> None:
    _validate.integer_at_least(2, modulus=modulus)
    if modulus > 2**63:
        raise InvalidValue("modulus", modulus, "an integer of at most 2^63")


def _require_residues(a: NDArray[np.uint64], b: NDArray[np.uint64], modulus: int) -> None:
    _require_modulus(modulus)
    for array in (a, b):
        if not isinstance(array, np.ndarray) or array.dtype != np.uint64 or array.shape != a.shape:
            raise InvalidValue("words", "<hidden>", "two uint64 arrays of one shape")
        if array.size and int(array.max()) >= modulus:
            raise InvalidValue("words", "<hidden>", "words below the modulus")
