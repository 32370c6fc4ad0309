"""``fedcollm site --check`` and ``fedcollm server --check``: is all as it must be, and if not, what is to be done?

Every check looks at what the long-lived process will use, in the order in which it will use it, and changes nothing.
What was not looked at is said, too.
"""

from __future__ import annotations

import re
import shutil
import socket
import stat
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from fedcollm_privacy.errors import FedCollmError, KitError
from fedcollm_privacy.identity import is_encrypted
from fedcollm_privacy.roster import Roster
from secure_fedcollm.certificates import check_certificate
from secure_fedcollm.finding import Finding, found, show_findings
from secure_fedcollm.kit import Kit
from secure_fedcollm.reach import check_reach
from secure_fedcollm.site_checks import check_site_only
from secure_fedcollm.snapshot import read_status

__all__ = ["Finding", "check_server", "check_site", "show_findings"]

_SOON_DAYS = 30
_LEAST_FREE, _LITTLE_FREE = 2**30, 5 * 2**30
_CLOCK = "set this machine's clock (timedatectl, NTP)"
_LOOPBACK = ("127.0.0.1", "::1")


def check_site(kit: Kit | Path, *, clock: Callable[[], float] = time.time, timeout_s: float = 5.0) -> list[Finding]:
    """Look at a site's kit, data, ledger and its way to the server.

    Args:
        kit: the opened kit, or its folder; a folder that is no complete kit is the one finding.
        clock: Unix time in seconds.
        timeout_s: seconds for each step towards the server.
    """
    opened, findings = _open(kit, "site")
    if opened is None:
        return findings
    now = clock()
    roster = _party(opened, now, findings)
    findings.extend(check_site_only(opened, roster, now))
    findings.append(
        check_reach(
            opened.server_host,
            opened.server_port,
            ca=opened.folder / "ca.pem",
            certificate=opened.folder / "tls.pem",
            key=opened.folder / "keys" / "tls.key",
            timeout_s=timeout_s,
        )
    )
    findings.append(found("ports", "stop the service and call whoever set it up", lambda: _no_port(opened)))
    return findings


def check_server(kit: Kit | Path, *, clock: Callable[[], float] = time.time, timeout_s: float = 5.0) -> list[Finding]:
    """Look at a server's kit and its port; arguments as `check_site`."""
    opened, findings = _open(kit, "server")
    if opened is None:
        return findings
    _party(opened, clock(), findings)
    findings.append(found("port", "choose who may have the port", lambda: _own_port(opened, timeout_s)))
    return findings


def _open(kit: Kit | Path, role: str) -> tuple[Kit | None, list[Finding]]:
    opened: list[Kit] = []

    def look() -> str:
        opened.append(kit if isinstance(kit, Kit) else Kit.open(kit))
        if opened[0].role != role:
            raise KitError(f"{opened[0].folder} is the kit of a {opened[0].role}, not of a {role}")
        return f"{opened[0].folder}: {role} {opened[0].name} of {opened[0].federation}, complete"

    finding = found("kit", "do what it says; the coordinator helps", look)
    return (opened[0] if finding.ok else None), [finding]


def _party(kit: Kit, now: float, findings: list[Finding]) -> Roster | None:
    """What both roles have; adds its findings, gives the roster if it holds."""
    rosters: list[Roster] = []
    findings.append(
        found("file modes", "chmod as it says; if others read a key: `fedcollm deploy renew`", lambda: _modes(kit))
    )
    findings.append(found("identity", "put back the right keys/identity.key", lambda: _identity(kit)))
    findings.extend(_certificates(kit, now))

    def look() -> Finding | str:
        roster = kit.roster(now)
        rosters.append(roster)
        until = datetime.fromtimestamp(roster.valid_until, UTC)
        said = f"signed by the governance, names {kit.name} with this key, valid until {until:%Y-%m-%d}"
        return _soon("roster", said, roster.valid_until - now, "ask the coordinator for a new roster in time")

    contact = kit.party.contact
    findings.append(found("roster", f"ask the coordinator for the grant again ({contact}), or {_CLOCK}", look))
    findings.append(found("clock", _CLOCK, lambda: _clock(kit, now)))
    findings.append(found("engine", "pip install 'secure-fedcollm[deploy]'", _engine))
    findings.append(found("disk", "make room", lambda: _disk(kit)))
    return rosters[0] if rosters else None


def _modes(kit: Kit) -> str:
    folders = [kit.folder / "keys", *([kit.state] if kit.state.exists() else [])]
    keys = [*sorted((kit.folder / "keys").glob("*.key")), *sorted(kit.folder.glob("engine*/startup/*.key"))]
    for path, allowed in (*((folder, 0o700) for folder in folders), *((key, 0o600) for key in keys)):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & ~allowed:
            raise KitError(f"{path} has mode {mode:04o}: chmod {allowed:o} {path}")
    for path in (
        kit.folder,
        *(kit.folder / name for name in ("party.yaml", "governance.pub", "ca.pem", "roster.json")),
    ):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o022:
            raise KitError(f"{path} can be changed by other users (mode {mode:04o}): chmod go-w {path}")
    return "keys and state are readable by their owner only; what is pinned cannot be changed by others"


