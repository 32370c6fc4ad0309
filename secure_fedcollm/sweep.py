"""Running a sweep's cells: so many at a time as the machine holds, each in a process of its own.

A cell that fails or crashes is noted and the others go on. Whatever is killed, the same command goes on: finished cells
are left alone, a cell that was cut is resumed, one that failed is tried again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import ConfigError
from secure_fedcollm.sweep_cells import Cell, Outcome

__all__ = ["Tell", "cores", "fitting_jobs", "last_round", "run_cells", "sweep_lock"]

_PROGRAM = 1_000_000_000  # bytes: Python and torch without a model
_UNKNOWN_MODEL = 4_000_000_000
_PAUSE_S = 0.2
_LOCK_WAIT_S = 20.0
Tell = Callable[[Cell, Outcome], None]


@dataclass(slots=True, kw_only=True)
class _Running:
    """A cell's process; the one thing here that changes."""

    cell: Cell
    process: subprocess.Popen[bytes]
    since: float
    before: Outcome
    log_from: int
    peak_bytes: int = 0


@contextmanager
def sweep_lock(sweep_dir: Path, wait_s: float | None = None) -> Iterator[int]:
    """Hold a sweep's folder; cells that are given the lock's file number hold it too, for as long as they live.

    Args:
        sweep_dir: the folder.
        wait_s: for whoever holds it to let go; 20 seconds unless told otherwise.

    Raises:
        ConfigError: another sweep works there, or cells of a sweep that was killed did not end in that time.
    """
    sweep_dir.mkdir(parents=True, exist_ok=True)
    with (sweep_dir / ".lock").open("ab") as file:
        deadline = time.monotonic() + (_LOCK_WAIT_S if wait_s is None else wait_s)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        "sweep_dir", str(sweep_dir), "a folder that no other sweep is working in"
                    ) from error
                time.sleep(_PAUSE_S)
        yield file.fileno()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fitting_jobs(cells: Sequence[Cell]) -> int:
    """How many cells to run side by side: a core each, as memory allows; one on an accelerator.

    Memory is guessed from the checkpoints' files (four times their size, 4 GB for one that is not here, 1 GB for the
    program); while the sweep runs, what cells were seen to hold counts.
    """
    configs = [cell.config for cell in cells if cell.config is not None]
    if any(config["device"] != "cpu" for config in configs):
        return 1
    need = max((_guess(config["model"]["slm"]) + _guess(config["model"]["llm"]) for config in configs), default=0)
    room = psutil.virtual_memory().available // (_PROGRAM + need)
    return max(1, min(cores(), int(room), len(cells)))


def _guess(model: str | None) -> int:
    if model is None:
        return 0
    folder = Path(model).expanduser()
    files = [f for kind in ("*.safetensors", "*.bin") for f in folder.glob(kind)] if folder.is_dir() else []
    return 4 * sum(f.stat().st_size for f in files) if files else _UNKNOWN_MODEL


def run_cells(cells: Sequence[Cell], *, jobs: int, lock: int, tell: Tell) -> None:
    """Run every cell that is not finished; returns when all are finished or have failed.

    No cell is started, beside others, in less free memory than the largest one was seen to hold.

    Args:
        cells: all of the sweep, in the order in which they are begun.
        jobs: at most so many at a time; each gets its share of the cores.
        lock: from `sweep_lock`.
        tell: called whenever a cell's outcome changes.

    Raises:
        InvalidValue: ``jobs`` is below 1.
    """
    _validate.integer_at_least(1, jobs=jobs)
    waiting = [cell for cell in cells if cell.config is not None and not cell.finished]
    running: list[_Running] = []
    largest = max((cell.outcome.peak_bytes for cell in cells), default=0)
    try:
        while waiting or running:
            while waiting and len(running) < jobs and (not running or psutil.virtual_memory().available > largest):
                running.append(_start(waiting.pop(0), jobs, lock))
                tell(running[-1].cell, running[-1].cell.outcome)
            time.sleep(_PAUSE_S)
            for job in list(running):
                job.peak_bytes = max(job.peak_bytes, _held(job.process.pid))
                largest = max(largest, job.peak_bytes)
                if job.process.poll() is not None:
                    running.remove(job)
                    tell(job.cell, _end(job))
    finally:
        for job in running:
            if job.process.stdin is not None:
                job.process.stdin.close()  # the cell ends with that
        for job in running:
            job.process.wait()


def _start(cell: Cell, jobs: int, lock: int) -> _Running:
    before = cell.outcome
    if before.status == "failed" and not (cell.run / "checkpoint.safetensors").exists():
        shutil.rmtree(cell.run, ignore_errors=True)  # it may have been given up in its own ledgers
    if before.status == "running":
        before = replace(before, seconds=None)
    before = replace(before, status="running", reason="", attempts=before.attempts + 1)
    cell.note(before)
    threads = str(max(1, cores() // jobs))
    log = cell.folder / "log.txt"
    with log.open("ab") as output:
        log_from = output.tell()
        process = subprocess.Popen(  # noqa: S603 - our own module, no text from outside but a path
            [sys.executable, "-c", "import sys; from secure_fedcollm.sweep_child import main; main(sys.argv[1])",
             str(cell.folder.absolute())],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C is for the sweep, which then ends its cells
            env={**os.environ, "OMP_NUM_THREADS": threads, "COLUMNS": "2000", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    return _Running(cell=cell, process=process, since=time.monotonic(), before=before, log_from=log_from)


def _held(pid: int) -> int:
    try:
        parent = psutil.Process(pid)
        return sum(process.memory_info().rss for process in (parent, *parent.children(recursive=True)))
    except psutil.Error:  # it ended just now
        return 0


def _end(job: _Running) -> Outcome:
    code = job.process.returncode
    if job.process.stdin is not None:
        job.process.stdin.close()
    known = job.before.seconds
    ended = replace(
        job.before,
        seconds=None if known is None else round(known + time.monotonic() - job.since, 2),
        peak_bytes=max(job.before.peak_bytes, job.peak_bytes),
        status="finished" if job.cell.finished else "failed",
    )
    if not job.cell.finished:
        with (job.cell.folder / "log.txt").open("rb") as file:
            file.seek(job.log_from)
            ended = replace(ended, reason=_reason(code, file))
    job.cell.note(ended)
    return ended


def _reason(code: int, log: IO[bytes]) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        memory = "; most often memory ran out: lower jobs" if name == "SIGKILL" else ""
        return f"the run was ended by {name}{memory}"
    lines = [" ".join(line.split()) for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    ours = [line.removeprefix("fedcollm: ") for line in lines if line.startswith("fedcollm: ")]
    told = ours or lines
    return (told[-1] if told else f"the run ended with code {code} and said nothing")[:1000]


def last_round(cell: Cell) -> str:
    """How far a run has come, for people: its last whole line of metrics."""
    try:
        lines = (cell.run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        row = json.loads([line for line in lines if line.endswith(b"\n")][-1])
        return f"round {row['server_round']}: {row['outcome']}"
    except (OSError, ValueError, KeyError, IndexError):
        return "starting"
