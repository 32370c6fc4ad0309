"""The private step: per-unit gradients by Opacus' formula, clipped, summed, noised, divided by a public number.

Clipping, summing and noise are these few lines rather than Opacus' optimizer because that one spoils every parameter
when one record's gradient is NaN, keeps a partial sum when a loop is left early, derives the expected batch size by
truncation, cannot take an empty batch with transformers, and draws its noise from torch's global generator. A test
holds the two against each other where both are right.

Floating point. Every unit's clipped gradient is rounded to a lattice, the sum of units and the noise are integers on
it, and what leaves the step is an integer. So there are no floating-point gaps that tell one sum from another (Mironov
2012), and the bound C holds for the rounded gradients: they are clipped a little below it. Because the sum is an
integer, adding rounded noise to it is rounding the Gaussian mechanism's result, which is post-processing. The sum of
several sites' rounded noises is, up to 1e-200, the result with random rounding, post-processing again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedcollm_privacy.clipping import PhysicalBatches, RecordLoss, clipped_sum
from fedcollm_privacy.errors import PrivacyViolation, ProtocolError
from fedcollm_privacy.independence import Independence
from fedcollm_privacy.messages import NoisySum, RoundPlan
from fedcollm_privacy.per_sample import clear_gradients, trainable
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.randomness import SecureRandom
from fedcollm_privacy.reservation import Ran, Reservation, code_digest

__all__ = [
    "Observation",
    "noisy_sum",
    "release_private_gradient",
    "require_agreement",
    "run_private_steps",
]

_LONGEST_NOISE = 9.0
"""Standard deviations; `SecureRandom.normals` ends at 8.58."""

_LEAST_NOISE_STEPS = 16.0
"""Noise standard deviations in lattice steps. From 8 on, sums of rounded Gaussians differ from a rounded sum by less
than 1e-200 in total variation (Poisson summation: exp(-pi^2 s^2))."""

_FALSE_ALARM = math.log(2e12)
"""The check of the noise fails a sound step with probability 1e-12 at most (Laurent and Massart 2000, lemma 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """How clipping and noise met one step's gradients. Computed from records without noise: never to be released.

    Attributes:
        clipped_fraction: share of the sampled units whose gradient was longer than C.
        signal_to_noise: L2 norm of the clipped sum over the expected norm of the noise.
    """

    clipped_fraction: float
    signal_to_noise: float


def _check_noise(noise: NDArray[np.int64], deviation: float) -> None:
    """Refuse noise whose variance is not the plan's, as from a generator that broke or a draw that was not added."""
    count = noise.size
    variance = float(np.square(noise / deviation).mean())
    margin = 2.0 * math.sqrt(_FALSE_ALARM / count) + 2.0 * _FALSE_ALARM / count
    if not 1.0 - margin <= variance <= 1.0 + margin:
        raise PrivacyViolation(
            f"the noise has {variance:.3g} times the planned variance; the random generator or the step is broken"
        )


def noisy_sum(
    *,
    model: nn.Module,
    plan: DpPlan,
    units: Sequence[Sequence[int]],
    record_loss: RecordLoss,
    physical_batches: PhysicalBatches,
    random: SecureRandom,
    round_plan: RoundPlan | None = None,
    observe: Callable[[Observation], None] | None = None,
) -> NoisySum:
    """`clipped_sum` plus this site's noise, integers too. No units give pure noise, a counted step like any other.

    Args:
        model: see `clipped_sum`, as for plan, units, record_loss and physical_batches.
        random: the step's noise.
        round_plan: whose grid to use where the sum itself leaves the site; without one, the lattice of C / 2^20.
        observe: gets what must not be released.

    Raises:
        PrivacyViolation: see `clipped_sum`; or the noise is not there, or finer than the lattice.
    """
    if random.seeded is not (plan.randomness == "insecure_test_seed"):
        raise PrivacyViolation("the plan says where randomness comes from, and it comes from elsewhere")
    grid_step = None if round_plan is None else round_plan.grid_step
    summed = clipped_sum(
        model=model,
        plan=plan,
        units=units,
        record_loss=record_loss,
        physical_batches=physical_batches,
        grid_step=grid_step,
    )
    deviation = plan.site_noise_multiplier * plan.max_grad_norm / summed.grid_step
    if deviation < _LEAST_NOISE_STEPS:
        raise PrivacyViolation(f"noise of {deviation:.2g} grid steps: at least {_LEAST_NOISE_STEPS:g} are needed")
    grid = summed.grid
    if round_plan is not None:
        room = math.floor(round_plan.levels - _LONGEST_NOISE * deviation)
        grid = np.clip(grid, -room, room)
    released = grid + np.rint(random.normals(grid.size) * deviation).astype(np.int64)
    _check_noise(released - grid, deviation)
    if observe is not None:
        signal = float(np.linalg.norm(grid.astype(np.float64))) / (deviation * math.sqrt(grid.size))
        observe(Observation(clipped_fraction=summed.clipped / max(1, len(units)), signal_to_noise=signal))
    ran = Ran(
        steps=1,
        noise_multiplier=deviation * summed.grid_step / plan.max_grad_norm,
        max_grad_norm=plan.max_grad_norm,
        sample_rate=f"{plan.sample_rate.numerator}/{plan.sample_rate.denominator}",
        sampling="given",
        clipping=plan.clipping,
        randomness="insecure_test_seed" if random.seeded else "operating_system",
        code=code_digest(),
    )
    return NoisySum(grid=released, grid_step=summed.grid_step, ran=ran)


def _sample(plan: DpPlan, records_of_unit: Sequence[Sequence[int]], random: SecureRandom) -> list[list[int]]:
    """A Poisson sample of units, each with at most ``max_records_per_unit`` of its records, chosen afresh."""
    mask = random.poisson_mask(plan.sample_rate, len(records_of_unit))
    units = []
    for unit in mask.nonzero()[0].tolist():
        records = records_of_unit[unit]
        units.append([records[i] for i in random.subset(len(records), plan.max_records_per_unit)])
    return units


def run_private_steps(
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: DpPlan,
    reservation: Reservation,
    independence: Independence,
    records_of_unit: Sequence[Sequence[int]],
    record_loss: RecordLoss,
    physical_batches: PhysicalBatches,
    random: SecureRandom,
    on_step: Callable[[], None],
    observe: Callable[[Observation], None] | None = None,
) -> Ran:
    """Take exactly the reserved steps of the plan.

    Args:
        model: trainable parameters are the adapter's.
        optimizer: over the same parameters; whatever it does with the noisy gradients is post-processing.
        plan: what is run; must be the one that was reserved.
        reservation: proof that the steps are on the ledger; used up by this call.
        independence: proof that this model's records do not mix.
        records_of_unit: for every unit of the data set, its records.
        record_loss: losses of given records.
        physical_batches: from the sampled units to the split of their positions.
        random: sampling and noise.
        on_step: called after every step, with nothing.
        observe: gets what must not be released, see `Observation`.

    Returns:
        What the steps say of themselves, for the ledger.

    Raises:
        PrivacyViolation: the reservation is not for this plan or was used, the plan releases gradients, the model was
            not tested, or the first step left every parameter unchanged (the adapter is not connected to the loss:
            noise alone would have moved it).
    """
    if plan.release != "update":
        raise PrivacyViolation("the plan releases gradients; no steps are taken at the site")
    independence.require(model)
    parameters = trainable(model)
    was_training = model.training
    model.train()
    taken: list[Ran] = []
    try:
        for step in range(reservation.redeem(plan.digest)):
            before = [p.detach().clone() for p in parameters] if step == 0 else []
            noisy = noisy_sum(
                model=model,
                plan=plan,
                units=_sample(plan, records_of_unit, random),
                record_loss=record_loss,
                physical_batches=physical_batches,
                random=random,
                observe=observe,
            )
            taken += [] if noisy.ran is None else [noisy.ran]
            _set_gradients(parameters, noisy, plan.expected_batch_size)
            optimizer.step()
            if before and all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True)):
                raise PrivacyViolation("the first step changed no parameter: the optimizer holds other tensors")
            on_step()
    finally:
        clear_gradients(parameters)
        model.train(was_training)
    least = min(taken, key=lambda ran: ran.noise_multiplier)
    return replace(least, steps=len(taken), sampling="poisson")


