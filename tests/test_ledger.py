"""The ledger: every cap holds at every moment, whatever crashes or races, and nothing is forgotten."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcollm_privacy import cross_checks
from fedcollm_privacy.accounting import Steps, epsilon_of
from fedcollm_privacy.adaptive import RdpFilter
from fedcollm_privacy.entries import charges, entry_time, open_reservations, verify_chain
from fedcollm_privacy.errors import BudgetExceeded, FedCollmError, InvalidValue, LedgerError, PrivacyViolation
from fedcollm_privacy.ledger import Cap
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.reservation import Ran, Reservation

from .ledgers import (
    ADAPTIVE,
    DAY,
    NOISIER,
    PLAN,
    RAN,
    Clock,
    commit,
    filled,
    kinds,
    ledger_at,
    reserve,
    reserve_adaptive,
    settle,
    upto,
)

COST = PLAN.epsilon(6)


# ---------------------------------------------------------------- order and charges


def test_a_run_is_charged_its_whole_plan_before_anything_is_trained(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    assert ledger.spent_on("notes").epsilon == 0.0
    commit(ledger, "run-1")
    assert kinds(ledger) == ["PLAN"]
    assert ledger.spent_on("notes").epsilon == COST
    assert ledger.spent_on("notes").delta == 1e-5
    assert ledger.spent_on("notes").steps == 0
    for number in (1, 2, 3):
        reservation = reserve(ledger, "run-1", number)
        assert (reservation.steps, reservation.plan_digest) == (2, PLAN.digest)
        settle(ledger, "run-1", reservation)
        assert ledger.spent_in_run("run-1").steps == 2 * number
        assert ledger.spent_on("notes").epsilon == COST
    assert kinds(ledger) == ["PLAN", *["RESERVE", "SETTLE"] * 3]
    assert ledger.head == ledger.entries()[-1]["digest"]


def test_nothing_is_reserved_without_a_committed_plan(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    with pytest.raises(LedgerError, match="has not committed this plan"):
        reserve(ledger, "run-1")
    commit(ledger, "run-1")
    with pytest.raises(LedgerError, match="has not committed this plan"):
        reserve(ledger, "run-1", plan=NOISIER)
    with pytest.raises(LedgerError, match="has not committed this plan"):
        reserve(ledger, "run-2")
    assert kinds(ledger) == ["PLAN"]


def test_a_reservation_is_settled_once_and_by_its_own_run(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1")
    commit(ledger, "run-2")
    reservation = reserve(ledger, "run-1").entry
    for run_id, entry in (("run-2", reservation), ("run-1", "0" * 64), ("run-1", ledger.entries()[0]["digest"])):
        with pytest.raises(LedgerError, match="no open reservation"):
            ledger.settle(run_id=run_id, reservation=entry, outcome="included")
    with pytest.raises(InvalidValue, match="outcome"):
        ledger.settle(run_id="run-1", reservation=reservation, outcome="refunded")
    ledger.settle(run_id="run-1", reservation=reservation, outcome="lost")
    with pytest.raises(LedgerError, match="no open reservation"):
        ledger.settle(run_id="run-1", reservation=reservation, outcome="included")
    assert kinds(ledger) == ["PLAN", "PLAN", "RESERVE", "SETTLE"]


@pytest.mark.parametrize("outcome", ["included", "left_out", "lost", "failed"])
def test_no_outcome_gives_anything_back(tmp_path: Path, outcome: str) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1")
    reservation = reserve(ledger, "run-1")
    before = ledger.spent_on("notes")
    ledger.settle(run_id="run-1", reservation=reservation.entry, outcome=outcome)
    assert ledger.spent_on("notes") == before
    assert before.steps == 2


def test_a_resumed_run_finds_its_plan_and_pays_once(tmp_path: Path) -> None:
    first = commit(ledger_at(tmp_path), "run-1", caps=upto(COST))
    assert commit(ledger_at(tmp_path), "run-1", caps=upto(COST)) == first
    ledger = ledger_at(tmp_path)
    assert kinds(ledger) == ["PLAN"]
    assert ledger.spent_on("notes").epsilon == COST


def test_a_run_has_one_plan_and_one_data_set(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1")
    with pytest.raises(LedgerError, match="another plan"):
        commit(ledger, "run-1", NOISIER)
    with pytest.raises(LedgerError, match="another plan"):
        commit(ledger, "run-1", data_set="letters")
    assert kinds(ledger) == ["PLAN"]


# ---------------------------------------------------------------- the cap


def test_runs_on_one_data_set_add_up_to_its_cap_and_no_further(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    cap = 2.5 * COST
    commit(ledger, "run-1", caps=upto(cap))
    commit(ledger, "run-2", caps=upto(cap))
    with pytest.raises(BudgetExceeded, match=r"Nothing was spent.*cap_epsilon"):
        commit(ledger, "run-3", caps=upto(cap))
    assert kinds(ledger) == ["PLAN", "PLAN"]
    assert ledger.spent_on("notes").epsilon == pytest.approx(2 * COST)
    # A cheaper plan still fits, and another data set has its own cap.
    commit(ledger, "run-4", NOISIER, caps=upto(cap))
    commit(ledger, "run-5", data_set="letters", caps=upto(cap))
    assert ledger.spent_on("letters").epsilon == COST


def test_a_cap_that_is_met_exactly_is_kept(tmp_path: Path) -> None:
    commit(ledger_at(tmp_path), "run-1", caps=upto(COST))
    with pytest.raises(BudgetExceeded):
        commit(ledger_at(tmp_path, "south"), "run-1", caps=upto(COST * (1 - 1e-9)))


def test_deltas_add_up_to_their_own_cap(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    for number in range(3):
        commit(ledger, f"run-{number}", caps=upto(100.0, delta=3.5e-5))
    with pytest.raises(BudgetExceeded, match="delta 4e-05"):
        commit(ledger, "run-3", caps=upto(100.0, delta=3.5e-5))
    assert ledger.spent_on("notes").delta == pytest.approx(3e-5)


def test_steps_beyond_the_plan_raise_the_charge_to_that_of_all_steps(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", caps=upto(PLAN.epsilon(8)))
    for number in (1, 2, 3):
        reserve(ledger, "run-1", number)
    assert ledger.spent_on("notes").epsilon == COST
    reserve(ledger, "run-1", 3)  # an attempt that broke; the round is tried again
    assert ledger.spent_on("notes").epsilon == PLAN.epsilon(8) > COST
    assert ledger.spent_in_run("run-1").steps == 8
    entries = ledger.entries()
    with pytest.raises(BudgetExceeded):
        reserve(ledger, "run-1", 3)
    assert ledger.entries() == entries


def test_a_cap_that_the_plan_fills_allows_no_extra_step(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", caps=upto(COST))
    for number in (1, 2, 3):
        reserve(ledger, "run-1", number)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, "run-1", 3)
    assert ledger.spent_in_run("run-1").steps == 6


def test_extra_steps_count_what_other_runs_took_meanwhile(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    cap = PLAN.epsilon(8) + NOISIER.epsilon(6) + 1e-9
    assert PLAN.epsilon(10) < cap, "alone, run-1 could take both"
    commit(ledger, "run-1", caps=upto(cap))
    for number in (1, 2, 3):
        reserve(ledger, "run-1", number)
    commit(ledger, "run-2", NOISIER, caps=upto(cap))
    reserve(ledger, "run-1", 3)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, "run-1", 3)


def test_every_one_of_several_caps_is_kept(tmp_path: Path) -> None:
    tight, wide, few = upto(1.5 * COST), upto(10 * COST), upto(100.0, delta=1.5e-5)
    for number, caps in enumerate(
        (tight + wide, wide + tight, wide + few, few + wide, wide + upto(1.5 * COST, days=1))
    ):
        ledger = ledger_at(tmp_path / str(number))
        commit(ledger, "run-1", caps=caps)
        with pytest.raises(BudgetExceeded):
            commit(ledger, "run-2", caps=caps)
        assert kinds(ledger) == ["PLAN"]
        assert ledger.entries()[0]["caps"] == [dataclasses.asdict(cap) for cap in caps]


def test_a_cap_over_days_forgets_a_run_when_they_are_over_and_no_second_earlier(tmp_path: Path) -> None:
    clock = Clock()
    ledger = ledger_at(tmp_path, clock=clock)
    caps = upto(1.5 * COST, days=30) + upto(2.5 * COST)
    commit(ledger, "run-1", caps=caps)
    clock.now += 30 * DAY
    with pytest.raises(BudgetExceeded, match=r"in 30 days"):
        commit(ledger, "run-2", caps=caps)
    clock.now += 1
    commit(ledger, "run-2", caps=caps)
    assert ledger.spent_on("notes").epsilon == pytest.approx(2 * COST), "what is shown as spent is for ever"
    clock.now += 1000 * DAY
    with pytest.raises(BudgetExceeded):
        commit(ledger, "run-3", caps=caps)  # the cap without days never forgets


def test_a_run_that_still_reserves_stays_in_the_last_days(tmp_path: Path) -> None:
    clock = Clock()
    ledger = ledger_at(tmp_path, clock=clock)
    caps = upto(1.5 * COST, days=30)
    commit(ledger, "run-1", caps=caps)
    for _ in range(3):
        clock.now += 20 * DAY
        reserve(ledger, "run-1")
        with pytest.raises(BudgetExceeded):
            commit(ledger, "run-2", caps=caps)


def test_a_clock_that_goes_backwards_makes_no_room(tmp_path: Path) -> None:
    clock = Clock()
    ledger = ledger_at(tmp_path, clock=clock)
    caps = upto(1.5 * COST, days=30)
    commit(ledger, "run-1", caps=caps)
    for back in (1.0, 31 * DAY, 3000 * DAY):
        clock.now = 1_800_000_000.0 - back
        with pytest.raises(BudgetExceeded):
            commit(ledger, "run-2", caps=caps)
        reserve(ledger, "run-1")
    times = [datetime.fromisoformat(entry["time"]) for entry in ledger.entries()]
    assert times == sorted(times)
    assert times[-1] == datetime.fromtimestamp(1_800_000_000, UTC)
    last = ledger.entries()[-1]
    assert entry_time(1_900_000_000.9, last) == datetime.fromtimestamp(1_900_000_000, UTC), "whole seconds"


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_run_that_rested_while_others_used_up_its_days_must_wait(tmp_path: Path, adaptive: bool) -> None:
    clock = Clock()
    ledger = ledger_at(tmp_path, clock=clock)
    plan = ADAPTIVE if adaptive else PLAN
    caps = upto((ADAPTIVE.target_epsilon if adaptive else COST) + COST / 2, days=30)
    light = dataclasses.replace(PLAN, noise_multiplier=50.0)

    def spend() -> Reservation:
        return reserve_adaptive(ledger, "run-1", light) if adaptive else reserve(ledger, "run-1")

    commit(ledger, "run-1", plan, caps=caps)
    open_one = spend()
    clock.now += 31 * DAY
    commit(ledger, "run-2", caps=caps)
    before = ledger.entries()
    with pytest.raises(BudgetExceeded, match="30 days"):
        spend()
    if not adaptive:
        with pytest.raises(BudgetExceeded, match="30 days"):
            ledger.admit(run_id="run-1", plan=PLAN)
    assert ledger.entries() == before
    # What was reserved long ago can be closed at any time, and is no new use of the data.
    settle(ledger, "run-1", open_one, "lost")
    assert set(charges(ledger.entries(), ledger.file.commitment("notes"), datetime.fromtimestamp(clock.now, UTC))) == {
        "run-2"
    }
    clock.now += 31 * DAY
    spend()


def test_steps_beyond_the_plan_keep_the_caps_that_the_owner_set_last(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", caps=upto(100.0))
    for number in (1, 2, 3):
        reserve(ledger, "run-1", number)
    commit(ledger, "run-2", NOISIER, caps=upto(COST + NOISIER.epsilon(6) + 1e-9))
    with pytest.raises(BudgetExceeded):
        reserve(ledger, "run-1", 3)
    assert ledger.spent_in_run("run-1").steps == 6


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), True, "8"])
@pytest.mark.parametrize("field", ["epsilon", "delta", "days"])
def test_a_cap_is_of_positive_numbers(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=field):
        Cap(**{"epsilon": 1.0, "delta": 1e-5, "days": 1, field: value})


@pytest.mark.parametrize(("field", "value"), [("delta", 1.5), ("days", 1.0), ("days", 0), ("days", 36_501)])
def test_a_cap_is_in_range(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=field):
        Cap(**{"epsilon": 1.0, "delta": 1e-5, field: value})


def test_a_data_set_without_any_cap_is_not_spent(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    with pytest.raises(InvalidValue, match="caps"):
        commit(ledger, "run-1", caps=())
    for policy in ("ab", "A" * 64, "policy.yaml"):
        with pytest.raises(InvalidValue, match="policy"):
            commit(ledger, "run-1", policy=policy)
    assert ledger.entries() == []
    commit(ledger, "run-1", policy="ab" * 32)
    assert ledger.entries()[0]["policy"] == "ab" * 32


# ---------------------------------------------------------------- whole histories


@cache
def independent_epsilon(plan: DpPlan, steps: int) -> float:
    step = dp_accounting.PoissonSampledDpEvent(
        float(plan.sample_rate), dp_accounting.GaussianDpEvent(plan.noise_multiplier)
    )
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    return float(accountant.compose(step, steps).get_epsilon(plan.delta))


NAMES = ("notes", "letters")
OPERATIONS = st.one_of(
    st.tuples(st.just("commit"), st.integers(0, 4), st.integers(0, 1)),
    st.tuples(st.just("reserve"), st.integers(0, 4), st.just(0)),
    st.tuples(st.just("settle"), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("abort"), st.integers(0, 4), st.just(0)),
    st.tuples(st.just("clock"), st.integers(-3, 6), st.just(0)),
    st.tuples(st.just("reopen"), st.just(0), st.just(0)),
)


def plan_of(run: int) -> DpPlan:
    return NOISIER if run % 2 else PLAN


class Restated:
    """What a data set's runs cost, as a list of events that is added up from the beginning each time."""

    def __init__(self) -> None:
        self.uses: list[tuple[datetime, str, str, int]] = []  # when, data set, run, steps reserved by it
        self.refunded: set[str] = set()

    def within(self, caps: tuple[Cap, ...], data_set: str, now: datetime, cost: Callable[[str, int], float]) -> bool:
        for cap in caps:
            first = datetime.min.replace(tzinfo=UTC) if cap.days is None else now - timedelta(days=cap.days)
            runs = {run for when, name, run, _ in self.uses if name == data_set and when >= first}
            steps = {run: sum(n for _, _, r, n in self.uses if r == run) for run in runs - self.refunded}
            if sum(cost(run, n) for run, n in steps.items()) > cap.epsilon + 1e-9:
                return False
            if 1e-5 * len(steps) > cap.delta * (1 + 1e-9):
                return False
        return True


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    operations=st.lists(OPERATIONS, min_size=6, max_size=22),
    ever=st.floats(0.5 * COST, 4 * COST),
    lately=st.floats(0.3 * COST, 2.5 * COST),
    delta=st.sampled_from([1e-3, 3.5e-5]),
)
def test_in_any_history_all_caps_hold_at_every_prefix_and_refuse_nothing_else(
    tmp_path_factory: pytest.TempPathFactory,
    operations: list[tuple[str, int, int]],
    ever: float,
    lately: float,
    delta: float,
) -> None:
    folder, clock = tmp_path_factory.mktemp("ledger"), Clock()
    ledger = ledger_at(folder, clock=clock)
    caps = upto(ever, delta) + upto(lately, delta, days=4)
    told, plans, given_up = Restated(), dict[int, str](), set[int]()
    reservations: list[tuple[int, str]] = []
    for operation, number, choice in operations:
        run_id, plan = f"run-{number}", plan_of(number)
        before = ledger.entries()
        last = datetime.fromisoformat(before[-1]["time"]) if before else datetime.min.replace(tzinfo=UTC)
        now = max(last, datetime.fromtimestamp(clock.now, UTC))
        name = plans.get(number, NAMES[choice])
        use = (now, name, run_id, 2 if operation == "reserve" else 0)
        told.uses.append(use)
        fits = told.within(caps, name, now, lambda run, n: plan_of(int(run[-1])).epsilon(max(6, n)))
        told.uses.pop()
        used = False
        try:
            if operation == "commit":
                expected = "given up" if number in given_up else "" if number in plans or fits else "over"
                used = number not in plans
                commit(ledger, run_id, plan, data_set=name, caps=caps)
                plans[number] = name
            elif operation == "reserve":
                known = number in plans and number not in given_up
                expected, used = ("" if fits else "over") if known else "not known", True
                reservations.append((number, reserve(ledger, run_id, plan=plan).entry))
            elif operation == "settle" and number < len(reservations):
                run, entry = reservations[number]
                still_open = any(e["digest"] == entry for e in open_reservations(before, f"run-{run}"))
                expected = "" if still_open else "closed"
                ledger.settle(run_id=f"run-{run}", reservation=entry, outcome="included", ran=RAN)
            elif operation == "abort":
                expected = "" if number in plans and number not in given_up else "not known"
                ledger.abort(run_id)
                given_up.add(number)
                told.refunded |= set() if any(n and r == run_id for _, _, r, n in told.uses) else {run_id}
            else:
                expected = ""
                clock.now += DAY * number if operation == "clock" else 0
                ledger = ledger_at(folder, clock=clock) if operation == "reopen" else ledger
            found = ""
        except BudgetExceeded:
            found, used = "over", False
        except LedgerError:
            found, used = expected or "an error", False
        assert found == expected
        told.uses += [use] if used else []
        assert found == "" or ledger.entries() == before, "a refusal must write nothing"
    ledger.file.export(folder / "export.jsonl")
    lines = [json.loads(line) for line in (folder / "export.jsonl").read_text().splitlines()]
    kept_at_every_prefix([line for line in lines if line["kind"] not in ("LEDGER", "HEAD")], caps)


