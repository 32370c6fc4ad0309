"""NVIDIA FLARE's own distributed provisioning: its authority, requests, certificates and start-up kits, by its command.

``nvflare cert init|request|approve`` and ``nvflare package`` run as processes of their own, offline, without questions.
They write a log of what they did into the home folder; here that is a folder which goes when the command ends.

Validity: FLARE gives its authority 3650 days and its certificates 1095 unless told; it never lets a certificate outlive
the authority. Keys are RSA of 2048 bits: FLARE's login signs with them, and only in that form.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

from cryptography import x509

from fedcollm_privacy.errors import KitError
from secure_fedcollm.certificates import Subject, check_request
from secure_fedcollm.federation_file import ServerAddress

__all__ = [
    "CA_DAYS",
    "certificate_in",
    "issue",
    "key_of",
    "make_authority",
    "make_request",
    "package",
    "require_request",
]

CA_DAYS = 3650
"""How long a federation's authority holds."""

_SECONDS = 120
_KINDS = {"server": "server", "client": "client", "lead": "admin"}
_LONGEST_MEMBER = 2**16


def make_authority(folder: Path, federation: str, server: ServerAddress) -> None:
    """Make the authority of a federation in ``folder``: ``rootCA.pem``, ``rootCA.key`` (0600), ``profile.json``.

    Raises:
        KitError: FLARE is not installed, or refuses.
    """
    folder.mkdir(mode=0o700)
    profile = {
        "name": federation,
        "scheme": "grpc",
        "connection_security": "mtls",
        "server": {"host": server.host, "fed_learn_port": server.port, "admin_port": server.port},
    }
    _write(folder / "profile.json", profile)
    _nvflare("cert", "init", "--profile", folder / "profile.json", "-o", folder, "--valid-days", CA_DAYS)


def make_request(folder: Path, federation: str, subject: Subject) -> bytes:
    """Make a key for ``subject`` in the new ``folder``, of mode 0700, and the request that may leave it.

    Raises:
        KitError: FLARE is not installed, or refuses.
    """
    folder.mkdir(mode=0o700)
    participant = {"name": subject.name, "type": _KINDS[subject.role], "org": subject.org}
    if subject.role == "lead":
        participant["role"] = subject.role
    with tempfile.TemporaryDirectory() as temporary:
        definition = Path(temporary) / "participant.json"
        _write(definition, {"name": federation, "participants": [participant]})
        _nvflare("cert", "request", "-p", definition, "--out", folder)
    return (folder / f"{subject.name}.request.zip").read_bytes()


def key_of(folder: Path, subject: Subject) -> Path:
    """The private key that `make_request` made."""
    return folder / f"{subject.name}.key"


def require_request(request: bytes, federation: str, subject: Subject) -> None:
    """Return if what another party sent asks for exactly this subject, in this federation.

    Raises:
        KitError: it does not, or it is damaged.
    """
    name = f"{subject.name}.csr"
    members = _members(request, {"request.json", "site.yaml", name}, "the certificate request")
    try:
        fields = json.loads(members["request.json"])
        found = x509.load_pem_x509_csr(members[name])
    except (ValueError, RecursionError):
        raise KitError("the certificate request is damaged: ask its party to send it again") from None
    if not isinstance(fields, dict) or fields.get("project") != federation or fields.get("cert_type") != subject.role:
        raise KitError(f"the certificate request is not for the role {subject.role} in {federation}")
    check_request(found, subject)


def issue(request: bytes, authority: Path, days: int) -> bytes:
    """FLARE's approval of a request: the certificate, the authority's, and their signed description, zipped.

    The request is another party's; ask `require_request` first, and look at the certificate before it leaves.

    Raises:
        KitError: FLARE refuses.
    """
    with tempfile.TemporaryDirectory() as temporary:
        asked, signed = Path(temporary) / "a.request.zip", Path(temporary) / "a.signed.zip"
        asked.write_bytes(request)
        _nvflare(
            *("cert", "approve", asked, "-c", authority, "--out", signed),
            *("--profile", authority / "profile.json", "--valid-days", days),
        )
        return signed.read_bytes()


def certificate_in(signed: bytes, subject: Subject) -> bytes:
    """The PEM certificate of ``subject`` in an approval; KitError for the approval of another party."""
    name = f"{subject.name}.crt"
    needed = {"signed.json", "signed.json.sig", "site.yaml", "rootCA.pem", name}
    return _members(signed, needed, "the certificate in the grant")[name]


def package(signed: bytes, request_folder: Path, fingerprint: str, work: Path) -> Path:
    """Have FLARE make the start-up kit for an approved request.

    Args:
        signed: what `issue` gave.
        request_folder: what `make_request` filled; it has the key.
        fingerprint: SHA-256 of the pinned authority's certificate, in hex; FLARE refuses any other.
        work: an existing folder to work in; on the file system where the kit will lie.

    Returns:
        A folder with ``startup`` and ``local``.

    Raises:
        KitError: FLARE refuses.
    """
    path = work / "a.signed.zip"
    path.write_bytes(signed)
    given = ("--request-dir", request_folder, "--fingerprint", fingerprint, "-w", work / "made")
    answer = _nvflare("package", path, *given)
    return Path(str(answer["output_dir"]))


def _members(data: bytes, names: set[str], what: str) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            held = archive.infolist()
            if {m.filename for m in held} != names or len(held) != len(names):
                raise KitError(f"{what} does not hold exactly {', '.join(sorted(names))}: is it another party's?")
            if any(m.file_size > _LONGEST_MEMBER for m in held):
                raise KitError(f"{what} is longer than any of its kind")
            return {m.filename: archive.read(m) for m in held}
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, NotImplementedError, EOFError):
        raise KitError(f"{what} is damaged: have it sent again") from None


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")  # JSON is YAML too, which is what FLARE reads


def _nvflare(*arguments: object) -> dict[str, Any]:
    if importlib.util.find_spec("nvflare") is None:
        raise KitError("NVIDIA FLARE is not installed here: pip install 'secure-fedcollm[deploy]'")
    command = [sys.executable, "-P", "-m", "nvflare.cli", *map(str, arguments), "--output", "json"]
    with tempfile.TemporaryDirectory() as home:
        try:
            ended = subprocess.run(  # noqa: S603  (our own interpreter; every argument is a path, a number or a hash)
                command,
                env=os.environ | {"HOME": home, "PYTHONWARNINGS": "ignore"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise KitError(f"`nvflare {arguments[0]}` did not end within {_SECONDS} s: try again") from None
    answer = _last_object(ended.stdout)
    if ended.returncode != 0 or answer.get("status") != "ok" or not isinstance(answer.get("data"), dict):
        reason = " ".join(f"{answer.get('message', '')} {answer.get('detail', '')} {answer.get('hint', '')}".split())
        reason = reason or ended.stderr.decode(errors="replace")[-300:]
        raise KitError(f"NVIDIA FLARE refused (`nvflare {arguments[0]}`): {reason or 'it gave no reason'}")
    return dict(answer["data"])


def _last_object(output: bytes) -> dict[str, Any]:
    for line in reversed(output.decode(errors="replace").splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else {}
    return {}
