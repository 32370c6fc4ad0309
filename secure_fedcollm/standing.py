"""How a site stands to what it is asked: files that the site writes and its administrator answers with files.

In the site's ``state`` folder::

    offers/<digest>.json    a run that was offered, in plain words; <digest> is that of its terms
    approvals/<digest>      the administrator said yes to these terms, and to no others
    declined/<digest>       the administrator said no, or took the yes back
    paused, left            nothing is taken part in, for now or for good
    joined.json             the run that this site takes part in, with the server's signature

Commands touch these files only, so they need no running site; a site looks at them at every offer and every round.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import ConfigError, FedCollmError, InvalidValue
from fedcollm_privacy.messages import canonical_json
from secure_fedcollm.atomic_file import sync_folder, write_atomically

__all__ = ["Joined", "Offered", "Standing"]

_FORMAT = "fedcollm-joined-v1"
_DIGEST = re.compile("[0-9a-f]{64}")
_PREFIX = re.compile("[0-9a-f]{4,64}")
_MOST_OFFERS = 200  # a server must not fill the disk
_LARGEST = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A run that was offered, for a person.

    Attributes:
        digest: of its terms.
        run_id: its name.
        summary: what it asks for, in one line.
        standing: ``joined``, ``waiting``, ``approved`` (the site joins when asked next) or ``declined``.
    """

    digest: str
    run_id: str
    summary: str
    standing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The run that a site takes part in, as it was offered; whoever reads it verifies the signature again."""

    run_id: str
    terms: bytes
    signature: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the terms, as 64 hex digits."""
        return hashlib.sha256(self.terms).hexdigest()


class Standing:
    """The files of one site.

    Args:
        state: the site's ``state`` folder; made when absent, for its owner only.
    """

    def __init__(self, state: Path) -> None:
        self._state = state

    @property
    def stopped(self) -> Literal["left", "paused"] | None:
        """Whether the administrator wants no part in anything; whatever stands in the files."""
        for word in ("left", "paused"):
            if os.path.lexists(self._state / word):
                return "left" if word == "left" else "paused"
        return None

    def remember(self, digest: str, *, run_id: str, summary: str, facts: Mapping[str, Any]) -> bool:
        """Note an offer for the administrator; gives whether it is new. The oldest go when they become many.

        Raises:
            InvalidValue: the digest is none.
        """
        path = self._path("offers", digest)
        if path.exists():
            return False
        offers = sorted((p for p in path.parent.glob("*.json")), key=lambda p: p.stat().st_mtime)
        for oldest in offers[: max(0, len(offers) - _MOST_OFFERS + 1)]:
            oldest.unlink(missing_ok=True)
        told = {"digest": digest, "run_id": run_id, "summary": summary, **facts}
        _write(path, json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        return True

    def offers(self) -> tuple[Offered, ...]:
        """All that were offered, the oldest first.

        Raises:
            FedCollmError: a file cannot be read.
        """
        found = []
        joined = self.joined()
        paths = [p for p in (self._state / "offers").glob("*.json") if _DIGEST.fullmatch(p.stem)]
        for path in sorted(paths, key=lambda p: (p.stat().st_mtime, p.name)):
            told = _read(path)
            standing = "waiting"
            if self.declined(path.stem):
                standing = "declined"
            elif joined is not None and joined.digest == path.stem:
                standing = "joined"
            elif self.approved(path.stem):
                standing = "approved"
            texts = {name: str(told.get(name, "")) for name in ("run_id", "summary")}
            found.append(Offered(digest=path.stem, standing=standing, **texts))
        return tuple(found)

    def approved(self, digest: str) -> bool:
        """Whether the administrator said yes to these terms."""
        return self._path("approvals", digest).exists() and not self.declined(digest)

    def declined(self, digest: str) -> bool:
        """Whether the administrator said no to these terms."""
        return self._path("declined", digest).exists()

    def approve(self, offer: str) -> str:
        """Say yes to an offer, named by the first digits of its digest; gives the run's name.

        Raises:
            ConfigError: none, or more than one, begins so.
        """
        chosen = self._named(offer)
        _write(self._path("approvals", chosen.digest), b"")
        _remove(self._path("declined", chosen.digest))
        return chosen.run_id

    def decline(self, offer: str) -> str:
        """Say no to an offer, or take a yes back; gives the run's name.

        Raises:
            ConfigError: none, or more than one, begins so.
        """
        chosen = self._named(offer)
        _write(self._path("declined", chosen.digest), b"")
        _remove(self._path("approvals", chosen.digest))
        return chosen.run_id

    def pause(self) -> None:
        """Take part in nothing until `resume`."""
        _write(self._state / "paused", b"")

    def resume(self) -> None:
        """Take part again after `pause`.

        Raises:
            ConfigError: the site has left; that is for good.
        """
        if self.stopped == "left":
            path = self._state / "left"
            raise ConfigError(
                "resume", "left", f"a site that is paused; this one has left. To come back, remove {path}"
            )
        _remove(self._state / "paused")

    def leave(self) -> None:
        """Take part in nothing again."""
        _write(self._state / "left", b"")

    def join(self, joined: Joined) -> None:
        """Note the run that this site takes part in, instead of the one before; on disk when this returns."""
        told = {
            "format": _FORMAT,
            "run_id": joined.run_id,
            "terms": joined.terms.decode(),
            "signature": joined.signature.hex(),
        }
        _write(self._state / "joined.json", canonical_json(told))

    def unjoin(self) -> None:
        """Forget the run that was to be joined, because it could not be."""
        _remove(self._state / "joined.json")

    def joined(self) -> Joined | None:
        """The run that this site takes part in; nothing in it has been verified.

        Raises:
            FedCollmError: the file is damaged.
        """
        path = self._state / "joined.json"
        if not path.exists():
            return None
        told = _read(path)
        try:
            if set(told) != {"format", "run_id", "terms", "signature"} or told["format"] != _FORMAT:
                raise ValueError("other fields")
            _validate.public_name(run_id=told["run_id"])
            return Joined(
                run_id=told["run_id"], terms=told["terms"].encode(), signature=bytes.fromhex(told["signature"])
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise FedCollmError(f"{path} is damaged: remove it, and the site joins when it is asked again") from error

    def _named(self, offer: str) -> Offered:
        found = [known for known in self.offers() if _PREFIX.fullmatch(offer) and known.digest.startswith(offer)]
        if len(found) != 1:
            listed = ", ".join(known.digest[:16] for known in self.offers()) or "there are none"
            raise ConfigError("offer", offer, f"the first 4 or more digits of one offer: {listed}")
        return found[0]

    def _path(self, kind: str, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise InvalidValue("digest", f"{digest!r:.80}", "64 lower-case hex digits")
        return self._state / kind / (f"{digest}.json" if kind == "offers" else digest)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            told = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise FedCollmError(f"{path} cannot be read: remove it, and it is written anew when the server asks") from error
    if not isinstance(told, dict):
        raise FedCollmError(f"{path} is damaged: remove it, and it is written anew when the server asks")
    return told


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(path, content, mode=0o600)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync_folder(path.parent)
