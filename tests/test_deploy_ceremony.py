"""From names to complete kits, as a coordinator and five administrators type it; and everybody who tries to slip in."""

from __future__ import annotations

import base64
import io
import json
import shutil
import ssl
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store
from typer.testing import CliRunner

from fedcollm_privacy.errors import FedCollmError, KeyFileError, KitError, SignatureInvalid
from fedcollm_privacy.identity import SigningKey, load_key, load_public, save_public
from fedcollm_privacy.messages import canonical_json
from fedcollm_privacy.roster import Roster, SignedRoster, sign_roster
from secure_fedcollm import joining
from secure_fedcollm.ceremony import Ceremony
from secure_fedcollm.deploy_cli import deploy_app
from secure_fedcollm.engine_rules import SERVER_RELAY, SITE_RELAY, engine_rules
from secure_fedcollm.enrolment import Grant, Signed
from secure_fedcollm.kit import LEAD, Kit
from secure_fedcollm.site_settings import read_settings

pytest.importorskip("nvflare")

RUNNER = CliRunner()
SITES = ("ward-a", "ward-b", "ward-c", "ward-d")
PARTIES = ("hub", *SITES)
LOCKED = "ward-b"  # whose identity is encrypted
PASSPHRASE = "long winding river under stone"
FEDERATION = {
    "name": "clinics",
    "org": "example",
    "contact": "A. Coordinator, +00 123 456",
    "server": {"name": "hub", "host": "localhost", "port": 8102},
    "sites": list(SITES),
    "min_contributors": 3,
    "max_colluding": 1,
    "valid_days": 365,
    "certificate_days": 300,
}


@pytest.fixture(autouse=True)
def no_passphrase_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDCOLLM_PASSPHRASE", raising=False)


def deploy(*arguments: object, typed: str | None = None) -> Result:
    result = RUNNER.invoke(deploy_app, [str(a) for a in arguments], input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def request_of(root: Path, party: str) -> Path:
    return root / party / f"{party}.request.json"


def grant_of(root: Path, party: str) -> Path:
    return root / "d" / "grants" / f"{party}.grant.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The same federation three times: nobody admitted yet; all admitted; all complete. Copied, never changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEDCOLLM_PASSPHRASE", raising=False)
        top = tmp_path_factory.mktemp("c")
        joined, admitted, done = top / "joined", top / "admitted", top / "done"
        joined.mkdir()
        (joined / "secret").write_text(PASSPHRASE + "\n")
        (joined / "federation.yaml").write_text(yaml.safe_dump(FEDERATION))
        deploy("init", joined / "federation.yaml", "--out", joined / "d", "--passphrase-file", joined / "secret")
        for party in PARTIES:
            shutil.copytree(joined / "d" / "kits" / party, joined / party)
            deploy("join", joined / party, *(["--passphrase-file", joined / "secret"] if party == LOCKED else []))
        shutil.copytree(joined, admitted)
        requests = [request_of(admitted, p) for p in PARTIES]
        deploy("admit", admitted / "d", *requests, "--passphrase-file", admitted / "secret", typed="y\n")
        shutil.copytree(admitted, done)
        for party in PARTIES:
            deploy("complete", done / party, grant_of(done, party))
        yield {"joined": joined, "admitted": admitted, "done": done}


@pytest.fixture
def joined(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["joined"], tmp_path / "f"))


@pytest.fixture
def admitted(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["admitted"], tmp_path / "f"))


@pytest.fixture
def done(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["done"], tmp_path / "f"))


def key_of(root: Path, party: str) -> SigningKey:
    return load_key(root / party / "keys" / "identity.key", PASSPHRASE.encode() if party == LOCKED else None)


# The whole of it


def test_every_party_ends_with_a_kit_that_opens_and_one_roster(done: Path) -> None:
    rosters = set()
    for party in PARTIES:
        kit = Kit.open(done / party)
        assert (kit.name, kit.role) == (party, "server" if party == "hub" else "site")
        assert (kit.federation, kit.server_host, kit.server_port) == ("clinics", "localhost", 8102)
        assert kit.identity(PASSPHRASE.encode() if party == LOCKED else None).public == kit.public
        rosters.add(kit.roster(time.time()).to_bytes())
        assert kit.socket.parent == kit.state
        assert kit.state.is_dir()
        assert kit.engine.is_dir()
    (only,) = rosters
    roster = Roster.from_bytes(only)
    assert roster.site_names == SITES
    assert [roster.server, *roster.sites] == [load_public(done / p / "keys" / "identity.pub") for p in PARTIES]
    days = (roster.valid_until - time.time()) / 86_400
    assert 364.9 < days <= 365


