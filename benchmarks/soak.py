"""Many rounds with many sites on one machine: does memory stay flat, is anything left over? Writes results/soak.md.

Server and sites are processes with the real engine between them, tiny models. Memory, threads and open files of every
process are noted while the run goes on. 50 rounds with 8 sites take about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.deployment import SERVER, Deployment
from tests.tiny_deployment import small_run, tiny_deployment

RESULTS = Path(__file__).parent / "results"
KINDS = ("server", "site", "server_train", "client_train", "server job", "client job", "aggregator")


def kind_of(process: psutil.Process) -> str | None:
    line = " ".join(process.cmdline())
    marks = {"runner_process": "server job", "worker_process": "client job"}
    marks |= {"server_train": "server_train", "client_train": "client_train", "aggregator_process": "aggregator"}
    for mark, kind in marks.items():
        if mark in line:
            return kind
    words = process.cmdline()
    return next((kind for kind in ("server", "site") if kind in words[1:3]), None)


def sample(deployment: Deployment) -> dict[str, Any]:
    found: dict[str, list[tuple[int, int, int]]] = {}
    for process in deployment.descendants():
        with contextlib.suppress(psutil.Error):
            kind = kind_of(process)
            if kind is not None:
                row = (process.memory_info().rss, process.num_threads(), process.num_fds())
                found.setdefault(kind, []).append(row)
    status = deployment.status(SERVER)
    return {"round": status["opened"] + status["lost"], "at": time.time(), "kinds": found}


def measure(root: Path, sites: int, rounds: int) -> dict[str, Any]:
    names = tuple(f"s{index:02d}" for index in range(sites))
    samples = []
    with tiny_deployment(root, names) as deployment:
        deployment.ceremony()
        for site in names:
            deployment.start(site)
        for site in names:
            deployment.wait(lambda site=site: deployment.ready(site), 60 * sites, f"{site} is ready")
        deployment.start(
            SERVER,
            *small_run(deployment),
            f"federation.rounds={rounds}",
            "federation.local_steps=1",
            "distillation.steps=1",
            "privacy.epsilon=100.0",
            "evaluation.every=1000",
        )
        while not deployment.ended():
            with contextlib.suppress(OSError, ValueError, KeyError):
                samples.append(sample(deployment))
            time.sleep(2.0)
        code = deployment.processes.pop(SERVER).returncode
        folder = deployment.run_folder()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()][1:]
        seconds = [past["seconds"] for past in deployment.status(SERVER)["history"]]
        sizes = {site: _bytes(deployment.kit(site)) for site in names}
        codes = {site: deployment.stop(site) for site in names}
        left = len(deployment.descendants())
    return {
        "sites": sites,
        "rounds": rounds,
        "exit": code,
        "sites_exit": sorted(set(codes.values())),
        "opened": sum(row["outcome"] == "opened" for row in rows),
        "everybody": sum(len(row["cohort"]) == sites for row in rows),
        "round_seconds": seconds,
        "processes_left": left,
        "kit_bytes": statistics.median(sizes.values()),
        "samples": samples,
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(result: dict[str, Any]) -> str:
    """Median over a kind's processes, early and late."""
    rounds = result["rounds"]
    windows = {
        "early": (rounds // 10, rounds // 5),
        "middle": (rounds // 2, rounds * 3 // 5),
        "late": (rounds - 5, rounds),
    }
    lines = ["| process | " + " | ".join(f"{name} (rounds {a}-{b})" for name, (a, b) in windows.items()) + " |"]
    lines.append("|---" * (len(windows) + 1) + "|")
    for kind in KINDS:
        cells = []
        for low, high in windows.values():
            rows = [row for s in result["samples"] if low <= s["round"] <= high for row in s["kinds"].get(kind, [])]
            if not rows:
                cells.append("-")
                continue
            rss, threads, files = (statistics.median(row[i] for row in rows) for i in range(3))
            cells.append(f"{rss / 2**20:.0f} MB, {threads:.0f} threads, {files:.0f} files")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.sites, options.rounds)
    RESULTS.mkdir(exist_ok=True)
    name = "soak" if (options.sites, options.rounds) == (8, 50) else f"soak_{options.sites}x{options.rounds}"
    (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n")
    median = statistics.median(result["round_seconds"])
    text = f"""# {options.rounds} rounds with {options.sites} sites on one machine

Tiny models, loopback, real engine, two cores for all {2 * options.sites + options.sites + 4} processes. Medians over
the processes of a kind.

{table(result)}

{result["opened"]} of {options.rounds} rounds opened, {result["everybody"]} with all sites; a round took {median:.1f} s
(median). Server's exit code {result["exit"]}, the sites' {result["sites_exit"]}. Processes left over after all were
stopped: {result["processes_left"]}. A site's kit holds {result["kit_bytes"] / 2**20:.1f} MB afterwards.
"""
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
