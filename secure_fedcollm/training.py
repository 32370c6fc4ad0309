"""Train a site's adapter from the broadcast, privately or (in experiments that say so) not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedcollm_privacy.dp_sgd import run_private_steps
from fedcollm_privacy.ledger import Reservation
from fedcollm_privacy.messages import AdapterSpec, PrivateUpdate
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom
from secure_fedcollm.losses import per_record_loss
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.tokenization import Batch, TokenDataset, collate, physical_batches

__all__ = ["LocalTraining", "records_of_units", "to_device", "train_non_private", "train_private"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTraining:
    """How a site trains; nothing here changes what the privacy plan guarantees.

    Attributes:
        learning_rate: of Adam, started afresh each round because re-basing turns the coordinates.
        batch_tokens: padded tokens per physical batch.
    """

    learning_rate: float
    batch_tokens: int


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on another device."""
    return Batch(
        input_ids_BT=batch.input_ids_BT.to(device),
        attention_mask_BT=batch.attention_mask_BT.to(device),
        labels_BT=batch.labels_BT.to(device),
    )


def records_of_units(tokens: TokenDataset) -> list[list[int]]:
    """For every unit, in order of first appearance, the positions of its records."""
    units: dict[str, list[int]] = {}
    for position, example in enumerate(tokens.examples):
        units.setdefault(example.unit, []).append(position)
    return list(units.values())


def _losses_of(adapted: AdaptedModel, tokens: TokenDataset) -> Callable[[Sequence[int]], torch.Tensor]:
    def losses_B(records: Sequence[int]) -> torch.Tensor:
        batch = collate([tokens.examples[i] for i in records], tokens.pad_token_id)
        return per_record_loss(adapted.model, to_device(batch, adapted.device))

    return losses_B


def train_private(
    *,
    adapted: AdaptedModel,
    spec: AdapterSpec,
    tokens: TokenDataset,
    plan: DpPlan,
    reservation: Reservation,
    how: LocalTraining,
    on_step: Callable[[], None],
) -> PrivateUpdate:
    """Take the reserved DP-SGD steps on the tensors of ``spec`` and give the change they made.

    The adapter that is in the model at the call is the starting point.

    Raises:
        PrivacyViolation: see `run_private_steps`.
    """
    start = adapted.read(spec)
    parameters = adapted.train_only(spec)

    def batches_of(units: Sequence[Sequence[int]]) -> Callable[[Sequence[int]], Sequence[Sequence[int]]]:
        # A unit may fill max_records_per_unit rows, each as long as the longest in the batch.
        longest = [
            plan.max_records_per_unit * max(len(tokens.examples[i].input_ids) for i in records) for records in units
        ]
        return lambda positions: physical_batches([longest[i] for i in positions], how.batch_tokens)

    run_private_steps(
        model=adapted.model,
        optimizer=torch.optim.Adam(parameters, lr=how.learning_rate),
        plan=plan,
        reservation=reservation,
        records_of_unit=records_of_units(tokens),
        record_loss=_losses_of(adapted, tokens),
        physical_batches=batches_of,
        random=SecureRandom(),
        on_step=on_step,
    )
    return PrivateUpdate(vector=adapted.read(spec) - start, spec_digest=spec.digest, reservation=reservation.entry)


def train_non_private(
    *,
    adapted: AdaptedModel,
    spec: AdapterSpec,
    tokens: TokenDataset,
    steps: int,
    batch_size: int,
    seed: int,
    how: LocalTraining,
    on_step: Callable[[], None],
) -> PrivateUpdate:
    """The same training without clipping and noise; the result carries ``reservation="non-private"``.

    Args:
        batch_size: records per step, drawn without replacement within a step.
        seed: of the batches.
    """
    start = adapted.read(spec)
    parameters = adapted.train_only(spec)
    optimizer = torch.optim.Adam(parameters, lr=how.learning_rate)
    losses_of = _losses_of(adapted, tokens)
    generator = torch.Generator().manual_seed(seed)
    adapted.model.train()
    for _ in range(steps):
        chosen = torch.randperm(len(tokens.examples), generator=generator)[:batch_size].tolist()
        lengths = [len(tokens.examples[i].input_ids) for i in chosen]
        optimizer.zero_grad()
        for positions in physical_batches(lengths, how.batch_tokens):
            loss = losses_of([chosen[i] for i in positions]).sum() / len(chosen)
            torch.autograd.backward(loss)
        optimizer.step()
        on_step()
    optimizer.zero_grad()
    return PrivateUpdate(vector=adapted.read(spec) - start, spec_digest=spec.digest, reservation="non-private")
