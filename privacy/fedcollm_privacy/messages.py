"""The types that travel or are kept. All frozen; arrays are made read-only.

Each stage of a round takes the previous stage's type and gives its own, so that sealing an unprivatised vector or
opening a single update is a type error. None of them holds a record count, a loss or anything else computed from
records without noise.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import rfc8785
from numpy.typing import NDArray

from fedcollm_privacy import _validate
from fedcollm_privacy.ckks_parameters import CkksParameters
from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.reservation import Ran

__all__ = [
    "AdapterSpec",
    "DpTerms",
    "NoisySum",
    "OpenedSum",
    "PrivateUpdate",
    "QuantizedUpdate",
    "Receipt",
    "RoundPlan",
    "SealedSum",
    "Settlement",
    "TrainRequest",
    "canonical_json",
    "digest_of",
    "parse_json",
    "vector_digest",
]

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def canonical_json(value: Any) -> bytes:
    """JSON in the one spelling of RFC 8785; ValueError for NaN, infinity, and integers beyond 2^53 - 1."""
    return rfc8785.dumps(value)


def parse_json(data: bytes) -> Any:
    """What `canonical_json` wrote: whole numbers beyond 2^53 - 1 are floats, since no other kind has that spelling.

    Raises:
        ValueError: no JSON, or not UTF-8.
        RecursionError: a nest without end.
    """
    return json.loads(data, parse_int=_whole)


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= 16 and abs(int(digits)) < 2**53 else float(digits)


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def vector_digest(vector: Float32) -> str:
    """SHA-256 of a float32 vector's little-endian bytes, as 64 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").data).hexdigest()


