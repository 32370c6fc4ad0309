"""Losses: per-record cross-entropy for the sites, and cross-entropy with KL fused with the heads for the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import nn
from torch.nn import functional

from secure_fedcollm.tokenization import Batch

__all__ = ["CoTuningLoss", "co_tuning_loss", "divergence_N", "fused_loss", "per_record_loss", "target_hidden_states"]

T = TypeVar("T")
# What a chunk's rows add beside cross-entropy, from their logits, their labels, and what they are compared with.
Divergence: TypeAlias = Callable[[torch.Tensor, torch.Tensor, T], torch.Tensor | None]

# Rows of logits held at once: 128 x 50k x 4 bytes = 26 MB per model.
CHUNK_ROWS = 128


def per_record_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy in nats, float32 [B]: for each record the mean over its own target tokens.

    The usual mean over all tokens of a batch divides every record by the others' lengths, which breaks the bound on
    one record's influence (2.24 C measured); this does not. A record without targets gets 0.

    Args:
        model: gives ``logits`` [B, T, V]; position t predicts token t + 1.
        batch: right-padded, ``labels_BT`` is -100 outside targets.
    """
    logits_BTV = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits
    shifted_labels = batch.labels_BT[:, 1:]
    token_loss_BT = functional.cross_entropy(
        logits_BTV[:, :-1].float().transpose(1, 2), shifted_labels, ignore_index=-100, reduction="none"
    )
    targets_B = (shifted_labels != -100).sum(1)
    return token_loss_BT.sum(1) / targets_B.clamp(min=1)


def target_hidden_states(trunk: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that predict a target token, [N, H], and those tokens, int64 [N]: shifted exactly like the loss."""
    hidden_BTH = trunk(
        input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
    ).last_hidden_state
    labels_BT = batch.labels_BT[:, 1:].to(hidden_BTH.device)  # a spread model ends elsewhere than it begins
    keep_BT = labels_BT != -100
    return hidden_BTH[:, :-1][keep_BT], labels_BT[keep_BT]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoTuningLoss:
    """One side's loss on one batch, means over target tokens, in nats.

    Attributes:
        total: ce + kd_weight * kl, with gradient into the student's hidden states.
        cross_entropy: detached.
        kl: detached; already scaled by temperature squared.
    """

    total: torch.Tensor
    cross_entropy: float
    kl: float


def _kl_N(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float, direction: str, top_k: int | None
) -> torch.Tensor:
    student = functional.log_softmax(student_NV / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_NV / temperature, dim=-1)
    return divergence_N(student, teacher, direction, top_k) * temperature**2


def divergence_N(student: torch.Tensor, teacher: torch.Tensor, direction: str, top_k: int | None) -> torch.Tensor:
    """KL in nats of every row, [N], from log-probabilities [N, V] of the same events.

    Args:
        direction: ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher).
        top_k: null, or keep the teacher's k largest and one rest bucket.
    """
    if top_k is not None and top_k < teacher.shape[-1]:
        # The rest of the vocabulary becomes one bucket, so that both stay distributions and KL is a lower bound.
        index = teacher.topk(top_k, dim=-1).indices
        student, teacher = (_with_rest(x, index) for x in (student, teacher))
    log_p, log_q = (teacher, student) if direction == "forward" else (student, teacher)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _with_rest(log_probabilities: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    rest = log_probabilities.scatter(-1, index, float("-inf")).logsumexp(-1, keepdim=True)
    # A finite floor: with all mass in the top k, 0 * log 0 would be NaN.
    return torch.cat([log_probabilities.gather(-1, index), rest.clamp(min=-80.0)], dim=-1)


class _Fused(torch.autograd.Function):
    """Head and losses chunk by chunk, gradient taken in the forward pass, so that N x V is never held."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NH: torch.Tensor,
        student_head: nn.Module,
        labels_N: torch.Tensor,
        kd_weight: float,
        chunks: Iterable[tuple[int, int, T]],
        divergence: Divergence[T],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = labels_N.numel()
        gradient_NH = torch.empty_like(student_NH)
        cross_entropy = torch.zeros((), device=student_NH.device)
        kl = torch.zeros((), device=student_NH.device)
        for start, stop, compared in chunks:
            rows = slice(start, stop)
            with torch.enable_grad():
                hidden = student_NH[rows].detach().requires_grad_()
                logits_NV = student_head(hidden).float()
                labels_here_N = labels_N[rows].to(logits_NV.device)
                ce = functional.cross_entropy(logits_NV, labels_here_N, reduction="sum") / count
                loss, told = ce, divergence(logits_NV, labels_here_N, compared)
                if told is not None:
                    loss = ce + kd_weight * told
                    kl += told.detach().to(kl.device)
                (gradient_NH[rows],) = torch.autograd.grad(loss, hidden)
            cross_entropy += ce.detach().to(cross_entropy.device)
        ctx.save_for_backward(gradient_NH)
        ctx.mark_non_differentiable(cross_entropy, kl)
        return cross_entropy + kd_weight * kl, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient_NH,) = ctx.saved_tensors
        return (gradients[0] * gradient_NH, *(None,) * 5)


