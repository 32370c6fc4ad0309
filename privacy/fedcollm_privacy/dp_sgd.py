"""The private training step: per-unit gradients by Opacus, clipped, summed, noised, divided by a public number.

Opacus computes the per-sample gradients. Clipping, summing and noise are these few lines rather than its optimizer
because that one spoils every parameter when one record's gradient is NaN, keeps a partial sum when a loop is left
early, derives the expected batch size by truncation, cannot take an empty batch with transformers, and draws its noise
from torch's global generator. A test holds the two against each other where both are right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from fedcollm_privacy.errors import PrivacyViolation
from fedcollm_privacy.ledger import Reservation
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom

__all__ = ["RecordLoss", "noisy_gradient", "per_sample_gradients", "run_private_steps"]

# Losses of the given records, shape [len(records)], each computed from its own record alone.
RecordLoss = Callable[[Sequence[int]], torch.Tensor]


@contextmanager
def per_sample_gradients(model: nn.Module) -> Iterator[None]:
    """While open, ``backward()`` fills ``grad_sample`` [B, ...] of every trainable parameter (Opacus hooks)."""
    hooks = GradSampleHooks(model, loss_reduction="sum", strict=False)
    try:
        with warnings.catch_warnings():
            # The first trainable layer's input carries no gradient (what lies below is frozen); its hook needs none.
            warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
            yield
    finally:
        hooks.cleanup()
        # After a broken forward or backward Opacus leaves these behind: records' activations, and a wrong batch size.
        for module in model.modules():
            for name in vars(module).keys() & {"activations", "max_batch_len"}:
                delattr(module, name)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _clear(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
        parameter.grad_sample = None  # type: ignore[attr-defined]


def _unit_gradients(parameters: list[nn.Parameter], unit_of_record: torch.Tensor, units: int) -> list[torch.Tensor]:
    """Sum of each unit's record gradients, float32 [U, ...] per parameter."""
    gradients = []
    for parameter in parameters:
        sample = parameter.grad_sample  # type: ignore[attr-defined]
        if not isinstance(sample, torch.Tensor) or sample.shape[0] != unit_of_record.numel():
            raise PrivacyViolation(
                f"a trainable tensor of shape {list(parameter.shape)} has no gradient per record: its layer is unused "
                "or merges records with tokens (OPT's fc1/fc2 do). Choose other adapter.target_modules."
            )
        unit_sum = torch.zeros(units, *parameter.shape, dtype=torch.float32, device=sample.device)
        gradients.append(unit_sum.index_add_(0, unit_of_record, sample.float()))
    return gradients


def _clipped_sum(gradients: list[torch.Tensor], max_grad_norm: float) -> list[torch.Tensor]:
    """Sum over units of gradients scaled to L2 norm at most C; a unit with NaN or infinity counts as zero."""
    squared = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
    norms = squared.sqrt()
    finite = torch.isfinite(norms)
    factors = torch.where(finite, (max_grad_norm / norms.clamp(min=1e-12)).clamp(max=1.0), torch.zeros_like(norms))
    keep = finite.nonzero().squeeze(1)
    return [torch.einsum("u,u...->...", factors[keep], g[keep]) for g in gradients]


