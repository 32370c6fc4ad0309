"""A run on disk: never half-written, never overwritten, never continued as something else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fedcollm_privacy.errors import ConfigError, FedCollmError, ProtocolError
from secure_fedcollm.folder import Checkpoint, RunFolder
from secure_fedcollm.rounds import State
from secure_fedcollm.transcript import Transcript

STATE = State(
    slm=np.arange(5, dtype=np.float32),
    llm=np.arange(3, dtype=np.float32) / 7,
    alone={"north": np.ones(2, dtype=np.float32)},
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(str(tmp_path / "run"), "ward notes!", {"seed": 1})


def test_a_checkpoint_comes_back_bit_for_bit(folder: RunFolder) -> None:
    assert folder.load_checkpoint("spec") is None
    folder.save_checkpoint(Checkpoint(server_round=4, state=STATE), "spec")
    back = folder.load_checkpoint("spec")
    assert back is not None
    assert back.server_round == 4
    for name in ("slm", "llm"):
        assert getattr(back.state, name).tobytes() == getattr(STATE, name).tobytes()
    assert back.state.alone["north"].tobytes() == STATE.alone["north"].tobytes()


def test_a_checkpoint_of_other_models_is_refused(folder: RunFolder) -> None:
    folder.save_checkpoint(Checkpoint(server_round=1, state=STATE), "spec")
    with pytest.raises(FedCollmError, match="other models"):
        folder.load_checkpoint("another")


def test_a_damaged_checkpoint_is_named(folder: RunFolder) -> None:
    folder.save_checkpoint(Checkpoint(server_round=1, state=STATE), "spec")
    path = folder.path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FedCollmError, match="damaged"):
        folder.load_checkpoint("spec")


def test_a_crash_while_saving_leaves_the_old_checkpoint(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save_checkpoint(Checkpoint(server_round=1, state=STATE), "spec")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        folder.save_checkpoint(Checkpoint(server_round=2, state=STATE), "spec")
    back = folder.load_checkpoint("spec")
    assert back is not None
    assert back.server_round == 1


def test_a_torn_metrics_line_is_dropped_and_later_rounds_are_forgotten(folder: RunFolder) -> None:
    for server_round in range(3):
        folder.append_metrics({"server_round": server_round})
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"server_round": 3, "sl')
    assert [row["server_round"] for row in folder.metrics()] == [0, 1, 2]
    folder.drop_metrics_after(1)
    assert [row["server_round"] for row in folder.metrics()] == [0, 1]


def test_run_names_are_never_used_twice(tmp_path: Path) -> None:
    first = RunFolder.create(str(tmp_path / "a"), "same", {})
    second = RunFolder.create(str(tmp_path / "b"), "same", {})
    assert first.run_id != second.run_id
    with pytest.raises(ConfigError, match="resume="):
        RunFolder.create(str(tmp_path / "a"), "same", {})
    assert RunFolder.resume(str(tmp_path / "a"))[0].run_id == first.run_id


def test_a_transcript_is_continued_and_its_torn_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    first = Transcript(path)
    first.record("plan", server_round=1)
    first.record("upload", server_round=1, site="north")
    with path.open("ab") as file:
        file.write(b'{"seq": 3, "ev')
    again = Transcript(path)
    assert again.head == first.head
    assert again.attempts(1) == 1
    again.record("plan", server_round=1)
    assert again.attempts(1) == 2
    assert [json.loads(line)["seq"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("change", ["edit", "delete", "swap"])
def test_an_altered_transcript_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "transcript.jsonl"
    transcript = Transcript(path)
    for site in ("north", "south", "east"):
        transcript.record("upload", server_round=1, site=site)
    lines = path.read_text().splitlines(keepends=True)
    altered = {
        "edit": [lines[0], lines[1].replace("south", "south2"), lines[2]],
        "delete": [lines[0], lines[2]],
        "swap": [lines[1], lines[0], lines[2]],
    }[change]
    path.write_text("".join(altered))
    with pytest.raises(ProtocolError, match="altered"):
        Transcript(path)
