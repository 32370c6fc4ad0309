"""Server-side co-tuning of SLM and LLM on the public set D_a (FedCoLLM, equations 4-6 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secure_fedcollm.alignment import AlignedTokens
from secure_fedcollm.config import DistillationConfig
from secure_fedcollm.cross_losses import AlignedRows, cross_tokenizer_loss
from secure_fedcollm.losses import CoTuningLoss, co_tuning_loss, target_hidden_states
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.tokenization import Batch, TokenDataset, collate
from secure_fedcollm.training import to_device

__all__ = ["CoTuningReport", "co_tune"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoTuningReport:
    """Means over the steps of one call, in nats per target token; between two tokenizers KL is per span."""

    slm_ce: float
    slm_kl: float
    llm_ce: float
    llm_kl: float


def _has_dropout(trunk: Any) -> bool:
    layers = any(isinstance(m, nn.Dropout) and m.p > 0 for m in trunk.modules())
    # Some architectures apply dropout as a function, with a rate that stands in the configuration alone; rates of
    # classification heads do not count here. A rate too many costs one more forward pass, nothing else.
    settings = vars(trunk.config).items()
    rates = [value for name, value in settings if "drop" in name and not name.startswith(("summary", "classifier"))]
    return layers or any(rates)


def _teacher_hidden(trunk: nn.Module, batch: Batch, student_view_NH: torch.Tensor) -> torch.Tensor:
    """What the model says as a teacher: its own hidden states without dropout and without gradient."""
    if not _has_dropout(trunk):
        return student_view_NH.detach()
    trunk.eval()
    with torch.no_grad():
        hidden_NH, _ = target_hidden_states(trunk, batch)
    trunk.train()
    return hidden_NH


def _aligned_rows(tokens: AlignedTokens, chosen: Sequence[int]) -> tuple[AlignedRows, AlignedRows]:
    """What the SLM learns from the LLM in a batch of these records, and the reverse."""
    rows, slm_start, llm_start = [], 0, 0
    for record in chosen:
        rows += [
            (s.slm_start + slm_start, s.slm_stop + slm_start, s.llm_start + llm_start, s.llm_stop + llm_start)
            for s in tokens.spans[record]
        ]
        slm, llm = tokens.slm.examples[record], tokens.llm.examples[record]
        slm_start += len(slm.input_ids) - slm.target_start
        llm_start += len(llm.input_ids) - llm.target_start
    spans_S4, shared = torch.tensor(rows, dtype=torch.long).reshape(-1, 4), tokens.shared
    return (
        AlignedRows(spans_S4=spans_S4, student_ids=shared.slm_ids, teacher_ids=shared.llm_ids),
        AlignedRows(spans_S4=spans_S4[:, [2, 3, 0, 1]], student_ids=shared.llm_ids, teacher_ids=shared.slm_ids),
    )


def co_tune(
    *,
    slm: AdaptedModel,
    llm: AdaptedModel,
    tokens: TokenDataset | AlignedTokens,
    config: DistillationConfig,
    train_slm_a: bool,
    seed: int,
    on_step: Callable[[], None],
) -> CoTuningReport:
    """R steps on D_a: each model learns from the labels and from the other, in place.

    Both losses of a step are taken at the same (theta, omega), so neither model sees the other's new step first. The
    teacher side is detached and without dropout; the student side has its gradient. Only public text is read here, so
    this is post-processing of the sites' private updates.

    Args:
        slm: the server's SLM with the aggregate in it.
        llm: the server's LLM.
        tokens: D_a, as both models read it, or aligned between two tokenizers.
        config: steps, weights, learning rates, and who learns.
        train_slm_a: whether the SLM's A may move (not with ``freeze_a``).
        seed: of the batches.
        on_step: called after every step.
    """
    slm_spec = slm.spec if train_slm_a else slm.shared_spec("freeze_a")
    sides: list[tuple[AdaptedModel, torch.optim.Optimizer | None]] = []
    for adapted, spec, learns, rate in (
        (slm, slm_spec, config.train_slm, config.slm_learning_rate),
        (llm, llm.spec, config.train_llm, config.llm_learning_rate),
    ):
        parameters = adapted.train_only(spec)
        sides.append((adapted, torch.optim.Adam(parameters, lr=rate) if learns else None))
        adapted.model.train()
    (slm_trunk, slm_head), (llm_trunk, llm_head) = slm.trunk_and_head(), llm.trunk_and_head()
    generator = torch.Generator().manual_seed(seed)
    slm_tokens, llm_tokens = (tokens.slm, tokens.llm) if isinstance(tokens, AlignedTokens) else (tokens, tokens)
    sums = torch.zeros(4, dtype=torch.float64)
    for _ in range(config.steps):
        chosen = torch.randperm(len(slm_tokens.examples), generator=generator)[: config.batch_size].tolist()
        slm_batch, llm_batch = (
            to_device(collate([side.examples[i] for i in chosen], side.pad_token_id), adapted.device)
            for side, adapted in ((slm_tokens, slm), (llm_tokens, llm))
        )
        with torch.set_grad_enabled(config.train_slm):
            slm_NH, slm_labels_N = target_hidden_states(slm_trunk, slm_batch)
        with torch.set_grad_enabled(config.train_llm):
            llm_NH, llm_labels_N = target_hidden_states(llm_trunk, llm_batch)
        slm_teaches_NH = _teacher_hidden(slm_trunk, slm_batch, slm_NH)
        llm_teaches_NH = _teacher_hidden(llm_trunk, llm_batch, llm_NH)
        losses: list[CoTuningLoss] = []
        aligned = _aligned_rows(tokens, chosen) if isinstance(tokens, AlignedTokens) else (None, None)
        for student_NH, student_head, labels_N, teacher_NH, teacher_head, teacher_labels_N, rows in (
            (slm_NH, slm_head, slm_labels_N, llm_teaches_NH, llm_head, llm_labels_N, aligned[0]),
            (llm_NH, llm_head, llm_labels_N, slm_teaches_NH, slm_head, slm_labels_N, aligned[1]),
        ):
            how: dict[str, Any] = {
                "student_NH": student_NH,
                "student_head": student_head,
                "labels_N": labels_N,
                "teacher_head": teacher_head,
                "kd_weight": config.kd_weight,
                "temperature": config.temperature,
                "direction": config.direction,
                "top_k": config.top_k,
            }
            if rows is None:
                losses.append(co_tuning_loss(teacher_NH=teacher_NH, **how))
            else:
                losses.append(
                    cross_tokenizer_loss(teacher_MH=teacher_NH, teacher_labels_M=teacher_labels_N, aligned=rows, **how)
                )
        for (_, optimizer), loss in zip(sides, losses, strict=True):
            if optimizer is not None:
                optimizer.zero_grad()
                torch.autograd.backward(loss.total)
                optimizer.step()
                optimizer.zero_grad()
        sums += torch.tensor([v for loss in losses for v in (loss.cross_entropy, loss.kl)], dtype=torch.float64)
        on_step()
    slm_ce, slm_kl, llm_ce, llm_kl = (sums / max(1, config.steps)).tolist()
    return CoTuningReport(slm_ce=slm_ce, slm_kl=slm_kl, llm_ce=llm_ce, llm_kl=llm_kl)
