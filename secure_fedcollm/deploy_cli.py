"""``fedcollm deploy``: from a list of names to a kit on every machine, while no key leaves the one it was made on."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from fedcollm_privacy.errors import FedCollmError, InvalidValue, KitError
from fedcollm_privacy.identity import SigningKey, is_encrypted, load_public
from fedcollm_privacy.roster import Roster
from secure_fedcollm import joining
from secure_fedcollm.ceremony import Ceremony, Examined
from secure_fedcollm.engine_rules import engine_rules
from secure_fedcollm.enrolment import Grant
from secure_fedcollm.keys_cli import PASSPHRASE_VARIABLE, given_passphrase
from secure_fedcollm.kit import Kit, read_party
from secure_fedcollm.kit_files import read_bytes
from secure_fedcollm.new_federation import begin

__all__ = ["deploy_app"]

T = TypeVar("T")

deploy_app = typer.Typer(
    no_args_is_help=True,
    help="Set a federation up on machines of its own: kits go out without keys, requests come back, grants go out.",
)

KitFolder = Annotated[Path, typer.Argument(help="The kit's folder")]
CeremonyFolder = Annotated[Path, typer.Argument(help="The folder that `deploy init` made")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help=f"File whose content is the key's passphrase. Default: ${PASSPHRASE_VARIABLE}, or none."),
]


@deploy_app.command()
def init(
    federation: Annotated[Path, typer.Argument(help="federation.yaml: names, the server's address, what is agreed")],
    out: Annotated[Path, typer.Option(help="A folder that does not exist yet")],
    passphrase_file: PassphraseFile = None,
) -> None:
    """Coordinator: make the authority, the governance's key, and a kit without keys for every party."""
    passphrase = given_passphrase(passphrase_file)
    made = begin(federation, out, passphrase)
    locked = _locked(passphrase, "the latter")
    _say(f"{out}/ceremony  the authority's and the governance's key{locked}: keep it off-line")
    for name in made.kits:
        _say(f"{out}/kits/{name}  has no key: send it to {name}")
    _say(f"governance fingerprint  {made.governance.fingerprint}")
    _say("Next: each party runs `fedcollm deploy join KIT`, and reads you its fingerprint over the phone.")


@deploy_app.command()
def join(kit: KitFolder, passphrase_file: PassphraseFile = None) -> None:
    """Party: make the keys, here, and the request that goes to the coordinator."""
    passphrase = given_passphrase(passphrase_file)
    identity, party = joining.join(kit, passphrase), read_party(kit)
    _say(f"{kit}/keys  private{_locked(passphrase, 'the identity')}: they never leave this machine")
    _say(f"{joining.request_path(kit, party)}  public: send it to the coordinator")
    _say(f"fingerprint of {identity.name}  {identity.fingerprint}")
    _say(f"governance fingerprint  {load_public(kit / 'governance.pub').fingerprint}")
    _say(f"Next: call {party.contact}; read yours to them, and compare the governance's. Go on only if both agree.")


