"""The cells of a sweep: one setting with one seed each, and where each lies on disk.

A cell's folder, ``<sweep_dir>/cells/<name>/``, holds ``cell.json`` (what it is, written before it runs), ``run/`` (an
ordinary run's folder), ``log.txt`` and ``outcome.json``. A cell is finished when its run wrote summary and report.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedcollm_privacy.errors import ConfigError, FedCollmError
from secure_fedcollm.config import Config
from secure_fedcollm.strict_build import build

__all__ = ["Axis", "Cell", "Outcome", "kept_cells", "new_cells", "put", "read_cell"]

Compose = Callable[[list[str]], dict[str, Any]]
_NO_DP = "privacy.epsilon"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One field of the grid and its values, both as written on the command line."""

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How far a cell has come.

    Attributes:
        status: ``waiting``, ``running``, ``finished`` or ``failed``; ``running`` in a file that nobody works on is a
            cell that was cut together with its sweep.
        reason: of a failure, one line.
        attempts: how often it was begun.
        seconds: of all attempts; null when one of them was cut together with its sweep, so that nobody knows.
        peak_bytes: the most memory its processes were seen to hold.
    """

    status: str
    reason: str = ""
    attempts: int = 0
    seconds: float | None = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
        folder: of the cell.
        axes: fields of the grid it came from.
        values: every override, field to text, of grid and fixed part.
        config: the whole configuration, as plain containers; None where the settings do not go together.
        refusal: why not, then.
    """

    folder: Path
    axes: tuple[str, ...]
    values: Mapping[str, str]
    config: Mapping[str, Any] | None
    refusal: str = ""

    @property
    def name(self) -> str:
        """Readable, unique within the sweep, and safe as a file name."""
        return self.folder.name

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    @property
    def finished(self) -> bool:
        """Whether its run wrote its summary and its report, the last of its files."""
        return (self.run / "summary.json").exists() and (self.run / "report.html").exists()

    @property
    def outcome(self) -> Outcome:
        """What is known of it now; files of the run outrank what was noted."""
        if self.config is None:
            return Outcome(status="failed", reason=self.refusal)
        try:
            noted = Outcome(**json.loads((self.folder / "outcome.json").read_text()))
        except (OSError, ValueError, TypeError):
            noted = Outcome(status="waiting")
        if self.finished and noted.status != "finished":
            # The sweep was cut between the run's last file and its note; only the seconds are lost.
            return replace(noted, status="finished", reason="", seconds=None)
        return noted

    def note(self, outcome: Outcome) -> None:
        """Keep an outcome; a crash leaves the one before."""
        put(self.folder / "outcome.json", {name: getattr(outcome, name) for name in Outcome.__slots__})


