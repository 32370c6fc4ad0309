"""What a person types, and what the program answers when it is wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import ConfigError, DataError, FedCollmError, LedgerError, ModelError
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.plan import calibrate
from secure_fedcollm.cli import app, main
from secure_fedcollm.models import base_digest_of

from .site_policies import write_policies
from .test_run import SMALL, write_notes

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command sets up logging for its process; other tests share this one."""
    loggers = [logging.getLogger(name) for name in (None, "fedcollm", "secure_fedcollm")]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


def fedcollm(*arguments: str) -> None:
    result = RUNNER.invoke(app, arguments, catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception


@pytest.fixture
def pair(tiny_checkpoint: Callable[..., Path]) -> list[str]:
    return [f"model.slm={tiny_checkpoint('llama')}", f"model.llm={tiny_checkpoint('llama', width=64)}"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["federation.roundz=3"], "roundz"),
        (["federation.rounds=many"], "federation.rounds"),
        (["experiment=nowhere"], "nowhere"),
        (["method=gossip"], "gossip.*fedavg.*zero_shot"),
        (["method=zero_shot", "federation.rounds=2"], r"federation\.rounds.*2.*method=zero_shot"),
        (["method=fedavg_public", "distillation.kd_weight=0.3"], r"kd_weight.*0\.3.*method=fedavg_public"),
        (["method=fedavg", "distillation.steps=50"], r"distillation\.steps.*50.*method=fedavg"),
        (["federation.exchange=none"], r"exchange.*none.*method=fedcollm"),
        (["privacy.epsilon=.nan"], "privacy.epsilon"),
        (["federation.min_contributors=1"], "min_contributors"),
        (["privacy.noise=none"], "local"),
        (["data=medquad"], "data.path"),
        (["not an override"], "not an override"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fedcollm("run", *overrides)


def test_an_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("results")
    with pytest.raises(ConfigError, match="resume="):
        fedcollm("run", f"output_dir={tmp_path}")
    assert (tmp_path / "kept").read_text() == "results"


def test_a_resumed_run_keeps_its_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no other override"):
        fedcollm("run", f"resume={tmp_path}", "federation.rounds=9")


def test_models_that_do_not_fit_are_refused_before_anything_is_spent(
    tmp_path: Path, pair: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCOLLM_HOME", str(tmp_path / "home"))
    notes = write_notes(tmp_path / "notes.jsonl", 3, 40)
    data = [f"data.path={notes}", "data.partition=column", "data.site_field=site", *SMALL]
    with pytest.raises(ModelError, match="no-such-folder"):
        fedcollm("run", *data, f"model.slm={tmp_path}/no-such-folder", pair[1], f"output_dir={tmp_path}/a")
    with pytest.raises(ModelError, match="q_proj"):
        fedcollm("run", *data, *pair, "adapter.target_modules=[c_attn]", f"output_dir={tmp_path}/b")
    assert not (tmp_path / "home" / "ledgers").exists()


def test_bad_rows_are_reported_by_file_and_line(tmp_path: Path, pair: list[str]) -> None:
    notes = write_notes(tmp_path / "notes.jsonl", 3, 40)
    with notes.open("a") as file:
        file.write('{"text": "cut off\n{"text": 7, "site": "s00"}\n')
    with pytest.raises(DataError, match="2") as refusal:
        fedcollm("run", f"data.path={notes}", "data.partition=column", "data.site_field=site", *pair, *SMALL)
    assert "121" in str(refusal.value)
    assert "122" in str(refusal.value)
    assert "cut off" not in str(refusal.value)


def test_errors_are_one_line_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fedcollm", "run", "privacy.epsilon=-1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "privacy.epsilon" in message
    assert "Traceback" not in message


@pytest.mark.slow
def test_quiet_says_nothing(
    tmp_path: Path, pair: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDCOLLM_HOME", str(tmp_path / "home"))
    notes = write_notes(tmp_path / "notes.jsonl", 3, 40)
    write_policies(tmp_path / "home", ["s00", "s01", "s02"], notes, base_digest_of(pair[0].split("=")[1], "float32"))
    arguments = [f"data.path={notes}", "data.partition=column", "data.site_field=site", *pair, *SMALL]
    result = RUNNER.invoke(app, ["run", *arguments, "distillation.steps=1", f"output_dir={tmp_path}/out", "--quiet"])
    assert result.exception is None, result.output
    assert result.output == ""
    assert (tmp_path / "out" / "report.html").exists()


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ward.sqlite"
    plan = calibrate(
        target_epsilon=8.0,
        delta=1e-5,
        unit="record",
        max_records_per_unit=1,
        max_grad_norm=1.0,
        expected_batch_size=8,
        steps_per_round=2,
        rounds=2,
        units=100,
    )
    book = Ledger(path, SigningKey.generate("ward"))
    book.commit_plan(run_id="run", data_set="notes", plan=plan, caps=(Cap(epsilon=10.0, delta=1e-4),))
    book.reserve(run_id="run", plan=plan, server_round=1)
    return path


def test_a_ledger_can_be_shown_verified_and_exported(ledger: Path, tmp_path: Path) -> None:
    shown = RUNNER.invoke(app, ["ledger", "show", str(ledger)])
    assert "PLAN" in shown.output
    assert RUNNER.invoke(app, ["ledger", "export", str(ledger), str(tmp_path / "ward.jsonl")]).exit_code == 0
    good = RUNNER.invoke(app, ["ledger", "verify", str(tmp_path / "ward.jsonl")])
    assert good.exit_code == 0
    assert "2 entries" in good.output


def test_an_altered_export_fails_verification(ledger: Path, tmp_path: Path) -> None:
    export = tmp_path / "ward.jsonl"
    LedgerFile(ledger).export(export)
    entries = [json.loads(line) for line in export.read_text().splitlines()]
    entries[1]["epsilon"] = 0.1
    export.write_text("".join(json.dumps(e) + "\n" for e in entries))
    assert RUNNER.invoke(app, ["ledger", "verify", str(export)]).exit_code == 1


def test_a_missing_ledger_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(LedgerError):
        fedcollm("ledger", "show", str(tmp_path / "nobody.sqlite"))
    assert not (tmp_path / "nobody.sqlite").exists()


def test_every_error_is_of_one_tree() -> None:
    for error in (ConfigError, DataError, LedgerError, ModelError):
        assert issubclass(error, FedCollmError)
