"""What DP costs on MedQuAD: adapter aggregation x epsilon x seed, and local against distributed noise.

    python benchmarks/dp_loss.py --data medquad.jsonl --slm <folder> --llm <folder> [--jobs 2]

FedAvg throughout: with FedCoLLM the public set D_a carries most of the result and would hide what is compared.
Runs already finished under --work are not run again. Writes benchmarks/results/dp_loss.{md,json,svg}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COMMON = ["method=fedavg", "evaluation.every=1000", "evaluation.generations=0"]
ROUNDS = {
    "local noise, 6 rounds x 8 steps, rebase": ["experiment=medquad", "adapter.aggregation=rebase"],
    "local noise, 6 rounds x 8 steps, freeze_a": ["experiment=medquad", "adapter.aggregation=freeze_a"],
    "local noise, 6 rounds x 8 steps, factor_average": ["experiment=medquad", "adapter.aggregation=factor_average"],
    "local noise, 48 rounds x 1 gradient": ["experiment=medquad_distributed", "privacy.noise=local"],
    "distributed noise, 48 rounds x 1 gradient": ["experiment=medquad_distributed"],
}
EPSILONS = (None, 8.0, 3.0, 1.0)


def settings(setting: str, epsilon: float | None) -> list[str]:
    chosen = ROUNDS[setting]
    if epsilon is None:
        return ["experiment=medquad_non_private", *chosen[1:]]
    return [*chosen, f"privacy.epsilon={epsilon}"]


def one_run(arguments: argparse.Namespace, setting: str, epsilon: float | None, seed: int) -> dict[str, Any]:
    """Run one cell in its own process; gives its losses and wall seconds."""
    name = "".join(c if c.isalnum() else "-" for c in setting)
    folder = arguments.work / f"{name}-epsilon-{epsilon}-seed-{seed}"
    clock = folder / "wall_seconds"
    if not clock.exists():
        command = [
            *(sys.executable, "-c", "from secure_fedcollm.cli import main; main()", "run", "--quiet"),
            *settings(setting, epsilon),
            *COMMON,
            *(f"seed={seed}", f"data.path={arguments.data}"),
            *(f"model.slm={arguments.slm}", f"model.llm={arguments.llm}", f"output_dir={folder}"),
        ]
        start = time.monotonic()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        clock.write_text(str(time.monotonic() - start))
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "setting": setting,
        "epsilon": epsilon,
        "seed": seed,
        "before": summary["slm"]["before"]["loss"],
        "after": summary["slm"]["after"]["loss"],
        "seconds": float(clock.read_text()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: held-out loss of the SLM, median and range over the seeds."""
    seeds = sorted({row["seed"] for row in rows})
    lines = ["| setting | " + " | ".join("no DP" if e is None else f"ε = {e:g}" for e in EPSILONS) + " |"]
    lines.append("|---" * (len(EPSILONS) + 1) + "|")
    for setting in ROUNDS:
        cells = []
        for epsilon in EPSILONS:
            found = sorted(r["after"] for r in rows if (r["setting"], r["epsilon"]) == (setting, epsilon))
            cells.append(f"{statistics.median(found):.3f} ({found[0]:.3f}-{found[-1]:.3f})" if found else "-")
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    before = sorted({round(row["before"], 3) for row in rows})
    return f"Before training: {before}. Seeds {seeds}.\n\n" + "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss by epsilon, a line a setting: median over the seeds, bars from the best to the worst of them."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    private = [epsilon for epsilon in EPSILONS if epsilon is not None]
    for setting in ROUNDS:
        losses = [
            sorted(r["after"] for r in rows if (r["setting"], r["epsilon"]) == (setting, epsilon))
            for epsilon in private
        ]
        middles = [statistics.median(values) for values in losses]
        bars = [
            [m - v[0] for m, v in zip(middles, losses, strict=True)],
            [v[-1] - m for m, v in zip(middles, losses, strict=True)],
        ]
        style = "-" if setting.startswith("distributed") else "--"
        axes.errorbar(private, middles, yerr=bars, label=setting, marker="o", markersize=4, capsize=3, linestyle=style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(private, [f"ε = {epsilon:g}" for epsilon in private])
    axes.set_ylabel("held-out loss of the SLM, nats per token")
    axes.set_title("MedQuAD, FedAvg over four institutes", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Run the cells that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--data", "--slm", "--llm"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("outputs/dp-loss-benchmark"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    cells = [(s, e, seed) for seed in range(arguments.seeds) for e in EPSILONS for s in ROUNDS]
    # Gradients are released with noise only.
    cells = [(s, e, seed) for s, e, seed in cells if e is not None or "gradient" not in s]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda cell: one_run(arguments, *cell), cells))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "dp_loss.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    text = "# The price of DP on MedQuAD, FedAvg over four institutes\n\nHeld-out loss of the SLM, nats per token. "
    text += table(rows) + "\n![Loss by epsilon](dp_loss.svg)\n"
    (RESULTS / "dp_loss.md").write_text(text)
    plot(rows, RESULTS / "dp_loss.svg")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
