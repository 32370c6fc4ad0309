"""The types that travel or are kept. All frozen; arrays are made read-only.

Each stage of a round takes the previous stage's type and gives its own, so that sealing an unprivatised vector or
opening a single update is a type error. None of them holds a record count, a loss or anything else computed from
records without noise.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue

__all__ = [
    "AdapterSpec",
    "NoisySum",
    "OpenedSum",
    "PrivateUpdate",
    "QuantizedUpdate",
    "Receipt",
    "RoundPlan",
    "SealedSum",
    "SealedUpdate",
    "Settlement",
    "TrainRequest",
    "canonical_json",
    "digest_of",
]

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces; NaN and infinity are refused, so equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _frozen(array: NDArray[Any], dtype: type[np.generic], field: str) -> NDArray[Any]:
    if array.dtype != dtype or array.ndim != 1:
        raise InvalidValue(field, f"{array.dtype}{list(array.shape)}", f"a vector of {np.dtype(dtype).name}")
    view = array.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """Which adapter tensors travel, in which order and shape, over which base model.

    Attributes:
        names: tensor names, in the order in which they are flattened.
        shapes: their shapes.
        base_model: digest of the base model's architecture and vocabulary.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    base_model: str

    @property
    def dimension(self) -> int:
        """Number of parameters d."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes and base model."""
        return digest_of(asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """What everybody in a round agrees on; its digest is bound into every later message of the round.

    Attributes:
        run_id: the run's name.
        server_round: 1, 2, ...
        attempt: 1 for the first try of this round, higher after a crash.
        spec_digest: of the `AdapterSpec` of what travels.
        dimension: d.
        clip: each update coordinate lies in [-clip, clip].
        value_bits: signed bits per coordinate on the grid.
        min_contributors: k; no sum of fewer is opened.
        max_contributors: n; the grid's sum is proven not to overflow for so many.
        key_digest: SHA-256 of the round's public encryption key.
        nonce: fresh random hex, so that no two rounds share a digest.
        release: ``update``, or ``gradient``: each site sends the noisy gradient of one step.
        noise_multiplier: with ``gradient``, sigma of every site's plan; 0 otherwise.
        least_honest: with ``gradient``, the h of every site's plan; 1 otherwise.
    """

    run_id: str
    server_round: int
    attempt: int
    spec_digest: str
    dimension: int
    clip: float
    value_bits: int
    min_contributors: int
    max_contributors: int
    key_digest: str
    nonce: str
    release: str = "update"
    noise_multiplier: float = 0.0
    least_honest: int = 1

    def __post_init__(self) -> None:
        _validate.public_name(run_id=self.run_id)
        _validate.one_of(("update", "gradient"), release=self.release)
        _validate.at_least(0, noise_multiplier=self.noise_multiplier)
        _validate.at_least(1, least_honest=self.least_honest)
        _validate.at_least(1, server_round=self.server_round, attempt=self.attempt, dimension=self.dimension)
        _validate.positive(clip=self.clip)
        _validate.in_range(4, 18, value_bits=self.value_bits)
        _validate.at_least(3, min_contributors=self.min_contributors)
        _validate.at_least(self.min_contributors, max_contributors=self.max_contributors)
        if self.least_honest > self.min_contributors:
            allowed = f"at most min_contributors = {self.min_contributors}: no sum is sure to hold more sites' noise"
            raise InvalidValue("least_honest", self.least_honest, allowed)

    @property
    def digest(self) -> str:
        """SHA-256 over all fields."""
        return digest_of(asdict(self))

    @property
    def levels(self) -> int:
        """Largest grid value: coordinates are integers in [-levels, levels]."""
        return int(2 ** (self.value_bits - 1) - 1)

    @property
    def grid_step(self) -> float:
        """Update units per grid step."""
        return self.clip / self.levels


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """Server to site: the plan, the current SLM adapter float32 [D], and the round's public key."""

    plan: RoundPlan
    adapter: Float32
    public_key: bytes

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapter", _frozen(self.adapter, np.float32, "adapter"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateUpdate:
    """A site's differentially private update, float32 [d]; never leaves the site.

    Attributes:
        reservation: digest of the ledger entry that paid for it; ``"non-private"`` where nothing was paid.
    """

    vector: Float32
    spec_digest: str
    reservation: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", _frozen(self.vector, np.float32, "vector"))


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisySum:
    """Clipped gradients of one step, summed, with the site's noise: ``grid * grid_step``, int64 [d]; stays at the site.

    With distributed noise it is private only as part of a sum.
    """

    grid: Int64
    grid_step: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _frozen(self.grid, np.int64, "grid"))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedUpdate:
    """The update on the round's integer grid, int64 [d]; never leaves the site."""

    plan: RoundPlan
    grid: Int64

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _frozen(self.grid, np.int64, "grid"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedUpdate:
    """Site to aggregator: the encrypted grid, one ciphertext a chunk."""

    plan_digest: str
    site: str
    chunks: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedSum:
    """Aggregator to decryptor: the encrypted sum and whose updates are in it."""

    plan_digest: str
    cohort: tuple[str, ...]
    chunks: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSum:
    """Decryptor to server: the exact integer sum, int64 [d]. Nothing else ever leaves the decryptor."""

    plan: RoundPlan
    cohort: tuple[str, ...]
    total: Int64

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", _frozen(self.total, np.int64, "total"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Server to site: how the round ended for this site's update.

    Attributes:
        outcome: ``included``, ``left_out`` or ``lost``.
    """

    plan_digest: str
    server_round: int
    outcome: str

    def __post_init__(self) -> None:
        _validate.one_of(("included", "left_out", "lost"), outcome=self.outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """Site to server: what the site has spent in this run so far, as its own ledger says.

    Attributes:
        epsilon: upper bound for the steps reserved so far; -1 in a non-private run.
        charged: what the ledger has charged to the data set for this run: the whole committed plan, or more.
        unit: ``record`` or ``person``; ``"none"`` in a non-private run.
        steps: DP-SGD steps reserved in this run, those of broken attempts included.
        clipped_fraction: share of the last update's coordinates that saturated on the grid, in [0, 1].
        ledger_head: digest of the ledger's last entry.
    """

    site: str
    private: bool
    epsilon: float
    charged: float
    delta: float
    unit: str
    steps: int
    clipped_fraction: float
    ledger_head: str
