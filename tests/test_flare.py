"""NVIDIA FLARE's own processes on loopback, mutual TLS: what they carry, and what a killed one costs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .flare_drive import KILLS, LONG
from .flare_federation import PATHS, ROOT, SITES


def sha(body: bytes) -> dict[str, str]:
    return dict.fromkeys(SITES, hashlib.sha256(body).hexdigest())


def files_with(folder: Path, content: bytes) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and content in p.read_bytes()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eng")  # short: a socket's path has 107 bytes


@pytest.fixture(scope="module")
def tried(root: Path) -> dict[str, Any]:
    """The result of tests/flare_drive.py, in a process of its own, so that FLARE leaves no thread here."""
    command = [sys.executable, "-m", "tests.flare_drive", str(root)]
    environment = os.environ | {"PYTHONPATH": PATHS, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_bytes_codes_and_deadlines_over_the_engine(tried: dict[str, Any], root: Path) -> None:
    rows = tried["rows"]
    for operation in ("echo", "sleep6"):  # longer than any one question is held
        assert rows[operation]["sha"] == sha(b"x" * 100)
    for operation, code in (("decline", "declined"), ("crash", "failed"), ("sleep30", "no answer")):
        assert rows[operation]["codes"] == dict.fromkeys(SITES, code)
        assert rows[operation]["sha"] == dict.fromkeys(SITES)
    # The text of a site's error stays with the site, and is in none of the engine's files.
    assert files_with(root / "s01", b"SECRET of s01")
    assert not files_with(root / "flare", b"SECRET of s01")
    assert not files_with(root / "localhost", b"SECRET of s01")


def test_a_request_that_a_hostile_site_sends_its_neighbour_is_declined(tried: dict[str, Any]) -> None:
    assert tried["heard"] == "declined"
    assert tried["evil calls"] == 0


@pytest.mark.parametrize("killed", [f"{name} {kind}" for name, kind in KILLS])
def test_a_request_in_flight_is_answered_and_worked_on_once_whatever_engine_process_is_killed(
    tried: dict[str, Any], killed: str
) -> None:
    row = tried["kills"][killed]
    assert row["begun"]
    assert row["sha"] == sha(killed.encode())
    assert row["calls"] == dict.fromkeys(SITES, 1)


def test_when_a_site_own_process_is_killed_the_others_answer_and_its_next_request_works(tried: dict[str, Any]) -> None:
    killed, later = tried["site"]["killed"], tried["site"]["next"]
    assert killed["calls"] == {"s00": 2, "s01": 1, "s02": 1}  # by the old process and by the new one
    assert {killed["sha"][site] for site in ("s01", "s02")} == {hashlib.sha256(b"the site's own process").hexdigest()}
    assert later["sha"] == sha(b"after it")


def test_long_bodies_and_answers_do_not_pile_up_in_the_engine(tried: dict[str, Any]) -> None:
    found = tried["long"]
    assert found["echo"]["sha"] == sha(bytes(range(250)) * (LONG // 250))
    growth = {name: peak - found["before"].get(name, peak) for name, peak in found["peak"].items()}
    assert len(growth) == 8
    # 60 MB went to and from each of three sites. Pieces in flight take what they take whatever the size (94 MB at 30 MB
    # a site, 100 MB at 100); the answers alone, if they piled up, would be 180 MB.
    assert max(growth.values()) < 130, growth


def test_no_process_of_the_engine_has_loaded_torch(tried: dict[str, Any]) -> None:
    assert len(tried["torch"]) == 8
    assert not any(tried["torch"].values())
    assert tried["msgpack"]  # so a library that is loaded is seen


def test_jobs_with_code_or_unlisted_classes_are_turned_away(tried: dict[str, Any]) -> None:
    for what in ("class not listed", "code"):
        assert tried["jobs"][what].startswith(("FINISHED", "refused"))
        assert "COMPLETED" not in tried["jobs"][what]


def test_a_site_with_a_key_of_another_authority_does_not_get_in_and_with_its_own_key_does(
    tried: dict[str, Any],
) -> None:
    assert (tried["foreign"], tried["own"]) == (False, True)


def test_no_process_of_the_engine_is_left_behind(tried: dict[str, Any]) -> None:
    assert tried["left"] == 0


def test_what_the_engine_decodes_besides_bytes_is_a_closed_list_without_pickle() -> None:
    from nvflare.fuel.utils import fobs

    assert fobs.loads(fobs.dumps({"body": b"abc"})) == {"body": b"abc"}
    for name in ("subprocess.Popen", "tests.flare_federation.Federation", "builtins.eval"):
        told = {
            "__fobs_type__": name,
            "__fobs_data__": {},
            "__fobs_dc__": "nvflare.fuel.utils.fobs.decomposer.DataClassDecomposer",
        }
        crafted = fobs.dumps({"body": told})
        with pytest.raises(ValueError, match="not allowed"):
            fobs.loads(crafted)
