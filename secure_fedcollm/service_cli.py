"""``fedcollm server`` and ``fedcollm site``: the long-lived commands, and what an administrator may say to a site."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedcollm_privacy.errors import ConfigError
from secure_fedcollm.keys_cli import PASSPHRASE_VARIABLE, given_passphrase
from secure_fedcollm.kit import Kit
from secure_fedcollm.standing import Standing

__all__ = ["server", "site_app"]

KitFolder = Annotated[Path, typer.Option(help="The kit's folder. Default: $FEDCOLLM_KIT, or the folder you are in.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help=f"File whose content opens the identity's key. Default: ${PASSPHRASE_VARIABLE}, or none."),
]
Port = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="Show a read-only page on http://127.0.0.1:PORT; nobody else can reach it."),
]
Check = Annotated[bool, typer.Option("--check", help="Look whether all is as it must be, say what to do, and end.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only; the log file has everything.")]
_HERE = Path(os.environ.get("FEDCOLLM_KIT", "."))

site_app = typer.Typer(invoke_without_command=True, help="Take part as a site; say yes or no to what is asked of it.")


@site_app.callback()
def site(
    context: typer.Context,
    kit: KitFolder = _HERE,
    check: Check = False,
    port: Port = None,
    passphrase_file: PassphraseFile = None,
    quiet: Quiet = False,
) -> None:
    """Answer the server's requests, within the policy, until stopped."""
    context.obj = kit
    if context.invoked_subcommand is not None:
        return
    if check:
        # Here and below, because torch takes seconds and the other commands need none of it.
        from secure_fedcollm.doctor import check_site, show_findings

        raise typer.Exit(show_findings(check_site(kit), Console()))
    _require_engine()
    from secure_fedcollm.site_service import serve_site

    serve_site(Kit.open(kit), passphrase=_passphrase(passphrase_file), port=port, quiet=quiet)


@site_app.command()
def offers(context: typer.Context) -> None:
    """List the runs that were offered and what was answered."""
    table = Table(title="runs offered to this site", title_justify="left")
    for column in ("offer", "run", "asks for", "standing"):
        table.add_column(column, overflow="fold")
    for offer in _standing(context).offers():
        table.add_row(offer.digest[:16], offer.run_id, offer.summary, offer.standing)
    Console(markup=False, highlight=False, emoji=False).print(table)


@site_app.command()
def approve(context: typer.Context, offer: Annotated[str, typer.Argument(help="Its first digits, as listed")]) -> None:
    """Let this site take part in a run that waits for approval; the policy holds all the same."""
    _say(f"approved: {_standing(context).approve(offer)}. The site joins when the server asks next")


@site_app.command()
def decline(context: typer.Context, offer: Annotated[str, typer.Argument(help="Its first digits, as listed")]) -> None:
    """Refuse a run that was offered; also takes an approval back, from the next round on."""
    _say(f"declined: {_standing(context).decline(offer)}. What it has spent stays spent and is accounted for")


@site_app.command()
def pause(context: typer.Context) -> None:
    """Take part in no round from now on, until `resume`; the round under way ends as it must."""
    _standing(context).pause()
    _say("paused: no further round reserves budget here")


@site_app.command()
def resume(context: typer.Context) -> None:
    """Take part again."""
    _standing(context).resume()
    _say("goes on with the next round")


@site_app.command()
def leave(context: typer.Context) -> None:
    """Leave the federation: nothing is trained for it again. The ledger stays, and still answers for what was spent."""
    _standing(context).leave()
    _say("left: every round and every new run is declined from now on")


def server(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Hydra overrides of a new run; none goes on with the one that is open")
    ] = None,
    kit: KitFolder = _HERE,
    check: Check = False,
    give_up: Annotated[bool, typer.Option("--give-up", help="Leave the open run where it is, and end.")] = False,
    port: Port = None,
    passphrase_file: PassphraseFile = None,
    quiet: Quiet = False,
) -> None:
    """Run a federation whose sites are on machines of their own, or go on with it."""
    if check:
        from secure_fedcollm.doctor import check_server, show_findings

        raise typer.Exit(show_findings(check_server(kit), Console()))
    opened = Kit.open(kit)
    _require_engine()
    from secure_fedcollm import server_service
    from secure_fedcollm.cli import compose_config

    if give_up:
        if overrides:
            raise ConfigError("--give-up", " ".join(overrides), "no overrides beside it")
        server_service.give_up(opened)
        _say("given up; its folder stays, and what its sites have reserved stays spent")
        return
    plain = compose_config(list(overrides)) if overrides else None
    folder = server_service.serve(opened, plain, passphrase=_passphrase(passphrase_file), port=port, quiet=quiet)
    _say(f"run: {folder}")


def _require_engine() -> None:
    for library in ("nvflare", "msgpack", "prometheus_client"):
        if find_spec(library) is None:
            raise ConfigError("installation", f"without {library}", "pip install 'secure-fedcollm[deploy]'")


def _standing(context: typer.Context) -> Standing:
    return Standing(Kit.open(context.obj).state)


def _passphrase(file: Path | None) -> bytes | None:
    return given_passphrase(file)


def _say(line: str) -> None:
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
