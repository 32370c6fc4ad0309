"""The audit of the shipped step, and that it finds steps which are broken on purpose.

How sure the verdicts are. The noise comes from the operating system, so each run of these tests draws anew.

* That a sound step exceeds its claim: at most ``1 - SURE`` = 1e-5 an audit, by Clopper and Pearson.
* That an audit finds too little (a sound step below 60 % of its claim, a broken one within its claim): below 1e-5 an
  audit. `test_the_audits_here_have_the_power_they_need` computes it: it takes the binomial quantiles that are passed
  with so small a probability, and asks for the bound that they would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedcollm_audits.confidence import gaussian_mu
from fedcollm_audits.step_audit import Canaries, Step, StepAudit, audit_step, dirac_canaries
from fedcollm_privacy import accounting
from fedcollm_privacy.clipping import PhysicalBatches, RecordLoss, clipped_sum
from fedcollm_privacy.dp_sgd import noisy_sum
from fedcollm_privacy.errors import InvalidValue, PrivacyViolation
from fedcollm_privacy.messages import NoisySum, RoundPlan
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom
from secure_fedcollm.losses import per_record_loss
from secure_fedcollm.tokenization import Example, collate

from .secure_sums import round_plan

SURE = 1 - 1e-5
MANY, CALLS = 400, 400
TEXTS, TEXT_CALLS = 12, 1200
TEXT_SEEN = 0.92
"""Of a text canary's gradient, in C, what lies in its own direction on average; `text_canaries` checks it."""
ENOUGH = 0.6
"""Of the claim: what a bound must reach to show that the audit sees the leak at all."""


def plan(**changes: Any) -> DpPlan:
    fields: dict[str, Any] = {
        "unit": "record",
        "max_records_per_unit": 1,
        "max_grad_norm": 0.7,
        "noise_multiplier": 1.0,
        "sample_rate": Fraction(1, 10),
        "expected_batch_size": 16,
        "steps_per_round": 60,
        "rounds": 1,
        "delta": 1e-5,
    }
    return DpPlan(**(fields | changes))


def text_plan() -> DpPlan:
    """One full batch; C is shorter than every text's gradient."""
    return plan(noise_multiplier=0.5, max_grad_norm=0.01, sample_rate=Fraction(1), steps_per_round=1)


def gradient_plan(**changes: Any) -> DpPlan:
    """One-step rounds whose noise is that of three honest sites together."""
    fields = {"noise": "distributed", "release": "gradient", "least_honest": 3, "steps_per_round": 1, "rounds": 60}
    return plan(**(fields | changes))


def round_of(of: DpPlan, dimension: int, value_bits: int) -> RoundPlan:
    """Of three sites, on the grid that the plan promises."""
    return round_plan(
        dimension=dimension,
        clip=of.gradient_clip,
        value_bits=value_bits,
        min_contributors=3,
        max_contributors=3,
        max_colluding=0,
        dp=of.terms,
        release="gradient",
        noise_multiplier=of.noise_multiplier,
        least_honest=of.least_honest,
    )


def audit(of: DpPlan, *, canaries: int | Canaries = MANY, calls: int = CALLS, **more: Any) -> StepAudit:
    return audit_step(of, canaries=canaries, calls=calls, confidence=SURE, **more)


def assert_sound(found: StepAudit) -> None:
    assert not found.exceeds_claim
    assert ENOUGH * found.claimed_epsilon <= found.epsilon_lower_bound <= found.claimed_epsilon


# ---------------------------------------------------------------- steps that are broken, or are several


