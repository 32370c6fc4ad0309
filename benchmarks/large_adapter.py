"""Real rounds over the engine with an adapter of 19 million parameters. Writes results/large_adapter.md.

Server and three sites are processes on loopback. The model has random weights: what is measured is everything around
it, and nothing here says what it learns. Five minutes and 12 GB on two cores.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from soak import KINDS, RESULTS, kind_of

from tests.deployment import SERVER, Deployment
from tests.tiny_checkpoints import save_tiny
from tests.tiny_deployment import small_run, write_site_notes

SITES = ("s00", "s01", "s02")
WIDTH, INNER, LAYERS, R = 512, 2048, 6, 512


def deployment_of(root: Path) -> Deployment:
    """Notes, public text and a pair of models whose adapters are large; the LLM's stays small."""
    root.mkdir(parents=True, exist_ok=True)
    notes = {name: write_site_notes(root / f"{name}.notes.jsonl", i, 40) for i, name in enumerate(SITES)}
    write_site_notes(root / "public.jsonl", len(SITES), 60, seed=1)
    shape = {"intermediate_size": INNER, "num_hidden_layers": LAYERS, "initializer_range": 0.02}
    slm = save_tiny(root / "slm", width=WIDTH, **shape)
    save_tiny(root / "llm", width=WIDTH, **(shape | {"num_hidden_layers": 1}))
    return Deployment(root=root, sites=SITES, notes=notes, model=slm)


def watch(deployment: Deployment, peaks: dict[str, int]) -> None:
    """The largest resident memory of any process of each kind so far."""
    for process in deployment.descendants():
        with contextlib.suppress(psutil.Error):
            kind = kind_of(process)
            if kind is not None:
                peaks[kind] = max(peaks.get(kind, 0), process.memory_info().rss)


def measure(root: Path) -> dict[str, Any]:
    idle: dict[str, int] = {}
    peaks: dict[str, int] = {}
    with deployment_of(root) as deployment:
        deployment.ceremony()
        for site in SITES:
            deployment.start(site)
        for site in SITES:
            deployment.wait(lambda site=site: deployment.ready(site), 300, f"{site} is ready")
        watch(deployment, idle)
        deployment.start(
            SERVER,
            *small_run(deployment),
            f"adapter.r={R}",
            f"adapter.lora_alpha={2 * R}",
            "adapter.target_modules=[all-linear]",
            "federation.local_steps=1",
            "distillation.steps=1",
            "evaluation.every=1000",
        )
        while not deployment.ended():
            watch(deployment, peaks)
            time.sleep(0.5)
        code = deployment.processes.pop(SERVER).returncode
        if code != 0:
            sys.stderr.write(deployment.tails())
        folder = deployment.run_folder()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()][1:]
        status = deployment.status(SERVER)
        spec = json.loads((folder / "transcript.jsonl").read_text().splitlines()[0])["spec"]["shared"]
        for site in SITES:
            deployment.stop(site)
        left = len(deployment.descendants())
    return {
        "exit": code,
        "outcomes": [(row["outcome"], row["cohort"]) for row in rows],
        "parameters": sum(shape[0] * shape[1] for shape in spec["shapes"]),
        "seconds": [past["seconds"] for past in status["history"]],
        "train_seconds": max(site["train_seconds"] for site in status["sites"]),
        "up": statistics.median(site["bytes_up"] for site in status["sites"]) / len(rows),
        "down": statistics.median(site["bytes_down"] for site in status["sites"]) / len(rows),
        "idle": idle,
        "peaks": peaks,
        "left": left,
    }


def page(found: dict[str, Any]) -> str:
    lines = ["| process | before the run | at most |", "|---|---|---|"]
    for kind in KINDS:
        if kind in found["peaks"]:
            before = f"{found['idle'][kind] / 2**20:.0f} MB" if kind in found["idle"] else "-"
            lines.append(f"| {kind} | {before} | {found['peaks'][kind] / 2**20:.0f} MB |")
    table = "\n".join(lines)
    opened = sum(outcome == "opened" and len(cohort) == len(SITES) for outcome, cohort in found["outcomes"])
    seconds = statistics.median(found["seconds"])
    return f"""# Rounds with {found["parameters"] / 1e6:.1f} million parameters over the engine

Server and {len(SITES)} sites on loopback, two cores for all, random weights ({LAYERS} layers of width {WIDTH}, rank {R}
on every linear layer), DP-SGD of one step a round, masks, CKKS, mutual TLS. The largest resident memory of any process
of a kind:

{table}

{opened} of {len(found["outcomes"])} rounds opened with everybody; a round took {seconds:.0f} s, of which the server
waited {found["train_seconds"]:.0f} s for a site to train, encrypt and mask. A site sent {found["up"] / 2**20:.0f} MB a
round and received {found["down"] / 2**20:.0f} MB. Server's exit code {found["exit"]}; processes left over afterwards:
{found["left"]}.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    text = page(found)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "large_adapter.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
