"""Co-tuning loss between models with different tokenizers: KL over the events that both can tell of.

A span (see `alignment`) is the same text after the same text. Where it is one token on both sides and both know that
token, the two distributions of the next token are compared over the tokens that both vocabularies hold and one event
for the rest. Any other span is one event, the text as each tokenizer writes it, and its opposite; its likelihood is the
product over its tokens. This is Common-Support Distillation (Yang et al. 2026), with only the observed tokens in spans
of unequal length, as Approximate Likelihood Matching has it (Minixhofer et al. 2025). Where all tokens are shared it is
the ordinary KL, exactly. Why this and not another, and where it ends: docs/distillation.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from secure_fedcollm import losses
from secure_fedcollm.losses import CoTuningLoss, divergence_N, fused_loss

__all__ = ["AlignedRows", "cross_tokenizer_loss", "span_divergences"]

# The least log-probability that is told apart from zero; as in `losses`.
FLOOR = -80.0
# The most that a span's likelihood counts as, so that its opposite keeps a logarithm.
CEILING = -1e-6
# A chunk's first row, and the spans that lie in it.
_Held: TypeAlias = tuple[int, list[Sequence[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedRows:
    """What is compared between N rows of the student and M rows of the teacher.

    Attributes:
        spans_S4: int64 [S, 4] on the CPU: student's start and stop, teacher's start and stop; ascending, no overlap.
        student_ids: tokens that both know, int64 [C], in the student's vocabulary.
        teacher_ids: the same in the teacher's.
    """

    spans_S4: torch.Tensor
    student_ids: torch.Tensor
    teacher_ids: torch.Tensor


def span_divergences(
    *,
    student_NV: torch.Tensor,
    labels_N: torch.Tensor,
    teacher_MU: torch.Tensor,
    teacher_labels_M: torch.Tensor,
    aligned: AlignedRows,
    temperature: float,
    direction: Literal["forward", "reverse"],
    top_k: int | None,
) -> torch.Tensor:
    """The divergence of every span, [S] in nats, scaled by temperature squared.

    Both are taken at ``temperature``. The order of spans is kept.

    Args:
        student_NV: logits that predict the student's target tokens.
        labels_N: those tokens.
        teacher_MU: the teacher's logits, detached here.
        teacher_labels_M: its target tokens.
        aligned: which rows say the same.
        temperature: > 0.
        direction: ``forward`` is KL(teacher || student).
        top_k: null, or keep the teacher's k likeliest events where a token is compared, and one for the rest.
    """
    device, spans_S4 = student_NV.device, aligned.spans_S4
    student = functional.log_softmax(student_NV / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_MU.detach() / temperature, dim=-1)
    student_ids, teacher_ids = aligned.student_ids.to(device), aligned.teacher_ids.to(device)
    first, last, teacher_first, teacher_last = spans_S4.to(device).unbind(1)
    partner = torch.full((student_NV.shape[-1],), -1, device=device)
    partner[student_ids] = teacher_ids
    token_S = (last - first == 1) & (teacher_last - teacher_first == 1)
    token_S &= partner[labels_N[first]] == teacher_labels_M[teacher_first]
    text_S = ~token_S
    result_S = student.new_zeros(len(spans_S4))
    student_events, teacher_events = (
        _events(student[first[token_S]], student_ids),
        _events(teacher[teacher_first[token_S]], teacher_ids),
    )
    if student_events.shape[-1] != teacher_events.shape[-1]:
        student_events, teacher_events = (_padded(x, len(student_ids) + 1) for x in (student_events, teacher_events))
    result_S = result_S.masked_scatter(token_S, divergence_N(student_events, teacher_events, direction, top_k))
    told_S = _told(student.gather(1, labels_N[:, None])[:, 0], spans_S4[:, :2])[text_S]
    teacher_told_S = _told(teacher.gather(1, teacher_labels_M[:, None])[:, 0], spans_S4[:, 2:])[text_S]
    result_S = result_S.masked_scatter(text_S, divergence_N(_or_not(told_S), _or_not(teacher_told_S), direction, None))
    return result_S * temperature**2


def _events(log_NV: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The shared tokens, and the rest as one event unless there is none."""
    others = torch.ones(log_NV.shape[-1], dtype=torch.bool, device=log_NV.device)
    others[ids] = False
    if not others.any():
        return log_NV[:, ids]
    rest = log_NV[:, others].logsumexp(-1, keepdim=True).clamp(min=FLOOR)
    return torch.cat([log_NV[:, ids], rest], dim=-1)


