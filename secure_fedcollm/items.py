"""From a file or hub data set to records, each with what a division of them needs to know."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from fedcollm_privacy._validate import public_name
from fedcollm_privacy.errors import ConfigError, DataError, InvalidValue
from secure_fedcollm import tasks
from secure_fedcollm.config import DataConfig
from secure_fedcollm.records import BadRow, BadRows, Record, Row, read_rows, row_key

__all__ = ["Item", "listed", "read_items"]

logger = logging.getLogger(__name__)

NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A record, and what decides where it goes.

    Attributes:
        label: its value in ``data.dirichlet_field``; empty without one.
        public: whether its task's publishers, or ours, count it to the public half.
    """

    record: Record
    label: str
    public: bool


def read_items(
    config: DataConfig, path: str, *, split: str, tag: str, at_site: bool = True, name: str = "data.path"
) -> list[Item]:
    """Records of one path, in the order of its rows.

    Args:
        config: task, columns and partition.
        path: a file, a folder, or ``hub:<data set id>``.
        split: of a hub data set.
        tag: keeps the ids of records from different paths apart.
        at_site: whether the rows carry what names a site, a person or a label.
        name: of the setting that gave the path, for errors.

    Raises:
        ConfigError: a column that is not there.
        DataError: bad rows, or none.
    """
    parser = tasks.parser(config)
    bad = BadRows()
    rows = read_rows(path, split=split, bad=bad, name=name)
    _check_columns(config, parser, rows, at_site)
    items, left_out = [], 0
    for row in rows:
        try:
            item = _item(config, parser, row, tag, at_site)
        except BadRow as reason:
            bad.add(row.file, row.line, str(reason))
        else:
            left_out += item is None
            if item is not None:
                items.append(item)
    bad.raise_if_any(len(items) + left_out)
    if left_out:
        logger.warning("%d of %d rows left out: published without an answer", left_out, len(rows))
    if not items:
        raise DataError(f"data set for {tag}: no rows")
    return items


def _check_columns(config: DataConfig, parser: tasks.Parser, rows: Sequence[Row], at_site: bool) -> None:
    columns = set().union(*(row.values for row in rows))
    wanted = dict(parser.fields)
    if at_site:
        own = {"unit_field": config.unit_field}
        if config.partition == "column":
            own["site_field"] = config.site_field
        if config.partition == "dirichlet":
            own["dirichlet_field"] = config.dirichlet_field
        wanted |= {name: (value,) for name, value in own.items() if value is not None}
    for name, values in wanted.items():
        for value in values:
            if rows and value not in columns:
                raise ConfigError(f"data.{name}", value, f"a column of the data: {listed(sorted(columns))}")
    if at_site and config.partition == "dirichlet" and config.dirichlet_field is None:
        raise ConfigError("data.dirichlet_field", None, f"a column of the data: {listed(sorted(columns))}")


def _item(config: DataConfig, parser: tasks.Parser, row: Row, tag: str, at_site: bool) -> Item | None:
    record = parser.record(row.values)
    if record is None:
        return None
    site, label, unit = None, "", f"{tag}:{row.file}:{row.line}"
    if at_site and config.partition == "column" and config.site_field is not None:
        site = row_key(row.values, config.site_field)
        try:
            public_name(site=site)
        except InvalidValue:
            raise BadRow(
                f"field {config.site_field!r} is no site name (1-64 of A-Z a-z 0-9 _ - ., first a letter or digit)"
            ) from None
    if at_site and config.partition == "dirichlet" and config.dirichlet_field is not None:
        label = row_key(row.values, config.dirichlet_field)
    if config.unit_field is not None and (at_site or config.unit_field in row.values):
        unit = row_key(row.values, config.unit_field)
    public = config.task == "medquad" and tasks.medquad_public(row.values)
    return Item(record=dataclasses.replace(record, site=site, unit=unit), label=label, public=public)


def listed(names: Sequence[str]) -> str:
    """The names, or the first of many."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{shown}, and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else shown
