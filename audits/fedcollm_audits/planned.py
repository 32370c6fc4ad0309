"""The plans that a run's ledgers hold, and which of them is audited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from fedcollm_audits.evidence import Evidence
from fedcollm_audits.verdict import Finding, failed, not_shown
from fedcollm_privacy.errors import FedCollmError
from fedcollm_privacy.plan import DpPlan

__all__ = ["Planned", "entries_of", "planned_of", "run_id_of"]

_LEAST_SIGMA = 0.2
"""Below, the accountant's time grows without end, and nothing worth the name is promised."""

_MOST_RECORDS = 8
"""Of a canary: all its records lie on one coordinate and are clipped together, so more of them show no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan of the run, as its ledgers hold it.

    Attributes:
        plan: of the step that is audited.
        claim: epsilon as the PLAN entry says, or the accountant's for the plan where that is smaller.
        sites: whose ledgers hold this plan.
        others: the run's other plans in words; they have no less noise.
        value_bits: of the grid on which gradients leave the sites.
    """

    plan: DpPlan
    claim: float
    sites: tuple[str, ...]
    others: tuple[str, ...] = ()
    value_bits: int = 18


def run_id_of(evidence: Evidence) -> str | None:
    """The run's name by its summary, else by its transcript; None where neither names it."""
    starts = [event.get("run_id") for event in evidence.transcript if event.get("event") == "start"]
    found = evidence.summary.get("run_id") or (starts[0] if starts else None)
    return None if found is None else str(found)


def entries_of(evidence: Evidence, kind: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Entries of one kind in the ledgers, with their sites; all runs' where no run is named."""
    run_id = run_id_of(evidence)
    return [
        (site, entry)
        for site, ledger in sorted(evidence.ledgers.items())
        for entry in ledger.entries
        if entry.get("kind") == kind and run_id in (None, entry.get("run_id"))
    ]


def planned_of(evidence: Evidence) -> Planned | Finding:
    """The run's plan with the least noise; or, as a finding, why none can be audited."""
    rows = entries_of(evidence, "PLAN")
    if not rows:
        return not_shown("No ledger here holds a plan of this run, so there is no claim that an attack could refute.")
    sites: dict[DpPlan, list[str]] = {}
    claims: dict[DpPlan, list[float]] = {}
    for site, entry in rows:
        if isinstance(entry.get("plan"), Mapping) and "order" in entry["plan"]:
            return not_shown(f"The plan of {site} is adaptive: its steps are chosen as the run goes; none are audited.")
        try:
            plan = _plan_of(entry["plan"])
            claims.setdefault(plan, []).append(float(entry["epsilon"]))
        except (KeyError, TypeError, ValueError, ArithmeticError, FedCollmError) as error:
            return failed(f"The PLAN entry of {site} holds no plan that the installed code takes: {error}.")
        sites.setdefault(plan, []).append(site)
    plan = min(sites, key=lambda plan: (plan.noise_multiplier, -float(plan.sample_rate), -plan.steps))
    if plan.randomness != "operating_system":
        return not_shown("The run's noise came from a known seed; it claims no privacy, and nothing is audited.")
    if plan.noise_multiplier < _LEAST_SIGMA:
        return not_shown(
            f"Sigma {plan.noise_multiplier:g} of {', '.join(sites[plan])} is below {_LEAST_SIGMA:g}: its claim is so "
            "large that no attack could refute it."
        )
    claim = min(*claims[plan], plan.epsilon(plan.steps))
    bits = evidence.config.get("secure_sum", {}).get("value_bits", 18)
    return Planned(
        plan=replace(plan, max_records_per_unit=min(plan.max_records_per_unit, _MOST_RECORDS)),
        claim=claim,
        sites=tuple(sites[plan]),
        others=tuple(
            f"{', '.join(names)} with sigma {other.noise_multiplier:.6g}, q {other.sample_rate}, T {other.steps}"
            for other, names in sites.items()
            if other != plan
        ),
        value_bits=bits if type(bits) is int else 18,
    )


def _plan_of(row: Mapping[str, Any]) -> DpPlan:
    fields = dict(row)
    # JSON in its one spelling writes 1.0 as 1.
    fields |= {name: float(fields[name]) for name in ("max_grad_norm", "noise_multiplier", "delta")}
    return DpPlan(**(fields | {"sample_rate": Fraction(fields["sample_rate"])}))