def test_openssl_cryptography_and_flare_believe_the_certificates_and_no_longer_than_asked(done: Path) -> None:
    from nvflare.lighter.utils import load_crt, verify_cert_chain

    ca = x509.load_pem_x509_certificate((done / "hub" / "ca.pem").read_bytes())
    files = [done / p / "tls.pem" for p in PARTIES] + [done / "hub" / "lead.pem"]
    command = ["openssl", "verify", "-x509_strict", "-CAfile", str(done / "hub" / "ca.pem")]
    checked = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(": OK") == len(files)
    for path in files:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        verify_cert_chain(certificate, [], load_crt(str(done / "hub" / "ca.pem")))
        assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == timedelta(days=300)
        assert certificate.not_valid_after_utc < ca.not_valid_after_utc
    server = x509.load_pem_x509_certificate((done / "hub" / "tls.pem").read_bytes())
    PolicyBuilder().store(Store([ca])).build_server_verifier(x509.DNSName("localhost")).verify(server, [])


def handshake(root: Path, server: str, client: str, host: str) -> str | None:
    """TLS on both sides between two kits, in memory; what went wrong, or None."""
    sides = []
    for purpose, kit in ((ssl.PROTOCOL_TLS_SERVER, server), (ssl.PROTOCOL_TLS_CLIENT, client)):
        context = ssl.SSLContext(purpose)
        context.load_cert_chain(root / kit / "tls.pem", root / kit / "keys" / "tls.key")
        context.load_verify_locations(root / client / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        sides.append(context)
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        sides[0].wrap_bio(one, other, server_side=True),
        sides[1].wrap_bio(other, one, server_hostname=host),
    ]
    finished = set()
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
                finished.add(end)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                return str(error)
    return None if len(finished) == 2 else "no handshake"


def test_kits_shake_hands_over_tls_and_a_site_cannot_pass_for_the_server(done: Path) -> None:
    assert handshake(done, "hub", "ward-a", "localhost") is None
    assert "Hostname mismatch" in str(handshake(done, "ward-c", "ward-a", "localhost"))


def everything_in(path: Path) -> bytes:
    """A file's bytes, and those of archives in it, unpacked."""
    data = path.read_bytes()
    if path.suffix == ".json" and (b'"certificates"' in data or b'"requests"' in data):
        fields = json.loads(data)
        for held in (fields, fields.get("request", {}), fields.get("signed", {}).get("request", {})):
            for part in [*held.get("certificates", {}).values(), *held.get("requests", {}).values()]:
                raw = bytes.fromhex(part) if set(part) <= set("0123456789abcdef") else base64.b64decode(part)
                with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                    data += b"".join(archive.read(name) for name in archive.namelist())
    return data


def test_no_private_key_is_anywhere_but_with_its_owner(done: Path) -> None:
    files = {path: everything_in(path) for path in done.rglob("*") if path.is_file()}
    home = {"d": done / "d" / "ceremony"} | {party: done / party for party in PARTIES}
    with_keys = {path for path, data in files.items() if b"PRIVATE KEY" in data}
    assert with_keys == {path for path in files if path.suffix == ".key"}
    searched = 0
    for owner, folder in home.items():
        needles = []
        for path in (p for p in with_keys if p.is_relative_to(folder)):
            pem = b"-----BEGIN" + path.read_bytes().split(b"-----BEGIN", 1)[1]
            needles.append(pem.splitlines()[1])
            if b"ENCRYPTED" not in pem:
                private = serialization.load_pem_private_key(pem, None)
                if isinstance(private, rsa.RSAPrivateKey):
                    secret = private.private_numbers().p.to_bytes(128, "big")
                else:
                    secret = private.private_bytes_raw()
                needles += [secret, secret.hex().encode(), base64.b64encode(secret)]
        assert len(needles) >= 2
        for needle in needles:
            for path, data in files.items():
                searched += 1
                assert needle not in data or path.is_relative_to(folder), (owner, path)
    assert searched > 1000
    # The search finds what it looks for.
    assert (done / "ward-a" / "keys" / "tls.key").read_bytes() in files[done / "ward-a/engine/startup/client.key"]


def test_nothing_private_can_be_read_by_others(done: Path) -> None:
    keys = [path for path in done.rglob("*") if path.suffix == ".key"]
    assert len(keys) == 2 + len(PARTIES) * 3 + 2
    for path in keys:
        assert path.stat().st_mode & 0o777 == 0o600, path
    closed = [done / "d", done / "d/ceremony", *(done / p for p in PARTIES), *(done / p / "keys" for p in PARTIES)]
    closed += [*(done / p / "engine" for p in PARTIES), *(done / p / "state" for p in PARTIES)]
    for path in closed:
        assert path.stat().st_mode & 0o777 == 0o700, path


