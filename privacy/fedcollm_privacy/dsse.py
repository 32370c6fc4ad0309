"""Signed documents that outside tools can verify: DSSE envelopes (v1.0.2) around an in-toto statement.

https://github.com/secure-systems-lab/dsse. The signature is plain Ed25519 over ``PAE(payloadType, payload)``; it begins
with ``DSSEv1``, so it never holds for a message of our own purposes, nor the other way round. A key id is a hint of who
signed: whose key it is, the roster says.

Stricter than DSSE where that leaves one spelling for one envelope: canonical JSON, standard base64 with its padding
(DSSE also allows the URL-safe alphabet), a key id in each signature, one payload type. Other tools read what is written
here; to read what another tool wrote, it may have to be spelled anew.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.identity import PublicIdentity, SigningKey
from fedcollm_privacy.messages import canonical_json

__all__ = [
    "MAX_BYTES",
    "MAX_SIGNATURES",
    "PAYLOAD_TYPE",
    "Envelope",
    "Signature",
    "pae",
    "sign_payload",
    "verify_payload",
]

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_BYTES = 2**24
"""No envelope is longer."""
MAX_SIGNATURES = 10_001
"""Of the largest federation's sites and its server."""

_ED25519_BYTES = 64


def pae(payload_type: str, payload: bytes) -> bytes:
    """What a DSSE signature covers: type and payload, each after its length in bytes (DSSE protocol, "PAE").

    Raises:
        InvalidValue: the type has no UTF-8 form (a lone surrogate).
    """
    try:
        kind = payload_type.encode()
    except UnicodeEncodeError as error:
        raise InvalidValue("payload_type", payload_type, "text that UTF-8 can write") from error
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """One signature of an envelope; nobody has checked it yet.

    Attributes:
        keyid: which public key it asks to be checked with, 64 lower-case hex digits; a hint, not signed itself.
        signature: 64 bytes.

    Raises:
        InvalidValue: not of this form.
    """

    keyid: str
    signature: bytes

    def __post_init__(self) -> None:
        _validate.hex_digest(keyid=self.keyid)
        if type(self.signature) is not bytes or len(self.signature) != _ED25519_BYTES:
            raise InvalidValue("signature", type(self.signature).__name__, f"{_ED25519_BYTES} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A payload with signatures that nobody has checked yet; `verify_payload` checks one.

    Attributes:
        payload_type: `PAYLOAD_TYPE`, the only one that `verify_payload` stands for.
        payload: the signed bytes, untrusted.
        signatures: 1 to `MAX_SIGNATURES`, in the order in which they are written, each with a key id of its own.

    Raises:
        InvalidValue: not of this form.
    """

    payload_type: str
    payload: bytes
    signatures: tuple[Signature, ...]

    def __post_init__(self) -> None:
        _validate.one_of((PAYLOAD_TYPE,), payload_type=self.payload_type)
        if type(self.payload) is not bytes:
            raise InvalidValue("payload", type(self.payload).__name__, "bytes")
        if not 1 <= len(self.signatures) <= MAX_SIGNATURES:
            raise InvalidValue("number of signatures", len(self.signatures), f"1 to {MAX_SIGNATURES}")
        if len({signature.keyid for signature in self.signatures}) < len(self.signatures):
            raise InvalidValue("signatures", "two with one keyid", "one signature of each key")

    def to_bytes(self) -> bytes:
        """The envelope as canonical JSON; equal envelopes have equal bytes.

        Raises:
            InvalidValue: it would be longer than `MAX_BYTES`.
        """
        fields = {
            "payload": _base64(self.payload),
            "payloadType": self.payload_type,
            "signatures": [{"keyid": each.keyid, "sig": _base64(each.signature)} for each in self.signatures],
        }
        data = canonical_json(fields)
        if len(data) > MAX_BYTES:
            raise InvalidValue("length of the envelope", len(data), f"at most {MAX_BYTES} bytes: shorten the payload")
        return data

    @staticmethod
    def from_bytes(data: bytes) -> Envelope:
        """The envelope in ``data``, which must be exactly what `to_bytes` gives; no signature has been checked.

        Raises:
            ProtocolError: anything else.
        """
        if len(data) > MAX_BYTES:
            raise ProtocolError(f"the envelope is {len(data)} bytes long; allowed: at most {MAX_BYTES}")
        try:
            parsed = json.loads(data)
        except (ValueError, RecursionError) as error:  # not UTF-8, a number or a nest without end
            raise ProtocolError("the envelope is malformed: not JSON; ask for the file again") from error
        fields = _exactly(parsed, ("payload", "payloadType", "signatures"))
        listed = fields["signatures"]
        if not isinstance(listed, list):
            raise ProtocolError("the envelope is malformed: signatures is no list")
        try:
            envelope = Envelope(
                payload_type=_text(fields["payloadType"], "payloadType"),
                payload=_decoded(fields["payload"], "payload"),
                signatures=tuple(_signature(each) for each in listed),
            )
        except InvalidValue as error:
            raise ProtocolError(f"the envelope is malformed: {error!s:.200}") from error
        # One comparison for every other spelling: spaces, order, escapes, a field twice, stray bits in base64.
        if envelope.to_bytes() != data:
            raise ProtocolError("the envelope is malformed: not canonical JSON; was it edited or re-formatted?")
        return envelope


def sign_payload(key: SigningKey, payload: bytes) -> Signature:
    """The key's signature of ``payload`` as an in-toto statement (`PAYLOAD_TYPE`)."""
    return Signature(keyid=key.public.public_key.hex(), signature=key.sign_pae(pae(PAYLOAD_TYPE, payload)))


def verify_payload(identity: PublicIdentity, payload: bytes, signature: bytes) -> None:
    """Return if this party's key signed ``payload`` as an in-toto statement.

    Raises:
        SignatureInvalid: another payload, type or key, or no signature at all.
    """
    identity.verify_pae(pae(PAYLOAD_TYPE, payload), signature)


def _signature(value: object) -> Signature:
    fields = _exactly(value, ("keyid", "sig"))
    return Signature(keyid=_text(fields["keyid"], "keyid"), signature=_decoded(fields["sig"], "sig"))


def _exactly(value: object, names: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(value, dict) or set(value) != set(names):
        raise ProtocolError(f"the envelope is malformed: an object's fields are not exactly {', '.join(names)}")
    return value


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"the envelope is malformed: {field} is no string")
    return value


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decoded(value: object, field: str) -> bytes:
    text = _text(value, field)
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = b""  # refused below, unless nothing is what was written
    if _base64(data) != text:
        raise ProtocolError(f"the envelope is malformed: {field} is not standard base64 with its padding")
    return data
