"""The plans: whether they cost what was charged, and whether what ran is what was planned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Final

from fedcollm_audits import second_accountant, strict_json
from fedcollm_audits.evidence import Evidence
from fedcollm_audits.ledger_exports import sound_exports
from fedcollm_audits.notes import Notes, asked
from fedcollm_audits.verdict import Check

__all__ = ["CHECKS", "site_noise"]

_LARGEST_DELTA: Final = 1e-5
_SAME: Final = 1e-9


def _plan_fits(entry: Mapping[str, Any]) -> bool:
    """Whether a PLAN entry's digest is its plan's, in the spelling of its schema."""
    if entry["schema"] == 1:
        return strict_json.fits_old_digest(entry["plan"], entry["plan_digest"])
    return strict_json.digest(entry["plan"]) == str(entry["plan_digest"])


def site_noise(plan: Mapping[str, Any]) -> float:
    """What the site itself must add, in units of C: all of sigma, or its share of it."""
    shared = math.sqrt(plan["least_honest"]) if plan["noise"] == "distributed" else 1.0
    return float(plan["noise_multiplier"] / shared)


def _charges(evidence: Evidence, notes: Notes) -> None:
    schedules: dict[tuple[float, Fraction, int, float], set[float]] = {}
    for site, export in sound_exports(evidence, notes):
        plans: dict[str, Mapping[str, Any]] = {}
        nats: dict[str, float] = {}
        for position, entry in enumerate(export.entries, start=1):
            where, run = f"Site {site}, entry {position} ({entry['kind']} of run {entry['run_id']})", entry["run_id"]
            if entry["kind"] == "PLAN":
                plans[run] = plan = entry["plan"]
                notes.require(_plan_fits(entry), f"{where}: the plan does not fit its digest.")
                if "target_epsilon" not in plan:
                    steps = plan["rounds"] * plan["steps_per_round"]
                    notes.require(entry.get("steps", steps) == steps, f"{where}: counts {entry.get('steps')} steps.")
            elif entry["kind"] != "RESERVE" or run not in plans:
                continue
            plan = plans[run]
            if entry["delta"] != plan["delta"]:
                notes.problem(f"{where}: charges delta {entry['delta']}, the plan says {plan['delta']}.")
            if "target_epsilon" in plan:
                if entry["epsilon"] != plan["target_epsilon"]:
                    notes.problem(f"{where}: charges {entry['epsilon']}, the adaptive plan {plan['target_epsilon']}.")
                if entry["kind"] == "RESERVE":
                    nats[run] = nats.get(run, 0.0) + _filtered(notes, where, entry, plan, nats.get(run, 0.0))
                continue
            steps = max(plan["rounds"] * plan["steps_per_round"], entry.get("steps_so_far", 0))
            schedule = (plan["noise_multiplier"], Fraction(plan["sample_rate"]), steps, plan["delta"])
            charged = schedules.setdefault(schedule, set())
            if entry["epsilon"] not in charged:
                charged.add(entry["epsilon"])
                _require_charge(notes, where, entry["epsilon"], schedule)
    notes.saw(f"{len(schedules)} schedules were recomputed by Opacus PRV and by an own Rényi accountant.")


def _require_charge(notes: Notes, where: str, charged: float, schedule: tuple[float, Fraction, int, float]) -> None:
    found = second_accountant.bounds(*schedule)
    sigma, rate, steps, delta = schedule
    told = f"{steps} steps at sigma {sigma:.6g}, q {rate}, delta {delta:.3g}"
    if found.lower is None:
        notes.gap(f"{where}: no bound from below for {told}: {found.missing}.")
    elif charged < found.lower:
        notes.problem(f"{where}: charges epsilon {charged:.6g}, but {told} cost at least {found.lower:.6g}.")
    # What the discretization of an honest charge may add: 0.002, and 4e-6 a step.
    if charged > found.upper * 1.01 + 2e-3 + 4e-6 * steps:
        notes.problem(f"{where}: charges epsilon {charged:.6g}, but {told} cost at most {found.upper:.6g}.")
    low = "?" if found.lower is None else f"{found.lower:.4g}"
    notes.saw(f"Epsilon {charged:.4g} for {told}: between {low} (PRV) and {found.upper:.4g} (RDP).")


def _filtered(notes: Notes, where: str, entry: Mapping[str, Any], plan: Mapping[str, Any], spent: float) -> float:
    """One reservation's divergence at the plan's order, once it is seen to stay within the plan's budget."""
    if "order" not in entry or entry["order"] != plan["order"]:
        notes.problem(f"{where}: counts at another Rényi order than the plan's {plan['order']}.")
        return 0.0
    rate = float(Fraction(entry["sample_rate"]))
    one = second_accountant.divergence(entry["noise_multiplier"], rate, plan["order"])
    budget = second_accountant.rdp_budget(plan["order"], plan["target_epsilon"], plan["delta"])
    total = spent + entry["steps"] * one
    if total > budget * (1 + 1e-6):
        notes.problem(f"{where}: brings the run to a divergence of {total:.6g}; the plan allows {budget:.6g}.")
    return float(entry["steps"] * one)


