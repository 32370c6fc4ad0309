"""``fedcollm sweep``: a grid or random search over any settings, methods and seeds, and the table it gives."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol

import typer
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, ValueType
from hydra.errors import HydraException
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedcollm_privacy.errors import ConfigError
from secure_fedcollm.sweep import Tell, cores, fitting_jobs, last_round, run_cells, sweep_lock
from secure_fedcollm.sweep_cells import Axis, Cell, Outcome, kept_cells, new_cells, put
from secure_fedcollm.sweep_cluster import CLUSTERS, run_on_cluster
from secure_fedcollm.sweep_search import Interval, Options, draw

__all__ = ["parse_grid", "parse_search", "sweep"]

_DRAWN = (ValueType.CHOICE_SWEEP, ValueType.RANGE_SWEEP, ValueType.INTERVAL_SWEEP)


class Start(Protocol):
    """Runs cells until none is left to run, as `sweep.run_cells` does."""

    def __call__(self, cells: Sequence[Cell], *, jobs: int, lock: int, tell: Tell) -> None:
        """Run them."""


def parse_grid(words: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """Tell overrides with several values from those with one, by Hydra's own grammar.

    Returns:
        The axes of the grid, and the other overrides as they were given.

    Raises:
        ConfigError: a word is no override, or its values cannot be listed (``interval(...)``, ``glob(...)``).
    """
    axes, fixed = [], []
    for word in words:
        override = _parsed(word)
        if override.is_sweep_override():
            axes.append(Axis(field=word.partition("=")[0], values=_listed(word, override)))
        else:
            fixed.append(word)
    return axes, fixed


def parse_search(words: Sequence[str]) -> tuple[list[Interval | Options], list[str]]:
    """Tell fields to draw from all others: ``interval(...)``, ``choice(...)`` and ``range(...)``, by Hydra's grammar.

    ``tag(log, ...)`` of an interval makes its draws logarithmic, ``int(...)`` whole. Lists with commas are a grid that
    every drawn setting is crossed with. So is ``seed`` in every form: pairs of settings are compared seed by seed.

    Returns:
        The fields to draw, and the other overrides as they were given.

    Raises:
        ConfigError: a word is no override, or is tagged in a way that has no meaning here.
    """
    drawn: list[Interval | Options] = []
    others = []
    for word in words:
        override, field = _parsed(word), word.partition("=")[0]
        if field == "seed" or override.value_type not in _DRAWN:
            others.append(word)
            continue
        ranged = override.value()
        tags: set[str] = getattr(ranged, "tags", set())
        if tags - {"log"} or (tags and not isinstance(ranged, IntervalSweep)):
            raise ConfigError(field, word.partition("=")[2], "tag(log, interval(...)), or no tag at all")
        if isinstance(ranged, IntervalSweep):
            low, high = ranged.start, ranged.end
            if low is None or high is None:
                raise ConfigError(field, word.partition("=")[2], "interval(low, high)")
            whole = isinstance(low, int) and isinstance(high, int)
            drawn.append(Interval(field=field, low=low, high=high, whole=whole, logarithmic=bool(tags)))
        else:
            drawn.append(Options(field=field, values=_listed(word, override)))
    return drawn, others


def _parsed(word: str) -> Override:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise _not_listed(word, error) from error


def _listed(word: str, override: Override) -> tuple[str, ...]:
    try:
        values = tuple(override.sweep_string_iterator())
    except HydraException as error:
        raise _not_listed(word, error) from error
    if not values or len(set(values)) < len(values):
        raise ConfigError(word.partition("=")[0], ",".join(values), "at least one value, and each of them once")
    return values


def _not_listed(word: str, error: HydraException) -> ConfigError:
    forms = "field=value, field=a,b,c, field=range(0,5) or field=choice(a,b); with --trials also field=interval(0.1,10)"
    return ConfigError("overrides", word, f"{forms}: {' '.join(str(error).split())}")


def sweep(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Lists are the grid: method=fedavg,fedcollm privacy.epsilon=null,8,3 seed=range(0,5)"),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Random search: draw so many settings from interval(..), choice(..), range(..)"),
    ] = None,
    trials_seed: Annotated[int, typer.Option(min=0, help="Of the draws; the same seed draws the same settings")] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs side by side; default: what cores and memory hold")
    ] = None,
    launcher: Annotated[
        str, typer.Option(help="local: processes of this machine; submitit_slurm: jobs of a cluster; submitit_local")
    ] = "local",
    resource: Annotated[
        list[str] | None,
        typer.Option(help="Of a job, once each: timeout_min=240 cpus_per_task=8 gpus_per_node=1 slurm_partition=gpu"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False,
) -> None:
    """Run every combination of the listed settings on public or synthetic data, and compare them.

    With --trials 20 'privacy.max_grad_norm=tag(log,interval(0.1,10))' 'adapter.r=choice(4,8,16)' method=fedavg,fedcollm
    seed=0,1,2 settings are drawn from functions, and each is run with every combination of the lists (and of seeds).
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
    ranged, listed = parse_search(words) if trials else ([], words)
    axes, fixed = parse_grid(listed)
    drawn = draw(ranged, trials=trials, seed=trials_seed) if trials else [{}]
    if not words and not (folder / "cells").is_dir():
        raise ConfigError(
            "sweep", str(folder), "settings with lists of values, or sweep_dir=<folder of a sweep that was cut>"
        )
    start = _launched(launcher, resource or [], folder)
    console = Console(stderr=True, quiet=quiet)
    with sweep_lock(folder) as lock:
        if words:
            cells = new_cells(folder, axes, fixed, compose_config, drawn)
            _keep_command(folder, [*([f"--trials={trials}", f"--trials-seed={trials_seed}"] if trials else []), *words])
        else:
            cells = kept_cells(folder)
        # A cluster's own queue knows what it holds.
        jobs = jobs or (fitting_jobs(cells) if launcher == "local" else max(1, len(cells)))
        if trials:
            console.print(f"{len(drawn)} different settings in {trials} draws", highlight=False)
        where = f"on {cores()} cores" if launcher == "local" else f"by {launcher}"
        console.print(f"{len(cells)} cells in {folder}, {jobs} at a time {where}", highlight=False)
        _run(cells, jobs, lock, console, start)
        every = kept_cells(folder)
        page = write_report(folder, every)
    failed = [cell for cell in cells if cell.outcome.status != "finished"]
    console.print(f"results: {folder / 'results.csv'}\nreport:  {page}", highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _keep_command(folder: Path, words: Sequence[str]) -> None:
    """Keep what the sweep was asked for, so that its table says how its settings came about."""
    path, said = folder / "commands.json", shlex.join(["fedcollm", "sweep", *words])
    known = json.loads(path.read_text(encoding="utf-8"))["commands"] if path.exists() else []
    if said not in known:
        put(path, {"commands": [*known, said]})


def _launched(launcher: str, resources: Sequence[str], folder: Path) -> Start:
    """The function that runs cells where the launcher says."""
    given: dict[str, int | str] = {}
    for word in resources:
        name, sign, text = word.partition("=")
        if not (name and sign and text) or name in given:
            raise ConfigError("--resource", word, "name=value, each name once")
        given[name] = int(text) if text.isdecimal() else text
    if launcher == "local":
        if given:
            raise ConfigError("--resource", " ".join(resources), "nothing with --launcher=local; see --jobs")
        return run_cells
    if launcher not in CLUSTERS:
        raise ConfigError("--launcher", launcher, f"one of local, {', '.join(CLUSTERS)}")

    def start(cells: Sequence[Cell], *, jobs: int, lock: int, tell: Tell) -> None:
        run_on_cluster(cells, jobs=jobs, sweep_dir=folder, launcher=launcher, resources=given, tell=tell)

    return start


def _run(cells: Sequence[Cell], jobs: int, lock: int, console: Console, start: Start) -> None:
    outcomes = {cell.name: cell.outcome for cell in cells}

    def tell(cell: Cell, outcome: Outcome) -> None:
        outcomes[cell.name] = outcome
        if outcome.status == "failed" or (outcome.status == "finished" and not console.is_terminal):
            console.print(_line(cell, outcome), highlight=False, markup=False, soft_wrap=True)

    for cell in cells:
        if cell.config is None:
            console.print(_line(cell, cell.outcome), highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        start(cells, jobs=jobs, lock=lock, tell=tell)
        return
    with Live(console=console, get_renderable=lambda: _table(cells, outcomes), refresh_per_second=2, transient=True):
        start(cells, jobs=jobs, lock=lock, tell=tell)
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
