"""What a sweep found, as numbers: one row a cell, one setting for all its seeds, and what the differences are worth.

Gain is what training added to a model, whatever the task: choice accuracy after minus before, or where there are no
choices the fall of cross-entropy in nats per token (that of log-perplexity).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scipy.special import stdtrit

from fedcollm_privacy.errors import InvalidValue
from secure_fedcollm import run_files
from secure_fedcollm.sweep_cells import Cell

__all__ = [
    "CONFIDENCE",
    "Estimate",
    "Row",
    "Setting",
    "csv_text",
    "differ",
    "estimate",
    "fields_of",
    "rows_of",
    "settings_of",
    "write_csv",
    "write_parquet",
]

CONFIDENCE: Final = 0.95
MODELS: Final = ("slm", "llm")
_TEXTS: Final = ("cell", "status", "worst_site", "reason")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell.

    Attributes:
        cell: its name.
        values: field of the grid to its text; "" where the cell has no such setting.
        status: ``finished``, ``failed``, ``cut`` or ``waiting``.
        reason: of a failure.
        numbers: what the run measured, spent and sent, by column; None where it has no such number.
        worst_site: the site that gained least on its own held-out records, with the model that it ends up with.
    """

    cell: str
    values: Mapping[str, str]
    status: str
    reason: str
    numbers: Mapping[str, float | None]
    worst_site: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        half: half the width of its 95 % t-interval; None of a single value, which tells nothing about others.
        count: of the values.
    """

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float:
        """The interval's lower end; minus infinity of a single value."""
        return -math.inf if self.half is None else self.mean - self.half


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """All finished seeds of one setting.

    Attributes:
        values: field to text, without the seed.
        rows: by seed.
    """

    values: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """The setting in words of the command line."""
        return " ".join(f"{field}={text}" for field, text in self.values.items() if text) or "the one setting"

    def of(self, column: str) -> Estimate | None:
        """Mean and interval of a column; None where a seed lacks it."""
        values = [row.numbers.get(column) for row in self.rows]
        known = [value for value in values if value is not None]
        return estimate(known) if known and len(known) == len(values) else None

    @property
    def private(self) -> bool:
        """Whether every run of it has an epsilon."""
        return all(row.numbers.get("epsilon") is not None for row in self.rows)


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean and Student's t-interval of independent values.

    Raises:
        InvalidValue: there are no values.
    """
    count = len(values)
    if count == 0:
        raise InvalidValue("values", values, "at least one")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean=mean, half=None, count=1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * deviation / math.sqrt(count)
    return Estimate(mean=mean, half=half, count=count)


def differ(one: Setting, other: Setting, column: str, comparisons: int) -> bool:
    """Whether seeds show that two settings differ in a column, at 95 % over so many comparisons (Bonferroni).

    Seeds that both have are compared pair by pair (same split, same first adapters); without two of those, the
    intervals must not overlap. One seed a setting never shows anything.
    """
    confidence = 1 - (1 - CONFIDENCE) / max(1, comparisons)
    first, second = ({row.values.get("seed", ""): row.numbers.get(column) for row in s.rows} for s in (one, other))
    pairs = [
        (value, second[seed])
        for seed, value in first.items()
        if value is not None and seed and second.get(seed) is not None
    ]
    if len(pairs) >= 2:
        paired = estimate([a - b for a, b in pairs if b is not None], confidence)
        return paired.half is not None and abs(paired.mean) > paired.half
    both = [estimate([v for v in values.values() if v is not None], confidence) for values in (first, second)]
    halves = [e.half for e in both if e.half is not None]
    return len(halves) == 2 and abs(both[0].mean - both[1].mean) > sum(halves)


def fields_of(cells: Sequence[Cell]) -> list[str]:
    """Fields that were lists, in their order, and those that differ between cells of several grids; the seed last."""
    axes = list(dict.fromkeys(field for cell in cells for field in cell.axes))
    every = dict.fromkeys(field for cell in cells for field in cell.values)
    differing = [f for f in every if f not in axes and len({cell.values.get(f) for cell in cells}) > 1]
    fields = [*axes, *sorted(differing)]
    return [*(f for f in fields if f != "seed"), *(f for f in fields if f == "seed")]


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """One row a cell, in the order of the cells' settings."""
    fields = fields_of(cells)
    rows = [_row(cell, fields) for cell in cells]
    return sorted(rows, key=lambda row: [_order(row.values[field]) for field in fields])


def _order(text: str) -> tuple[int, float, str]:
    try:
        return 1, float(text), ""
    except ValueError:
        return (0 if text in ("", "null") else 2), 0.0, text