def _set_gradients(parameters: list[nn.Parameter], noisy: NoisySum, expected_batch_size: int) -> None:
    start = 0
    for parameter in parameters:
        piece = noisy.grid[start : start + parameter.numel()] * (noisy.grid_step / expected_batch_size)
        parameter.grad = torch.from_numpy(piece).reshape(parameter.shape).to(parameter)
        start += parameter.numel()


def require_agreement(plan: DpPlan, round_plan: RoundPlan) -> None:
    """Refuse a round that is not what this site's plan promises; to be asked before anything is spent.

    Every honest site asks the same, so whoever adds a share of the noise can count on the others' shares.

    Raises:
        ProtocolError: the round releases something else, on another range, with other noise, counts on another number
            of honest sites, or has other privacy terms.
    """
    if round_plan.dp != plan.terms:
        raise ProtocolError(f"the round's privacy terms are {round_plan.dp}; this site's plan promises {plan.terms}")
    names = ("release", "clip", "noise_multiplier", "least_honest")
    asked = tuple(getattr(round_plan, name) for name in names)
    promised: tuple[object, ...] = ("update", *asked[1:])
    if plan.release == "gradient":
        promised = ("gradient", plan.gradient_clip, plan.noise_multiplier, plan.least_honest)
    for name, value, allowed in zip(names, asked, promised, strict=True):
        if value != allowed:
            raise ProtocolError(f"the round's {name} is {value}; this site's plan promises {allowed}")


