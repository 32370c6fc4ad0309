"""Every supported architecture takes a private step and a co-tuning step, and both are what they should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcollm_privacy.clipping import ClippedSum, clipped_sum
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.messages import AdapterSpec
from fedcollm_privacy.per_sample import clear_gradients, per_sample_gradients, trainable
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom
from fedcollm_privacy.reservation import Reservation
from secure_fedcollm.config import DistillationConfig
from secure_fedcollm.distillation import co_tune
from secure_fedcollm.losses import per_record_loss
from secure_fedcollm.models import AdaptedModel, merged_delta
from secure_fedcollm.tokenization import TokenDataset, collate, physical_batches
from secure_fedcollm.training import LocalTraining, Paid, prove_records_independent, train_non_private, train_private

LoadTiny = Callable[..., AdaptedModel]
HOW = LocalTraining(learning_rate=1e-2, batch_tokens=120)


def plan(**changes: Any) -> DpPlan:
    fields: dict[str, Any] = {
        "unit": "record",
        "max_records_per_unit": 1,
        "max_grad_norm": 0.5,
        "noise_multiplier": 2.0,
        "sample_rate": Fraction(1, 2),
        "expected_batch_size": 4,
        "steps_per_round": 1,
        "rounds": 1,
        "delta": 1e-3,
    }
    return DpPlan(**(fields | changes))


def losses_of(adapted: AdaptedModel, tokens: TokenDataset) -> Callable[[Sequence[int]], torch.Tensor]:
    return lambda records: per_record_loss(
        adapted.model, collate([tokens.examples[i] for i in records], tokens.pad_token_id)
    )


def one_by_one(
    adapted: AdaptedModel, parameters: list[torch.nn.Parameter], tokens: TokenDataset
) -> list[list[torch.Tensor]]:
    """Every record's gradient by a plain backward pass of its own through transformers' loss."""
    gradients = []
    for example in tokens.examples:
        ids = torch.tensor([example.input_ids])
        labels = ids.clone()
        labels[:, : example.target_start] = -100
        loss = adapted.model(input_ids=ids, labels=labels).loss
        gradients.append([g.detach() for g in torch.autograd.grad(loss, parameters)])
    return gradients


@pytest.mark.parametrize("aggregation", ["rebase", "factor_average"])
def test_per_record_gradients_equal_one_record_backward(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset, aggregation: Any
) -> None:
    adapted = load_tiny(architecture, trained=True)
    adapted.model.double().train()
    parameters = adapted.train_only(adapted.shared_spec(aggregation))
    want = one_by_one(adapted, parameters, tiny_tokens)
    records = list(range(len(tiny_tokens.examples)))
    with per_sample_gradients(adapted.model, len(records)):
        torch.autograd.backward(losses_of(adapted, tiny_tokens)(records).sum())
        got: list[torch.Tensor] = [p.grad_sample.detach().clone() for p in parameters]  # type: ignore[attr-defined]
    for record, gradients in enumerate(want):
        whole = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for ours, theirs in zip(got, gradients, strict=True):
            assert float((ours[record] - theirs).norm()) <= 1e-6 * whole


def test_the_clipped_sum_is_that_of_gradients_taken_one_by_one(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset
) -> None:
    adapted = load_tiny(architecture, trained=True)
    parameters = adapted.train_only(adapted.shared_spec("rebase"))
    singles = one_by_one(adapted, parameters, tiny_tokens)
    norms = [math.sqrt(sum(float(g.square().sum()) for g in gradients)) for gradients in singles]
    bound = sorted(norms)[3]
    lengths = [len(e.input_ids) for e in tiny_tokens.examples]
    summed = clipped_sum(
        model=adapted.model,
        plan=plan(max_grad_norm=bound),
        units=[[i] for i in range(len(lengths))],
        record_loss=losses_of(adapted, tiny_tokens),
        physical_batches=lambda _: physical_batches(lengths, 60),
    )
    got = {id(p): g for p, g in zip(trainable(adapted.model), _pieces(summed, adapted.model), strict=True)}
    for index, parameter in enumerate(parameters):
        want = sum(g[index] * min(1.0, bound / norm) for g, norm in zip(singles, norms, strict=True))
        assert torch.allclose(got[id(parameter)], torch.as_tensor(want).double(), atol=1e-4 * bound)


def _pieces(summed: ClippedSum, model: torch.nn.Module) -> list[torch.Tensor]:
    flat = torch.from_numpy(summed.grid * summed.grid_step)
    parameters = trainable(model)
    return [g.reshape(p.shape) for g, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]


@pytest.fixture(scope="module")
def paid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, DpPlan]:
    ledger, chosen = (
        Ledger(tmp_path_factory.mktemp("ledger") / "site.sqlite", SigningKey.generate("site")),
        plan(rounds=20),
    )
    ledger.commit_plan(run_id="run", data_set="questions", plan=chosen, caps=(Cap(epsilon=50.0, delta=0.1),))
    return ledger, chosen


def paid_by(
    adapted: AdaptedModel, tokens: TokenDataset, chosen: DpPlan, reservation: Reservation, spec: AdapterSpec
) -> Paid:
    independence = prove_records_independent(adapted, spec, tokens.pad_token_id)
    return Paid(plan=chosen, reservation=reservation, independence=independence, random=SecureRandom())


@pytest.mark.parametrize("aggregation", ["rebase", "factor_average"])
def test_one_private_step_moves_the_adapter_and_nothing_else(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset, paid: tuple[Ledger, DpPlan], aggregation: Any
) -> None:
    adapted, (ledger, chosen) = load_tiny(architecture), paid
    spec, start = adapted.shared_spec(aggregation), adapted.read()
    others = {n: p.detach().clone() for n, p in adapted.model.named_parameters() if n not in spec.names}
    reservation = ledger.reserve(run_id="run", plan=chosen, server_round=1)
    steps: list[None] = []
    update = train_private(
        adapted=adapted,
        spec=spec,
        tokens=tiny_tokens,
        paid=paid_by(adapted, tiny_tokens, chosen, reservation, spec),
        how=HOW,
        on_step=lambda: steps.append(None),
    )
    assert len(steps) == reservation.steps == 1
    assert update.reservation == reservation.entry
    # A first step of Adam moves a coordinate by the learning rate, whatever its gradient is, unless that is near 0.
    assert np.isclose(np.abs(update.vector), HOW.learning_rate, rtol=1e-3).mean() > 0.99
    assert all((delta != 0).any() for delta in merged_delta(adapted).values())
    parameters = dict(adapted.model.named_parameters())
    assert all(torch.equal(parameters[name], old) for name, old in others.items())
    adapted.write(start)
    assert (adapted.read() == start).all()


def test_one_plain_step_moves_the_adapter(load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset) -> None:
    adapted = load_tiny(architecture)
    spec = adapted.shared_spec("rebase")
    update = train_non_private(
        adapted=adapted, spec=spec, tokens=tiny_tokens, steps=1, batch_size=4, seed=0, how=HOW, on_step=lambda: None
    )
    assert update.reservation == "non-private"
    assert (np.abs(update.vector) > 0.9 * HOW.learning_rate).mean() > 0.9
    assert all((delta != 0).any() for delta in merged_delta(adapted).values())


def test_one_co_tuning_step_moves_both_models(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset
) -> None:
    slm, llm = load_tiny(architecture), load_tiny(architecture, width=48)
    config = DistillationConfig(
        steps=1,
        warm_start_steps=0,
        batch_size=4,
        kd_weight=1.0,
        temperature=1.0,
        direction="forward",
        top_k=None,
        alignment="same",
        train_slm=True,
        train_llm=True,
        slm_learning_rate=1e-2,
        llm_learning_rate=1e-2,
    )
    report = co_tune(
        slm=slm, llm=llm, tokens=tiny_tokens, config=config, train_slm_a=True, seed=0, on_step=lambda: None
    )
    assert all(math.isfinite(v) and v > 0 for v in (report.slm_ce, report.slm_kl, report.llm_ce, report.llm_kl))
    for adapted in (slm, llm):
        assert all((delta != 0).any() for delta in merged_delta(adapted).values())
        assert np.isfinite(adapted.read()).all()


@pytest.mark.parametrize("aggregation", ["rebase", "factor_average"])
def test_all_linear_layers_are_private_too(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset, aggregation: Any
) -> None:
    """OPT flattens batch and time before its feed-forward layers; Opacus' hooks would clip each token (2.94 C)."""
    adapted = load_tiny(architecture, trained=True, target_modules=["all-linear"])
    parameters = adapted.train_only(adapted.shared_spec(aggregation))
    want = one_by_one(adapted, parameters, tiny_tokens)
    for got, theirs in zip(per_record(adapted, parameters, tiny_tokens), want, strict=True):
        whole = math.sqrt(sum(float(g.square().sum()) for g in theirs))
        assert all(float((one - two).norm()) <= 1e-5 * whole for one, two in zip(got, theirs, strict=True))


