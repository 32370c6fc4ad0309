"""A party's kit on its own machine: one folder with all that ``fedcollm server`` or ``fedcollm site`` needs.

::

    <kit>/ party.yaml governance.pub ca.pem          from the coordinator, public
           keys/identity.key .pub tls.key [lead.key]  made here, never copied anywhere
           tls.pem [lead.pem] roster.json             from the grant
           engine/ [engine-admin/]                    NVIDIA FLARE's start-up kit
           site.yaml policy.yaml                      the administrator's own word, at a site
           state/                                     ledger, journal, logs, socket
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography import x509

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import KitError, ProtocolError
from fedcollm_privacy.identity import PublicIdentity, SigningKey, load_key, load_public
from fedcollm_privacy.roster import Roster, SignedRoster
from secure_fedcollm.certificates import Subject, check_certificate, key_in, load_certificate, public_bytes
from secure_fedcollm.federation_file import FederationFile, ServerAddress, parse_yaml
from secure_fedcollm.kit_files import read_bytes
from secure_fedcollm.strict_build import build, check

__all__ = ["FORMAT", "LEAD", "Kit", "Party", "Role", "read_party", "require_member", "require_private"]

FORMAT = "fedcollm-kit-v1"
LEAD = "lead@fedcollm.server"
"""The engine's name for whoever submits jobs: the server's own process, and nobody else."""

Role = Literal["server", "site"]
_LONGEST_SOCKET = 107  # bytes in the address of a Unix socket, without its final zero
_JOIN = "run `fedcollm deploy join {0}`"
_COMPLETE = "run `fedcollm deploy complete {0} GRANT` with the grant that the coordinator sent"
_AGAIN = "put back a copy, or ask the coordinator for the kit's public files again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """``party.yaml``: whose kit this is.

    Attributes:
        format: `FORMAT`.
        federation: public name.
        party: the party's public name.
        role: ``server`` or ``site``.
        org: the organisation in its certificate.
        contact: whom to call when something is wrong.
        kit: 32 hex digits that only this kit has; its request names them.
        server: the server's name and address.
        min_contributors: fewest sites in an opened sum, as agreed.
        max_colluding: how many sites may work with the server, as agreed.
    """

    format: str
    federation: str
    party: str
    role: Role
    org: str
    contact: str
    kit: str
    server: ServerAddress
    min_contributors: int
    max_colluding: int

    def __post_init__(self) -> None:
        check(self.format == FORMAT, "format", self.format, FORMAT)
        _validate.public_name(federation=self.federation, party=self.party)
        check(len(self.kit) == 32 and set(self.kit) <= set("0123456789abcdef"), "kit", self.kit, "32 hex digits")
        check((self.role == "server") == (self.party == self.server.name), "role", self.role, "the party's own")

    @staticmethod
    def of(federation: FederationFile, name: str, kit: str) -> Party:
        """The party ``name`` of a federation, with this kit."""
        return Party(
            format=FORMAT,
            federation=federation.name,
            party=name,
            role="server" if name == federation.server.name else "site",
            org=federation.org,
            contact=federation.contact,
            kit=kit,
            server=federation.server,
            min_contributors=federation.min_contributors,
            max_colluding=federation.max_colluding,
        )

    @property
    def subjects(self) -> dict[str, Subject]:
        """Whom each of its certificates names, by the file's stem."""
        if self.role == "site":
            return {"tls": Subject(name=self.party, role="client", org=self.org)}
        return {
            "tls": Subject(name=self.server.host, role="server", org=self.org),
            "lead": Subject(name=LEAD, role="lead", org=self.org),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """A complete kit: its party has joined and holds the coordinator's grant. Made by `open` only.

    Attributes:
        folder: absolute.
        party: what ``party.yaml`` says.
        governance: whose signature makes a roster; pinned here.
        ca: the federation's certificate authority; pinned here.
        public: the party's own identity.
        certificates: by the file's stem, ``tls`` and at the server ``lead``.
    """

    folder: Path
    party: Party
    governance: PublicIdentity
    ca: x509.Certificate
    public: PublicIdentity
    certificates: dict[str, x509.Certificate]

    @property
    def role(self) -> Role:
        """``server`` or ``site``."""
        return self.party.role

    @property
    def name(self) -> str:
        """The party's public name."""
        return self.party.party

    @property
    def federation(self) -> str:
        """The federation's public name."""
        return self.party.federation

    @property
    def server_host(self) -> str:
        """Where the server is reached; also the engine's name for it."""
        return self.party.server.host

    @property
    def server_port(self) -> int:
        """The server's one open port."""
        return self.party.server.port

    @property
    def state(self) -> Path:
        """Ledger, journal, logs, socket."""
        return self.folder / "state"

    @property
    def engine(self) -> Path:
        """The engine's start-up kit, which is its workspace too."""
        return self.folder / "engine"

    @property
    def engine_admin(self) -> Path:
        """The start-up kit of `lead`; at the server only."""
        return self.folder / "engine-admin"

    @property
    def lead(self) -> str:
        """The engine's name for whoever submits jobs."""
        return LEAD

    @property
    def socket(self) -> Path:
        """Where the party's process and the engine's job process meet."""
        return self.state / "engine.sock"

    @property
    def valid_until(self) -> datetime:
        """When the first of its certificates, or the authority's, ends."""
        return min(held.not_valid_after_utc for held in (self.ca, *self.certificates.values()))

    def identity(self, passphrase: bytes | None) -> SigningKey:
        """The party's signing key.

        Raises:
            KeyFileError: as `fedcollm_privacy.identity.load_key`.
            KitError: the file holds another party's key.
        """
        key = load_key(self.folder / "keys" / "identity.key", passphrase)
        if key.public != self.public:
            raise KitError(f"{self.folder}/keys/identity.key is not the key of identity.pub: put back the right file")
        return key

    def roster(self, now: float) -> Roster:
        """The roster, and that this party may take part at ``now``, in Unix seconds.

        Raises:
            KitError: the roster is damaged, another federation's, or does not name this party with this key; or a
                certificate does not hold at ``now``.
            SignatureInvalid: the kit's governance did not sign it.
            ProtocolError: it has expired.
        """
        path = self.folder / "roster.json"
        try:
            roster = SignedRoster.from_bytes(read_bytes(path)).verified_by(self.governance, now)
        except ProtocolError as error:
            raise type(error)(f"{path}: {error}") from error
        require_member(roster, self.party, self.public)
        moment = datetime.fromtimestamp(now, UTC)
        for stem, subject in self.party.subjects.items():
            check_certificate(self.certificates[stem], ca=self.ca, subject=subject, now=moment)
        return roster

    @staticmethod
    def open(folder: Path) -> Kit:
        """The kit in a folder. Signatures, names and dates are checked by `roster`.

        Raises:
            KitError: it is no kit, a file of it is missing, damaged or readable by others, a certificate is not that of
                its key, or its folder's name is too long for a socket.
            ConfigError: ``party.yaml`` is not what the coordinator wrote.
            KeyFileError: ``governance.pub`` or ``identity.pub`` is damaged.
        """
        folder = folder.expanduser().absolute()
        party = read_party(folder)
        socket = folder / "state" / "engine.sock"
        if len(os.fsencode(socket)) > _LONGEST_SOCKET:
            raise KitError(
                f"{socket} is {len(os.fsencode(socket))} bytes long, and a socket's path has at most "
                f"{_LONGEST_SOCKET}: move the kit into a folder with a shorter name"
            )
        governance = load_public(_present(folder, "governance.pub", _AGAIN))
        ca = load_certificate(read_bytes(_present(folder, "ca.pem", _AGAIN)), f"{folder}/ca.pem")
        public = load_public(_present(folder, "keys/identity.pub", _JOIN))
        if public.name != party.party:
            raise KitError(f"{folder}/keys/identity.pub names {public.name}, and this is the kit of {party.party}")
        require_private(folder / "keys")
        _present(folder, "keys/identity.key", "put back a copy; without one, begin a new kit")
        _present(folder, "roster.json", _COMPLETE)
        held = {}
        for stem in party.subjects:
            held[stem] = load_certificate(
                read_bytes(_present(folder, f"{stem}.pem", _COMPLETE)), f"{folder}/{stem}.pem"
            )
            key = _present(folder, f"keys/{stem}.key", "put back a copy, or `fedcollm deploy renew {0}`")
            if key_in(key) != public_bytes(held[stem]):
                raise KitError(f"{key} is not the key of {stem}.pem: {_COMPLETE.format(folder)} once more")
        for place, stem in _ENGINES[party.role].items():
            _present(folder, f"{place}/local", _COMPLETE)
            engine = read_bytes(_present(folder, place + "/startup/" + _CERTIFICATE[place, party.role], _COMPLETE))
            if load_certificate(engine, f"{folder}/{place}") != held[stem]:
                raise KitError(f"{folder}/{place} holds another certificate: {_COMPLETE.format(folder)} once more")
        return Kit(folder=folder, party=party, governance=governance, ca=ca, public=public, certificates=held)


_ENGINES: dict[Role, dict[str, str]] = {"server": {"engine": "tls", "engine-admin": "lead"}, "site": {"engine": "tls"}}
_CERTIFICATE: dict[tuple[str, Role], str] = {
    ("engine", "server"): "server.crt",
    ("engine", "site"): "client.crt",
    ("engine-admin", "server"): "client.crt",
}


def read_party(folder: Path) -> Party:
    """Whose kit a folder is, complete or not.

    Raises:
        KitError: the folder is missing or no kit.
        ConfigError: ``party.yaml`` is not what the coordinator wrote.
    """
    if not (folder / "party.yaml").is_file():
        what = "has no party.yaml, so it is no kit" if folder.is_dir() else "is no folder"
        raise KitError(f"{folder} {what}: give the folder that the coordinator made with `fedcollm deploy init`")
    return build(Party, parse_yaml(folder / "party.yaml"))


def require_private(folder: Path) -> None:
    """Return if only its owner can look into a folder; KitError otherwise."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077:
        raise KitError(f"{folder} is open to other users (mode {mode:04o}): chmod 700 {folder}")


def require_member(roster: Roster, party: Party, public: PublicIdentity) -> None:
    """Return if the roster is this federation's and names this party with this key.

    Raises:
        KitError: it is not, or does not.
    """
    if roster.federation != party.federation:
        raise KitError(f"the roster is that of {roster.federation}, and not of {party.federation}")
    if roster.server.name != party.server.name:
        raise KitError(f"the roster's server is {roster.server.name}, and this kit's is {party.server.name}")
    try:
        named = roster.server if party.role == "server" else roster.site(party.party)
    except ProtocolError:
        raise KitError(
            f"the roster of {party.federation} does not name {party.party}: it was revoked, or the file is not yours. "
            f"Ask {party.contact}"
        ) from None
    if named != public:
        raise KitError(
            f"the roster names {party.party} with another key ({named.fingerprint}), and this kit's is "
            f"{public.fingerprint}: ask {party.contact}"
        )


def _present(folder: Path, name: str, otherwise: str) -> Path:
    path = folder / name
    if not path.exists():
        raise KitError(f"{path} is missing: {otherwise.format(folder)}")
    return path
