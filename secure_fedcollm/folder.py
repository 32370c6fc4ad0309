"""A run's folder on disk: made once, continued after a crash, never half-written."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedcollm_privacy.errors import ConfigError, FedCollmError
from fedcollm_privacy.messages import OpenedSum, canonical_json
from fedcollm_privacy.secure_sum_messages import SignedPlan
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.atomic_file import write_atomically
from secure_fedcollm.rounds import State
from secure_fedcollm.server_optimizer import AdamState

__all__ = ["Checkpoint", "RunFolder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state after the last finished round."""

    server_round: int
    state: State


class RunFolder:
    """``output_dir`` of one run.

    Attributes:
        path: the folder.
        run_id: the run's name in ledgers and plans; unlike the folder's name it is never used twice.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self.path, self.run_id = path, run_id

    @classmethod
    def create(cls, output_dir: str | None, name: str, config: Mapping[str, Any]) -> RunFolder:
        """Make a new folder and write ``config.yaml``.

        Raises:
            ConfigError: the folder holds a run already.
        """
        safe_name = re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:32].lstrip("-._") or "run"
        path = Path(output_dir) if output_dir else Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{safe_name}"
        if path.exists() and any(path.iterdir()):
            raise ConfigError("output_dir", str(path), f"a new or empty folder; to continue that run: resume={path}")
        path.mkdir(parents=True, exist_ok=True)
        run_id = f"{safe_name}-{os.urandom(6).hex()}"
        write_atomically(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())
        write_atomically(path / "run.json", canonical_json({"run_id": run_id}))
        return cls(path, run_id)

    @classmethod
    def resume(cls, folder: str) -> tuple[RunFolder, dict[str, Any]]:
        """Open the folder of a run that was cut; gives its configuration too.

        Raises:
            ConfigError: no run lies there.
        """
        path = Path(folder)
        try:
            config = yaml.safe_load((path / "config.yaml").read_text())
            run_id = json.loads((path / "run.json").read_text())["run_id"]
        except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
            raise ConfigError("resume", folder, "the folder of a run (with config.yaml and run.json)") from error
        return cls(path, run_id), config

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary and its report, the last of its files."""
        return (self.path / "summary.json").exists() and (self.path / "report.html").exists()

    def save_checkpoint(self, checkpoint: Checkpoint, spec_digest: str) -> None:
        """Keep the state after a round; replaces the one before in a single step."""
        state = checkpoint.state
        tensors = {"slm": state.slm, "llm": state.llm, **{f"alone.{k}": v for k, v in state.alone.items()}}
        temporary = self.path / ".checkpoint.part"
        metadata = {
            "server_round": str(checkpoint.server_round),
            "spec_digest": spec_digest,
            "adam_steps": str(state.adam.steps),
        }
        if state.adam.steps:
            tensors |= {"adam.first": state.adam.first, "adam.second": state.adam.second}
        save_file({k: v.copy() for k, v in tensors.items()}, temporary, metadata=metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.path / "checkpoint.safetensors")

    def load_checkpoint(self, spec_digest: str) -> Checkpoint | None:
        """The last state, or None when no round was finished.

        Raises:
            FedCollmError: the file is damaged, or of other models.
        """
        path = self.path / "checkpoint.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise FedCollmError(f"{path} is damaged: {error}") from error
        if metadata["spec_digest"] != spec_digest:
            raise FedCollmError(f"{path} belongs to other models than {self.path / 'config.yaml'} names now")
        alone = {k.removeprefix("alone."): v for k, v in tensors.items() if k.startswith("alone.")}
        adam = AdamState()
        if "adam.first" in tensors:
            steps = int(metadata["adam_steps"])
            adam = AdamState(steps=steps, first=tensors["adam.first"], second=tensors["adam.second"])
        state = State(slm=tensors["slm"], llm=tensors["llm"], alone=alone, adam=adam)
        return Checkpoint(server_round=int(metadata["server_round"]), state=state)

    def keep_opened(self, opened: OpenedSum) -> None:
        """Put an opened sum on disk until its round has a checkpoint: it is given once and no site gives it again."""
        plan = encode(SignedPlan(plan=opened.plan, signature=b""))
        tensors = {"total": opened.total.copy(), "plan": np.frombuffer(plan, dtype=np.uint8).copy()}
        temporary = self.path / ".opened.part"
        save_file(tensors, temporary, metadata={"cohort": json.dumps(opened.cohort)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.path / "opened.safetensors")

    def kept_opened(self, server_round: int) -> OpenedSum | None:
        """The opened sum of this round, where the run was cut between its opening and its checkpoint.

        Raises:
            FedCollmError: the file is damaged.
        """
        path = self.path / "opened.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                cohort = tuple(json.loads(file.metadata()["cohort"]))
                total, raw = file.get_tensor("total"), file.get_tensor("plan")
        except SafetensorError as error:
            raise FedCollmError(f"{path} is damaged: {error}; delete it, and that round counts as lost") from error
        plan = decode(raw.tobytes(), SignedPlan).plan
        return OpenedSum(plan=plan, cohort=cohort, total=total) if plan.server_round == server_round else None

    def drop_opened(self) -> None:
        """Forget the opened sum: its round is over."""
        (self.path / "opened.safetensors").unlink(missing_ok=True)

    def keep_payload(self, payload: bytes) -> None:
        """Put the statement's payload on disk before any site notes it: a run that is cut offers the same again."""
        write_atomically(self.path / "statement.payload", payload)

    def kept_payload(self) -> bytes | None:
        """The payload that a run which was cut has offered to its sites already."""
        path = self.path / "statement.payload"
        return path.read_bytes() if path.exists() else None

    def drop_payload(self) -> None:
        """Forget the payload: it stands in the signed statement."""
        (self.path / "statement.payload").unlink(missing_ok=True)

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of ``metrics.jsonl``."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one round; on disk when this returns."""
        with (self.path / "metrics.jsonl").open("ab") as file:
            file.write(canonical_json(row) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def drop_metrics_after(self, server_round: int) -> None:
        """Forget rounds that have no checkpoint: they will be run again."""
        keep = [row for row in self.metrics() if row["server_round"] <= server_round]
        write_atomically(self.path / "metrics.jsonl", b"".join(canonical_json(row) + b"\n" for row in keep))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one JSON file, readable and atomic; NaN is refused."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(self.path / name, text.encode() + b"\n")
