"""The federation's text: every site's records, held-out records, and the public set D_a, disjoint and checked.

Reading, per ``DataConfig``: rows (``records.py``) become records (``tasks.py``, ``items.py``), the public set is taken
apart first, whole units go to sites (``partition.py``), and a share of each site's units is held out. `load` does it
for all roles in one process tree; across machines each role reads its own, with `load_site` and `load_public`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedcollm_privacy._validate import at_least, public_name
from fedcollm_privacy.errors import ConfigError, DataError
from secure_fedcollm import partition, tasks
from secure_fedcollm.config import DataConfig
from secure_fedcollm.items import Item, listed, read_items
from secure_fedcollm.records import PlantedSecret, Record

__all__ = ["PUBLIC_TEST_FRACTION", "FederationData", "SiteData", "load", "load_public", "load_site"]

logger = logging.getLogger(__name__)

PUBLIC_TEST_FRACTION = 0.1
"""Share of the public units that is kept for evaluation, unless a published test split is there."""


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
    _require_source(config, unit)
    if config.path is None:
        from secure_fedcollm.embedded import load_embedded  # here, because it imports this module's types

        data = load_embedded(seed, config.held_out_fraction)
        _check_disjoint(data.sites, (*data.public_train, *data.public_test))
    else:
        data = _load_rows(config, config.path, sites, seed, unit)
    return data if unit == "person" else _unit_per_record(data)


def load_site(config: DataConfig, *, site: str, seed: int, unit: Literal["record", "person"]) -> SiteData:
    """One site's own records, read where they lie; divided as `load` divides them in one process tree.

    The whole file is this site's: no column names a site, and settings of partition and public set do not apply. With
    ``data.task=embedded`` it is the site's part of the generated text.

    Args:
        config: what to read, and what share to hold out.
        site: the site's public name.
        seed: of the division.
        unit: as in `load`.

    Raises:
        ConfigError: fields that do not fit each other or the file, or a name that the generated text does not know.
        DataError: bad rows, or too few units.
    """
    at_least(0, seed=seed)
    public_name(site=site)
    _require_source(config, unit)
    if config.path is None:
        from secure_fedcollm.embedded import load_embedded  # here, because it imports this module's types

        generated = {data.name: data for data in load_embedded(seed, config.held_out_fraction).sites}
        if site not in generated:
            raise ConfigError("site", site, f"with data.task=embedded one of {', '.join(generated)}")
        data = generated[site]
    else:
        alone = dataclasses.replace(config, partition="iid", site_field=None, dirichlet_field=None)
        place = tasks.published(alone, config.path)
        items = read_items(alone, place.train if place else config.path, split=config.split, tag="sites")
        records = [dataclasses.replace(item.record, site=site) for item in items if not item.public]
        data = _site(alone, site, records, seed)
    return data if unit == "person" else _own_units(data)


def load_public(config: DataConfig, *, seed: int, unit: Literal["record", "person"]) -> FederationData:
    """The public text of a server that has no site's records; divided as `load` divides it. ``sites`` is empty.

    Whether a site has the same texts cannot be seen here.

    Args:
        config: ``data.public_path``, or with ``data.task=embedded`` the packaged synthetic text.
        seed: of the division.
        unit: as in `load`.

    Raises:
        ConfigError: there is a ``data.path``, no ``data.public_path``, or fields that do not fit the file.
        DataError: bad rows, or too few units.
    """
    at_least(0, seed=seed)
    if config.path is not None:
        raise ConfigError("data.path", config.path, "null: each site reads its own records, this machine has none")
    if (config.task == "embedded") != (config.public_path is None):
        allowed = (
            "null with data.task=embedded, whose public text is packaged"
            if config.task == "embedded"
            else "the public set D_a: a .jsonl or .csv file, a folder with such files, or hub:<data set id>"
        )
        raise ConfigError("data.public_path", config.public_path, allowed)
    if config.public_path is None:
        from secure_fedcollm.embedded import public_split  # here, because it imports this module's types

        train, test = public_split(seed)
    else:
        alone = dataclasses.replace(config, partition="iid", site_field=None, dirichlet_field=None)
        place = tasks.published(alone, config.public_path)
        _, public = _public(alone, [], seed)
        trained, measured = _public_split(alone, place, public, seed)
        train, test = tuple(trained), tuple(measured)
    data = FederationData(
        sites=(),
        public_train=train,
        public_test=test,
        append_eos=config.task not in tasks.CHOICE_TASKS,
    )
    return data if unit == "person" else _unit_per_record(data)


def _require_source(config: DataConfig, unit: str) -> None:
    if (config.task == "embedded") != (config.path is None):
        allowed = (
            "null with data.task=embedded; for text of your own give data=file data.path=..."
            if config.task == "embedded"
            else "a .jsonl or .csv file, a folder with such files, or hub:<data set id>"
        )
        raise ConfigError("data.path", config.path, allowed)
    if config.path is not None and unit == "person" and config.unit_field is None:
        raise ConfigError("data.unit_field", None, "the column that names a record's person (unit=person)")


def _load_rows(config: DataConfig, path: str, sites: int, seed: int, unit: str) -> FederationData:
    published = tasks.published(config, path)
    items = read_items(config, published.train if published else path, split=config.split, tag="sites")
    if config.partition == "column":
        items = _named_sites(config, items)
    elif config.site_names:
        raise ConfigError("data.site_names", config.site_names, "an empty list unless data.partition=column")
    items, public = _public(config, items, seed)
    public_train, public_test = _public_split(config, published, public, seed)
    if published:
        _warn_of_test_overlap(items, public_train, public_test)
    divided = _sites(config, items, sites, seed, unit)
    _check_disjoint(divided, public)
    return FederationData(
        sites=tuple(divided),
        public_train=tuple(public_train),
        public_test=tuple(public_test),
        append_eos=config.task not in tasks.CHOICE_TASKS,
    )


def _named_sites(config: DataConfig, items: list[Item]) -> list[Item]:
    present = sorted({item.record.site or "" for item in items})
    unknown = [name for name in config.site_names if name not in present]
    if unknown or len(set(config.site_names)) != len(config.site_names):
        raise ConfigError("data.site_names", config.site_names, f"names from the data, each once: {listed(present)}")
    return [item for item in items if not config.site_names or item.record.site in config.site_names]


def _public(config: DataConfig, items: list[Item], seed: int) -> tuple[list[Item], list[Record]]:
    """The items left for the sites, and the public records."""
    if config.public_fraction and (config.public_path is not None or config.task == "medquad"):
        allowed = "0 with data.public_path, and with data.task=medquad, whose public half is fixed"
        raise ConfigError("data.public_fraction", config.public_fraction, allowed)
    public = items
    if config.public_path is not None:
        place = tasks.published(config, config.public_path)
        path = place.train if place else config.public_path
        public = read_items(config, path, split=config.split, tag="public", at_site=False, name="data.public_path")
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


def _public_split(
    config: DataConfig, published: tasks.Published | None, public: list[Record], seed: int
) -> tuple[list[Record], list[Record]]:
    """What is trained on, and what is measured on: the published test split, or a share of the public units."""
    if published:
        test = read_items(config, published.test, split=published.test_split, tag="test", at_site=False)
        return public, [item.record for item in test]
    groups = partition.group_records(public, same_text=True)
    rng = partition.generator(seed, "public test")
    kept, held = partition.hold_out(groups, PUBLIC_TEST_FRACTION, rng, what="the public set D_a")
    return [public[i] for i in kept], [public[i] for i in held]


def _sites(config: DataConfig, items: list[Item], sites: int, seed: int, unit: str) -> list[SiteData]:
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


def _warn_of_test_overlap(items: list[Item], public_train: list[Record], public_test: list[Record]) -> None:
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
    return dataclasses.replace(
        data,
        sites=tuple(_own_units(site) for site in data.sites),
        public_train=_numbered(data.public_train, "public_train"),
        public_test=_numbered(data.public_test, "public_test"),
    )


def _own_units(site: SiteData) -> SiteData:
    return SiteData(
        name=site.name,
        train=_numbered(site.train, f"{site.name}:train"),
        held_out=_numbered(site.held_out, f"{site.name}:held_out"),
    )


def _numbered(records: tuple[Record, ...], tag: str) -> tuple[Record, ...]:
    return tuple(dataclasses.replace(r, unit=f"{tag}:{i}") for i, r in enumerate(records))
