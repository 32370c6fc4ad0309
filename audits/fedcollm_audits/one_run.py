"""Audit of a private run by one run of it (Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One Training Run").

Each of m canaries is in the data or not, by its own fair coin. The private steps run once, as they ship: reservation,
Poisson sampling, clipping, noise. From what they release r guesses are made, the r being fixed beforehand, and the
number of right ones bounds epsilon of the run from below. Unlike that of `step_audit` the bound takes nothing for
granted about the mechanism, and sampling and the number of steps are audited with it. The price is that it is loose:
it finds gross faults only, and best where the claim is small.

`audit_through_the_sum` asks both audits about sums over several sites, where the claim counts all sites' noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedcollm_audits.confidence import one_run_epsilon, one_run_p_value
from fedcollm_audits.step_audit import Canaries, StepAudit, audit_step, dirac_canaries
from fedcollm_privacy import _validate
from fedcollm_privacy.dp_sgd import noisy_sum, release_private_gradient, run_private_steps
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.independence import PROBES, prove_independence
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.messages import NoisySum, RoundPlan
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom
from fedcollm_privacy.reservation import Reservation

__all__ = [
    "OneRunAudit",
    "SumAudit",
    "audit_one_run",
    "audit_through_the_sum",
    "epsilon_lower_bound",
    "grids_added",
    "p_value",
]

Opened = Callable[[RoundPlan, Sequence[NoisySum]], NDArray[np.int64]]
_RUN = "audit"


@dataclass(frozen=True, slots=True, kw_only=True)
class OneRunAudit:
    """What one run showed.

    Attributes:
        claimed_epsilon: the plan's, at its delta, for all its steps.
        epsilon_lower_bound: of the run; 0.0 where nothing was found.
        p_value: how probable so many right guesses are at most if the claim holds.
        canaries: m, each included by a fair coin.
        included: how many the coins put in.
        guesses: r, fixed beforehand; the other canaries are not guessed about.
        correct: v, right guesses.
        delta: of the claim.
        confidence: probability with which the bound is right, at least.
        exceeds_claim: the run leaks more than the plan says.
        conditions: what the bound takes for granted.
    """

    claimed_epsilon: float
    epsilon_lower_bound: float
    p_value: float
    canaries: int
    included: int
    guesses: int
    correct: int
    delta: float
    confidence: float
    exceeds_claim: bool
    conditions: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SumAudit:
    """Both audits of what an opened sum shows, each against the claim for sums.

    Attributes:
        step: of single steps (sensitive, conditional).
        one_run: of a whole run (unconditional, loose).
    """

    step: StepAudit
    one_run: OneRunAudit


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """How probable v right guesses of r about m canaries are at most under (epsilon, delta): `one_run_p_value`."""
    return one_run_p_value(canaries=m, guesses=r, correct=v, epsilon=epsilon, delta=delta)


def epsilon_lower_bound(m: int, r: int, v: int, delta: float, significance: float) -> float:
    """The largest epsilon that the guesses refute: `one_run_epsilon`, which bisects the monotone `p_value`."""
    return one_run_epsilon(canaries=m, guesses=r, correct=v, delta=delta, significance=significance)


def audit_one_run(plan: DpPlan, *, canaries: int = 1000, guesses: int = 200, confidence: float = 0.95) -> OneRunAudit:
    """Run all steps of the plan once on randomly included canaries, and bound what they leak from below.

    The steps are `run_private_steps`, paid for from a ledger of their own. The attacker reads the parameters after
    every step, which the plan's guarantee allows for.

    Args:
        plan: whose claim is tested, with steps that stay at the site (``release="update"``).
        canaries: m, how many Dirac canaries, at least 6. Those that are included are the site's whole data.
        guesses: r. The ``r // 2`` canaries that look most like being in are called in, as many at the other end out.
            To be fixed before looking: the best of several r on one run is no bound.
        confidence: of the bound. A sound run exceeds its claim with probability ``1 - confidence`` at most.

    Raises:
        InvalidValue: the plan's noise is seeded or it releases gradients, or an argument is out of range.
        PrivacyViolation: the steps refused.
    """
    _check(plan, "update", canaries, guesses)
    included = SecureRandom().poisson_mask(Fraction(1, 2), canaries)
    seen = _steps_of_a_run(plan, dirac_canaries(plan, canaries), included)
    return _judge(plan, included, seen, guesses, confidence)


def grids_added(_: RoundPlan, sums: Sequence[NoisySum]) -> NDArray[np.int64]:
    """What the secure sum opens, as the tests of the secure sum show: the exact sum of the sites' integers."""
    total: NDArray[np.int64] = np.sum([site.grid for site in sums], axis=0)
    return total