def test_the_engine_of_a_complete_kit_runs_our_relay_and_nothing_else(done: Path) -> None:
    for party, allowed in (("hub", SERVER_RELAY), ("ward-a", SITE_RELAY)):
        local = done / party / "engine" / "local"
        assert json.loads((local / "resources.json").read_text())["class_allow_list"] == [allowed]
        rules = json.loads((local / "authorization.json").read_text())["permissions"]
        assert all(rule["byoc"] == "none" for rule in rules.values())
    admin = json.loads((done / "hub/engine-admin/startup/fed_admin.json").read_text())["admin"]
    assert (admin["username"], admin["server_identity"]) == (LEAD, "localhost")
    site = json.loads((done / "ward-a/engine/startup/fed_client.json").read_text())
    assert site["servers"][0]["service"]["target"] == "localhost:8102"
    assert site["client"]["connection_security"] == "mtls"


def test_what_the_administrator_has_to_write_is_begun_for_him(done: Path) -> None:
    assert read_settings(done / "ward-a" / "site.yaml", "ward-a").approval == "ask"
    assert not (done / "ward-a" / "policy.yaml").exists()
    assert load_public(done / "ward-a" / "server.pub") == load_public(done / "hub" / "keys" / "identity.pub")
    readme = (done / "ward-a" / "README.md").read_text()
    assert load_public(done / "ward-a" / "governance.pub").fingerprint in readme
    assert "A. Coordinator, +00 123 456" in readme
    (done / "ward-a" / "site.yaml").write_text("mine")
    assert "policy new --site ward-a" in deploy("complete", done / "ward-a", grant_of(done, "ward-a")).output
    assert (done / "ward-a" / "site.yaml").read_text() == "mine"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_finds_no_fault_in_the_units(done: Path) -> None:
    for party, kind in (("ward-a", "site"), ("hub", "server"), (LOCKED, "site")):
        unit = done / party / "systemd" / f"fedcollm-{kind}.service"
        checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")
        text = unit.read_text()
        assert "NoNewPrivileges=yes" in text
        assert ("LoadCredential=passphrase:" in text) == (party == LOCKED)
    # The check can fail.
    unit.write_text(unit.read_text().replace("KillMode=control-group", "KillMode=everything"))
    checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "kill mode" in checked.stderr


def test_both_sides_see_every_fingerprint_and_a_no_issues_nothing(joined: Path) -> None:
    before = {path: path.read_bytes() for path in (joined / "d").rglob("*") if path.is_file()}
    requests = [request_of(joined, p) for p in PARTIES]
    result = deploy("admit", joined / "d", *requests, "--passphrase-file", joined / "secret", typed="n\n")
    assert result.exit_code == 1
    for party in PARTIES:
        assert load_public(joined / party / "keys" / "identity.pub").fingerprint in result.output
    assert {path: path.read_bytes() for path in (joined / "d").rglob("*") if path.is_file()} == before


def test_requests_may_come_one_by_one_and_grants_wait_for_the_last(admitted: Path) -> None:
    grants = {p: grant_of(admitted, p).read_bytes() for p in PARTIES}
    shutil.rmtree(admitted / "d" / "grants")
    (admitted / "d" / "ceremony" / "roster.json").unlink()
    (admitted / "d" / "ceremony" / "admitted" / "ward-d.json").unlink()
    secret = ("--passphrase-file", admitted / "secret")
    early = deploy("admit", admitted / "d", request_of(admitted, "ward-a"), *secret)
    assert "ward-d" in early.output
    assert not (admitted / "d" / "grants").exists()
    assert "awaited" in deploy("show", admitted / "d").output
    deploy("admit", admitted / "d", request_of(admitted, "ward-d"), "--yes", *secret)
    for party in PARTIES:
        again = Grant.from_bytes(grant_of(admitted, party).read_bytes())
        first = Grant.from_bytes(grants[party])
        assert (again.certificates == first.certificates) == (party != "ward-d")


# Who tries to slip in with a request


def altered(root: Path, party: str, **fields: Any) -> bytes:
    """The party's request with other fields, signed by its own key as an attacker with a kit would."""
    asks = Signed.from_bytes(request_of(root, party).read_bytes()).enrolment
    return Signed.by(key_of(root, party), replace(asks, **fields)).to_bytes()


def csr_zip(name: str, role: str, key: Any = None, member: str | None = None) -> bytes:
    key = key or rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = [(NameOID.COMMON_NAME, name), (NameOID.ORGANIZATION_NAME, "example"), (NameOID.UNSTRUCTURED_NAME, role)]
    builder = x509.CertificateSigningRequestBuilder(x509.Name([x509.NameAttribute(*part) for part in subject]))
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("request.json", json.dumps({"project": "clinics", "cert_type": role}))
        archive.writestr("site.yaml", "")
        archive.writestr(f"{member or name}.csr", csr)
    return file.getvalue()


