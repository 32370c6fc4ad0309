"""The caps: whether what a data set was charged ever crossed what its owner allows, at any moment of the ledger."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from fedcollm_audits.evidence import Evidence
from fedcollm_audits.ledger_exports import sound_exports
from fedcollm_audits.notes import Notes, asked
from fedcollm_audits.verdict import Check

__all__ = ["BUDGET", "caps_of"]


def caps_of(planned: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A PLAN entry's caps; of schema 1, its one cap for ever."""
    if planned["schema"] == 1:
        return [{"epsilon": planned["cap_epsilon"], "delta": planned["cap_delta"], "days": None}]
    return list(planned["caps"])


class _DataSet:
    """What one data set's runs were charged up to an entry, and under which caps."""

    def __init__(self) -> None:
        self.charges: dict[str, tuple[float, float]] = {}
        self.caps: dict[str, list[dict[str, Any]]] = {}
        self.last: dict[str, datetime] = {}
        self.reserved: set[str] = set()
        self.latest_run = ""

    def over(self, caps: list[dict[str, Any]], now: datetime) -> str:
        """The first cap that the charges cross now, in words; empty for none."""
        for cap in caps:
            days = cap["days"]
            since = None if days is None else now - timedelta(days=days)
            counted = [c for name, c in self.charges.items() if since is None or self.last[name] >= since]
            epsilon, delta = (math.fsum(c[i] for c in counted) for i in (0, 1))
            if not (epsilon <= cap["epsilon"] and delta <= cap["delta"]):
                span = "" if days is None else f" in {days} days"
                return (
                    f"{len(counted)} runs add up to epsilon {epsilon:.6g}, delta {delta:.3g}; the cap is "
                    f"{cap['epsilon']:.6g}, {cap['delta']:.3g}{span}"
                )
        return ""


def _within_caps(evidence: Evidence, notes: Notes) -> None:
    for site, export in sound_exports(evidence, notes):
        sets: dict[str, _DataSet] = {}
        for position, entry in enumerate(export.entries, start=1):
            data, run = sets.setdefault(entry["data_set"], _DataSet()), entry["run_id"]
            where, now = f"Site {site}, entry {position}", datetime.fromisoformat(entry["time"])
            before, rose = data.charges.get(run), False
            if entry["kind"] in ("PLAN", "RESERVE"):  # what closes a run later is no new use of the data
                data.last[run] = now
            if entry["kind"] == "PLAN":
                if not caps_of(entry):
                    notes.problem(f"{where}: run {run} was planned without any cap.")
                data.caps[run], data.latest_run = caps_of(entry), run
            if entry["kind"] in ("PLAN", "RESERVE"):
                charge = (entry["epsilon"], entry["delta"])
                if before is not None and not (charge[0] >= before[0] and charge[1] >= before[1]):
                    notes.problem(f"{where}: the charge of run {run} falls from {before[0]:.6g} to {charge[0]:.6g}.")
                rose, data.charges[run] = charge != before, charge
                data.reserved |= {run} if entry["kind"] == "RESERVE" else set()
            elif entry["kind"] == "ABORT" and run not in data.reserved:
                data.charges[run] = (0.0, 0.0)
            # The owner's newest caps hold at every moment; a run that asks for more is held to its own as well.
            own = data.caps.get(run, []) if rose else []
            crossed = data.over(data.caps.get(data.latest_run, []), now) or data.over(own, now)
            if crossed:
                notes.problem(f"{where} ({entry['kind']} of run {run}): {crossed}.")
        spent = {name[:12]: math.fsum(c[0] for c in data.charges.values()) for name, data in sets.items()}
        told = ", ".join(f"{value:.4g} on {name}" for name, value in spent.items()) or "nothing"
        notes.saw(f"Site {site}: {len(export.entries)} moments looked at; charged in all: epsilon {told}.")


BUDGET = Check(
    name="budget-prefix",
    group="ledger",
    question="At no moment did the charges on a data set cross a cap that its owner set.",
    why="Privacy lost on one data set adds up over runs; the cap is the owner's promise to the people in the data.",
    run=asked(_within_caps),
)