def per_record(
    adapted: AdaptedModel, parameters: list[torch.nn.Parameter], tokens: TokenDataset
) -> list[list[torch.Tensor]]:
    """Every record's gradient, all records in one padded batch, by the step's own way."""
    records = range(len(tokens.examples))
    with per_sample_gradients(adapted.model, len(records)):
        torch.autograd.backward(losses_of(adapted, tokens)(records).sum())
    samples: list[torch.Tensor] = [p.grad_sample.clone() for p in parameters]  # type: ignore[attr-defined]
    clear_gradients(parameters)
    return [[sample[record] for sample in samples] for record in records]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset, use_reentrant: bool
) -> None:
    adapted = load_tiny(architecture, trained=True, activation_checkpointing=not use_reentrant)
    parameters = adapted.train_only(adapted.shared_spec("factor_average"))
    adapted.model.double().train()
    want = one_by_one(adapted, parameters, tiny_tokens)
    calls: list[None] = []
    handle = next(m for n, m in adapted.model.named_modules() if "lora_B" in n and n.endswith("default"))
    handle.register_forward_pre_hook(lambda *_: calls.append(None))
    if use_reentrant:
        base = adapted.model.get_base_model()
        base.activation_checkpointing_enable({"use_reentrant": True})
        base.enable_input_require_grads()
    got = per_record(adapted, parameters, tiny_tokens)
    assert len(calls) == 2, "the layer must have run again in the backward pass, or nothing was checkpointed"
    for ours, theirs in zip(got, want, strict=True):
        whole = math.sqrt(sum(float(g.square().sum()) for g in theirs))
        assert all(float((one - two).norm()) <= 1e-6 * whole for one, two in zip(ours, theirs, strict=True))