@deploy_app.command()
def admit(
    folder: CeremonyFolder,
    requests: Annotated[list[Path], typer.Argument(help="<party>.request.json, one or several")],
    yes: Annotated[bool, typer.Option("--yes", help="The fingerprints were compared; do not ask.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Allow a new identity in the place of an admitted one.")
    ] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Coordinator: compare fingerprints, issue certificates; once all are in, sign the roster and write the grants."""
    ceremony = Ceremony.open(folder)
    examined = [_named(path, lambda data: ceremony.examine(data, replace=replace)) for path in requests]
    names = [one.party for one in examined]
    for name in names:
        if names.count(name) > 1:
            raise KitError(f"{name} has {names.count(name)} requests here: give its latest only")
    _compare(ceremony, examined)
    fresh = any(one.standing != "known" for one in examined)
    if fresh and not yes:
        typer.confirm("Has every owner read you its fingerprint over the phone, and is it the same?", abort=True)
    key = _governance(ceremony, passphrase_file)
    for one in examined:
        ceremony.admit(one)
    _grants(ceremony, ceremony.grants(key))


@deploy_app.command()
def complete(
    kit: KitFolder, grant: Annotated[Path, typer.Argument(help="<party>.grant.json, from the coordinator")]
) -> None:
    """Party: prove the coordinator's answer against governance.pub and ca.pem, and take it over."""
    roster, written = joining.complete(kit, _named(grant, Grant.from_bytes), engine_rules)
    opened = Kit.open(kit)
    opened.roster(time.time())
    _roster(roster)
    for path in written:
        _say(f"{path}  read it and make it yours")
    if opened.role == "site" and not (kit / "policy.yaml").exists():
        _say(f"{kit}/policy.yaml  is missing, so everything is refused. Write it, then edit its limits:")
        _say(
            f"  fedcollm policy new --site {opened.name} --server {kit}/server.pub --out {kit}/policy.yaml "
            "--data FILE --name NAME --model MODEL"
        )
    _say(f"Next: fedcollm {opened.role} --kit {kit} --check")


@deploy_app.command()
def renew(
    folder: Annotated[Path, typer.Argument(help="A kit (a new TLS key), or the ceremony's folder (a new roster)")],
    again: Annotated[bool, typer.Option("--again", help="Throw away a request that was not answered.")] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Party: ask for a new TLS certificate; the old one stays in use. Coordinator: sign the roster anew."""
    if (folder / "ceremony").is_dir():
        if again:
            raise InvalidValue("--again", True, "for a kit only")
        ceremony = Ceremony.open(folder)
        _grants(ceremony, ceremony.grants(_governance(ceremony, passphrase_file), fresh=True))
        return
    identity = joining.renew(folder, _passphrase(folder / "keys" / "identity.key", passphrase_file), again=again)
    _say(f"{joining.request_path(folder, read_party(folder))}  public: send it to the coordinator")
    _say(f"fingerprint of {identity.name}  {identity.fingerprint}  (as before)")
    _say(f"Next: fedcollm deploy complete {folder} GRANT; then restart the service.")


@deploy_app.command()
def revoke(
    folder: CeremonyFolder,
    party: Annotated[str, typer.Argument(help="The site's public name")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Coordinator: take a site out for good; the others get a new roster without it."""
    ceremony = Ceremony.open(folder)
    key = _governance(ceremony, passphrase_file)
    if not yes:
        typer.confirm(f"Take {party} out of {ceremony.federation.name}, for good?", abort=True)
    written = ceremony.revoke(party, key)
    _say(
        f"{party} is in no roster from now on. A party believes the old one until it has completed its new grant; the "
        "server first, please: then no round asks this site, and the engine turns its name away. Its TLS certificate "
        "itself ends by its date only."
    )
    _grants(ceremony, written)


@deploy_app.command()
def show(folder: Annotated[Path, typer.Argument(help="A kit, or the ceremony's folder")]) -> None:
    """Print what a kit or a ceremony has, and until when."""
    if (folder / "ceremony").is_dir():
        _show_ceremony(Ceremony.open(folder))
    else:
        _show_kit(folder)


def _show_ceremony(ceremony: Ceremony) -> None:
    roster = ceremony.roster()
    table = Table(title=f"{ceremony.federation.name}, the coordinator's folder", title_justify="left")
    for column in ("party", "standing", "fingerprint"):
        table.add_column(column, overflow="fold")
    for name in ceremony.kits:
        signed = ceremony.admitted(name)
        standing = "revoked" if name in ceremony.revoked else "awaited" if signed is None else "admitted"
        table.add_row(name, standing, "" if signed is None else signed.enrolment.identity.fingerprint)
    _print(table)
    _say(f"governance fingerprint  {ceremony.governance.fingerprint}")
    _say("no roster was signed yet" if roster is None else f"roster until  {_day(roster.valid_until)}")


def _show_kit(folder: Path) -> None:
    party = read_party(folder)
    table = Table(title=f"{party.party}, {party.role} of {party.federation}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("server", f"{party.server.name} at {party.server.host}, port {party.server.port}")
    table.add_row("when something is wrong", party.contact)
    table.add_row("governance fingerprint", load_public(folder / "governance.pub").fingerprint)
    if (folder / "keys" / "identity.pub").exists():
        table.add_row("own fingerprint", load_public(folder / "keys" / "identity.pub").fingerprint)
    if (folder / "keys" / "requested").exists():
        table.add_row("request", f"{joining.request_path(folder, party).name} waits for its grant")
    try:
        opened = Kit.open(folder)
        table.add_row("certificates until", f"{opened.valid_until:%Y-%m-%d %H:%M} UTC")
        roster = opened.roster(time.time())
        table.add_row("roster until", _day(roster.valid_until))
        table.add_row("sites", ", ".join(roster.site_names))
    except FedCollmError as error:
        table.add_row("NOT READY", str(error))
    _print(table)


def _compare(ceremony: Ceremony, examined: list[Examined]) -> None:
    table = Table(title=f"asking to take part in {ceremony.federation.name}", title_justify="left")
    for column in ("party", "role", "asks", "fingerprint"):
        table.add_column(column, overflow="fold", no_wrap=column in ("asks", "fingerprint"))
    says = {"new": "to join", "renewed": "a new TLS key", "replaced": "a NEW IDENTITY", "known": "again"}
    for one in examined:
        table.add_row(one.party, one.signed.enrolment.role, says[one.standing], one.identity.fingerprint)
    _print(table)


def _named(path: Path, read: Callable[[bytes], T]) -> T:
    try:
        return read(read_bytes(path))
    except KitError as error:
        raise KitError(f"{path}: {error}") from error


def _grants(ceremony: Ceremony, written: tuple[Path, ...]) -> None:
    if not written:
        _say(f"Next: admit {', '.join(ceremony.awaited)}. Grants are written once all are in.")
        return
    roster = ceremony.roster()
    if roster is not None:
        _roster(roster)
    for path in written:
        _say(f"{path}  public")
    _say("Next: send each its grant; it runs `fedcollm deploy complete KIT GRANT`.")


def _roster(roster: Roster) -> None:
    table = Table(title=f"{roster.federation}, until {_day(roster.valid_until)}", title_justify="left")
    for column in ("party", "name", "fingerprint"):
        table.add_column(column, overflow="fold", no_wrap=column == "fingerprint")
    for role, identity in (("server", roster.server), *(("site", site) for site in roster.sites)):
        table.add_row(role, identity.name, identity.fingerprint)
    _print(table)


def _governance(ceremony: Ceremony, passphrase_file: Path | None) -> SigningKey:
    return ceremony.key(_passphrase(ceremony.folder / "ceremony" / "governance.key", passphrase_file))


def _passphrase(key: Path, file: Path | None) -> bytes | None:
    given = given_passphrase(file)
    if given is None and key.exists() and is_encrypted(key):
        return str(typer.prompt(f"Passphrase for {key}", hide_input=True, err=True)).encode()
    return given


def _locked(passphrase: bytes | None, whose: str) -> str:
    return ", not encrypted" if passphrase is None else f", {whose} encrypted"


def _day(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _print(table: Table) -> None:
    Console(markup=False, highlight=False, emoji=False).print(table)


def _say(line: str) -> None:
    # As it is: a path is no markup, and a broken line cannot be copied.
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
