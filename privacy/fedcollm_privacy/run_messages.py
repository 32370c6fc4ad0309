"""What server and sites say to each other around a run: its offer, the answer, and at the end what a site claims.

These types check their form only. Whether an offer is the server's and what a site makes of its terms is decided by the
site; what of a site's claims may be published is decided where the statement is composed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue

__all__ = ["STANDINGS", "ClaimsRequest", "RunAnswer", "RunOffer", "SiteClaims"]

STANDINGS = ("joined", "waiting")
"""How a site stands to a run that it was offered: it takes part, or its administrator has not decided yet."""

_MAX_JSON = 2**20
_SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimsRequest:
    """Server to site: what may the run's statement say of you?

    Raises:
        InvalidValue: ``run_id`` is no public name.
    """

    run_id: str

    def __post_init__(self) -> None:
        _validate.public_name(run_id=self.run_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteClaims:
    """Site to server: what the statement may say of it, by its own ledger and plan.

    Attributes:
        claims: canonical JSON, as `endorsement.site_claims` makes it; at most 1 MiB.

    Raises:
        InvalidValue: a name is no public name, or the claims are no bytes or too long.
    """

    site: str
    run_id: str
    claims: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site, run_id=self.run_id)
        _bounded("claims", self.claims)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOffer:
    """Server to site: the terms of a run; do you take part?

    Attributes:
        terms: the run's terms in canonical JSON; at most 1 MiB.
        signature: of ``terms`` by the server's key, purpose ``run_offer``, 64 bytes.

    Raises:
        InvalidValue: ``run_id`` is no public name, or a field is of another length or type.
    """

    run_id: str
    terms: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _validate.public_name(run_id=self.run_id)
        _bounded("terms", self.terms)
        if type(self.signature) is not bytes or len(self.signature) != _SIGNATURE_BYTES:
            raise InvalidValue("signature", _size(self.signature), f"{_SIGNATURE_BYTES} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAnswer:
    """Site to server: how it stands to the run. One that says no declines, as with every other request.

    Attributes:
        terms_digest: SHA-256 of the terms that the answer is about.
        standing: one of `STANDINGS`.

    Raises:
        InvalidValue: a field is not of this form.
    """

    site: str
    run_id: str
    terms_digest: str
    standing: str

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site, run_id=self.run_id)
        _validate.hex_digest(terms_digest=self.terms_digest)
        _validate.one_of(STANDINGS, standing=self.standing)


def _bounded(name: str, value: object) -> None:
    if type(value) is not bytes or len(value) > _MAX_JSON:
        raise InvalidValue(name, _size(value), f"bytes, at most {_MAX_JSON} of them")


def _size(value: object) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