def kept_at_every_prefix(entries: list[dict[str, Any]], caps: tuple[Cap, ...]) -> None:
    """Recomputed from the entries alone, by an accountant of the test's own."""
    plans: dict[str, DpPlan] = {}
    told = Restated()
    for entry in entries:
        now = datetime.fromisoformat(entry["time"])
        if entry["kind"] == "PLAN":
            plans[entry["run_id"]] = PLAN if entry["plan_digest"] == PLAN.digest else NOISIER
        if entry["kind"] in ("PLAN", "RESERVE"):
            steps = entry["steps"] if entry["kind"] == "RESERVE" else 0
            told.uses.append((now, entry["data_set"], entry["run_id"], steps))
        if entry["kind"] == "ABORT" and not any(n and run == entry["run_id"] for _, _, run, n in told.uses):
            told.refunded.add(entry["run_id"])
        for name in {entry["data_set"] for entry in entries}:
            assert told.within(caps, name, now, lambda run, n: independent_epsilon(plans[run], max(6, n)))


def test_the_recomputation_finds_a_cap_that_was_crossed(tmp_path: Path) -> None:
    clock = Clock()
    ledger = ledger_at(tmp_path, clock=clock)
    commit(ledger, "run-1")
    clock.now += 5 * DAY
    commit(ledger, "run-2")
    kept_at_every_prefix(ledger.entries(), upto(2.1 * COST) + upto(1.1 * COST, days=4))
    with pytest.raises(AssertionError):
        kept_at_every_prefix(ledger.entries(), upto(1.9 * COST))
    reserve(ledger, "run-1")
    with pytest.raises(AssertionError):
        kept_at_every_prefix(ledger.entries(), upto(1.1 * COST, days=4))


