"""A run that is killed goes on: same files at the end, every training on budget that was reserved for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedcollm_audits import evidence as audit_evidence
from fedcollm_audits.audit import CHECKS
from fedcollm_privacy.dsse import Envelope
from fedcollm_privacy.entries import verify_chain
from fedcollm_privacy.errors import ConfigError, LedgerError
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.statement_messages import Endorsement, StatementOffer
from secure_fedcollm.cli import app
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.models import base_digest_of
from secure_fedcollm.site import Site

from .site_policies import write_policies
from .test_run import SMALL, write_notes

ROUNDS = 3
RECORD_CHECKS = [check for check in CHECKS if check.group not in ("empirical", "leakage")]


def fedcollm(arguments: list[str], home: Path) -> subprocess.Popen[bytes]:
    code = "from secure_fedcollm.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "FEDCOLLM_HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def entries_of(ledger: Path) -> list[dict[str, Any]]:
    """What the ledger holds; nothing while it is being made."""
    try:
        return LedgerFile(ledger).entries()
    except LedgerError:
        return []


@pytest.mark.parametrize(
    "moment",
    [
        "while a site trains",
        "after the sum was opened",
        pytest.param("after the round was settled", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_is_resumed_and_ends_with_the_same_files(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    notes = write_notes(tmp_path / "notes.jsonl", 3, 40)
    out, home = tmp_path / "out", tmp_path / "home"
    arguments = [
        "run",
        f"data.path={notes}",
        "data.partition=column",
        "data.site_field=site",
        f"model.slm={tiny_checkpoint('llama')}",
        f"model.llm={tiny_checkpoint('llama', width=64)}",
        f"output_dir={out}",
        *SMALL,
        "distillation.steps=2",
        f"federation.rounds={ROUNDS}",
    ]
    with monkeypatch.context() as here:
        here.setenv("FEDCOLLM_HOME", str(home))
        digest = base_digest_of(str(tiny_checkpoint("llama")), "float32")
        write_policies(home, ["s00", "s01", "s02"], notes, digest)
    process = fedcollm(arguments, home)
    ledger = home / "ledgers" / "s01.sqlite"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        entries = entries_of(ledger)
        last = entries[-1] if entries else {"kind": ""}
        if moment == "while a site trains" and last["kind"] == "RESERVE" and last["server_round"] == 2:
            break
        if moment == "after the sum was opened" and (out / "opened.safetensors").exists():
            break
        if moment == "after the round was settled" and last["kind"] == "SETTLE" and len(entries) >= 3:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (out / "summary.json").exists()

    monkeypatch.setenv("FEDCOLLM_HOME", str(home))
    resumed = CliRunner().invoke(app, ["run", f"resume={out}"])
    text = resumed.output
    assert resumed.exit_code == 0, text
    for name in ("summary.json", "statement.json", "report.html", "slm_adapter", "llm_adapter", "transcript.jsonl"):
        assert (out / name).exists(), name
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["server_round"] for row in rows] == list(range(ROUNDS + 1))
    opened = LedgerFile(ledger)
    entries = opened.entries()
    assert verify_chain(entries, opened.identity) == []
    assert sum(e["kind"] == "PLAN" for e in entries) == 1
    plans = [
        json.loads(x) for x in (out / "transcript.jsonl").read_text().splitlines() if json.loads(x)["event"] == "plan"
    ]
    reserved = [e for e in entries if e["kind"] == "RESERVE"]
    uploads = [
        json.loads(x)
        for x in (out / "transcript.jsonl").read_text().splitlines()
        if json.loads(x)["event"] == "upload" and json.loads(x)["site"] == "s01"
    ]
    assert len(reserved) >= len(uploads)  # never an upload that was not paid for
    assert len(plans) >= ROUNDS
    steps = json.loads((out / "summary.json").read_text())["sites"]["s01"]["steps"]
    assert steps == sum(e["steps"] for e in reserved)
    if moment == "while a site trains":
        assert len(reserved) == ROUNDS + 1  # the cut attempt stays spent, and was reserved anew
        assert entries[-1]["epsilon"] if entries[-1]["kind"] == "RESERVE" else True
    if moment == "after the sum was opened":
        # Sites give their shares once a round: the sum that was on disk is used, nothing is paid for twice.
        assert "going on from there" in text
        assert len(reserved) == len(plans) == ROUNDS
        assert all(row["outcome"] in ("before", "opened") for row in rows)
    assert not (out / "opened.safetensors").exists()
    # An auditor finds nothing wrong with it, and nothing missing.
    answers = {check.name: check.run(audit_evidence.read(out)) for check in RECORD_CHECKS}
    assert {name: found.status for name, found in answers.items() if found.status != "pass"} == {}, answers

    with pytest.raises(ConfigError, match="finished"):
        CliRunner().invoke(app, ["run", f"resume={out}"], catch_exceptions=False)


class PowerCut(BaseException):
    """What no handler of ours catches."""


def test_a_run_that_is_cut_while_its_statement_is_signed_has_one_statement_in_the_end(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after one of three sites has noted it, then again just before the summary."""
    notes = write_notes(tmp_path / "notes.jsonl", 3, 40)
    out, home = tmp_path / "out", tmp_path / "home"
    monkeypatch.setenv("FEDCOLLM_HOME", str(home))
    slm = tiny_checkpoint("llama")
    write_policies(home, ["s00", "s01", "s02"], notes, base_digest_of(str(slm), "float32"))
    models = [f"model.slm={slm}", f"model.llm={tiny_checkpoint('llama', width=64)}"]
    data = [f"data.path={notes}", "data.partition=column", "data.site_field=site"]
    words = ["run", *data, *models, f"output_dir={out}", *SMALL, "distillation.steps=0", "federation.rounds=1"]

    def cut_at_the_second_site(self: Site, offer: StatementOffer) -> Endorsement:
        if self.name == "s01":
            raise PowerCut
        return endorse(self, offer)

    def cut_at_the_summary(self: RunFolder, name: str, value: Any) -> None:
        raise PowerCut

    endorse = Site.endorse
    for cut, again in (
        ((Site, "endorse", cut_at_the_second_site), words),
        ((RunFolder, "write_json", cut_at_the_summary), ["run", f"resume={out}"]),
    ):
        with monkeypatch.context() as here:
            here.setattr(*cut)
            with pytest.raises(PowerCut):
                CliRunner().invoke(app, again, catch_exceptions=False)
        assert not (out / "summary.json").exists()
    noted = {site: [e["kind"] for e in entries_of(home / "ledgers" / f"{site}.sqlite")] for site in ("s00", "s02")}
    assert all(kinds == ["PLAN", "RESERVE", "SETTLE", "STATEMENT"] for kinds in noted.values())
    signed = (out / "statement.json").read_bytes()

    resumed = CliRunner().invoke(app, ["run", f"resume={out}"], catch_exceptions=False)
    assert resumed.exit_code == 0, resumed.output
    assert (out / "statement.json").read_bytes() == signed
    assert len(Envelope.from_bytes(signed).signatures) == 4
    for site in ("s00", "s01", "s02"):
        kinds = [e["kind"] for e in entries_of(home / "ledgers" / f"{site}.sqlite")]
        assert kinds == ["PLAN", "RESERVE", "SETTLE", "STATEMENT"]
    answers = {check.name: check.run(audit_evidence.read(out)) for check in RECORD_CHECKS}
    assert {name: found.evidence for name, found in answers.items() if found.status != "pass"} == {}


def test_resuming_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume"):
        CliRunner().invoke(app, ["run", f"resume={tmp_path}"], catch_exceptions=False)
