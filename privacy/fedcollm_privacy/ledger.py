"""A site's privacy ledger: what was promised, reserved and spent, in one SQLite file per site.

The rule is reserve, train, settle. A reservation is on disk before the first gradient; a crash leaves it spent. The
caps of a data set hold over all runs: the charges of its runs are added (basic composition, which stays valid when
later runs are chosen after seeing earlier ones; Rogers et al. 2016, section 3).

What one run is charged: its committed plan, from the commitment on. When broken attempts make it reserve more steps
than planned, the charge rises to the epsilon of all reserved steps. These are more steps of the same mechanism, and
the caps bound their number beforehand, so the privacy loss distribution of the steps remains a valid bound. A run that
is given up stays charged, unless it never reserved anything: when to stop may depend on what was seen, and no privacy
loss distribution allows for that.

The plan's type decides the accountant. A `DpPlan` is fixed before data is read and costs what privacy loss
distributions say. An `AdaptivePlan` may choose each round's noise, rate and steps after seeing earlier rounds; it is
charged its whole target at once, and every reservation passes its Rényi filter.

Entries form a hash chain, and the site signs each. After every round the server counter-signs the head of the tree
over them, and both keep it: whoever takes entries back afterwards, or rebuilds the file, contradicts the server's
memory. No entry holds the number of records or anything else computed from them without noise, except the plan's
nominal size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from fedcollm_privacy import _validate
from fedcollm_privacy.accounting import ACCOUNTANT, Steps
from fedcollm_privacy.adaptive import ADAPTIVE_ACCOUNTANT, AdaptivePlan, RdpFilter
from fedcollm_privacy.cross_checks import cross_check
from fedcollm_privacy.durable import Connection
from fedcollm_privacy.entries import (
    GENESIS,
    Cap,
    Spent,
    caps_of,
    charges,
    entry_time,
    open_reservations,
    total,
    window_start,
)
from fedcollm_privacy.errors import BudgetExceeded, InvalidValue, LedgerError, PrivacyViolation
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.reservation import Ran, Reservation

__all__ = ["Cap", "Ledger", "Spent"]

Entries = list[dict[str, Any]]


class Ledger:
    """The ledger of one site. Every method is one transaction, on disk when it returns.

    Args:
        path: SQLite file; made with its folder when absent, with file mode 600.
        key: the site's identity; signs every entry. A ledger of another site or key is refused.
        clock: Unix time in seconds.

    Raises:
        LedgerError: the file is not a ledger, is another site's, or was altered.
    """

    def __init__(self, path: Path, key: SigningKey, clock: Callable[[], float] = time.time) -> None:
        self._file, self._key, self._clock = LedgerFile.for_site(path, key.public), key, clock

    @property
    def file(self) -> LedgerFile:
        """The file, for whoever reads or exports it."""
        return self._file

    def _append(self, db: Connection, entries: Entries, content: Mapping[str, Any]) -> str:
        return self._file.append(db, entries, content, self._key, self._clock())

    def _now(self, entries: Entries) -> datetime:
        return entry_time(self._clock(), entries[-1] if entries else None)

    def commit_plan(
        self, *, run_id: str, data_set: str, plan: DpPlan | AdaptivePlan, caps: Sequence[Cap], policy: str = ""
    ) -> str:
        """Charge a run's whole plan to the data set, before anything is trained.

        A `DpPlan` is charged its PLD epsilon, once other accountants did not contradict it; an `AdaptivePlan` is
        charged its whole target. A run that is resumed finds its plan here already; the same plan is then accepted
        without a second charge. What a crash left open is settled when its round goes on, or by the next reservation.

        Args:
            run_id: the run's name; one plan a run.
            data_set: the data set's name, as the site calls it.
            plan: what will be run, or what bounds it.
            caps: the data set's caps over all runs, at least one; each is kept.
            policy: digest of the site's policy, which demands them; empty where there is none.

        Returns:
            Digest of the PLAN entry.

        Raises:
            BudgetExceeded: the charge would cross the cap; nothing is written.
            InvalidValue: no caps.
            LedgerError: the run has another plan here already, or was given up.
            PrivacyViolation: accountants contradict each other on the plan; nothing is written.
        """
        _validate.public_name(run_id=run_id)
        if not caps:
            raise InvalidValue("caps", caps, "at least one cap: a data set without any could be spent without end")
        if policy:
            _validate.hex_digest(policy=policy)
        name = self._file.commitment(data_set)
        with self._file.transaction() as db:
            entries = self._file.read(db)
            for entry in entries:
                if entry["kind"] == "PLAN" and entry["run_id"] == run_id:
                    if entry["plan_digest"] != plan.digest or entry["data_set"] != name:
                        raise LedgerError(
                            f"run {run_id} has another plan in this ledger; give the run another name. A plan that may "
                            "change after data was read must be committed as an AdaptivePlan, before the first step"
                        )
                    _of_run(entries, run_id, plan)
                    return str(entry["digest"])
            charge = plan.epsilon(plan.steps) if isinstance(plan, DpPlan) else plan.target_epsilon
            self._refuse_over_caps(entries, name, run_id, charge, plan.delta, caps)
            content = {
                "kind": "PLAN",
                "ledger": self._file.ledger,
                "run_id": run_id,
                "data_set": name,
                "plan": plan.as_dict(),
                "plan_digest": plan.digest,
                "epsilon": charge,
                "delta": plan.delta,
                "caps": [{"epsilon": cap.epsilon, "delta": cap.delta, "days": cap.days} for cap in caps],
                "policy": policy,
                **(_checked(plan, charge) if isinstance(plan, DpPlan) else {"accountant": ADAPTIVE_ACCOUNTANT}),
            }
            return self._append(db, entries, content)

    def admit(self, *, run_id: str, plan: DpPlan) -> None:
        """Refuse where `reserve` would, and write nothing: to be asked before a site takes part in a round."""
        with self._file.transaction() as db:
            self._next(self._file.read(db), run_id, plan)

    def _next(self, entries: Entries, run_id: str, plan: DpPlan) -> tuple[dict[str, Any], int, float]:
        planned, reserved = _of_run(entries, run_id, plan)
        steps = sum(entry["steps"] for entry in reserved) + plan.steps_per_round
        charge = plan.epsilon(max(plan.steps, steps))
        self._refuse_over_caps(entries, planned["data_set"], run_id, charge, plan.delta, _caps_now(entries, planned))
        return planned, steps, charge

    def reserve(self, *, run_id: str, plan: DpPlan, server_round: int) -> Reservation:
        """Reserve one round's steps. On disk before this returns; spent whatever happens next.

        A reservation of the run that is still open is settled as failed: a site trains one round at a time.

        Raises:
            BudgetExceeded: a cap would be crossed, by more steps than planned (after broken attempts) or because others
                used up its last days while this run rested.
            LedgerError: the run has no such plan here.
        """
        _validate.integer_at_least(1, server_round=server_round)
        with self._file.transaction() as db:
            entries = self._settle_open(db, run_id)
            planned, steps, charge = self._next(entries, run_id, plan)
            digest = self._append(
                db,
                entries,
                {
                    "kind": "RESERVE",
                    "run_id": run_id,
                    "data_set": planned["data_set"],
                    "plan_digest": plan.digest,
                    "server_round": server_round,
                    "steps": plan.steps_per_round,
                    "steps_so_far": steps,
                    "epsilon": charge,
                    "delta": plan.delta,
                },
            )
        return Reservation(entry=digest, plan_digest=plan.digest, steps=plan.steps_per_round)

    def reserve_adaptive(
        self, *, run_id: str, plan: AdaptivePlan, round_plan: DpPlan, server_round: int
    ) -> Reservation:
        """Reserve one round's steps of a plan that was chosen just now, perhaps after looking at earlier rounds.

        The filter counts all steps the run ever reserved here, as the entries hold them, so a crash forgets nothing.

        Args:
            run_id: the run's name.
            plan: the adaptive plan the run has committed.
            round_plan: this round's noise, rate and ``steps_per_round``; its own rounds and delta play no part.
            server_round: the round, from 1.

        Returns:
            The reservation of ``round_plan``'s steps.

        Raises:
            BudgetExceeded: the filter does not admit the steps, or see `reserve`; nothing is written.
            InvalidValue: ``round_plan`` protects another unit or relation than the committed plan.
            LedgerError: the run has no such adaptive plan here.
        """
        _validate.integer_at_least(1, server_round=server_round)
        promised = round_plan.as_dict()
        _validate.one_of((plan.unit,), unit=promised["unit"])
        _validate.one_of((plan.neighboring_relation,), neighboring_relation=promised["neighboring_relation"])
        new = Steps(
            noise_multiplier=round_plan.noise_multiplier,
            sample_rate=round_plan.sample_rate,
            steps=round_plan.steps_per_round,
        )
        with self._file.transaction() as db:
            entries = self._settle_open(db, run_id)
            planned, reserved = _of_run(entries, run_id, plan)
            spent = tuple(
                Steps(
                    noise_multiplier=entry["noise_multiplier"],
                    sample_rate=Fraction(entry["sample_rate"]),
                    steps=entry["steps"],
                )
                for entry in reserved
            )
            RdpFilter(plan, spent).spend(new)
            name, caps = planned["data_set"], _caps_now(entries, planned)
            self._refuse_over_caps(entries, name, run_id, plan.target_epsilon, plan.delta, caps)
            digest = self._append(
                db,
                entries,
                {
                    "kind": "RESERVE",
                    "run_id": run_id,
                    "data_set": planned["data_set"],
                    "plan_digest": plan.digest,
                    "round_plan_digest": round_plan.digest,
                    "server_round": server_round,
                    "noise_multiplier": new.noise_multiplier,
                    "sample_rate": f"{new.sample_rate.numerator}/{new.sample_rate.denominator}",
                    "steps": new.steps,
                    "steps_so_far": sum(block.steps for block in (*spent, new)),
                    "order": plan.order,
                    "epsilon": plan.target_epsilon,
                    "delta": plan.delta,
                },
            )
        return Reservation(entry=digest, plan_digest=round_plan.digest, steps=new.steps)

    def settle(self, *, run_id: str, reservation: str, outcome: str, ran: Ran | None = None) -> str:
        """Close a reservation with what became of it; the budget stays spent in every case.

        Args:
            reservation: digest of the RESERVE entry.
            outcome: ``included``, ``left_out``, ``lost`` (the round gave no sum) or ``failed`` (training broke off).
            ran: what the steps say of themselves; None where they were not finished.

        Raises:
            LedgerError: no such open reservation.
        """
        _validate.one_of(("included", "left_out", "lost", "failed"), outcome=outcome)
        with self._file.transaction() as db:
            entries = self._file.read(db)
            reserved = next((e for e in open_reservations(entries, run_id) if e["digest"] == reservation), None)
            if reserved is None:
                raise LedgerError(f"run {run_id} has no open reservation {reservation[:12]}")
            return self._settle(db, entries, reserved, outcome, ran)

    def _settle(
        self, db: Connection, entries: Entries, reserved: Mapping[str, Any], outcome: str, ran: Ran | None
    ) -> str:
        content = {
            "kind": "SETTLE",
            "run_id": reserved["run_id"],
            "data_set": reserved["data_set"],
            "reservation": reserved["digest"],
            "outcome": outcome,
            "ran": None if ran is None else ran.as_dict(),
        }
        return self._append(db, entries, content)

    def _settle_open(self, db: Connection, run_id: str) -> Entries:
        for reserved in open_reservations(self._file.read(db), run_id):
            self._settle(db, self._file.read(db), reserved, "failed", None)
        return self._file.read(db)

    def abort(self, run_id: str) -> str:
        """Give a run up: it reserves nothing more. What it was charged stays, unless it never reserved anything.

        Raises:
            LedgerError: the run has no plan here, or was given up before.
        """
        with self._file.transaction() as db:
            planned, reserved = _of_run(self._file.read(db), run_id, None)
            entries = self._settle_open(db, run_id)
            spent = charges(entries, planned["data_set"])[run_id]
            epsilon, delta = (spent.epsilon, spent.delta) if reserved else (0, 0)
            said = {"kind": "ABORT", "run_id": run_id, "data_set": planned["data_set"]}
            return self._append(db, entries, said | {"epsilon": epsilon, "delta": delta})

    def record_statement(self, *, run_id: str, statement: str, epsilon: float, delta: float) -> str:
        """Note that a privacy statement says this of the run.

        Args:
            run_id: the run.
            statement: SHA-256 of its payload.
            epsilon: what it says.
            delta: likewise.

        Raises:
            LedgerError: the run has no plan here, or was charged more.
        """
        _validate.hex_digest(statement=statement)
        _validate.at_least(0, epsilon=epsilon, delta=delta)
        with self._file.transaction() as db:
            entries = self._file.read(db)
            planned, _ = _of_run(entries, run_id, None)
            spent = charges(entries, planned["data_set"])[run_id]
            if not (spent.epsilon <= epsilon and spent.delta <= delta):
                raise LedgerError(
                    f"the statement says epsilon {epsilon:.4g}, delta {delta:.3g}; run {run_id} was charged "
                    f"{spent.epsilon:.4g}, {spent.delta:.3g}"
                )
            said = {"statement": statement, "epsilon": epsilon, "delta": delta}
            common = {"kind": "STATEMENT", "run_id": run_id, "data_set": planned["data_set"]}
            return self._append(db, entries, common | said)

    def _refuse_over_caps(
        self, entries: Entries, data_set: str, run_id: str, charge: float, delta: float, caps: Sequence[Cap]
    ) -> None:
        now = self._now(entries)
        for cap in caps:
            others = charges(entries, data_set, window_start(cap, now))
            own = others.pop(run_id, None)
            if own is not None and charge <= own.epsilon:
                continue  # counted already; a run's delta never changes
            epsilon_after = math.fsum([*(c.epsilon for c in others.values()), charge])
            delta_after = math.fsum([*(c.delta for c in others.values()), delta])
            if not (epsilon_after <= cap.epsilon and delta_after <= cap.delta):
                span = "" if cap.days is None else f" in {cap.days} days"
                raise BudgetExceeded(
                    f"run {run_id} would bring this data set to epsilon {epsilon_after:.4g}, delta {delta_after:.3g}"
                    f"{span}; its cap is epsilon {cap.epsilon:.4g}, delta {cap.delta:.3g}. Nothing was spent. Lower "
                    "privacy.epsilon, or have the cap raised by whoever owns it (the site's policy and "
                    "privacy.cap_epsilon, privacy.cap_delta)"
                )

    def entries(self) -> Entries:
        """All entries in order, each with its ``digest``."""
        return self._file.entries()

    @property
    def head(self) -> str:
        """Digest of the last entry; 64 zeros for an empty ledger."""
        entries = self.entries()
        return str(entries[-1]["digest"]) if entries else GENESIS

    def spent_in_run(self, run_id: str) -> Spent:
        """What one run has been charged."""
        entries = [e for e in self.entries() if e["run_id"] == run_id]
        return total([c for name in {e["data_set"] for e in entries} for c in charges(entries, name).values()])

    def spent_on(self, data_set: str) -> Spent:
        """What all runs on a data set have been charged together."""
        return total(charges(self.entries(), self._file.commitment(data_set)).values())


def _of_run(entries: Entries, run_id: str, plan: DpPlan | AdaptivePlan | None) -> tuple[dict[str, Any], Entries]:
    """The run's PLAN entry, of this plan if one is given, and its RESERVE entries; LedgerError if it was given up."""
    of_run = [entry for entry in entries if entry["run_id"] == run_id]
    planned = next((entry for entry in of_run if entry["kind"] == "PLAN"), None)
    if planned is None or (plan is not None and planned["plan_digest"] != plan.digest):
        raise LedgerError(f"run {run_id} has not committed this plan; nothing is trained without one")
    if any(entry["kind"] == "ABORT" for entry in of_run):
        raise LedgerError(f"run {run_id} was given up in this ledger; begin a new run")
    return planned, [entry for entry in of_run if entry["kind"] == "RESERVE"]


def _caps_now(entries: Entries, planned: Mapping[str, Any]) -> list[Cap]:
    """The caps that a run of this PLAN entry must keep: its own, and those its data set's owner set last."""
    last = [entry for entry in entries if entry["kind"] == "PLAN" and entry["data_set"] == planned["data_set"]][-1]
    return [*caps_of(planned), *caps_of(last)]


def _checked(plan: DpPlan, charge: float) -> dict[str, Any]:
    """What a committed plan's entry says of its accountants, once they agree."""
    steps = Steps(noise_multiplier=plan.noise_multiplier, sample_rate=plan.sample_rate, steps=plan.steps)
    found = cross_check([steps], plan.delta)
    if not charge >= found.pld:
        raise PrivacyViolation(f"the plan charges epsilon {charge:.6g} for steps that cost {found.pld:.6g}")
    check = {
        "prv": found.prv,
        "rdp": found.rdp if math.isfinite(found.rdp) else None,  # no number in JSON: RDP found no bound
        **({"prv_missing": found.prv_missing} if found.prv_missing else {}),
    }
    return {"steps": plan.steps, "accountant": ACCOUNTANT, "cross_check": check}
