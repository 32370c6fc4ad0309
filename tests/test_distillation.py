"""Co-tuning: two models teach each other, step by step as the paper's equations say, and nobody else moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from secure_fedcollm import distillation
from secure_fedcollm.config import DistillationConfig
from secure_fedcollm.distillation import CoTuningReport, co_tune
from secure_fedcollm.losses import target_hidden_states
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.tokenization import TokenDataset, collate

LoadTiny = Callable[..., AdaptedModel]
RATE = 1e-2


def settings(**changes: Any) -> DistillationConfig:
    return DistillationConfig(
        **{
            "steps": 2,
            "warm_start_steps": 0,
            "batch_size": 3,
            "kd_weight": 1.0,
            "temperature": 1.0,
            "direction": "forward",
            "top_k": None,
            "alignment": "same",
            "train_slm": True,
            "train_llm": True,
            "slm_learning_rate": RATE,
            "llm_learning_rate": RATE,
        }
        | changes
    )


def tune(
    slm: AdaptedModel, llm: AdaptedModel, tokens: TokenDataset, *, train_slm_a: bool = True, **changes: Any
) -> CoTuningReport:
    return co_tune(
        slm=slm,
        llm=llm,
        tokens=tokens,
        config=settings(**changes),
        train_slm_a=train_slm_a,
        seed=11,
        on_step=lambda: None,
    )


def pair(load_tiny: LoadTiny, architecture: str = "llama", **options: Any) -> tuple[AdaptedModel, AdaptedModel]:
    options = {"trained": True} | options
    return load_tiny(architecture, **options), load_tiny(architecture, width=48, **options)


def target_logits(model: nn.Module, tokens: TokenDataset, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Full logits that predict a target and those targets, one unpadded record after the other."""
    rows, labels = [], []
    for position in positions:
        example = tokens.examples[position]
        logits_TV = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        rows.append(logits_TV[example.target_start - 1 : -1])
        labels += example.input_ids[example.target_start :]
    return torch.cat(rows), torch.tensor(labels)


