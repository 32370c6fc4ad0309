"""The self-test before training: it passes what is sound and refuses each way in which records are known to mix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedcollm_privacy.errors import PrivacyViolation
from fedcollm_privacy.independence import PROBES, Independence, prove_independence
from secure_fedcollm.losses import per_record_loss
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.tokenization import Example, TokenDataset, collate
from secure_fedcollm.training import prove_records_independent

LENGTHS = (5, 8, 3, 7, 7, 14)
Loss = Callable[[Sequence[int]], torch.Tensor]


class Tokens(nn.Module):
    """Embeds, mixes over time causally, predicts: the least that has batch, time and padding. Trainable: ``first``."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.between, self.head = (
            nn.Embedding(20, 8),
            nn.Linear(8, 8),
            between,
            nn.Linear(8, 20),
        )
        self.requires_grad_(False)
        self.first.requires_grad_(True)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        hidden_BTH = torch.tanh(self.first(self.embed(ids_BT))).cumsum(1)
        logits: torch.Tensor = self.head(self.between(hidden_BTH))
        return logits


class OverBatch(nn.Module):
    """Batch normalisation over batch and time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(hidden_BTH.transpose(1, 2)).transpose(1, 2)
        return out


class Capacity(nn.Module):
    """Expert routing as in Switch Transformers: the expert takes the first tokens that want it, and then is full."""

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        flat = hidden_BTH.flatten(0, 1)
        wants = flat.sum(1) > 0
        place = wants.cumsum(0)
        taken = wants & (place <= len(flat) // 4)
        return (flat * torch.where(taken, 2.0, 0.5).unsqueeze(1)).view_as(hidden_BTH)


class BatchMean(nn.Module):
    """In-batch centring, in training and evaluation alike."""

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return hidden_BTH - hidden_BTH.mean((0, 1))


class SlightBatchMean(nn.Module):
    """A little in-batch centring: 1 % of each of 100 other records is a whole C once more."""

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return hidden_BTH - 0.03 * hidden_BTH.mean((0, 1))


class Shuffled(nn.Module):
    """Hands its rows to the trainable layer in another order and back: a function of each record alone, and yet the
    layer's rows are not the records' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(hidden_BTH.flip(0)).flip(0)
        return out