def forged(root: Path, party: str) -> bytes:
    fields = json.loads(request_of(root, party).read_bytes())
    fields["request"]["identity"] = SigningKey.generate(party).public.as_fields()
    return canonical_json(fields)


def renamed(root: Path, party: str, other: str) -> bytes:
    fields = json.loads(request_of(root, party).read_bytes())
    fields["request"]["party"] = other
    fields["signature"] = key_of(root, party).sign("enrolment", canonical_json(fields["request"])).hex()
    return canonical_json(fields)


def curve_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


REQUESTS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "altered": (
        lambda r: request_of(r, "ward-a").read_bytes().replace(b'"made_at":1', b'"made_at":2'),
        "altered after",
    ),
    "the key exchanged": (lambda r: forged(r, "ward-a"), "altered after"),
    "formatted": (lambda r: json.dumps(json.loads(request_of(r, "ward-a").read_bytes()), indent=1).encode(), "edited"),
    "no JSON": (lambda r: b"\x00", "damaged"),
    "another federation": (lambda r: altered(r, "ward-a", federation="banks"), "for the federation banks"),
    "another kit": (lambda r: altered(r, "ward-a", kit="0" * 32), "another kit"),
    "another authority": (lambda r: altered(r, "ward-a", ca="0" * 64), "another kit"),
    "another role": (lambda r: altered(r, "ward-a", role="server"), "asks to be a server"),
    "another's name": (lambda r: renamed(r, "ward-a", "ward-b"), "malformed.*ward-b"),
    "a name not listed": (
        lambda r: Signed.by(
            (key := SigningKey.generate("ward-x")),
            replace(
                Signed.from_bytes(request_of(r, "ward-a").read_bytes()).enrolment, party="ward-x", identity=key.public
            ),
        ).to_bytes(),
        "not in federation.yaml",
    ),
    "CSR for another name": (
        lambda r: altered(r, "ward-a", requests={"tls": csr_zip("ward-b", "client", member="ward-a")}),
        "for the name 'ward-b'",
    ),
    "CSR for the server": (
        lambda r: altered(r, "ward-a", requests={"tls": csr_zip("localhost", "server")}),
        "exactly.*ward-a.csr",
    ),
    "CSR for another role": (
        lambda r: altered(r, "ward-a", requests={"tls": csr_zip("ward-a", "lead")}),
        "not for the role client",
    ),
    "CSR with a curve's key": (
        lambda r: altered(
            r, "ward-a", requests={"tls": csr_zip("ward-a", "client", ec.generate_private_key(ec.SECP256R1()))}
        ),
        "weak or another kind",
    ),
    "damaged archive": (lambda r: altered(r, "ward-a", requests={"tls": b"PK"}), "damaged"),
    "a site that wants to lead": (
        lambda r: altered(r, "ward-a", requests={"tls": csr_zip("ward-a", "client"), "lead": csr_zip(LEAD, "lead")}),
        "exactly the parts tls",
    ),
}


@pytest.mark.parametrize("attack", REQUESTS)
def test_a_request_that_is_not_the_partys_own_is_refused_with_the_reason(joined: Path, attack: str) -> None:
    make, reason = REQUESTS[attack]
    path = joined / "x.request.json"
    path.write_bytes(make(joined))
    with pytest.raises(KitError, match=f"x.request.json.*{reason}"):
        deploy("admit", joined / "d", path, "--yes", "--passphrase-file", joined / "secret")
    assert list((joined / "d" / "ceremony" / "admitted").iterdir()) == []


def test_the_same_request_unaltered_is_examined_as_new(joined: Path) -> None:
    ceremony = Ceremony.open(joined / "d")
    assert ceremony.examine(request_of(joined, "ward-a").read_bytes(), replace=False).standing == "new"
    with pytest.raises(KitError, match="2 requests"):
        deploy("admit", joined / "d", request_of(joined, "ward-a"), request_of(joined, "ward-a"))


# Who tries to slip in with a grant


