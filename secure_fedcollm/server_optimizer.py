"""The server's Adam, for rounds in which sites send gradients; its state outlives rounds and crashes.

What it does with an opened sum is post-processing and costs no privacy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["AdamState", "adam_step"]

Float32 = NDArray[np.float32]


def _nothing() -> Float32:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamState:
    """Adam's two moments, float32 [d] each, and the steps taken; empty before the first."""

    steps: int = 0
    first: Float32 = field(default_factory=_nothing)
    second: Float32 = field(default_factory=_nothing)


def adam_step(
    vector: Float32, gradient: Float32, state: AdamState, *, learning_rate: float
) -> tuple[Float32, AdamState]:
    """One step of torch's Adam from ``state``; gives the moved vector, float32 [d], and the new state."""
    parameter = torch.nn.Parameter(torch.from_numpy(vector.copy()))
    optimizer = torch.optim.Adam([parameter], lr=learning_rate)
    if state.steps:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state.steps)),
            "exp_avg": torch.from_numpy(state.first.copy()),
            "exp_avg_sq": torch.from_numpy(state.second.copy()),
        }
    parameter.grad = torch.from_numpy(gradient)
    optimizer.step()
    moments = optimizer.state[parameter]
    after = AdamState(steps=state.steps + 1, first=moments["exp_avg"].numpy(), second=moments["exp_avg_sq"].numpy())
    return parameter.detach().numpy(), after
