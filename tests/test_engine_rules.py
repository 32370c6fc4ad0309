"""What a party's own rules let FLARE do: run one class of ours, no code of a job, and send no logs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nvflare.lighter.templates
import pytest
import yaml

from fedcollm_privacy.errors import DataError, InvalidValue
from secure_fedcollm.engine_rules import SERVER_RELAY, SITE_RELAY, engine_rules


def filled(text: str) -> str:
    """A template as FLARE's provisioning fills it, as far as it matters here."""
    for name, value in (("class_allow_list", '["nvflare.some.Class"]'), ("allow_log_streaming", "true")):
        text = text.replace(f"{{~~{name}~~}}", value)
    return re.sub(r"\{~~\w+~~\}", "0", text)


@pytest.fixture
def local(tmp_path: Path) -> dict[str, Path]:
    """FLARE's own defaults for a server and a site."""
    template = Path(nvflare.lighter.templates.__path__[0]) / "master_template.yml"
    found = yaml.safe_load(template.read_text())
    folders = {}
    for side, key in (("server", "local_server_resources"), ("site", "local_client_resources")):
        folders[side] = tmp_path / side / "local"
        folders[side].mkdir(parents=True)
        (folders[side] / "resources.json.default").write_text(filled(found[key]))
        (folders[side] / "authorization.json.default").write_text(found["default_authz"])
    return folders


@pytest.mark.parametrize(("side", "relay"), [("server", SERVER_RELAY), ("site", SITE_RELAY)])
def test_one_class_no_code_no_logs(local: dict[str, Path], side: str, relay: str) -> None:
    default = json.loads((local[side] / "resources.json.default").read_text())
    engine_rules(local[side], side)  # type: ignore[arg-type]
    resources = json.loads((local[side] / "resources.json").read_text())
    assert default["class_allow_list"] != resources["class_allow_list"] == [relay]
    assert resources["allow_log_streaming"] is False
    assert not [c for c in resources["components"] if "log_streamer" in c["id"]]
    permissions = json.loads((local[side] / "authorization.json").read_text())["permissions"]
    assert set(permissions) == {"project_admin", "org_admin", "lead", "member"}
    assert {rights["byoc"] for rights in permissions.values()} == {"none"}
    assert [role for role, rights in permissions.items() if rights["submit_job"] != "none"] == ["lead"]
    assert {rights[what] for rights in permissions.values() for what in ("operate", "shell_commands")} == {"none"}


def test_the_server_keeps_its_jobs_in_its_kit_where_the_default_keeps_them_in_tmp(local: dict[str, Path]) -> None:
    assert "/tmp/nvflare" in (local["server"] / "resources.json.default").read_text()
    engine_rules(local["server"], "server")
    written = (local["server"] / "resources.json").read_text()
    assert "/tmp/nvflare" not in written
    assert str(local["server"].parent / "storage" / "jobs") in written


def test_written_again_it_replaces_what_somebody_widened(local: dict[str, Path]) -> None:
    engine_rules(local["site"], "site")
    first = (local["site"] / "resources.json").read_text()
    (local["site"] / "resources.json").write_text(first.replace(SITE_RELAY, "*"))
    engine_rules(local["site"], "site")
    assert (local["site"] / "resources.json").read_text() == first


def test_without_flares_defaults_nothing_is_written(local: dict[str, Path]) -> None:
    for content in ("", "[]", "{}"):
        (local["site"] / "resources.json.default").write_text(content)
        with pytest.raises(DataError, match="make the kit again"):
            engine_rules(local["site"], "site")
    shutil.rmtree(local["server"])
    with pytest.raises(DataError, match="make the kit again"):
        engine_rules(local["server"], "server")
    with pytest.raises(InvalidValue, match="side"):
        engine_rules(local["site"], "admin")  # type: ignore[arg-type]
    assert not (local["site"] / "resources.json").exists()


def test_the_names_are_those_of_the_classes() -> None:
    from secure_fedcollm import flare

    assert (f"{flare.__name__}.{flare.ServerRelay.__name__}", f"{flare.__name__}.{flare.SiteRelay.__name__}") == (
        SERVER_RELAY,
        SITE_RELAY,
    )