def _row(cell: Cell, fields: Sequence[str]) -> Row:
    values = {field: _plain(cell, field) for field in fields}
    outcome = cell.outcome
    status = "cut" if outcome.status == "running" else outcome.status
    if status != "finished":
        return Row(cell=cell.name, values=values, status=status, reason=outcome.reason, numbers={})
    try:
        files = run_files.read(cell.run)
    except InvalidValue as error:
        return Row(cell=cell.name, values=values, status="failed", reason=f"unreadable: {error}", numbers={})
    numbers = {**_numbers(files.summary), "seconds": outcome.seconds}
    site, worst = _worst(files.summary.get("per_site", {}))
    return Row(cell=cell.name, values=values, status=status, reason="", numbers={**numbers, **worst}, worst_site=site)


def _plain(cell: Cell, field: str) -> str:
    if field in cell.values:
        text = cell.values[field]
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    inner: Any = cell.config
    for key in field.split("."):
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    return str(inner) if isinstance(inner, str | int | float) else ""


def _numbers(summary: Mapping[str, Any]) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {}
    for model in MODELS:
        before, after = (summary.get(model, {}).get(when, {}) for when in ("before", "after"))
        for metric in before:
            numbers[f"{model}_{metric}_before"], numbers[f"{model}_{metric}_after"] = before[metric], after.get(metric)
        numbers[f"{model}_gain"] = _gain(before, after)
    sites = summary.get("sites", {}).values()
    private = summary.get("private", False) and len(sites) > 0
    budgets = [row["epsilon_budget"] for row in sites if row.get("epsilon_budget") is not None]
    numbers["epsilon"] = max(row["epsilon"] for row in sites) if private else None
    numbers["epsilon_budget"] = max(budgets) if private and budgets else numbers["epsilon"]
    numbers["delta"] = max((row.get("delta") or 0.0 for row in sites), default=None) if private else None
    numbers["bytes_up"], numbers["rounds_lost"] = summary.get("bytes_up"), summary.get("rounds_lost")
    return numbers


def _gain(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    if "acc" in before and "acc" in after:
        return after["acc"] - before["acc"]
    return before["loss"] - after["loss"] if "loss" in before and "loss" in after else None


def _worst(sites: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tuple[str, dict[str, float | None]]:
    gains = {site: _gain(ends.get("before", {}), ends.get("after", {})) for site, ends in sites.items()}
    known = {site: gain for site, gain in gains.items() if gain is not None}
    if not known:
        return "", {}
    worst = min(known, key=lambda site: (known[site], site))
    ends = {f"worst_site_{metric}": sites[worst]["after"].get(metric) for metric in ("loss", "acc")}
    spread = {"best_site_gain": max(known.values()), "worst_site_gain": known[worst]}
    return worst, {**spread, **{metric: value for metric, value in ends.items() if value is not None}}


def settings_of(rows: Sequence[Row]) -> list[Setting]:
    """Finished rows, grouped by everything but their seed; in the order of the rows."""
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        if row.status == "finished":
            key = tuple((field, text) for field, text in row.values.items() if field != "seed")
            groups.setdefault(key, []).append(row)
    return [Setting(values=dict(key), rows=tuple(group)) for key, group in groups.items()]


def csv_text(rows: Sequence[Row]) -> str:
    """One line a cell, as RFC 4180 has it: grid fields, status, every number, reason; unknown numbers are empty."""
    fields = list(rows[0].values) if rows else []
    columns = list(dict.fromkeys(column for row in rows for column in row.numbers))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["cell", *fields, "status", *columns, "worst_site", "reason"])
    for row in rows:
        numbers = ["" if row.numbers.get(c) is None else repr(row.numbers[c]) for c in columns]
        writer.writerow([row.cell, *(row.values[f] for f in fields), row.status, *numbers, row.worst_site, row.reason])
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write `csv_text` as UTF-8."""
    path.write_text(csv_text(rows), encoding="utf-8", newline="")


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """Write the table of `csv_text` as Parquet, with types.

    A grid field is whole numbers or numbers where all its values are, and text otherwise; ``null`` and values that a
    cell does not have are nulls. Every measured number is a 64-bit float.
    """
    import pyarrow  # type: ignore[import-untyped]  # a sweep that is cut does not wait for it
    from pyarrow import parquet

    table = list(csv.DictReader(io.StringIO(csv_text(rows), newline="")))
    numbers = {column for row in rows for column in row.numbers}
    types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    columns = {}
    for name in table[0] if table else ():
        known = [None if row[name] in ("", "null") else row[name] for row in table]
        for kind in (float,) if name in numbers else (str,) if name in _TEXTS else (int, float, str):
            try:
                values = [None if text is None else kind(text) for text in known]
                columns[name] = pyarrow.array(values, types[kind])
            except (ValueError, OverflowError):
                continue
            break
    parquet.write_table(pyarrow.table(columns), path)