def _padded(log_NC: torch.Tensor, width: int) -> torch.Tensor:
    return functional.pad(log_NC, (0, width - log_NC.shape[-1]), value=FLOOR)


def _told(log_N: torch.Tensor, spans_S2: torch.Tensor) -> torch.Tensor:
    """Log-likelihood of every span's tokens, [S]."""
    lengths_S = spans_S2[:, 1] - spans_S2[:, 0]
    owner = torch.arange(len(spans_S2)).repeat_interleave(lengths_S)
    within = torch.arange(len(owner)) - (lengths_S.cumsum(0) - lengths_S).repeat_interleave(lengths_S)
    rows = spans_S2[:, 0].repeat_interleave(lengths_S) + within
    told_S = log_N.new_zeros(len(spans_S2))
    return told_S.index_add(0, owner.to(log_N.device), log_N[rows.to(log_N.device)])


def _or_not(log_S: torch.Tensor) -> torch.Tensor:
    """An event's logarithm and its opposite's, [S, 2]."""
    log_S = log_S.clamp(min=FLOOR, max=CEILING)
    return torch.stack([log_S, torch.log(-torch.expm1(log_S))], dim=-1)


def _chunks(count: int, spans: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, list[Sequence[int]]]]:
    """Rows of the student in order, with the spans that lie in them; neither side has more than a chunk of rows."""
    size, start, held = losses.CHUNK_ROWS, 0, list[Sequence[int]]()
    for span in spans:
        if held and (span[1] - start > size or span[3] - held[0][2] > size):
            yield start, held[-1][1], held
            start, held = held[-1][1], []
        while span[1] - start > size and start < span[0]:
            stop = min(start + size, span[0])
            yield start, stop, []
            start = stop
        held.append(span)
    if held:
        yield start, held[-1][1], held
        start = held[-1][1]
    for first in range(start, count, size):
        yield first, min(first + size, count), []


def cross_tokenizer_loss(
    *,
    student_NH: torch.Tensor,
    student_head: nn.Module,
    labels_N: torch.Tensor,
    teacher_MH: torch.Tensor,
    teacher_head: nn.Module,
    teacher_labels_M: torch.Tensor,
    aligned: AlignedRows,
    kd_weight: float,
    temperature: float,
    direction: Literal["forward", "reverse"],
    top_k: int | None,
) -> CoTuningLoss:
    """CE(student, y), mean over its N target tokens, + kd_weight * mean over spans of `span_divergences`.

    The teacher gets no gradient. Heads are frozen. Without spans the divergence is 0.

    Args:
        student_NH: hidden states that predict the student's targets, with gradient.
        student_head: maps [N, H] to logits [N, V].
        labels_N: the student's target tokens, int64.
        teacher_MH: the teacher's hidden states, at its own target tokens of the same records.
        teacher_head: likewise.
        teacher_labels_M: those tokens.
        aligned: which rows say the same, and which tokens both know.
        kd_weight: lambda.
        temperature: see `span_divergences`.
        direction: likewise.
        top_k: likewise.
    """
    count, spans = labels_N.numel(), aligned.spans_S4.tolist() if kd_weight > 0 else []
    teacher_MH = teacher_MH.detach()

    def divergence(logits_NV: torch.Tensor, labels_here_N: torch.Tensor, held: _Held) -> torch.Tensor | None:
        start, here = held
        if not here:
            return None
        first, last = here[0][2], here[-1][3]
        with torch.no_grad():
            teacher_MU = teacher_head(teacher_MH[first:last]).to(logits_NV.device).float()
        told_S = span_divergences(
            student_NV=logits_NV,
            labels_N=labels_here_N,
            teacher_MU=teacher_MU,
            teacher_labels_M=teacher_labels_M[first:last].to(logits_NV.device),
            aligned=replace(aligned, spans_S4=torch.tensor(here) - torch.tensor([start, start, first, first])),
            temperature=temperature,
            direction=direction,
            top_k=top_k,
        )
        return told_S.sum() / len(spans)

    chunks = ((start, stop, (start, held)) for start, stop, held in _chunks(count, spans))
    total, cross_entropy, kl = fused_loss(student_NH, student_head, labels_N, kd_weight, chunks, divergence)
    return CoTuningLoss(total=total, cross_entropy=float(cross_entropy), kl=float(kl))
