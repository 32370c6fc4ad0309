"""Per-record gradients of LoRA's linear layers, in the form that Opacus reads them (``grad_sample``).

Opacus' hooks compute a layer's summed weight gradient and then the per-record ones beside it. Here the layer's
backward pass computes only the latter, with Opacus' own formula for linear layers: it replaces work instead of adding
it. Intermediates are what LoRA has anyway: the layer's input (for B of rank r: [B, T, r]) and its output's gradient.

The number of records is told, never read off a tensor: OPT hands its feed-forward layers batch and time merged into
one axis, where Opacus' hooks take every token for a record.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.nn import functional

from fedcollm_privacy.errors import PrivacyViolation

__all__ = ["clear_gradients", "per_sample_gradients", "trainable"]

_LINEAR_GRADIENTS = GradSampleModule.GRAD_SAMPLERS[nn.Linear]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that take gradients, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def clear_gradients(parameters: list[nn.Parameter]) -> None:
    """Forget summed and per-record gradients."""
    for parameter in parameters:
        parameter.grad = None
        vars(parameter).pop("grad_sample", None)


class _PerRecordLinear(torch.autograd.Function):
    """A linear layer whose backward fills ``grad_sample`` and gives no summed gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: nn.Linear, records: int
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.records = layer, records
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        # Half precision would round every record's gradient before it is clipped.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad():
            samples = _LINEAR_GRADIENTS(
                ctx.layer,
                [_by_record(x, ctx.records).to(dtype)],
                _by_record(gradient, ctx.records).to(dtype),
            )
            for parameter, sample in samples.items():
                # A layer that is used twice belongs to the record twice.
                before = getattr(parameter, "grad_sample", None)
                parameter.grad_sample = sample if before is None else before + sample
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


def _by_record(tensor: torch.Tensor, records: int) -> torch.Tensor:
    """The tensor with the record as its first axis, also where the model has merged it with time."""
    if tensor.shape[0] == records and tensor.dim() > 1:
        return tensor
    if tensor.dim() != 2 or tensor.shape[0] % records:
        raise PrivacyViolation(
            f"a trainable layer sees a tensor of shape {list(tensor.shape)} for {records} records; what belongs to "
            "which record cannot be told. Choose other adapter.target_modules."
        )
    return tensor.reshape(records, -1, tensor.shape[1])


@contextmanager
def per_sample_gradients(model: nn.Module, records: int) -> Iterator[None]:
    """While open, a forward pass over ``records`` records and its ``backward()`` fill ``grad_sample`` [records, ...].

    Exact in float32 for half-precision layers, with merged batch and time axes, with a layer used twice, and under
    gradient checkpointing of both kinds. Whether records are independent of each other is another matter, see
    `independence`.

    Raises:
        PrivacyViolation: a trainable tensor is not that of a linear layer (in the forward pass: a layer's input cannot
            be divided by records).
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and any(p.requires_grad for p in m.parameters(False))]
    known = {id(p) for layer in layers for p in layer.parameters(False)}
    strange = [list(p.shape) for p in trainable(model) if id(p) not in known]
    if strange:
        raise PrivacyViolation(
            f"a trainable tensor of shape {strange[0]} is not in a linear layer; only LoRA's factors can be trained "
            "privately. Choose other adapter.target_modules."
        )
    try:
        for layer in layers:
            layer.forward = partial(_forward, layer, records)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _forward(layer: nn.Linear, records: int, x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return functional.linear(x, layer.weight, layer.bias)
    out: torch.Tensor = _PerRecordLinear.apply(x, layer.weight, layer.bias, layer, records)  # type: ignore[no-untyped-call]
    return out
