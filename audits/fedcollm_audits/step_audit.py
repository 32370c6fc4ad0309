"""Audit of the private step as it ships: does one call leak what the plan says, and no more?

Two hypotheses, an attacker who sees every step (Nasr et al. 2023, "Tight Auditing of Differentially Private Machine
Learning"). Canaries are units of whom the attacker knows the gradient. Each call of the step includes each canary by a
fair coin; what the attacker sees of canary i is the noisy sum along a direction of its own, over C: N(0, sigma^2)
without it and N(1, sigma^2) with it, if clipping and noise are right. A threshold between the two is chosen on one half
of the calls; its errors on the other half bound the step's mu from below (`confidence.gaussian_mu`), and the
accountant turns mu into the epsilon of the whole run. A second look, at differences of two calls, finds noise that is
used again; the two share the chance of error.

The last move is why the result is *conditional*: see `StepAudit.conditions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedcollm_audits.confidence import gaussian_mu
from fedcollm_privacy import _validate, accounting
from fedcollm_privacy.clipping import PhysicalBatches, RecordLoss, clipped_sum
from fedcollm_privacy.dp_sgd import noisy_sum
from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.messages import NoisySum, RoundPlan
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom

__all__ = ["Canaries", "Step", "StepAudit", "audit_step", "dirac_canaries"]

_LENGTH = 100.0
"""Of a Dirac canary's gradient, in units of C. Automatic clipping then gives C / 1.0001."""

_BATCH = 128
"""Units in a physical batch: several batches a call, as in training."""

_THRESHOLDS = 99
_CLEARLY = 1.1
_FINEST_NOISE = 0.1
"""Smallest sigma handed to the accountant, whose time grows without end below; a mu above 10 counts as 10."""


