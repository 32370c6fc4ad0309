"""``fedcollm sweep``: a grid over any settings, methods and seeds, and the table it gives."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedcollm_privacy.errors import ConfigError
from secure_fedcollm.sweep import cores, fitting_jobs, last_round, run_cells, sweep_lock
from secure_fedcollm.sweep_cells import Axis, Cell, Outcome, kept_cells, new_cells

__all__ = ["parse_grid", "sweep"]


def parse_grid(words: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """Tell overrides with several values from those with one, by Hydra's own grammar.

    Returns:
        The axes of the grid, and the other overrides as they were given.

    Raises:
        ConfigError: a word is no override, or its values cannot be listed (``interval(...)``, ``glob(...)``).
    """
    parser = OverridesParser.create()
    axes, fixed = [], []
    for word in words:
        try:
            override = parser.parse_override(word)
            if override.is_sweep_override():
                axes.append(Axis(field=word.partition("=")[0], values=tuple(override.sweep_string_iterator())))
            else:
                fixed.append(word)
        except HydraException as error:
            allowed = f"field=value, field=a,b,c, field=range(0,5) or field=choice(a,b): {' '.join(str(error).split())}"
            raise ConfigError("overrides", word, allowed) from error
    for axis in axes:
        if len(set(axis.values)) < len(axis.values):
            raise ConfigError(axis.field, ",".join(axis.values), "each value once")
    return axes, fixed


def sweep(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Lists are the grid: method=fedavg,fedcollm privacy.epsilon=null,8,3 seed=range(0,5)"),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs side by side; default: what cores and memory hold")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False,
) -> None:
    """Run every combination of the listed settings on public or synthetic data, and compare them.

    sweep_dir=FOLDER says where (default: outputs/<time>-sweep). The same command, or sweep_dir=FOLDER alone, goes on
    where a sweep was cut; another grid in the same folder joins its table. privacy.epsilon=null is a run without DP.
    """
    # `cli` registers this command, so it cannot be imported above; errors need not wait for what the report needs.
    from secure_fedcollm.cli import compose_config
    from secure_fedcollm.sweep_report import write_report

    words = list(overrides or [])
    named = [word.removeprefix("sweep_dir=") for word in words if word.startswith("sweep_dir=")]
    words = [word for word in words if not word.startswith("sweep_dir=")]
    if len(named) > 1:
        raise ConfigError("sweep_dir", " ".join(named), "one folder")
    folder = Path(named[0]) if named else Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-sweep"
    axes, fixed = parse_grid(words)
    if not words and not (folder / "cells").is_dir():
        raise ConfigError(
            "sweep", str(folder), "settings with lists of values, or sweep_dir=<folder of a sweep that was cut>"
        )
    console = Console(stderr=True, quiet=quiet)
    with sweep_lock(folder) as lock:
        cells = new_cells(folder, axes, fixed, compose_config) if words else kept_cells(folder)
        jobs = jobs or fitting_jobs(cells)
        console.print(f"{len(cells)} cells in {folder}, {jobs} at a time on {cores()} cores", highlight=False)
        _run(cells, jobs, lock, console)
        every = kept_cells(folder)
        page = write_report(folder, every)
    failed = [cell for cell in cells if cell.outcome.status != "finished"]
    console.print(f"results: {folder / 'results.csv'}\nreport:  {page}", highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _run(cells: Sequence[Cell], jobs: int, lock: int, console: Console) -> None:
    outcomes = {cell.name: cell.outcome for cell in cells}

    def tell(cell: Cell, outcome: Outcome) -> None:
        outcomes[cell.name] = outcome
        if outcome.status == "failed" or (outcome.status == "finished" and not console.is_terminal):
            console.print(_line(cell, outcome), highlight=False, markup=False, soft_wrap=True)

    for cell in cells:
        if cell.config is None:
            console.print(_line(cell, cell.outcome), highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        run_cells(cells, jobs=jobs, lock=lock, tell=tell)
        return
    with Live(console=console, get_renderable=lambda: _table(cells, outcomes), refresh_per_second=2, transient=True):
        run_cells(cells, jobs=jobs, lock=lock, tell=tell)
    console.print(_table(cells, outcomes))


def _line(cell: Cell, outcome: Outcome) -> str:
    took = "" if outcome.seconds is None or outcome.attempts == 0 else f" after {outcome.seconds:.0f} s"
    return f"{cell.name}: {outcome.status}{took}{f': {outcome.reason}' if outcome.reason else ''}"


def _table(cells: Sequence[Cell], outcomes: dict[str, Outcome]) -> Table:
    counts = Counter(outcome.status for outcome in outcomes.values())
    title = " · ".join(f"{counts[status]} {status}" for status in ("finished", "running", "waiting", "failed"))
    table = Table(title=title, title_justify="left")
    for column in ("cell", "state", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left", no_wrap=column != "state")
    # What is under way or wrong comes first; a long list of what is done says nothing more than its number.
    order = ("running", "failed", "finished")
    told = [cell for status in order for cell in cells if outcomes[cell.name].status == status]
    for cell in told[:20]:
        outcome = outcomes[cell.name]
        state = last_round(cell) if outcome.status == "running" else outcome.reason[:100] or outcome.status
        table.add_row(cell.name, Text(state), "" if outcome.seconds is None else f"{outcome.seconds:.0f}")
    return table
