"""A federation of processes over the real engine, from the ceremony to the audit. Slow: two minutes and more.

Server and four sites on loopback, mutual TLS, kits made by ``fedcollm deploy``. What is shown here is that the parts
fit; each of them has tests of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedcollm_privacy.refusals import read_refusals
from secure_fedcollm.cli import app

from .deployment import SERVER, Deployment
from .tiny_deployment import small_run, tiny_deployment

SITES = ("s00", "s01", "s02", "s03")
SEED = 11


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """All sites are up and wait; they allow seeded runs, for the one test that needs them."""
    # A socket's path is short, and pytest's folders are not.
    root = tmp_path_factory.getbasetemp().parent / f"d{os.getpid()}"
    with tiny_deployment(root, SITES, settings={"insecure_test_seed": SEED}) as deployment:
        deployment.ceremony()
        for site in SITES:
            deployment.start(site)
        for site in SITES:
            deployment.wait(lambda site=site: deployment.ready(site), 120, f"{site} is ready")
        yield deployment
        for site in SITES:
            assert deployment.stop(site) == 0
        assert deployment.descendants() == []


def served(deployment: Deployment, *overrides: str) -> Path:
    before = set((deployment.kit(SERVER) / "runs").glob("*"))
    deployment.start(SERVER, *small_run(deployment), *overrides)
    deployment.wait(deployment.ended, 300, "the run's end")
    assert deployment.processes.pop(SERVER).returncode == 0, deployment.tails()
    (folder,) = set((deployment.kit(SERVER) / "runs").glob("*")) - before
    return folder


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["server_round"]]


def adapters_of(folder: Path) -> list[tuple[str, str]]:
    events = map(json.loads, (folder / "transcript.jsonl").read_text().splitlines())
    return [(event["slm"], event["llm"]) for event in events if event["event"] == "opened"]


def test_two_rounds_over_the_engine_equal_the_run_in_one_process_digest_for_digest(
    federation: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded = f"privacy.insecure_test_seed={SEED}"
    deployed = served(federation, seeded)
    together = federation.root / "together.jsonl"
    together.write_text("".join(federation.notes[site].read_text() for site in SITES))
    own = [o for o in small_run(federation) if not o.startswith("data=")]
    where = (f"data.path={together}", "data.partition=column", "data.site_field=site")
    embedded = federation.root / "embedded"
    monkeypatch.setenv("FEDCOLLM_HOME", str(federation.root / "home"))
    words = ["run", "data=file", *own, *where, seeded, f"output_dir={embedded}", "--quiet"]
    CliRunner().invoke(app, words, catch_exceptions=False)
    assert [row["cohort"] for row in rounds_of(deployed)] == [list(SITES)] * 2
    assert len(adapters_of(deployed)) == 2
    assert adapters_of(deployed) == adapters_of(embedded)


def test_what_a_deployed_run_leaves_passes_the_audit_and_a_site_that_says_no_stops_nobody(
    federation: Deployment,
) -> None:
    federation.command("site", "--kit", str(federation.kit("s03")), "pause")
    folder = served(federation)
    federation.command("site", "--kit", str(federation.kit("s03")), "resume")
    rounds = rounds_of(folder)
    assert [(row["outcome"], row["cohort"]) for row in rounds] == [("opened", ["s00", "s01", "s02"])] * 2
    # The site's own log says why; the server heard a word.
    refused = read_refusals(federation.kit("s03") / "state" / "refusals.jsonl")
    assert {"paused"} <= {entry["rule"] for entry in refused} <= {"paused", "protocol"}  # nor has it this run's ledger
    said = "".join(path.read_text() for path in (federation.kit(SERVER) / "state" / "logs").glob("*"))
    assert "paused" not in said
    status = federation.status(SERVER)
    assert (status["state"], status["opened"], status["lost"]) == ("finished", 2, 0)

    words = [str(Path(sys.executable).with_name("fedcollm-audit")), str(folder)]
    for site in SITES[:3]:
        export = federation.root / f"{site}.jsonl"
        federation.command("ledger", "export", str(federation.kit(site) / "state" / "ledger.sqlite"), str(export))
        words += ["--ledger", str(export)]
    words += ["--governance", str(federation.root / "coordinator" / "ceremony" / "governance.pub")]
    audit = subprocess.run([*words, "--skip", "empirical", "--skip", "leakage"], capture_output=True, text=True)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    verdicts = {check["name"]: check["status"] for check in json.loads((folder / "audit.json").read_text())["checks"]}
    assert {"openings", "ledger-heads", "statement-signed", "epsilon-recomputed"} <= {
        name for name, verdict in verdicts.items() if verdict == "pass"
    }