def audit_through_the_sum(
    plan: DpPlan,
    *,
    round_plan: RoundPlan,
    guesses: int = 200,
    calls: int = 100,
    confidence: float = 0.95,
    opened: Opened = grids_added,
) -> SumAudit:
    """Both audits on opened sums over ``round_plan.max_contributors`` sites; the first holds the canaries.

    For the one run every site takes its round by `release_private_gradient`, with a reservation and a sample of its
    own. What the other sites' records add is known to the attacker and taken off, so they have none here.

    Args:
        plan: of every site, with one-step rounds (``release="gradient"``).
        round_plan: the rounds' grid; its dimension is the number of Dirac canaries.
        guesses: see `audit_one_run`.
        calls: of the step audit, see `audit_step`.
        confidence: of either bound.
        opened: from the sites' noisy sums to the opened sum. `grids_added`, or a secure sum, or a sum that lacks
            something, to show that the audits find it.

    Raises:
        InvalidValue, PrivacyViolation: see `audit_one_run`.
        ProtocolError: the round is not what the plan promises.
    """
    _check(plan, "gradient", round_plan.dimension, guesses)
    canaries = dirac_canaries(plan, round_plan.dimension)

    def step(**asked: Any) -> NoisySum:
        others = [asked | {"units": [], "random": SecureRandom()} for _ in range(round_plan.max_contributors - 1)]
        sums = [noisy_sum(**site) for site in (asked, *others)]
        return NoisySum(grid=opened(round_plan, sums), grid_step=sums[0].grid_step)

    found = audit_step(plan, canaries=canaries, calls=calls, confidence=confidence, step=step, round_plan=round_plan)
    included = SecureRandom().poisson_mask(Fraction(1, 2), round_plan.dimension)
    seen = _rounds_of_a_run(plan, round_plan, canaries, included, opened)
    return SumAudit(step=found, one_run=_judge(plan, included, seen, guesses, confidence))


def _check(plan: DpPlan, release: str, canaries: int, guesses: int) -> None:
    if plan.randomness != "operating_system":
        raise InvalidValue("plan.randomness", plan.randomness, "'operating_system': what ships is what is audited")
    _validate.one_of((release,), **{"plan.release": plan.release})
    _validate.integer_at_least(PROBES, canaries=canaries)
    _validate.integer_at_least(2, guesses=guesses)
    if guesses % 2 or guesses > canaries:
        raise InvalidValue("guesses", guesses, f"an even number <= {canaries}, the canaries: half are for either side")


@contextmanager
def _paid(plan: DpPlan, sites: int = 1) -> Iterator[Callable[[int, int], Reservation]]:
    """Ledgers of the audit's own, with exactly the plan's budget: gives a site's reservation of a round."""
    claim = plan.epsilon(plan.steps)
    with TemporaryDirectory() as folder:
        keys = [SigningKey.generate(f"{_RUN}-{site}") for site in range(sites)]
        ledgers = [Ledger(Path(folder) / f"{key.name}.sqlite", key) for key in keys]
        for ledger in ledgers:
            cap = Cap(epsilon=1.001 * claim, delta=2 * plan.delta)
            ledger.commit_plan(run_id=_RUN, data_set="canaries", plan=plan, caps=(cap,))
        yield lambda site, server_round: ledgers[site].reserve(run_id=_RUN, plan=plan, server_round=server_round)


def _one_batch(units: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(range(len(units)))]


def _units_in(canaries: Canaries, included: NDArray[np.bool_]) -> list[Sequence[int]]:
    return [unit for unit, kept in zip(canaries.units, included, strict=True) if kept]


