"""The private step against single-record backwards, Opacus' own optimizer, and what an attacker would try.

Every known way in which DP-SGD on text loses its guarantee has a test here that fails when the step has that fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields as fields_of
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from fedcollm_privacy.clipping import RecordLoss
from fedcollm_privacy.clipping import clipped_sum as shipped_clipped_sum
from fedcollm_privacy.dp_sgd import noisy_sum, release_private_gradient, run_private_steps
from fedcollm_privacy.errors import PrivacyViolation, ProtocolError
from fedcollm_privacy.independence import Independence
from fedcollm_privacy.messages import DpTerms, NoisySum, RoundPlan
from fedcollm_privacy.per_sample import per_sample_gradients
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom
from fedcollm_privacy.reservation import Reservation
from secure_fedcollm.losses import per_record_loss
from secure_fedcollm.tokenization import Example, collate

from .secure_sums import round_plan

ALPHA = 1e-7
LATTICE = 2.0**-20
LEFT_BEHIND = ("grad_sample", "_forward_counter", "_current_grad_sample", "summed_grad")
LEFT_ON_MODULES = ("activations", "max_batch_len", "autograd_grad_sample_hooks", "ft_compute_sample_grad")
PROPERTY = settings(max_examples=40, deadline=None)


def plan(**changes: Any) -> DpPlan:
    fields: dict[str, Any] = {
        "unit": "record",
        "max_records_per_unit": 1,
        "max_grad_norm": 0.7,
        "noise_multiplier": 1e-3,
        "sample_rate": Fraction(1),
        "expected_batch_size": 4,
        "steps_per_round": 3,
        "rounds": 1,
        "delta": 1e-5,
    }
    return DpPlan(**(fields | changes))


def person_plan(records: int, **changes: Any) -> DpPlan:
    return plan(unit="person", max_records_per_unit=records, **changes)


class Net(nn.Module):
    """Two trainable layers around a frozen one; inputs [B, 6], targets [B, 3]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.frozen, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.tanh(self.frozen(torch.tanh(self.first(x_BI)))))
        return out


class UsedTwice(Net):
    """One layer at two places of the graph."""

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        once = torch.tanh(self.first(x_BI))
        out: torch.Tensor = self.last(once + torch.tanh(self.first(once[:, :6])))
        return out


def records(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Some far above and some far below the clipping bound.
    scale = 10.0 ** torch.linspace(-2, 1, count).unsqueeze(1)
    return torch.randn(count, 6, generator=generator), scale * torch.randn(count, 3, generator=generator)


def square_loss(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> RecordLoss:
    def losses_B(chosen: Sequence[int]) -> torch.Tensor:
        x_BI, y_BO = data[0][list(chosen)], data[1][list(chosen)]
        return (model(x_BI) - y_BO).square().mean(1)

    return losses_B


def whole(units: Sequence[object]) -> list[list[int]]:
    return [list(range(len(units)))]


def one_by_one(units: Sequence[object]) -> list[list[int]]:
    return [[i] for i in range(len(units))]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def flat(tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors if t is not None])


def brute_force(
    model: nn.Module, loss: RecordLoss, units: Sequence[Sequence[int]], max_grad_norm: float
) -> torch.Tensor:
    """Clipped sum, float64 [d]: one plain backward a record, clipped unit by unit."""
    total = torch.zeros(sum(p.numel() for p in trainable(model)), dtype=torch.float64)
    for unit in units:
        gradient = torch.zeros_like(total)
        for record in unit:
            gradient += flat(torch.autograd.grad(loss([record]).sum(), trainable(model)))
        total += gradient * min(1.0, max_grad_norm / max(float(gradient.norm()), 1e-300))
    return total


def clipped_sum(
    model: nn.Module,
    loss: RecordLoss,
    units: Sequence[Sequence[int]],
    chosen: DpPlan,
    split: Callable[[Sequence[Sequence[int]]], Sequence[Sequence[int]]] = whole,
) -> torch.Tensor:
    """The step's clipped sum, float64 [d]."""
    summed = shipped_clipped_sum(model=model, plan=chosen, units=units, record_loss=loss, physical_batches=split)
    return torch.from_numpy(summed.grid * summed.grid_step)


def assert_close(one: torch.Tensor, two: torch.Tensor, tolerance: float = 2e-6, units: int = 8, c: float = 0.7) -> None:
    """Equal but for float32 and for the lattice, which moves each unit's gradient by C 2^-20 (sqrt(d) + 1) at most."""
    lattice = units * c * LATTICE * (math.sqrt(one.numel()) + 1)
    assert (one - two).norm() <= tolerance * float(two.norm()) + lattice


def singles(count: int) -> list[list[int]]:
    return [[i] for i in range(count)]


# ---------------------------------------------------------------- language models


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return with_lora(LlamaForCausalLM(config), ["q_proj", "k_proj", "v_proj", "o_proj"])


def tiny_opt(targets: list[str]) -> nn.Module:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=48,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        dropout=0.0,
    )
    return with_lora(OPTForCausalLM(config), targets)


def with_lora(base: nn.Module, targets: list[str]) -> nn.Module:
    model: nn.Module = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would leave A without a gradient
                parameter.normal_(std=0.3)
    return model


