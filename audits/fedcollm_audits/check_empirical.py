"""Attacks on the training step that is installed here, with the plans that the run's ledgers hold.

What is attacked is the shipped code, by canaries, not the run itself: `code-is-what-ran` ties the two together. Coins
of canaries come from the operating system by a generator of the audit's own, because a bound holds only if they are
independent of all that the mechanism draws.

A sound step is called broken with a probability of 0.3 % at most by all of these checks together (`FALSE_ALARMS`). With
the 0.7 % of `check_leakage` an audit of a clean run raises a false alarm in one case of a hundred at most.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy import stats

import fedcollm_privacy
from fedcollm_audits.confidence import gaussian_mu
from fedcollm_audits.evidence import Evidence
from fedcollm_audits.one_run import (
    OneRunAudit,
    _judge,
    _steps_of_a_run,
    audit_through_the_sum,
    epsilon_lower_bound,
    grids_added,
)
from fedcollm_audits.planned import Planned, entries_of, planned_of
from fedcollm_audits.real_sum import honest_part, real_secure_sum, smallest_round
from fedcollm_audits.sampling_audit import audit_sampling
from fedcollm_audits.step_audit import StepAudit, audit_step, dirac_canaries
from fedcollm_audits.verdict import Check, Finding, failed, not_shown, passed
from fedcollm_privacy import dp_sgd, randomness
from fedcollm_privacy.errors import FedCollmError, ProtocolError, RoundLost
from fedcollm_privacy.messages import NoisySum

__all__ = [
    "CHECKS",
    "FALSE_ALARMS",
    "audit_the_run",
    "audit_the_sampling",
    "audit_the_step",
    "audit_the_sum",
    "installed_code",
    "least_visible_fault",
]

FALSE_ALARMS: Final[Mapping[str, float]] = {
    "step-audit": 0.0005,
    "one-run-audit": 0.001,
    "one-run-sum": 0.001,
    "poisson-sampling": 0.0005,
}
"""By check, the probability of calling a sound step broken; 0.3 % together."""

_MOST_STEPS = 400
_MOST_REAL_ROUNDS = 20
_MOST_REAL_SITES = 5
_POWER = 0.95


def audit_the_step(planned: Planned, coins: np.random.Generator, *, canaries: int = 400, calls: int = 1500) -> Finding:
    """Single steps, counted guesses, composed over the run (`step_audit`).

    Every call has fresh randomness, as every round at a site. With distributed noise a call is ``least_honest`` sites'
    steps, added: the claim is that of their sum. So many times fewer calls are made then, to end in the same time.
    """
    plan, confidence = planned.plan, 1 - FALSE_ALARMS["step-audit"]
    sites = plan.least_honest if plan.noise == "distributed" else 1
    calls = max(4, calls // sites)

    def step(**asked: Any) -> NoisySum:
        sums = [
            dp_sgd.noisy_sum(
                **(asked | {"random": randomness.SecureRandom(), "units": () if other else asked["units"]})
            )
            for other in range(sites)
        ]
        return NoisySum(grid=np.sum([one.grid for one in sums], axis=0), grid_step=sums[0].grid_step)

    found = audit_step(
        plan,
        canaries=canaries,
        calls=calls,
        confidence=confidence,
        seed=int(coins.integers(2**63)),
        step=step,
    )
    visible = least_visible_fault(plan.noise_multiplier, found.observations, confidence)
    power = (
        f"A step with less than {math.floor(100 * visible)} % of the planned noise would have been found "
        f"(in {100 * _POWER:.0f} of 100 audits)."
        if visible > 0
        else "With so much noise planned, this many observations would not even find a step without any."
    )
    bound = _bound("single steps, composed", found, planned.claim)
    return _told(planned, [bound], f"{canaries} canaries, {calls:,} calls of the step.", power, found.conditions)


def audit_the_run(planned: Planned, coins: np.random.Generator, *, canaries: int = 1000, guesses: int = 200) -> Finding:
    """All steps of the plan, taken once, and guesses about who was in the data (`one_run`)."""
    shortened, said = _shortened(planned, _MOST_STEPS)
    plan, confidence = shortened.plan, 1 - FALSE_ALARMS["one-run-audit"]
    if plan.release == "gradient":
        # The same steps; what the run releases of them is audited by one-run-sum.
        plan = replace(plan, noise="local", release="update")
        said += "The steps' own release is a sum, see one-run-sum; here one site's noise carries all of it. "
    included = coins.random(canaries) < 0.5
    seen = _steps_of_a_run(plan, dirac_canaries(plan, canaries), included)
    found = _judge(plan, included, seen, guesses, confidence)
    bound = _bound("one run of all steps", found, shortened.claim)
    return _told(shortened, [bound], f"{said}{_counted(found)}", _reach(found, shortened.claim), found.conditions)


def audit_the_sum(
    planned: Planned,
    *,
    canaries: int = 300,
    guesses: int = 100,
    calls: int = 300,
    real_rounds: int = _MOST_REAL_ROUNDS,
) -> Finding:
    """Both audits of what an opened sum shows, in the smallest round that the protocol allows.

    Colluders know what they put in, so that much is taken off: what is attacked holds the noise of ``least_honest``
    sites and no more. Some rounds go through the secure sum as it ships; the others are sums of the same integers.
    """
    shortened, said = _shortened(planned, _MOST_STEPS)
    plan, confidence = shortened.plan, 1 - FALSE_ALARMS["one-run-sum"] / 4
    round_plan = smallest_round(plan, dimension=canaries, value_bits=planned.value_bits)
    asked: dict[str, Any] = {"round_plan": round_plan, "confidence": confidence}
    added = audit_through_the_sum(plan, calls=calls, guesses=guesses, opened=honest_part(grids_added), **asked)
    bounds = [
        _bound("opened sums, single steps", added.step, shortened.claim),
        _bound("opened sums, one run", added.one_run, shortened.claim),
    ]
    visible = least_visible_fault(plan.noise_multiplier, added.step.observations, confidence)
    power = f"Sums with less than {math.floor(100 * visible)} % of the planned noise would have been found."
    sites = round_plan.max_contributors
    if sites > _MOST_REAL_SITES:
        real = f"{sites} sites are too many for the secure sum in this audit's time; integers were added instead."
    else:
        few = replace(plan, rounds=min(plan.rounds, real_rounds))
        try:
            with real_secure_sum(round_plan) as opened:
                through = audit_through_the_sum(few, calls=4, guesses=guesses, opened=honest_part(opened), **asked)
        except (ProtocolError, RoundLost) as error:
            return failed(f"The secure sum of the audit's own sites did not give the exact sum: {error}.")
        for name, one in (("single steps", through.step), ("one run", through.one_run)):
            bounds.append(_bound(f"opened by the real secure sum, {name}", one, few.epsilon(few.steps)))
        real = (
            f"{few.rounds + 4} rounds went through masks, CKKS and the aggregator's process with {sites} sites; every "
            f"sum was exact. {few.rounds} of them were one run, held against the claim for so many steps, "
            f"{few.epsilon(few.steps):.4g}."
        )
    conditions = (added.step.conditions, added.one_run.conditions)
    return _told(shortened, bounds, f"{said}{real}", power, _reach(added.one_run, shortened.claim), *conditions)


def audit_the_sampling(planned: Planned) -> Finding:
    """Who entered which step of the installed code (`sampling_audit`)."""
    plan, allowed = planned.plan, FALSE_ALARMS["poisson-sampling"]
    found = audit_sampling(plan)
    numbers = (
        f"{found.steps} steps on {found.units:,} units, planned rate {float(plan.sample_rate):.6g}, observed "
        f"{found.observed_rate:.6g}; batches' sizes spread {found.batch_spread:.3g} times as much as coins make them, "
        f"and how often units entered {found.unit_spread:.3g} times (0 where batches are cut from a shuffled list).",
        f"Four looks together: p = {found.p_value:.3g}; below {allowed:g} counts as broken, which happens to sound "
        "sampling that seldom.",
    )
    details = {"p_value": found.p_value, "looks": dict(found.looks), "allowed": allowed}
    if found.p_value < allowed:
        look = min(found.looks, key=lambda name: found.looks[name])
        return failed(f"Units do not enter by independent coins of the planned rate ({look}).", *numbers, **details)
    return passed("Units entered as independent coins of the planned rate let them.", *numbers, **details)


def least_visible_fault(noise_multiplier: float, observations: int, confidence: float) -> float:
    """The largest share of the planned noise with which the step audit exceeds its claim in 95 of 100 audits.

    Binomial quantiles of both errors, each passed with probability (1 - 0.95) / 2, in the bound that the audit itself
    would compute from them; 0.0 where no share down to 1 % would do.
    """
    trials, level = observations // 4, (1 - _POWER) / 2

    def found(share: float) -> bool:
        wrong = int(stats.binom.isf(level, trials, stats.norm.sf(1 / (2 * share * noise_multiplier))))
        least = gaussian_mu(
            false_positives=wrong,
            negatives=trials,
            false_negatives=wrong,
            positives=trials,
            significance=(1 - confidence) / 2,
        )
        return least > 1 / noise_multiplier

    low, high = 0.01, 1.0
    if not found(low):
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) else (low, middle)
    return low


def installed_code() -> str:
    """SHA-256 over the installed trusted package, as docs/formats.md says: its ``*.py``, sorted by name."""
    digest = hashlib.sha256()
    for path in sorted(Path(fedcollm_privacy.__file__).parent.glob("*.py"), key=lambda path: path.name):
        content = path.read_bytes()
        digest.update(path.name.encode() + b"\0" + len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def _bound(name: str, found: StepAudit | OneRunAudit, claim: float) -> dict[str, Any]:
    return {"name": name, "lower": found.epsilon_lower_bound, "confidence": found.confidence, "claim": claim}


def _told(planned: Planned, bounds: Sequence[dict[str, Any]], *more: str) -> Finding:
    plan, claim = planned.plan, planned.claim
    above = [bound for bound in bounds if bound["lower"] > bound["claim"]]
    worst = max(above or bounds, key=lambda bound: float(bound["lower"] - bound["claim"]))
    first = (
        f"At least epsilon {worst['lower']:.4g} leaks ({worst['name']}, {100 * worst['confidence']:.6g} % sure), "
        + (f"MORE than the {worst['claim']:.4g} that is claimed." if above else f"of {worst['claim']:.4g} claimed.")
    )
    evidence = (
        first,
        f"Plan of {', '.join(planned.sites)}: sigma {plan.noise_multiplier:.6g}, q {plan.sample_rate}, T {plan.steps}, "
        f"C {plan.max_grad_norm:g}, delta {plan.delta:g}.",
        *(f"Not audited, no less noise: {other}." for other in planned.others),
        *more,
    )
    verdict = failed if above else passed
    return verdict(*evidence, claim=claim, bounds=list(bounds))


def _counted(found: OneRunAudit) -> str:
    return (
        f"{found.correct} of {found.guesses} guesses about {found.canaries:,} canaries were right "
        f"(p = {found.p_value:.3g} if the claim holds)."
    )


def _reach(found: OneRunAudit, claim: float) -> str:
    most = epsilon_lower_bound(found.canaries, found.guesses, found.guesses, found.delta, 1 - found.confidence)
    if most > claim:
        return f"One run could have shown as much as epsilon {most:.3g}."
    return (
        f"One run shows epsilon {most:.3g} at most, however much leaks: it cannot refute a claim of {claim:.4g}. For "
        "so large a claim step-audit is the one that can."
    )


def _shortened(planned: Planned, most: int) -> tuple[Planned, str]:
    plan = planned.plan
    if plan.steps <= most:
        return planned, ""
    rounds = max(1, most // plan.steps_per_round)
    plan = replace(plan, rounds=rounds, steps_per_round=min(plan.steps_per_round, most))
    claim = min(planned.claim, plan.epsilon(plan.steps))
    said = f"Only {plan.steps} of {planned.plan.steps} steps were taken, and {claim:.4g} is the claim for so many. "
    return replace(planned, plan=plan, claim=claim), said


def _operating_system() -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(os.urandom(32), "big"))


def _asked(audit: Callable[[Planned], Finding]) -> Callable[[Evidence], Finding]:
    def run(evidence: Evidence) -> Finding:
        planned = planned_of(evidence)
        if isinstance(planned, Finding):
            return planned
        try:
            return audit(planned)
        except FedCollmError as error:
            return failed(f"The installed step does not do what the plan asks: {error}.")

    return run


def _one_run_sum(planned: Planned) -> Finding:
    plan = planned.plan
    if plan.release == "gradient":
        return audit_the_sum(planned)
    one_step_rounds = replace(plan, release="gradient", noise="local", steps_per_round=1, rounds=plan.steps)
    found = audit_the_sum(replace(planned, plan=one_step_rounds))
    said = (
        "The claim does not rest on the sum: every site's upload carries its own noise. The same steps were summed one "
        "by one, so that what the sum opens could be attacked too."
    )
    return replace(found, evidence=(found.evidence[0], said, *found.evidence[1:]))


def _code_is_what_ran(evidence: Evidence) -> Finding:
    here = installed_code()
    told: dict[str, Any] = {}
    for site, entry in entries_of(evidence, "SETTLE"):
        ran = entry.get("ran")
        if isinstance(ran, Mapping):
            told[f"the ledger of {site}, entry {entry.get('seq')}"] = ran.get("code")
    silent = sorted(
        {site for site, _ in entries_of(evidence, "PLAN")}
        - {site for site, e in entries_of(evidence, "SETTLE") if e.get("ran")}
    )
    if evidence.envelope is not None:
        stated = evidence.envelope.statement
        told["the statement"] = stated.get("predicate", stated).get("code")
    other = [where for where, digest in told.items() if digest is not None and digest != here]
    named = [where for where, digest in told.items() if digest == here]
    details = {"installed": here, "told": told}
    if other:
        return failed(
            f"Other code ran than is installed here ({len(other)} of {len(told)} records say so, first {other[0]}): "
            "the attacks of this audit say nothing about the run. Install the release that ran, and audit again.",
            f"Installed: fedcollm_privacy {here}; told there: {told[other[0]]}.",
            **details,
        )
    if not named or None in told.values() or silent:
        lacking = [
            *(where for where, digest in told.items() if digest is None),
            *(f"the ledger of {s}" for s in silent),
        ]
        return not_shown(
            f"No record of the code that ran in {', '.join(lacking) or 'ledgers and statement'}.",
            f"Installed: fedcollm_privacy {here}.",
            **details,
        )
    return passed(
        f"The package whose steps were attacked is the one that ran: {len(named)} records name its digest.",
        f"fedcollm_privacy {here}, computed from the installed files by this audit's own code.",
        "The digest is what the site's own program told: it shows which release was meant to run, not that nobody "
        "changed the program and what it tells.",
        **details,
    )


CHECKS: tuple[Check, ...] = (
    Check(
        name="step-audit",
        group="empirical",
        question="Single private steps leak no more than their noise promises.",
        why="An accountant only believes what it is told about the noise. This attack measures it: records known to "
        "the attacker are put in or left out, and right guesses are counted.",
        run=_asked(lambda planned: audit_the_step(planned, _operating_system())),
    ),
    Check(
        name="one-run-audit",
        group="empirical",
        question="One whole run of the private steps leaks no more than the plan claims.",
        why="It takes nothing for granted about how the steps work together. It is a coarse test: it finds gross "
        "faults, and best where little is claimed to leak.",
        run=_asked(lambda planned: audit_the_run(planned, _operating_system())),
    ),
    Check(
        name="one-run-sum",
        group="empirical",
        question="What the secure sum opens leaks no more than is claimed of sums.",
        why="With distributed noise no site adds enough alone. Only the sum does, so the sum is what must be attacked.",
        run=_asked(_one_run_sum),
    ),
    Check(
        name="poisson-sampling",
        group="empirical",
        question="Every unit enters every step by an independent coin of the planned rate.",
        why="The claimed epsilon counts on it. Batches cut from a shuffled list, which most training code takes, "
        "may leak more at equal noise.",
        run=_asked(audit_the_sampling),
    ),
    Check(
        name="code-is-what-ran",
        group="empirical",
        question="The code that was attacked here is the code that the sites say they ran.",
        why="Attacks on this machine say something about the run only if the same program ran there.",
        run=_code_is_what_ran,
    ),
)