def test_a_bfloat16_base_gives_float32_gradients_of_its_own_function(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset
) -> None:
    """Against the same bfloat16 model one record at a time; what is left is bfloat16's rounding of padded batches."""
    adapted = load_tiny(architecture, trained=True, dtype="bfloat16")
    parameters = adapted.train_only(adapted.shared_spec("rebase"))
    assert {p.dtype for p in parameters} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in adapted.model.parameters()}
    want = []
    for record in range(len(tiny_tokens.examples)):
        loss = losses_of(adapted, tiny_tokens)([record]).sum()
        want.append([g.detach() for g in torch.autograd.grad(loss, parameters)])
    for ours, theirs in zip(per_record(adapted, parameters, tiny_tokens), want, strict=True):
        assert {g.dtype for g in ours} == {torch.float32}
        whole = math.sqrt(sum(float(g.square().sum()) for g in theirs))
        assert all(float((one - two).norm()) <= 0.1 * whole for one, two in zip(ours, theirs, strict=True))


def test_tied_embeddings_change_nothing(load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset) -> None:
    adapted = load_tiny(architecture, trained=True, tie_word_embeddings=True)
    base = adapted.model.get_base_model()
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    adapted.model.double()
    parameters = adapted.train_only(adapted.shared_spec("rebase"))
    want = one_by_one(adapted, parameters, tiny_tokens)
    for ours, theirs in zip(per_record(adapted, parameters, tiny_tokens), want, strict=True):
        whole = math.sqrt(sum(float(g.square().sum()) for g in theirs))
        assert all(float((one - two).norm()) <= 1e-6 * whole for one, two in zip(ours, theirs, strict=True))


def test_real_checkpoints_take_a_private_step(shared_model: Callable[[str], Path], tmp_path: Path) -> None:
    from secure_fedcollm.models import load
    from secure_fedcollm.records import Record
    from secure_fedcollm.tokenization import tokenize

    adapted = load(
        str(shared_model("stories260K")),
        dtype="float32",
        device="cpu",
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=None,
        seed=0,
    )
    records = [Record(prompt="", target=f"Once upon a time {n} frogs sang.", site=None, unit=n) for n in "abcdefgh"]
    tokens = tokenize(records, adapted.tokenizer, max_length=32, append_eos=True)
    ledger, chosen = Ledger(tmp_path / "site.sqlite", SigningKey.generate("site")), plan()
    ledger.commit_plan(run_id="run", data_set="stories", plan=chosen, caps=(Cap(epsilon=50.0, delta=0.1),))
    update = train_private(
        adapted=adapted,
        spec=adapted.shared_spec("rebase"),
        tokens=tokens,
        paid=paid_by(
            adapted,
            tokens,
            chosen,
            ledger.reserve(run_id="run", plan=chosen, server_round=1),
            adapted.shared_spec("rebase"),
        ),
        how=HOW,
        on_step=lambda: None,
    )
    assert np.isclose(np.abs(update.vector), HOW.learning_rate, rtol=1e-3).mean() > 0.99