def examples(lengths: Sequence[tuple[int, int]]) -> list[Example]:
    """Of (prompt tokens, target tokens) each."""
    rng = np.random.default_rng(3)
    return [
        Example(input_ids=tuple(rng.integers(1, 48, prompt + target).tolist()), target_start=prompt, unit=str(i))
        for i, (prompt, target) in enumerate(lengths)
    ]


def text_loss(model: nn.Module, texts: Sequence[Example]) -> RecordLoss:
    return lambda chosen: per_record_loss(model, collate([texts[i] for i in chosen], 0))


def token_mean_loss(model: nn.Module, texts: Sequence[Example]) -> RecordLoss:
    """The usual loss of transformers: one mean over all target tokens of the batch."""

    def losses_B(chosen: Sequence[int]) -> torch.Tensor:
        batch = collate([texts[i] for i in chosen], 0)
        outputs = model(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            labels=batch.labels_BT,
            use_cache=False,
        )
        loss: torch.Tensor = outputs.loss.expand(len(chosen))
        return loss

    return losses_B


MIXED = [(1, 1), (3, 9), (2, 2), (5, 30), (1, 4), (7, 1)]


# ---------------------------------------------------------------- gradients and clipping


@pytest.mark.parametrize("kind", ["net", "used twice", "llama", "opt"])
@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.7, 1e3])
def test_the_clipped_sum_is_that_of_single_record_backwards(kind: str, max_grad_norm: float) -> None:
    model: nn.Module
    if kind in ("llama", "opt"):
        model = tiny_llama() if kind == "llama" else tiny_opt(["q_proj", "out_proj"])
        loss = text_loss(model, examples(MIXED))
    else:
        model = Net() if kind == "net" else UsedTwice()
        loss = square_loss(model, records(6))
    chosen = plan(max_grad_norm=max_grad_norm)
    assert_close(
        clipped_sum(model, loss, singles(6), chosen),
        brute_force(model, loss, singles(6), max_grad_norm),
        tolerance=5e-6,
        c=max_grad_norm,
    )


def test_per_record_gradients_are_those_of_single_record_backwards() -> None:
    model = tiny_llama()
    loss = text_loss(model, examples(MIXED))
    alone = [flat(torch.autograd.grad(loss([i]).sum(), trainable(model))) for i in range(len(MIXED))]
    with per_sample_gradients(model, len(MIXED)):
        torch.autograd.backward(loss(range(len(MIXED))).sum())
        together = [flat(p.grad_sample[i] for p in trainable(model)) for i in range(len(MIXED))]  # type: ignore[attr-defined]
    for one, two in zip(together, alone, strict=True):
        assert_close(one, two)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_opacus_own_optimizer_gives_the_same_gradient() -> None:
    data, chosen = records(9), plan(expected_batch_size=7)
    model = Net()
    ours = clipped_sum(model, square_loss(model, data), singles(9), chosen) / 7
    wrapped = GradSampleModule(Net(), loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(trainable(wrapped), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=chosen.max_grad_norm,
        expected_batch_size=7,
    )
    torch.autograd.backward(square_loss(wrapped, data)(range(9)).mean())
    optimizer.pre_step()
    # Opacus divides by norm + 1e-6.
    assert_close(ours, flat(p.grad for p in trainable(wrapped)), tolerance=1e-5)


@PROPERTY
@given(cuts=st.lists(st.integers(0, 3), min_size=8, max_size=8), order=st.permutations(range(8)), person=st.booleans())
def test_the_physical_split_changes_nothing(cuts: list[int], order: list[int], person: bool) -> None:
    model = Net()
    loss = square_loss(model, records(16))
    units = [[2 * i, 2 * i + 1] for i in range(8)] if person else singles(8)
    chosen = person_plan(2)
    batches = [[i for i in order if cuts[i] == part] for part in range(4)]
    split = [batch for batch in batches if batch]
    assert_close(
        clipped_sum(model, loss, units, chosen, lambda _: split),
        clipped_sum(model, loss, units, chosen),
        tolerance=1e-5,
    )


@pytest.mark.parametrize("split", [[[0, 1, 2], [2]], [[0, 1]], [[0, 1], [1, 2], [3]], []])
def test_a_split_that_repeats_or_forgets_a_unit_is_refused(split: list[list[int]]) -> None:
    model = Net()
    with pytest.raises(PrivacyViolation, match="exactly once"):
        clipped_sum(model, square_loss(model, records(4)), singles(3), plan(), lambda _: split)


def test_a_person_is_clipped_as_one() -> None:
    model = Net()
    loss = square_loss(model, records(12))
    people = [[0, 5, 11], [3], [1, 2, 4, 10], [6, 7], [8]]
    chosen = person_plan(4)
    jointly = clipped_sum(model, loss, people, chosen)
    assert_close(jointly, brute_force(model, loss, people, 0.7))
    # Clipping each record on its own would let a person with four records move the sum by 4 C.
    apart = brute_force(model, loss, [[record] for person in people for record in person], 0.7)
    assert (jointly - apart).norm() > 0.5


# ---------------------------------------------------------------- sensitivity

BAD = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e38])
COORDINATE = st.floats(-1e4, 1e4, width=32) | BAD


