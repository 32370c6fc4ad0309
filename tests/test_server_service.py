"""What `fedcollm server` leaves open, and what it does not, before any site is asked."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcollm_privacy.errors import ConfigError, FedCollmError, ModelError
from secure_fedcollm import service_cli
from secure_fedcollm.cli import app, compose_config
from secure_fedcollm.kit import Kit
from secure_fedcollm.server_service import current_run, give_up, serve
from secure_fedcollm.service import only_one
from secure_fedcollm.snapshot import read_status

from .kits import make_kit
from .tiny_deployment import SMALL, write_site_notes


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit.open(make_kit(tmp_path / "kit", "server", port=9).folder)


@pytest.fixture
def start(tmp_path: Path, kit: Kit) -> Callable[..., Path]:
    public = write_site_notes(tmp_path / "public.jsonl", 9, 60)
    plain = compose_config([*SMALL, f"data.public_path={public}", "model.slm=/nowhere/slm", "model.llm=/nowhere/llm"])
    numbers = itertools.count()

    def begin(new: bool = True) -> Path:
        given = plain | {"output_dir": str(kit.folder / "runs" / str(next(numbers)))} if new else None
        return serve(kit, given, passphrase=None, port=None, quiet=True)

    return begin


def test_a_run_whose_settings_do_not_fit_is_not_open_afterwards_and_the_next_try_is_free(
    kit: Kit, start: Callable[..., Path]
) -> None:
    for _ in range(2):
        with pytest.raises(ModelError, match="nowhere"):
            start()
        assert current_run(kit) is None
    status = read_status(kit.state / "status.json")
    assert status.state == "failed"
    assert "nowhere" in status.failure
    assert not (kit.state / "ready").exists()


def test_an_open_run_is_gone_on_with_or_given_up_and_no_other_begins(
    kit: Kit, start: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no run is open"):
        start(new=False)
    with pytest.raises(FedCollmError, match="no run is open"):
        give_up(kit)
    assert not (kit.folder / "runs").exists()
    with pytest.raises(ModelError):
        start()
    (folder,) = (kit.folder / "runs").iterdir()
    (kit.state / "run").write_text(f"{folder}\n")  # as if it had been killed at work
    with pytest.raises(ConfigError, match="goes on with it"):
        start()
    with pytest.raises(ModelError, match="nowhere"):
        start(new=False)
    assert current_run(kit) == folder
    give_up(kit)
    assert current_run(kit) is None


def test_a_run_that_was_killed_after_its_last_file_is_no_open_run(kit: Kit, start: Callable[..., Path]) -> None:
    with pytest.raises(ModelError):
        start()
    (folder,) = (kit.folder / "runs").iterdir()
    (kit.state / "run").write_text(f"{folder}\n")
    for name in ("summary.json", "report.html"):
        (folder / name).write_text("{}")
    with pytest.raises(ConfigError, match="no run is open"):
        start(new=False)


def test_one_process_a_kit(kit: Kit, start: Callable[..., Path]) -> None:
    with only_one(kit.state), pytest.raises(FedCollmError, match="another process"):
        start()
    assert not (kit.folder / "runs").exists()


def test_a_site_kit_is_no_server(tmp_path: Path) -> None:
    site = Kit.open(make_kit(tmp_path / "site", "site", port=9).folder)
    with pytest.raises(FedCollmError, match="fedcollm site --kit"):
        serve(site, None, passphrase=None, port=None, quiet=True)


def test_without_the_engine_the_commands_say_what_to_install(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    real = service_cli.find_spec
    monkeypatch.setattr(service_cli, "find_spec", lambda name: None if name == "nvflare" else real(name))
    done = CliRunner().invoke(app, ["server", "--kit", str(kit.folder), "method=fedavg"])
    assert isinstance(done.exception, ConfigError)
    assert "secure-fedcollm[deploy]" in str(done.exception)


def test_commands_that_need_no_model_load_no_torch() -> None:
    code = (
        "import secure_fedcollm.cli, sys; print([m for m in ('torch', 'nvflare', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
