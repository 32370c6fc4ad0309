"""Losses equal brute force with torch and transformers, record by record, position by position."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from secure_fedcollm import losses
from secure_fedcollm.losses import CHUNK_ROWS, CoTuningLoss, co_tuning_loss, per_record_loss, target_hidden_states
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.tokenization import Batch, Example, TokenDataset, collate

LoadTiny = Callable[..., AdaptedModel]
N, H, V = 300, 12, 40
SETTINGS = [
    (direction, temperature, kd_weight)
    for direction in ("forward", "reverse")
    for temperature in (1.0, 2.0)
    for kd_weight in (0.0, 1.0, 3.5)
]


# One loss a record


def alone(model: Any, example: Example) -> float:
    """Transformers' own loss of one unpadded record."""
    ids = torch.tensor([example.input_ids])
    labels = ids.clone()
    labels[:, : example.target_start] = -100
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss)


def test_each_record_has_the_loss_it_has_alone(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset
) -> None:
    model = load_tiny(architecture, trained=True).model.eval()
    want = [alone(model, example) for example in tiny_tokens.examples]
    for pad_token_id in (0, 2, 77):
        batch = collate(tiny_tokens.examples, pad_token_id)
        with torch.no_grad():
            assert per_record_loss(model, batch).tolist() == pytest.approx(want, rel=1e-5)
            # The control: the usual loss of a batch is not the mean of its records'.
            usual = model(
                input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT
            ).loss
    assert abs(float(usual) - sum(want) / len(want)) > 1e-3


@pytest.fixture(scope="module")
def llama(load_tiny: LoadTiny) -> AdaptedModel:
    adapted = load_tiny("llama", trained=True)
    adapted.model.eval()
    return adapted


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_record_does_not_depend_on_its_batch(
    llama: AdaptedModel, tiny_tokens: TokenDataset, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, len(tiny_tokens.examples) - 1), min_size=1, max_size=6))
    batch = collate([tiny_tokens.examples[i] for i in positions], 2)
    with torch.no_grad():
        got = per_record_loss(llama.model, batch).tolist()
    assert got == pytest.approx([alone(llama.model, tiny_tokens.examples[i]) for i in positions], rel=1e-5)


def test_a_records_gradient_reaches_no_other_record(llama: AdaptedModel, tiny_tokens: TokenDataset) -> None:
    batch = collate(tiny_tokens.examples, 2)
    parameters = llama.train_only(llama.spec)
    with_others = torch.autograd.grad(per_record_loss(llama.model, batch)[0], parameters)
    by_itself = torch.autograd.grad(per_record_loss(llama.model, collate(tiny_tokens.examples[:1], 2))[0], parameters)
    for one, other in zip(with_others, by_itself, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_record_without_targets_has_no_loss_and_no_gradient(llama: AdaptedModel, tiny_tokens: TokenDataset) -> None:
    batch = collate(tiny_tokens.examples[:2], 2)
    batch.labels_BT[0] = -100
    loss_B = per_record_loss(llama.model, batch)
    assert loss_B[0] == 0
    assert loss_B[1] > 0
    parameters = llama.train_only(llama.spec)
    assert all((g == 0).all() for g in torch.autograd.grad(loss_B[0], parameters))


def test_the_label_at_the_first_position_is_predicted_by_nothing(
    llama: AdaptedModel, tiny_tokens: TokenDataset
) -> None:
    batch = collate(tiny_tokens.examples[:1], 2)
    with torch.no_grad():
        before = per_record_loss(llama.model, batch)
        batch.labels_BT[:, 0] = 7
        assert torch.equal(per_record_loss(llama.model, batch), before)


# Hidden states that predict targets


def test_hidden_states_are_those_before_each_target(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset
) -> None:
    adapted = load_tiny(architecture, trained=True)
    adapted.model.eval()
    trunk, head = adapted.trunk_and_head()
    with torch.no_grad():
        hidden_NH, labels_N = target_hidden_states(trunk, collate(tiny_tokens.examples, 2))
        rows, labels = [], []
        for example in tiny_tokens.examples:
            whole_TH = trunk(input_ids=torch.tensor([example.input_ids])).last_hidden_state[0]
            for position in range(example.target_start, len(example.input_ids)):
                rows.append(whole_TH[position - 1])
                labels.append(example.input_ids[position])
    assert labels_N.tolist() == labels
    assert torch.allclose(hidden_NH, torch.stack(rows), atol=1e-5)
    # With no distillation the loss is transformers' own mean over all target tokens of the batch.
    batch = collate(tiny_tokens.examples, 2)
    with torch.no_grad():
        usual = adapted.model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT
        ).loss
    ours = fused(hidden_NH, head, hidden_NH, head, labels_N, kd_weight=0.0)
    assert ours.cross_entropy == pytest.approx(float(usual), rel=1e-5)


# Cross-entropy and KL, fused with the heads


