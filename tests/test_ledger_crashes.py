"""Whatever kills or races a process, the ledger is whole and nothing that was spent is forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcollm_privacy.entries import charges, total, verify_chain
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.ledger_file import LedgerFile

from .ledger_process import KILLS_AT_ANY_MOMENT, SHORT
from .ledgers import PLAN, commit, key_of, kinds, ledger_at, path_in, reserve, settle, upto

ROOT = Path(__file__).parents[1]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ledger_process", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# ---------------------------------------------------------------- races


class Racers:
    """Two processes that set off together."""

    def __init__(self) -> None:
        self.processes = [start("race") for _ in range(2)]
        assert [self._answer(process) for process in self.processes] == ["ready", "ready"]

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    @staticmethod
    def _tell(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def run(self, what: str, path: Path) -> list[str]:
        for number, process in enumerate(self.processes):
            self._tell(process, f"{what} {path} run-{number + 1}")
        assert [self._answer(process) for process in self.processes] == ["set", "set"]
        for process in self.processes:
            self._tell(process, "go")
        return sorted(self._answer(process) for process in self.processes)

    def end(self) -> None:
        for process in self.processes:
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def racers() -> Iterator[Racers]:
    pair = Racers()
    yield pair
    pair.end()


@pytest.mark.parametrize("repetition", range(6))
def test_of_two_processes_racing_for_the_last_budget_of_a_data_set_one_wins(
    tmp_path: Path, racers: Racers, repetition: int
) -> None:
    assert racers.run("commit", path_in(tmp_path)) == ["refused", "won"]
    ledger = ledger_at(tmp_path)
    assert kinds(ledger) == ["PLAN"]
    assert ledger.spent_on("notes").epsilon == PLAN.epsilon(6)


@pytest.mark.parametrize("repetition", range(4))
def test_of_two_processes_racing_for_the_last_steps_beyond_the_plan_one_wins(
    tmp_path: Path, racers: Racers, repetition: int
) -> None:
    ledger = ledger_at(tmp_path)
    commit(ledger, "run-1", caps=upto(PLAN.epsilon(8)))
    for number in (1, 2, 3):
        reserve(ledger, "run-1", number)
    assert racers.run("reserve", path_in(tmp_path)) == ["refused", "won"]
    assert ledger.spent_in_run("run-1").steps == 8
    assert verify_chain(ledger.entries(), ledger.file.identity) == []


# ---------------------------------------------------------------- kill -9

COMMON = ("kind", "run_id", "epsilon", "delta", "steps", "steps_so_far", "outcome", "server_round", "plan_digest")


def essence(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two ledgers with other salts and clocks have in common."""
    return [{name: entry[name] for name in COMMON if name in entry} for entry in entries]


def spent(entries: list[dict[str, Any]]) -> float:
    """Recomputed: per run its latest PLAN or RESERVE, none for a run given up before it reserved anything."""
    latest: dict[str, float] = {}
    for entry in entries:
        if entry["kind"] in ("PLAN", "RESERVE"):
            latest[entry["run_id"]] = entry["epsilon"]
        if entry["kind"] == "ABORT" and not any(
            e["kind"] == "RESERVE" and e["run_id"] == entry["run_id"] for e in entries
        ):
            latest[entry["run_id"]] = 0.0
    return sum(latest.values())


@pytest.fixture(scope="module")
def wreckage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a killed process: before each SQL statement of a history, and at moments in between."""
    folder = tmp_path_factory.mktemp("killed")
    process = start("crash", str(folder))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    folders = [path for path in folder.iterdir() if path.name.startswith("at-")]
    assert len(folders) == int(output) > 60
    return folder


def wrecks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith(("at-", "moment-")))


def progress(wreck: Path) -> tuple[int, int]:
    """The last operation that the killed process reported as done, and the last that it had begun; -1 for none."""
    log = (wreck / "log").read_text().split("\n")[:-1] if (wreck / "log").exists() else []
    last = {"begin": -1, "done": -1}
    for line in log:
        word, number = line.split()
        last[word] = int(number)
    return last["done"], last["begin"]


def test_the_history_is_whole_when_nobody_kills_it_and_its_killer_reaches_every_operation(wreckage: Path) -> None:
    states = json.loads((wreckage / "states.json").read_text())
    whole = LedgerFile(wreckage / "counted" / "north.sqlite")
    assert essence(whole.entries()) == essence(states[-1])
    assert {entry["kind"] for entry in states[-1]} == {"PLAN", "RESERVE", "SETTLE", "ABORT", "STATEMENT"}
    begun = {progress(wreck)[1] for wreck in wrecks(wreckage) if wreck.name.startswith("at-")}
    assert begun == set(range(len(states)))
    assert all(progress(wreck)[0] == progress(wreck)[1] - 1 for wreck in wrecks(wreckage) if "at-" in wreck.name)
    assert sum(wreck.name.startswith("moment-") for wreck in wrecks(wreckage)) >= KILLS_AT_ANY_MOMENT - 3


def test_whenever_a_process_is_killed_each_operation_is_there_wholly_or_not_at_all(wreckage: Path) -> None:
    states = [[], *json.loads((wreckage / "states.json").read_text())]
    unfinished = 0
    for wreck in wrecks(wreckage):
        done, begun = progress(wreck)
        ledger = Ledger(wreck / "north.sqlite", key_of("north"))
        entries = ledger.entries()
        assert verify_chain(entries, key_of("north").public) == []
        allowed = [essence(states[done + 1]), essence(states[begun + 1])]
        assert essence(entries) in allowed, (wreck.name, done, begun, kinds(ledger))
        unfinished += essence(entries) == allowed[0] != allowed[1]
        # Never less than was reported, except by the refund in progress.
        charged = ledger.spent_on("notes").epsilon
        assert charged == pytest.approx(spent(entries))
        assert charged >= min(spent(states[done + 1]), spent(states[begun + 1])) - 1e-12
    assert unfinished > 10, "killing never interrupted anything"


def test_after_any_kill_the_history_goes_on(wreckage: Path) -> None:
    for wreck in wrecks(wreckage)[::3]:
        ledger = Ledger(wreck / "north.sqlite", key_of("north"))
        before = ledger.entries()
        commit(ledger, "run-1", SHORT)
        settle(ledger, "run-1", reserve(ledger, "run-1", 3, SHORT))
        entries = ledger.entries()
        settled = {e["reservation"] for e in entries if e["kind"] == "SETTLE"}
        opened = {e["digest"] for e in entries if e["kind"] == "RESERVE" and e["run_id"] == "run-1"}
        assert opened <= settled, "what the crash left open is closed"
        assert entries[: len(before)] == before
        assert total(charges(entries, ledger.file.commitment("notes")).values()).epsilon >= spent(before) - 1e-12
        again = LedgerFile(wreck / "north.sqlite")
        assert verify_chain(again.entries(), key_of("north").public) == []


def test_killing_finds_a_ledger_that_writes_an_operation_in_two_halves(wreckage: Path) -> None:
    states = [[], *json.loads((wreckage / "states.json").read_text())]
    broken = [path for path in wreckage.iterdir() if path.name.startswith("broken-")]
    halves = []
    for wreck in broken:
        done, begun = progress(wreck)
        entries = LedgerFile(wreck / "north.sqlite").entries()
        if essence(entries) not in (essence(states[done + 1]), essence(states[begun + 1])):
            halves.append(entries[-1]["kind"])
    assert set(halves) == {"SETTLE"}, "of a run given up, only the first of two entries"