def certificate(
    root: Path, public: Any, *, name: str = "ward-a", role: str = "client", days: tuple[int, int] = (-1, 1),
    hosts: tuple[str, ...] | None = None, ca_flag: bool = False, own_ca: bool = False,
) -> bytes:  # fmt: skip
    """A certificate by the coordinator's authority, or by one of the attacker's own with the same name."""
    ca = x509.load_pem_x509_certificate((root / "d/ceremony/authority/rootCA.pem").read_bytes())
    key: Any = serialization.load_pem_private_key((root / "d/ceremony/authority/rootCA.key").read_bytes(), None)
    if own_ca:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = [(NameOID.COMMON_NAME, name), (NameOID.ORGANIZATION_NAME, "example"), (NameOID.UNSTRUCTURED_NAME, role)]
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(ca.subject, x509.Name([x509.NameAttribute(*part) for part in subject]), public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=ca_flag, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(h) for h in hosts or (name,)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def own_key(root: Path) -> Any:
    key = root / "ward-a" / "keys" / "requested" / "tls" / "ward-a.key"
    return serialization.load_pem_private_key(key.read_bytes(), None).public_key()


def with_certificate(root: Path, **how: Any) -> Grant:
    grant = Grant.from_bytes(grant_of(root, "ward-a").read_bytes())
    public = how.pop("public", None) or own_key(root)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(grant.certificates["tls"])) as before, zipfile.ZipFile(file, "w") as after:
        for name in before.namelist():
            after.writestr(name, certificate(root, public, **how) if name == "ward-a.crt" else before.read(name))
    return replace(grant, certificates={"tls": file.getvalue()})


def other_roster(root: Path, **how: Any) -> Grant:
    """A roster that is signed by the true governance, but says something else."""
    grant = Grant.from_bytes(grant_of(root, "ward-a").read_bytes())
    roster = Roster.from_bytes(grant.roster.roster_bytes)
    key = load_key(root / "d" / "ceremony" / "governance.key", PASSPHRASE.encode())
    return replace(grant, roster=sign_roster(replace(roster, **how), key))


def sites_of(root: Path, **replaced: Any) -> tuple[Any, ...]:
    roster = Roster.from_bytes(Grant.from_bytes(grant_of(root, "ward-a").read_bytes()).roster.roster_bytes)
    return tuple(replaced.get(s.name.replace("-", "_"), s) for s in roster.sites)


def edited_roster(root: Path) -> Grant:
    grant = Grant.from_bytes(grant_of(root, "ward-a").read_bytes())
    evil = SigningKey.generate("hub").public.public_key.hex().encode()
    mine = load_public(root / "hub" / "keys" / "identity.pub").public_key.hex().encode()
    signed = replace(grant.roster, roster_bytes=grant.roster.roster_bytes.replace(mine, evil))
    assert signed.roster_bytes != grant.roster.roster_bytes
    return replace(grant, roster=signed)


def weak_other() -> Any:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()


GRANTS: dict[str, tuple[Callable[[Path], Grant], str]] = {
    "another party's": (lambda r: Grant.from_bytes(grant_of(r, "ward-b").read_bytes()), "is for ward-b"),
    "another kit's": (
        lambda r: replace(Grant.from_bytes(grant_of(r, "ward-a").read_bytes()), kit="1" * 32),
        "is for ward-a in clinics, kit 11111111",
    ),
    "another's certificate": (
        lambda r: replace(
            Grant.from_bytes(grant_of(r, "ward-a").read_bytes()),
            certificates=Grant.from_bytes(grant_of(r, "ward-b").read_bytes()).certificates,
        ),
        "is it another party's",
    ),
    "no certificate": (
        lambda r: replace(Grant.from_bytes(grant_of(r, "ward-a").read_bytes()), certificates={}),
        "exactly the certificates tls",
    ),
    "expired certificate": (lambda r: with_certificate(r, days=(-9, -1)), "holds from .* and now it is"),
    "certificate of tomorrow": (lambda r: with_certificate(r, days=(1, 9)), "holds from .* and now it is"),
    "certificate of another authority": (lambda r: with_certificate(r, own_ca=True), "not issued by this federation"),
    "certificate for another name": (lambda r: with_certificate(r, name="ward-b"), "for the name 'ward-b'"),
    "certificate for another role": (lambda r: with_certificate(r, role="lead"), "for the role 'lead'"),
    "certificate for other hosts": (lambda r: with_certificate(r, hosts=("ward-a", "localhost")), "other names"),
    "certificate that may issue": (lambda r: with_certificate(r, ca_flag=True), "ward-a"),
    "certificate for another key": (lambda r: with_certificate(r, public=weak_other()), "not for the key of this kit"),
    "edited roster": (edited_roster, "signature of governance"),
    "roster of another federation": (lambda r: other_roster(r, federation="banks"), "that of banks"),
    "roster with another key for this site": (
        lambda r: other_roster(r, sites=sites_of(r, ward_a=SigningKey.generate("ward-a").public)),
        "ward-a with another key",
    ),
    "roster without this site": (lambda r: other_roster(r, sites=sites_of(r)[1:]), "does not name ward-a"),
    "expired roster": (lambda r: other_roster(r, valid_until=int(time.time()) - 1), "not valid any more"),
}  # fmt: skip


