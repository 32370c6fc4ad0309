"""Who enters which step: is it the Poisson sampling that the accountant counts on?

The privacy loss of DP-SGD is computed for steps that every unit enters by a coin of its own. Batches that are shuffled
and cut, or drawn without replacement, leak otherwise, at equal noise (Chua et al. 2024, "How Private are DP-SGD
Implementations?"). No count of guesses at the noisy sums would show that in minutes. But whoever hands the step its
loss function is asked for the losses of just those records that were sampled, and so sees the coins themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from fedcollm_audits.one_run import _one_batch, _paid
from fedcollm_audits.real_sum import smallest_round
from fedcollm_privacy import _validate, dp_sgd, randomness
from fedcollm_privacy.clipping import RecordLoss
from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.independence import Independence, prove_independence
from fedcollm_privacy.plan import DpPlan

__all__ = ["SamplingAudit", "audit_sampling", "judge_sampling", "steps_entered"]

_DIMENSION = 8
_LENGTH = 100.0
_STEPS_PER_ROUND = 10
_LEAST_STEPS, _MOST_STEPS = 60, 400
_LEAST_UNITS, _MOST_UNITS = 500, 5000
_EXPECTED_BATCH = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingAudit:
    """How far what entered the steps is from independent coins.

    Attributes:
        steps: of the shipped code, over several rounds.
        units: in the data.
        rate: q of the plan.
        observed_rate: share of units that entered, over all steps.
        batch_spread: variance of the batches' sizes over that of a binomial; 1 expected, 0 for batches of one size.
        unit_spread: the same of how often each unit entered; 0 where every unit entered equally often.
        looks: p-value of each of four looks, by name.
        p_value: of the four together (Bonferroni): how probable so large a deviation is under Poisson sampling.
    """

    steps: int
    units: int
    rate: Fraction
    observed_rate: float
    batch_spread: float
    unit_spread: float
    looks: Mapping[str, float]
    p_value: float


def audit_sampling(plan: DpPlan) -> SamplingAudit:
    """Run steps of the plan on made-up units, and judge which entered; see `steps_entered` and `judge_sampling`.

    As many steps and units as the tests need, whatever the plan's: at least 60 steps, two epochs where that fits, and
    25 units in an expected batch.

    Raises:
        InvalidValue: the plan's sampling is seeded.
        PrivacyViolation: the steps refused.
    """
    rate = float(plan.sample_rate)
    steps = min(max(_LEAST_STEPS, math.ceil(2 / rate)), _MOST_STEPS)
    units = min(max(_LEAST_UNITS, math.ceil(_EXPECTED_BATCH / rate)), _MOST_UNITS)
    return judge_sampling(steps_entered(plan, units=units, steps=steps), plan.sample_rate)


def steps_entered(plan: DpPlan, *, units: int, steps: int) -> NDArray[np.bool_]:
    """Which unit entered which step of the shipped code, [steps, units].

    The code is that of the plan's own release, `run_private_steps` or `release_private_gradient`, with reservations
    and, as at a site, fresh randomness every round.

    Args:
        plan: noise, clipping and sampling rate; number of steps and rounds are not taken from it.
        units: in the made-up data, each with as many records as one may bring.
        steps: at least 1; rounded up to whole rounds.

    Raises:
        InvalidValue: the plan's sampling is seeded, or an argument is out of range.
        PrivacyViolation: the steps refused.
    """
    if plan.randomness != "operating_system":
        raise InvalidValue("plan.randomness", plan.randomness, "'operating_system': what ships is what is audited")
    _validate.integer_at_least(_DIMENSION, units=units)
    _validate.integer_at_least(1, steps=steps)
    a_round = 1 if plan.release == "gradient" else min(_STEPS_PER_ROUND, steps)
    plan = replace(plan, steps_per_round=a_round, rounds=math.ceil(steps / a_round))
    each, model = plan.max_records_per_unit, nn.Linear(_DIMENSION, 1, bias=False)
    rows_MD = _LENGTH * plan.max_grad_norm * torch.eye(_DIMENSION)
    asked: list[int] = []

    def record_loss(records: Sequence[int]) -> torch.Tensor:
        asked.extend(records)
        losses_B: torch.Tensor = model(rows_MD[[record % _DIMENSION for record in records]])[:, 0]
        return losses_B

    entered: list[NDArray[np.bool_]] = []

    def step_is_over() -> None:
        row = np.zeros(units, dtype=np.bool_)
        row[[record // each for record in asked]] = True
        entered.append(row)
        asked.clear()

    independence = prove_independence(model, record_loss)
    asked.clear()
    records = [range(each * unit, each * (unit + 1)) for unit in range(units)]
    take = _gradients if plan.release == "gradient" else _updates
    take(plan, model, independence, records, record_loss, step_is_over)
    return np.stack(entered)


def _updates(
    plan: DpPlan,
    model: nn.Linear,
    independence: Independence,
    records: Sequence[Sequence[int]],
    record_loss: RecordLoss,
    step_is_over: Callable[[], None],
) -> None:
    with _paid(plan) as reserve:
        for server_round in range(1, plan.rounds + 1):
            dp_sgd.run_private_steps(
                model=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
                plan=plan,
                reservation=reserve(0, server_round),
                independence=independence,
                records_of_unit=records,
                record_loss=record_loss,
                physical_batches=_one_batch,
                random=randomness.SecureRandom(),
                on_step=step_is_over,
            )


def _gradients(
    plan: DpPlan,
    model: nn.Linear,
    independence: Independence,
    records: Sequence[Sequence[int]],
    record_loss: RecordLoss,
    step_is_over: Callable[[], None],
) -> None:
    round_plan = smallest_round(plan, dimension=_DIMENSION)
    with _paid(plan) as reserve:
        for server_round in range(1, plan.rounds + 1):
            dp_sgd.release_private_gradient(
                model=model,
                flatten_as=list(model.parameters()),
                plan=plan,
                round_plan=round_plan,
                reservation=reserve(0, server_round),
                independence=independence,
                records_of_unit=records,
                record_loss=record_loss,
                physical_batches=_one_batch,
                random=randomness.SecureRandom(),
            )
            step_is_over()


def judge_sampling(entered: NDArray[np.bool_], rate: Fraction) -> SamplingAudit:
    """Four looks at [steps, units] coins: their mean, the batches' sizes, the units' counts, neighbouring steps.

    Dispersions are held against gamma distributions of the exact mean and variance, the two others against normal
    ones. A rate of 1 leaves nothing to chance: every unit must be in every step.
    """
    steps, units = entered.shape
    q, sizes, counts = float(rate), entered.sum(axis=1), entered.sum(axis=0)
    if rate == 1:
        looks = {"rate": 1.0 if entered.all() else 0.0}
        batch_spread = unit_spread = 1.0
    else:
        batch_spread, by_size = _dispersion(sizes, units, q)
        unit_spread, by_unit = _dispersion(counts, steps, q)
        looks = {"rate": _two_sided((entered.sum() - steps * units * q) / math.sqrt(steps * units * q * (1 - q)))}
        looks |= {"batch sizes": by_size, "units": by_unit}
        if steps > 1:
            again = int((entered[1:] & entered[:-1]).sum())
            variance = units * ((steps - 1) * q**2 * (1 - q**2) + 2 * (steps - 2) * (q**3 - q**4))
            looks["neighbouring steps"] = _two_sided((again - (steps - 1) * units * q**2) / math.sqrt(variance))
    return SamplingAudit(
        steps=steps,
        units=units,
        rate=rate,
        observed_rate=float(entered.mean()),
        batch_spread=batch_spread,
        unit_spread=unit_spread,
        looks=looks,
        p_value=min(1.0, len(looks) * min(looks.values())),
    )


def _dispersion(counts: NDArray[np.int64], trials: int, q: float) -> tuple[float, float]:
    """Spread of binomial counts over what it should be, and how probable one so far from 1 is."""
    variance = trials * q * (1 - q)
    total = float(np.square(counts - trials * q).sum()) / variance
    deviation = counts.size * (2 + (1 - 6 * q * (1 - q)) / variance)
    shape, scale = counts.size**2 / deviation, deviation / counts.size
    tail = min(stats.gamma.cdf(total, shape, scale=scale), stats.gamma.sf(total, shape, scale=scale))
    return total / counts.size, min(1.0, 2 * float(tail))


def _two_sided(z: float) -> float:
    return 2 * float(stats.norm.sf(abs(z)))
