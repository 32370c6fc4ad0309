"""The ledger: the cap holds at every moment, whatever crashes or races, and an altered file is found."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
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
from fedcollm_privacy.adaptive import AdaptivePlan, RdpFilter
from fedcollm_privacy.errors import BudgetExceeded, FedCollmError, InvalidValue, LedgerError, PrivacyViolation
from fedcollm_privacy.ledger import Ledger, Reservation, verify_chain
from fedcollm_privacy.messages import canonical_json
from fedcollm_privacy.plan import DpPlan, calibrate

PLAN = DpPlan(
    unit="record",
    max_records_per_unit=1,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    sample_rate=Fraction(1, 10),
    expected_batch_size=10,
    steps_per_round=2,
    rounds=3,
    delta=1e-5,
)
NOISIER = dataclasses.replace(PLAN, noise_multiplier=4.0)
COST = PLAN.epsilon(6)
ADAPTIVE = AdaptivePlan(order=9.0, target_epsilon=2.0, delta=1e-5, unit="record")


def ledger_at(folder: Path, site: str = "north") -> Ledger:
    return Ledger(folder / "ledgers" / f"{site}.sqlite", site)


def commit(
    ledger: Ledger, run_id: str, plan: DpPlan | AdaptivePlan = PLAN, *, cap: float = 100.0, **changes: Any
) -> str:
    fields: dict[str, Any] = {"data_set": "notes", "cap_epsilon": cap, "cap_delta": 1e-3}
    return ledger.commit_plan(run_id=run_id, plan=plan, **(fields | changes))


def reserve(ledger: Ledger, run_id: str, server_round: int = 1, plan: DpPlan = PLAN) -> Reservation:
    return ledger.reserve(run_id=run_id, plan=plan, server_round=server_round)


def reserve_adaptive(
    ledger: Ledger, run_id: str, round_plan: DpPlan = PLAN, server_round: int = 1, plan: AdaptivePlan = ADAPTIVE
) -> Reservation:
    return ledger.reserve_adaptive(run_id=run_id, plan=plan, round_plan=round_plan, server_round=server_round)


def kinds(ledger: Ledger) -> list[str]:
    return [entry["kind"] for entry in ledger.entries()]


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
        ledger.settle(run_id="run-1", reservation=reservation.entry, outcome="included")
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
    first = commit(ledger_at(tmp_path), "run-1", cap=COST)
    assert commit(ledger_at(tmp_path), "run-1", cap=COST) == first
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
    commit(ledger, "run-1", cap=cap)
    commit(ledger, "run-2", cap=cap)
    with pytest.raises(BudgetExceeded, match=r"Nothing was spent.*cap_epsilon"):
        commit(ledger, "run-3", cap=cap)
    assert kinds(ledger) == ["PLAN", "PLAN"]
    assert ledger.spent_on("notes").epsilon == pytest.approx(2 * COST)
    # A cheaper plan still fits, and another data set has its own cap.
    commit(ledger, "run-4", NOISIER, cap=cap)
    commit(ledger, "run-5", data_set="letters", cap=cap)
    assert ledger.spent_on("letters").epsilon == COST


def test_a_cap_that_is_met_exactly_is_kept(tmp_path: Path) -> None:
    commit(ledger_at(tmp_path), "run-1", cap=COST)
    with pytest.raises(BudgetExceeded):
        commit(ledger_at(tmp_path, "south"), "run-1", cap=COST * (1 - 1e-9))


def test_deltas_add_up_to_their_own_cap(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    for number in range(3):
        commit(ledger, f"run-{number}", cap_delta=3.5e-5)
    with pytest.raises(BudgetExceeded, match="delta 4e-05"):
        commit(ledger, "run-3", cap_delta=3.5e-5)
    assert ledger.spent_on("notes").delta == pytest.approx(3e-5)


def test_steps_beyond_the_plan_raise_the_charge_to_that_of_all_steps(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", cap=PLAN.epsilon(8))
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
    commit(ledger, "run-1", cap=COST)
    for number in (1, 2, 3):
        reserve(ledger, "run-1", number)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, "run-1", 3)
    assert ledger.spent_in_run("run-1").steps == 6


def test_extra_steps_count_what_other_runs_took_meanwhile(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    cap = PLAN.epsilon(8) + NOISIER.epsilon(6) + 1e-9
    assert PLAN.epsilon(10) < cap, "alone, run-1 could take both"
    commit(ledger, "run-1", cap=cap)
    for number in (1, 2, 3):
        reserve(ledger, "run-1", number)
    commit(ledger, "run-2", NOISIER, cap=cap)
    reserve(ledger, "run-1", 3)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, "run-1", 3)


@cache
def independent_epsilon(plan: DpPlan, steps: int) -> float:
    step = dp_accounting.PoissonSampledDpEvent(
        float(plan.sample_rate), dp_accounting.GaussianDpEvent(plan.noise_multiplier)
    )
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    return float(accountant.compose(step, steps).get_epsilon(plan.delta))


ACTIONS = st.one_of(
    st.tuples(st.just("commit"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("reserve"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("settle"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("reopen"), st.just(0), st.just(False)),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, min_size=5, max_size=25), cap=st.floats(0.2 * COST, 4 * COST))
def test_the_cap_holds_at_every_prefix_whatever_is_done(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int, bool]], cap: float
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    ledger = ledger_at(folder)
    reservations: list[tuple[str, str]] = []
    for action, number, noisier in actions:
        plan = NOISIER if noisier else PLAN
        run_id = f"run-{number}"
        before = ledger.entries()
        try:
            if action == "commit":
                commit(ledger, run_id, plan, cap=cap)
            elif action == "reserve":
                reservations.append((run_id, reserve(ledger, run_id, plan=plan).entry))
            elif action == "settle" and number < len(reservations):
                settled_run, entry = reservations[number]
                ledger.settle(run_id=settled_run, reservation=entry, outcome="included")
            elif action == "reopen":
                ledger = ledger_at(folder)
        except (BudgetExceeded, LedgerError):
            assert ledger.entries() == before, "a refusal must write nothing"
    entries = ledger.entries()
    assert verify_chain(entries) == []
    # Recomputed from the entries alone, by an accountant of the test's own.
    plans: dict[str, DpPlan] = {}
    reserved: dict[str, int] = defaultdict(int)
    for entry in entries:
        if entry["kind"] == "PLAN":
            plans[entry["run_id"]] = PLAN if entry["plan_digest"] == PLAN.digest else NOISIER
        if entry["kind"] == "RESERVE":
            reserved[entry["run_id"]] += entry["steps"]
        total = sum(independent_epsilon(plan, max(6, reserved[run_id])) for run_id, plan in plans.items())
        assert total <= cap * (1 + 1e-9)
    final = sum(independent_epsilon(plan, max(6, reserved[run_id])) for run_id, plan in plans.items())
    assert ledger.spent_on("notes").epsilon == pytest.approx(final)
    assert ledger.spent_on("notes").steps == sum(reserved.values())


# ---------------------------------------------------------------- races and crashes


@pytest.fixture
def slow_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has read the budget dawdles before writing, so that attempts really overlap."""
    real = Ledger._read

    def dawdling(db: sqlite3.Connection) -> list[dict[str, Any]]:
        entries = real(db)
        time.sleep(0.02)
        return entries

    monkeypatch.setattr(Ledger, "_read", staticmethod(dawdling))


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
    results = race([lambda i=i: commit(ledgers[i], f"run-{i}", cap=1.5 * COST) for i in range(8)])  # type: ignore[misc]
    assert results.count(None) == 1
    assert all(isinstance(error, BudgetExceeded) for error in results if error is not None)
    assert kinds(ledger_at(tmp_path)) == ["PLAN"]


