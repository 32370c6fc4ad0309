"""The self-test before training: changing one record must not change another record's gradient.

Clipping bounds what one record adds to a sum only if nothing of it is in the other records' gradients. Batch
normalisation, losses that divide by all tokens of a batch, routing with a shared capacity, padding that leaks into
attention, and layers whose tensors are not ordered by record all break this, silently. The test runs the model and
the loss that will be trained, on made-up records, so its verdict tells nothing about anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fedcollm_privacy.errors import PrivacyViolation
from fedcollm_privacy.per_sample import clear_gradients, per_sample_gradients, trainable

__all__ = ["PROBES", "Independence", "prove_independence"]

PROBES = 6
"""Records 0-2 of any lengths; 3 and 4 equally long and different; 5 longer than all others."""

_TOLERANCE = 1e-3
_TOLERANCE_HALF = 0.1
"""For bfloat16 weights, whose sums depend on the padded length by about 1 % of a gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Independence:
    """Proof that a model passed; only `prove_independence` should make one."""

    model: nn.Module

    def require(self, model: nn.Module) -> None:
        """Refuse another model than the tested one.

        Raises:
            PrivacyViolation: it is another.
        """
        if model is not self.model:
            raise PrivacyViolation("the independence of records was proven for another model")


def prove_independence(model: nn.Module, probe_loss: Callable[[Sequence[int]], torch.Tensor]) -> Independence:
    """Compare gradients of the same records in different company.

    1. In training mode, with equal dropout: records 0-2 beside record 3, and beside 4 instead.
    2. In evaluation mode: records 0-2 among themselves, and beside 5, which pads them.
    3. Each of 0-2 alone, by a plain backward pass that knows nothing of per-record gradients.

    Modes, gradients, buffers and torch's random state are as before afterwards.

    Args:
        model: as it will be trained; trainable parameters are the adapter's.
        probe_loss: losses of the given probe records (see `PROBES`), by the collation and loss of the training.

    Raises:
        PrivacyViolation: records are not independent, with the comparison that failed; or the model has diverged.
    """
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    tolerance = _TOLERANCE_HALF if half else _TOLERANCE
    with _undisturbed(model):
        model.train()
        beside_one, beside_other = (_gradients(model, probe_loss, [0, 1, 2, last]) for last in (3, 4))
        _compare(beside_one, beside_other, tolerance, "when another record changes")
        model.eval()
        among = _gradients(model, probe_loss, [0, 1, 2])
        _compare(among, _gradients(model, probe_loss, [0, 1, 2, 5]), tolerance, "when a longer record joins")
        alone = torch.stack([_alone(model, probe_loss, record) for record in range(3)])
        _compare(among, alone, tolerance, "from what it is alone")
    return Independence(model=model)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng([d.index for d in devices if d.index is not None]):
            yield
    finally:
        clear_gradients(trainable(model))
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def _gradients(
    model: nn.Module, probe_loss: Callable[[Sequence[int]], torch.Tensor], records: list[int]
) -> torch.Tensor:
    """Gradients of records 0-2, float32 [3, d]."""
    parameters = trainable(model)
    clear_gradients(parameters)
    torch.manual_seed(0)
    with per_sample_gradients(model, len(records)):
        torch.autograd.backward(probe_loss(records).sum())
    if not all(hasattr(p, "grad_sample") for p in parameters):
        raise PrivacyViolation("a trainable tensor takes no part in the loss. Choose other adapter.target_modules.")
    samples = [p.grad_sample[:3].reshape(3, -1).float() for p in parameters]  # type: ignore[attr-defined]
    return torch.cat(samples, dim=1)


def _alone(model: nn.Module, probe_loss: Callable[[Sequence[int]], torch.Tensor], record: int) -> torch.Tensor:
    gradients = torch.autograd.grad(probe_loss([record]).sum(), trainable(model))
    return torch.cat([g.reshape(-1).float() for g in gradients])


def _compare(one: torch.Tensor, two: torch.Tensor, tolerance: float, what: str) -> None:
    scale = torch.maximum(one.norm(dim=1), two.norm(dim=1))
    if not torch.isfinite(scale).all():
        raise PrivacyViolation("the model has diverged: its gradients on made-up records are NaN or infinite")
    change = float(((one - two).norm(dim=1) / scale.clamp(min=1e-12)).max())
    if change > tolerance:
        raise PrivacyViolation(
            f"a record's gradient differs by {change:.2g} (relative; {tolerance} is allowed) {what}. One record would "
            "reach beyond its clipped gradient, so nothing is trained. Layers that mix records (batch normalisation, "
            "expert routing with a capacity) or a loss that divides by the whole batch do this"
        )
