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

from fedcollm_privacy.dp_sgd import noisy_gradient, per_sample_gradients
from fedcollm_privacy.errors import PrivacyViolation
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom
from secure_fedcollm.config import DistillationConfig
from secure_fedcollm.distillation import co_tune
from secure_fedcollm.losses import per_record_loss
from secure_fedcollm.models import AdaptedModel, merged_delta
from secure_fedcollm.tokenization import TokenDataset, collate, physical_batches
from secure_fedcollm.training import LocalTraining, train_non_private, train_private

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
    with per_sample_gradients(adapted.model):
        records = list(range(len(tiny_tokens.examples)))
        torch.autograd.backward(losses_of(adapted, tiny_tokens)(records).sum())
        got: list[torch.Tensor] = [p.grad_sample.detach().clone() for p in parameters]  # type: ignore[attr-defined]
    for record, gradients in enumerate(want):
        whole = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for ours, theirs in zip(got, gradients, strict=True):
            assert float((ours[record] - theirs).norm()) <= 1e-6 * whole


def test_a_private_gradient_is_the_sum_of_clipped_gradients_and_noise(
    load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset
) -> None:
    adapted = load_tiny(architecture, trained=True)
    parameters = adapted.train_only(adapted.shared_spec("rebase"))
    singles = one_by_one(adapted, parameters, tiny_tokens)
    norms = [math.sqrt(sum(float(g.square().sum()) for g in gradients)) for gradients in singles]
    bound = sorted(norms)[3]
    # So little noise that only the sum is seen.
    almost_none = plan(max_grad_norm=bound, noise_multiplier=1e-9)
    lengths = [len(e.input_ids) for e in tiny_tokens.examples]
    with per_sample_gradients(adapted.model):
        noisy_gradient(
            model=adapted.model,
            plan=almost_none,
            units=[[i] for i in range(len(lengths))],
            record_loss=losses_of(adapted, tiny_tokens),
            physical_batches=lambda positions: physical_batches([lengths[i] for i in positions], 60),
            random=SecureRandom(),
        )
    for index, parameter in enumerate(parameters):
        want = sum(g[index] * min(1.0, bound / norm) for g, norm in zip(singles, norms, strict=True)) / 4
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, torch.as_tensor(want), atol=1e-5 * bound)


@pytest.fixture(scope="module")
def paid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, DpPlan]:
    ledger, chosen = Ledger(tmp_path_factory.mktemp("ledger") / "site.sqlite", "site"), plan(rounds=20)
    ledger.commit_plan(run_id="run", data_set="questions", plan=chosen, cap_epsilon=50.0, cap_delta=0.1)
    return ledger, chosen


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
        plan=chosen,
        reservation=reservation,
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
        batch_size=4,
        kd_weight=1.0,
        temperature=1.0,
        direction="forward",
        top_k=None,
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


def test_layers_that_merge_records_with_tokens_are_refused_not_miscounted(
    load_tiny: LoadTiny, tiny_tokens: TokenDataset
) -> None:
    """OPT flattens batch and time before fc1: each token would be clipped as if it were a record (2.94 C measured)."""
    adapted = load_tiny("opt", target_modules=["q_proj", "fc1"])
    adapted.train_only(adapted.shared_spec("rebase"))
    with per_sample_gradients(adapted.model), pytest.raises(PrivacyViolation, match=r"adapter\.target_modules"):
        noisy_gradient(
            model=adapted.model,
            plan=plan(),
            units=[[0], [1], [2]],
            record_loss=losses_of(adapted, tiny_tokens),
            physical_batches=lambda positions: [list(positions)],
            random=SecureRandom(),
        )


def test_all_linear_is_private_too(load_tiny: LoadTiny, architecture: str, tiny_tokens: TokenDataset) -> None:
    if architecture == "opt":
        pytest.skip("OPT's feed-forward layers merge batch and time; the test above shows that they are refused")
    adapted = load_tiny(architecture, trained=True, target_modules=["all-linear"])
    parameters = adapted.train_only(adapted.shared_spec("rebase"))
    want = one_by_one(adapted, parameters, tiny_tokens)
    with per_sample_gradients(adapted.model):
        torch.autograd.backward(losses_of(adapted, tiny_tokens)(range(len(want))).sum())
        for index, parameter in enumerate(parameters):
            ours = parameter.grad_sample  # type: ignore[attr-defined]
            assert torch.allclose(ours, torch.stack([g[index] for g in want]), atol=1e-4)


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
    ledger, chosen = Ledger(tmp_path / "site.sqlite", "site"), plan()
    ledger.commit_plan(run_id="run", data_set="stories", plan=chosen, cap_epsilon=50.0, cap_delta=0.1)
    update = train_private(
        adapted=adapted,
        spec=adapted.shared_spec("rebase"),
        tokens=tokens,
        plan=chosen,
        reservation=ledger.reserve(run_id="run", plan=chosen, server_round=1),
        how=HOW,
        on_step=lambda: None,
    )
    assert np.isclose(np.abs(update.vector), HOW.learning_rate, rtol=1e-3).mean() > 0.99