@pytest.mark.usefixtures("slow_reading")
def test_of_racing_extra_reservations_one_wins(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", cap=PLAN.epsilon(8))
    for number in (1, 2, 3):
        reserve(ledger, "run-1", number)
    others = [ledger_at(tmp_path) for _ in range(6)]
    results = race([lambda other=other: reserve(other, "run-1", 3) for other in others])  # type: ignore[misc]
    assert results.count(None) == 1
    assert ledger.spent_in_run("run-1").steps == 8


@pytest.mark.usefixtures("slow_reading")
def test_ledgers_opened_at_once_are_one_ledger(tmp_path: Path) -> None:
    names: list[str] = []
    assert race([lambda: names.append(ledger_at(tmp_path).data_set_commitment("notes"))] * 6) == [None] * 6
    assert len(names) == 6
    assert len(set(names)) == 1


PROCESS = """
import os, signal, sys
from pathlib import Path
from fractions import Fraction
from fedcollm_privacy import cross_checks
from fedcollm_privacy.errors import BudgetExceeded
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.plan import DpPlan
cross_checks.MAX_PRV_CELLS = 0  # it would load torch, for seconds, and plays no part here
plan = DpPlan(unit="record", max_records_per_unit=1, max_grad_norm=1.0, noise_multiplier=2.0,
              sample_rate=Fraction(1, 10), expected_batch_size=10, steps_per_round=2, rounds=3, delta=1e-5)
ledger = Ledger(Path(sys.argv[1]), "north")
plan.epsilon(6)
if sys.argv[2] == "race":
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        ledger.commit_plan(run_id=sys.argv[3], data_set="notes", plan=plan,
                           cap_epsilon=1.5 * plan.epsilon(6), cap_delta=1e-3)
        print("won", flush=True)
    except BudgetExceeded:
        print("refused", flush=True)
else:
    ledger.commit_plan(run_id="run-1", data_set="notes", plan=plan, cap_epsilon=100.0, cap_delta=1e-3)
    ledger.reserve(run_id="run-1", plan=plan, server_round=1)
    if sys.argv[2] == "inside":  # the power goes between writing and committing
        real = ledger._append
        def die(*args):
            real(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        ledger._append = die
        ledger.reserve(run_id="run-1", plan=plan, server_round=2)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    path = str(folder / "ledgers" / "north.sqlite")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, path, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_of_two_processes_racing_for_the_last_budget_one_wins(tmp_path: Path) -> None:
    processes = [start(tmp_path, "race", f"run-{i}") for i in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert answers == ["refused", "won"]
    assert kinds(ledger_at(tmp_path)) == ["PLAN"]


@pytest.mark.parametrize("where", ["after", "inside"])
def test_a_process_killed_after_reserving_leaves_the_budget_spent(tmp_path: Path, where: str) -> None:
    process = start(tmp_path, where)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    ledger = ledger_at(tmp_path)
    assert kinds(ledger) == ["PLAN", "RESERVE"]  # a half-written third entry is gone, and so no step ran on it
    assert ledger.spent_in_run("run-1").steps == 2
    # The resumed run pays anew and may close what was left open.
    commit(ledger, "run-1")
    reserve(ledger, "run-1")
    assert ledger.spent_in_run("run-1").steps == 4
    ledger.settle(run_id="run-1", reservation=ledger.entries()[1]["digest"], outcome="failed")


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
    commit(ledger, "run-1", dataclasses.replace(PLAN, rounds=50_000), cap=1e4)
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
        "Ledger(Path(sys.argv[1]), 'north'); sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x.sqlite")], env=environment, check=True)


# ---------------------------------------------------------------- plans that may change


def test_an_adaptive_plan_is_charged_its_whole_target_and_lets_rounds_differ(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", ADAPTIVE, cap=2.0)
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
    assert verify_chain(ledger.entries()) == []


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
    commit(ledger, "run-1", ADAPTIVE, cap=2.0 + COST)
    with pytest.raises(BudgetExceeded):
        commit(ledger, "run-2", ADAPTIVE, cap=2.0 + COST)
    commit(ledger, "run-3", PLAN, cap=2.0 + COST)
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


# ---------------------------------------------------------------- who may read what


def test_a_data_set_is_committed_to_under_a_salt_of_the_ledger(tmp_path: Path) -> None:
    north, again, south = ledger_at(tmp_path), ledger_at(tmp_path), ledger_at(tmp_path, "south")
    name = north.data_set_commitment("notes")
    assert again.data_set_commitment("notes") == name
    assert south.data_set_commitment("notes") != name
    assert north.data_set_commitment("letters") != name
    # No guess of the name reproduces it without the salt.
    assert name != hashlib.sha256(b"notes").hexdigest()
    commit(north, "run-1")
    north.export(tmp_path / "export.jsonl")
    exported = (tmp_path / "export.jsonl").read_text()
    assert name in exported
    assert "notes" not in exported
    salt = (
        sqlite3.connect(tmp_path / "ledgers" / "north.sqlite")
        .execute("SELECT value FROM meta WHERE key = 'salt'")
        .fetchone()[0]
    )
    assert salt not in exported


def test_no_entry_holds_the_number_of_records(tmp_path: Path) -> None:
    plan = calibrate(
        target_epsilon=8.0,
        delta=1e-5,
        unit="record",
        max_records_per_unit=1,
        max_grad_norm=1.0,
        expected_batch_size=64,
        steps_per_round=2,
        rounds=2,
        units=1237,
    )
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", plan)
    reservation = reserve(ledger, "run-1", plan=plan)
    ledger.settle(run_id="run-1", reservation=reservation.entry, outcome="included")
    ledger.export(tmp_path / "export.jsonl")
    exported = (tmp_path / "export.jsonl").read_text()
    assert not re.search(r"(?<![\w.])1237(?![\w.])", exported)
    assert str(64 / 1237)[:8] not in exported
    assert '"sample_rate":"4/75"' in exported, "the nominal rate, 64/1200, is what may be read"


def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        ledger = ledger_at(tmp_path)
        commit(ledger, "run-1")
    finally:
        os.umask(old)
    for file in (tmp_path / "ledgers").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_ledger_of_another_site_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "north.sqlite"
    commit(Ledger(path, "north"), "run-1")
    with pytest.raises(LedgerError, match="of site 'north', not of 'south'"):
        Ledger(path, "south")
    with pytest.raises(InvalidValue, match="site"):
        Ledger(tmp_path / "x.sqlite", "../south")


# ---------------------------------------------------------------- altered and unusable files


def filled(folder: Path) -> Ledger:
    ledger = ledger_at(folder)
    commit(ledger, "run-1")
    commit(ledger, "run-2", NOISIER)
    for number in (1, 2):
        reservation = reserve(ledger, "run-1", number)
        ledger.settle(run_id="run-1", reservation=reservation.entry, outcome="included")
    return ledger


def sql(folder: Path, *statements: str) -> None:
    with sqlite3.connect(folder / "ledgers" / "north.sqlite") as db:
        for statement in statements:
            db.execute(statement)


ALTERED = {
    "a smaller epsilon": ["UPDATE entries SET body = json_set(body, '$.epsilon', 0.01) WHERE seq = 1"],
    "an epsilon that is no number": ['UPDATE entries SET body = replace(body, \'"epsilon":\', \'"epsilon":NaN,"x":\')'],
    "fewer steps": ["UPDATE entries SET body = json_set(body, '$.steps', 0) WHERE seq = 3"],
    "another outcome": ["UPDATE entries SET body = json_set(body, '$.outcome', 'lost') WHERE seq = 4"],
    "an added field": ["UPDATE entries SET body = json_set(body, '$.note', 'x') WHERE seq = 2"],
    "another data set": ["UPDATE entries SET body = json_set(body, '$.data_set', 'x') WHERE seq = 1"],
    "another digest": ["UPDATE entries SET digest = hex(randomblob(32)) WHERE seq = 3"],
    "a deleted first entry": ["DELETE FROM entries WHERE seq = 1"],
    "a deleted middle entry": ["DELETE FROM entries WHERE seq = 3"],
    "a deleted middle entry, renumbered": [
        "DELETE FROM entries WHERE seq = 3",
        "UPDATE entries SET seq = seq - 1 WHERE seq > 3",
    ],
    "two entries swapped": [
        "UPDATE entries SET seq = 99 WHERE seq = 3",
        "UPDATE entries SET seq = 3 WHERE seq = 4",
        "UPDATE entries SET seq = 4 WHERE seq = 99",
    ],
    "an inserted entry": ["INSERT INTO entries SELECT 7, body, 'x' FROM entries WHERE seq = 6"],
    "a body that is no JSON": ["UPDATE entries SET body = 'gone' WHERE seq = 2"],
    "a body that is no object": ["UPDATE entries SET body = '[1]' WHERE seq = 2"],
}


@pytest.mark.parametrize("change", ALTERED)
def test_an_altered_ledger_is_found_when_it_is_opened(tmp_path: Path, change: str) -> None:
    filled(tmp_path)
    sql(tmp_path, *ALTERED[change])
    with pytest.raises(LedgerError, match="altered"):
        ledger_at(tmp_path)


@pytest.mark.parametrize("change", [name for name in ALTERED if "body" not in name])
def test_an_altered_ledger_is_found_in_its_entries(tmp_path: Path, change: str) -> None:
    ledger = filled(tmp_path)
    assert verify_chain(ledger.entries()) == []
    sql(tmp_path, *ALTERED[change])
    assert verify_chain(ledger.entries())


def test_an_entry_with_a_fitting_digest_of_its_own_breaks_the_chain(tmp_path: Path) -> None:
    entries = filled(tmp_path).entries()
    entries[2]["steps"] = 1
    body = {key: value for key, value in entries[2].items() if key != "digest"}
    entries[2]["digest"] = hashlib.sha256(canonical_json(body)).hexdigest()
    assert verify_chain(entries) == ["entry 4: does not follow the entry before it"]


def test_what_the_chain_alone_cannot_show(tmp_path: Path) -> None:
    # As its docstring says: the end can be cut off. The head that is settled with every round is there for that.
    entries = filled(tmp_path).entries()
    assert verify_chain(entries[:-1]) == []
    assert verify_chain([]) == []


def test_the_export_is_canonical_and_verifies_on_its_own(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    ledger.export(tmp_path / "deep" / "export.jsonl")
    lines = (tmp_path / "deep" / "export.jsonl").read_bytes().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [canonical_json(entry) for entry in entries] == lines
    assert entries == ledger.entries()
    previous = "0" * 64
    for number, entry in enumerate(entries, start=1):
        digest = entry.pop("digest")
        assert entry["seq"] == number
        assert entry["previous"] == previous
        # The chain once more, with the standard library only.
        plain = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(plain.encode()).hexdigest() == digest
        previous = digest
    assert previous == ledger.head


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "north.sqlite"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="cannot be used as a ledger"):
        Ledger(path, "north")
    assert path.read_bytes() == content


def test_another_schema_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    sql(tmp_path, "UPDATE meta SET value = '2' WHERE key = 'schema'")
    with pytest.raises(LedgerError, match="schema 2"):
        ledger_at(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"privacy\.ledger_dir"):
        Ledger(tmp_path / "file" / "north.sqlite", "north")
    with pytest.raises(LedgerError, match=r"privacy\.ledger_dir"):
        Ledger(tmp_path, "north")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(LedgerError, match=r"privacy\.ledger_dir"):
            Ledger(tmp_path / "north.sqlite", "north")
    finally:
        tmp_path.chmod(0o700)


def connecting(monkeypatch: pytest.MonkeyPatch, setup: str, timeout: float) -> None:
    real = sqlite3.connect

    def connect(path: Path, **options: Any) -> sqlite3.Connection:
        connection = real(path, **(options | {"timeout": timeout}))
        connection.execute(setup)
        return connection

    monkeypatch.setattr("fedcollm_privacy.durable.sqlite3.connect", connect)


def test_a_full_disk_refuses_the_reservation_and_keeps_the_ledger_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = filled(tmp_path)
    before = ledger.entries()
    with monkeypatch.context() as patch:
        connecting(patch, "PRAGMA max_page_count = 1", 1.0)  # SQLite never goes below what is in use
        reserved = []
        with pytest.raises(LedgerError, match="full"):
            reserved.extend(reserve(ledger, "run-1", 3) for _ in range(100))
    after = ledger_at(tmp_path).entries()
    assert after[: len(before)] == before
    assert [entry["digest"] for entry in after[len(before) :]] == [reservation.entry for reservation in reserved]


def test_a_ledger_held_by_another_process_refuses_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = filled(tmp_path)
    holder = sqlite3.connect(tmp_path / "ledgers" / "north.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with monkeypatch.context() as patch:
        connecting(patch, "SELECT 1", 0.05)
        with pytest.raises(LedgerError, match="locked"):
            reserve(ledger, "run-1", 3)
    holder.close()
    reserve(ledger, "run-1", 3)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), True])
@pytest.mark.parametrize("field", ["cap_epsilon", "cap_delta"])
def test_a_cap_is_a_positive_number(tmp_path: Path, field: str, value: Any) -> None:
    ledger = ledger_at(tmp_path)
    with pytest.raises(InvalidValue, match=field):
        commit(ledger, "run-1", **{field: value})
    assert ledger.entries() == []


def test_names_and_rounds_are_checked(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    with pytest.raises(InvalidValue, match="run_id"):
        commit(ledger, "run 1\n")
    commit(ledger, "run-1")
    for number in (0, -1, True, 1.5):
        with pytest.raises(InvalidValue, match="server_round"):
            reserve(ledger, "run-1", number)  # type: ignore[arg-type]


def test_another_salt_is_noticed_because_it_would_make_every_data_set_new(tmp_path: Path) -> None:
    commit(ledger_at(tmp_path), "run-1")
    path = tmp_path / "ledgers" / "north.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = ? WHERE key = 'salt'", ("00" * 32,))
    db.close()
    with pytest.raises(LedgerError, match="salt"):
        ledger_at(tmp_path)


def test_a_ledger_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    ledger_at(tmp_path)
    path = tmp_path / "ledgers" / "north.sqlite"
    path.chmod(0o644)
    ledger_at(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