class Calls:
    """The shipped step, called otherwise than it should be."""

    def __init__(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.change = change

    def __call__(
        self,
        *,
        model: nn.Module,
        plan: DpPlan,
        units: Sequence[Sequence[int]],
        record_loss: RecordLoss,
        physical_batches: PhysicalBatches,
        random: SecureRandom,
        round_plan: RoundPlan | None = None,
    ) -> NoisySum:
        asked = {
            "model": model,
            "plan": plan,
            "units": units,
            "record_loss": record_loss,
            "physical_batches": physical_batches,
            "random": random,
            "round_plan": round_plan,
        }
        return noisy_sum(**(asked | self.change(asked)))


def noise_of(sigma: float) -> Step:
    return Calls(lambda asked: {"plan": replace(asked["plan"], noise_multiplier=sigma)})


def clipped_twice_too_loosely(asked: dict[str, Any]) -> dict[str, Any]:
    right = asked["plan"]
    return {"plan": replace(right, max_grad_norm=2 * right.max_grad_norm, noise_multiplier=right.noise_multiplier / 2)}


def each_record_on_its_own(asked: dict[str, Any]) -> dict[str, Any]:
    return {"units": [[record] for unit in asked["units"] for record in unit]}


def nobody(asked: dict[str, Any]) -> dict[str, Any]:
    return {"units": []}


class Silent(SecureRandom):
    def normals(self, count: int) -> NDArray[np.float64]:
        return np.zeros(count)


class Uniform(SecureRandom):
    """Noise of the right variance and the wrong shape."""

    def normals(self, count: int) -> NDArray[np.float64]:
        return np.random.default_rng().uniform(-math.sqrt(3), math.sqrt(3), count)


class Again(SecureRandom):
    """The same noise at every call."""

    def normals(self, count: int) -> NDArray[np.float64]:
        return np.random.default_rng(5).standard_normal(count)


def without_noise(
    *,
    model: nn.Module,
    plan: DpPlan,
    units: Sequence[Sequence[int]],
    record_loss: RecordLoss,
    physical_batches: PhysicalBatches,
    random: SecureRandom,
    round_plan: RoundPlan | None = None,
) -> NoisySum:
    """The noise forgotten, and its check with it."""
    summed = clipped_sum(
        model=model, plan=plan, units=units, record_loss=record_loss, physical_batches=physical_batches
    )
    return NoisySum(grid=summed.grid, grid_step=summed.grid_step)


def sum_of_three_sites(
    *,
    model: nn.Module,
    plan: DpPlan,
    units: Sequence[Sequence[int]],
    record_loss: RecordLoss,
    physical_batches: PhysicalBatches,
    random: SecureRandom,
    round_plan: RoundPlan | None = None,
) -> NoisySum:
    """What a secure sum opens: the canaries' site, and two more, each with noise of its own."""
    sites = [
        noisy_sum(
            model=model,
            plan=plan,
            units=theirs,
            record_loss=record_loss,
            physical_batches=physical_batches,
            random=SecureRandom(),
            round_plan=round_plan,
        )
        for theirs in (units, [], [])
    ]
    return NoisySum(grid=np.sum([site.grid for site in sites], axis=0), grid_step=sites[0].grid_step)


# ---------------------------------------------------------------- how sure the verdicts are


def least_mu(mu: float, observations: int) -> float:
    """What the audit of a step with that mu finds at least, but with probability below 1e-5.

    3e-6 for each rate; a threshold a tenth of sigma from the middle, which is more than ten of its own standard
    deviations; five standard deviations fewer trials of either kind than expected.
    """
    expected = observations // 4
    trials = expected - int(5 * math.sqrt(observations / 8))
    worst = []
    for shift in (-0.1, 0.0, 0.1):
        alarms, misses = stats.norm.sf(mu / 2 + shift), stats.norm.cdf(-mu / 2 + shift)
        worst.append(
            gaussian_mu(
                false_positives=int(stats.binom.isf(3e-6, trials, alarms)),
                negatives=trials,
                false_negatives=int(stats.binom.isf(3e-6, trials, misses)),
                positives=trials,
                significance=(1 - SURE) / 2,
            )
        )
    return min(worst)


@pytest.mark.parametrize(
    ("of", "mu", "observations"),
    [
        (plan(), 0.999, MANY * CALLS),
        (plan(noise_multiplier=2.0), 0.4995, MANY * CALLS),
        (plan(), 0.92, 160_000),
        (text_plan(), TEXT_SEEN / 0.5, TEXTS * TEXT_CALLS),
    ],
    ids=["sigma 1", "sigma 2", "coarsest grid", "text"],
)
def test_the_audits_here_have_the_power_they_need(of: DpPlan, mu: float, observations: int) -> None:
    found = accounting.epsilon(1 / least_mu(mu, observations), of.sample_rate, of.steps, of.delta)
    assert found >= ENOUGH * of.epsilon(of.steps)


@pytest.mark.parametrize(
    ("mu", "observations"),
    [(1 / 0.9, 2 * MANY * CALLS), (2.0, 40 * MANY), (math.sqrt(3) * 0.92, 16_000)],
    ids=["ten percent less noise", "loose clipping", "one share on the coarsest grid"],
)
def test_the_audits_here_have_the_power_to_exceed_a_claim_of_one(mu: float, observations: int) -> None:
    assert least_mu(mu, observations) > 1.0


# ---------------------------------------------------------------- the shipped step


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise_multiplier": 2.0},
        {"clipping": "automatic"},
        {"unit": "person", "max_records_per_unit": 3},
        {"max_grad_norm": 1e-3},
    ],
    ids=["standard", "much noise", "automatic clipping", "person", "short"],
)
def test_the_shipped_step_leaks_what_is_claimed_and_no_more(changes: dict[str, Any]) -> None:
    found = audit(plan(**changes))
    assert_sound(found)
    assert found.observations == MANY * CALLS