@PROPERTY
@given(
    batch=st.lists(st.lists(COORDINATE, min_size=9, max_size=9), min_size=0, max_size=5),
    newcomer=st.lists(COORDINATE, min_size=9, max_size=9),
    max_grad_norm=st.floats(1e-3, 100),
)
def test_one_record_more_moves_the_clipped_sum_by_at_most_c(
    batch: list[list[float]], newcomer: list[float], max_grad_norm: float
) -> None:
    model = Net()
    rows = torch.tensor([newcomer, *batch], dtype=torch.float32)
    loss = square_loss(model, (rows[:, :6], rows[:, 6:]))
    chosen = plan(max_grad_norm=max_grad_norm)
    without = clipped_sum(model, loss, [[i] for i in range(1, len(rows))], chosen)
    with_it = clipped_sum(model, loss, [[i] for i in range(len(rows))], chosen)
    assert torch.isfinite(with_it).all()
    assert (with_it - without).norm() <= max_grad_norm * (1 + 1e-5 * len(rows))
    # One record a batch, so that float32 treats the others alike: then the bound holds to the last bit, in integers.
    grids = [
        shipped_clipped_sum(model=model, plan=chosen, units=units, record_loss=loss, physical_batches=one_by_one).grid
        for units in ([[i] for i in range(1, len(rows))], [[i] for i in range(len(rows))])
    ]
    assert int(np.square(grids[1] - grids[0]).sum()) <= 2**40


@PROPERTY
@given(
    rows=st.lists(st.lists(COORDINATE, min_size=9, max_size=9), min_size=1, max_size=5),
    max_grad_norm=st.floats(1e-3, 100),
)
def test_automatic_clipping_normalises_and_keeps_the_bound(rows: list[list[float]], max_grad_norm: float) -> None:
    model = Net()
    data = torch.tensor(rows, dtype=torch.float32)
    loss = square_loss(model, (data[:, :6], data[:, 6:]))
    chosen = plan(max_grad_norm=max_grad_norm, clipping="automatic")
    for record in range(len(rows)):
        ours = clipped_sum(model, loss, [[record]], chosen)
        gradient = flat(torch.autograd.grad(loss([record]).sum(), trainable(model)))
        assert ours.norm() <= max_grad_norm
        if torch.isfinite(gradient).all() and gradient.norm() < 1e30:
            expected = max_grad_norm * gradient / (gradient.norm() + 0.01 * max_grad_norm)
            assert_close(ours, expected, tolerance=1e-5, units=1, c=max_grad_norm)


def test_one_person_more_moves_the_clipped_sum_by_at_most_c() -> None:
    model = Net()
    loss = square_loss(model, records(12))
    people = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    chosen = person_plan(3, max_grad_norm=0.2)
    without = clipped_sum(model, loss, people, chosen)
    moved = (clipped_sum(model, loss, [*people, [9, 10, 11]], chosen) - without).norm()
    assert 0.19 < moved <= 0.2 * (1 + 1e-5)


def test_sixteen_short_records_and_a_long_one() -> None:
    """The token-mean loss of transformers couples records: one long record shrinks all others and breaks the bound."""
    model = tiny_llama()
    short, long = examples([(3, 2), (3, 95)])
    texts = [short] * 16 + [long]
    loss, coupled = text_loss(model, texts), token_mean_loss(model, texts)
    norm = float(flat(torch.autograd.grad(loss([0]).sum(), trainable(model))).norm())
    chosen = plan(max_grad_norm=0.6 * norm)

    def moved(by: RecordLoss) -> float:
        difference = clipped_sum(model, by, singles(17), chosen) - clipped_sum(model, by, singles(16), chosen)
        return float(difference.norm()) / chosen.max_grad_norm

    assert moved(loss) <= 1 + 1e-5
    assert moved(coupled) > 2.24, "the control must break the bound, or this test shows nothing"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["input", "target"])
def test_a_record_that_is_not_finite_counts_as_zero_and_spoils_no_other(value: float, place: str) -> None:
    model = Net()
    x, y = records(6)
    (x if place == "input" else y)[2, 1] = value
    loss = square_loss(model, (x, y))
    others = [[0], [1], [3], [4], [5]]
    expected = brute_force(model, loss, others, 0.7)
    assert_close(clipped_sum(model, loss, singles(6), plan()), expected)
    # Also when it is a person's, or alone in its physical batch, or alone altogether.
    assert_close(
        clipped_sum(model, loss, [[0], [1, 2], [3], [4], [5]], person_plan(2)),
        expected - brute_force(model, loss, [[1]], 0.7),
    )
    assert_close(clipped_sum(model, loss, singles(6), plan(), one_by_one), expected)
    assert clipped_sum(model, loss, [[2]], plan()).norm() == 0


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("units", [0, 3])
def test_the_noise_is_gaussian_with_sigma_c(units: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 200, bias=False))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(3, 300, generator=generator), torch.randn(3, 200, generator=generator)
    loss = square_loss(model, (x, y))
    chosen = plan(max_grad_norm=0.3, noise_multiplier=1.7)
    draws = []
    for _ in range(2):
        noisy = noisy_sum(
            model=model,
            plan=chosen,
            units=singles(units),
            record_loss=loss,
            physical_batches=one_by_one,
            random=SecureRandom(),
        )
        signal = brute_force(model, loss, singles(units), 0.3).numpy()
        draws.append((noisy.grid * noisy.grid_step - signal) / (1.7 * 0.3))
    for noise in draws:
        assert stats.kstest(noise, stats.norm.cdf).pvalue > ALPHA
        low, high = stats.chi2.ppf([ALPHA, 1 - ALPHA], len(noise))
        assert low < (noise**2).sum() < high
    # Steps share no noise, and neither do layers.
    bound = stats.norm.isf(ALPHA / 2) / math.sqrt(80_000)
    assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < bound
    assert abs(np.corrcoef(draws[0][:80_000], draws[0][-80_000:])[0, 1]) < bound


