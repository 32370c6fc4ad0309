"""`fedcollm policy` as an administrator types it: a strict file, what it allows in plain words, what was refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from fedcollm_privacy.contributor import SumPolicy
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import FedCollmError, InvalidValue, KeyFileError, LedgerError, ModelError, PolicyRefused
from fedcollm_privacy.identity import SigningKey, load_public, save_public
from fedcollm_privacy.policy_file import load_policy
from fedcollm_privacy.refusals import RefusalLog
from fedcollm_privacy.site_policy import DataSetRule, PlanRules
from secure_fedcollm.policy_cli import policy_app

from .secure_sums import digest

RUNNER = CliRunner()
MODEL = digest("model")
APP = typer.Typer()
APP.add_typer(policy_app, name="policy")


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("FEDCOLLM_HOME", str(tmp_path / "home"))
    for name in ("server", "standby"):
        save_public(SigningKey.generate(name).public, Path(f"{name}.pub"))


def policy(*arguments: object) -> Result:
    result = RUNNER.invoke(APP, ["policy", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def new(**changes: object) -> Result:
    options = {"site": "st-anna", "data": "notes.jsonl", "name": "ward-notes", "server": "server.pub", "model": MODEL}
    options["out"] = "site-policy.yaml"
    words = [word for key, value in (options | changes).items() for word in (f"--{key.replace('_', '-')}", value)]
    return policy("new", *words)


def test_a_new_policy_is_strict_holds_a_year_and_belongs_to_its_owner(tmp_path: Path) -> None:
    result = new()
    path = Path("site-policy.yaml")
    made = load_policy(path, "st-anna")
    assert made.servers == (load_public(Path("server.pub")),)
    assert made.base_models == (MODEL,)
    assert made.data_sets == (
        DataSetRule(
            name="ward-notes",
            location=str(tmp_path / "notes.jsonl"),
            unit="person",
            caps=(Cap(epsilon=10.0, delta=1e-4), Cap(epsilon=4.0, delta=5e-5, days=365)),
        ),
    )
    assert made.plans == PlanRules(max_epsilon=3.0, max_delta=1e-5, noise=("local",))
    assert made.opening == SumPolicy(min_contributors=3, max_colluding=1)
    assert made.exceptions == ()
    assert abs(made.valid_until - datetime.now(UTC).date() - timedelta(days=365)) <= timedelta(days=1)
    assert path.stat().st_mode & 0o777 == 0o600
    assert str(tmp_path / "site-policy.yaml") in result.output
    assert "edit" in result.output
    assert "fedcollm policy check site-policy.yaml" in result.output


def test_several_servers_and_models_and_other_kinds_of_data_are_taken() -> None:
    for number, data in enumerate(("embedded", "hub:org/set:part")):
        new(data=data, unit="record", out=f"{number}.yaml")
        (rule,) = load_policy(Path(f"{number}.yaml"), "st-anna").data_sets
        assert (rule.location, rule.unit) == (data, "record")
    words = ("--server", "standby.pub", "--model", digest("other"), "--out", "more.yaml")
    options = ("--site", "st-anna", "--data", "embedded", "--name", "x", "--server", "server.pub", "--model", MODEL)
    policy("new", *options, *words)
    made = load_policy(Path("more.yaml"), "st-anna")
    assert [server.name for server in made.servers] == ["server", "standby"]
    assert made.base_models == (MODEL, digest("other"))


def test_a_policy_is_never_overwritten_and_no_link_is_followed() -> None:
    Path("kept.yaml").write_text("kept")
    Path("link.yaml").symlink_to("elsewhere.yaml")
    for out in ("kept.yaml", "link.yaml"):
        with pytest.raises(PolicyRefused, match="never overwritten"):
            new(out=out)
    assert Path("kept.yaml").read_text() == "kept"
    assert not Path("elsewhere.yaml").exists()
    with pytest.raises(PolicyRefused, match="cannot be written"):
        new(out="no/such/folder.yaml")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"site": "a b"}, InvalidValue),
        ({"name": "a\nb"}, InvalidValue),
        ({"server": "absent.pub"}, KeyFileError),
        ({"model": "."}, ModelError),
        ({"model": "AB" * 32}, InvalidValue),
    ],
)
def test_what_would_be_no_policy_writes_nothing(changes: dict[str, object], error: type[FedCollmError]) -> None:
    with pytest.raises(error):
        new(**changes)
    assert not Path("site-policy.yaml").exists()


def test_check_says_in_plain_words_what_is_allowed() -> None:
    Path("notes.jsonl").write_text("")
    new(name="ward [bold]notes")
    output = policy("check", "site-policy.yaml", "--site", "st-anna").output
    made = load_policy(Path("site-policy.yaml"), "st-anna")
    for words in (
        *("what st-anna allows until", load_public(Path("server.pub")).fingerprint, MODEL, made.digest),
        *("ward [bold]notes", "all records of a person", "at most epsilon 10, delta 0.0001 for ever"),
        *("at most epsilon 4, delta 5e-05 in any 365 days", "one run spends at most epsilon 3, delta 1e-05"),
        *("this site's own noise", "fewer than 3 sites", "at least 1 other site", "no run without protection"),
    ):
        assert words in output
    assert "Note" not in output


def edit(*pairs: tuple[str, str]) -> None:
    path = Path("site-policy.yaml")
    text = path.read_text()
    for old, replacement in pairs:
        if old not in text:
            raise ValueError(f"{old!r} does not stand in the policy")
        text = text.replace(old, replacement)
    path.write_text(text)


def test_check_points_out_what_is_allowed_but_odd() -> None:
    new()
    edit(
        ("      - {epsilon: 10.0, delta: 0.0001, days: null}\n", ""),
        ("max_epsilon: 3.0", "max_epsilon: 5.0"),
        ("exceptions: []", "exceptions: [non_private]"),
    )
    output = policy("check", "site-policy.yaml").output
    for words in (
        "no cap for ever",
        "no run can spend",
        "nothing lies at",
        "non_private allow runs that protect nobody",
    ):
        assert words in output


@pytest.mark.parametrize(
    ("old", "new_text", "rule"),
    [
        ("min_contributors: 3", "min_contributors: 2", "opening.min_contributors"),
        ("max_delta: 1.0e-5", "max_delta: 1e-5", "plans.max_delta"),
        ("st-anna", "st-bertha", "site"),
    ],
)
def test_check_ends_with_2_and_the_reason(
    old: str, new_text: str, rule: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from secure_fedcollm.cli import main

    new()
    edit((old, new_text))
    monkeypatch.setattr("sys.argv", ["fedcollm", "policy", "check", "site-policy.yaml", "--site", "st-anna"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert rule in capsys.readouterr().err


def test_check_refuses_an_expired_policy() -> None:
    new(valid_days=0)
    assert policy("check", "site-policy.yaml").exit_code == 0
    edit((f"{datetime.now(UTC).date()}", "2020-01-01"))
    with pytest.raises(PolicyRefused, match="2020-01-01") as caught:
        policy("check", "site-policy.yaml")
    assert caught.value.rule == "valid_until"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_models_digest_is_what_a_run_writes_into_its_specs(
    tiny_checkpoint: Callable[..., Path], load_tiny: Callable[..., Any], architecture: str, dtype: str
) -> None:
    folder = tiny_checkpoint(architecture)
    printed = policy("model", folder, "--dtype", dtype).output.strip()
    assert printed == load_tiny(architecture, dtype=dtype).spec.base_model
    assert printed == load_tiny(architecture, dtype=dtype, r=2, target_modules=["all-linear"]).spec.base_model
    assert re.fullmatch("[0-9a-f]{64}", printed)


def test_another_model_or_number_format_has_another_digest(tiny_checkpoint: Callable[..., Path]) -> None:
    first, second = tiny_checkpoint("gpt2"), tiny_checkpoint("gpt2", width=64)
    digests = {
        policy("model", folder, "--dtype", d).output for folder in (first, second) for d in ("float32", "bfloat16")
    }
    assert len(digests) == 4


def test_a_new_policy_takes_a_model_by_its_folder(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("gpt2")
    new(model=folder, dtype="bfloat16")
    printed = policy("model", folder, "--dtype", "bfloat16").output.strip()
    assert load_policy(Path("site-policy.yaml"), "st-anna").base_models == (printed,)


def test_refusals_are_listed_and_cannot_steer_the_terminal() -> None:
    log = RefusalLog(Path("st-anna.refusals.jsonl"))
    log.record(
        rule="plans.max_epsilon", reason="9 \x1b[2J asked [red]x[/red] :smile:", run_id="run-1", server_round=None
    )
    log.record(rule="servers", reason="unknown", run_id="run-2", server_round=7, clock=lambda: 1_769_860_800.0)
    output = policy("refusals", "st-anna.refusals.jsonl").output
    for words in ("plans.max_epsilon", "9 \\x1b[2J asked [red]x[/red] :smile:", "run-1", "servers", "run-2"):
        assert words in output
    assert "2026-01-31T12:00:00+00:00" in output
    assert "2 refusals" in output
    assert "\x1b" not in output


def test_looking_at_refusals_makes_and_changes_no_file() -> None:
    with pytest.raises(LedgerError, match="cannot be read"):
        policy("refusals", "absent.jsonl")
    assert not Path("absent.jsonl").exists()
    RefusalLog(Path("log")).record(rule="site", reason="x", run_id="r", server_round=1)
    torn = Path("log").read_bytes() + b'{"half'
    Path("log").write_bytes(torn)
    assert "1 refusals" in policy("refusals", "log").output
    assert Path("log").read_bytes() == torn
