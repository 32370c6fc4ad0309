"""``fedcollm keys``: make, show and check the keys and the roster of a federation."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from fedcollm_privacy.errors import InvalidValue, KeyFileError, ProtocolError
from fedcollm_privacy.identity import (
    SigningKey,
    is_encrypted,
    load_key,
    load_public,
    save_key,
    save_public,
)
from fedcollm_privacy.roster import MAX_BYTES, Roster, SignedRoster, sign_roster

__all__ = ["PASSPHRASE_VARIABLE", "given_passphrase", "keys_app"]

PASSPHRASE_VARIABLE = "FEDCOLLM_PASSPHRASE"  # noqa: S105

T = TypeVar("T")

keys_app = typer.Typer(no_args_is_help=True, help="Make and check signing keys and the signed list of who takes part.")

PassphraseFile = Annotated[
    Path | None,
    typer.Option(help=f"File whose content is the passphrase. Default: ${PASSPHRASE_VARIABLE}, or a question."),
]


@keys_app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Public name of the party: site-1, server, governance")],
    out: Annotated[Path, typer.Option(help="Folder for NAME.key and NAME.pub")] = Path(),
    passphrase_file: PassphraseFile = None,
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Do not encrypt; the file's mode is its only protection.")
    ] = False,
) -> None:
    """Make a signing key: NAME.key stays here, NAME.pub goes to the governance. Never overwrites a file."""
    if no_passphrase and passphrase_file is not None:
        raise InvalidValue("--no-passphrase", str(passphrase_file), "one of --passphrase-file and --no-passphrase")
    key = SigningKey.generate(name)
    private, public = out / f"{name}.key", out / f"{name}.pub"
    # Before the question, and both before either is written: half a pair helps nobody.
    for path in (private, public):
        if path.exists() or path.is_symlink():
            raise KeyFileError(f"{path} exists and is never overwritten: choose another --out, or move it away")
    passphrase = None
    if not no_passphrase:
        passphrase = given_passphrase(passphrase_file)
        if passphrase is None:
            passphrase = _ask(f"Passphrase for {private} (long: five random words or more)", twice=True)
    save_key(key, private, passphrase)
    save_public(key.public, public)
    _say(
        f"{private}  private{' and NOT encrypted' if passphrase is None else ', encrypted'}: it never leaves this place"
    )
    _say(f"{public}  public")
    _say(f"fingerprint  {key.public.fingerprint}")
    _say(f"Next: send {public.name} to the governance of the federation; read the fingerprint to them over the phone.")


@keys_app.command("show")
def show(
    path: Annotated[Path, typer.Argument(help="A .pub or a .key file")],
    passphrase_file: PassphraseFile = None,
) -> None:
    """Print name, fingerprint and kind of a key file. Opens a private key, so checks its passphrase and mode."""
    if _is_public(path):
        identity, kind = load_public(path), "public key"
    else:
        kind = "private key, encrypted" if is_encrypted(path) else "private key, NOT encrypted"
        identity = _open_key(path, passphrase_file).public
    _say(f"name         {identity.name}")
    _say(f"fingerprint  {identity.fingerprint}")
    _say(f"kind         {kind}, mode {stat.S_IMODE(path.stat().st_mode):04o}")


@keys_app.command("roster")
def roster(
    sites: Annotated[list[Path], typer.Argument(help="The .pub files of all sites, three or more")],
    federation: Annotated[str, typer.Option(help="Public name of the federation")],
    server: Annotated[Path, typer.Option(help="The server's .pub file")],
    out: Annotated[Path, typer.Option(help="The file to write")] = Path("roster.json"),
    valid_days: Annotated[int, typer.Option(min=1, help="Days from now until the roster expires")] = 365,
) -> None:
    """Write the list of who takes part, not signed yet. Compare every fingerprint with its owner before you sign."""
    made = Roster(
        federation=federation,
        server=load_public(server),
        sites=tuple(sorted((load_public(path) for path in sites), key=lambda site: site.name)),
        valid_until=int(time.time()) + valid_days * 86_400,
    )
    _write_new(out, made.to_bytes())
    _table(made)
    _say(f"Next: compare each fingerprint with its owner over the phone, then: fedcollm keys sign {out} --key FILE")


@keys_app.command("sign")
def sign(
    path: Annotated[Path, typer.Argument(help="A roster that `keys roster` wrote")],
    key: Annotated[Path, typer.Option(help="The governance's .key file")],
    out: Annotated[Path | None, typer.Option(help="The file to write. Default: NAME.signed.json")] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign a roster as the governance: these keys belong to these parties."""
    unsigned = _named(path, Roster.from_bytes)
    unsigned.require_valid(time.time())
    _table(unsigned)
    governance = _open_key(key, passphrase_file)
    target = path.with_suffix(".signed.json") if out is None else out
    _write_new(target, sign_roster(unsigned, governance).to_bytes())
    _say(f"{target}  signed by {governance.name}, fingerprint {governance.public.fingerprint}")
    _say(f"Next: send {target.name} to all parties; each checks it with its own copy of {governance.name}.pub.")