def test_empty_poisson_batches_are_noise_only_steps_and_are_counted() -> None:
    torch.manual_seed(0)
    model = nn.Linear(200, 200, bias=False)
    start = model.weight.detach().clone()
    chosen = plan(noise_multiplier=2.0, max_grad_norm=0.5, sample_rate=Fraction(1, 10**12), steps_per_round=6)

    def never(_: Sequence[int]) -> torch.Tensor:
        raise AssertionError("an empty batch has no loss")

    steps = run(model, chosen, loss=never, units=singles(50), learning_rate=1.0)
    assert steps == 6
    # Six independent draws of sigma C / B, by plain SGD at rate 1: the accountant's six steps really carry their noise.
    moved = (model.weight.detach() - start).double().numpy().reshape(-1) / (2.0 * 0.5 / 4)
    low, high = stats.chi2.ppf([ALPHA, 1 - ALPHA], moved.size)
    assert low < (moved**2).sum() / 6 < high
    assert stats.kstest(moved / math.sqrt(6), stats.norm.cdf).pvalue > ALPHA


def test_half_precision_adapters_are_clipped_and_summed_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.zero_()
    x, count = torch.full((600, 1), 1.0), 600

    def loss(chosen: Sequence[int]) -> torch.Tensor:
        return model(x[list(chosen)].to(torch.bfloat16)).float().squeeze(1)

    # Each record brings C = 1/256: a bfloat16 sum would stop growing at 1, where its grid is 1/128.
    chosen = plan(max_grad_norm=1 / 256, expected_batch_size=1)
    for split in (whole, one_by_one):
        assert clipped_sum(model, loss, singles(count), chosen, split).item() == pytest.approx(count / 256, rel=1 / 256)


def test_half_precision_models_take_one_unit_at_a_time() -> None:
    model = nn.Linear(6, 3, bias=False).to(torch.bfloat16)
    x, y = records(4)
    sizes: list[int] = []

    def loss(chosen: Sequence[int]) -> torch.Tensor:
        sizes.append(len(chosen))
        return (model(x[list(chosen)].to(torch.bfloat16)).float() - y[list(chosen)]).square().mean(1)

    clipped_sum(model, loss, [[0, 1], [2], [3]], person_plan(2))
    assert sizes == [2, 1, 1]


def test_gradients_of_half_precision_layers_are_not_rounded_before_they_are_clipped() -> None:
    model = nn.Linear(2, 3, bias=False).to(torch.bfloat16)
    # The sum over tokens, 1 + 2^-8, is no bfloat16 number.
    x = torch.tensor([[[1.0, 0.0], [2.0**-8, 0.0]]], dtype=torch.bfloat16)
    with per_sample_gradients(model, 1):
        torch.autograd.backward(model(x).float().sum())
    sample: torch.Tensor = model.weight.grad_sample  # type: ignore[attr-defined]
    assert sample.dtype == torch.float32
    assert (sample[0, :, 0] == 1 + 2.0**-8).all()


def test_a_step_whose_generator_broke_is_refused() -> None:
    class Frozen:
        """A generator that is stuck, weak, or silent."""

        seeded = False

        def __init__(self, scale: float) -> None:
            self._scale = scale

        def normals(self, count: int) -> np.ndarray[Any, Any]:
            return self._scale * SecureRandom().normals(count)

    torch.manual_seed(0)
    model = nn.Linear(100, 100, bias=False)
    fields: dict[str, Any] = {
        "model": model,
        "plan": plan(noise_multiplier=1.0),
        "units": [],
        "physical_batches": whole,
    }
    fields["record_loss"] = square_loss(model, records(1))
    for scale in (0.0, 0.8, 1.2):
        with pytest.raises(PrivacyViolation, match="times the planned variance"):
            noisy_sum(random=Frozen(scale), **fields)
    assert noisy_sum(random=Frozen(1.0), **fields).grid.any()  # type: ignore[arg-type]


def test_what_leaves_a_step_is_an_integer_whatever_the_records() -> None:
    """On one lattice for all data sets, so that no gap between floats tells one from another (Mironov 2012)."""
    model = Net()
    chosen = plan(noise_multiplier=1.0)
    for units in ([], singles(8)):
        noisy = noisy_sum(
            model=model,
            plan=chosen,
            units=units,
            record_loss=square_loss(model, records(8)),
            physical_batches=whole,
            random=SecureRandom(),
        )
        assert noisy.grid.dtype == np.int64
        assert noisy.grid_step == chosen.max_grad_norm * LATTICE


def test_noise_finer_than_the_lattice_allows_is_refused() -> None:
    model = Net()
    with pytest.raises(PrivacyViolation, match="grid steps"):
        noisy_sum(
            model=model,
            plan=plan(noise_multiplier=1e-5),
            units=[],
            record_loss=square_loss(model, records(1)),
            physical_batches=whole,
            random=SecureRandom(),
        )


