"""What server and sites say to each other about a run's privacy statement; `endorsement` decides what is signed."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue

__all__ = ["Endorsement", "StatementOffer"]

_MAX_BYTES = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementOffer:
    """Server to site: the statement of the run, as the server would publish it; please sign it.

    Attributes:
        payload: an in-toto statement in canonical JSON.
    """

    run_id: str
    payload: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _validate.public_name(run_id=self.run_id)
        if len(self.payload) > _MAX_BYTES:
            raise InvalidValue("payload", f"{len(self.payload)} bytes", f"at most {_MAX_BYTES} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endorsement:
    """Site to server: its DSSE signature under the payload.

    Attributes:
        statement: SHA-256 of the payload.
    """

    site: str
    statement: str
    signature: bytes

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)
        _validate.hex_digest(statement=self.statement)