class Step(Protocol):
    """What is audited: `noisy_sum`, or a step that is broken on purpose to show that the audit finds it."""

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
        """The noisy sum of the units' clipped gradients."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """Units of whom the attacker knows everything, with the model that gives their gradients.

    Attributes:
        model: its trainable parameters are the step's, at least one for each canary.
        record_loss: losses of the canaries' records.
        units: the records of each canary.
    """

    model: nn.Module
    record_loss: RecordLoss
    units: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAudit:
    """What the audit found; numbers are about the run that the plan describes.

    Attributes:
        claimed_epsilon: the plan's, at its delta, for all its steps.
        epsilon_lower_bound: of the run, conditional, see ``conditions``; 0.0 where nothing was found.
        mu_lower_bound: of one step that includes the unit, in units of one over sigma; not above zero: nothing found.
        observations: canaries times calls, half of them used for the threshold.
        confidence: probability with which ``mu_lower_bound`` is right, at least.
        exceeds_claim: the step leaks more than the plan says.
        conditions: what the bound takes for granted.
    """

    claimed_epsilon: float
    epsilon_lower_bound: float
    mu_lower_bound: float
    observations: int
    confidence: float
    exceeds_claim: bool
    conditions: str


def dirac_canaries(plan: DpPlan, count: int) -> Canaries:
    """Canaries whose gradients are far longer than C, each on a coordinate of its own (Nasr et al. 2023).

    Clipping leaves C of each (no more of a whole person's, whose records all lie on that coordinate), so they are the
    worst case of the guarantee.
    """
    _validate.integer_at_least(1, canaries=count)
    model = nn.Linear(count, 1, bias=False)
    rows_MD = _LENGTH * plan.max_grad_norm * torch.eye(count)
    each = plan.max_records_per_unit

    def record_loss(records: Sequence[int]) -> torch.Tensor:
        # The gradient of a linear function is its input.
        losses_B: torch.Tensor = model(rows_MD[[record // each for record in records]])[:, 0]
        return losses_B

    return Canaries(model=model, record_loss=record_loss, units=[range(each * i, each * (i + 1)) for i in range(count)])


def audit_step(
    plan: DpPlan,
    *,
    canaries: int | Canaries,
    calls: int,
    confidence: float = 0.95,
    seed: int = 0,
    step: Step = noisy_sum,
    round_plan: RoundPlan | None = None,
) -> StepAudit:
    """Call the step ``calls`` times with randomly included canaries, and bound what it leaks from below.

    Args:
        plan: whose claim is tested, and what the step is called with.
        canaries: how many Dirac canaries, or canaries of one's own. Many canaries save calls.
        calls: of the step, at least 4.
        confidence: of the bound. A sound step exceeds its claim with probability ``1 - confidence`` at most.
        seed: of the coins, which hide nothing. The step's noise comes from the operating system.
        step: what is audited.
        round_plan: for a step whose sum leaves the site: the round's grid, see `noisy_sum`.

    Raises:
        InvalidValue: the plan's noise is seeded, or an argument is out of range, or canaries point the same way.
        PrivacyViolation: the step refused, see `noisy_sum`.
    """
    if plan.randomness != "operating_system":
        raise InvalidValue("plan.randomness", plan.randomness, "'operating_system': what ships is what is audited")
    _validate.integer_at_least(4, calls=calls)
    _validate.positive(confidence=confidence)
    if not confidence < 1:
        raise InvalidValue("confidence", confidence, "a number in (0, 1)")
    if isinstance(canaries, int):
        canaries = dirac_canaries(plan, canaries)
    included, seen = _observations(plan, canaries, calls, seed, step, round_plan)
    views = _views(included, seen)
    mu = max(_held_out_mu(*view, (1 - confidence) / len(views)) for view in views)
    bound = 0.0
    if mu > 0:
        sigma = max(1 / mu, _FINEST_NOISE)
        bound = accounting.epsilon(sigma, plan.sample_rate, plan.steps, plan.delta)
    claim = plan.epsilon(plan.steps)
    return StepAudit(
        claimed_epsilon=claim,
        epsilon_lower_bound=bound,
        mu_lower_bound=mu,
        observations=seen.size,
        confidence=confidence,
        exceeds_claim=bound > claim,
        conditions=_conditions(plan, seen.size, confidence),
    )


def _conditions(plan: DpPlan, observations: int, confidence: float) -> str:
    return (
        f"Conditional lower bound at {confidence:.6g} confidence, from {observations:,} observations of single steps. "
        "For mu of a step: conditional on observations that are independent of each other. For epsilon of the run, "
        f"moreover: on a step whose trade-off function is a Gaussian's, and on {plan.steps:,} independent steps that "
        f"sample each unit with probability {plan.sample_rate}, which was not audited. Composed by the "
        "claim's own accountant, which rounds up. A bound within the claim is no proof of the claim."
    )


def _whole_batches(units: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(range(start, min(start + _BATCH, len(units)))) for start in range(0, len(units), _BATCH)]


def _observations(
    plan: DpPlan, canaries: Canaries, calls: int, seed: int, step: Step, round_plan: RoundPlan | None
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which canary was in which call, and what was seen of it, both [calls, canaries].

    An attacker who wants to know about canary i knows the others. What they put into the sum is taken off, and the
    rest is looked at along directions at right angles to each other, where spherical noise is independent.
    """
    directions_DM, along_MM = _directions(plan, canaries, round_plan)
    others_MM = along_MM - np.diag(np.diag(along_MM))
    included = np.random.default_rng(seed).random((calls, len(canaries.units))) < 0.5
    seen = np.empty(included.shape)
    random = SecureRandom()
    for call in range(calls):
        noisy = step(
            model=canaries.model,
            plan=plan,
            units=[canaries.units[i] for i in included[call].nonzero()[0]],
            record_loss=canaries.record_loss,
            physical_batches=_whole_batches,
            random=random,
            round_plan=round_plan,
        )
        released_D = noisy.grid * (noisy.grid_step / plan.max_grad_norm)
        seen[call] = released_D @ directions_DM - included[call] @ others_MM
    return included, seen


def _directions(
    plan: DpPlan, canaries: Canaries, round_plan: RoundPlan | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Orthonormal directions, one for each canary [d, m]; and each canary's clipped gradient along all of them [m, m].

    By Gram and Schmidt: a direction is what of a canary's gradient lies in none of the earlier ones, so a canary that
    resembles an earlier one is seen less of. That weakens the bound and never falsifies it.
    """
    gradients_MD = np.stack(
        [
            clipped_sum(
                model=canaries.model,
                plan=plan,
                units=[unit],
                record_loss=canaries.record_loss,
                physical_batches=_whole_batches,
                grid_step=None if round_plan is None else round_plan.grid_step,
            ).grid
            for unit in canaries.units
        ]
    ).astype(np.float64)
    gradients_MD *= (plan.max_grad_norm / 2**20 if round_plan is None else round_plan.grid_step) / plan.max_grad_norm
    if gradients_MD.shape[0] > gradients_MD.shape[1]:
        raise InvalidValue("canaries", gradients_MD.shape[0], f"at most {gradients_MD.shape[1]}, one for a parameter")
    directions_DM, triangle_MM = np.linalg.qr(gradients_MD.T)
    own = np.diag(triangle_MM)
    if np.abs(own).min() < 1e-3:
        raise InvalidValue("canaries", "gradients that depend on each other", "canaries of independent gradients")
    directions_DM = directions_DM * np.sign(own)
    return directions_DM, gradients_MD @ directions_DM


def _views(
    included: NDArray[np.bool_], seen: NDArray[np.float64]
) -> list[tuple[NDArray[np.bool_], NDArray[np.float64]]]:
    """Two ways to look: at each call alone; and at the first of two calls less the noise that the second shows.

    Of a sound step the second way shows less. Of one that uses its noise again it shows everything.
    """
    pairs = len(seen) // 2
    # The attacker knows who was in the second call; what it put there is about 1.
    noise = seen[1::2][:pairs] - included[1::2][:pairs]
    return [(included, seen), (included[0::2][:pairs], seen[0::2][:pairs] - noise)]


def _held_out_mu(included: NDArray[np.bool_], seen: NDArray[np.float64], significance: float) -> float:
    half = len(seen) // 2
    threshold = _threshold(included[:half], seen[:half], significance)
    return _mu(included[half:], seen[half:], threshold, significance)


def _threshold(included: NDArray[np.bool_], seen: NDArray[np.float64], significance: float) -> float:
    """A threshold with a good bound on these observations, which are then used for nothing else.

    Halfway between the means is best for Gaussians of one width, and hardly moves from audit to audit. Only where
    another threshold is clearly better (noise that ends somewhere betrays itself at its end) is that one taken: the
    best of many on few observations is mostly luck.
    """
    if included.all() or not included.any():
        return 0.5
    middle = float(seen[included].mean() + seen[~included].mean()) / 2
    candidates = [float(value) for value in np.quantile(seen, np.linspace(0, 1, _THRESHOLDS + 2)[1:-1])]
    best = max(candidates, key=lambda candidate: _mu(included, seen, candidate, significance))
    clearly = _mu(included, seen, best, significance) > _CLEARLY * max(0.0, _mu(included, seen, middle, significance))
    return best if clearly else middle


def _mu(included: NDArray[np.bool_], seen: NDArray[np.float64], threshold: float, significance: float) -> float:
    guessed = seen > threshold
    positives = int(included.sum())
    if positives in (0, included.size):
        return float("-inf")
    return gaussian_mu(
        false_positives=int((guessed & ~included).sum()),
        negatives=included.size - positives,
        false_negatives=int((~guessed & included).sum()),
        positives=positives,
        significance=significance,
    )