def test_a_lattice_that_rounding_alone_would_fill_is_refused() -> None:
    """Half its diagonal is kept free of C; where that takes more than half of C, little signal would be left."""
    model = nn.Linear(20, 20, bias=False)
    loss = square_loss(model, (torch.ones(1, 20), torch.zeros(1, 20)))
    fields: dict[str, Any] = {"model": model, "plan": plan(), "units": [[0]], "record_loss": loss}
    longest = 0.5 * 0.7 / (math.sqrt(400) / 2 + 1)
    summed = shipped_clipped_sum(physical_batches=whole, grid_step=0.99 * longest, **fields)
    assert 0 < np.linalg.norm(summed.grid * summed.grid_step) <= 0.7
    with pytest.raises(PrivacyViolation, match="too coarse"):
        shipped_clipped_sum(physical_batches=whole, grid_step=1.01 * longest, **fields)


def test_a_seeded_stream_serves_only_a_plan_that_says_so() -> None:
    model = Net()
    seeded, secret = SecureRandom.insecure_for_tests(1, "a test"), SecureRandom()
    honest, branded = plan(noise_multiplier=1.0), plan(noise_multiplier=1.0, randomness="insecure_test_seed")
    fields: dict[str, Any] = {"model": model, "units": [], "physical_batches": whole}
    fields["record_loss"] = square_loss(model, records(1))
    for chosen, random in ((honest, seeded), (branded, secret)):
        with pytest.raises(PrivacyViolation, match="comes from elsewhere"):
            noisy_sum(plan=chosen, random=random, **fields)
    again = SecureRandom.insecure_for_tests(1, "a test")
    assert (
        noisy_sum(plan=branded, random=seeded, **fields).grid == noisy_sum(plan=branded, random=again, **fields).grid
    ).all()
    assert honest.digest != branded.digest


# ---------------------------------------------------------------- refusals


def refuse(model: nn.Module, loss: RecordLoss, units: Sequence[Sequence[int]], chosen: DpPlan, match: str) -> None:
    with pytest.raises(PrivacyViolation, match=match):
        clipped_sum(model, loss, units, chosen)


def test_a_layer_that_merges_records_with_tokens_is_refused() -> None:
    """A layer that reorders its rows: [B * T] is no multiple of records that could be divided."""

    class Strange(Net):
        def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
            rows = torch.cat([self.first(torch.cat([x_BI, x_BI[:1]]))])[: len(x_BI)]
            out: torch.Tensor = self.last(torch.tanh(rows))
            return out

    model = Strange()
    refuse(model, square_loss(model, records(6)), singles(6), plan(), "cannot be told")


@pytest.mark.parametrize("tokens", [3, 8, 1])
def test_a_layer_that_sees_time_before_records_is_refused(tokens: int) -> None:
    """Its first axis would be taken for the records, and one record's gradient would be spread over all rows."""

    class TimeFirst(Net):
        def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
            hidden_TBH = self.first(x_BI.expand(tokens, *x_BI.shape))
            out: torch.Tensor = self.last(torch.tanh(hidden_TBH.transpose(0, 1))).mean(1)
            return out

    model = TimeFirst()
    refuse(model, square_loss(model, records(4)), singles(4), plan(), "cannot be told")


@pytest.mark.parametrize("targets", [["fc1"], ["fc2"], ["fc1", "fc2", "q_proj", "v_proj"]])
def test_layers_with_merged_batch_and_time_are_divided_by_record(targets: list[str]) -> None:
    # OPT's feed-forward layers see [B * T, H]: Opacus' hooks would clip each token as if it were a record (2.94 C).
    model = tiny_opt(targets)
    loss = text_loss(model, examples(MIXED))
    assert_close(
        clipped_sum(model, loss, singles(6), plan()), brute_force(model, loss, singles(6), 0.7), tolerance=5e-6
    )


def test_trainable_layers_other_than_linear_ones_are_refused() -> None:
    model = tiny_llama()
    model.get_input_embeddings().weight.requires_grad_(True)  # type: ignore[operator]
    refuse(model, text_loss(model, examples(MIXED)), singles(6), plan(), "not in a linear layer")


def test_an_unused_layer_is_refused() -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(3, 3)

    model = Unused()
    refuse(model, square_loss(model, records(3)), singles(3), plan(), "unused")
    # Found after the backward pass: its gradients must not stay for the next step.
    assert_nothing_left(model)


def test_a_frozen_adapter_is_refused() -> None:
    model = Net().requires_grad_(False)
    refuse(model, square_loss(model, records(3)), singles(3), plan(), "no trainable parameter")
    with pytest.raises(PrivacyViolation, match="no trainable parameter"):
        run(model, plan(sample_rate=Fraction(1, 10**12)), optimized=Net().parameters())


def test_a_loss_that_does_not_reach_the_adapter_is_refused() -> None:
    refuse(Net(), square_loss(Net().requires_grad_(False), records(3)), singles(3), plan(), "does not depend")


