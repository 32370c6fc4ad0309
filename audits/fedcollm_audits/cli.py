"""The ``fedcollm-audit`` command: look at what a run left behind, say yes, no or not shown, and why."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedcollm_audits.verdict import Check, Finding
from fedcollm_privacy.errors import FedCollmError, InvalidValue

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
_STYLES = {"pass": "green", "fail": "bold red", "not shown": "yellow", "not selected": "dim"}


@app.command()
def audit(
    run_dir: Annotated[Path | None, typer.Argument(help="The run's folder; it is only read.")] = None,
    ledger: Annotated[
        list[Path] | None, typer.Option("--ledger", help="A ledger export that a site handed over itself; repeatable.")
    ] = None,
    governance: Annotated[
        str | None, typer.Option(help="The governance's public key or its file, had from the governance itself.")
    ] = None,
    roster: Annotated[
        list[Path] | None,
        typer.Option("--roster", help="A roster that came another way than the run's folder; repeatable."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Make only this check or group; repeatable.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave this check or group out; repeatable.")] = None,
    html: Annotated[bool, typer.Option("--html", help="Write audit.html too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for audit.json and audit.html; default RUN_DIR.")] = None,
    list_checks: Annotated[bool, typer.Option("--list", help="Print all checks and end.")] = False,
) -> None:
    """Audit a run's folder.

    Exit code 0: every selected check passed; 1: at least one failed; 3: none failed, but something is not shown;
    2: the audit could not be made.
    """
    if not list_checks and (run_dir is None or not run_dir.is_dir()):
        raise InvalidValue("RUN_DIR", str(run_dir or ""), "the folder of a finished run")
    # Imported here because the attacks need torch, which takes seconds, and errors of usage should not wait for it.
    from fedcollm_audits import evidence as reader
    from fedcollm_audits.audit import CHECKS, run_checks, select

    console = Console()
    if run_dir is None or list_checks:
        _show_checks(console, CHECKS)
        return
    target = run_dir if out is None else out
    selected = select(CHECKS, only or (), skip or ())
    try:
        found = reader.read(run_dir, ledgers=ledger or (), governance=governance, rosters=roster or ())
    except OSError as error:
        raise InvalidValue("RUN_DIR", str(run_dir), f"files that can be read ({error.strerror})") from error

    given = [Path(governance)] if governance and Path(governance).is_file() else []
    made = 0
    options = {
        "--ledger": ledger,
        "--roster": roster,
        "--governance": [governance] if governance else None,
        "--only": only,
        "--skip": skip,
        "--out": [out] if out else None,
    }
    # Attacks take minutes: a terminal shows what is being asked, everything else only the answers.
    with console.status("") as asking:

        def tell(check: Check, finding: Finding | None) -> None:
            nonlocal made
            if finding is None:
                asking.update(f"{made + 1}/{len(selected)} {check.name}")
                return
            made += 1
            line = Text(f"[{made}/{len(selected)}] {check.name}: ")
            console.print(line.append(finding.status, _STYLES.get(finding.status)))

        result = run_checks(
            found,
            CHECKS,
            tell,
            selected=selected,
            also_read=[*(ledger or ()), *(roster or ()), *given],
            command=_command(run_dir, html, options),
        )

    from fedcollm_audits.controls import rows
    from fedcollm_audits.page import render, visible

    table = Table(title=Text(visible(f"audit of {result.subject.run_id}")), title_justify="left", show_lines=True)
    for column, width in (("check", None), ("answer", 12), ("why", None)):
        table.add_column(column, no_wrap=column == "answer", overflow="fold", width=width)
    for answer in result.answers:
        style = _STYLES.get(answer.status, "")
        table.add_row(Text(answer.check.name), Text(answer.status, style), Text(visible(answer.reason)))
    console.print(table)
    console.print(Text(visible(result.sentence), {"yes": "green", "no": "bold red"}.get(result.verdict, "yellow")))

    outputs = {"audit.json": result.to_json(rows(result))}
    if html:
        outputs["audit.html"] = render(result)
    for name, content in outputs.items():
        _write(target / name, content)
        console.print(Text(f"written: {target / name}"))
    console.print(f"exit code {result.exit_code}", highlight=False)
    raise typer.Exit(result.exit_code)


def _show_checks(console: Console, checks: Sequence[Check]) -> None:
    table = Table(title="checks of fedcollm-audit", title_justify="left")
    for column in ("check", "group", "a yes means"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, check.group, Text(check.question))
    console.print(table)


def _command(run_dir: Path, html: bool, options: Mapping[str, Sequence[object] | None]) -> str:
    words = ["fedcollm-audit", str(run_dir)]
    for option, values in options.items():
        words += [word for value in values or () for word in (option, str(value))]
    return shlex.join([*words, *(["--html"] if html else [])])


def _write(path: Path, content: str) -> None:
    """Replace a file; a link that the run's folder holds under that name is replaced and never followed."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            part = Path(file.name)
            file.write(content)
        part.chmod(0o644)
        os.replace(part, path)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise InvalidValue("--out", str(path.parent), f"a folder that can be written ({error.strerror})") from error


def main() -> None:
    """Entry point: errors of this project become one line on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except FedCollmError as error:
        Console(stderr=True).print(f"fedcollm-audit: {error}", style="red", highlight=False, markup=False)
        sys.exit(2)