def _ran(evidence: Evidence, notes: Notes) -> None:
    if evidence.private is False:
        notes.gap("The run declares itself not private: there is no guarantee that what ran would have to carry.")
        return
    codes: dict[str, str] = {}
    compared = 0
    for site, export in sound_exports(evidence, notes):
        plan: Mapping[str, Any] = {}
        reserved: dict[str, Mapping[str, Any]] = {}
        for entry in export.of_run(evidence.run_id):
            where = f"Site {site}, entry {entry['seq']}"
            if entry["kind"] == "PLAN":
                plan = entry["plan"]
                _require_terms(evidence, notes, f"Site {site}", plan)
            elif entry["kind"] == "RESERVE":
                reserved[entry["digest"]] = entry
            elif entry["kind"] == "SETTLE":
                ran, paid = entry.get("ran"), reserved.get(entry["reservation"], {})
                where += f" (round {paid.get('server_round', '?')})"
                if ran is None and entry["schema"] == 1:
                    notes.gap(f"{where}: settled under schema 1, which does not say what ran.")
                elif ran is None and entry["outcome"] == "included":
                    notes.problem(f"{where}: its update was used, and nothing is said of the steps that made it.")
                elif ran is not None:
                    compared += 1
                    codes.setdefault(ran["code"], where)
                    for sentence in _differences(plan, paid, ran):
                        notes.problem(f"{where}: {sentence}.")
    if len(codes) > 1:
        notes.problem(f"Different code took the steps: {', '.join(f'{c[:12]} ({w})' for c, w in codes.items())}.")
    if (stated := evidence.predicate.get("code")) is not None and codes and stated not in codes:
        notes.problem(f"The statement names the code {stated!r:.80}, the steps were taken by {next(iter(codes))[:16]}.")
    for event in evidence.events("plan"):
        if event["terms"]["dp"] is None:
            notes.problem(f"Round {event['server_round']}: its plan has no privacy terms, though the run is private.")
    notes.saw(
        f"{compared} rounds of training were compared with their plans; code {', '.join(codes)[:200] or 'unknown'}."
    )


def _differences(plan: Mapping[str, Any], paid: Mapping[str, Any], ran: Mapping[str, Any]) -> Iterator[str]:
    adaptive = "target_epsilon" in plan
    due = {
        "steps": paid.get("steps"),
        "sampling": "poisson",
        "randomness": "operating_system",
        "max_grad_norm": plan.get("max_grad_norm"),
        "clipping": plan.get("clipping"),
    }
    for name, value in due.items():
        if ran[name] != value and not (adaptive and value is None):
            yield f"ran with {name} {ran[name]!r:.60}, planned was {value!r}"
    rate = paid.get("sample_rate") if adaptive else plan.get("sample_rate")
    if rate is None or Fraction(ran["sample_rate"]) != Fraction(rate):
        yield f"ran with sample_rate {ran['sample_rate']}, planned was {rate}"
    noise = paid.get("noise_multiplier", math.nan) if adaptive else site_noise(plan) if plan else math.nan
    if not abs(ran["noise_multiplier"] - noise) <= _SAME * noise:
        yield f"ran with noise_multiplier {ran['noise_multiplier']:.9g}, planned was {noise:.9g} at this site"


def _require_terms(evidence: Evidence, notes: Notes, site: str, plan: Mapping[str, Any]) -> None:
    if plan.get("randomness", "operating_system") != "operating_system":
        notes.problem(f"{site}: its plan draws from a known seed, and the run claims to be private.")
    for event in evidence.events("plan"):
        terms, where = event["terms"], f"{site}, round {event['server_round']}"
        for name, value in (terms["dp"] or {}).items():
            if name in plan and plan[name] != value:
                notes.problem(f"{where}: the round's {name} is {value}, the site's plan says {plan[name]}.")
        if "target_epsilon" in plan:
            continue
        gradient = plan["release"] == "gradient"
        due = {
            "release": plan["release"],
            "noise_multiplier": plan["noise_multiplier"] if gradient else 0,
            "least_honest": plan["least_honest"] if gradient else 1,
        }
        for name, value in due.items():
            if terms[name] != value:
                notes.problem(f"{where}: the round's {name} is {terms[name]}, the site's plan says {value}.")
        if event["server_round"] > plan["rounds"]:
            notes.problem(f"{where}: the plan has {plan['rounds']} rounds only.")


def _delta(evidence: Evidence, notes: Notes) -> None:
    if evidence.private is False:
        notes.gap("The run declares itself not private: it has no delta.")
        return
    for site, export in sound_exports(evidence, notes):
        for entry in export.of_run(evidence.run_id):
            if entry["kind"] != "PLAN":
                continue
            plan, delta = entry["plan"], entry["plan"]["delta"]
            where = f"Site {site}, entry {entry['seq']}"
            notes.require(delta <= _LARGEST_DELTA, f"{where}: delta {delta:.3g} is above {_LARGEST_DELTA:.0e}.")
            if "sample_rate" not in plan:
                notes.gap(
                    f"{where}: an adaptive plan names no size, so delta is compared with {_LARGEST_DELTA:.0e} only."
                )
                continue
            size = plan["expected_batch_size"] / Fraction(plan["sample_rate"])
            sound = Fraction(delta) * 10 * size <= 1
            notes.require(sound, f"{where}: delta {delta:.3g} is above 1/(10 N) = {float(1 / (10 * size)):.3g}.")
            notes.saw(f"Site {site}: delta {delta:.3g}, nominal size N = {float(size):g}.")


CHECKS: tuple[Check, ...] = (
    Check(
        name="epsilon-recomputed",
        group="plan",
        question="Every charge is what other accountants say that the planned steps cost.",
        why="An epsilon that is too small promises protection that the noise does not give.",
        run=asked(_charges),
    ),
    Check(
        name="plan-is-what-ran",
        group="plan",
        question="The steps that ran had the planned noise, rate, clipping, sampling and randomness, all by one code.",
        why="The accountant knows the plan only; if something else ran, its number is about something else.",
        run=asked(_ran),
    ),
    Check(
        name="delta-rule",
        group="plan",
        question="Delta is at most 1e-5 and at most a tenth of one over the number of units.",
        why="Delta is the chance that the promise fails; near one over N it would allow publishing somebody's record.",
        run=asked(_delta),
    ),
)
