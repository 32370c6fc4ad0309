"""The federation's text: every site's records, held-out records, and the public set D_a, disjoint and checked.

Reading, per ``DataConfig``: rows (``records.py``) become records (``tasks.py``), the public set is taken apart first,
whole units go to sites (``partition.py``), and a share of each site's units is held out.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedcollm_privacy._validate import at_least, public_name
from fedcollm_privacy.errors import ConfigError, DataError, InvalidValue
from secure_fedcollm import partition, tasks
from secure_fedcollm.config import DataConfig
from secure_fedcollm.records import BadRow, BadRows, PlantedSecret, Record, Row, read_rows, row_key

__all__ = ["PUBLIC_TEST_FRACTION", "FederationData", "SiteData", "load"]

logger = logging.getLogger(__name__)

PUBLIC_TEST_FRACTION = 0.1
"""Share of the public units that is kept for evaluation, unless a published test split is there."""
NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteData:
    """One site's records; no unit is in both parts."""

    name: str
    train: tuple[Record, ...]
    held_out: tuple[Record, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationData:
    """All text of a run.

    Attributes:
        sites: in a fixed order, names unique.
        public_train: D_a, on which the server co-tunes.
        public_test: public records that nothing is trained on.
        append_eos: whether targets end with EOS: free text does, choices do not (lm-evaluation-harness).
        secrets: canaries in the sites' records; only synthetic data has any.
    """

    sites: tuple[SiteData, ...]
    public_train: tuple[Record, ...]
    public_test: tuple[Record, ...]
    append_eos: bool
    secrets: tuple[PlantedSecret, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    record: Record
    label: str
    public: bool


def load(config: DataConfig, *, sites: int, seed: int, unit: Literal["record", "person"]) -> FederationData:
    """Read and divide the data of a run; the same arguments give the same division.

    With ``data.unit_field`` all records of a person go to one side of every division, whatever ``unit`` is.

    Args:
        config: what to read and how to divide it.
        sites: number of sites when records are dealt out (``data.partition=iid|dirichlet``).
        seed: of every division.
        unit: ``person`` keeps the ids of ``data.unit_field`` as units; ``record`` makes each record its own unit.

    Raises:
        ConfigError: fields that do not fit each other or the file.
        DataError: bad rows, too few units, a person at two sites, or public records that are also a site's.
    """
    at_least(0, seed=seed)
    at_least(1, sites=sites)
    if (config.task == "embedded") != (config.path is None):
        allowed = (
            "null with data.task=embedded; for text of your own give data=file data.path=..."
            if config.task == "embedded"
            else "a .jsonl or .csv file, a folder with such files, or hub:<data set id>"
        )
        raise ConfigError("data.path", config.path, allowed)
    if config.path is None:
        from secure_fedcollm.embedded import load_embedded  # here, because it imports this module's types

        data = load_embedded(seed, config.held_out_fraction)
        _check_disjoint(data.sites, (*data.public_train, *data.public_test))
    else:
        if unit == "person" and config.unit_field is None:
            raise ConfigError("data.unit_field", None, "the column that names a record's person (unit=person)")
        data = _load_rows(config, config.path, sites, seed, unit)
    return data if unit == "person" else _unit_per_record(data)


def _load_rows(config: DataConfig, path: str, sites: int, seed: int, unit: str) -> FederationData:
    published = tasks.published(config, path)
    items = _read(config, published.train if published else path, split=config.split, tag="sites")
    if config.partition == "column":
        items = _named_sites(config, items)
    elif config.site_names:
        raise ConfigError("data.site_names", config.site_names, "an empty list unless data.partition=column")
    items, public = _public(config, items, seed)
    if published:
        test = _read(config, published.test, split=published.test_split, tag="test", at_site=False)
        public_train, public_test = public, [item.record for item in test]
        _warn_of_test_overlap(items, public_train, public_test)
    else:
        groups = partition.group_records(public, same_text=True)
        rng = partition.generator(seed, "public test")
        kept, held = partition.hold_out(groups, PUBLIC_TEST_FRACTION, rng, what="the public set D_a")
        public_train, public_test = [public[i] for i in kept], [public[i] for i in held]
    divided = _sites(config, items, sites, seed, unit)
    _check_disjoint(divided, public)
    return FederationData(
        sites=tuple(divided),
        public_train=tuple(public_train),
        public_test=tuple(public_test),
        append_eos=config.task not in tasks.CHOICE_TASKS,
    )


def _read(
    config: DataConfig, path: str, *, split: str, tag: str, at_site: bool = True, name: str = "data.path"
) -> list[_Item]:
    """Records of one path; ``tag`` keeps the ids of records from different paths apart."""
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
                raise ConfigError(f"data.{name}", value, f"a column of the data: {_listed(sorted(columns))}")
    if at_site and config.partition == "dirichlet" and config.dirichlet_field is None:
        raise ConfigError("data.dirichlet_field", None, f"a column of the data: {_listed(sorted(columns))}")


def _item(config: DataConfig, parser: tasks.Parser, row: Row, tag: str, at_site: bool) -> _Item | None:
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
    return _Item(record=dataclasses.replace(record, site=site, unit=unit), label=label, public=public)


def _named_sites(config: DataConfig, items: list[_Item]) -> list[_Item]:
    present = sorted({item.record.site or "" for item in items})
    unknown = [name for name in config.site_names if name not in present]
    if unknown or len(set(config.site_names)) != len(config.site_names):
        raise ConfigError("data.site_names", config.site_names, f"names from the data, each once: {_listed(present)}")
    return [item for item in items if not config.site_names or item.record.site in config.site_names]


def _public(config: DataConfig, items: list[_Item], seed: int) -> tuple[list[_Item], list[Record]]:
    """The items left for the sites, and the public records."""
    if config.public_fraction and (config.public_path is not None or config.task == "medquad"):
        allowed = "0 with data.public_path, and with data.task=medquad, whose public half is fixed"
        raise ConfigError("data.public_fraction", config.public_fraction, allowed)
    public = items
    if config.public_path is not None:
        place = tasks.published(config, config.public_path)
        path = place.train if place else config.public_path
        public = _read(config, path, split=config.split, tag="public", at_site=False, name="data.public_path")
    if config.task == "medquad":
        # Sites get the odd half only: public checkpoints may have been trained on the even half.
        private = [item for item in items if not item.public]
        public = [item for item in public if item.public]
    elif config.public_path is not None:
        private = items
    elif config.public_fraction:
        groups = partition.group_records([item.record for item in items], same_text=True)
        rng = partition.generator(seed, "public")
        kept, held = partition.hold_out(groups, config.public_fraction, rng, what="the data set")
        private, public = [items[i] for i in kept], [items[i] for i in held]
    else:
        from secure_fedcollm.embedded import public_corpus  # here, because it imports this module's types

        logger.warning(
            "no public set was given: co-tuning uses the packaged synthetic text, which teaches the models little "
            "about your task; give data.public_path a public file in the same format"
        )
        return items, [dataclasses.replace(record, site=None) for record in public_corpus(seed)]
    return private, [dataclasses.replace(item.record, site=None) for item in public]


def _sites(config: DataConfig, items: list[_Item], sites: int, seed: int, unit: str) -> list[SiteData]:
    by_site: dict[str, list[Record]] = defaultdict(list)
    if config.partition == "column":
        for item in items:
            by_site[item.record.site or ""].append(item.record)
        _check_persons(by_site, unit)
        names = list(config.site_names or sorted(by_site))
    else:
        groups = partition.group_records([item.record for item in items])
        rng = partition.generator(seed, "sites")
        if config.partition == "iid":
            dealt = partition.deal_iid(len(groups), sites, rng)
        else:
            labels = [partition.group_label([items[i].label for i in group]) for group in groups]
            dealt = partition.deal_dirichlet(labels, sites, config.dirichlet_alpha, rng)
        names = [f"site-{number}" for number in range(1, sites + 1)]
        for name, numbers in zip(names, dealt, strict=True):
            indices = sorted(index for number in numbers for index in groups[number])
            by_site[name] = [dataclasses.replace(items[index].record, site=name) for index in indices]
    return [_site(config, name, by_site[name], seed) for name in names]


def _site(config: DataConfig, name: str, records: Sequence[Record], seed: int) -> SiteData:
    groups = partition.group_records(records)
    groups = partition.cap_records(groups, config.max_records_per_site, partition.generator(seed, f"cap {name}"))
    if len(groups) < partition.LEAST_UNITS:
        raise DataError(
            f"site {name}: {len(groups)} units (persons, or records), at least {partition.LEAST_UNITS} are needed; "
            "leave the site out by data.site_names, take fewer sites, or raise data.max_records_per_site"
        )
    rng = partition.generator(seed, f"held out {name}")
    kept, held = partition.hold_out(groups, config.held_out_fraction, rng, what=f"site {name}")
    return SiteData(name=name, train=tuple(records[i] for i in kept), held_out=tuple(records[i] for i in held))


def _check_persons(by_site: dict[str, list[Record]], unit: str) -> None:
    homes: dict[str, set[str]] = defaultdict(set)
    for site, records in by_site.items():
        for record in records:
            homes[record.unit].add(site)
    shared = sum(len(found) > 1 for found in homes.values())
    if shared and unit == "person":
        raise DataError(
            f"{shared} of {len(homes)} persons have records at more than one site, so no single site can bound "
            "what the run reveals about them; give each person one site, or take privacy.unit=record"
        )
    if shared:
        logger.warning("%d of %d persons have records at more than one site", shared, len(homes))


def _check_disjoint(sites: Sequence[SiteData], public: Sequence[Record]) -> None:
    texts = {partition.normalised(record) for record in public}
    units = {record.unit for record in public}
    private = [record for site in sites for record in (*site.train, *site.held_out)]
    same_text = sum(partition.normalised(record) in texts for record in private)
    same_unit = sum(record.unit in units for record in private)
    if same_text or same_unit:
        raise DataError(
            f"the public set D_a is not disjoint from the sites: {same_text} of {len(private)} site records have a "
            f"text that is public too, {same_unit} belong to a unit that is public too; remove them from one side"
        )


def _warn_of_test_overlap(items: list[_Item], public_train: list[Record], public_test: list[Record]) -> None:
    trained = {partition.normalised(record) for record in (*(item.record for item in items), *public_train)}
    shared = sum(partition.normalised(record) in trained for record in public_test)
    if shared:
        logger.warning(
            "%d of %d records of the published test split are in the published training split too; kept, so that "
            "scores compare with published ones",
            shared,
            len(public_test),
        )


def _unit_per_record(data: FederationData) -> FederationData:
    def own(records: tuple[Record, ...], tag: str) -> tuple[Record, ...]:
        return tuple(dataclasses.replace(r, unit=f"{tag}:{i}") for i, r in enumerate(records))

    sites = tuple(
        SiteData(
            name=site.name,
            train=own(site.train, f"{site.name}:train"),
            held_out=own(site.held_out, f"{site.name}:held_out"),
        )
        for site in data.sites
    )
    return dataclasses.replace(
        data,
        sites=sites,
        public_train=own(data.public_train, "public_train"),
        public_test=own(data.public_test, "public_test"),
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{shown}, and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else shown
