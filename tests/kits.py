"""Kits made by hand, with certificates of our own, for tests of what looks at a kit; the ceremony makes others."""

from __future__ import annotations

import datetime as dt
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, create_server

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedcollm_privacy.identity import SigningKey, save_key, save_public
from fedcollm_privacy.roster import Roster, sign_roster
from secure_fedcollm.kit import FORMAT, LEAD, Role
from secure_fedcollm.site_settings import settings_text

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
DAY = dt.timedelta(days=1)
FEDERATION, ORG = "north", "clinic"


def _name(common: str, role: str) -> x509.Name:
    pairs = ((NameOID.COMMON_NAME, common), (NameOID.UNSTRUCTURED_NAME, role), (NameOID.ORGANIZATION_NAME, ORG))
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in pairs])


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate with its key, as PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """A certificate authority like FLARE's."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _name(FEDERATION, "rootCA")
        usage = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
        )
        made = (
            self._builder(self._subject, self._key, NOW - 400 * DAY, NOW + 3650 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = made.public_bytes(serialization.Encoding.PEM)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, begin: dt.datetime, end: dt.datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
        )

    def issue(
        self, name: str, role: str, *, begin: dt.datetime = NOW - 10 * DAY, end: dt.datetime = NOW + 365 * DAY
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        made = (
            self._builder(_name(name, role), key, begin, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return Issued(certificate=made.public_bytes(serialization.Encoding.PEM), key=key.private_bytes(*form))


@dataclass(frozen=True, kw_only=True)
class MadeKit:
    folder: Path
    authority: Authority
    governance: SigningKey
    server: SigningKey
    key: SigningKey
    roster: Roster


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def give(folder: Path, stem: str, issued: Issued, role: Role) -> None:
    """Put a certificate and its key where a kit has them."""
    write(folder / f"{stem}.pem", issued.certificate)
    write(folder / "keys" / f"{stem}.key", issued.key, 0o600)
    place = "engine" if stem == "tls" else "engine-admin"
    name = "server" if (place, role) == ("engine", "server") else "client"
    write(folder / place / "startup" / f"{name}.crt", issued.certificate)
    write(folder / place / "startup" / f"{name}.key", issued.key, 0o600)
    (folder / place / "local").mkdir(exist_ok=True)


def make_kit(folder: Path, role: Role, *, port: int, host: str = "localhost") -> MadeKit:
    """A complete kit of ``ward-a`` or of the server; site.yaml and records included, policy.yaml not."""
    authority, governance = Authority(), SigningKey.generate("governance")
    server = SigningKey.generate("hub")
    sites = {name: SigningKey.generate(name) for name in ("ward-a", "ward-b", "ward-c")}
    key = server if role == "server" else sites["ward-a"]
    roster = Roster(
        federation=FEDERATION,
        server=server.public,
        sites=tuple(site.public for site in sites.values()),
        valid_until=int((NOW + 200 * DAY).timestamp()),
    )
    folder.mkdir(mode=0o755)
    (folder / "keys").mkdir(mode=0o700)
    (folder / "state").mkdir(mode=0o700)
    party = {
        "format": FORMAT,
        "federation": FEDERATION,
        "party": key.name,
        "role": role,
        "org": ORG,
        "contact": "Ada, extension 12",
        "kit": "0" * 32,
        "server": {"name": "hub", "host": host, "port": port},
        "min_contributors": 3,
        "max_colluding": 1,
    }
    write(folder / "party.yaml", json.dumps(party).encode())
    write(folder / "ca.pem", authority.pem)
    save_public(governance.public, folder / "governance.pub")
    save_key(key, folder / "keys" / "identity.key", None)
    save_public(key.public, folder / "keys" / "identity.pub")
    write(folder / "roster.json", sign_roster(roster, governance).to_bytes())
    if role == "server":
        give(folder, "tls", authority.issue(host, "server"), role)
        give(folder, "lead", authority.issue(LEAD, "lead"), role)
    else:
        give(folder, "tls", authority.issue(key.name, "client"), role)
        records = b"".join(b'{"text": "note %d of a made-up patient"}\n' % number for number in range(30))
        write(folder / "records.jsonl", records, 0o600)
        write(folder / "site.yaml", settings_text(site=key.name, path=str(folder / "records.jsonl")).encode())
    return MadeKit(folder=folder, authority=authority, governance=governance, server=server, key=key, roster=roster)


@contextmanager
def tls_server(
    authority: Authority, folder: Path, *, host: str = "localhost", trusts: Authority | None = None, talks: bool = True
) -> Iterator[int]:
    """A real server with mutual TLS on a free port; ``trusts`` is whose clients it takes."""
    issued = authority.issue(host, "server")
    write(folder / "server.pem", issued.certificate + issued.key, 0o600)
    write(folder / "clients.pem", (trusts or authority).pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    context.load_verify_locations(folder / "clients.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])

    def serve(raw: object) -> None:
        with suppress(OSError), context.wrap_socket(raw, server_side=True) as secured:  # type: ignore[arg-type]
            if talks:
                secured.sendall(b"\0")
            secured.recv(1)

    with _accepting(serve) as port:
        yield port


@contextmanager
def _accepting(serve: Callable[[object], None]) -> Iterator[int]:
    with create_server(("127.0.0.1", 0), family=AF_INET) as listening:
        listening.settimeout(0.1)
        stop = threading.Event()

        def loop() -> None:
            while not stop.is_set():
                with suppress(TimeoutError):
                    connection, _ = listening.accept()
                    connection.settimeout(5)
                    with connection:
                        serve(connection)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            stop.set()
            thread.join()


@contextmanager
def deaf_server() -> Iterator[int]:
    """Something that answers at a port and speaks no TLS."""

    def serve(connection: object) -> None:
        with suppress(OSError):
            connection.recv(10)  # type: ignore[attr-defined]
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")  # type: ignore[attr-defined]

    with _accepting(serve) as port:
        yield port