@pytest.mark.parametrize("reduce", [torch.sum, lambda t: t.unsqueeze(1), lambda t: torch.cat([t, t])])
def test_a_loss_that_is_not_one_value_a_record_is_refused(reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Net()
    loss = square_loss(model, records(3))
    refuse(model, lambda chosen: reduce(loss(chosen)), singles(3), plan(), "one value per record")


@pytest.mark.parametrize("units", [[[0], [1, 2, 3]], [[0], []]])
def test_a_unit_with_too_many_or_no_records_is_refused(units: list[list[int]]) -> None:
    model = Net()
    refuse(model, square_loss(model, records(4)), units, person_plan(2), "1 to 2 records")


# ---------------------------------------------------------------- whole rounds


def run(
    model: nn.Module,
    chosen: DpPlan,
    *,
    loss: RecordLoss | None = None,
    units: Sequence[Sequence[int]] | None = None,
    reservation: Reservation | None = None,
    optimized: Iterator[nn.Parameter] | None = None,
    learning_rate: float = 0.1,
    on_step: Callable[[], None] = lambda: None,
) -> int:
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1
        on_step()

    run_private_steps(
        model=model,
        optimizer=torch.optim.SGD(optimized or model.parameters(), lr=learning_rate),
        plan=chosen,
        reservation=reservation or Reservation(entry="0" * 64, plan_digest=chosen.digest, steps=chosen.steps_per_round),
        independence=Independence(model=model),
        records_of_unit=singles(8) if units is None else units,
        record_loss=loss or square_loss(model, records(8)),
        physical_batches=whole,
        random=SecureRandom(),
        on_step=count,
    )
    return steps


def assert_nothing_left(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is None
        assert not [name for name in LEFT_BEHIND if hasattr(parameter, name)]
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._backward_hooks
        assert not [name for name in LEFT_ON_MODULES if hasattr(module, name)]


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_exactly_the_reserved_steps_are_taken(steps: int) -> None:
    calls: list[int] = []
    model = Net()
    loss = square_loss(model, records(8))

    def counted(chosen: Sequence[int]) -> torch.Tensor:
        calls.append(len(chosen))
        return loss(chosen)

    assert run(model, plan(steps_per_round=steps), loss=counted) == steps
    assert calls == [8] * steps


def test_without_noise_a_round_is_plain_clipped_gradient_descent() -> None:
    model, twin = Net(), Net()
    data = records(8)
    run(model, plan(steps_per_round=3, noise_multiplier=2e-5), loss=square_loss(model, data))
    for _ in range(3):
        gradient = brute_force(twin, square_loss(twin, data), singles(8), 0.7) / 4
        with torch.no_grad():
            start = 0
            for parameter in trainable(twin):
                piece = gradient[start : start + parameter.numel()].reshape(parameter.shape)
                parameter -= 0.1 * piece.float()
                start += parameter.numel()
    # The least noise that the step accepts is 16 lattice steps.
    assert (flat(model.parameters()) - flat(twin.parameters())).norm() < 1e-4
    assert (flat(model.parameters()) - flat(Net().parameters())).norm() > 1e-2


def test_units_are_sampled_by_poisson_afresh_at_every_step() -> None:
    model = Net()
    x, y = records(1)
    data = x.expand(3000, 6), y.expand(3000, 3)
    seen: list[list[int]] = []
    loss = square_loss(model, data)

    def noting(chosen: Sequence[int]) -> torch.Tensor:
        seen.append(list(chosen))
        return loss(chosen)

    rate, steps = Fraction(1, 5), 10
    run(model, plan(sample_rate=rate, steps_per_round=steps), loss=noting, units=singles(3000))
    assert len(seen) == steps
    sizes = [len(batch) for batch in seen]
    assert len(set(sizes)) > 1
    assert stats.binom.ppf(ALPHA, 3000 * steps, 0.2) <= sum(sizes) <= stats.binom.isf(ALPHA, 3000 * steps, 0.2)
    assert all(batch == sorted(set(batch)) for batch in seen)
    twice = len(set(seen[0]) & set(seen[1]))
    assert stats.binom.ppf(ALPHA, 3000, 0.04) <= twice <= stats.binom.isf(ALPHA, 3000, 0.04)


def test_a_person_brings_at_most_m_records_chosen_afresh() -> None:
    model = Net()
    seen: list[list[int]] = []
    loss = square_loss(model, records(24))

    def noting(chosen: Sequence[int]) -> torch.Tensor:
        seen.append(list(chosen))
        return loss(chosen)

    people = [list(range(20)), [20], [21, 22, 23]]
    run(model, person_plan(3, steps_per_round=40), loss=noting, units=people)
    firsts = [batch[:3] for batch in seen]
    assert all(batch[3:] == [20, 21, 22, 23] for batch in seen)
    assert all(first == sorted(set(first)) and set(first) <= set(range(20)) for first in firsts)
    assert len({tuple(first) for first in firsts}) > 10
    # Each of the 20 records is as likely as the others.
    counts = np.bincount(np.concatenate(firsts), minlength=20)
    assert stats.chisquare(counts).pvalue > ALPHA


def test_a_reservation_for_another_plan_trains_nothing() -> None:
    model = Net()
    before = flat(model.parameters())
    foreign = Reservation(entry="0" * 64, plan_digest=plan(noise_multiplier=5.0).digest, steps=3)
    with pytest.raises(PrivacyViolation, match="reserve steps of the plan"):
        run(model, plan(), reservation=foreign)
    assert torch.equal(flat(model.parameters()), before)


def test_a_reservation_pays_once() -> None:
    model, chosen = Net(), plan()
    paid = Reservation(entry="0" * 64, plan_digest=chosen.digest, steps=3)
    assert run(model, chosen, reservation=paid) == 3
    before = flat(model.parameters())
    with pytest.raises(PrivacyViolation, match="once"):
        run(model, chosen, reservation=paid)
    assert torch.equal(flat(model.parameters()), before)


def test_a_model_that_was_not_tested_is_not_trained() -> None:
    model, chosen = Net(), plan()
    with pytest.raises(PrivacyViolation, match="another model"):
        run_private_steps(
            model=model,
            optimizer=torch.optim.SGD(model.parameters()),
            plan=chosen,
            reservation=Reservation(entry="0" * 64, plan_digest=chosen.digest, steps=3),
            independence=Independence(model=Net()),
            records_of_unit=singles(8),
            record_loss=square_loss(model, records(8)),
            physical_batches=whole,
            random=SecureRandom(),
            on_step=lambda: None,
        )


def test_clipping_and_signal_are_told_to_an_observer_only() -> None:
    model, seen = Net(), []
    loss = square_loss(model, records(8))
    norms = [float(flat(torch.autograd.grad(loss([i]).sum(), trainable(model))).norm()) for i in range(8)]
    noisy = noisy_sum(
        model=model,
        plan=plan(noise_multiplier=2.0),
        units=singles(8),
        record_loss=loss,
        physical_batches=whole,
        random=SecureRandom(),
        observe=seen.append,
    )
    assert not hasattr(noisy, "clipped")
    assert seen[0].clipped_fraction == sum(norm > 0.7 for norm in norms) / 8
    signal = float(brute_force(model, loss, singles(8), 0.7).norm())
    dimension = sum(p.numel() for p in trainable(model))
    assert seen[0].signal_to_noise == pytest.approx(signal / (2.0 * 0.7 * math.sqrt(dimension)), rel=1e-3)


def test_an_optimizer_over_other_tensors_is_found_at_the_first_step() -> None:
    model, steps = Net(), []
    with pytest.raises(PrivacyViolation, match="optimizer holds other tensors"):
        run(model, plan(), optimized=Net().parameters(), on_step=lambda: steps.append(1))
    assert not steps
    assert_nothing_left(model)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_on_the_model_after_a_round(training: bool) -> None:
    model = tiny_llama().train(training)
    run(model, plan(), loss=text_loss(model, examples(MIXED)), units=singles(6))
    assert_nothing_left(model)
    assert model.training is training


def broken_after_forward(loss: RecordLoss) -> RecordLoss:
    def broken(chosen: Sequence[int]) -> torch.Tensor:
        loss(chosen)
        raise KeyboardInterrupt

    return broken


def broken_in_backward(loss: RecordLoss) -> RecordLoss:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    def broken(chosen: Sequence[int]) -> torch.Tensor:
        losses: torch.Tensor = Broken.apply(loss(chosen))  # type: ignore[no-untyped-call]
        return losses

    return broken


@pytest.mark.parametrize("breaking", [broken_after_forward, broken_in_backward])
@pytest.mark.parametrize("network", [Net, tiny_llama])
def test_a_broken_step_leaves_nothing_and_the_next_round_is_right(
    breaking: Callable[[RecordLoss], RecordLoss], network: Callable[[], nn.Module]
) -> None:
    model = network()
    loss = square_loss(model, records(6)) if isinstance(model, Net) else text_loss(model, examples(MIXED))
    before = flat(model.parameters())
    with pytest.raises(KeyboardInterrupt):
        run(model, plan(noise_multiplier=1.0), loss=breaking(loss), units=singles(6))
    assert_nothing_left(model)
    assert torch.equal(flat(model.parameters()), before)
    # A smaller batch than the broken one: left-over activations would give Opacus the wrong batch size.
    expected = brute_force(model, loss, singles(2), 0.7)
    assert_close(clipped_sum(model, loss, singles(2), plan()), expected, tolerance=5e-6)


def test_an_interrupt_between_physical_batches_leaves_no_partial_sum() -> None:
    model = Net()
    loss, calls = square_loss(model, records(8)), []

    def second_breaks(chosen: Sequence[int]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(chosen)

    expected = brute_force(model, loss, singles(4), 0.7)
    with pytest.raises(KeyboardInterrupt):
        clipped_sum(model, second_breaks, singles(4), plan(), one_by_one)
    assert_nothing_left(model)
    assert_close(clipped_sum(model, loss, singles(4), plan(), one_by_one), expected)


# ---------------------------------------------------------------- released gradients


def gradient_plan(**changes: Any) -> DpPlan:
    fields = {"noise_multiplier": 2.0, "release": "gradient", "noise": "distributed", "least_honest": 4}
    return plan(**(fields | {"steps_per_round": 1} | changes))


def round_of(chosen: DpPlan, model: nn.Module, **changes: Any) -> RoundPlan:
    fields: dict[str, Any] = {
        "dimension": sum(p.numel() for p in trainable(model)),
        "clip": chosen.gradient_clip,
        "value_bits": 18,
        "min_contributors": 5,
        "max_contributors": 5,
        "dp": chosen.terms,
        "release": "gradient",
        "noise_multiplier": chosen.noise_multiplier,
        "least_honest": chosen.least_honest,
    }
    return round_plan(**(fields | changes))


def release(model: nn.Module, chosen: DpPlan, paid: Reservation, **changes: Any) -> NoisySum:
    fields: dict[str, Any] = {
        "flatten_as": trainable(model),
        "round_plan": round_of(chosen, model),
        "independence": Independence(model=model),
        "records_of_unit": singles(8),
        "record_loss": square_loss(model, records(8)),
        "physical_batches": whole,
        "random": SecureRandom(),
    }
    return release_private_gradient(model=model, plan=chosen, reservation=paid, **(fields | changes))


@pytest.mark.parametrize("expected_batch_size", [4, 48])
def test_a_sum_beyond_the_rounds_range_is_projected_before_the_noise(expected_batch_size: int) -> None:
    """Saturation after the noise would tell where the sum lies, and without any a far sum would not fit the grid."""
    model = nn.Linear(40, 1, bias=False)
    chosen = gradient_plan(expected_batch_size=expected_batch_size, randomness="insecure_test_seed")
    # Coordinates 0 and 1 of every record's gradient are +-C / sqrt(2): 99 records sum to 70 C a coordinate.
    x = torch.zeros(99, 40)
    x[:, 0], x[:, 1] = 1e6, -1e6
    loss = square_loss(model, (x, torch.full((99, 1), -1e6)))
    asked = round_of(chosen, model)
    noise, one, all_of_them = (
        noisy_sum(
            model=model,
            plan=chosen,
            units=singles(units),
            record_loss=loss,
            physical_batches=whole,
            random=SecureRandom.insecure_for_tests(1, "the same noise"),
            round_plan=asked,
        ).grid
        for units in (0, 1, 99)
    )
    c = 0.7 / asked.grid_step
    assert (one - noise)[:2] == pytest.approx([c / math.sqrt(2), -c / math.sqrt(2)], rel=1e-3)
    box = c * max(1.0, expected_batch_size / 16)  # as `DpPlan.gradient_clip` promises
    assert (all_of_them - noise)[:2] == pytest.approx([box, -box], rel=1e-3)
    assert not (all_of_them - noise)[2:].any()


OTHER_TERMS: tuple[dict[str, Any], ...] = (
    {"unit": "person"},
    {"max_records_per_unit": 2},
    {"max_grad_norm": 0.71},
    {"expected_batch_size": 5},
    {"steps_per_round": 2},
    {"clipping": "automatic"},
    {"noise": "local"},
)


def test_other_terms_are_those_of_every_field() -> None:
    assert [next(iter(changes)) for changes in OTHER_TERMS] == [field.name for field in fields_of(DpTerms)]


def test_a_gradient_is_released_once_of_one_step_for_its_own_round_and_model() -> None:
    """What is refused before the reservation is taken leaves it; what was paid for once is made once."""
    model, chosen = Net(), gradient_plan()
    paid = Reservation(entry="0" * 64, plan_digest=chosen.digest, steps=1)
    for changes in ({"noise_multiplier": 1.0}, {"least_honest": 3}, {"clip": chosen.gradient_clip / 2}):
        with pytest.raises(ProtocolError, match=next(iter(changes))):
            release(model, chosen, paid, round_plan=round_of(chosen, model, **changes))
    for terms in (None, *(replace(chosen.terms, **changes) for changes in OTHER_TERMS)):
        with pytest.raises(ProtocolError, match="privacy terms"):
            release(model, chosen, paid, round_plan=round_of(chosen, model, dp=terms))
    with pytest.raises(PrivacyViolation, match="another model"):
        release(model, chosen, paid, independence=Independence(model=Net()))
    with pytest.raises(PrivacyViolation, match="other parameters"):
        release(model, chosen, paid, flatten_as=trainable(Net()))
    with pytest.raises(PrivacyViolation, match="reservation is for more"):
        release(model, chosen, Reservation(entry="0" * 64, plan_digest=chosen.digest, steps=2))
    assert release(model, chosen, paid).grid.any()
    with pytest.raises(PrivacyViolation, match="once"):
        release(model, chosen, paid)
    assert_nothing_left(model)


def test_a_plan_is_carried_out_only_in_its_own_way_of_release() -> None:
    """Local steps under a plan with distributed noise would hold a share of the noise and be charged as if all."""
    model, chosen = Net(), gradient_plan()
    before = flat(model.parameters())
    with pytest.raises(PrivacyViolation, match="releases gradients"):
        run(model, chosen)
    assert torch.equal(flat(model.parameters()), before)
    local = plan(noise_multiplier=2.0, steps_per_round=1)
    with pytest.raises(PrivacyViolation, match="does not release gradients"):
        release(
            model,
            local,
            Reservation(entry="0" * 64, plan_digest=local.digest, steps=1),
            round_plan=round_of(chosen, model),
        )


def test_a_released_gradient_is_taken_in_training_mode_as_the_model_was_tested() -> None:
    model, chosen, modes = Net().eval(), gradient_plan(), []
    loss = square_loss(model, records(8))

    def noting(wanted: Sequence[int]) -> torch.Tensor:
        modes.append(model.training)
        return loss(wanted)

    release(model, chosen, Reservation(entry="0" * 64, plan_digest=chosen.digest, steps=1), record_loss=noting)
    assert modes == [True]
    assert not model.training


def test_a_released_gradient_lies_in_the_order_that_was_asked_for() -> None:
    model, chosen = Net(), gradient_plan(randomness="insecure_test_seed")

    def released_as(order: list[nn.Parameter]) -> list[np.ndarray[Any, Any]]:
        paid = Reservation(entry="0" * 64, plan_digest=chosen.digest, steps=1)
        random = SecureRandom.insecure_for_tests(1, "the same noise")
        grid = release(model, chosen, paid, flatten_as=order, random=random).grid
        return np.split(grid, np.cumsum([p.numel() for p in order])[:-1])

    for one, two in zip(released_as(trainable(model)), released_as(trainable(model)[::-1])[::-1], strict=True):
        np.testing.assert_array_equal(one, two)
