"""Updates on the round's integer grid, and the mean back from it.

The grid lies evenly on ``[-clip, clip]`` with ``2 * levels + 1`` points, the same at every site. Clip and bits come
from the plan, never from the data, so quantising an already private update costs no privacy (post-processing).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.errors import FedCollmError, InvalidValue
from fedcollm_privacy.messages import NoisySum, OpenedSum, PrivateUpdate, QuantizedUpdate, RoundPlan

__all__ = ["clipped_fraction", "dequantize_mean", "on_grid", "quantize"]

_BLOCK = 2**18
"""Coordinates handled at once, so that float64 copies of a long update never exist whole."""


def quantize(update: PrivateUpdate, plan: RoundPlan) -> QuantizedUpdate:
    """Round each coordinate to the nearest grid point; beyond ``clip`` it saturates there.

    ================  ============================
    coordinate        grid value
    ================  ============================
    x in [-c, c]      nearest integer to x / step
    x > c             levels
    x < -c            -levels
    NaN, inf          refused
    ================  ============================

    Args:
        update: float32 [d], update units.
        plan: names clip, bits, d and the adapter's spec.

    Returns:
        int32 [d] in ``[-levels, levels]``, within half a grid step of every coordinate inside the clip.

    Raises:
        InvalidValue: the update is of another adapter or length, or the sum of so many sites could overflow.
        FedCollmError: a coordinate is NaN or infinite: the site diverged.
    """
    _check(update, plan)
    plan.ckks.prove(plan.max_contributors, plan.value_bits)
    grid = np.empty(plan.dimension, dtype=np.int32)
    for start in range(0, plan.dimension, _BLOCK):
        block = update.vector[start : start + _BLOCK].astype(np.float64)
        if not np.isfinite(block).all():
            raise FedCollmError(
                "the update holds NaN or infinity: training diverged at this site; lower the learning rate or "
                "max_grad_norm and run again"
            )
        grid[start : start + _BLOCK] = np.rint(np.clip(block, -plan.clip, plan.clip) / plan.grid_step)
    return QuantizedUpdate(plan=plan, grid=grid)


def on_grid(noisy: NoisySum, plan: RoundPlan) -> QuantizedUpdate:
    """A released gradient, which was made on the round's grid: nothing is rounded or saturated any more.

    Saturation after the noise would not be post-processing of a *sum*, so there is none: a coordinate off the grid's
    range is refused.

    Raises:
        InvalidValue: the gradient is on another grid, of another length, or beyond the range.
    """
    plan.ckks.prove(plan.max_contributors, plan.value_bits)
    if plan.release != "gradient" or noisy.grid_step != plan.grid_step:
        raise InvalidValue("noisy.grid_step", noisy.grid_step, f"the round's, {plan.grid_step}, in a gradient round")
    if noisy.grid.shape != (plan.dimension,):
        raise InvalidValue("noisy.grid", f"{noisy.grid.shape[0]} coordinates", f"{plan.dimension}, as planned")
    if int(np.abs(noisy.grid).max()) > plan.levels:
        raise InvalidValue("noisy.grid", "a coordinate beyond the grid", f"at most {plan.levels} in size")
    return QuantizedUpdate(plan=plan, grid=noisy.grid.astype(np.int32))


def clipped_fraction(update: PrivateUpdate, plan: RoundPlan) -> float:
    """Share of coordinates beyond ``clip``, in [0, 1]; NaN counts as beyond.

    A vector (0, 1, 2, -3) with clip 1 has 0.5.
    """
    _check(update, plan)
    return 1.0 - float(np.count_nonzero(np.abs(update.vector) <= plan.clip)) / plan.dimension


def dequantize_mean(opened: OpenedSum) -> NDArray[np.float32]:
    """The mean update, float32 [d]: ``total * grid_step / cohort size``; every site weighs the same.

    Raises:
        InvalidValue: the sum names no contributor.
    """
    if not opened.cohort:
        raise InvalidValue("opened.cohort", opened.cohort, "at least one contributor")
    return (opened.total * (opened.plan.grid_step / len(opened.cohort))).astype(np.float32)


def _check(update: PrivateUpdate, plan: RoundPlan) -> None:
    if update.spec_digest != plan.spec_digest:
        raise InvalidValue("update.spec_digest", update.spec_digest, f"the plan's adapter, {plan.spec_digest}")
    if update.vector.shape != (plan.dimension,):
        raise InvalidValue("update.vector", f"{update.vector.shape[0]} coordinates", f"{plan.dimension}, as planned")
