"""What a party and the coordinator send each other once: a request to take part, and the grant that answers it.

Both are canonical JSON and hold nothing secret. A request is signed by the key that it names: whoever has compared that
key's fingerprint with its owner knows that everything in it is the owner's. A grant is believed for what is in it: a
roster that the governance signed, and certificates by the authority that the kit pins.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue, KitError, ProtocolError, SignatureInvalid
from fedcollm_privacy.identity import PublicIdentity, SigningKey
from fedcollm_privacy.messages import canonical_json
from fedcollm_privacy.roster import SignedRoster

__all__ = ["Enrolment", "Grant", "Signed"]

"""No request and no grant is longer."""

_REQUEST, _GRANT = "fedcollm-enrolment-v1", "fedcollm-grant-v1"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """A party asks to take part with this key.

    Attributes:
        federation, party, role: who asks, of whom.
        kit: the 32 hex digits of the kit that was made for this party.
        ca: SHA-256 of the authority that the kit pins.
        made_at: Unix seconds; a later request of a party replaces an earlier one.
        identity: the party's key.
        requests: NVIDIA FLARE's certificate requests by the file's stem.
    """

    federation: str
    party: str
    role: str
    kit: str
    ca: str
    made_at: int
    identity: PublicIdentity
    requests: Mapping[str, bytes]

    def __post_init__(self) -> None:
        _validate.public_name(federation=self.federation, party=self.party)
        _validate.one_of(("server", "site"), role=self.role)
        _validate.hex_digest(ca=self.ca)
        _validate.integer_at_least(1, made_at=self.made_at)
        if self.identity.name != self.party:
            raise InvalidValue("identity", self.identity.name, f"the key of {self.party}")

    def to_bytes(self) -> bytes:
        """Canonical JSON, what is signed."""
        return canonical_json(
            {
                "format": _REQUEST,
                **{name: getattr(self, name) for name in ("federation", "party", "role", "kit", "ca", "made_at")},
                "identity": self.identity.as_fields(),
                "requests": _encoded(self.requests),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A request with the signature of the key in it.

    Attributes:
        enrolment: the request.
        signature: for the purpose ``enrolment``.
    """

    enrolment: Enrolment
    signature: bytes

    @staticmethod
    def by(key: SigningKey, enrolment: Enrolment) -> Signed:
        """The request, signed by the key that it names."""
        return Signed(enrolment=enrolment, signature=key.sign("enrolment", enrolment.to_bytes()))

    @property
    def digest(self) -> str:
        """SHA-256 of `to_bytes`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        fields = json.loads(self.enrolment.to_bytes())
        return canonical_json({"request": fields, "signature": self.signature.hex()})

    @staticmethod
    def from_bytes(data: bytes) -> Signed:
        """The request in ``data``, if the key in it signed it.

        Raises:
            KitError: it is malformed, or was altered after it was signed.
        """
        outer = _object(data, {"request", "signature"}, "request")
        names = {"federation", "party", "role", "kit", "ca", "made_at", "identity", "requests"}
        fields = _exactly(outer["request"], {"format", *names}, "request")
        if fields["format"] != _REQUEST:
            raise KitError(f"this is no request of the format {_REQUEST}; `fedcollm deploy join` makes them")
        made = _built(
            lambda: Enrolment(
                **{n: fields[n] for n in ("federation", "party", "role", "ca", "made_at")},
                kit=_text(fields["kit"]),
                identity=PublicIdentity.from_fields(fields["identity"]),
                requests=_decoded(fields["requests"]),
            ),
            "request",
        )
        signed = Signed(enrolment=made, signature=_hex(outer["signature"]))
        _require_same(signed.to_bytes(), data, "request")
        try:
            made.identity.verify("enrolment", made.to_bytes(), signed.signature)
        except SignatureInvalid:
            raise KitError(
                f"the request of {made.party} was altered after it was signed, or its signature was: nothing of it "
                "was used. Ask for it again"
            ) from None
        return signed


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The coordinator's answer to a party.

    Attributes:
        federation, party, kit: to whose request.
        roster: signed, unverified.
        certificates: NVIDIA FLARE's approvals by the file's stem, unverified.
        revoked: names of sites that are no longer in the roster.
    """

    federation: str
    party: str
    kit: str
    roster: SignedRoster
    certificates: Mapping[str, bytes]
    revoked: tuple[str, ...]

    def __post_init__(self) -> None:
        _validate.public_name(federation=self.federation, party=self.party)
        for name in self.revoked:
            _validate.public_name(revoked=name)

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(
            {
                "format": _GRANT,
                "federation": self.federation,
                "party": self.party,
                "kit": self.kit,
                "roster": json.loads(self.roster.to_bytes()),
                "certificates": _encoded(self.certificates),
                "revoked": list(self.revoked),
            }
        )

    @staticmethod
    def from_bytes(data: bytes) -> Grant:
        """The grant in ``data``; roster and certificates in it have not been verified.

        Raises:
            KitError: it is malformed.
        """
        names = {"federation", "party", "kit", "roster", "certificates", "revoked"}
        fields = _object(data, {"format", *names}, "grant")
        if fields["format"] != _GRANT:
            raise KitError(f"this is no grant of the format {_GRANT}; `fedcollm deploy admit` makes them")
        grant = _built(
            lambda: Grant(
                federation=fields["federation"],
                party=fields["party"],
                kit=_text(fields["kit"]),
                roster=SignedRoster.from_bytes(canonical_json(fields["roster"])),
                certificates=_decoded(fields["certificates"]),
                revoked=tuple(_listed(fields["revoked"])),
            ),
            "grant",
        )
        _require_same(grant.to_bytes(), data, "grant")
        return grant


