"""The wheel holds our three packages and the configurations, and nothing with a name that others use."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(target.glob("*.whl"))


def test_the_wheel_has_three_top_level_names(wheel: Path) -> None:
    names = {Path(n).parts[0] for n in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in Path(n).parts[0]}
    assert names == {"secure_fedcollm", "fedcollm_privacy", "fedcollm_audits"}


def test_the_wheel_holds_configurations_template_and_type_markers(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        f"secure_fedcollm/configs/{p.relative_to(ROOT / 'configs')}" for p in (ROOT / "configs").rglob("*.yaml")
    } <= names
    assert {f"{p}/py.typed" for p in ("secure_fedcollm", "fedcollm_privacy", "fedcollm_audits")} <= names
    assert "secure_fedcollm/report.html.j2" in names
    assert not any("tests" in Path(n).parts for n in names)


def test_check_wheel_contents_finds_nothing(wheel: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "check-wheel-contents"),
        "--config",
        str(ROOT / "pyproject.toml"),
        str(wheel),
    ]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_installed_wheel_finds_its_configurations_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from secure_fedcollm import cli;"
        "import pathlib; here = pathlib.Path(cli.__file__).resolve();"
        "sys.exit(0 if str(here).startswith(str(pathlib.Path(sys.argv[1]).resolve()))"
        " and cli.compose_config(['method=fedavg'])['method'] == 'FedAvg' else 1)"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "site")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_constraints_pin_every_requirement() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirement in wanted:
        name = requirement.split(">")[0].split("<")[0].split("=")[0].strip().lower().replace("_", "-")
        assert name in pinned, name