def batch(records: Sequence[int], pad_left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, [B, T]."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, 20, (length,), generator=generator) for length in LENGTHS]
    longest = max(LENGTHS[i] for i in records)
    sides = [(longest - LENGTHS[i], 0) if pad_left else (0, longest - LENGTHS[i]) for i in records]
    ids = torch.stack([functional.pad(texts[i], side) for i, side in zip(records, sides, strict=True)])
    labels = [functional.pad(texts[i], side, value=-100) for i, side in zip(records, sides, strict=True)]
    return ids, torch.stack(labels)


def token_losses(model: nn.Module, records: Sequence[int], pad_left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = batch(records, pad_left)
    losses_BT = functional.cross_entropy(
        model(ids)[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return losses_BT, labels[:, 1:] != -100


def sound(model: nn.Module) -> Loss:
    def losses_B(records: Sequence[int]) -> torch.Tensor:
        losses_BT, is_target_BT = token_losses(model, records)
        return losses_BT.sum(1) / is_target_BT.sum(1)

    return losses_B


def mean_over_the_batch(model: nn.Module) -> Loss:
    def losses_B(records: Sequence[int]) -> torch.Tensor:
        losses_BT, is_target_BT = token_losses(model, records)
        return losses_BT.sum(1) / is_target_BT.sum()

    return losses_B


def mean_over_padded_length(model: nn.Module) -> Loss:
    return lambda records: token_losses(model, records)[0].mean(1)


def mean_over_long_padding(model: nn.Module) -> Loss:
    """Sound up to the usual length, as with caches and kernels that are chosen by length."""

    def losses_B(records: Sequence[int]) -> torch.Tensor:
        losses_BT, is_target_BT = token_losses(model, records)
        long = losses_BT.shape[1] > max(LENGTHS[:5])
        return losses_BT.mean(1) if long else losses_BT.sum(1) / is_target_BT.sum(1)

    return losses_B


def padded_on_the_left(model: nn.Module) -> Loss:
    """Without an attention mask the padding is read like text."""

    def losses_B(records: Sequence[int]) -> torch.Tensor:
        losses_BT, is_target_BT = token_losses(model, records, pad_left=True)
        return losses_BT.sum(1) / is_target_BT.sum(1)

    return losses_B


LOSSES = [mean_over_the_batch, mean_over_padded_length, mean_over_long_padding, padded_on_the_left]


def test_the_probes_are_as_many_as_the_test_asks_for() -> None:
    assert len(LENGTHS) == PROBES
    assert LENGTHS[3] == LENGTHS[4]
    assert LENGTHS[5] == max(LENGTHS)


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.3), nn.LayerNorm(8)], ids=lambda m: type(m).__name__)
def test_sound_models_pass(between: nn.Module) -> None:
    model = Tokens(between)
    prove_independence(model, sound(model)).require(model)


@pytest.mark.parametrize(
    "between", [OverBatch(), Capacity(), BatchMean(), SlightBatchMean()], ids=lambda m: type(m).__name__
)
def test_layers_that_mix_records_are_refused(between: nn.Module) -> None:
    model = Tokens(between)
    with pytest.raises(PrivacyViolation, match="differs by"):
        prove_independence(model, sound(model))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_that_know_the_rest_of_the_batch_are_refused(loss: Callable[[nn.Module], Loss]) -> None:
    model = Tokens(nn.Identity())
    with pytest.raises(PrivacyViolation, match="differs by"):
        prove_independence(model, loss(model))


def test_a_layer_whose_rows_are_not_the_records_is_refused() -> None:
    model = Tokens(Shuffled())
    model.between.requires_grad_(True)
    with pytest.raises(PrivacyViolation, match="differs by"):
        prove_independence(model, sound(model))


def test_a_diverged_model_is_refused() -> None:
    model = Tokens(nn.Identity())
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(PrivacyViolation, match="diverged"):
        prove_independence(model, sound(model))


def test_nothing_is_left_of_the_test() -> None:
    model = Tokens(OverBatch())
    model.head.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with pytest.raises(PrivacyViolation):
        prove_independence(model, sound(model))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())


def test_the_proof_is_for_one_model() -> None:
    model, other = Tokens(nn.Identity()), Tokens(nn.Identity())
    proof = prove_independence(model, sound(model))
    assert isinstance(proof, Independence)
    with pytest.raises(PrivacyViolation, match="another model"):
        proof.require(other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_passes_with_its_own_collation_and_loss(
    load_tiny: Callable[..., AdaptedModel], architecture: str, tiny_tokens: TokenDataset, dtype: str
) -> None:
    adapted = load_tiny(architecture, trained=True, dtype=dtype)
    for aggregation in ("rebase", "factor_average"):
        spec = adapted.shared_spec(aggregation)  # type: ignore[arg-type]
        prove_records_independent(adapted, spec, tiny_tokens.pad_token_id).require(adapted.model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_own_loss_is_refused_on_every_architecture(
    load_tiny: Callable[..., AdaptedModel], architecture: str, tiny_tokens: TokenDataset, dtype: str
) -> None:
    """Its mean runs over all target tokens of the batch: 2.24 C and more where C is allowed."""
    adapted = load_tiny(architecture, trained=True, dtype=dtype)
    adapted.train_only(adapted.shared_spec("rebase"))
    generator = torch.Generator().manual_seed(0)
    texts = [
        Example(input_ids=tuple(torch.randint(9, 300, (n,), generator=generator).tolist()), target_start=1, unit=str(n))
        for n in LENGTHS
    ]

    def losses_B(records: Sequence[int]) -> torch.Tensor:
        padded = collate([texts[i] for i in records], tiny_tokens.pad_token_id)
        outputs = adapted.model(
            input_ids=padded.input_ids_BT, attention_mask=padded.attention_mask_BT, labels=padded.labels_BT
        )
        loss: torch.Tensor = outputs.loss / len(records)
        return loss.expand(len(records))

    with pytest.raises(PrivacyViolation, match="differs by"):
        prove_independence(adapted.model, losses_B)
    padded = [texts[i] for i in range(PROBES)]
    prove_independence(
        adapted.model, lambda chosen: per_record_loss(adapted.model, collate([padded[i] for i in chosen], 0))
    )