def test_the_claim_that_is_audited_is_the_published_one() -> None:
    found = audit_step(plan(), canaries=100, calls=4)
    assert found.claimed_epsilon == pytest.approx(5.572689, abs=1e-3)


def test_automatic_clipping_leaves_a_dirac_canary_a_ten_thousandth_less() -> None:
    chosen = plan(clipping="automatic")
    canaries = dirac_canaries(chosen, 3)
    summed = clipped_sum(
        model=canaries.model,
        plan=chosen,
        units=canaries.units[1:2],
        record_loss=canaries.record_loss,
        physical_batches=lambda units: [[0]],
    )
    moved = summed.grid * summed.grid_step / chosen.max_grad_norm
    assert moved == pytest.approx([0, 1 / 1.0001, 0], abs=1e-5)


def test_a_sound_step_stays_within_its_claim_also_on_few_observations() -> None:
    found = audit(plan(), canaries=50, calls=20)
    assert 0 <= found.epsilon_lower_bound < found.claimed_epsilon
    assert found.epsilon_lower_bound > 0 or found.mu_lower_bound <= 0


# ---------------------------------------------------------------- broken steps


def test_ten_percent_less_noise_is_found() -> None:
    found = audit(plan(), calls=2 * CALLS, step=noise_of(0.9))
    assert found.exceeds_claim
    assert found.epsilon_lower_bound > found.claimed_epsilon


def test_clipping_twice_too_loose_is_found() -> None:
    assert audit(plan(), calls=40, step=Calls(clipped_twice_too_loosely)).exceeds_claim


def test_a_person_whose_records_are_clipped_one_by_one_is_found() -> None:
    chosen = plan(unit="person", max_records_per_unit=3)
    assert audit(chosen, calls=40, step=Calls(each_record_on_its_own)).exceeds_claim


def test_noise_of_the_right_variance_and_the_wrong_shape_is_found() -> None:
    found = audit(plan(), calls=100, step=Calls(lambda asked: {"random": Uniform()}))
    assert found.exceeds_claim


def test_forgotten_noise_is_refused_by_the_step_and_found_by_the_audit() -> None:
    with pytest.raises(PrivacyViolation, match="the noise has 0 times the planned variance"):
        audit(plan(), calls=4, step=Calls(lambda asked: {"random": Silent()}))
    found = audit(plan(), calls=20, step=without_noise)
    assert found.exceeds_claim
    assert math.isfinite(found.epsilon_lower_bound)


def test_noise_without_canaries_gives_nothing() -> None:
    found = audit(plan(), calls=100, step=Calls(nobody))
    assert found.epsilon_lower_bound == 0.0
    assert not found.exceeds_claim


def test_noise_used_again_is_found() -> None:
    found = audit(plan(), calls=20, step=Calls(lambda asked: {"random": Again()}))
    assert found.exceeds_claim