def put(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file so that a crash leaves the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def new_cells(
    sweep_dir: Path,
    axes: Sequence[Axis],
    fixed: Sequence[str],
    compose: Compose,
    drawn: Sequence[Mapping[str, str]] = ({},),
) -> list[Cell]:
    """Every drawn setting with every combination of the axes' values as a cell, kept on disk.

    ``null`` for ``privacy.epsilon`` means a run without DP: the configuration is the same but for its privacy section,
    which is dropped.

    Args:
        sweep_dir: the sweep's folder.
        axes: the grid; none gives one cell.
        fixed: overrides of all cells.
        compose: from overrides to a configuration, as `cli.compose_config`.
        drawn: settings of a random search, field to text; a grid alone is one that says nothing.

    Raises:
        ConfigError: a field is given twice; records are declared private; no cell's settings go together (the first
            refusal is told); or the folder holds such a cell already, with another configuration.
    """
    fields = [*drawn[0], *(axis.field for axis in axes), *(word.partition("=")[0] for word in fixed)]
    for field in fields:
        if fields.count(field) > 1:
            raise ConfigError(field, "given twice", "one value or one list of values for each field")
        if field in ("output_dir", "resume"):
            raise ConfigError(field, "given", "sweep_dir=<folder>: every cell has its run's folder in there")
    cells = []
    for setting in drawn:
        for chosen in itertools.product(*(axis.values for axis in axes)):
            values = {**setting, **dict(zip((axis.field for axis in axes), chosen, strict=True))}
            cells.append(_cell(sweep_dir, values, fixed, compose))
    if all(cell.config is None for cell in cells):
        raise ConfigError(
            "sweep", f"{len(cells)} cells", f"settings that go together; the first cell: {cells[0].refusal}"
        )
    for cell in cells:
        _refuse_private(cell)
    return [_keep(cell) for cell in cells]


def kept_cells(sweep_dir: Path) -> list[Cell]:
    """Every cell that lies in a sweep's folder, by name.

    Raises:
        ConfigError: a cell's file is unreadable, or its records are declared private.
    """
    return [read_cell(path) for path in sorted((sweep_dir / "cells").glob("*/cell.json"))]


def read_cell(path: Path) -> Cell:
    """One cell, from its ``cell.json``; raises as `kept_cells`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cell = Cell(
            folder=path.parent,
            axes=tuple(content["axes"]),
            values=dict(content["values"]),
            config=content["config"],
            refusal=str(content["refusal"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("sweep_dir", str(path), "a cell as the sweep wrote it; delete that cell's folder") from error
    _refuse_private(cell)
    return cell


def _cell(sweep_dir: Path, values: Mapping[str, str], fixed: Sequence[str], compose: Compose) -> Cell:
    words = [*(f"{field}={text}" for field, text in values.items()), *fixed]
    said = {**values, **dict(_split(word) for word in fixed)}
    readable = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", f"{f.rpartition('.')[2]}_{v}") for f, v in values.items())
    digest = hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()[:10]
    folder = sweep_dir / "cells" / f"{readable[:80].strip('._') or 'cell'}-{digest}"
    without_dp = said.get(_NO_DP) == "null"
    config, refusal = None, ""
    try:
        config = compose([word for word in words if not (without_dp and word.startswith(f"{_NO_DP}="))])
        config = {**config, "output_dir": str(folder.absolute() / "run")}
        if without_dp:
            config |= {"private": False, "privacy": None}
        build(Config, config)
    except FedCollmError as error:
        config, refusal = None, " ".join(str(error).split())
    return Cell(folder=folder, axes=tuple(values), values=said, config=config, refusal=refusal)


def _split(word: str) -> tuple[str, str]:
    field, _, text = word.partition("=")
    return field, text


def _refuse_private(cell: Cell) -> None:
    if cell.config is None or cell.config["data"]["declared"] != "private":
        return
    raise ConfigError(
        "data.declared",
        "private",
        "public | synthetic in a sweep. Choosing a setting by its result is a look at the data too, and has no cheap "
        "price here: the published bound for the best of a random number of trials (Papernot and Steinke 2022) holds "
        "only when the best trial alone is ever seen, while a sweep shows a table of all of them and the server sees "
        "every trial's sums. Choose the setting on public or synthetic records like yours, then run it once with "
        "`fedcollm run`; or run each trial with `fedcollm run`, which charges it to the sites' ledgers in full",
    )


def _keep(cell: Cell) -> Cell:
    path = cell.folder / "cell.json"
    content = {
        "axes": list(cell.axes),
        "values": dict(cell.values),
        "config": cell.config,
        "refusal": cell.refusal,
    }
    before = json.loads(path.read_text(encoding="utf-8"))["config"] if path.exists() else None
    if before is not None and {**before, "output_dir": None} != {**(cell.config or {}), "output_dir": None}:
        raise ConfigError(
            "sweep_dir",
            str(cell.folder),
            "a folder whose cells have this configuration; these settings meant another one when the cell was made "
            "(the program or its YAML files have changed): choose a new folder, or delete that cell's",
        )
    cell.folder.mkdir(parents=True, exist_ok=True)
    put(path, content)
    return cell
