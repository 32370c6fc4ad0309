"""Whether the statement is true: its numbers those of ledgers and transcript, and not smaller than recomputed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final

from fedcollm_audits import second_accountant
from fedcollm_audits.check_plans import site_noise
from fedcollm_audits.evidence import Evidence
from fedcollm_audits.ledger_exports import sound_exports
from fedcollm_audits.notes import Notes, asked
from fedcollm_audits.statement_of import envelope_of
from fedcollm_audits.verdict import Check

__all__ = ["CLAIMS"]

_ALWAYS: Final = (
    "run_id", "private", "claim", "data", "rounds", "transcript", "rosters", "adapters", "versions", "code", "server",
)  # fmt: skip
_PRIVATE: Final = (
    "unit", "neighboring_relation", "mechanism", "trust_model", "views", "accounting", "randomness", "floating_point",
    "covered", "not_covered", "assumptions", "nist_sp_800_226", "dp_fy_ml", "sites",
)  # fmt: skip
_SITE: Final = (
    "epsilon", "delta", "steps_reserved", "views", "other_units", "gdp_mu", "privacy_profile", "plan", "plan_digest",
    "caps", "policy", "ledger",
)  # fmt: skip


def _true(evidence: Evidence, notes: Notes) -> None:
    if envelope_of(evidence, notes) is None:
        return
    said = evidence.predicate
    private = said.get("private")
    for field in (*_ALWAYS, *(_PRIVATE if private else ())):
        notes.require(field in said, f"The statement does not say {field}.")
    if not notes.require(isinstance(private, bool), "The statement does not say whether the run is private."):
        return
    notes.require(said.get("run_id") == evidence.run_id, f"The statement is about the run {said.get('run_id')!r:.80}.")
    _rounds(evidence, notes, said)
    _summary(evidence, notes, said)
    if not private:
        notes.saw("The statement says that the run is not private, and promises no epsilon.")
        notes.require("sites" not in said, "The statement gives sites an epsilon in a run that is not private.")
        notes.require("unstated" not in said, "The statement names sites without a claim in a run that claims nothing.")
        return
    rows = said.get("sites", {})
    if not rows:
        notes.problem("The statement calls the run private and names no site.")
    _unstated(evidence, notes, said)
    for site, row in sorted(rows.items()):
        for field in _SITE:
            notes.require(field in row, f"Site {site}: the statement does not say {field}.")
        plan = row["plan"]
        if plan.get("randomness", "operating_system") != "operating_system":
            notes.problem(f"Site {site}: its noise came from a known seed, and the statement calls the run private.")
        notes.require(
            plan["unit"] == said["unit"], f"Site {site}: its plan protects a {plan['unit']}, not what is said."
        )
        if "target_epsilon" not in plan:
            _numbers(notes, site, row, plan)
    for site, export in sound_exports(evidence, notes):
        if site in rows:
            _charge(notes, site, rows[site], [entry for entry in export.of_run(evidence.run_id)])
    for event in evidence.events("plan"):
        if event["terms"]["dp"] is None:
            notes.problem(
                f"Round {event['server_round']} had no privacy terms, and the statement calls the run private."
            )
    notes.saw(f"{len(rows)} sites' numbers were compared with ledgers and recomputed.")


def _unstated(evidence: Evidence, notes: Notes, said: Mapping[str, Any]) -> None:
    """Sites for which nothing is claimed: named once, as sites of the roster, and no claim beside it."""
    if "unstated" not in said:
        return
    named = said["unstated"]
    if not isinstance(named, list) or not named or named != sorted(set(named)):
        notes.problem("The statement's list of sites without a claim is empty, not sorted, or no list of names.")
        return
    known = {site for roster in evidence.rosters.values() for site in roster.sites}
    for site in named:
        notes.require(site in known, f"The statement claims nothing for {site!r:.80}, which is in no roster.")
        notes.require(site not in said["sites"], f"Site {site}: the statement claims something, and nothing, for it.")
        notes.gap(f"Site {site}: took part, and the statement claims nothing for its data.")


def _rounds(evidence: Evidence, notes: Notes, said: Mapping[str, Any]) -> None:
    ends = {e["server_round"]: e["event"] for e in evidence.events("opened", "lost", "rolled_back", "kept")}
    opened = sum(end in ("opened", "kept") for end in ends.values())
    strictly = sum(end == "opened" for end in ends.values())
    lost = sum(end in ("lost", "rolled_back") for end in ends.values())
    rounds = said["rounds"]
    planned = evidence.config.get("federation", {}).get("rounds")
    if rounds["opened"] not in (opened, strictly) or rounds["lost"] != lost:
        notes.problem(
            f"The statement counts {rounds['opened']} rounds opened and {rounds['lost']} lost, the transcript {opened} "
            f"and {lost}."
        )
    if planned is not None and rounds["planned"] != planned:
        notes.problem(f"The statement counts {rounds['planned']} rounds planned, the configuration {planned}.")
    declared = evidence.config.get("data", {}).get("declared")
    stated = said["data"].get("declared") if isinstance(said["data"], Mapping) else said["data"]
    if declared is not None and stated != declared:
        notes.problem(f"The statement declares the data {stated!r:.40}, the configuration {declared!r:.40}.")


def _summary(evidence: Evidence, notes: Notes, said: Mapping[str, Any]) -> None:
    if "summary.json" in evidence.broken:
        notes.problem(f"summary.json {evidence.broken['summary.json']}.")
        return
    summary = evidence.summary
    due = {
        "run_id": said["run_id"],
        "rounds": said["rounds"]["planned"],
        "rounds_lost": said["rounds"]["lost"],
    }
    if said["rounds"]["planned"] > 0:  # where nothing was trained, nothing was spent, and nothing is promised
        due["private"] = said["private"]
    if "unstated" in said or "unstated" in summary:
        due["unstated"] = said.get("unstated")
    for field, value in due.items():
        if summary.get(field) != value:
            notes.problem(f"summary.json says {field} {summary.get(field)!r:.80}, the statement {value!r:.80}.")
    rows = summary.get("sites", {})
    for site, row in said.get("sites", {}).items():
        told = rows.get(site, {})
        for field, name in (("epsilon", "epsilon"), ("delta", "delta"), ("steps", "steps_reserved")):
            if told.get(field) != row.get(name):
                notes.problem(
                    f"Site {site}: summary.json says {field} {told.get(field)}, the statement {row.get(name)}."
                )
    for site in sorted(set(rows) - set(said.get("sites", {}))):
        if rows[site].get("epsilon") not in (None, 0):
            notes.problem(f"Site {site}: summary.json gives it an epsilon, the statement does not know it.")


def _charge(notes: Notes, site: str, row: Mapping[str, Any], entries: list[Mapping[str, Any]]) -> None:
    charge, steps = (0.0, 0.0), 0
    for entry in entries:
        if entry["kind"] in ("PLAN", "RESERVE"):
            charge = (entry["epsilon"], entry["delta"])
            steps = entry.get("steps_so_far", steps)
        elif entry["kind"] == "ABORT" and not steps:
            charge = (0.0, 0.0)
    if (row["epsilon"], row["delta"]) != charge:
        notes.problem(
            f"Site {site}: the statement says epsilon {row['epsilon']}, delta {row['delta']}; its ledger was charged "
            f"{charge[0]}, {charge[1]}."
        )
    if row["steps_reserved"] != steps:
        notes.problem(f"Site {site}: the statement says {row['steps_reserved']} steps, its ledger reserved {steps}.")


def _numbers(notes: Notes, site: str, row: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """The claim, and every other number of a site, against PRV's bounds from below."""
    steps = max(row["steps_reserved"], plan["rounds"] * plan["steps_per_round"])
    rate, delta = Fraction(plan["sample_rate"]), plan["delta"]
    own = site_noise(plan)
    in_sums = own * math.sqrt(plan["least_honest"]) if plan["release"] == "gradient" else own
    views = row["views"]
    claims = (
        ("the claim", row["epsilon"], plan["noise_multiplier"]),
        ("the view of one update", views["one_update_seen"], own),
        ("the view of sums", views["only_sums_and_models_seen"], in_sums),
    )
    for what, value, sigma in claims:
        found = second_accountant.bounds(sigma, rate, steps, delta)
        if found.lower is None:
            notes.gap(f"Site {site}: no bound from below for {what}: {found.missing}.")
        elif not value >= found.lower:
            notes.problem(f"Site {site}: {what} is epsilon {value:.6g}, its steps cost at least {found.lower:.6g}.")
    schedule = (plan["noise_multiplier"], rate, steps, delta)
    for point, value in row["privacy_profile"].items():
        least = second_accountant.lower_delta(*schedule, float(point))
        if least is not None and not value >= least:
            notes.problem(f"Site {site}: the profile gives delta {value:.3g} at {point}, it is at least {least:.3g}.")
    mu = row["gdp_mu"]
    least = second_accountant.lower_delta(*schedule, row["epsilon"])
    if mu is not None and least is not None and not _gdp_delta(mu, row["epsilon"]) >= least:
        notes.problem(f"Site {site}: mu {mu:.6g} promises more than the steps keep at epsilon {row['epsilon']:.4g}.")
    for unit, value in row["other_units"].items():
        if not value >= row["epsilon"] * (1 - 1e-3):
            notes.problem(f"Site {site}: {unit} is said to cost {value:.6g}, less than one unit.")


def _gdp_delta(mu: float, epsilon: float) -> float:
    """Delta of mu-Gaussian DP (Dong, Roth and Su 2022, corollary 2.13)."""
    if mu <= 0:
        return 0.0
    upper, lower = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return _phi(upper) - math.exp(epsilon) * _phi(lower)


def _phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


CLAIMS = Check(
    name="statement-true",
    group="statement",
    question="What the statement says is what ledgers and transcript show, and no number promises too much.",
    why="Signatures show who said it, not that it is so.",
    run=asked(_true),
)
