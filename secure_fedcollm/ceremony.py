"""The coordinator's side of the ceremony: kits without keys go out, requests come back, grants go out.

::

    <dir>/ federation.yaml
           ceremony/(0700: authority/ governance.key) governance.pub parties.json admitted/ revoked/ roster.json
           kits/<party>/    to send once
           grants/<party>.grant.json   to send when all are in, and again after every change

The two keys here say who takes part. They are needed for nothing else: take the folder off-line between ceremonies.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedcollm_privacy.errors import KitError, ProtocolError
from fedcollm_privacy.identity import (
    PublicIdentity,
    SigningKey,
    is_encrypted,
    load_key,
    load_public,
)
from fedcollm_privacy.messages import canonical_json
from fedcollm_privacy.roster import Roster, SignedRoster, sign_roster
from secure_fedcollm import flare_provisioning as flare
from secure_fedcollm.certificates import ca_fingerprint, check_certificate, load_certificate
from secure_fedcollm.enrolment import Grant, Signed
from secure_fedcollm.federation_file import FederationFile
from secure_fedcollm.kit import Party
from secure_fedcollm.kit_files import read_bytes, write_file

__all__ = ["Ceremony", "Examined"]

_DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A request that fits this federation; whether its key is the party's own, a person finds out.

    Attributes:
        signed: the request.
        standing: ``new``, ``renewed`` (another TLS key), ``replaced`` (another identity), ``known`` (nothing new).
    """

    signed: Signed
    standing: str

    @property
    def party(self) -> str:
        """Who asks."""
        return self.signed.enrolment.party

    @property
    def identity(self) -> PublicIdentity:
        """With which key."""
        return self.signed.enrolment.identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceremony:
    """The coordinator's folder.

    Attributes:
        folder: the folder.
        federation: what ``federation.yaml`` says.
        governance: the public half of its key.
        kits: each party's kit, 32 hex digits.
    """

    folder: Path
    federation: FederationFile
    governance: PublicIdentity
    kits: dict[str, str]

    @staticmethod
    def open(folder: Path) -> Ceremony:
        """The ceremony in a folder that `new_federation.begin` made.

        Raises:
            KitError: it is none, or a file of it is missing or damaged.
            ConfigError: ``federation.yaml`` was edited into something that is not allowed.
        """
        place = folder / "ceremony"
        if not place.is_dir():
            raise KitError(f"{folder} is no folder that `fedcollm deploy init` made: it has no ceremony/")
        try:
            kits = json.loads(read_bytes(place / "parties.json"))
        except ValueError:
            kits = None
        federation = FederationFile.read(folder / "federation.yaml")
        if not isinstance(kits, dict) or set(kits) != set(federation.parties):
            raise KitError(
                f"{place}/parties.json and federation.yaml name other parties: put back the federation.yaml of "
                "`fedcollm deploy init`; for other parties begin in a new folder"
            )
        governance = load_public(place / "governance.pub")
        return Ceremony(folder=folder, federation=federation, governance=governance, kits=kits)

    @property
    def authority(self) -> Path:
        """NVIDIA FLARE's authority."""
        return self.folder / "ceremony" / "authority"

    @property
    def revoked(self) -> tuple[str, ...]:
        """Sites that were revoked."""
        return tuple(p for p in self.federation.sites if (self.folder / "ceremony" / "revoked" / p).exists())

    @property
    def awaited(self) -> tuple[str, ...]:
        """Parties whose request was not admitted yet."""
        return tuple(p for p in self.federation.parties if p not in self.revoked and not self._record(p).exists())

    def party(self, name: str) -> Party:
        """What this party's ``party.yaml`` says."""
        return Party.of(self.federation, name, self.kits[name])

    def admitted(self, name: str) -> Signed | None:
        """The request of this party that was admitted last."""
        if not self._record(name).exists():
            return None
        return Signed.from_bytes(canonical_json(self._fields(name)["signed"]))

    def roster(self) -> Roster | None:
        """The roster that was signed last, expired or not; KitError if it is not the governance's."""
        path = self.folder / "ceremony" / "roster.json"
        if not path.exists():
            return None
        try:
            return SignedRoster.from_bytes(read_bytes(path)).verified_by(self.governance, 0.0)
        except ProtocolError as error:
            raise KitError(f"{path}: {error}") from error

    def is_locked(self) -> bool:
        """Whether the governance's key asks for a passphrase."""
        return is_encrypted(self.folder / "ceremony" / "governance.key")

    def key(self, passphrase: bytes | None) -> SigningKey:
        """The governance's key; KeyFileError if it does not open, KitError if it is another than ``governance.pub``."""
        key = load_key(self.folder / "ceremony" / "governance.key", passphrase)
        if key.public != self.governance:
            raise KitError(f"{self.folder}/ceremony: governance.key and governance.pub do not belong together")
        return key

    def examine(self, data: bytes, *, replace: bool) -> Examined:
        """Whether a request fits this federation, and what it would change.

        Args:
            data: a request, unverified.
            replace: allow another identity in the place of an admitted one.

        Raises:
            KitError: it was altered, is of another federation, kit or authority, for another name, from a revoked
                party, older than what was admitted, or has another identity and ``replace`` is false.
        """
        signed = Signed.from_bytes(data)
        asks = signed.enrolment
        mine = f"this is {self.federation.name}"
        if asks.federation != self.federation.name:
            raise KitError(f"the request of {asks.party} is for the federation {asks.federation}, and {mine}")
        if asks.party not in self.kits:
            raise KitError(f"{asks.party} is not in federation.yaml; parties: {', '.join(self.kits)}")
        if asks.party in self.revoked:
            raise KitError(
                f"{asks.party} was revoked and is not admitted again; a site that comes back takes a new name"
            )
        party = self.party(asks.party)
        if asks.role != party.role:
            raise KitError(f"{asks.party} asks to be a {asks.role}, and in federation.yaml it is a {party.role}")
        if asks.kit != party.kit or asks.ca != ca_fingerprint(self._ca()):
            raise KitError(
                f"the request of {asks.party} was made with another kit than the one in kits/{asks.party}: send that "
                "folder again"
            )
        if set(asks.requests) != set(party.subjects):
            raise KitError(f"the request of {asks.party} has not exactly the parts {', '.join(party.subjects)}")
        for stem, subject in party.subjects.items():
            try:
                flare.require_request(asks.requests[stem], self.federation.name, subject)
            except KitError as error:
                raise KitError(f"the request of {asks.party}: {error}") from error
        return Examined(signed=signed, standing=self._standing(signed, replace))

    def admit(self, examined: Examined) -> None:
        """Have the certificates of a request issued, check them, and note both.

        Raises:
            KitError: NVIDIA FLARE refuses, or what it issued is not what was asked.
        """
        if examined.standing == "known":
            return
        party = self.party(examined.party)
        issued = {}
        for stem, subject in party.subjects.items():
            request = examined.signed.enrolment.requests[stem]
            issued[stem] = flare.issue(request, self.authority, self.federation.certificate_days)
            certificate = load_certificate(
                flare.certificate_in(issued[stem], subject), f"what was issued to {party.party}"
            )
            check_certificate(certificate, ca=self._ca(), subject=subject, now=datetime.now(UTC))
        fields = {
            "signed": json.loads(examined.signed.to_bytes()),
            "certificates": {stem: zipped.hex() for stem, zipped in issued.items()},
        }
        write_file(self._record(examined.party), json.dumps(fields).encode())

    def grants(self, key: SigningKey, *, fresh: bool = False) -> tuple[Path, ...]:
        """Sign the roster, if it has to be, and write a grant for every party.

        Args:
            key: the governance's.
            fresh: sign a new roster although the last one still names these parties.

        Returns:
            The files; none while a party is awaited.

        Raises:
            KitError: too few sites are left.
        """
        if self.awaited:
            return ()
        signed = self._signed_roster(key, fresh)
        folder = self.folder / "grants"
        folder.mkdir(mode=0o700, exist_ok=True)
        written = []
        for name in self.kits:
            path = folder / f"{name}.grant.json"
            if name in self.revoked:
                path.unlink(missing_ok=True)
                continue
            grant = Grant(
                federation=self.federation.name,
                party=name,
                kit=self.kits[name],
                roster=signed,
                certificates={s: bytes.fromhex(z) for s, z in self._fields(name)["certificates"].items()},
                revoked=self.revoked,
            )
            write_file(path, grant.to_bytes())
            written.append(path)
        return tuple(written)

    def revoke(self, name: str, key: SigningKey) -> tuple[Path, ...]:
        """Take a site out of the roster, for good.

        Args:
            name: the site's.
            key: the governance's.

        Returns:
            The grants that were written for the others; none while a party is awaited.

        Raises:
            KitError: it is no site of this federation, or too few sites would be left.
        """
        if name not in self.federation.sites:
            what = "the server, without which there is no federation" if name in self.kits else "not in federation.yaml"
            raise KitError(f"{name} is {what}; sites: {', '.join(self.federation.sites)}")
        if name in self.revoked:  # cut before its roster was signed, perhaps
            return self.grants(key)
        left, least = len(self.federation.sites) - len(self.revoked) - 1, self.federation.min_contributors
        if left < least:
            raise KitError(
                f"without {name}, {left} sites are left, and {least} are needed (min_contributors): no sum could be "
                "opened any more. End the federation instead, or begin another with other sites"
            )
        marker = self.folder / "ceremony" / "revoked" / name
        write_file(marker, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}\n".encode())
        self._record(name).unlink(missing_ok=True)
        return self.grants(key)

    def _record(self, name: str) -> Path:
        return self.folder / "ceremony" / "admitted" / f"{name}.json"

    def _fields(self, name: str) -> dict[str, dict[str, str]]:
        path = self._record(name)
        try:
            found = json.loads(read_bytes(path))
            return {part: dict(found[part]) for part in ("signed", "certificates")}
        except (ValueError, TypeError, KeyError):
            raise KitError(f"{path} is damaged: move it away and admit {name} again") from None

    def _ca(self) -> x509.Certificate:
        return load_certificate(read_bytes(self.authority / "rootCA.pem"), f"{self.authority}/rootCA.pem")

    def _standing(self, signed: Signed, replace: bool) -> str:
        before, asks = self.admitted(signed.enrolment.party), signed.enrolment
        if before is None:
            return "new"
        if before.digest == signed.digest:
            return "known"
        if asks.made_at <= before.enrolment.made_at:
            raise KitError(
                f"the request of {asks.party} is not later than the one that was admitted: ask for its latest, "
                "and whether its clock is right"
            )
        if before.enrolment.identity == asks.identity:
            return "renewed"
        if not replace:
            raise KitError(
                f"{asks.party} was admitted with another identity ({before.enrolment.identity.fingerprint}), and asks "
                f"with {asks.identity.fingerprint}. If its key is lost or stolen, ask it by telephone, then give "
                "--replace. Its ledger is signed by the old key and ends with it: what it counts as spent is not "
                "carried over, so its new policy must leave room for that"
            )
        return "replaced"

    def _signed_roster(self, key: SigningKey, fresh: bool) -> SignedRoster:
        identities = {name: self._identity(name) for name in self.kits if name not in self.revoked}
        server = identities.pop(self.federation.server.name)
        sites = tuple(sorted(identities.values(), key=lambda site: site.name))
        before, now = self.roster(), time.time()
        path = self.folder / "ceremony" / "roster.json"
        same = before is not None and (before.server, before.sites) == (server, sites)
        if before is not None and same and not fresh and now < before.valid_until:
            return SignedRoster.from_bytes(read_bytes(path))
        # Strictly later than before, so that every kit can tell the older of two.
        least = 0 if before is None else before.valid_until + 1
        until = max(int(now) + self.federation.valid_days * _DAY_S, least)
        signed = sign_roster(
            Roster(federation=self.federation.name, server=server, sites=sites, valid_until=until), key
        )
        write_file(path, signed.to_bytes())
        return signed

    def _identity(self, name: str) -> PublicIdentity:
        signed = self.admitted(name)
        if signed is None:
            raise KitError(f"{name} was not admitted")
        return signed.enrolment.identity
