"""Train a site's adapter from the broadcast, privately or (in experiments that say so) not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedcollm_privacy.clipping import PhysicalBatches, RecordLoss
from fedcollm_privacy.dp_sgd import Observation, release_private_gradient, run_private_steps
from fedcollm_privacy.independence import PROBES, Independence, prove_independence
from fedcollm_privacy.messages import AdapterSpec, NoisySum, PrivateUpdate, RoundPlan
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom
from fedcollm_privacy.reservation import Reservation
from secure_fedcollm.losses import per_record_loss
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.tokenization import Batch, Example, TokenDataset, collate, physical_batches

__all__ = [
    "LocalTraining",
    "Paid",
    "prove_records_independent",
    "records_of_units",
    "release_gradient",
    "to_device",
    "train_non_private",
    "train_private",
]


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


def _losses_of(adapted: AdaptedModel, examples: Sequence[Example], pad_token_id: int) -> RecordLoss:
    def losses_B(records: Sequence[int]) -> torch.Tensor:
        batch = collate([examples[i] for i in records], pad_token_id)
        return per_record_loss(adapted.model, to_device(batch, adapted.device))

    return losses_B


def prove_records_independent(adapted: AdaptedModel, spec: AdapterSpec, pad_token_id: int) -> Independence:
    """Test the model, the collation and the loss that are about to be trained, on made-up tokens.

    Raises:
        PrivacyViolation: one record's gradient depends on another record.
    """
    adapted.train_only(spec)
    generator = torch.Generator().manual_seed(0)
    rows = adapted.model.get_input_embeddings().weight.shape[0]
    lengths = (5, 8, 3, 7, 7, 14)[:PROBES]
    examples = [
        Example(
            input_ids=tuple(torch.randint(rows, (length,), generator=generator).tolist()),
            target_start=1 + length // 3,
            unit=str(number),
        )
        for number, length in enumerate(lengths)
    ]
    return prove_independence(adapted.model, _losses_of(adapted, examples, pad_token_id))


def _batches_of(tokens: TokenDataset, plan: DpPlan, how: LocalTraining) -> PhysicalBatches:
    def split(units: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        # A unit may fill max_records_per_unit rows, each as long as the longest in the batch.
        longest = [
            plan.max_records_per_unit * max(len(tokens.examples[i].input_ids) for i in records) for records in units
        ]
        return physical_batches(longest, how.batch_tokens)

    return split


@dataclass(frozen=True, slots=True, kw_only=True)
class Paid:
    """What a private round needs from the site's side: the plan, its paid steps, the tested model, the randomness."""

    plan: DpPlan
    reservation: Reservation
    independence: Independence
    random: SecureRandom
    observe: Callable[[Observation], None] | None = None


def train_private(
    *,
    adapted: AdaptedModel,
    spec: AdapterSpec,
    tokens: TokenDataset,
    paid: Paid,
    how: LocalTraining,
    on_step: Callable[[], None],
) -> PrivateUpdate:
    """Take the reserved DP-SGD steps on the tensors of ``spec`` and give the change they made.

    The adapter that is in the model at the call is the starting point.

    Raises:
        PrivacyViolation: see `run_private_steps`.
    """
    start = adapted.read(spec)
    ran = run_private_steps(
        model=adapted.model,
        optimizer=torch.optim.Adam(adapted.train_only(spec), lr=how.learning_rate),
        plan=paid.plan,
        reservation=paid.reservation,
        independence=paid.independence,
        records_of_unit=records_of_units(tokens),
        record_loss=_losses_of(adapted, tokens.examples, tokens.pad_token_id),
        physical_batches=_batches_of(tokens, paid.plan, how),
        random=paid.random,
        on_step=on_step,
        observe=paid.observe,
    )
    vector = adapted.read(spec) - start
    return PrivateUpdate(vector=vector, spec_digest=spec.digest, reservation=paid.reservation.entry, ran=ran)


def release_gradient(
    *,
    adapted: AdaptedModel,
    spec: AdapterSpec,
    tokens: TokenDataset,
    paid: Paid,
    round_plan: RoundPlan,
    how: LocalTraining,
) -> NoisySum:
    """The noisy gradient of one step at the adapter that is in the model, on the round's grid.

    Raises:
        PrivacyViolation: see `release_private_gradient`.
    """
    return release_private_gradient(
        model=adapted.model,
        flatten_as=adapted.train_only(spec),
        plan=paid.plan,
        round_plan=round_plan,
        reservation=paid.reservation,
        independence=paid.independence,
        records_of_unit=records_of_units(tokens),
        record_loss=_losses_of(adapted, tokens.examples, tokens.pad_token_id),
        physical_batches=_batches_of(tokens, paid.plan, how),
        random=paid.random,
        observe=paid.observe,
    )


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
    losses_of = _losses_of(adapted, tokens.examples, tokens.pad_token_id)
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
