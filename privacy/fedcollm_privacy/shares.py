"""Shamir shares (1979) of the mask seeds, commitments to them, and the boxes in which they travel.

The sharing is PyCryptodome's, a Python package in wide use and still kept: polynomials over GF(2^128) modulo
x^128 + x^7 + x^2 + x + 1, big-endian, the secret at x = 0, holder i at x = i from 1 on, coefficients from
``os.urandom``. A secret there has 16 bytes; our 32-byte secrets are two halves with two independent polynomials.

What the library does not give, and what is done about it:

- No integrity: a changed share joins to another secret without any sign. Hence `commit`, which the caller checks.
- No constant time: its field is Python integers. Shares are made and joined where the secret is known anyway.
- Its ``Shamir.combine`` interpolates anew for each half: 0.10 s of 67-of-100 shares on a 2-core machine, so 20 s for
  the 200 halves of 100 secrets. `join_many` computes it once for all secrets with the same holders, with the library's
  own field elements, a private class: 3 s. Tests compare it with ``Shamir.combine`` and with a second implementation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add, mul

from Crypto.Protocol.SecretSharing import Shamir, _Element
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.masks import encode_labels, plan_bytes, require_32_bytes

__all__ = ["commit", "join", "join_many", "open_box", "seal_box", "split"]

_SECRET_BYTES = 32
_HALVES = (slice(0, 16), slice(16, 32))
_COMMITMENT = b"fedcollm/v1/commitment"
_BOX = b"fedcollm/v1/box"
_NONCE = bytes(12)


def split(secret: bytes, *, threshold: int, holders: Sequence[str]) -> dict[str, bytes]:
    """Shares of a secret, 32 bytes for each holder; fewer than ``threshold`` of them say nothing about it.

    Args:
        secret: 32 bytes.
        threshold: t, how many shares give the secret back, 2 to the number of holders.
        holders: distinct public names; a holder's x is its place in sorted order, from 1 on.

    Raises:
        InvalidValue: an argument is out of range; no text shows the secret.
    """
    xs = _coordinates(threshold, holders)
    require_32_bytes("secret", secret)
    left, right = (dict(Shamir.split(threshold, len(xs), secret[half])) for half in _HALVES)
    return {holder: left[x] + right[x] for holder, x in xs.items()}


def join(shares: Mapping[str, bytes], *, threshold: int, holders: Sequence[str]) -> bytes:
    """The secret of which these are shares: `join_many` of one. What comes out is not checked; `commit` does that."""
    return join_many({"secret": shares}, threshold=threshold, holders=holders)["secret"]


def join_many(
    shares_by_secret: Mapping[str, Mapping[str, bytes]], *, threshold: int, holders: Sequence[str]
) -> dict[str, bytes]:
    """The secrets of which these are shares, each from exactly ``threshold`` of its shares.

    Used are the shares of the first ``threshold`` holders in sorted order of those that gave one; further ones are
    checked for their form only. A wrong share gives a wrong secret: compare each share with its commitment before,
    and leave out the ones that differ.

    Args:
        shares_by_secret: for each secret, under a public name, its shares by holder; untrusted.
        threshold: as it was split.
        holders: all holders at the split, in any order.

    Raises:
        InvalidValue: the threshold or the list of holders is not allowed.
        ProtocolError: of any secret there are too few shares, one of a stranger, or one that is not 32 bytes.
    """
    xs = _coordinates(threshold, holders)
    for name, shares in shares_by_secret.items():
        _check_shares(name, shares, threshold, xs)
    coefficients: dict[tuple[str, ...], list[_Element]] = {}
    secrets = {}
    for name, shares in shares_by_secret.items():
        used = tuple(sorted(shares)[:threshold])
        if used not in coefficients:
            coefficients[used] = _lagrange_at_zero([xs[holder] for holder in used])
        secrets[name] = b"".join(
            reduce(add, map(mul, coefficients[used], (_Element(shares[holder][half]) for holder in used))).encode()
            for half in _HALVES
        )
    return secrets


def commit(value: bytes, plan_digest: str, *labels: str) -> bytes:
    """A 32-byte commitment to a share or a seed: SHA-256 over a tag, the labels, the plan and the value.

    Binding, as SHA-256 is collision resistant and the encoding is read in one way only. It hides a value that is
    uniform on 256 bits: who holds commitments can only try values, and there are 2^256. That is why a share is hashed
    whole. Each of its halves has 128 bits: hashed apart they could be searched apart, for 2^128 guesses in place of
    2^256, fewer still against many commitments at once, and for the square root of it on a quantum computer.

    Args:
        value: 32 bytes.
        plan_digest: of the round's plan, 64 hex digits.
        labels: what is committed to: its role, whose it is and who holds it.

    Raises:
        InvalidValue: the value is not 32 bytes, the digest not 64 hex digits, or a label not a public name.
    """
    require_32_bytes("value", value)
    # With the number of labels, nothing after them can be read as one more label.
    parts = (_COMMITMENT, len(labels).to_bytes(2, "big"), encode_labels(*labels), plan_bytes(plan_digest), value)
    return hashlib.sha256(b"".join(parts)).digest()


def seal_box(key: bytes, plaintext: bytes, *, plan_digest: str, sender: str, receiver: str) -> bytes:
    """The plaintext under ChaCha20-Poly1305 (RFC 8439), bound to plan, sender and receiver.

    The nonce is 12 zero bytes, since each key encrypts exactly one message: it comes from `masks.share_key`, bound to
    the plan and the direction. Whoever seals a second message under one key gives both away.

    Raises:
        InvalidValue: the key is not 32 bytes, the digest not 64 hex digits, or a name not a public name.
    """
    require_32_bytes("key", key)
    return ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, _associated(plan_digest, sender, receiver))


def open_box(key: bytes, box: bytes, *, plan_digest: str, sender: str, receiver: str) -> bytes:
    """What `seal_box` sealed for the same plan, sender and receiver.

    Raises:
        InvalidValue: as `seal_box`.
        ProtocolError: the box was changed, or made with another key, plan, sender or receiver. One text for all.
    """
    require_32_bytes("key", key)
    associated = _associated(plan_digest, sender, receiver)
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, box, associated)
    except (InvalidTag, TypeError):
        raise ProtocolError(f"the box from {sender} to {receiver} does not open; leave {sender} out") from None


def _associated(plan_digest: str, sender: str, receiver: str) -> bytes:
    return _BOX + plan_bytes(plan_digest) + encode_labels(sender, receiver)


def _coordinates(threshold: int, holders: Sequence[str]) -> dict[str, int]:
    if isinstance(holders, str) or len(set(holders)) != len(holders):
        raise InvalidValue("holders", holders, "distinct names")
    for holder in holders:
        _validate.public_name(holder=holder)
    _validate.integer_at_least(2, threshold=threshold)
    if threshold > len(holders):
        raise InvalidValue("threshold", threshold, f"at most the number of holders, {len(holders)}")
    return {holder: x for x, holder in enumerate(sorted(holders), start=1)}


def _check_shares(name: str, shares: Mapping[str, bytes], threshold: int, xs: Mapping[str, int]) -> None:
    if not shares.keys() <= xs.keys():
        raise ProtocolError(f"{name}: a share of somebody who holds none; refuse the message it came in")
    for holder, share in shares.items():
        if not isinstance(share, bytes) or len(share) != _SECRET_BYTES:
            raise ProtocolError(f"{name}: the share of {holder} is not {_SECRET_BYTES} bytes; leave it out")
    if len(shares) < threshold:
        raise ProtocolError(f"{name}: {len(shares)} shares; needed: {threshold}; wait for more or give up the round")


def _lagrange_at_zero(xs: Sequence[int]) -> list[_Element]:
    """For each x_j the product of x_m / (x_j - x_m) over all others; minus is plus in characteristic 2."""
    elements = [_Element(x) for x in xs]
    coefficients = []
    for x in elements:
        others = [other for other in elements if other != x]
        coefficients.append(reduce(mul, others) * reduce(mul, [x + other for other in others]).inverse())
    return coefficients
