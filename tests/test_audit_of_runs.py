"""The auditor's program on what real runs left behind, and on what somebody then changed in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcollm_audits import evidence
from fedcollm_audits.audit import CHECKS
from fedcollm_audits.verdict import Finding

from .test_run import launch  # noqa: F401

Launch = Callable[..., dict[str, Any]]
RECORDS = [check for check in CHECKS if check.group not in ("empirical", "leakage")]


def answers(folder: Path) -> dict[str, Finding]:
    read = evidence.read(folder)
    return {check.name: check.run(read) for check in RECORDS}


def but_passes(folder: Path) -> dict[str, str]:
    return {name: found.status for name, found in answers(folder).items() if found.status != "pass"}


def test_a_private_run_passes_every_check_of_its_records_and_each_change_is_found(
    launch: Launch,  # noqa: F811
    tmp_path: Path,
) -> None:
    launch()
    out = tmp_path / "out"
    assert but_passes(out) == {}
    changes: list[tuple[str, Callable[[bytes], bytes], str]] = [
        (
            "ledgers/s01.jsonl",
            lambda raw: raw.replace(b'"outcome":"included"', b'"outcome":"left_out"', 1),
            "ledger-chain",
        ),
        ("ledgers/s01.jsonl", lambda raw: b"\n".join(raw.split(b"\n")[:3]) + b"\n", "ledger-heads"),
        ("transcript.jsonl", lambda raw: b"\n".join(raw.split(b"\n")[:-3]) + b"\n", "statement-bound"),
        ("slm_adapter/adapter_model.safetensors", lambda raw: raw[:-4] + b"\x00\x00\x80\x3f", "statement-bound"),
        ("statement.json", lambda raw: raw.replace(b'"payload":"', b'"payload":"AAAA', 1), "statement-signed"),
        ("config.yaml", lambda raw: raw + b"# later\n", "statement-bound"),
    ]
    for name, change, check in changes:
        path = out / name
        kept = path.read_bytes()
        path.write_bytes(change(kept))
        assert path.read_bytes() != kept, name
        assert but_passes(out).get(check) == "fail", name
        path.write_bytes(kept)
    for name, content in (("note.key", b"-----BEGIN PRIVATE KEY-----\n"), ("update.f32", bytes(4096))):
        (out / name).write_bytes(content)
        assert "fail" in but_passes(out).values(), name
        (out / name).unlink()
    assert but_passes(out) == {}


@pytest.mark.parametrize(
    ("overrides", "unshown"),
    [
        (["privacy=distributed", "federation.rounds=2", "federation.local_steps=1"], set()),
        (["method=zero_shot", "federation.rounds=0"], None),
        (["method=standalone", "federation.rounds=1", "distillation.steps=0"], None),
        (["private=false", "name=open-non-private"], None),
    ],
    ids=["distributed", "zero-shot", "standalone", "non-private"],
)
def test_no_check_of_records_fails_on_any_kind_of_run(
    launch: Launch,  # noqa: F811
    tmp_path: Path,
    overrides: list[str],
    unshown: set[str] | None,
) -> None:
    launch(*overrides)
    found = but_passes(tmp_path / "out")
    assert "fail" not in found.values(), found
    assert unshown is None or set(found) == unshown
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["run_id"]