@settings(max_examples=150)
@given(
    written=st.lists(
        st.tuples(
            st.sampled_from(["PLAN", "RESERVE", "SETTLE", "ABORT", "STATEMENT"]),
            st.integers(0, 3),
            st.integers(0, 1),
            st.floats(0, 9),
            st.integers(0, 400),
        ),
        max_size=14,
    ),
    since=st.integers(0, 450),
)
def test_charges_are_the_latest_of_the_runs_that_used_the_data_lately(
    written: list[tuple[str, int, int, float, int]], since: int
) -> None:
    start = datetime(2026, 1, 31, 12, tzinfo=UTC)
    entries = [
        {
            "kind": kind,
            "run_id": f"run-{run}",
            "data_set": str(data_set),
            "time": (start + timedelta(hours=hour)).isoformat(),
            **({"epsilon": epsilon, "delta": 1e-5} if kind != "SETTLE" else {}),
        }
        for kind, run, data_set, epsilon, hour in sorted(written, key=lambda each: each[4])
    ]
    for limit in (None, start + timedelta(hours=since)):
        found = charges(entries, "0", limit)
        for run in (f"run-{number}" for number in range(4)):
            own = [e for e in entries if e["run_id"] == run and e["data_set"] == "0"]
            costs = [e["epsilon"] for e in own if e["kind"] in ("PLAN", "RESERVE", "ABORT")]
            uses = [e for e in own if e["kind"] in ("PLAN", "RESERVE")]
            lately = [e for e in uses if limit is None or datetime.fromisoformat(str(e["time"])) >= limit]
            if lately:
                assert found[run].epsilon == costs[-1]
            elif uses or not costs:
                assert run not in found


