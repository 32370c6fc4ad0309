"""MedQuAD by institute: methods x privacy, one `fedcollm run` each, and the table they give.

    python benchmarks/medquad.py --data medquad.jsonl --slm <folder> --llm <folder> [--jobs 2]

Runs already finished under --work are not run again. Writes benchmarks/results/medquad.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
METHODS = ("fedcollm", "fedavg_public", "fedavg", "standalone")
PRIVACY = {
    "non-private": ["experiment=medquad_non_private"],
    "ε = 8": ["experiment=medquad", "privacy.epsilon=8.0"],
    "ε = 3": ["experiment=medquad", "privacy.epsilon=3.0"],
}


def one_run(arguments: argparse.Namespace, method: str, privacy: str, seed: int) -> dict[str, Any]:
    """Run one cell in its own process; gives its summary and wall seconds."""
    folder = arguments.work / f"{method}-{privacy.replace('ε = ', 'epsilon-')}-{seed}"
    clock = folder / "wall_seconds"
    if not (folder / "report.html").exists():
        command = [
            *(sys.executable, "-c", "from secure_fedcollm.cli import main; main()", "run", "--quiet"),
            *PRIVACY[privacy],
            *(f"method={method}", f"seed={seed}", f"data.path={arguments.data}"),
            *(f"model.slm={arguments.slm}", f"model.llm={arguments.llm}", f"output_dir={folder}"),
            *arguments.overrides,
        ]
        threads = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
        start = time.monotonic()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
        clock.write_text(str(time.monotonic() - start))
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    summary["wall_seconds"] = float(clock.read_text())
    return summary


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: perplexities before and after, and the share of the non-private drop in log-perplexity kept."""
    drops = {(r["method"], r["seed"]): r["slm_drop"] for r in rows if r["privacy"] == "non-private"}
    lines = [
        "| method | privacy | SLM perplexity | LLM perplexity | kept of the non-private drop (SLM) | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        kept = row["slm_drop"] / drops[row["method"], row["seed"]]
        lines.append(
            f"| {row['method']} | {row['privacy']} | {row['slm'][0]:.2f} → {row['slm'][1]:.2f} | "
            f"{row['llm'][0]:.3f} → {row['llm'][1]:.3f} | {kept:.0%} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cells that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--data", "--slm", "--llm"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("outputs/medquad-benchmark"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("overrides", nargs="*", help="more settings, behind --")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    cells = [(method, privacy) for method in arguments.methods for privacy in PRIVACY]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        summaries = list(pool.map(lambda cell: one_run(arguments, *cell, arguments.seed), cells))
    rows = []
    for (_, privacy), summary in zip(cells, summaries, strict=True):
        before, after = summary["slm"]["before"], summary["slm"]["after"]
        rows.append(
            {
                "method": summary["method"],
                "privacy": privacy,
                "seed": arguments.seed,
                "slm": [before["perplexity"], after["perplexity"]],
                "llm": [summary["llm"]["before"]["perplexity"], summary["llm"]["after"]["perplexity"]],
                "slm_drop": before["loss"] - after["loss"],
                "epsilon": {site: row["epsilon"] for site, row in summary["sites"].items()},
                "seconds": summary["wall_seconds"],
            }
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "medquad.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    head = (
        "# MedQuAD, four institutes as sites\n\n"
        f"One seed ({arguments.seed}), {arguments.jobs} runs side by side: one run alone is faster. "
        "Perplexity on held-out records of all sites.\n\n"
    )
    (RESULTS / "medquad.md").write_text(head + table(rows))
    sys.stdout.write(table(rows))


if __name__ == "__main__":
    main()