@pytest.mark.parametrize("attack", GRANTS)
def test_a_grant_that_does_not_fit_is_refused_with_the_reason_and_changes_nothing(admitted: Path, attack: str) -> None:
    make, reason = GRANTS[attack]
    (admitted / "x.json").write_bytes(make(admitted).to_bytes())
    before = {path: path.read_bytes() for path in (admitted / "ward-a").rglob("*") if path.is_file()}
    with pytest.raises(FedCollmError, match=reason):
        deploy("complete", admitted / "ward-a", admitted / "x.json")
    assert {path: path.read_bytes() for path in (admitted / "ward-a").rglob("*") if path.is_file()} == before
    with pytest.raises(KitError, match="deploy complete"):
        Kit.open(admitted / "ward-a")


def test_a_sound_certificate_made_the_same_way_passes_the_same_checks(admitted: Path) -> None:
    # The control of the attacks above: all that is forged there is forged here too, but fits. FLARE itself then says
    # no, because its own signed description names another certificate.
    with pytest.raises(KitError, match="NVIDIA FLARE refused"):
        joining.complete(admitted / "ward-a", with_certificate(admitted), engine_rules)


def test_a_kit_with_another_governance_or_authority_takes_no_grant(admitted: Path) -> None:
    (admitted / "ward-a" / "governance.pub").unlink()
    save_public(SigningKey.generate("governance").public, admitted / "ward-a" / "governance.pub")
    with pytest.raises(SignatureInvalid, match="governance"):
        deploy("complete", admitted / "ward-a", grant_of(admitted, "ward-a"))
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    ca = x509.load_pem_x509_certificate((admitted / "ward-b" / "ca.pem").read_bytes())
    builder = x509.CertificateBuilder(ca.subject, ca.subject, key.public_key(), 1)
    builder = builder.not_valid_before(ca.not_valid_before_utc).not_valid_after(ca.not_valid_after_utc)
    for extension in ca.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (admitted / "ward-b" / "ca.pem").write_bytes(pem)
    with pytest.raises(KitError, match="not issued by this federation"):
        deploy("complete", admitted / "ward-b", grant_of(admitted, "ward-b"))


# Twice, and cut


def test_keys_are_never_overwritten_and_nothing_is(done: Path) -> None:
    before = (done / "ward-a" / "keys" / "identity.key").read_bytes()
    with pytest.raises(KitError, match="never overwritten"):
        deploy("join", done / "ward-a")
    with pytest.raises(KitError, match="never overwritten"):
        deploy("init", done / "federation.yaml", "--out", done / "d")
    assert (done / "ward-a" / "keys" / "identity.key").read_bytes() == before


def test_completing_twice_changes_nothing_and_mends_a_moved_kit(done: Path) -> None:
    kit = Path(shutil.move(done / "hub", done / "moved"))
    before = {
        p: (kit / p).read_bytes() for p in ("tls.pem", "roster.json", "keys/tls.key", "engine/startup/server.crt")
    }
    deploy("complete", kit, grant_of(done, "hub"))
    assert {p: (kit / p).read_bytes() for p in before} == before
    rules = (kit / "engine" / "local" / "resources.json").read_text()
    assert str(kit / "engine") in rules
    assert str(done / "hub") not in rules
    assert f'ReadWritePaths="{kit}/state"' in (kit / "systemd" / "fedcollm-server.service").read_text()


def test_a_completion_that_was_cut_leaves_no_engine_that_starts_and_is_mended_by_the_same_command(
    admitted: Path,
) -> None:
    def cut(local: Path, side: str) -> None:
        raise KeyboardInterrupt

    grant = Grant.from_bytes(grant_of(admitted, "ward-a").read_bytes())
    with pytest.raises(KeyboardInterrupt):
        joining.complete(admitted / "ward-a", grant, cut)
    assert not (admitted / "ward-a" / "engine" / "startup").exists()
    with pytest.raises(KitError, match="deploy complete"):
        Kit.open(admitted / "ward-a")
    deploy("complete", admitted / "ward-a", grant_of(admitted, "ward-a"))
    Kit.open(admitted / "ward-a").roster(time.time())
    assert [p.name for p in (admitted / "ward-a").iterdir() if p.name.startswith(".")] == []


# Renewal, replacement, revocation


