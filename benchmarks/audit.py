"""How long an audit takes, and how it grows: made-up run folders with real signatures, and the attacks on the step.

    python benchmarks/audit.py            # writes benchmarks/results/audit.md and .json

Folders come from ``tests/run_folders.py``: entries, heads, plans and survivor sets are signed as a run signs them,
adapters are small and numbers made up. Seconds of wall clock in one process, libraries loaded beforehand.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedcollm_audits import evidence
from fedcollm_audits.audit import CHECKS
from tests.run_folders import build

RESULTS = Path(__file__).parent / "results"
SIZES = ((10, 4), (100, 16))
REPEATS = 3
ASKED = [check for check in CHECKS if check.group != "leakage"]  # made-up folders have no records to attack with


def audit(folder: Path) -> dict[str, float]:
    """Seconds to read the folder, and for each check."""
    begun = time.perf_counter()
    read = evidence.read(folder)
    seconds = {"read": time.perf_counter() - begun}
    for check in ASKED:
        begun = time.perf_counter()
        found = check.run(read)
        seconds[check.name] = time.perf_counter() - begun
        if found.status == "fail" and check.name != "code-is-what-ran":  # made-up folders name no real code
            raise SystemExit(f"{check.name} failed on a clean folder: {found.evidence[0]}")
    return seconds


def main() -> None:
    rows = {}
    with TemporaryDirectory() as folder:
        audit(build(Path(folder) / "warm", rounds=2, sites=3).folder)
        for rounds, sites in SIZES:
            built = build(Path(folder) / f"{rounds}-{sites}", rounds=rounds, sites=sites)
            taken = [audit(built.folder) for _ in range(REPEATS)]
            rows[f"{rounds} rounds, {sites} sites"] = {
                name: statistics.median(one[name] for one in taken) for name in taken[0]
            }
    columns = list(rows)
    lines = [
        "# How long an audit takes",
        "",
        f"Medians of {REPEATS}, seconds, {os.cpu_count()} cores, Python {platform.python_version()}; "
        "`benchmarks/audit.py` makes this table. Folders are made up, their signatures are real. The attacks on the "
        "step do not grow with the run; the two checks of leakage need the records and are not made here.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    groups = {"reading": ["read"]}
    for check in ASKED:
        groups.setdefault(check.group, []).append(check.name)
    for group, names in groups.items():
        cells = [f"{sum(rows[column][name] for name in names):.1f}" for column in columns]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    lines.append("| **all** | " + " | ".join(f"**{sum(rows[column].values()):.1f}**" for column in columns) + " |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "audit.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "audit.json").write_text(json.dumps(rows, indent=2) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
