"""The loss between two vocabularies equals brute force on full logits, and the ordinary one where all is shared."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from secure_fedcollm import losses
from secure_fedcollm.cross_losses import AlignedRows, cross_tokenizer_loss, span_divergences
from secure_fedcollm.losses import CHUNK_ROWS, CoTuningLoss, co_tuning_loss

N, M, H, V, U = 290, 310, 10, 23, 31
SHARED = 14
SETTINGS = list(product(("forward", "reverse"), (1.0, 2.0), (None, 4)))
Pieces = dict[str, Any]


def pieces(seed: int = 0, count: int = N, teacher_count: int = M) -> Pieces:
    """Random models and labels; spans of one to four tokens a side, half of the 1:1 spans with the same token."""
    generator = torch.Generator().manual_seed(seed)
    heads = nn.Linear(H, V), nn.Linear(H + 3, U, bias=False)
    for parameter in (*heads[0].parameters(), *heads[1].parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    labels_N, teacher_labels_M = (
        torch.randint(0, width, (rows,), generator=generator) for width, rows in ((V, count), (U, teacher_count))
    )
    student_ids, teacher_ids = (torch.randperm(width, generator=generator)[:SHARED] for width in (V, U))
    spans, row, other = [], 0, 0
    while True:
        gap, wide, long = torch.randint(0, 4, (3,), generator=generator).tolist()
        row, other = row + (gap == 3) * 2, other + (gap == 2)
        wide, long = (1, 1) if gap < 2 else (wide + 1, long + 1)
        if row + wide > count or other + long > teacher_count:
            break
        if gap == 0:
            at = int(torch.randint(0, SHARED, (1,), generator=generator))
            labels_N[row], teacher_labels_M[other] = student_ids[at], teacher_ids[at]
        spans.append([row, row + wide, other, other + long])
        row, other = row + wide, other + long
    return {
        "student_NH": torch.randn(count, H, generator=generator, requires_grad=True),
        "student_head": heads[0],
        "labels_N": labels_N,
        "teacher_MH": torch.randn(teacher_count, H + 3, generator=generator, requires_grad=True),
        "teacher_head": heads[1],
        "teacher_labels_M": teacher_labels_M,
        "aligned": AlignedRows(
            spans_S4=torch.tensor(spans).reshape(-1, 4), student_ids=student_ids, teacher_ids=teacher_ids
        ),
    }


def fused(parts: Pieces, **changes: Any) -> CoTuningLoss:
    return cross_tokenizer_loss(
        **parts | {"kd_weight": 1.0, "temperature": 1.0, "direction": "forward", "top_k": None} | changes
    )


def gradient_of(loss: CoTuningLoss, parts: Pieces) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(loss.total, parts["student_NH"])
    return gradient


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return functional.kl_div(q.log(), p, reduction="sum")


def naive(
    parts: Pieces, student_NV: torch.Tensor, temperature: float, direction: str, top_k: int | None
) -> torch.Tensor:
    """Span by span, event by event, in float64."""
    student = torch.softmax(student_NV / temperature, -1)
    teacher = torch.softmax(parts["teacher_head"](parts["teacher_MH"]).detach().double() / temperature, -1)
    pairs = list(zip(parts["aligned"].student_ids.tolist(), parts["aligned"].teacher_ids.tolist(), strict=True))
    found = []
    for start, stop, first, last in parts["aligned"].spans_S4.tolist():
        labels, teacher_labels = parts["labels_N"][start:stop].tolist(), parts["teacher_labels_M"][first:last].tolist()
        if (tuple(labels), tuple(teacher_labels)) in {((i,), (j,)) for i, j in pairs}:
            q = [student[start, i] for i, _ in pairs]
            p = [teacher[first, j] for _, j in pairs]
            events = [torch.stack([*x, 1 - torch.stack(x).sum()]) for x in (p, q)]
            if top_k is not None:
                kept = events[0].argsort(descending=True)[:top_k]
                events = [torch.cat([x[kept], 1 - x[kept].sum()[None]]) for x in events]
        else:
            told = [
                torch.stack([x[at + i, label] for i, label in enumerate(which)]).prod()
                for x, at, which in ((teacher, first, teacher_labels), (student, start, labels))
            ]
            events = [torch.stack([x, 1 - x]) for x in told]
        found.append((kl(*events) if direction == "forward" else kl(*reversed(events))) * temperature**2)
    return torch.stack(found)


@pytest.mark.parametrize(("direction", "temperature", "top_k"), SETTINGS)
def test_value_and_gradient_equal_brute_force(direction: Any, temperature: float, top_k: int | None) -> None:
    parts = pieces()
    got = fused(parts, kd_weight=1.7, direction=direction, temperature=temperature, top_k=top_k)
    gradient = gradient_of(got, parts)
    hidden = parts["student_NH"].detach().clone().requires_grad_()
    logits_NV = parts["student_head"](hidden)
    divergence = naive(parts, logits_NV.double(), temperature, direction, top_k).mean()
    ce = functional.cross_entropy(logits_NV, parts["labels_N"])
    (wanted,) = torch.autograd.grad(ce + 1.7 * divergence, hidden)
    assert got.cross_entropy == pytest.approx(float(ce.detach()), rel=1e-5)
    assert got.kl == pytest.approx(float(divergence.detach()), rel=1e-4)
    assert float((gradient - wanted).norm()) <= 1e-4 * float(wanted.norm())


@pytest.mark.parametrize(("direction", "temperature", "top_k"), SETTINGS)
def test_gradcheck(direction: Any, temperature: float, top_k: int | None) -> None:
    parts = pieces(1, count=9, teacher_count=12)
    teacher_MU = parts["teacher_head"](parts["teacher_MH"]).detach().double()

    def divergences(student_NV: torch.Tensor) -> torch.Tensor:
        return span_divergences(
            student_NV=student_NV,
            labels_N=parts["labels_N"],
            teacher_MU=teacher_MU,
            teacher_labels_M=parts["teacher_labels_M"],
            aligned=parts["aligned"],
            temperature=temperature,
            direction=direction,
            top_k=top_k,
        )

    student_NV = parts["student_head"](parts["student_NH"]).detach().double().requires_grad_()
    assert len(parts["aligned"].spans_S4) == 4
    assert torch.autograd.gradcheck(divergences, student_NV, fast_mode=True)


def test_where_every_token_is_shared_it_is_the_ordinary_loss() -> None:
    parts = pieces()
    order = torch.randperm(V, generator=torch.Generator().manual_seed(5))
    head = nn.Linear(H + 3, V, bias=False)
    head.weight.data = parts["teacher_head"].weight.data[:V]
    shuffled = nn.Linear(H + 3, V, bias=False)
    shuffled.weight.data[order] = head.weight.data
    rows = torch.arange(N)
    parts |= {
        "teacher_head": shuffled,
        "teacher_MH": parts["teacher_MH"][:N],
        "teacher_labels_M": order[parts["labels_N"]],
        "aligned": AlignedRows(
            spans_S4=torch.stack([rows, rows + 1, rows, rows + 1], 1), student_ids=torch.arange(V), teacher_ids=order
        ),
    }
    for direction, temperature, top_k in SETTINGS:
        how: Pieces = {"kd_weight": 0.7, "direction": direction, "temperature": temperature, "top_k": top_k}
        got = fused(parts, **how)
        ordinary = co_tuning_loss(
            student_NH=parts["student_NH"],
            student_head=parts["student_head"],
            teacher_NH=parts["teacher_MH"],
            teacher_head=head,
            labels_N=parts["labels_N"],
            **how,
        )
        assert (got.cross_entropy, got.kl) == pytest.approx((ordinary.cross_entropy, ordinary.kl), rel=1e-5)
        assert torch.allclose(gradient_of(got, parts), gradient_of(ordinary, parts), atol=1e-7)


def test_the_names_of_tokens_do_not_matter() -> None:
    parts = pieces()
    order = torch.randperm(U, generator=torch.Generator().manual_seed(6))
    head = nn.Linear(H + 3, U, bias=False)
    head.weight.data[order] = parts["teacher_head"].weight.data
    aligned = parts["aligned"]
    renamed = parts | {
        "teacher_head": head,
        "teacher_labels_M": order[parts["teacher_labels_M"]],
        "aligned": AlignedRows(
            spans_S4=aligned.spans_S4, student_ids=aligned.student_ids, teacher_ids=order[aligned.teacher_ids]
        ),
    }
    assert fused(renamed).kl == pytest.approx(fused(parts).kl, rel=1e-5)
    assert torch.allclose(gradient_of(fused(renamed), parts), gradient_of(fused(parts), parts), atol=1e-7)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_model_learns_nothing_from_itself(direction: str) -> None:
    parts = pieces()
    rows = parts["aligned"].spans_S4[:, :2]
    itself = parts | {
        "teacher_MH": parts["student_NH"],
        "teacher_head": parts["student_head"],
        "teacher_labels_M": parts["labels_N"],
        "aligned": AlignedRows(
            spans_S4=torch.cat([rows, rows], 1),
            student_ids=parts["aligned"].student_ids,
            teacher_ids=parts["aligned"].student_ids,
        ),
    }
    assert fused(itself, direction=direction).kl == pytest.approx(0.0, abs=1e-6)
    with_kd, without = (gradient_of(fused(itself, direction=direction, kd_weight=w), parts) for w in (1.0, 0.0))
    assert torch.allclose(with_kd, without, atol=1e-7)


def test_every_compared_row_and_no_other_is_moved_by_the_teacher() -> None:
    parts = pieces()
    for head in (parts["student_head"], parts["teacher_head"]):
        head.weight.data *= 0.3  # so that no span is all but impossible to both
    with_kd, without = (gradient_of(fused(parts, kd_weight=w), parts) for w in (100.0, 0.0))
    compared = torch.zeros(N, dtype=torch.bool)
    for start, stop, _, _ in parts["aligned"].spans_S4.tolist():
        compared[start:stop] = True
    assert 0 < compared.sum() < N
    moved = (with_kd - without).norm(dim=1)
    assert (moved[compared] > 1e-9).all()
    assert (moved[~compared] == 0).all()


def test_the_teacher_and_both_heads_get_no_gradient() -> None:
    parts = pieces()
    torch.autograd.backward(fused(parts).total)
    assert parts["student_NH"].grad is not None
    assert parts["teacher_MH"].grad is None
    assert all(p.grad is None for head in ("student_head", "teacher_head") for p in parts[head].parameters())


def test_merging_events_never_makes_models_look_more_different() -> None:
    parts = pieces()
    order, rows = torch.arange(V), torch.arange(N)
    head = nn.Linear(H + 3, V, bias=False)
    head.weight.data = parts["teacher_head"].weight.data[:V]
    values = []
    for known in (3, 9, V - 1, V):
        aligned = AlignedRows(
            spans_S4=torch.stack([rows, rows + 1, rows, rows + 1], 1)[parts["labels_N"] < 3],
            student_ids=order[:known],
            teacher_ids=order[:known],
        )
        changed = {"teacher_head": head, "teacher_MH": parts["teacher_MH"][:N], "teacher_labels_M": parts["labels_N"]}
        values.append(fused(parts | changed | {"aligned": aligned}).kl)
    assert values == sorted(values)
    assert 0 < values[0] < values[-2] == pytest.approx(values[-1], rel=1e-5)


@pytest.mark.parametrize("rows", [4, 7, 64, 10 * N])
def test_the_chunk_size_changes_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    parts = pieces()
    want = fused(parts)
    wanted = gradient_of(want, parts)
    monkeypatch.setattr(losses, "CHUNK_ROWS", rows)
    got = fused(parts)
    assert (got.cross_entropy, got.kl) == pytest.approx((want.cross_entropy, want.kl), rel=1e-5)
    assert torch.allclose(gradient_of(got, parts), wanted, atol=1e-7)


def test_the_heads_never_see_more_than_a_chunk() -> None:
    parts = pieces(2, count=700, teacher_count=900)
    seen: dict[str, list[int]] = {"student_head": [], "teacher_head": []}
    for name, rows in seen.items():
        parts[name].register_forward_hook(lambda _module, _inputs, output, rows=rows: rows.append(len(output)))
    torch.autograd.backward(fused(parts).total)
    assert sum(seen["student_head"]) == 700
    assert len(seen["student_head"]) >= 700 // CHUNK_ROWS
    assert max(max(rows) for rows in seen.values()) <= CHUNK_ROWS


@pytest.mark.parametrize(("direction", "top_k"), list(product(("forward", "reverse"), (None, 2))))
def test_certain_models_give_finite_losses(direction: str, top_k: int | None) -> None:
    for scale in (1e-3, 500.0):
        parts = pieces()
        for head in (parts["student_head"], parts["teacher_head"]):
            head.weight.data *= scale
        got = fused(parts, direction=direction, top_k=top_k)
        assert torch.isfinite(got.total)
        assert torch.isfinite(gradient_of(got, parts)).all()


def test_without_spans_or_shared_tokens_cross_entropy_is_left() -> None:
    parts = pieces()
    none = AlignedRows(
        spans_S4=torch.empty(0, 4, dtype=torch.long), student_ids=torch.arange(3), teacher_ids=torch.arange(3)
    )
    got = fused(parts | {"aligned": none})
    assert got.kl == 0.0
    assert float(got.total.detach()) == pytest.approx(got.cross_entropy)
    strangers = AlignedRows(
        spans_S4=parts["aligned"].spans_S4,
        student_ids=torch.empty(0, dtype=torch.long),
        teacher_ids=torch.empty(0, dtype=torch.long),
    )
    # Without a common token a span's own likelihood is still compared.
    assert fused(parts | {"aligned": strangers}).kl > 0
