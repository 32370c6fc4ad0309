"""Who takes part: names and public keys of server and sites, signed by the governance of the federation.

Every party is given the governance's public identity once, out of band, and believes only rosters that its key signed.
A server that could choose the keys of the sites could play every site but one, and would learn that one's update from
the sum; so it does not choose them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.identity import PublicIdentity, SigningKey
from fedcollm_privacy.messages import canonical_json

__all__ = ["MAX_BYTES", "MAX_SITES", "MIN_SITES", "Roster", "SignedRoster", "sign_roster"]

MAX_BYTES = 2**22
"""No roster is longer; `MAX_SITES` sites of the longest names are 1.6 MB."""
MIN_SITES, MAX_SITES = 3, 10_000

_FORMAT, _SIGNED_FORMAT = "fedcollm-roster-v1", "fedcollm-signed-roster-v1"
_LAST_SECOND = 253_402_300_799  # of the year 9999, the last that calendars show


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """The parties of a federation. From another party, only through `SignedRoster.verified_by`.

    Attributes:
        federation: its public name.
        server: the server's identity.
        sites: 3 to 10,000 sites, sorted by name; names and keys are unique, the server's included.
        valid_until: Unix seconds; at this second it is no longer valid.

    Raises:
        InvalidValue: any of this does not hold.
    """

    federation: str
    server: PublicIdentity
    sites: tuple[PublicIdentity, ...]
    valid_until: int

    def __post_init__(self) -> None:
        _validate.public_name(federation=self.federation)
        _validate.integer_at_least(1, valid_until=self.valid_until)
        if self.valid_until > _LAST_SECOND:
            raise InvalidValue("valid_until", self.valid_until, f"at most {_LAST_SECOND}, the end of the year 9999")
        if not MIN_SITES <= len(self.sites) <= MAX_SITES:
            allowed = f"{MIN_SITES} to {MAX_SITES}: a sum of fewer sites hides nobody"
            raise InvalidValue("number of sites", len(self.sites), allowed)
        names, keys = set[str](), dict[bytes, str]()
        for party in (self.server, *self.sites):
            if party.name in names:
                raise InvalidValue("sites", party.name, "names that no other site and not the server has")
            if party.public_key in keys:
                both = f"{keys[party.public_key]} and {party.name} with one key"
                raise InvalidValue("sites", both, "a key of its own for every site and for the server")
            names.add(party.name)
            keys[party.public_key] = party.name
        if list(self.site_names) != sorted(self.site_names):
            raise InvalidValue("sites", "another order", "sites sorted by name")

    @property
    def site_names(self) -> tuple[str, ...]:
        """The sites' names, sorted."""
        return tuple(site.name for site in self.sites)

    @property
    def digest(self) -> str:
        """SHA-256 of `to_bytes`, as 64 hex digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def site(self, name: str) -> PublicIdentity:
        """The identity of a site; the server is none.

        Raises:
            ProtocolError: no site has this name.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise ProtocolError(f"{name!r:.80} is no site of the federation {self.federation}; its roster has to name it")

    def require_valid(self, now: float) -> None:
        """Return if the roster is valid at ``now``, in Unix seconds.

        Raises:
            ProtocolError: it has expired, or ``now`` is no finite number.
        """
        if not (math.isfinite(now) and now < self.valid_until):
            raise ProtocolError(
                f"the roster of {self.federation} is not valid any more (until {self.valid_until}, now {now:.0f}, in "
                "Unix seconds): ask the governance for a new one, or correct this machine's clock"
            )

    def to_bytes(self) -> bytes:
        """Canonical JSON; equal rosters have equal bytes."""
        return canonical_json(
            {
                "format": _FORMAT,
                "federation": self.federation,
                "server": self.server.as_fields(),
                "sites": [site.as_fields() for site in self.sites],
                "valid_until": self.valid_until,
            }
        )

    @staticmethod
    def from_bytes(data: bytes) -> Roster:
        """The roster in ``data``, which must be exactly what `to_bytes` gives.

        Raises:
            ProtocolError: anything else.
        """
        fields = _parse(data, _FORMAT, {"federation", "server", "sites", "valid_until"})
        if not isinstance(fields["sites"], list):
            raise ProtocolError("the roster is malformed: sites is not a list")
        try:
            return Roster(
                federation=fields["federation"],
                server=PublicIdentity.from_fields(fields["server"]),
                sites=tuple(PublicIdentity.from_fields(site) for site in fields["sites"]),
                valid_until=fields["valid_until"],
            )
        except InvalidValue as error:
            raise ProtocolError(f"the roster is malformed: {error!s:.200}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedRoster:
    """A roster's bytes with a signature that nobody has checked yet; they become a `Roster` in `verified_by` only.

    Attributes:
        roster_bytes: `Roster.to_bytes`, untrusted.
        signature: for the purpose ``roster``, untrusted.
    """

    roster_bytes: bytes
    signature: bytes

    def verified_by(self, governance: PublicIdentity, now: float) -> Roster:
        """The roster, if the governance signed it and it is valid at ``now``, in Unix seconds.

        Raises:
            SignatureInvalid: the governance's key did not sign these bytes as a roster.
            ProtocolError: expired, or signed by the governance but malformed.
        """
        governance.verify("roster", self.roster_bytes, self.signature)
        roster = Roster.from_bytes(self.roster_bytes)
        roster.require_valid(now)
        return roster

    def to_bytes(self) -> bytes:
        """Canonical JSON, the roster in clear."""
        roster = json.loads(self.roster_bytes)
        return canonical_json({"format": _SIGNED_FORMAT, "roster": roster, "signature": self.signature.hex()})

    @staticmethod
    def from_bytes(data: bytes) -> SignedRoster:
        """The signed roster in ``data``; nothing in it has been verified.

        Raises:
            ProtocolError: not what `to_bytes` gives. The roster inside is judged once its signature holds.
        """
        fields = _parse(data, _SIGNED_FORMAT, {"roster", "signature"})
        digits = fields["signature"]
        if not isinstance(digits, str) or not re.fullmatch("[0-9a-f]{128}", digits):
            raise ProtocolError("the signed roster is malformed: signature is not 128 lower-case hex digits")
        return SignedRoster(roster_bytes=canonical_json(fields["roster"]), signature=bytes.fromhex(digits))


def sign_roster(roster: Roster, governance: SigningKey) -> SignedRoster:
    """The roster with the governance's signature, which says: these keys belong to these parties.

    Raises:
        InvalidValue: the governance's key is a party's too, which would then vouch for itself.
    """
    if governance.public.public_key in {party.public_key for party in (roster.server, *roster.sites)}:
        raise InvalidValue("governance", governance.name, "a key of its own, which no party in the roster has")
    data = roster.to_bytes()
    return SignedRoster(roster_bytes=data, signature=governance.sign("roster", data))


def _parse(data: bytes, form: str, expected: set[str]) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"the roster is {len(data)} bytes long; allowed: at most {MAX_BYTES}")
    try:
        fields = json.loads(data)
        canonical = canonical_json(fields) == data
    except (ValueError, RecursionError) as error:  # not UTF-8, a lone surrogate, NaN, a number or a nest without end
        raise ProtocolError("the roster is malformed: not JSON") from error
    if not canonical or not isinstance(fields, dict):
        raise ProtocolError("the roster is malformed: not a canonical JSON object; was it edited or re-formatted?")
    if fields.get("format") != form:
        raise ProtocolError(f"this is not a file of the format {form}; `keys roster` and `keys sign` make them")
    if set(fields) != {"format", *expected}:
        raise ProtocolError(f"the roster is malformed: its fields are not exactly {', '.join(sorted(expected))}")
    return fields
