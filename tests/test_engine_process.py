"""No process of an engine outlives the process that it works for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedcollm_privacy.errors import InvalidValue
from secure_fedcollm.engine_process import EngineProcess

ROOT = Path(__file__).parents[1]
SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    """FLARE with a kit that is none: it ends at once, each time it is started."""
    (tmp_path / "engine").mkdir()
    made = EngineProcess(
        side="site",
        engine=tmp_path / "engine",
        name="s00",
        org="example",
        socket=tmp_path / "s",
        state=tmp_path,
        log_bytes=1,
    )
    yield made
    made.stop()


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: str, **environment: str) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen(command, env=os.environ | environment, start_new_session=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def until(true: Callable[[], bool]) -> bool:
    for _ in range(600):
        if true():
            return True
        time.sleep(0.1)
    return False


def test_what_an_earlier_process_left_is_found_by_its_mark_and_ended_and_nothing_else(
    engine: EngineProcess, tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    mark = (tmp_path / "engine.id").read_text()
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
    left = [started(sys.executable, "-c", code, FEDCOLLM_ENGINE=mark) for code in (SLEEP, deaf)]
    other = started(sys.executable, "-c", SLEEP, FEDCOLLM_ENGINE="0" * 32)
    assert until(lambda: {process.pid for process in left} <= {process.pid for process in engine.processes()})
    engine.start()
    assert all(process.poll() is not None for process in left)
    engine.stop()
    assert engine.processes() == []
    assert other.poll() is None


def test_an_engine_that_ends_is_started_again_and_its_log_is_kept_short(engine: EngineProcess, tmp_path: Path) -> None:
    engine.start()
    log, older = tmp_path / "logs" / "engine.log", tmp_path / "logs" / "engine.log.1"
    assert until(lambda: older.exists() and older.stat().st_size > 0)
    seen: set[int] = set()

    def twice() -> bool:
        seen.update(process.pid for process in engine.processes())
        return len(seen) > 1

    assert until(twice)
    engine.stop()
    assert engine.processes() == []
    assert log.exists()


def test_two_engines_of_one_machine_have_marks_of_their_own(tmp_path: Path) -> None:
    marks = set()
    for name in ("a", "b", "a"):
        place = tmp_path / name
        EngineProcess(side="site", engine=place, name="s", org="o", socket=place / "s", state=place)
        marks.add((place / "engine.id").read_text())
    assert len(marks) == 2


def test_a_passphrase_in_our_environment_does_not_reach_the_engine(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDCOLLM_PASSPHRASE", "secret")
    again = EngineProcess(
        side="site", engine=tmp_path, name="s", org="o", socket=tmp_path / "t", state=tmp_path / "other"
    )
    again.start()
    found: list[dict[str, str]] = []

    def one() -> bool:
        for process in again.processes():
            with_it = process.environ() if process.is_running() else {}
            found.append(with_it)
        return bool(found)

    try:
        assert until(one)
    finally:
        again.stop()
    assert all("PATH" in environment for environment in found)
    assert not any("FEDCOLLM_PASSPHRASE" in environment for environment in found)


@pytest.mark.parametrize(("wrapped", "survives"), [(True, False), (False, True)])
def test_the_kernel_ends_the_engine_with_the_process_that_started_it(wrapped: bool, survives: bool) -> None:
    program = [sys.executable, "-c", SLEEP]
    module = [sys.executable, "-m", "secure_fedcollm.engine_child"]
    owner = f"""
import os, subprocess, sys, time
command = {module!r} + [str(os.getpid())] + {program!r} if {wrapped} else {program!r}
child = subprocess.Popen(command, start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "privacy")])
    process = subprocess.Popen(
        [sys.executable, "-c", owner], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}, cwd=ROOT
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    try:
        assert until(lambda: SLEEP in child.cmdline() and "engine_child" not in " ".join(child.cmdline()))
        process.kill()
        process.wait()
        if survives:
            assert child.is_running()
        else:
            assert until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    finally:
        process.stdout.close()
        if child.is_running():
            child.kill()


def test_a_child_whose_parent_is_gone_already_does_not_begin() -> None:
    command = [sys.executable, "-m", "secure_fedcollm.engine_child", "1", sys.executable, "-c", "print('begun')"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "privacy")])
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": paths}, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, b"")


def test_another_side_and_too_long_a_path_are_refused(tmp_path: Path) -> None:
    options = {"engine": tmp_path, "name": "s", "org": "o", "state": tmp_path}
    with pytest.raises(InvalidValue, match="side"):
        EngineProcess(side="admin", socket=tmp_path / "s", **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="107 bytes"):
        EngineProcess(side="site", socket=tmp_path / ("x" * 110), **options)  # type: ignore[arg-type]
