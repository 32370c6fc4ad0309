"""Adapters of a lower rank inside the run's: what a site with less memory trains, and its place in the sum.

Re-basing leaves a module's components in the order of their weight, so the first s of r are the best approximation of
rank s (Eckart and Young 1936); in a module with fewer outputs than r they are in no order, and any s are as good. A
site of rank s gets the first, trains them, and its update is filled up with zeros; the mean of every component is over
the sites that have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.errors import ConfigError, ModelError
from fedcollm_privacy.messages import AdapterSpec
from secure_fedcollm.config import Config

__all__ = ["narrowed", "rank_in", "reach", "require_ranks", "widened", "with_rank"]

Float32 = NDArray[np.float32]


def rank_in(spec: AdapterSpec) -> int:
    """The rank of an adapter's tensors, A [r, in] and B [out, r].

    Raises:
        ModelError: they have several.
    """
    ranks = {shape[0 if "lora_A" in name else 1] for name, shape in zip(spec.names, spec.shapes, strict=True)}
    if len(ranks) != 1:
        raise ModelError(f"the adapter's tensors have the ranks {sorted(ranks)}; one is needed")
    return ranks.pop()


def with_rank(spec: AdapterSpec, r: int) -> AdapterSpec:
    """The same tensors with another rank."""
    shapes = (
        (r, shape[1]) if "lora_A" in name else (shape[0], r)
        for name, shape in zip(spec.names, spec.shapes, strict=True)
    )
    return replace(spec, shapes=tuple(shapes))


def narrowed(vector: Float32, spec: AdapterSpec, r: int) -> Float32:
    """The first ``r`` components of every tensor of ``spec``, float32; ``vector`` itself where it has no more."""
    if rank_in(spec) == r:
        return vector
    pieces = (
        tensor[:r] if "lora_A" in name else tensor[:, :r]
        for name, tensor in zip(spec.names, _tensors(vector, spec), strict=True)
    )
    return np.concatenate([piece.reshape(-1) for piece in pieces])


def widened(vector: Float32, spec: AdapterSpec, r: int) -> Float32:
    """A vector of the tensors of ``spec`` as one of rank ``r``, zeros behind: `narrowed` undone, but for those."""
    own = rank_in(spec)
    if own == r:
        return vector
    pieces = (
        np.pad(tensor, ((0, r - own), (0, 0)) if "lora_A" in name else ((0, 0), (0, r - own)))
        for name, tensor in zip(spec.names, _tensors(vector, spec), strict=True)
    )
    return np.concatenate([piece.reshape(-1) for piece in pieces])


def reach(spec: AdapterSpec, ranks: Sequence[int]) -> NDArray[np.int64]:
    """For every coordinate of ``spec`` how many of sites with these ranks fill it, int64 [d]."""
    have_r = np.array([sum(component < rank for rank in ranks) for component in range(rank_in(spec))], dtype=np.int64)
    pieces = (
        np.broadcast_to(have_r[:, None] if "lora_A" in name else have_r[None, :], shape)
        for name, shape in zip(spec.names, spec.shapes, strict=True)
    )
    return np.concatenate([piece.reshape(-1) for piece in pieces])


def require_ranks(config: Config, sites: Sequence[str]) -> None:
    """Return if the sites of lower rank are sites, and enough sites share every component of the adapter.

    Raises:
        ConfigError: they are not.
    """
    adapter, least = config.adapter, config.federation.min_contributors
    for site in adapter.site_ranks or {}:
        if site not in sites:
            raise ConfigError("adapter.site_ranks", site, f"names of sites: {', '.join(sites)}")
    ranks = [adapter.rank_of(site) for site in sites]
    highest = ranks.count(max(ranks))
    if adapter.site_ranks and highest < least:
        raise ConfigError(
            "adapter.site_ranks",
            dict(adapter.site_ranks),
            f"at least federation.min_contributors = {least} sites with the highest rank, here {highest}: the last "
            "components of the sum would be the updates of so few",
        )


def _tensors(vector: Float32, spec: AdapterSpec) -> list[Float32]:
    sizes = [int(np.prod(shape)) for shape in spec.shapes]
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, spec.shapes, strict=True)]
