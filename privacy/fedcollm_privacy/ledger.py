"""A site's privacy ledger: what was promised, reserved and spent, in one SQLite file per site.

The rule is reserve, train, settle. A reservation is on disk before the first gradient; a crash leaves it spent. The
cap of a data set holds over all runs: the charges of its runs are added (basic composition, which stays valid when
later runs are chosen after seeing earlier ones; Rogers et al. 2016, section 3).

What one run is charged: its committed plan, from the first reservation on. When broken attempts make it reserve more
steps than planned, the charge rises to the epsilon of all reserved steps. These are more steps of the same mechanism,
and the cap bounds their number beforehand, so the privacy loss distribution of the steps remains a valid bound.

The plan's type decides the accountant. A `DpPlan` is fixed before data is read and costs what privacy loss
distributions say. An `AdaptivePlan` may choose each round's noise, rate and steps after seeing earlier rounds; it is
charged its whole target at once, and every reservation passes its Rényi filter.

Entries form a hash chain. That shows an entry altered, removed from the middle or added by accident; whoever can
rewrite the whole file can still rebuild the chain, until entries are signed and heads are kept elsewhere. No entry
holds the number of records or anything else computed from them without noise, except the plan's nominal size.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from fedcollm_privacy import _validate
from fedcollm_privacy.accounting import ACCOUNTANT, Steps
from fedcollm_privacy.adaptive import ADAPTIVE_ACCOUNTANT, AdaptivePlan, RdpFilter
from fedcollm_privacy.cross_checks import cross_check
from fedcollm_privacy.durable import Connection, make_file, transaction
from fedcollm_privacy.entries import GENESIS, Spent, charges, entry_digest, total, verify_chain
from fedcollm_privacy.errors import BudgetExceeded, LedgerError, PrivacyViolation
from fedcollm_privacy.messages import canonical_json
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.reservation import Reservation

__all__ = ["Ledger", "Reservation", "Spent", "verify_chain"]

SCHEMA_VERSION = 1


class Ledger:
    """The ledger of one site. Every method is one transaction, on disk when it returns.

    Args:
        path: SQLite file; made with its folder when absent, with file mode 600.
        site: the site's public name; a ledger of another site is refused.

    Raises:
        LedgerError: the file is not a ledger, is another site's, or its chain is broken.
    """

    def __init__(self, path: Path, site: str) -> None:
        _validate.public_name(site=site)
        self._path, self._site = path, site
        make_file(path, "set privacy.ledger_dir to a folder you may write")
        with self._transaction() as db:
            db.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")
            db.execute(
                "CREATE TABLE IF NOT EXISTS entries (seq INTEGER PRIMARY KEY, body TEXT NOT NULL,"
                " digest TEXT NOT NULL UNIQUE) STRICT"
            )
            for key, value in (("schema", str(SCHEMA_VERSION)), ("site", site), ("salt", os.urandom(32).hex())):
                db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
            meta = dict(db.execute("SELECT key, value FROM meta"))
        if meta["site"] != site:
            raise LedgerError(f"{path} is the ledger of site {meta['site']!r}, not of {site!r}")
        if meta["schema"] != str(SCHEMA_VERSION):
            raise LedgerError(f"{path} has schema {meta['schema']}, this program reads {SCHEMA_VERSION}; upgrade")
        self._salt = bytes.fromhex(meta["salt"])
        # Without the salt that named its data sets, a ledger would take every data set for a new one.
        self._identity = hashlib.sha256(b"ledger" + self._salt).hexdigest()
        entries = self.entries()
        problems = verify_chain(entries)
        if any(entry.get("ledger", self._identity) != self._identity for entry in entries):
            problems.append("its salt is not the one its entries were made with")
        if problems:
            raise LedgerError(f"{path} was altered ({problems[0]}); nothing is spent on it until it is restored")

    def _transaction(self) -> AbstractContextManager[Connection]:
        otherwise = (
            "nothing is trained. Free its disk or end the other run that holds it; if it is damaged, restore it from a "
            "backup"
        )
        return transaction(self._path, "a ledger", otherwise)

    @staticmethod
    def _read(db: Connection) -> list[dict[str, Any]]:
        rows = db.execute("SELECT body, digest FROM entries ORDER BY seq").fetchall()
        try:
            return [{**json.loads(body), "digest": digest} for body, digest in rows]
        except (ValueError, TypeError) as error:
            raise LedgerError("the ledger was altered: an entry is unreadable; restore it from a backup") from error

    def _append(self, db: Connection, entries: list[dict[str, Any]], content: dict[str, Any]) -> str:
        body = {
            "schema": SCHEMA_VERSION,
            "seq": len(entries) + 1,
            "previous": entries[-1]["digest"] if entries else GENESIS,
            "site": self._site,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **content,
        }
        digest = entry_digest(body)
        db.execute("INSERT INTO entries VALUES (?, ?, ?)", (body["seq"], canonical_json(body).decode(), digest))
        return digest

    def data_set_commitment(self, data_set: str) -> str:
        """The name under which a data set stands in the ledger: HMAC-SHA256 under the ledger's own salt."""
        return hmac.new(self._salt, data_set.encode(), "sha256").hexdigest()

    def commit_plan(
        self, *, run_id: str, data_set: str, plan: DpPlan | AdaptivePlan, cap_epsilon: float, cap_delta: float
    ) -> str:
        """Charge a run's whole plan to the data set, before anything is trained.

        A `DpPlan` is charged its PLD epsilon, once other accountants did not contradict it; an `AdaptivePlan` is
        charged its whole target. A run that is resumed finds its plan here already; the same plan is then accepted
        without a second charge.

        Args:
            run_id: the run's name; one plan a run.
            data_set: the data set's name, as the site calls it.
            plan: what will be run, or what bounds it.
            cap_epsilon: the data set's cap over all runs.
            cap_delta: likewise.

        Returns:
            Digest of the PLAN entry.

        Raises:
            BudgetExceeded: the charge would cross the cap; nothing is written.
            LedgerError: the run has another plan here already.
            PrivacyViolation: accountants contradict each other on the plan; nothing is written.
        """
        _validate.public_name(run_id=run_id)
        _validate.positive(cap_epsilon=cap_epsilon, cap_delta=cap_delta)
        name = self.data_set_commitment(data_set)
        with self._transaction() as db:
            entries = self._read(db)
            for entry in entries:
                if entry["kind"] == "PLAN" and entry["run_id"] == run_id:
                    if entry["plan_digest"] != plan.digest or entry["data_set"] != name:
                        raise LedgerError(
                            f"run {run_id} has another plan in this ledger; give the run another name. A plan that may "
                            "change after data was read must be committed as an AdaptivePlan, before the first step"
                        )
                    return str(entry["digest"])
            charge = plan.epsilon(plan.steps) if isinstance(plan, DpPlan) else plan.target_epsilon
            self._refuse_over_cap(entries, name, run_id, charge, plan.delta, cap_epsilon, cap_delta)
            return self._append(
                db,
                entries,
                {
                    "kind": "PLAN",
                    "ledger": self._identity,
                    "run_id": run_id,
                    "data_set": name,
                    "plan": plan.as_dict(),
                    "plan_digest": plan.digest,
                    "epsilon": charge,
                    "delta": plan.delta,
                    "cap_epsilon": cap_epsilon,
                    "cap_delta": cap_delta,
                    **(_checked(plan, charge) if isinstance(plan, DpPlan) else {"accountant": ADAPTIVE_ACCOUNTANT}),
                },
            )

    def admit(self, *, run_id: str, plan: DpPlan) -> None:
        """Refuse where `reserve` would, and write nothing: to be asked before a site takes part in a round."""
        with self._transaction() as db:
            self._next(self._read(db), run_id, plan)

    def _next(self, entries: list[dict[str, Any]], run_id: str, plan: DpPlan) -> tuple[dict[str, Any], int, float]:
        planned, reserved = _of_run(entries, run_id, plan)
        steps = sum(entry["steps"] for entry in reserved) + plan.steps_per_round
        charge = plan.epsilon(max(plan.steps, steps))
        if steps > plan.steps:
            caps = (planned["cap_epsilon"], planned["cap_delta"])
            self._refuse_over_cap(entries, planned["data_set"], run_id, charge, plan.delta, *caps)
        return planned, steps, charge

    def reserve(self, *, run_id: str, plan: DpPlan, server_round: int) -> Reservation:
        """Reserve one round's steps. On disk before this returns; spent whatever happens next.

        Raises:
            BudgetExceeded: more steps than planned are needed (after broken attempts) and would cross the cap.
            LedgerError: the run has no such plan here.
        """
        _validate.integer_at_least(1, server_round=server_round)
        with self._transaction() as db:
            entries = self._read(db)
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
            BudgetExceeded: the filter does not admit the steps; nothing is written.
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
        with self._transaction() as db:
            entries = self._read(db)
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

    def settle(self, *, run_id: str, reservation: str, outcome: str) -> str:
        """Close a reservation with what became of it; the budget stays spent in every case.

        Args:
            reservation: digest of the RESERVE entry.
            outcome: ``included``, ``left_out``, ``lost`` (the round gave no sum) or ``failed`` (training broke off).

        Raises:
            LedgerError: no such open reservation.
        """
        _validate.one_of(("included", "left_out", "lost", "failed"), outcome=outcome)
        with self._transaction() as db:
            entries = self._read(db)
            reserved = next((e for e in entries if e["kind"] == "RESERVE" and e["digest"] == reservation), None)
            settled = any(e["kind"] == "SETTLE" and e["reservation"] == reservation for e in entries)
            if reserved is None or reserved["run_id"] != run_id or settled:
                raise LedgerError(f"run {run_id} has no open reservation {reservation[:12]}")
            return self._append(
                db,
                entries,
                {
                    "kind": "SETTLE",
                    "run_id": run_id,
                    "data_set": reserved["data_set"],
                    "reservation": reservation,
                    "outcome": outcome,
                },
            )

    @staticmethod
    def _refuse_over_cap(
        entries: list[dict[str, Any]],
        data_set: str,
        run_id: str,
        charge: float,
        delta: float,
        cap_epsilon: float,
        cap_delta: float,
    ) -> None:
        others = charges([e for e in entries if e.get("run_id") != run_id], data_set)
        epsilon_after = math.fsum([*(c.epsilon for c in others.values()), charge])
        delta_after = math.fsum([*(c.delta for c in others.values()), delta])
        if not (epsilon_after <= cap_epsilon and delta_after <= cap_delta):
            raise BudgetExceeded(
                f"run {run_id} would bring this data set to epsilon {epsilon_after:.4g}, delta {delta_after:.3g}; "
                f"its cap is epsilon {cap_epsilon:.4g}, delta {cap_delta:.3g}. Nothing was spent. Lower "
                "privacy.epsilon, or have the cap (privacy.cap_epsilon, privacy.cap_delta) raised by whoever owns it."
            )

    def entries(self) -> list[dict[str, Any]]:
        """All entries in order, each with its ``digest``."""
        with self._transaction() as db:
            return self._read(db)

    @property
    def head(self) -> str:
        """Digest of the last entry; 64 zeros for an empty ledger."""
        entries = self.entries()
        return str(entries[-1]["digest"]) if entries else GENESIS

    def spent_in_run(self, run_id: str) -> Spent:
        """What one run has been charged."""
        entries = [e for e in self.entries() if e.get("run_id") == run_id]
        return total([c for name in {e["data_set"] for e in entries} for c in charges(entries, name).values()])

    def spent_on(self, data_set: str) -> Spent:
        """What all runs on a data set have been charged together."""
        return total(list(charges(self.entries(), self.data_set_commitment(data_set)).values()))

    def export(self, path: Path) -> None:
        """Write all entries as JSON lines, one canonical object a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(canonical_json(entry) + b"\n" for entry in self.entries()))


def _of_run(
    entries: list[dict[str, Any]], run_id: str, plan: DpPlan | AdaptivePlan
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The run's PLAN entry, which must be this plan's, and its RESERVE entries."""
    of_run = [entry for entry in entries if entry.get("run_id") == run_id]
    planned = next((entry for entry in of_run if entry["kind"] == "PLAN"), None)
    if planned is None or planned["plan_digest"] != plan.digest:
        raise LedgerError(f"run {run_id} has not committed this plan; nothing is trained without one")
    return planned, [entry for entry in of_run if entry["kind"] == "RESERVE"]


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