def release_private_gradient(
    *,
    model: nn.Module,
    flatten_as: Sequence[nn.Parameter],
    plan: DpPlan,
    round_plan: RoundPlan,
    reservation: Reservation,
    independence: Independence,
    records_of_unit: Sequence[Sequence[int]],
    record_loss: RecordLoss,
    physical_batches: PhysicalBatches,
    random: SecureRandom,
    observe: Callable[[Observation], None] | None = None,
) -> NoisySum:
    """The one reserved step's noisy gradient sum on the round's own grid; no parameter moves.

    With distributed noise this holds only the site's share of the noise and must leave the site encrypted, to be
    opened in a sum. Other arguments as in `run_private_steps`.

    Args:
        flatten_as: the trainable parameters, in the order in which the result holds them.
        round_plan: the round's grid; it must be what the plan promises.

    Raises:
        PrivacyViolation: see `run_private_steps`.
        ProtocolError: see `require_agreement`.
    """
    if plan.release != "gradient":
        raise PrivacyViolation("the plan does not release gradients")
    require_agreement(plan, round_plan)
    independence.require(model)
    parameters = trainable(model)
    place = {id(p): i for i, p in enumerate(parameters)}
    if sorted(map(id, flatten_as)) != sorted(place):
        raise PrivacyViolation("the order names other parameters than those that are trained")
    if reservation.redeem(plan.digest) != 1:
        raise PrivacyViolation("one step is released a round; the reservation is for more")
    was_training = model.training
    model.train()
    try:
        noisy = noisy_sum(
            model=model,
            plan=plan,
            units=_sample(plan, records_of_unit, random),
            record_loss=record_loss,
            physical_batches=physical_batches,
            random=random,
            round_plan=round_plan,
            observe=observe,
        )
    finally:
        clear_gradients(parameters)
        model.train(was_training)
    pieces = np.split(noisy.grid, np.cumsum([p.numel() for p in parameters])[:-1])
    grid = np.concatenate([pieces[place[id(p)]] for p in flatten_as])
    ran = None if noisy.ran is None else replace(noisy.ran, sampling="poisson")
    return NoisySum(grid=grid, grid_step=noisy.grid_step, ran=ran)
