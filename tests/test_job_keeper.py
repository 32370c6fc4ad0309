"""One job runs at the engine's server, whatever ends; an engine of jobs stands in for FLARE's server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from secure_fedcollm import job_keeper
from secure_fedcollm.job_keeper import JobKeeper
from secure_fedcollm.local_socket import LocalServer


class Engine:
    """Jobs by id with their status; a relay that answers for one of them and reaches some sites."""

    def __init__(self) -> None:
        self.statuses: dict[str, str] = {}
        self.named: dict[str, list[str]] = {}
        self.heard = dict.fromkeys(("a", "b"), 0.0)
        self.relay = ""
        self.reached = {"a", "b"}
        self.away = False
        self.aborted: list[str] = []

    def connected(self) -> dict[str, float]:
        if self.away:
            raise ConnectionError("no server")
        return dict(self.heard)

    def unfinished(self) -> list[str]:
        return [job for job, status in self.statuses.items() if not status.startswith("FINISHED")]

    def running(self) -> frozenset[str]:
        return frozenset(self.relay.split())

    def status(self, job: str) -> str:
        return self.statuses[job]

    def submit(self, sites: Iterable[str]) -> str:
        job = f"job{len(self.statuses)}"
        self.statuses[job], self.relay, self.named[job] = "RUNNING", job, list(sites)
        return job

    def abort(self, job: str) -> None:
        self.aborted.append(job)
        self.statuses[job] = "FINISHED:ABORTED"

    def close(self) -> None:
        self.relay = ""

    def answer(self, fields: dict[str, Any]) -> dict[str, Any]:
        if "site" in fields:
            return {"word": "here" if fields["site"] in self.reached else "away"}
        return {"word": "here", "job": self.relay}


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(job_keeper, "time", clock)
    return clock


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def look(engine: Engine, clock: Clock, tmp_path: Path) -> Iterator[Callable[[float], JobKeeper]]:
    """Let so many seconds go by, in which sites are heard of unless ``quiet``; then look once."""
    relay = LocalServer(tmp_path / "s", engine.answer)
    keeper = JobKeeper(engine, ("a", "b"), tmp_path / "s")

    def after(seconds: float = 1.0, quiet: str = "") -> JobKeeper:
        clock.now += seconds
        engine.heard.update({site: clock.now for site in engine.heard if site not in quiet})
        keeper.look()
        return keeper

    yield after
    keeper.close()
    relay.close()


def test_one_job_is_begun_at_the_roster_sites_and_no_other(engine: Engine, look: Any) -> None:
    engine.heard["stranger"] = 0.0
    for _ in range(5):
        look()
    assert engine.named == {"job0": ["a", "b"]}
    assert look().reachable == {"a", "b"}


def test_a_first_job_waits_for_sites_that_are_still_connecting_and_not_for_ever(engine: Engine, look: Any) -> None:
    for _ in range(3):
        look(quiet="b")
    assert engine.named == {}
    look(quiet="b")
    assert engine.named == {"job0": ["a"]}


def test_no_job_is_begun_while_no_site_is_connected(engine: Engine, look: Any) -> None:
    for _ in range(10):
        look(quiet="ab")
    assert engine.named == {}


@pytest.mark.parametrize("status", ["FINISHED:EXECUTION_EXCEPTION", "FINISHED:COMPLETED", "FINISHED:ABORTED"])
def test_a_job_that_ended_is_followed_by_another(engine: Engine, look: Any, status: str) -> None:
    look()
    look(30.0)
    engine.statuses["job0"], engine.relay = status, ""
    look()
    look()
    assert list(engine.named) == ["job0", "job1"]


def test_a_job_that_is_listed_as_running_and_has_no_process_is_followed_by_another(engine: Engine, look: Any) -> None:
    look()
    look(30.0)
    engine.relay = ""  # as after the server was killed
    look()
    assert look().reachable == frozenset()
    look()
    look()
    assert list(engine.named) == ["job0", "job1"]
    assert engine.aborted == ["job0"]


def test_a_relay_that_is_silent_for_long_is_replaced_and_for_short_is_not(engine: Engine, look: Any) -> None:
    look()
    engine.relay = "job0 another"  # it runs, and somebody else answers
    look(29.0)
    look(0.5)
    assert list(engine.named) == ["job0"]
    look(1.0)
    look()
    assert list(engine.named) == ["job0", "job1"]


def test_a_site_that_came_back_gets_another_job_and_the_old_one_ends_only_when_the_new_relay_answers(
    engine: Engine, look: Any
) -> None:
    look()
    look(10.0)
    engine.reached = {"a"}
    for _ in range(20):  # away, and not heard of
        look(quiet="b")
    assert list(engine.named) == ["job0"]
    look(30.0)  # back
    look()
    assert list(engine.named) == ["job0", "job1"]
    assert engine.aborted == []
    engine.reached = {"a", "b"}
    look()
    assert engine.aborted == ["job0"]
    assert look().reachable == {"a", "b"}


def test_a_site_whose_relay_never_comes_up_does_not_make_jobs_flap(engine: Engine, look: Any) -> None:
    engine.reached = {"a"}
    for _ in range(3600):
        look()
    assert 3 <= len(engine.named) <= 18  # at most one in five minutes, in the end


def test_jobs_that_fail_at_once_are_followed_by_longer_and_longer_pauses(engine: Engine, look: Any) -> None:
    for _ in range(3600):
        look()
        for job in engine.unfinished():
            engine.statuses[job], engine.relay = "FINISHED:EXECUTION_EXCEPTION", ""
    assert 5 <= len(engine.named) <= 25


def test_what_an_earlier_process_left_running_is_ended(engine: Engine, look: Any) -> None:
    engine.statuses["old"] = "RUNNING"
    look()
    look()
    assert engine.aborted == ["old"]


def test_the_thread_outlives_every_error_of_the_engine_and_ends_its_job_when_closed(
    engine: Engine, tmp_path: Path
) -> None:
    engine.away = True
    relay = LocalServer(tmp_path / "s", engine.answer)
    keeper = JobKeeper(engine, ("a", "b"), tmp_path / "s", pause_s=0.01)
    keeper.start()
    time.sleep(0.1)
    engine.heard = dict.fromkeys(("a", "b"), time.time())
    engine.away = False
    for _ in range(600):
        if keeper.reachable == {"a", "b"}:
            break
        time.sleep(0.1)
    assert keeper.reachable == {"a", "b"}
    keeper.close()
    relay.close()
    assert engine.aborted == list(engine.named) == ["job0"]