def noisy_gradient(
    *,
    model: nn.Module,
    plan: DpPlan,
    units: Sequence[Sequence[int]],
    record_loss: RecordLoss,
    physical_batches: Callable[[Sequence[int]], Sequence[Sequence[int]]],
    random: SecureRandom,
) -> None:
    """Set ``grad`` of every trainable parameter to (sum of clipped unit gradients + noise) / expected batch size.

    Must be called inside `per_sample_gradients`. No units give pure noise, which is a counted step like any other.
    Nothing is left on the parameters from one call to the next, also when a call raises.

    Args:
        model: in training mode; trainable parameters are the adapter's.
        plan: clipping bound, noise and divisor.
        units: the sampled units, each a list of at most ``plan.max_records_per_unit`` records.
        record_loss: losses of given records.
        physical_batches: splits positions ``0..len(units)-1`` into lists that fit memory; the split changes no result.
        random: the step's noise.

    Raises:
        PrivacyViolation: a trainable tensor has no per-record gradient, a unit brings too many records, or the split
            does not hold every unit once.
    """
    parameters = _trainable(model)
    if not parameters:
        raise PrivacyViolation("the model has no trainable parameter; nothing would be trained, but budget spent")
    if any(not 0 < len(records) <= plan.max_records_per_unit for records in units):
        raise PrivacyViolation(f"a unit must bring 1 to {plan.max_records_per_unit} records into a step")
    split = physical_batches(range(len(units))) if units else ()
    if sorted(position for batch in split for position in batch) != list(range(len(units))):
        raise PrivacyViolation("the physical batches must hold every sampled unit exactly once")
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    _clear(parameters)
    try:
        for batch in split:
            records = [record for position in batch for record in units[position]]
            owner = torch.tensor([i for i, position in enumerate(batch) for _ in units[position]])
            losses_B = record_loss(records)
            if losses_B.shape != (len(records),):
                raise PrivacyViolation(f"the loss must give one value per record, got shape {list(losses_B.shape)}")
            if not losses_B.requires_grad:
                raise PrivacyViolation("the loss does not depend on any trainable parameter; the adapter is frozen")
            torch.autograd.backward(losses_B.sum())
            gradients = _unit_gradients(parameters, owner.to(losses_B.device), len(batch))
            for summed, clipped in zip(total, _clipped_sum(gradients, plan.max_grad_norm), strict=True):
                summed += clipped
            _clear(parameters)
    except BaseException:
        _clear(parameters)
        raise
    deviation = plan.noise_multiplier * plan.max_grad_norm
    for parameter, summed in zip(parameters, total, strict=True):
        noise = torch.from_numpy(random.normals(summed.numel())).reshape(summed.shape).to(summed)
        parameter.grad = ((summed + deviation * noise) / plan.expected_batch_size).to(parameter.dtype)


def run_private_steps(
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: DpPlan,
    reservation: Reservation,
    records_of_unit: Sequence[Sequence[int]],
    record_loss: RecordLoss,
    physical_batches: Callable[[Sequence[Sequence[int]]], Callable[[Sequence[int]], Sequence[Sequence[int]]]],
    random: SecureRandom,
    on_step: Callable[[], None],
) -> None:
    """Take exactly the reserved steps of the plan.

    Args:
        model: trainable parameters are the adapter's.
        optimizer: over the same parameters; whatever it does with the noisy gradients is post-processing.
        plan: what is run; must be the one that was reserved.
        reservation: proof that the steps are on the ledger.
        records_of_unit: for every unit of the data set, its records.
        record_loss: losses of given records.
        physical_batches: from the sampled units to the split of their positions.
        random: sampling and noise.
        on_step: called after every step, with nothing.

    Raises:
        PrivacyViolation: the reservation is not for this plan, or the first step left every parameter unchanged (the
            adapter is not connected to the loss: noise alone would have moved it).
    """
    if reservation.plan_digest != plan.digest:
        raise PrivacyViolation("the reservation is for another plan; nothing was trained")
    parameters = _trainable(model)
    was_training = model.training
    model.train()
    try:
        with per_sample_gradients(model):
            for step in range(reservation.steps):
                mask = random.poisson_mask(plan.sample_rate, len(records_of_unit))
                units = []
                for unit in mask.nonzero()[0].tolist():
                    records = records_of_unit[unit]
                    units.append([records[i] for i in random.subset(len(records), plan.max_records_per_unit)])
                before = [p.detach().clone() for p in parameters] if step == 0 else []
                noisy_gradient(
                    model=model,
                    plan=plan,
                    units=units,
                    record_loss=record_loss,
                    physical_batches=physical_batches(units),
                    random=random,
                )
                optimizer.step()
                if before and all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True)):
                    raise PrivacyViolation("the first step changed no parameter: the optimizer holds other tensors")
                on_step()
    finally:
        for parameter in parameters:
            parameter.grad = None
        model.train(was_training)