def test_a_renewed_certificate_has_a_new_key_the_same_identity_and_leaves_the_others_alone(done: Path) -> None:
    kit = Kit.open(done / "ward-a")
    old_key, old_grant = (done / "ward-a/keys/tls.key").read_bytes(), grant_of(done, "ward-a").read_bytes()
    others = {p: grant_of(done, p).read_bytes() for p in PARTIES if p != "ward-a"}
    deploy("renew", done / "ward-a")
    assert Kit.open(done / "ward-a").certificates == kit.certificates
    with pytest.raises(KitError, match="--again"):
        deploy("renew", done / "ward-a")
    deploy("complete", done / "ward-a", grant_of(done, "ward-a"))  # the old grant keeps the old certificate in use
    assert Kit.open(done / "ward-a").certificates == kit.certificates
    told = deploy("admit", done / "d", request_of(done, "ward-a"), "--yes", "--passphrase-file", done / "secret")
    assert "new TLS key" in told.output
    assert {p: grant_of(done, p).read_bytes() for p in others} == others
    deploy("complete", done / "ward-a", grant_of(done, "ward-a"))
    renewed = Kit.open(done / "ward-a")
    assert renewed.certificates != kit.certificates
    assert (done / "ward-a/keys/tls.key").read_bytes() != old_key
    assert (done / "ward-a/engine/startup/client.key").read_bytes() == (done / "ward-a/keys/tls.key").read_bytes()
    assert renewed.public == kit.public
    assert renewed.roster(time.time()) == kit.roster(time.time())
    assert handshake(done, "hub", "ward-a", "localhost") is None
    (done / "old.json").write_bytes(old_grant)
    with pytest.raises(KitError, match="earlier request"):
        deploy("complete", done / "ward-a", done / "old.json")
    old = done / "old.request.json"
    shutil.copy(request_of(done, "ward-b"), old)
    assert "again" in deploy("admit", done / "d", old, "--passphrase-file", done / "secret").output


def test_an_older_request_is_not_admitted_after_a_later_one(done: Path) -> None:
    earlier = Signed.from_bytes(request_of(done, "ward-a").read_bytes()).enrolment.made_at - 1
    (done / "x.json").write_bytes(altered(done, "ward-a", made_at=earlier))
    with pytest.raises(KitError, match="not later"):
        deploy("admit", done / "d", done / "x.json")


def test_another_identity_is_admitted_only_when_told_and_makes_a_new_roster(done: Path) -> None:
    key = SigningKey.generate("ward-a")
    asks = Signed.from_bytes(request_of(done, "ward-a").read_bytes()).enrolment
    (done / "x.json").write_bytes(
        Signed.by(key, replace(asks, identity=key.public, made_at=asks.made_at + 1)).to_bytes()
    )
    secret = ("--passphrase-file", done / "secret")
    with pytest.raises(KitError, match=r"another identity.*ledger"):
        deploy("admit", done / "d", done / "x.json", "--yes", *secret)
    assert "NEW IDENTITY" in deploy("admit", done / "d", done / "x.json", "--yes", "--replace", *secret).output
    deploy("complete", done / "ward-b", grant_of(done, "ward-b"))
    assert Kit.open(done / "ward-b").roster(time.time()).site("ward-a") == key.public
    with pytest.raises(KitError, match="ward-a with another key"):
        deploy("complete", done / "ward-a", grant_of(done, "ward-a"))


def test_a_revoked_site_is_in_no_roster_turned_away_by_the_engine_and_the_old_roster_does_not_come_back(
    done: Path,
) -> None:
    secret = ("--passphrase-file", done / "secret")
    old = {p: grant_of(done, p).read_bytes() for p in PARTIES}
    deploy("revoke", done / "d", "ward-d", "--yes", *secret)
    assert not grant_of(done, "ward-d").exists()
    for party in ("hub", "ward-a"):
        deploy("complete", done / party, grant_of(done, party))
        assert Kit.open(done / party).roster(time.time()).site_names == SITES[:3]
        (done / "old.json").write_bytes(old[party])
        with pytest.raises(KitError, match="older"):
            deploy("complete", done / party, done / "old.json")
    disabled = json.loads((done / "hub" / "engine" / "disabled_clients.json").read_text())
    assert disabled == {"disabled_clients": ["ward-d"]}
    new = Grant.from_bytes(grant_of(done, "ward-a").read_bytes()).roster
    without = replace(Grant.from_bytes(old["ward-d"]), roster=new)
    with pytest.raises(KitError, match="does not name ward-d"):
        joining.complete(done / "ward-d", without, engine_rules)
    with pytest.raises(KitError, match="revoked"):
        deploy("admit", done / "d", request_of(done, "ward-d"), *secret)
    with pytest.raises(KitError, match="2 sites are left, and 3 are needed"):
        deploy("revoke", done / "d", "ward-c", "--yes", *secret)
    with pytest.raises(KitError, match="without which"):
        deploy("revoke", done / "d", "hub", "--yes", *secret)
    assert "revoked" in deploy("show", done / "d").output