# ---------------------------------------------------------------- distributed noise


@pytest.mark.parametrize(("value_bits", "canaries"), [(18, MANY), (16, MANY), (10, 100)])
def test_the_sum_of_three_sites_leaks_what_is_claimed_of_sums(value_bits: int, canaries: int) -> None:
    chosen = gradient_plan()
    grid = round_of(chosen, canaries, value_bits)
    found = audit(chosen, canaries=canaries, calls=160_000 // canaries, step=sum_of_three_sites, round_plan=grid)
    assert_sound(found)


@pytest.mark.parametrize(("value_bits", "canaries"), [(18, MANY), (10, 100)])
def test_one_sites_share_alone_leaks_more_than_is_claimed_of_sums(value_bits: int, canaries: int) -> None:
    """Which is why the statement has two views, and the share leaves its site encrypted."""
    chosen = gradient_plan()
    found = audit(
        chosen, canaries=canaries, calls=16_000 // canaries, round_plan=round_of(chosen, canaries, value_bits)
    )
    assert found.exceeds_claim
    assert found.epsilon_lower_bound <= chosen.epsilon_one_update(chosen.steps)


# ---------------------------------------------------------------- text through LoRA


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(LlamaForCausalLM(config), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would leave A without a gradient
                parameter.normal_(std=0.3)
    return model


def text_canaries(of: DpPlan, count: int) -> Canaries:
    """Those of 96 texts whose clipped gradients differ most from each other."""
    model = tiny_llama()
    rng = np.random.default_rng(3)
    texts = [Example(input_ids=tuple(rng.integers(1, 48, 8).tolist()), target_start=2, unit=str(i)) for i in range(96)]

    def record_loss(records: Sequence[int]) -> torch.Tensor:
        return per_record_loss(model, collate([texts[i] for i in records], 0))

    alone = [
        clipped_sum(model=model, plan=of, units=[[i]], record_loss=record_loss, physical_batches=lambda _: [[0]])
        for i in range(len(texts))
    ]
    assert all(one.clipped == 1 for one in alone)
    _, own, order = scipy.linalg.qr(np.stack([one.grid for one in alone], axis=1), mode="economic", pivoting=True)
    assert np.abs(np.diag(own)[:count]).mean() / 2**20 > TEXT_SEEN
    return Canaries(model=model, record_loss=record_loss, units=[[int(i)] for i in order[:count]])


def test_texts_through_lora_leak_what_is_claimed_and_no_more_and_half_the_noise_is_found() -> None:
    chosen = text_plan()
    canaries = text_canaries(chosen, TEXTS)
    assert_sound(audit(chosen, canaries=canaries, calls=TEXT_CALLS))
    assert audit(chosen, canaries=canaries, calls=100, step=noise_of(0.25)).exceeds_claim


# ---------------------------------------------------------------- what it says, and what it refuses


def test_the_result_says_that_it_is_conditional() -> None:
    found = audit_step(plan(), canaries=100, calls=4)
    assert "Conditional lower bound at 0.95 confidence" in found.conditions
    for assumed in ("independent of each other", "Gaussian", "sample each unit with probability 1/10", "no proof"):
        assert assumed in found.conditions


def test_seeded_noise_is_not_audited() -> None:
    with pytest.raises(InvalidValue, match="operating_system"):
        audit_step(plan(randomness="insecure_test_seed"), canaries=10, calls=4)


@pytest.mark.parametrize(
    ("field", "changes"),
    [("canaries", {"canaries": 0}), ("calls", {"calls": 3}), ("confidence", {"confidence": 1.0})],
)
def test_impossible_arguments_are_refused(field: str, changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"canaries": 10, "calls": 4, "confidence": 0.95}
    with pytest.raises(InvalidValue, match=field):
        audit_step(plan(), **(fields | changes))


def test_canaries_with_the_same_gradient_are_refused() -> None:
    one = dirac_canaries(plan(), 3)
    twice = Canaries(model=one.model, record_loss=one.record_loss, units=[[0], [0]])
    with pytest.raises(InvalidValue, match="depend on each other"):
        audit_step(plan(), canaries=twice, calls=4)
