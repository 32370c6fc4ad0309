"""The clipped sum: gradients per unit, each at most C long, added as integers on a lattice.

A sum of so clipped gradients moves by at most C when one unit comes or goes; that is all that the noise has to cover.
Rounding is part of each unit's own clipping, so the bound holds for what is summed and not only for real numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedcollm_privacy.errors import PrivacyViolation
from fedcollm_privacy.per_sample import clear_gradients, per_sample_gradients, trainable
from fedcollm_privacy.plan import DpPlan

__all__ = ["ClippedSum", "PhysicalBatches", "RecordLoss", "clipped_sum"]

# Losses of the given records, shape [len(records)], each computed from its own record alone.
RecordLoss = Callable[[Sequence[int]], torch.Tensor]
# From the sampled units to the split of their positions into batches that fit memory.
PhysicalBatches = Callable[[Sequence[Sequence[int]]], Sequence[Sequence[int]]]

_LATTICE_BITS = 20
"""Between steps the lattice is C / 2^20; only where gradients leave the site do all sites share a coarser one."""

_AUTOMATIC_GAMMA = 0.01
"""Bu et al. 2023: the gradient is divided by its norm plus this times C."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedSum:
    """Clipped gradients of the sampled units, summed: ``grid * grid_step``, int64 [d]. Without noise; see `noisy_sum`.

    Attributes:
        clipped: how many units' gradients were longer than C.
    """

    grid: NDArray[np.int64]
    grid_step: float
    clipped: int


def clipped_sum(
    *,
    model: nn.Module,
    plan: DpPlan,
    units: Sequence[Sequence[int]],
    record_loss: RecordLoss,
    physical_batches: PhysicalBatches,
    grid_step: float | None = None,
) -> ClippedSum:
    """The sum of the units' clipped gradients, as integers on a lattice; moves by at most C when a unit comes or goes.

    Nothing is left on the parameters from one call to the next, also when a call raises.

    Args:
        model: trainable parameters are the adapter's.
        plan: clipping.
        units: the sampled units, each a list of at most ``plan.max_records_per_unit`` records.
        record_loss: losses of given records.
        physical_batches: splits positions ``0..len(units)-1`` into lists that fit memory; the split changes no result
            beyond float32 rounding. Half-precision models take one unit at a time whatever it says.
        grid_step: of the lattice; default C / 2^20.

    Raises:
        PrivacyViolation: a trainable tensor has no per-record gradient, a unit brings too many records, or the split
            does not hold every unit once.
    """
    parameters = trainable(model)
    if not parameters:
        raise PrivacyViolation("the model has no trainable parameter; nothing would be trained, but budget spent")
    if any(not 0 < len(records) <= plan.max_records_per_unit for records in units):
        raise PrivacyViolation(f"a unit must bring 1 to {plan.max_records_per_unit} records into a step")
    split = physical_batches(units) if units else ()
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        # In half precision a record's gradient depends on how its batch is padded: 1.08 C were measured.
        split = [[position] for position in range(len(units))]
    if sorted(position for batch in split for position in batch) != list(range(len(units))):
        raise PrivacyViolation("the physical batches must hold every sampled unit exactly once")
    step = plan.max_grad_norm / 2**_LATTICE_BITS if grid_step is None else grid_step
    total = [torch.zeros(p.numel(), dtype=torch.float64, device=p.device) for p in parameters]
    clipped = 0
    clear_gradients(parameters)
    try:
        for batch in split:
            records = [record for position in batch for record in units[position]]
            owner = torch.tensor([i for i, position in enumerate(batch) for _ in units[position]])
            with per_sample_gradients(model, len(records)):
                losses_B = record_loss(records)
                if losses_B.shape != (len(records),):
                    raise PrivacyViolation(f"the loss must give one value per record, got shape {list(losses_B.shape)}")
                if not losses_B.requires_grad:
                    raise PrivacyViolation("the loss does not depend on any trainable parameter; the adapter is frozen")
                torch.autograd.backward(losses_B.sum())
            gradients = _unit_gradients(parameters, owner.to(losses_B.device), len(batch))
            clear_gradients(parameters)
            sums, norms = _lattice_sum(gradients, plan, step)
            for summed, part in zip(total, sums, strict=True):
                summed += part
            clipped += int((norms > plan.max_grad_norm).sum())
    finally:
        clear_gradients(parameters)
    return ClippedSum(grid=torch.cat(total).cpu().numpy().astype(np.int64), grid_step=step, clipped=clipped)


def _unit_gradients(parameters: list[nn.Parameter], unit_of_record: torch.Tensor, units: int) -> list[torch.Tensor]:
    """Sum of each unit's record gradients, float32 [U, p] per parameter."""
    gradients = []
    for parameter in parameters:
        sample = getattr(parameter, "grad_sample", None)
        if not isinstance(sample, torch.Tensor) or sample.shape[0] != unit_of_record.numel():
            raise PrivacyViolation(
                f"a trainable tensor of shape {list(parameter.shape)} has no gradient per record: its layer is unused. "
                "Choose other adapter.target_modules."
            )
        flat = sample.reshape(sample.shape[0], -1).float()
        if units < flat.shape[0]:
            flat = flat.new_zeros(units, flat.shape[1]).index_add_(0, unit_of_record, flat)
        gradients.append(flat)
    return gradients


def _clip_factors(norms: torch.Tensor, plan: DpPlan, bound: float) -> torch.Tensor:
    """What each unit's gradient is multiplied with; 0 for a unit whose norm is NaN or infinite. float64 [U]."""
    if plan.clipping == "automatic":
        factors = bound / (norms + _AUTOMATIC_GAMMA * plan.max_grad_norm)
    else:
        factors = (bound / norms.clamp(min=1e-30)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def _lattice_sum(
    gradients: list[torch.Tensor], plan: DpPlan, grid_step: float
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Sum over units of clipped gradients on the lattice, float64 integers [p] per parameter; and the norms [U].

    No unit's rounded gradient is longer than C: it is clipped to C less half the lattice's diagonal, and less one step
    for the float32 product.
    """
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in gradients]).norm(dim=0)
    dimension = sum(g.shape[1] for g in gradients)
    bound = plan.max_grad_norm - grid_step * (math.sqrt(dimension) / 2 + 1)
    if bound < plan.max_grad_norm / 2:
        raise PrivacyViolation(
            f"the grid of {grid_step:.2g} is too coarse for {dimension:,} parameters at max_grad_norm "
            f"{plan.max_grad_norm:.2g}: raise secure_sum.value_bits or max_grad_norm"
        )
    factors = (_clip_factors(norms, plan, bound) / grid_step).to(torch.float32).unsqueeze(1)
    sums = []
    for gradient in gradients:
        rounded = (gradient * factors).round_()
        # 0 * NaN is NaN: a unit that counts as zero has to be zero.
        sums.append(torch.nan_to_num_(rounded, 0.0, 0.0, 0.0).sum(0, dtype=torch.float64))
    return sums, norms