def fused(
    student_NH: torch.Tensor,
    student_head: nn.Module,
    teacher_NH: torch.Tensor,
    teacher_head: nn.Module,
    labels_N: torch.Tensor,
    **changes: Any,
) -> CoTuningLoss:
    chosen: dict[str, Any] = {"kd_weight": 1.0, "temperature": 1.0, "direction": "forward", "top_k": None} | changes
    return co_tuning_loss(
        student_NH=student_NH,
        student_head=student_head,
        teacher_NH=teacher_NH,
        teacher_head=teacher_head,
        labels_N=labels_N,
        **chosen,
    )


def naive(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, labels_N: torch.Tensor, temperature: float, direction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and KL by torch on full logits, in float64."""
    student, teacher = (torch.log_softmax(x.double() / temperature, -1) for x in (student_NV, teacher_NV))
    model, other = (student, teacher) if direction == "forward" else (teacher, student)
    kl = functional.kl_div(model, other, reduction="batchmean", log_target=True) * temperature**2
    return functional.cross_entropy(student_NV.double(), labels_N), kl


def pieces(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    student_head, teacher_head = nn.Linear(H, V), nn.Linear(H + 5, V, bias=False)
    for parameter in (*student_head.parameters(), *teacher_head.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return {
        "student_NH": torch.randn(N, H, generator=generator, requires_grad=True),
        "student_head": student_head,
        "teacher_NH": torch.randn(N, H + 5, generator=generator, requires_grad=True),
        "teacher_head": teacher_head,
        "labels_N": torch.randint(0, V, (N,), generator=generator),
    }


@pytest.mark.parametrize(("direction", "temperature", "kd_weight"), SETTINGS)
def test_value_and_gradient_equal_full_logits(direction: str, temperature: float, kd_weight: float) -> None:
    parts = pieces()
    got = fused(**parts, direction=direction, temperature=temperature, kd_weight=kd_weight)
    (gradient,) = torch.autograd.grad(got.total, parts["student_NH"])
    student_NH = parts["student_NH"].detach().clone().requires_grad_()
    with torch.no_grad():
        teacher_NV = parts["teacher_head"](parts["teacher_NH"])
    ce, kl = naive(parts["student_head"](student_NH), teacher_NV, parts["labels_N"], temperature, direction)
    want = ce + kd_weight * kl
    (wanted_gradient,) = torch.autograd.grad(want, student_NH)
    assert float(got.total.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert got.cross_entropy == pytest.approx(float(ce.detach()), rel=1e-5)
    assert got.kl == pytest.approx(float(kl.detach()) if kd_weight else 0.0, rel=1e-5)
    assert float((gradient - wanted_gradient).norm()) <= 1e-5 * float(wanted_gradient.norm())


def test_the_gradient_scales_with_what_follows() -> None:
    parts = pieces()
    (once,) = torch.autograd.grad(fused(**parts).total, parts["student_NH"])
    (thrice,) = torch.autograd.grad(3 * fused(**parts).total, parts["student_NH"])
    assert torch.allclose(thrice, 3 * once)


def test_distillation_alone_has_a_gradient() -> None:
    parts = pieces()
    with_kd, without = (
        torch.autograd.grad(fused(**parts, kd_weight=weight).total, parts["student_NH"])[0] for weight in (1.0, 0.0)
    )
    assert ((with_kd - without).norm(dim=1) > 1e-6).all()


def test_the_teacher_and_both_heads_get_no_gradient() -> None:
    parts = pieces()
    torch.autograd.backward(fused(**parts).total)
    assert parts["student_NH"].grad is not None
    assert parts["teacher_NH"].grad is None
    assert all(p.grad is None for head in ("student_head", "teacher_head") for p in parts[head].parameters())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_equal_distributions_have_no_kl(direction: str) -> None:
    parts = pieces() | {"teacher_NH": pieces()["student_NH"], "teacher_head": pieces()["student_head"]}
    for top_k in (None, 3):
        assert fused(**parts, direction=direction, top_k=top_k).kl == pytest.approx(0.0, abs=1e-6)
    with_kd, without = (
        torch.autograd.grad(fused(**parts, direction=direction, kd_weight=w).total, parts["student_NH"])[0]
        for w in (1.0, 0.0)
    )
    assert torch.allclose(with_kd, without, atol=1e-7)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_a_lower_bound_that_grows_to_the_full_kl(direction: str, temperature: float) -> None:
    parts = pieces()
    values = [
        fused(**parts, direction=direction, temperature=temperature, top_k=k).kl for k in (1, 2, 5, 20, V - 1, V, V + 9)
    ]
    full = fused(**parts, direction=direction, temperature=temperature).kl
    assert 0 < values[0] < full
    assert all(small <= large + 1e-5 for small, large in pairwise(values))
    assert values[-3:] == pytest.approx([full] * 3, rel=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_top_k_equals_a_kl_over_buckets(direction: str) -> None:
    parts = pieces()
    got = fused(**parts, direction=direction, top_k=5)
    (gradient,) = torch.autograd.grad(got.total, parts["student_NH"])
    student_NH = parts["student_NH"].detach().clone().requires_grad_()
    student = torch.softmax(parts["student_head"](student_NH).double(), -1)
    teacher = torch.softmax(parts["teacher_head"](parts["teacher_NH"]).detach().double(), -1)
    rows = []
    for p, q in zip(teacher, student, strict=True):
        kept = sorted(range(V), key=lambda i: -float(p[i]))[:5]
        p, q = (torch.cat([x[kept], 1 - x[kept].sum()[None]]) for x in (p, q))
        rows.append((p * (p / q).log()).sum() if direction == "forward" else (q * (q / p).log()).sum())
    kl = torch.stack(rows).mean()
    assert got.kl == pytest.approx(float(kl.detach()), rel=1e-5)
    ce = functional.cross_entropy(parts["student_head"](student_NH), parts["labels_N"])
    (wanted,) = torch.autograd.grad(ce + kl, student_NH)
    assert float((gradient - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_certain_models_give_finite_losses(top_k: int | None, direction: str) -> None:
    parts = pieces()
    for head in (parts["student_head"], parts["teacher_head"]):
        head.weight.data *= 500
    got = fused(**parts, top_k=top_k, direction=direction)
    (gradient,) = torch.autograd.grad(got.total, parts["student_NH"])
    assert torch.isfinite(got.total)
    assert torch.isfinite(gradient).all()


def test_a_teacher_that_excludes_tokens_gives_finite_losses() -> None:
    parts = pieces()
    excluding = nn.Linear(H + 5, V)
    excluding.bias.data[3:] = -torch.inf
    got = fused(**parts | {"teacher_head": excluding}, top_k=3)
    (gradient,) = torch.autograd.grad(got.total, parts["student_NH"])
    assert torch.isfinite(got.total)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("rows", [1, 7, N, 10 * N])
def test_the_chunk_size_changes_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    parts = pieces()
    want = fused(**parts, top_k=6)
    (wanted,) = torch.autograd.grad(want.total, parts["student_NH"])
    monkeypatch.setattr(losses, "CHUNK_ROWS", rows)
    got = fused(**parts, top_k=6)
    (gradient,) = torch.autograd.grad(got.total, parts["student_NH"])
    assert (got.cross_entropy, got.kl) == pytest.approx((want.cross_entropy, want.kl), rel=1e-5)
    assert torch.allclose(gradient, wanted, atol=1e-7)


def test_the_heads_never_see_more_than_a_chunk() -> None:
    parts = pieces()
    seen: list[tuple[int, ...]] = []
    for head in (parts["student_head"], parts["teacher_head"]):
        head.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape)))
    torch.autograd.backward(fused(**parts).total)
    assert N > 2 * CHUNK_ROWS
    assert len(seen) == 2 * -(-N // CHUNK_ROWS)
    assert max(rows for rows, _ in seen) == CHUNK_ROWS


def test_kl_is_a_mean_over_tokens() -> None:
    parts = pieces()
    once = fused(**parts)
    twice = fused(
        **parts
        | {name: parts[name].repeat(*[2] + [1] * (parts[name].dim() - 1)) for name in ("teacher_NH", "labels_N")}
        | {"student_NH": parts["student_NH"].detach().repeat(2, 1).requires_grad_()}
    )
    assert (twice.kl, twice.cross_entropy) == pytest.approx((once.kl, once.cross_entropy), rel=1e-5)


def test_padding_rows_of_one_head_are_left_out_of_the_kl() -> None:
    parts = pieces()
    wider = nn.Linear(H + 5, V + 8, bias=False)
    wider.weight.data = torch.cat([parts["teacher_head"].weight.data, torch.full((8, H + 5), 3.0)])
    assert fused(**parts | {"teacher_head": wider}).kl == pytest.approx(fused(**parts).kl, rel=1e-6)


def test_losses_are_taken_in_float32_over_a_bfloat16_model() -> None:
    parts = pieces()
    halves = {name: value.bfloat16() if name.endswith(("NH", "head")) else value for name, value in parts.items()}
    halves["student_NH"] = halves["student_NH"].detach().requires_grad_()
    got = fused(**halves)
    with torch.no_grad():
        student_NV, teacher_NV = (halves[f"{s}_head"](halves[f"{s}_NH"]).float() for s in ("student", "teacher"))
    ce, kl = naive(student_NV, teacher_NV, parts["labels_N"], 1.0, "forward")
    assert (got.cross_entropy, got.kl) == pytest.approx((float(ce.detach()), float(kl.detach())), rel=1e-5)
    (gradient,) = torch.autograd.grad(got.total, halves["student_NH"])
    assert gradient.dtype == torch.bfloat16
    assert torch.isfinite(gradient).all()


def test_a_batch_may_hold_one_target_only(llama: AdaptedModel) -> None:
    batch = Batch(
        input_ids_BT=torch.tensor([[5, 6]]),
        attention_mask_BT=torch.ones(1, 2, dtype=torch.long),
        labels_BT=torch.tensor([[-100, 6]]),
    )
    hidden_NH, labels_N = target_hidden_states(llama.trunk_and_head()[0], batch)
    assert hidden_NH.shape == (1, 32)
    assert labels_N.tolist() == [6]