def fused_loss(
    student_NH: torch.Tensor,
    student_head: nn.Module,
    labels_N: torch.Tensor,
    kd_weight: float,
    chunks: Iterable[tuple[int, int, T]],
    divergence: Divergence[T],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CE(student, y), mean over all N targets, + kd_weight * the sum of what ``divergence`` gives; its two parts.

    Args:
        chunks: start and stop of consecutive rows that together are all N, and what they are compared with.
        divergence: the chunk's share, from its logits [n, V], labels [n] and what it is compared with; its gradient is
            taken for the logits alone. None adds nothing.
    """
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    parts = _Fused.apply(student_NH, student_head, labels_N, kd_weight, chunks, divergence)  # type: ignore[no-untyped-call]
    return parts


def co_tuning_loss(
    *,
    student_NH: torch.Tensor,
    student_head: nn.Module,
    teacher_NH: torch.Tensor,
    teacher_head: nn.Module,
    labels_N: torch.Tensor,
    kd_weight: float,
    temperature: float,
    direction: Literal["forward", "reverse"],
    top_k: int | None,
) -> CoTuningLoss:
    """CE(student, y) + kd_weight * KL between teacher and student, both means over the N target tokens.

    FedCoLLM equations 4-6. ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher); the KL is taken
    at ``temperature`` and scaled by its square (Hinton et al. 2015, section 2). The teacher gets no gradient. Heads are
    frozen.
    Where one model's head has padding rows beyond the other's, KL is over the rows both have. The two models may be on
    different devices, and a head on another than its hidden states.

    Args:
        student_NH: hidden states that predict the targets, with gradient.
        student_head: maps [N, H] to logits [N, V].
        teacher_NH: the teacher's hidden states at the same positions.
        teacher_head: likewise.
        labels_N: target tokens, int64.
        top_k: null, or keep the teacher's k largest and one rest bucket.
    """
    count, teacher_NH = labels_N.numel(), teacher_NH.detach()

    def divergence(logits_NV: torch.Tensor, labels_here_N: torch.Tensor, rows: slice) -> torch.Tensor | None:
        if kd_weight == 0:
            return None
        with torch.no_grad():
            teacher_NV = teacher_head(teacher_NH[rows]).to(logits_NV.device).float()
        width = min(logits_NV.shape[-1], teacher_NV.shape[-1])
        return _kl_N(logits_NV[:, :width], teacher_NV[:, :width], temperature, direction, top_k).sum() / count

    edges = ((start, min(start + CHUNK_ROWS, count)) for start in range(0, count, CHUNK_ROWS))
    chunks = ((start, stop, slice(start, stop)) for start, stop in edges)
    total, cross_entropy, kl = fused_loss(student_NH, student_head, labels_N, kd_weight, chunks, divergence)
    return CoTuningLoss(total=total, cross_entropy=float(cross_entropy), kl=float(kl))