@keys_app.command("verify")
def verify(
    path: Annotated[Path, typer.Argument(help="A roster that `keys sign` wrote")],
    governance: Annotated[Path, typer.Option(help="The governance's .pub file, received from the governance itself")],
) -> None:
    """Check a roster's signature and validity; exit 0 and the list of parties only if both hold."""
    signer = load_public(governance)
    _table(_named(path, SignedRoster.from_bytes).verified_by(signer, time.time()))
    _say(f"signed by {signer.name}, fingerprint {signer.fingerprint}")


def _open_key(path: Path, passphrase_file: Path | None) -> SigningKey:
    passphrase = given_passphrase(passphrase_file)
    if passphrase is None and is_encrypted(path):
        passphrase = _ask(f"Passphrase for {path}", twice=False)
    return load_key(path, passphrase)


def given_passphrase(file: Path | None) -> bytes | None:
    """The passphrase in a file, or else in the environment; None where neither gives one.

    Raises:
        KeyFileError: the file cannot be read.
    """
    if file is None:
        value = os.environ.get(PASSPHRASE_VARIABLE)
        return None if value is None else os.fsencode(value)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise KeyFileError(
            f"the passphrase file {file} cannot be read ({error.strerror}): give another file"
        ) from error
    # One line end, which editors add; further ones may be meant.
    return content.removesuffix(b"\n").removesuffix(b"\r")


def _ask(question: str, *, twice: bool) -> bytes:
    return str(typer.prompt(question, hide_input=True, confirmation_prompt=twice, err=True)).encode()


def _is_public(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(1) == b"{"
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read ({error.strerror}): give a .pub or a .key file") from error


def _named(path: Path, parse: Callable[[bytes], T]) -> T:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read ({error.strerror}): give a roster file") from error
    try:
        return parse(data)
    except ProtocolError as error:
        raise ProtocolError(f"{path}: {error}") from error


def _write_new(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        raise KeyFileError(f"{path} exists and is never overwritten: choose another --out, or move it away") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written ({error.strerror}): choose another --out") from error


def _table(listed: Roster) -> None:
    until = datetime.fromtimestamp(listed.valid_until, UTC)
    table = Table(title=f"{listed.federation}, valid until {until:%Y-%m-%d %H:%M} UTC", title_justify="left")
    table.add_column("party")
    table.add_column("name", overflow="fold")
    table.add_column("fingerprint", no_wrap=True)
    for party, identity in [("server", listed.server), *(("site", site) for site in listed.sites)]:
        table.add_row(party, identity.name, identity.fingerprint)
    Console().print(table)


def _say(line: str) -> None:
    # As it is: a path is no markup, and a broken line cannot be copied.
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
