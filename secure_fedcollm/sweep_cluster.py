"""Running a sweep's cells as jobs: on a Slurm cluster, or on this machine to try that out. The home of submitit.

A job runs one cell exactly as `sweep.run_cells` does here, on whatever node it lands, and writes what became of it into
the cell's folder. So all that a cluster needs is the sweep's folder on a file system that every node sees, with file
locks. A cell has one job at a time: another one waits for its lock, and goes on from what that one left.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import ConfigError
from secure_fedcollm.sweep import Tell, run_cells, sweep_lock
from secure_fedcollm.sweep_cells import Cell, Outcome, put, read_cell

if TYPE_CHECKING:
    from submitit import Job

__all__ = ["CLUSTERS", "run_cell", "run_on_cluster"]

CLUSTERS: Final[Mapping[str, str]] = {"submitit_slurm": "slurm", "submitit_local": "local"}
_PAUSE_S = 0.5
_MINUTES = 24 * 60  # submitit's own default, five minutes, would cut most runs


def run_cell(folder: str) -> None:
    """What a job does: wait until no other job works on this cell, then run or continue it."""
    with sweep_lock(Path(folder), wait_s=math.inf) as lock:
        run_cells([read_cell(Path(folder) / "cell.json")], jobs=1, lock=lock, tell=lambda cell, outcome: None)


def run_on_cluster(
    cells: Sequence[Cell], *, jobs: int, sweep_dir: Path, launcher: str, resources: Mapping[str, Any], tell: Tell
) -> None:
    """Submit every cell that is not finished; returns when all are finished or have failed.

    Jobs end with this function, unless the process is killed: then they go on, and on Slurm the same command waits for
    those it finds. submitit keeps its files, among them a pickle of the cell's path for each job, in
    ``<sweep_dir>/jobs``, which is made for this user alone.

    Args:
        cells: all of the sweep, in the order in which they are submitted.
        jobs: at most so many are submitted at a time.
        sweep_dir: the sweep's folder.
        launcher: a key of `CLUSTERS`.
        resources: parameters of ``submitit.AutoExecutor``: timeout_min, cpus_per_task, slurm_partition and so on.
        tell: called whenever a cell's outcome changes.

    Raises:
        ConfigError: submitit is not installed, there is no such cluster here, or it does not know a resource.
        InvalidValue: ``jobs`` is below 1.
    """
    _validate.integer_at_least(1, jobs=jobs)
    _validate.one_of(tuple(CLUSTERS), launcher=launcher)
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("--launcher", launcher, "local, unless secure-fedcollm[cluster] is installed") from error
    folder = sweep_dir.absolute() / "jobs"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=CLUSTERS[launcher])
        executor.update_parameters(**{"timeout_min": _MINUTES, "name": "fedcollm-sweep", **resources})
    except (RuntimeError, NameError, ValueError, TypeError) as error:
        said = f"a cluster that is here, and its parameters: {' '.join(str(error).split())}"
        raise ConfigError("--launcher", f"{launcher} {dict(resources)}", said) from error
    waiting = [cell for cell in cells if cell.config is not None and not cell.finished]
    running: list[tuple[Cell, Job[None]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                job = _submitted_before(cell, launcher, folder)
                if job is None:
                    job = executor.submit(run_cell, str(cell.folder.absolute()))
                    put(cell.folder / "job.json", {"launcher": launcher, "job": job.job_id})
                running.append((cell, job))
                tell(cell, replace(cell.outcome, status="running"))
            time.sleep(_PAUSE_S)
            for cell, job in list(running):
                if job.done():
                    running.remove((cell, job))
                    tell(cell, _end(cell, job))
    finally:
        for _, job in running:
            job.cancel()


def _submitted_before(cell: Cell, launcher: str, folder: Path) -> Job[None] | None:
    """The cell's job of a sweep that was killed, if Slurm still has it; a local one cannot be found again."""
    try:
        noted = json.loads((cell.folder / "job.json").read_text(encoding="utf-8"))
        job_id = str(noted["job"])
    except (OSError, ValueError, KeyError):
        return None
    if noted["launcher"] != launcher or launcher != "submitit_slurm":
        return None
    from submitit import SlurmJob

    job: Job[None] = SlurmJob(folder=folder, job_id=job_id)
    return None if job.get_info(mode="force").get("State") not in ("PENDING", "RUNNING", "CONFIGURING") else job


def _end(cell: Cell, job: Job[None]) -> Outcome:
    outcome = cell.outcome
    if outcome.status in ("finished", "failed"):
        return outcome
    # The job ended before the cell could note it: cancelled, out of time or memory, or it never began.
    lines = [" ".join(line.split()) for line in (job.stderr() or "").splitlines() if line.strip()]
    reason = f"job {job.job_id} ended as {job.state}{f': {lines[-1][:800]}' if lines else ''}"
    ended = replace(outcome, status="failed", reason=reason, seconds=None)
    cell.note(ended)
    return ended
