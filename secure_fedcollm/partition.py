"""Who gets which records: whole units (persons) to sites, and to training or held-out.

A group is a list of record indices that stay together. Everything is a function of its inputs and of the generator.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedcollm_privacy.errors import ConfigError, DataError
from secure_fedcollm.records import Record

__all__ = [
    "LEAST_UNITS",
    "Group",
    "cap_records",
    "deal_dirichlet",
    "deal_iid",
    "generator",
    "group_label",
    "group_records",
    "hold_out",
    "normalised",
]

Group = list[int]
LEAST_UNITS = 4
"""A site with fewer units cannot hold any out and still train."""


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A generator for one purpose, so that drawing more for one site changes no other site."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def normalised(record: Record) -> tuple[str, str]:
    """Prompt and target without regard to white space and case, for the search for equal texts."""
    return " ".join(record.prompt.split()).casefold(), " ".join(record.target.split()).casefold()


def group_records(records: Sequence[Record], *, same_text: bool = False) -> list[Group]:
    """Group record indices by unit, in order of first appearance.

    Args:
        records: any records.
        same_text: also put units together that share a record's text (as ``normalised``), so that dealing the
            groups cannot put one text on both sides.
    """
    parent: dict[object, object] = {}

    def root(key: object) -> object:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    if same_text:
        for record in records:
            parent[root(normalised(record))] = root(record.unit)
    groups: dict[object, Group] = {}
    for index, record in enumerate(records):
        groups.setdefault(root(record.unit), []).append(index)
    return list(groups.values())


def deal_iid(count: int, sites: int, rng: np.random.Generator) -> list[list[int]]:
    """Deal ``count`` groups to ``sites`` at random, sizes differing by at most one group.

    Returns:
        For every site the indices of its groups.
    """
    order = rng.permutation(count)
    return [order[site::sites].tolist() for site in range(sites)]


def deal_dirichlet(labels: Sequence[str], sites: int, alpha: float, rng: np.random.Generator) -> list[list[int]]:
    """Deal groups with skewed labels: for each label, proportions over the sites are drawn from Dirichlet(alpha).

    The label-skew partition of Hsu et al. 2019 and Li et al. 2022 (NIID-Bench), without their redrawing until every
    site is large enough: redrawing would change the distribution that alpha names.

    Args:
        labels: one per group.
        sites: number of sites.
        alpha: concentration; small is skewed, large is even.
        rng: draws the proportions and the order in each label.

    Raises:
        ConfigError: a site got fewer than ``LEAST_UNITS`` groups.
    """
    dealt: list[list[int]] = [[] for _ in range(sites)]
    by_label: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for index, label in enumerate(labels):
        by_label[label].append(index)
    for indices in by_label.values():
        members = rng.permutation(indices)
        shares = rng.dirichlet(np.full(sites, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for site, part in enumerate(np.split(members, cuts)):
            dealt[site].extend(part.tolist())
    fewest = min(map(len, dealt))
    if fewest < LEAST_UNITS:
        raise ConfigError(
            "data.dirichlet_alpha",
            alpha,
            f"a larger value (or fewer sites, or another seed): one of {sites} sites got {fewest} units, "
            f"each needs at least {LEAST_UNITS}",
        )
    return dealt


def group_label(labels: Sequence[str]) -> str:
    """The most frequent of a unit's labels; of equally frequent ones the first in the alphabet."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def cap_records(groups: Sequence[Group], most: int | None, rng: np.random.Generator) -> list[Group]:
    """A random choice of whole groups with at most ``most`` records together; None keeps all."""
    if most is None or sum(map(len, groups)) <= most:
        return list(groups)
    kept, total = [], 0
    for index in rng.permutation(len(groups)):
        if total + len(groups[index]) <= most:
            kept.append(int(index))
            total += len(groups[index])
    return [groups[index] for index in sorted(kept)]


def hold_out(
    groups: Sequence[Group], fraction: float, rng: np.random.Generator, *, what: str
) -> tuple[list[int], list[int]]:
    """Cut off a random share of the groups, at least one, and leave at least one.

    Args:
        groups: record indices that stay together.
        fraction: share of the groups to hold out, rounded.
        rng: chooses them.
        what: names the records in the error.

    Returns:
        (kept, held out) record indices, each ascending.

    Raises:
        DataError: fewer than two groups.
    """
    if len(groups) < 2:
        raise DataError(f"{what}: {len(groups)} unit, too few to hold one out; at least 2 are needed")
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    chosen = set(rng.permutation(len(groups))[:count].tolist())
    kept = sorted(index for number, group in enumerate(groups) if number not in chosen for index in group)
    held = sorted(index for number in chosen for index in groups[number])
    return kept, held