def _steps_of_a_run(plan: DpPlan, canaries: Canaries, included: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What every step showed of every Dirac canary, [steps, canaries], in units of C: how its parameter moved."""
    (parameter,) = canaries.model.parameters()
    before, moves = parameter.detach().clone(), []

    def look() -> None:
        nonlocal before
        after = parameter.detach().clone()
        moves.append((before - after).double().numpy().reshape(-1))
        before = after

    with _paid(plan) as reserve:
        for server_round in range(1, plan.rounds + 1):
            run_private_steps(
                model=canaries.model,
                optimizer=torch.optim.SGD([parameter], lr=1.0),  # moves by just what the step released
                plan=plan,
                reservation=reserve(0, server_round),
                independence=prove_independence(canaries.model, canaries.record_loss),
                records_of_unit=_units_in(canaries, included),
                record_loss=canaries.record_loss,
                physical_batches=_one_batch,
                random=SecureRandom(),
                on_step=look,
            )
    seen: NDArray[np.float64] = np.stack(moves) * (plan.expected_batch_size / plan.max_grad_norm)
    return seen


def _rounds_of_a_run(
    plan: DpPlan, round_plan: RoundPlan, canaries: Canaries, included: NDArray[np.bool_], opened: Opened
) -> NDArray[np.float64]:
    """What every round's opened sum showed of every Dirac canary, [rounds, canaries], in units of C."""
    independence = prove_independence(canaries.model, canaries.record_loss)
    data: list[list[Sequence[int]]] = [_units_in(canaries, included), *[[]] * (round_plan.max_contributors - 1)]
    seen = []
    with _paid(plan, len(data)) as reserve:
        for server_round in range(1, plan.rounds + 1):
            sums = [
                release_private_gradient(
                    model=canaries.model,
                    flatten_as=list(canaries.model.parameters()),
                    plan=plan,
                    round_plan=round_plan,
                    reservation=reserve(site, server_round),
                    independence=independence,
                    records_of_unit=theirs,
                    record_loss=canaries.record_loss,
                    physical_batches=_one_batch,
                    random=SecureRandom(),
                )
                for site, theirs in enumerate(data)
            ]
            seen.append(opened(round_plan, sums) * (round_plan.grid_step / plan.max_grad_norm))
    return np.stack(seen)


def _log_likelihood_ratio(plan: DpPlan, seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of "in the data" against "not", [canaries], if sampling and noise are the plan's and each step stands alone."""
    rate, variance = float(plan.sample_rate), plan.noise_multiplier**2
    absent = math.log1p(-rate) if rate < 1 else -math.inf
    ratio: NDArray[np.float64] = np.logaddexp(absent, math.log(rate) + (2 * seen - 1) / (2 * variance)).sum(axis=0)
    return ratio


def _judge(
    plan: DpPlan, included: NDArray[np.bool_], seen: NDArray[np.float64], guesses: int, confidence: float
) -> OneRunAudit:
    order = np.argsort(_log_likelihood_ratio(plan, seen), kind="stable")
    called_out, called_in = order[: guesses // 2], order[-(guesses // 2) :]
    correct = int((~included[called_out]).sum() + included[called_in].sum())
    m, claim = included.size, plan.epsilon(plan.steps)
    bound = epsilon_lower_bound(m, guesses, correct, plan.delta, 1 - confidence)
    return OneRunAudit(
        claimed_epsilon=claim,
        epsilon_lower_bound=bound,
        p_value=p_value(m, guesses, correct, claim, plan.delta),
        canaries=m,
        included=int(included.sum()),
        guesses=guesses,
        correct=correct,
        delta=plan.delta,
        confidence=confidence,
        exceeds_claim=bound > claim,
        conditions=f"One-run lower bound at {confidence:.6g} confidence and delta {plan.delta:g}, from {guesses:,} "
        f"guesses about {m:,} canaries that fair coins included. Holds whatever the mechanism, for an attacker who "
        "sees every step. It reaches a fraction of a large epsilon only: a bound within the claim is no proof of it.",
    )