def reference(
    slm: AdaptedModel,
    llm: AdaptedModel,
    tokens: TokenDataset,
    config: DistillationConfig,
    seed: int,
    order: Literal["together", "slm first"] = "together",
) -> list[list[float]]:
    """Equations 4-6 with torch's own losses on full logits, in place; gives slm_ce, slm_kl, llm_ce, llm_kl a step."""
    sides = (slm, llm)
    rates = (config.slm_learning_rate, config.llm_learning_rate)
    optimizers = [torch.optim.Adam(m.train_only(m.spec), lr=r) for m, r in zip(sides, rates, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(config.steps):
        positions = torch.randperm(len(tokens.examples), generator=generator)[: config.batch_size].tolist()
        values, losses = [], []
        for student, teacher, optimizer in ((slm, llm, optimizers[0]), (llm, slm, optimizers[1])):
            student_NV, labels_N = target_logits(student.model, tokens, positions)
            teacher_NV = target_logits(teacher.model, tokens, positions)[0].detach()
            p, q = (torch.log_softmax(x / config.temperature, -1) for x in (teacher_NV, student_NV))
            model, other = (q, p) if config.direction == "forward" else (p, q)
            kl = functional.kl_div(model, other, reduction="batchmean", log_target=True) * config.temperature**2
            ce = functional.cross_entropy(student_NV, labels_N)
            values += [float(ce.detach()), float(kl.detach())]
            losses.append(ce + config.kd_weight * kl)
            if order == "slm first":
                optimizer.zero_grad()
                torch.autograd.backward(losses.pop())
                optimizer.step()
        for optimizer, loss in zip(optimizers, losses, strict=False):
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        history.append(values)
    return history


def far(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Largest difference, in learning rates: Adam moves a coordinate by about one a step."""
    return float(np.abs(one - other).max()) / RATE


@pytest.mark.parametrize("kd_weight", [0.0, 1.0, 5.0])
@pytest.mark.parametrize(("direction", "temperature"), [("forward", 1.0), ("reverse", 2.0)])
def test_every_step_is_that_of_the_equations(
    load_tiny: LoadTiny, tiny_tokens: TokenDataset, kd_weight: float, direction: str, temperature: float
) -> None:
    chosen = {"kd_weight": kd_weight, "direction": direction, "temperature": temperature, "steps": 3}
    slm, llm = pair(load_tiny)
    report = tune(slm, llm, tiny_tokens, **chosen)
    slm_again, llm_again = pair(load_tiny)
    history = reference(slm_again, llm_again, tiny_tokens, settings(**chosen), seed=11)
    assert far(slm.read(), slm_again.read()) < 1e-2
    assert far(llm.read(), llm_again.read()) < 1e-2
    slm_ce, slm_kl, llm_ce, llm_kl = np.mean(history, axis=0)
    if kd_weight == 0:
        slm_kl = llm_kl = 0.0
    want = CoTuningReport(slm_ce=slm_ce, slm_kl=slm_kl, llm_ce=llm_ce, llm_kl=llm_kl)
    assert dataclasses.astuple(report) == pytest.approx(dataclasses.astuple(want), rel=1e-4)


def test_neither_model_sees_the_others_new_step_first(load_tiny: LoadTiny, tiny_tokens: TokenDataset) -> None:
    slm, llm = pair(load_tiny)
    tune(slm, llm, tiny_tokens, steps=3)
    one_after_the_other = pair(load_tiny)
    reference(*one_after_the_other, tiny_tokens, settings(steps=3), seed=11, order="slm first")
    assert far(llm.read(), one_after_the_other[1].read()) > 0.1


def test_both_sides_feel_the_other(load_tiny: LoadTiny, tiny_tokens: TokenDataset) -> None:
    moved = []
    for kd_weight in (0.0, 1.0):
        slm, llm = pair(load_tiny)
        tune(slm, llm, tiny_tokens, steps=1, kd_weight=kd_weight)
        moved.append((slm.read(), llm.read()))
    for without, with_kd in zip(*moved, strict=True):
        assert far(without, with_kd) > 0.1


def test_a_fresh_pair_moves_in_the_first_step(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset
) -> None:
    slm, llm = pair(load_tiny, architecture, trained=False)
    before = slm.read(), llm.read()
    report = tune(slm, llm, tiny_tokens, steps=1)
    assert report.slm_kl > 0
    assert report.llm_kl > 0
    for adapted, old in ((slm, before[0]), (llm, before[1])):
        spec = adapted.shared_spec("rebase")
        assert (adapted.read(spec) != 0).mean() > 0.9
        assert far(adapted.read(), old) == pytest.approx(1.0, rel=1e-2)


def test_both_models_come_closer_to_the_text_and_to_each_other(load_tiny: LoadTiny, tiny_tokens: TokenDataset) -> None:
    slm, llm = pair(load_tiny, trained=False)
    everything = list(range(len(tiny_tokens.examples)))

    def measure() -> list[float]:
        with torch.no_grad():
            (small, labels), (large, _) = (target_logits(m.model.eval(), tiny_tokens, everything) for m in (slm, llm))
        p, q = torch.log_softmax(small, -1), torch.log_softmax(large, -1)
        kl = [float(functional.kl_div(a, b, reduction="batchmean", log_target=True)) for a, b in ((p, q), (q, p))]
        return [*(float(functional.cross_entropy(x, labels)) for x in (small, large)), *kl]

    before = measure()
    tune(slm, llm, tiny_tokens, steps=40, batch_size=8, kd_weight=2.0)
    after = measure()
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True)), (before, after)


@pytest.mark.parametrize("architecture_of_one", ["gpt2", "opt", "llama"])
def test_without_kd_a_model_is_only_fine_tuned(
    load_tiny: LoadTiny, tiny_tokens: TokenDataset, architecture_of_one: str
) -> None:
    slm, llm = pair(load_tiny, architecture_of_one)
    report = tune(slm, llm, tiny_tokens, kd_weight=0.0, steps=3)
    assert (report.slm_kl, report.llm_kl) == (0.0, 0.0)
    again = load_tiny(architecture_of_one, trained=True)
    optimizer = torch.optim.Adam(again.train_only(again.spec), lr=RATE)
    generator = torch.Generator().manual_seed(11)
    for _ in range(3):
        chosen = torch.randperm(len(tiny_tokens.examples), generator=generator)[:3].tolist()
        batch = collate([tiny_tokens.examples[i] for i in chosen], 2)
        optimizer.zero_grad()
        output = again.model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT
        )
        torch.autograd.backward(output.loss)
        optimizer.step()
    assert far(slm.read(), again.read()) < 1e-2


@pytest.mark.parametrize("frozen", ["slm", "llm"])
def test_a_side_that_does_not_learn_is_bit_identical(
    load_tiny: LoadTiny, tiny_tokens: TokenDataset, frozen: str
) -> None:
    slm, llm = pair(load_tiny)
    before = {"slm": slm.read(), "llm": llm.read()}
    tune(slm, llm, tiny_tokens, **{f"train_{frozen}": False})
    after = {"slm": slm.read(), "llm": llm.read()}
    other = "llm" if frozen == "slm" else "slm"
    assert after[frozen].tobytes() == before[frozen].tobytes()
    assert far(after[other], before[other]) > 0.5
    # The side that learns takes the same first step whether or not the other learns too.
    both = pair(load_tiny)
    tune(*both, tiny_tokens, steps=1)
    one = pair(load_tiny)
    tune(*one, tiny_tokens, steps=1, **{f"train_{frozen}": False})
    index = 0 if other == "slm" else 1
    assert (both[index].read() == one[index].read()).all()


def test_freeze_a_trains_b_of_the_slm_and_all_of_the_llm(load_tiny: LoadTiny, tiny_tokens: TokenDataset) -> None:
    slm, llm = pair(load_tiny)
    before = [{n: p.detach().clone() for n, p in m.model.named_parameters()} for m in (slm, llm)]
    tune(slm, llm, tiny_tokens, train_slm_a=False)
    for adapted, old, kept in ((slm, before[0], ("lora_A",)), (llm, before[1], ())):
        for name, parameter in adapted.model.named_parameters():
            stays = "lora_" not in name or any(part in name for part in kept)
            assert torch.equal(parameter, old[name]) == stays, name


# Dropout


DROPOUTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"resid_pdrop": 0.5}),
    ("gpt2", {"attn_pdrop": 0.5}),
    ("gpt2", {"embd_pdrop": 0.5}),
    ("opt", {"dropout": 0.5}),
    ("opt", {"attention_dropout": 0.5}),
    ("llama", {"attention_dropout": 0.5}),
    ("qwen2", {"attention_dropout": 0.5}),
    ("qwen3", {"attention_dropout": 0.5}),
    ("gpt_neox", {"hidden_dropout": 0.5}),
    ("gpt_neox", {"attention_dropout": 0.5}),
    ("llama", {"lora_dropout": 0.5}),
]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What co-tuning hands to its loss."""
    calls: list[dict[str, Any]] = []
    original = distillation.co_tuning_loss

    def recorded(**arguments: Any) -> Any:
        calls.append({name: v.detach().clone() for name, v in arguments.items() if isinstance(v, torch.Tensor)})
        return original(**arguments)

    monkeypatch.setattr(distillation, "co_tuning_loss", recorded)
    return calls


@pytest.mark.parametrize(("architecture_of_one", "dropout"), DROPOUTS)
def test_teachers_have_no_dropout_and_students_do(
    load_tiny: LoadTiny,
    tiny_tokens: TokenDataset,
    seen: list[dict[str, Any]],
    architecture_of_one: str,
    dropout: dict[str, float],
) -> None:
    torch.manual_seed(0)
    slm, llm = pair(load_tiny, architecture_of_one, **dropout)
    chosen = torch.randperm(len(tiny_tokens.examples), generator=torch.Generator().manual_seed(11))[:3].tolist()
    batch = collate([tiny_tokens.examples[i] for i in chosen], tiny_tokens.pad_token_id)
    sure = []
    for adapted in (slm, llm):
        adapted.model.eval()
        with torch.no_grad():
            sure.append(target_hidden_states(adapted.trunk_and_head()[0], batch)[0])
    tune(slm, llm, tiny_tokens, steps=2)
    of_slm, of_llm, *second = seen
    assert torch.equal(of_llm["teacher_NH"], sure[0])
    assert torch.equal(of_slm["teacher_NH"], sure[1])
    assert not torch.allclose(of_slm["student_NH"], sure[0], atol=1e-2)
    assert not torch.allclose(of_llm["student_NH"], sure[1], atol=1e-2)
    # In the next step too: the same model and batch, as student and as teacher.
    assert not torch.allclose(second[0]["student_NH"], second[1]["teacher_NH"], atol=1e-2)
    assert not torch.allclose(second[1]["student_NH"], second[0]["teacher_NH"], atol=1e-2)


def test_without_dropout_each_model_runs_once_a_step(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset
) -> None:
    slm, llm = pair(load_tiny, architecture)
    runs = {"slm": 0, "llm": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            runs[name] += 1

        return hook

    slm.trunk_and_head()[0].register_forward_hook(count("slm"))
    llm.trunk_and_head()[0].register_forward_hook(count("llm"))
    tune(slm, llm, tiny_tokens, steps=0)
    checks = dict(runs)
    tune(slm, llm, tiny_tokens, steps=4)
    assert {name: runs[name] - 2 * checks[name] for name in runs} == {"slm": 4, "llm": 4}


# Batches


def test_the_side_the_tokenizer_pads_on_does_not_matter(load_tiny: LoadTiny, tiny_tokens: TokenDataset) -> None:
    results = []
    for side in ("left", "right"):
        slm, llm = pair(load_tiny, "gpt2")
        slm.tokenizer.padding_side = llm.tokenizer.padding_side = side
        tune(slm, llm, tiny_tokens)
        results.append((slm.read(), llm.read()))
    for left, right in zip(*results, strict=True):
        assert left.tobytes() == right.tobytes()


def test_the_pad_token_does_not_matter(load_tiny: LoadTiny, tiny_tokens: TokenDataset) -> None:
    results = []
    for pad_token_id in (0, 99):
        slm, llm = pair(load_tiny, "gpt2")
        tune(slm, llm, dataclasses.replace(tiny_tokens, pad_token_id=pad_token_id))
        results.append(slm.read())
    assert far(*results) < 1e-2


def test_the_same_seed_gives_the_same_models(load_tiny: LoadTiny, tiny_tokens: TokenDataset) -> None:
    first, second = pair(load_tiny), pair(load_tiny)
    torch.manual_seed(1)
    tune(*first, tiny_tokens)
    torch.manual_seed(2)
    tune(*second, tiny_tokens)
    assert all(a.read().tobytes() == b.read().tobytes() for a, b in zip(first, second, strict=True))


def test_steps_are_told_and_a_batch_may_be_larger_than_the_public_set(
    load_tiny: LoadTiny, tiny_tokens: TokenDataset, seen: list[dict[str, Any]]
) -> None:
    slm, llm = pair(load_tiny)
    told: list[None] = []
    co_tune(
        slm=slm,
        llm=llm,
        tokens=tiny_tokens,
        config=settings(steps=3, batch_size=100),
        train_slm_a=True,
        seed=0,
        on_step=lambda: told.append(None),
    )
    assert len(told) == 3
    targets = sum(len(e.input_ids) - e.target_start for e in tiny_tokens.examples)
    assert [len(call["labels_N"]) for call in seen] == [targets] * 6
