"""Records, and the rows of JSONL, CSV and hub data sets they are made from.

Rows are private: no message of this module holds a value of a row, only file, line number, field name and reason.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedcollm_privacy.errors import ConfigError, DataError

__all__ = ["BadRow", "BadRows", "PlantedSecret", "Record", "Row", "read_rows", "row_key", "row_text"]

HUB = "hub:"
SUFFIXES = (".jsonl", ".csv")
SHOWN = 10
# Left by surrogateescape where bytes are not UTF-8, or written as an escape in JSON; no tokenizer can encode them.
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One text to learn.

    Attributes:
        prompt: what comes before; may be empty.
        target: the text to learn, with its leading space where the task has one.
        site: name of the site that holds the record; None for public records.
        unit: person id, or an id unique to the record.
        choices: of a choice task, every choice as a target text, leading space included.
        answer: index of the right choice; ``target == choices[answer]``.
    """

    prompt: str
    target: str
    site: str | None
    unit: str
    choices: tuple[str, ...] = ()
    answer: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedSecret:
    """A canary: only synthetic data holds one.

    Attributes:
        site: the site whose records contain it.
        prompt: the text before the secret.
        secret: the planted continuation; one of ``candidates``.
        candidates: every continuation that was as likely to be planted.
        repetitions: how many of the site's records contain it.
    """

    site: str
    prompt: str
    secret: str
    candidates: tuple[str, ...]
    repetitions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row as read: ``file`` is a name without its folder, ``line`` counts from 1."""

    file: str
    line: int
    values: Mapping[str, object]


class BadRow(Exception):
    """A row cannot be used; the text is the reason and holds nothing of the row's content."""


@dataclass(slots=True)
class BadRows:
    """Collects bad rows, so that one error can report them all."""

    total: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, file: str, line: int, reason: str) -> None:
        """Count one bad row; the first ten are named."""
        self.total += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"{file}:{line}: {reason}")

    def raise_if_any(self, good: int) -> None:
        """Refuse the whole data set if any row was bad.

        Raises:
            DataError: the count, and file, line and reason of the first ten; never a row's content.
        """
        if self.total:
            more = f"\n  and {self.total - len(self.shown)} more" if self.total > len(self.shown) else ""
            lines = "\n  ".join(self.shown)
            raise DataError(
                f"{self.total} of {self.total + good} rows cannot be used; nothing was loaded:\n  {lines}{more}\n"
                "Correct or remove these rows and run again."
            )


def row_text(values: Mapping[str, object], name: str) -> str:
    """The text in one field of a row; may be empty.

    Raises:
        BadRow: the field is missing, no string, or no valid Unicode.
    """
    if name not in values:
        raise BadRow(f"field {name!r} is missing")
    value = values[name]
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is not text")
    if SURROGATE.search(value):
        raise BadRow(f"field {name!r} is not valid UTF-8")
    return value


def row_key(values: Mapping[str, object], name: str) -> str:
    """The identifier in one field of a row: text without blanks around it, or an integer.

    Raises:
        BadRow: the field is missing, blank, or neither text nor an integer.
    """
    value = values.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    key = row_text(values, name).strip()
    if not key:
        raise BadRow(f"field {name!r} is empty")
    return key


def read_rows(path: str, *, split: str, bad: BadRows, name: str = "data.path") -> list[Row]:
    """Read every row of a JSONL or CSV file, of a folder of those, or of a hub data set.

    Blank lines of a JSONL file are no rows. A folder is read in the order of its file names, not its subfolders.

    Args:
        path: a file or folder, or ``hub:<id>`` or ``hub:<id>:<configuration>``.
        split: which split of a hub data set; files have none.
        bad: takes the rows that are broken (JSON, CSV quoting, UTF-8, field count).
        name: the configuration field that gave ``path``, for errors.

    Raises:
        ConfigError: nothing readable is there.
        DataError: the hub data set cannot be loaded, or a CSV header is unusable.
    """
    if path.startswith(HUB):
        return list(_hub_rows(path.removeprefix(HUB), split))
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    else:
        files = [place] if place.is_file() and place.suffix.lower() in SUFFIXES else []
    if not files:
        raise ConfigError(name, path, "an existing .jsonl or .csv file, a folder with such files, or hub:<data set id>")
    rows: list[Row] = []
    for file in files:
        rows.extend(_jsonl_rows(file, bad) if file.suffix.lower() == ".jsonl" else _csv_rows(file, bad))
    return rows


def _jsonl_rows(file: Path, bad: BadRows) -> Iterator[Row]:
    # Bytes, not text: str.splitlines would also cut at U+2028 and friends, which JSON strings may hold.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                values = json.loads(text) if text else None
            except UnicodeDecodeError:
                bad.add(file.name, number, "not valid UTF-8")
            except json.JSONDecodeError as error:
                bad.add(file.name, number, f"broken JSON at column {error.colno}")
            except RecursionError:
                bad.add(file.name, number, "JSON is nested too deeply")
            except ValueError:
                bad.add(file.name, number, "JSON holds a number with too many digits")
            else:
                if isinstance(values, dict):
                    yield Row(file=file.name, line=number, values=values)
                elif text:
                    bad.add(file.name, number, "not a JSON object")


def _csv_rows(file: Path, bad: BadRows) -> list[Row]:
    rows: list[Row] = []
    # The default limit of 131,072 characters per field is below a long clinical document.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            # strict, because otherwise one unclosed quote swallows the rest of the file without a word.
            reader = csv.reader(lines, strict=True)
            header = _csv_header(reader, file.name)
            while True:
                number = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    break
                except csv.Error:
                    bad.add(file.name, number, "broken CSV quoting")
                    continue
                if not cells:
                    continue
                if len(cells) != len(header):
                    bad.add(file.name, number, f"{len(cells)} fields where the header has {len(header)}")
                elif any(SURROGATE.search(cell) for cell in cells):
                    bad.add(file.name, number, "not valid UTF-8")
                else:
                    rows.append(Row(file=file.name, line=number, values=dict(zip(header, cells, strict=True))))
    finally:
        csv.field_size_limit(limit)
    return rows


def _csv_header(reader: Iterator[list[str]], name: str) -> Sequence[str]:
    try:
        header = next(reader, [])
    except csv.Error:
        header = []
    if not header or len(set(header)) != len(header) or any(SURROGATE.search(cell) for cell in header):
        raise DataError(f"{name}:1: the first line must name the columns, each once, in UTF-8")
    return header


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    dataset_id, _, configuration = name.partition(":")
    import datasets  # here, because importing it takes seconds that file data need not pay

    try:
        table = datasets.load_dataset(dataset_id, configuration or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"hub data set {name!r}, split {split!r}, cannot be loaded ({type(error).__name__}); check the id, "
            "data.split and the network, or download it and give the path of a .jsonl or .csv file"
        ) from error
    for number, values in enumerate(table, start=1):
        yield Row(file=f"{HUB}{name}[{split}]", line=number, values=values)