def _check_ranks(plan: RoundPlan) -> None:
    _validate.public_name(**{f"narrow_sites[{i}]": name for i, name in enumerate(plan.narrow_sites)})
    _validate.in_range(1, 2**53 - 1, **{f"narrow_ranks[{i}]": rank for i, rank in enumerate(plan.narrow_ranks)})
    names = list(plan.narrow_sites)
    if names != sorted(set(names)) or len(names) != len(plan.narrow_ranks):
        raise InvalidValue("narrow_sites", f"{len(names)} names", "each once, in order, with one rank each")
    if names and plan.release != "update":
        raise InvalidValue("narrow_sites", f"{len(names)} names", "none where sites release gradients")


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
class DpTerms:
    """What of a site's privacy plan a round fixes for all sites; noise and sampling rate stay each site's own.

    Attributes are those of `fedcollm_privacy.plan.DpPlan`.
    """

    unit: str
    max_records_per_unit: int
    max_grad_norm: float
    expected_batch_size: int
    steps_per_round: int
    clipping: str
    noise: str

    def __post_init__(self) -> None:
        _validate.one_of(("record", "person"), unit=self.unit)
        _validate.one_of(("flat", "automatic"), clipping=self.clipping)
        _validate.one_of(("local", "distributed"), noise=self.noise)
        _validate.positive(max_grad_norm=self.max_grad_norm)
        counts = ("max_records_per_unit", "expected_batch_size", "steps_per_round")
        _validate.integer_at_least(1, **{name: getattr(self, name) for name in counts})


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """What everybody in a round agrees on; its digest is bound into every later message, key and signature.

    Attributes:
        run_id: the run's name.
        server_round: 1, 2, ...
        attempt: 1 for the first try of this round, higher after a crash.
        spec_digest: of the `AdapterSpec` of what travels.
        adapter_digest: `vector_digest` of the broadcast adapter: all sites train from the same point, so that no server
            can tell one site's update from the others' by what they started from (Pasquini et al. 2022).
        dimension: d.
        clip: each update coordinate lies in [-clip, clip].
        value_bits: signed bits per coordinate on the grid.
        min_contributors: k; no sum of fewer is opened.
        max_contributors: n; the grid's sum is proven not to overflow for so many.
        threshold: t; so many sites' shares take a mask away, and so many must have signed the same set.
        max_colluding: c; the protocol holds while at most so many sites work with the server: 2t > n + c, k >= c + 2.
        roster_digest: of the `fedcollm_privacy.roster.Roster` that names the sites and their keys.
        ckks: the encryption's parameters.
        key_digest: SHA-256 of the round's public encryption key.
        max_mean_norm: a mean update with a larger L2 norm (update units) loses the round after opening.
        nonce: fresh random hex, so that no two rounds share a digest.
        expires_at: Unix time in seconds; no site answers later.
        dp: what of the privacy plan is the same at all sites; None in a declared non-private run.
        release: ``update``, or ``gradient``: each site sends the noisy gradient of one step.
        noise_multiplier: with ``gradient``, sigma of every site's plan; 0 otherwise.
        least_honest: with ``gradient``, the h of every site's plan; 1 otherwise.
        narrow_sites: sites whose adapter has a lower rank than the plan's, in order (`fedcollm_privacy.ranks`).
        narrow_ranks: their ranks.
    """

    run_id: str
    server_round: int
    attempt: int
    spec_digest: str
    adapter_digest: str
    dimension: int
    clip: float
    value_bits: int
    min_contributors: int
    max_contributors: int
    threshold: int
    max_colluding: int
    roster_digest: str
    ckks: CkksParameters
    key_digest: str
    max_mean_norm: float
    nonce: str
    expires_at: int
    dp: DpTerms | None
    release: str = "update"
    noise_multiplier: float = 0.0
    least_honest: int = 1
    narrow_sites: tuple[str, ...] = ()
    narrow_ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _validate.public_name(run_id=self.run_id)
        _validate.one_of(("update", "gradient"), release=self.release)
        _check_ranks(self)
        _validate.at_least(0, noise_multiplier=self.noise_multiplier, max_mean_norm=self.max_mean_norm)
        counts = ("least_honest", "server_round", "attempt", "dimension", "expires_at")
        _validate.integer_at_least(1, **{name: getattr(self, name) for name in counts})
        _validate.in_range(1, 2**53 - 1, **{name: getattr(self, name) for name in counts})
        _validate.positive(clip=self.clip)
        _validate.in_range(4, 18, value_bits=self.value_bits)
        _validate.integer_at_least(0, max_colluding=self.max_colluding)
        _validate.integer_at_least(max(3, self.max_colluding + 2), min_contributors=self.min_contributors)
        _validate.integer_at_least(self.min_contributors, max_contributors=self.max_contributors)
        n, c = self.max_contributors, self.max_colluding
        _validate.integer_at_least(2, threshold=self.threshold)
        if not (n + c < 2 * self.threshold and self.threshold <= n):
            allowed = f"an integer t with 2t > n + c = {n + c} and t <= n = {n}, or two sets could both be agreed on"
            raise InvalidValue("threshold", self.threshold, allowed)
        honest = self.min_contributors - c
        if self.least_honest > honest:
            allowed = f"at most min_contributors - max_colluding = {honest}: no sum is sure to hold more sites' noise"
            raise InvalidValue("least_honest", self.least_honest, allowed)
        for name in ("spec_digest", "adapter_digest", "roster_digest", "key_digest"):
            _validate.hex_digest(**{name: getattr(self, name)})

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
    """Server to site: train from this SLM adapter, float32 [D], and upload under the plan that the site has accepted.

    Attributes:
        public_key: the round's encryption key.
    """

    plan_digest: str
    adapter: Float32
    public_key: bytes

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapter", _frozen(self.adapter, np.float32, "adapter"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateUpdate:
    """A site's differentially private update, float32 [d]; never leaves the site.

    Attributes:
        reservation: digest of the ledger entry that paid for it; ``"non-private"`` where nothing was paid.
        ran: what the private steps say of themselves; None where none were taken.
    """

    vector: Float32 = field(repr=False)
    spec_digest: str
    reservation: str
    ran: Ran | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", _frozen(self.vector, np.float32, "vector"))


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisySum:
    """Clipped gradients of one step, summed, with the site's noise: ``grid * grid_step``, int64 [d]; stays at the site.

    With distributed noise it is private only as part of a sum.

    Attributes:
        ran: what the step says of itself.
    """

    grid: Int64 = field(repr=False)
    grid_step: float
    ran: Ran | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _frozen(self.grid, np.int64, "grid"))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedUpdate:
    """The update on the round's integer grid, int32 [d]; never leaves the site."""

    plan: RoundPlan
    grid: NDArray[np.int32] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _frozen(self.grid, np.int32, "grid"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedSum:
    """The encrypted sum of the survivors' uploads, its masks taken away: what the decryptor opens.

    Attributes:
        plan_digest: of the round's plan.
        cohort: whose updates are in it.
        agreements: the signed `Agreement` messages of the sites that agreed on this cohort.
        survivors: the `SurvivorSet` message that they signed.
        chunks: ciphertexts, uint64 [2, N] each, made as they are asked for.
    """

    plan_digest: str
    cohort: tuple[str, ...]
    survivors: bytes
    agreements: tuple[bytes, ...]
    chunks: Iterator[NDArray[np.uint64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSum:
    """Decryptor to server: the exact integer sum, int64 [d]. Nothing else ever leaves the decryptor."""

    plan: RoundPlan
    cohort: tuple[str, ...]
    total: Int64

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", _frozen(self.total, np.int64, "total"))

    @property
    def total_digest(self) -> str:
        """SHA-256 of the sum's little-endian bytes."""
        return hashlib.sha256(np.ascontiguousarray(self.total, dtype="<i8").data).hexdigest()


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
    """

    site: str
    private: bool
    epsilon: float
    charged: float
    delta: float
    unit: str
    steps: int
    clipped_fraction: float

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)
        _validate.one_of(("record", "person", "none"), unit=self.unit)
        _validate.integer_at_least(0, steps=self.steps)
        _validate.in_range(0, 2**53 - 1, steps=self.steps)
        _validate.in_range(-1, 1e9, epsilon=self.epsilon, charged=self.charged)
        _validate.in_range(0, 1, delta=self.delta, clipped_fraction=self.clipped_fraction)