# ---------------------------------------------------------------- races within a process


@pytest.fixture
def slow_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has read the budget dawdles before writing, so that attempts really overlap."""
    real = LedgerFile.read

    def dawdling(db: Any) -> list[dict[str, Any]]:
        entries = real(db)
        time.sleep(0.02)
        return entries

    monkeypatch.setattr(LedgerFile, "read", staticmethod(dawdling))


def race(attempts: list[Callable[[], object]]) -> list[BaseException | None]:
    barrier = threading.Barrier(len(attempts))
    results: list[BaseException | None] = [None] * len(attempts)

    def attempt(number: int) -> None:
        barrier.wait()
        try:
            attempts[number]()
        except FedCollmError as error:
            results[number] = error

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(len(attempts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.usefixtures("slow_reading")
def test_of_eight_runs_racing_for_the_last_budget_one_wins(tmp_path: Path) -> None:
    ledgers = [ledger_at(tmp_path) for _ in range(8)]
    results = race([lambda i=i: commit(ledgers[i], f"run-{i}", caps=upto(1.5 * COST)) for i in range(8)])  # type: ignore[misc]
    assert results.count(None) == 1
    assert all(isinstance(error, BudgetExceeded) for error in results if error is not None)
    assert kinds(ledger_at(tmp_path)) == ["PLAN"]


@pytest.mark.usefixtures("slow_reading")
def test_of_racing_extra_reservations_one_wins(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", caps=upto(PLAN.epsilon(8)))
    for number in (1, 2, 3):
        reserve(ledger, "run-1", number)
    others = [ledger_at(tmp_path) for _ in range(6)]
    results = race([lambda other=other: reserve(other, "run-1", 3) for other in others])  # type: ignore[misc]
    assert results.count(None) == 1
    assert ledger.spent_in_run("run-1").steps == 8


@pytest.mark.usefixtures("slow_reading")
def test_ledgers_opened_at_once_are_one_ledger(tmp_path: Path) -> None:
    names: list[str] = []
    assert race([lambda: names.append(ledger_at(tmp_path).file.commitment("notes"))] * 6) == [None] * 6
    assert len(names) == 6
    assert len(set(names)) == 1


# ---------------------------------------------------------------- reservations are used once


def test_a_reservation_gives_its_steps_once() -> None:
    reservation = Reservation(entry="0" * 64, plan_digest=PLAN.digest, steps=2)
    with pytest.raises(PrivacyViolation, match="is for plan"):
        reservation.redeem(NOISIER.digest)
    assert reservation.redeem(PLAN.digest) == 2, "a foreign plan does not use it up"
    for _ in range(2):
        with pytest.raises(PrivacyViolation, match="used before"):
            reservation.redeem(PLAN.digest)
    with pytest.raises(PrivacyViolation, match="used before"):
        copy.copy(reservation).redeem(PLAN.digest)


def test_of_threads_that_redeem_at_once_one_gets_the_steps() -> None:
    reservation = Reservation(entry="0" * 64, plan_digest=PLAN.digest, steps=2)
    results = race([lambda: reservation.redeem(PLAN.digest)] * 16)
    assert results.count(None) == 1


def test_a_reservation_is_a_value_all_the_same() -> None:
    first, second = (Reservation(entry="0" * 64, plan_digest="p", steps=2) for _ in range(2))
    first.redeem("p")
    assert first == second
    assert hash(first) == hash(second)
    assert repr(first) == repr(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.steps = 3  # type: ignore[misc]


# ---------------------------------------------------------------- second opinions


def test_a_committed_plan_carries_two_second_opinions(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1")
    entry = ledger.entries()[0]
    check = entry["cross_check"]
    assert set(check) == {"prv", "rdp"}
    assert entry["epsilon"] == COST
    assert entry["epsilon"] <= check["prv"] <= entry["epsilon"] + 0.013
    assert entry["epsilon"] <= check["rdp"]


def test_a_plan_too_long_for_prv_says_so_in_its_entry(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", dataclasses.replace(PLAN, rounds=50_000), caps=upto(1e4))
    check = ledger.entries()[0]["cross_check"]
    assert check["prv"] is None
    assert "grid" in check["prv_missing"]
    assert check["rdp"] > ledger.entries()[0]["epsilon"]


def test_a_plan_on_which_accountants_disagree_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_at(tmp_path)
    cross_checks._cross_check.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(cross_checks, "epsilon_of", lambda *_: COST / 2)
        with pytest.raises(PrivacyViolation, match="contradict"):
            commit(ledger, "run-1")
    assert ledger.entries() == []
    cross_checks._cross_check.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(DpPlan, "epsilon", lambda *_: COST / 2)
        with pytest.raises(PrivacyViolation, match="charges epsilon"):
            commit(ledger, "run-1")
    assert ledger.entries() == []
    commit(ledger, "run-1")


def test_a_ledger_opens_without_loading_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fedcollm_privacy.ledger import Ledger;"
        "from tests.ledgers import key_of;"
        "Ledger(Path(sys.argv[1]), key_of('north')); sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x.sqlite")], env=environment, check=True)


# ---------------------------------------------------------------- plans that may change


def test_an_adaptive_plan_is_charged_its_whole_target_and_lets_rounds_differ(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", ADAPTIVE, caps=upto(2.0))
    plan_entry = ledger.entries()[0]
    assert (plan_entry["kind"], plan_entry["plan"], plan_entry["epsilon"]) == ("PLAN", ADAPTIVE.as_dict(), 2.0)
    assert "RDP filter" in plan_entry["accountant"]
    assert "cross_check" not in plan_entry
    assert ledger.spent_on("notes").epsilon == 2.0
    rounds = [PLAN, NOISIER, dataclasses.replace(PLAN, steps_per_round=3, sample_rate=Fraction(1, 20))]
    for number, round_plan in enumerate(rounds, start=1):
        reservation = reserve_adaptive(ledger, "run-1", round_plan, number)
        assert reservation.redeem(round_plan.digest) == round_plan.steps_per_round
        ledger.settle(run_id="run-1", reservation=reservation.entry, outcome="included")
    last = ledger.entries()[-2]
    assert (last["noise_multiplier"], last["sample_rate"], last["steps"], last["order"]) == (2.0, "1/20", 3, 9.0)
    assert (last["plan_digest"], last["round_plan_digest"]) == (ADAPTIVE.digest, rounds[-1].digest)
    spent = ledger.spent_on("notes")
    assert (spent.epsilon, spent.delta, spent.steps) == (2.0, 1e-5, 7)
    assert verify_chain(ledger.entries(), ledger.file.identity) == []


def test_the_filter_refuses_what_would_cross_and_writes_nothing(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", ADAPTIVE)
    budget = RdpFilter(ADAPTIVE)
    steps = Steps(noise_multiplier=2.0, sample_rate=Fraction(1, 10), steps=2)
    admitted = max(n for n in range(60) if budget.admits(*[steps] * n))
    assert 5 <= admitted < 59
    for _ in range(admitted):
        reserve_adaptive(ledger, "run-1")
    before = ledger.entries()
    with pytest.raises(BudgetExceeded, match="adaptive plan's epsilon 2"):
        reserve_adaptive(ledger, "run-1")
    assert ledger.entries() == before
    assert epsilon_of([steps] * admitted, 1e-5) <= ADAPTIVE.target_epsilon
    reserve_adaptive(ledger, "run-1", dataclasses.replace(PLAN, noise_multiplier=50.0))  # less still fits


def test_a_crash_forgets_no_step_of_an_adaptive_run(tmp_path: Path) -> None:
    commit(ledger_at(tmp_path), "run-1", ADAPTIVE)
    heavy = dataclasses.replace(PLAN, steps_per_round=36)
    reserve_adaptive(ledger_at(tmp_path), "run-1", heavy)  # the process ends here: nothing is settled
    again = ledger_at(tmp_path)
    commit(again, "run-1", ADAPTIVE)
    assert kinds(again) == ["PLAN", "RESERVE"], "the same plan is found and charged once"
    with pytest.raises(BudgetExceeded):
        reserve_adaptive(again, "run-1", heavy)


@pytest.mark.usefixtures("slow_reading")
def test_of_racing_adaptive_reservations_as_many_win_as_the_filter_admits(tmp_path: Path) -> None:
    commit(ledger_at(tmp_path), "run-1", ADAPTIVE)
    heavy = dataclasses.replace(PLAN, steps_per_round=36)
    others = [ledger_at(tmp_path) for _ in range(6)]
    results = race([lambda other=other: reserve_adaptive(other, "run-1", heavy) for other in others])  # type: ignore[misc]
    assert results.count(None) == 1


def test_a_committed_plan_cannot_become_adaptive_nor_the_other_way_round(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "fixed")
    commit(ledger, "free", ADAPTIVE)
    before = ledger.entries()
    for run_id, plan in (("fixed", ADAPTIVE), ("fixed", NOISIER), ("free", PLAN)):
        with pytest.raises(LedgerError, match=r"another plan.*committed as an AdaptivePlan"):
            commit(ledger, run_id, plan)
    with pytest.raises(LedgerError, match="another plan"):
        commit(ledger, "free", dataclasses.replace(ADAPTIVE, order=10.0))
    with pytest.raises(LedgerError, match="has not committed this plan"):
        reserve(ledger, "free")
    with pytest.raises(LedgerError, match="has not committed this plan"):
        reserve_adaptive(ledger, "fixed")
    with pytest.raises(LedgerError, match="has not committed this plan"):
        reserve_adaptive(ledger, "free", plan=dataclasses.replace(ADAPTIVE, target_epsilon=9.0))
    assert ledger.entries() == before


def test_adaptive_targets_count_towards_the_cap_like_any_charge(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", ADAPTIVE, caps=upto(2.0 + COST))
    with pytest.raises(BudgetExceeded):
        commit(ledger, "run-2", ADAPTIVE, caps=upto(2.0 + COST))
    commit(ledger, "run-3", PLAN, caps=upto(2.0 + COST))
    assert kinds(ledger) == ["PLAN", "PLAN"]


def test_a_round_protects_the_unit_that_was_promised(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", ADAPTIVE)
    with pytest.raises(InvalidValue, match=r"unit = 'person'.*record"):
        reserve_adaptive(ledger, "run-1", dataclasses.replace(PLAN, unit="person"))
    for number in (0, True, 1.0):
        with pytest.raises(InvalidValue, match="server_round"):
            reserve_adaptive(ledger, "run-1", server_round=number)  # type: ignore[arg-type]
    assert kinds(ledger) == ["PLAN"]


# ---------------------------------------------------------------- runs that end early or go on


def test_a_run_given_up_before_its_first_reservation_costs_nothing(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", caps=upto(COST))
    ledger.abort("run-1")
    assert kinds(ledger) == ["PLAN", "ABORT"]
    assert (ledger.spent_on("notes").epsilon, ledger.spent_on("notes").delta) == (0.0, 0.0)
    commit(ledger, "run-2", caps=upto(COST))  # the room is there again
    assert ledger.spent_on("notes").epsilon == COST


@pytest.mark.parametrize("outcome", ["included", "left_out", "lost", "failed", None])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_run_given_up_later_stays_charged_whatever_became_of_its_steps(
    tmp_path: Path, outcome: str | None, adaptive: bool
) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", ADAPTIVE if adaptive else PLAN)
    reservation = reserve_adaptive(ledger, "run-1") if adaptive else reserve(ledger, "run-1")
    before = ledger.spent_on("notes")
    if outcome is not None:
        settle(ledger, "run-1", reservation, outcome)
    ledger.abort("run-1")
    assert ledger.spent_on("notes") == before
    assert before.epsilon == (2.0 if adaptive else COST)
    assert kinds(ledger) == ["PLAN", "RESERVE", "SETTLE", "ABORT"], "an open reservation is closed"
    assert ledger.entries()[2]["outcome"] == (outcome or "failed")
    assert verify_chain(ledger.entries(), ledger.file.identity) == []


def test_the_charge_of_steps_beyond_the_plan_stays_too(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1")
    for number in (1, 2, 3, 3):
        reserve(ledger, "run-1", number)
    ledger.abort("run-1")
    assert ledger.spent_on("notes").epsilon == PLAN.epsilon(8)
    assert [e["outcome"] for e in ledger.entries() if e["kind"] == "SETTLE"] == ["failed"] * 4


def test_a_run_given_up_does_nothing_more(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1")
    commit(ledger, "run-2", ADAPTIVE)
    open_one = reserve(ledger, "run-1")
    ledger.abort("run-1")
    ledger.abort("run-2")
    before = ledger.entries()
    attempts: list[Callable[[], object]] = [
        lambda: reserve(ledger, "run-1"),
        lambda: ledger.admit(run_id="run-1", plan=PLAN),
        lambda: reserve_adaptive(ledger, "run-2"),
        lambda: commit(ledger, "run-1"),
        lambda: commit(ledger, "run-2", ADAPTIVE),
        lambda: ledger.abort("run-1"),
        lambda: ledger.record_statement(run_id="run-1", statement="a" * 64, epsilon=9.0, delta=1e-5),
        lambda: settle(ledger, "run-1", open_one),
        lambda: ledger.abort("run-3"),
    ]
    for attempt in attempts:
        with pytest.raises(LedgerError, match=r"given up|no open reservation|has not committed"):
            attempt()
    with pytest.raises(LedgerError, match="another plan"):
        commit(ledger, "run-1", NOISIER)
    assert ledger.entries() == before


def test_what_a_crash_left_open_is_closed_as_failed_by_the_runs_next_reservation(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1")
    commit(ledger, "run-2")
    settle(ledger, "run-1", reserve(ledger, "run-1", 1))
    left = reserve(ledger, "run-1", 2).entry
    others = reserve(ledger, "run-2", 1)
    again = ledger_at(tmp_path)
    before = again.entries()
    commit(again, "run-1")
    assert again.entries() == before, "its round may have been summed, and is settled when that is known"
    reserve(again, "run-1", 2)
    closed = again.entries()[-2]
    assert (closed["kind"], closed["run_id"], closed["reservation"]) == ("SETTLE", "run-1", left)
    assert (closed["outcome"], closed["ran"]) == ("failed", None)
    assert again.spent_in_run("run-1").steps == 6, "steps that may have run stay spent"
    settle(again, "run-2", others)  # another run's reservation was left alone


def test_what_steps_said_of_themselves_survives_a_crash_until_they_are_settled(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1")
    reserved = reserve(ledger, "run-1", 1)
    assert ledger.file.noted_ran(reserved.entry) is None
    ledger.file.note_ran(reserved.entry, RAN)
    again = ledger_at(tmp_path)
    (open_one,) = open_reservations(again.entries(), "run-1")
    assert open_one["digest"] == reserved.entry
    assert again.file.noted_ran(reserved.entry) == RAN
    again.settle(
        run_id="run-1", reservation=reserved.entry, outcome="included", ran=again.file.noted_ran(reserved.entry)
    )
    assert open_reservations(again.entries(), "run-1") == []
    assert again.entries()[-1]["ran"] == dataclasses.asdict(RAN)


def test_a_settlement_says_what_the_steps_recorded(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1")
    settle(ledger, "run-1", reserve(ledger, "run-1"))
    ledger.settle(run_id="run-1", reservation=reserve(ledger, "run-1").entry, outcome="failed")
    said = [e["ran"] for e in ledger.entries() if e["kind"] == "SETTLE"]
    assert said == [dataclasses.asdict(RAN), None]
    assert Ran(**said[0]) == RAN


# ---------------------------------------------------------------- statements


def test_a_statement_is_noted_if_it_says_no_less_than_was_charged(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1")
    fields: dict[str, Any] = {"run_id": "run-1", "statement": "a" * 64, "epsilon": COST, "delta": 1e-5}
    for change in ({"epsilon": COST * (1 - 1e-12)}, {"delta": 0.9e-5}, {"run_id": "run-2"}):
        with pytest.raises(LedgerError):
            ledger.record_statement(**fields | change)
    for field, value in (("epsilon", float("nan")), ("delta", True), ("epsilon", float("inf")), ("statement", "x")):
        with pytest.raises(InvalidValue, match=field):
            ledger.record_statement(**fields | {field: value})
    assert kinds(ledger) == ["PLAN"]
    ledger.record_statement(run_id="run-1", statement="a" * 64, epsilon=COST, delta=1e-5)
    ledger.record_statement(run_id="run-1", statement="b" * 64, epsilon=COST + 1, delta=1e-4)
    said = ledger.entries()[1:]
    assert [(e["kind"], e["statement"], e["epsilon"]) for e in said] == [
        ("STATEMENT", "a" * 64, COST),
        ("STATEMENT", "b" * 64, COST + 1),
    ]
    assert ledger.spent_on("notes").epsilon == COST, "what a statement says is no charge"


# ---------------------------------------------------------------- values from outside


def test_names_and_rounds_are_checked(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    with pytest.raises(InvalidValue, match="run_id"):
        commit(ledger, "run 1\n")
    commit(ledger, "run-1")
    for number in (0, -1, True, 1.5):
        with pytest.raises(InvalidValue, match="server_round"):
            reserve(ledger, "run-1", number)  # type: ignore[arg-type]


def test_asking_whether_a_reservation_would_be_admitted_writes_nothing(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    before = ledger.entries()
    ledger.admit(run_id="run-1", plan=PLAN)
    with pytest.raises(LedgerError, match="has not committed"):
        ledger.admit(run_id="run-1", plan=NOISIER)
    tight = ledger_at(tmp_path / "tight")
    commit(tight, "run-1", caps=upto(COST))
    for number in (1, 2, 3):
        tight.admit(run_id="run-1", plan=PLAN)
        reserve(tight, "run-1", number)
    with pytest.raises(BudgetExceeded):
        tight.admit(run_id="run-1", plan=PLAN)
    assert ledger.entries() == before