def _object(data: bytes, names: set[str], what: str) -> dict[str, Any]:
    try:
        fields = json.loads(data)
        written = canonical_json(fields)
    except (ValueError, RecursionError):
        raise KitError(f"the {what} is damaged: it is not JSON. Have it sent again") from None
    _require_same(written, data, what)
    return _exactly(fields, names, what)


def _exactly(fields: object, names: set[str], what: str) -> dict[str, Any]:
    if not isinstance(fields, dict) or set(fields) != names:
        raise KitError(f"the {what} is malformed: its fields are not exactly {', '.join(sorted(names))}")
    return fields


def _require_same(written: bytes, data: bytes, what: str) -> None:
    # Of one message there is one spelling: JSON, base64 and hex digits have several.
    if written != data:
        raise KitError(f"the {what} is not as it was written: was it edited or re-formatted? Have it sent again")


def _built(make: Callable[[], T], what: str) -> T:
    try:
        return make()
    except (InvalidValue, ProtocolError) as error:
        raise KitError(f"the {what} is malformed: {error!s:.300}") from error


def _encoded(parts: Mapping[str, bytes]) -> dict[str, str]:
    return {stem: base64.b64encode(part).decode() for stem, part in parts.items()}


def _decoded(parts: object) -> dict[str, bytes]:
    if not isinstance(parts, dict) or not set(parts) <= {"tls", "lead"}:
        raise InvalidValue("certificates", type(parts).__name__, "by name: tls, and at the server lead")
    try:
        return {stem: base64.b64decode(_text(part), validate=True) for stem, part in parts.items()}
    except ValueError:
        raise InvalidValue("certificates", "damaged", "base64") from None


def _listed(names: object) -> list[Any]:
    if not isinstance(names, list):
        raise InvalidValue("revoked", type(names).__name__, "a list of names")
    return names


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidValue("text", type(value).__name__, "text")
    return value


def _hex(value: object) -> bytes:
    try:
        return bytes.fromhex(_text(value))
    except ValueError:
        raise KitError("the signature is malformed: it is not hex digits") from None