def test_a_roster_is_signed_anew_before_it_expires(done: Path) -> None:
    before = Kit.open(done / "ward-a").roster(time.time())
    deploy("renew", done / "d", "--passphrase-file", done / "secret")
    deploy("complete", done / "ward-a", grant_of(done, "ward-a"))
    after = Kit.open(done / "ward-a").roster(time.time())
    assert after.valid_until > before.valid_until
    assert (after.server, after.sites) == (before.server, before.sites)


def test_the_governances_key_opens_only_with_its_passphrase(admitted: Path) -> None:
    with pytest.raises(KeyFileError, match="passphrase"):
        deploy("renew", admitted / "d", typed="wrong\n")
    result = deploy("renew", admitted / "d", typed=PASSPHRASE + "\n")
    assert PASSPHRASE not in result.output
    assert result.exit_code == 0


# Kits that are not whole


PIECES = {
    "party.yaml": "no party.yaml",
    "governance.pub": "governance.pub is missing",
    "ca.pem": "ca.pem is missing",
    "keys/identity.pub": "deploy join",
    "keys/identity.key": "identity.key is missing",
    "keys/tls.key": "deploy renew",
    "tls.pem": "deploy complete",
    "roster.json": "deploy complete",
    "engine/startup": "deploy complete",
    "engine/local": "deploy complete",
}


@pytest.mark.parametrize("piece", PIECES)
def test_a_kit_without_a_piece_says_which_and_what_to_do(done: Path, piece: str) -> None:
    path = done / "ward-a" / piece
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(KitError, match=PIECES[piece]):
        Kit.open(done / "ward-a")
    if piece != "party.yaml" and piece != "governance.pub":
        assert "NOT READY" in deploy("show", done / "ward-a").output


@pytest.mark.parametrize("piece", ["party.yaml", "governance.pub", "ca.pem", "keys/identity.pub", "keys/tls.key",
                                   "tls.pem", "engine/startup/client.crt"])  # fmt: skip
def test_a_kit_with_a_damaged_piece_does_not_open(done: Path, piece: str) -> None:
    path = done / "ward-a" / piece
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FedCollmError):
        Kit.open(done / "ward-a")


def test_a_kit_that_is_open_to_others_or_has_another_partys_files_does_not_open(done: Path) -> None:
    (done / "ward-a" / "keys").chmod(0o750)
    with pytest.raises(KitError, match="chmod 700"):
        Kit.open(done / "ward-a")
    (done / "ward-a" / "keys").chmod(0o700)
    (done / "ward-a" / "keys" / "tls.key").chmod(0o640)
    with pytest.raises(KitError, match="chmod 600"):
        Kit.open(done / "ward-a")
    shutil.copy(done / "ward-a" / "tls.pem", done / "ward-c" / "tls.pem")
    with pytest.raises(KitError, match="not the key of tls"):
        Kit.open(done / "ward-c")
    shutil.copy(done / "ward-b" / "keys" / "identity.pub", done / "ward-d" / "keys" / "identity.pub")
    with pytest.raises(KitError, match="names ward-b"):
        Kit.open(done / "ward-d")
    with pytest.raises(KitError, match="is no folder"):
        Kit.open(done / "nowhere")


def test_a_kits_roster_must_be_the_governances_and_its_certificate_of_today(done: Path) -> None:
    kit, now = Kit.open(done / "ward-a"), time.time()
    kit.roster(now + 299 * 86_400)
    with pytest.raises(KitError, match="deploy renew"):
        kit.roster(now + 301 * 86_400)
    with pytest.raises(FedCollmError, match=r"roster\.json.*not valid any more"):
        kit.roster(now + 366 * 86_400)
    path = done / "ward-a" / "roster.json"
    evil = SigningKey.generate("governance")
    signed = sign_roster(Roster.from_bytes(SignedRoster.from_bytes(path.read_bytes()).roster_bytes), evil)
    path.write_bytes(signed.to_bytes())
    with pytest.raises(SignatureInvalid, match=r"roster\.json"):
        kit.roster(now)


def test_an_encrypted_identity_asks_for_its_passphrase(done: Path) -> None:
    kit = Kit.open(done / LOCKED)
    with pytest.raises(KeyFileError, match="passphrase"):
        kit.identity(None)
    with pytest.raises(KeyFileError):
        kit.identity(b"wrong")
    assert kit.identity(PASSPHRASE.encode()).name == LOCKED


def test_a_kit_in_a_folder_whose_name_is_too_long_for_a_socket_says_so(done: Path) -> None:
    deep = done / ("x" * 100)
    shutil.move(done / "ward-a", deep)
    with pytest.raises(KitError, match="shorter name"):
        Kit.open(deep)
