"""SIGKILL for every party in every phase of a round, in a real deployment on loopback; writes results/kill_matrix.md.

Four sites, k = 3, one colluder tolerated (t = 3), tiny models, a server and sites as processes with the engine between
them. One death a round; whoever was killed is started again after two seconds, as systemd would. At the end
``fedcollm-audit`` looks at what the server and the sites left. Takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedcollm_privacy.ledger_file import LedgerFile
from tests.deaths import PHASES, VICTIMS
from tests.deployment import SERVER, Deployment
from tests.tiny_deployment import small_run, tiny_deployment

RESULTS = Path(__file__).parent / "results"
SITES = ("s00", "s01", "s02", "s03")
VICTIM_SITE = "s02"


def schedule_of(deployment: Deployment) -> list[dict[str, Any]]:
    deaths = []
    for phase in PHASES:
        for victim in VICTIMS:
            party = SERVER if victim.startswith("server") else VICTIM_SITE
            deaths.append(
                {
                    "round": 2 + len(deaths),
                    "phase": phase,
                    "victim": victim,
                    "kit": str(deployment.kit(party)),
                    "probe": list(SITES),
                }
            )
    return deaths


def measure(root: Path, phases: tuple[str, ...]) -> tuple[list[dict[str, Any]], str]:
    with tiny_deployment(root, SITES) as deployment:
        deployment.ceremony()
        deaths = [death for death in schedule_of(deployment) if death["phase"] in phases]
        for index, death in enumerate(deaths):
            death["round"] = 2 + index
        schedule = root / "schedule.json"
        schedule.write_text(json.dumps(deaths))
        for site in SITES:
            deployment.start(site)
        deployment.supervise()
        deployment.start_dying_server(
            schedule,
            *small_run(deployment),
            f"federation.rounds={len(deaths) + 2}",
            "privacy.epsilon=100.0",
            "evaluation.every=1000",
        )
        deployment.wait(deployment.ended, 120 * (len(deaths) + 2), "the run's end")
        folder = deployment.run_folder()
        rows = {row["server_round"]: row for row in map(json.loads, (folder / "metrics.jsonl").open())}
        results = []
        for index, death in enumerate(deaths):
            row, fired = rows[death["round"]], schedule.with_suffix(f".{index}")
            results.append(
                {
                    **{key: death[key] for key in ("round", "phase", "victim")},
                    "fired": fired.exists(),
                    "killed": json.loads(fired.read_text()).get("killed", ["itself"]) if fired.exists() else [],
                    "outcome": row["outcome"],
                    "attempt": row["attempt"],
                    "cohort": row["cohort"],
                    "left_out": row["left_out"],
                    "seconds": _seconds(deployment, death["round"]),
                }
            )
        verdict = audited(deployment, folder)
    return results, verdict


def _seconds(deployment: Deployment, server_round: int) -> float | None:
    """How long the round took, as the server's status has it; a run that was begun again counts from there."""
    history = {past["server_round"]: past for past in deployment.status(SERVER)["history"]}
    return history[server_round]["seconds"] if server_round in history else None


def audited(deployment: Deployment, folder: Path) -> str:
    """What the auditor says of the records, given the ledgers that the sites hand over."""
    words = [str(Path(sys.executable).with_name("fedcollm-audit")), str(folder)]
    for site in deployment.sites:
        export = deployment.root / f"{site}.jsonl"
        LedgerFile(deployment.kit(site) / "state" / "ledger.sqlite").export(export)
        words += ["--ledger", str(export)]
    words += ["--governance", str(deployment.root / "coordinator" / "ceremony" / "governance.pub")]
    words += ["--skip", "empirical", "--skip", "leakage"]
    done = subprocess.run(words, capture_output=True, text=True)
    return f"exit {done.returncode}\n{done.stdout}{done.stderr}"


def outcome_of(result: dict[str, Any]) -> str:
    if not result["fired"] or not result["killed"]:
        return "NOT KILLED"
    took = "" if result["seconds"] is None else f", {result['seconds']:.0f} s"
    if result["outcome"] != "opened":
        return f"round lost, run goes on{took}"
    if result["attempt"] > 1:
        return f"continues: taken up again{took}"  # run anew, or concluded with the sum that was open
    if result["left_out"]:
        return f"continues without {', '.join(sorted(result['left_out']))}{took}"
    return f"continues, nobody left out{took}"


def table(results: list[dict[str, Any]]) -> str:
    cells = {(result["victim"], result["phase"]): outcome_of(result) for result in results}
    phases = [phase for phase in PHASES if any(key[1] == phase for key in cells)]
    lines = ["| killed in | " + " | ".join(VICTIMS) + " |", "|---" * (len(VICTIMS) + 1) + "|"]
    for phase in phases:
        lines.append(f"| {phase} | " + " | ".join(cells.get((victim, phase), "") for victim in VICTIMS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phases", nargs="*", default=list(PHASES), choices=PHASES)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results, verdict = measure(Path(folder), tuple(options.phases))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kill_matrix.json").write_text(json.dumps({"results": results, "audit": verdict}, indent=2) + "\n")
    said = [line for line in verdict.splitlines() if line.startswith(("exit", "Yes", "No", "Nothing"))]
    text = f"""# SIGKILL in every phase of a round

Four sites, k = 3, t = 3, tiny models, loopback, real engine; one death a round, in {VICTIM_SITE}'s kit or the server's;
whoever was killed is started again after 2 s. `parent` and `job` are the engine's two processes at a party. Seconds
are those of the whole round, one run on a machine with other work. A round that is taken up again is run anew, or,
where its sum was open already, concluded with it. {len(results)} deaths in {time.monotonic() - started:.0f} s.

{table(results)}

`fedcollm-audit` on what server and sites left, attacks left out: {said[0] if said else "no verdict"}. Every reservation
is in the ledgers and counted, whether its round was opened, lost or run again.
"""
    (RESULTS / "kill_matrix.md").write_text(text)
    print(text, verdict, sep="\n")


if __name__ == "__main__":
    main()