def _identity(kit: Kit) -> Finding | str:
    if is_encrypted(kit.folder / "keys" / "identity.key"):
        detail = f"{kit.public.fingerprint}; the key is encrypted, and was not opened to look"
        return Finding(name="identity", ok=None, detail=detail, remedy="the service needs its passphrase to start")
    kit.identity(None)
    return f"{kit.public.fingerprint}; the key opens and is that of identity.pub"


def _certificates(kit: Kit, now: float) -> list[Finding]:
    moment = datetime.fromtimestamp(now, UTC)

    def look(stem: str) -> Finding | str:
        held = kit.certificates[stem]
        check_certificate(held, ca=kit.ca, subject=kit.party.subjects[stem], now=moment)
        until = min(held.not_valid_after_utc, kit.ca.not_valid_after_utc)
        said = f"{stem}.pem is of the pinned authority, for {kit.party.subjects[stem].name}, until {until:%Y-%m-%d}"
        return _soon(
            f"certificate {stem}", said, (until - moment).total_seconds(), f"fedcollm deploy renew {kit.folder}"
        )

    renew = f"fedcollm deploy renew {kit.folder}"
    return [found(f"certificate {stem}", renew, partial(look, stem)) for stem in kit.certificates]


def _soon(name: str, said: str, left_s: float, remedy: str) -> Finding | str:
    days = int(left_s // 86400)
    return Finding(name=name, ok=None, detail=f"{said}: {days} days left", remedy=remedy) if days < _SOON_DAYS else said


def _clock(kit: Kit, now: float) -> str:
    written = [kit.folder / "roster.json", *(kit.folder / f"{stem}.pem" for stem in kit.certificates)]
    newest = max(written, key=lambda path: path.stat().st_mtime)
    for what, when in (
        (f"{newest.name} was written", newest.stat().st_mtime),
        *((f"{stem}.pem begins to hold", c.not_valid_before_utc.timestamp()) for stem, c in kit.certificates.items()),
    ):
        if when > now + 60:
            raise FedCollmError(f"it is {_at(now)} here, and {what} at {_at(when)}: this machine's clock is behind")
    return f"{_at(now)}, not behind the kit's files. How far it is from the server's clock is not measured"


def _at(when: float) -> str:
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M} UTC"


def _engine() -> str:
    pinned = [re.match(r"nvflare==([0-9.]+)", line) for line in metadata.requires("secure-fedcollm") or []]
    wanted = next((match.group(1) for match in pinned if match), None)
    try:
        installed = metadata.version("nvflare")
    except metadata.PackageNotFoundError:
        raise FedCollmError(f"NVIDIA FLARE {wanted} is not installed") from None
    if installed != wanted:
        raise FedCollmError(f"NVIDIA FLARE {installed} is installed; {wanted} is what this program was tested with")
    return f"NVIDIA FLARE {installed}"


def _disk(kit: Kit) -> Finding | str:
    free = shutil.disk_usage(kit.state if kit.state.exists() else kit.folder).free
    said = f"{free / 1e9:.1f} GB free"
    if free < _LEAST_FREE:
        raise FedCollmError(f"{said}; a ledger that cannot be written stops every round")
    return Finding(name="disk", ok=None, detail=said, remedy="make room in time") if free < _LITTLE_FREE else said


def _no_port(kit: Kit) -> str:
    pid = _running(kit)
    if pid is None:
        return "the site is not running; it connects outwards only and needs no open port"
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        for connection in one.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in _LOOPBACK:
                address = f"{connection.laddr.ip}:{connection.laddr.port}"
                raise FedCollmError(f"process {one.pid} listens on {address}, where others can reach it")
    return "the running site listens on this machine's own address only"


def _own_port(kit: Kit, timeout_s: float) -> Finding | str:
    port = kit.server_port
    if _running(kit) is not None:
        keys = kit.folder / "keys"
        files = {"ca": kit.folder / "ca.pem", "certificate": kit.folder / "lead.pem", "key": keys / "lead.key"}
        return check_reach(kit.server_host, port, **files, at=_LOOPBACK[0], timeout_s=timeout_s)
    with closing(socket.socket()) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise FedCollmError(
                f"port {port} cannot be listened on ({error.strerror}): another program has it"
            ) from None
    detail = f"port {port} is free; sites must reach {kit.server_host}:{port}, and only a site can show that they do"
    return Finding(
        name="port", ok=None, detail=detail, remedy="`fedcollm site --check` at a site, while the server runs"
    )


def _running(kit: Kit) -> int | None:
    """The process that writes the kit's status; None where there is none."""
    try:
        status = read_status(kit.state / "status.json")
    except FedCollmError:
        return None
    return None if status.trouble or status.over else status.pid
