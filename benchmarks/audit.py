"""How long an audit takes: the command from start to exit, on made-up run folders with real signatures.

    python benchmarks/audit.py            # writes benchmarks/results/audit.md and .json

Folders come from ``tests/run_folders.py``: entries, heads, plans and survivor sets are signed as a run signs them,
adapters are small and numbers made up. Every measurement is a process of its own, so nothing is remembered.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.run_folders import build

RESULTS = Path(__file__).parent / "results"
SIZES = ((10, 4), (100, 16))
REPEATS = 3
WHOLE = {
    "records": ["--skip", "empirical", "--skip", "leakage"],
    "records and attacks on the step": ["--skip", "leakage"],
}


def seconds(folder: Path, options: list[str], out: Path) -> float:
    """Wall clock of one audit; a made-up folder names no real code, so that one check may fail."""
    code = "from fedcollm_audits.cli import main; main()"
    begun = time.perf_counter()
    command = [sys.executable, "-c", code, str(folder), "--out", str(out), "--skip", "code-is-what-ran", *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode not in (0, 3):
        raise SystemExit(ended.stdout[-2000:] + ended.stderr[-2000:])
    return time.perf_counter() - begun


def main() -> None:
    rows: dict[str, dict[str, float]] = {name: {} for name in WHOLE}
    with TemporaryDirectory() as folder:
        for rounds, sites in SIZES:
            built = build(Path(folder) / f"{rounds}-{sites}", rounds=rounds, sites=sites)
            for name, options in WHOLE.items():
                taken = [seconds(built.folder, options, Path(folder) / "out") for _ in range(REPEATS)]
                rows[name][f"{rounds} rounds, {sites} sites"] = statistics.median(taken)
    columns = list(next(iter(rows.values())))
    lines = [
        "# How long an audit takes",
        "",
        f"Seconds from the command's start to its exit, medians of {REPEATS}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}; `benchmarks/audit.py` makes this table. Folders are made up, their signatures "
        "are real. Attacks on the released models need the records and are not made here.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
        *(f"| {name} | " + " | ".join(f"{row[column]:.1f}" for column in columns) + " |" for name, row in rows.items()),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "audit.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "audit.json").write_text(json.dumps(rows, indent=2) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
