"""``fedcollm ledger``: look at a site's ledger, check it, take it elsewhere, give a run up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedcollm_privacy.errors import LedgerError
from fedcollm_privacy.identity import PublicIdentity, load_key, load_public

__all__ = ["ledger_app"]

ledger_app = typer.Typer(no_args_is_help=True, help="A site's privacy ledger.")
_File = Annotated[Path, typer.Argument(help="The site's .sqlite ledger")]


@ledger_app.command("show")
def show(path: _File) -> None:
    """Print every entry, and the last head that the server counter-signed."""
    from fedcollm_privacy.ledger_file import LedgerFile

    opened = LedgerFile(path)
    table = Table(title=f"{path}, site {opened.site}", title_justify="left")
    for column in ("seq", "time", "kind", "run", "round", "steps", "ε charged", "outcome", "digest"):
        table.add_column(column)
    for entry in opened.entries():
        table.add_row(
            str(entry["seq"]),
            entry["time"],
            entry["kind"],
            entry["run_id"],
            str(entry.get("server_round", "")),
            str(entry.get("steps", "")),
            f"{entry['epsilon']:.4f}" if "epsilon" in entry else "",
            entry.get("outcome", ""),
            entry["digest"][:12],
        )
    console = Console()
    console.print(table)
    heads = opened.heads()
    if heads:
        head = heads[-1]["head"]
        console.print(
            f"counter-signed by the server up to entry {head['tree_size']} (run {head['run_id']}, round "
            f"{head['server_round']}), root {head['tree_root'][:16]}",
            highlight=False,
        )
    else:
        console.print("no server has counter-signed this ledger yet: older copies of it could not be told from it")


@ledger_app.command("verify")
def verify(
    path: Annotated[Path, typer.Argument(help="A .sqlite ledger or a .jsonl export")],
    key: Annotated[
        Path | None, typer.Option(help="The site's .pub file; without it the file's own key is used")
    ] = None,
) -> None:
    """Check chain, signatures and counter-signed heads; exit 0 only if all hold."""
    from fedcollm_privacy.entries import leaves, verify_chain
    from fedcollm_privacy.ledger_file import LedgerFile
    from fedcollm_privacy.tree_heads import head_problems

    if path.suffix == ".jsonl":
        name, identity, entries, heads = _read_export(path)
    else:
        opened = LedgerFile(path)
        name, identity, entries, heads = opened.ledger, opened.identity, opened.entries(), opened.heads()
    pinned = identity if key is None else load_public(key)
    problems = verify_chain(entries, pinned)
    if key is not None and identity is not None and identity != pinned:
        problems.append(f"it names another key than {key}")
    if pinned is None and (heads or any(entry.get("schema") != 1 for entry in entries)):
        problems.append("it names no key, so no signature can be checked: give the site's with --key")
    if any(entry.get("ledger", name) != name for entry in entries if name):
        problems.append("it names another ledger than its entries do")
    if not problems and pinned is not None:
        problems = head_problems(heads, leaves(entries), name, pinned)
    for problem in problems:
        Console(stderr=True).print(problem, style="red", highlight=False)
    if problems:
        raise typer.Exit(1)
    unsigned = sum(entry["schema"] < 2 for entry in entries)
    said = f"{len(entries)} entries, the chain holds"
    if pinned is not None:
        said += f"; {len(entries) - unsigned} signed by {pinned.name}, key {pinned.fingerprint}"
        said += f"; {len(heads)} heads counter-signed"
    if unsigned:
        said += f"; {unsigned} older entries have no signature"
    if key is None and pinned is not None:
        said += ". Compare the key with the roster, or give --key"
    Console().print(said, highlight=False)


@ledger_app.command("export")
def export(
    path: _File,
    target: Annotated[Path, typer.Argument(help="The .jsonl file to write")],
    backup: Annotated[
        bool, typer.Option("--backup", help="With the salt, so that it can be restored. Keep it secret.")
    ] = False,
) -> None:
    """Write a ledger as canonical JSON lines, for an auditor or as a backup."""
    from fedcollm_privacy.ledger_file import LedgerFile

    opened = LedgerFile(path)
    if backup:
        opened.back_up(target)
    else:
        opened.export(target)


@ledger_app.command("import")
def restore(
    source: Annotated[Path, typer.Argument(help="What `ledger export --backup` wrote")],
    path: Annotated[Path, typer.Argument(help="The .sqlite ledger to make; must not exist")],
) -> None:
    """Restore a backup. The server notices if it is not the newest: it has counter-signed what came after."""
    from fedcollm_privacy.ledger_file import LedgerFile

    restored = LedgerFile.restored(source, path)
    Console().print(f"{len(restored.entries())} entries of site {restored.site} restored", highlight=False)


@ledger_app.command("abort")
def abort(
    path: _File,
    run_id: Annotated[str, typer.Argument(help="The run, as `ledger show` names it")],
    key: Annotated[Path, typer.Option(help="The site's private key file, which signs the entry")],
) -> None:
    """Give a run up. What it was charged stays spent, unless it never reserved a step."""
    from fedcollm_privacy.ledger import Ledger
    from fedcollm_privacy.ledger_file import LedgerFile

    LedgerFile(path)  # refuses a missing one, which `Ledger` would make
    ledger = Ledger(path, load_key(key, None))
    ledger.abort(run_id)
    spent = ledger.spent_in_run(run_id)
    Console().print(f"run {run_id} is given up; charged: ε {spent.epsilon:.4f}, δ {spent.delta:.1e}", highlight=False)


def _read_export(path: Path) -> tuple[str, PublicIdentity | None, list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        opening = next((line for line in lines if line["kind"] == "LEDGER"), None)
        entries = [line for line in lines if line["kind"] not in ("LEDGER", "HEAD")]
        heads = [line for line in lines if line["kind"] == "HEAD"]
        if opening is None or opening["public_key"] is None:
            return "", None, entries, heads
        identity = PublicIdentity(name=opening["site"], public_key=bytes.fromhex(opening["public_key"]))
        return str(opening["ledger"]), identity, entries, heads
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LedgerError(f"{path} cannot be read as an export: {error}") from error
