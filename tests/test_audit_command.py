"""The auditor's command: what it answers, what it exits with, and that the run's folder can do it no harm."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedcollm_audits import audit
from fedcollm_audits.audit import CHECKS, run_checks, select
from fedcollm_audits.cli import app, main
from fedcollm_audits.evidence import Evidence, read
from fedcollm_audits.verdict import Check, Finding, failed, not_shown, passed
from fedcollm_privacy.errors import InvalidValue, LedgerError

from .run_folders import build
from .run_records import key_of, public

ROOT = Path(__file__).parents[1]
PASS, FAIL, OPEN = passed("It is."), failed("It is not.", "In round 3."), not_shown("Nothing shows it.")


def check(name: str, group: str, run: Callable[[Evidence], Finding] | Finding) -> Check:
    answer = (lambda _: run) if isinstance(run, Finding) else run
    return Check(name=name, group=group, question=f"Is {name} so?", why="It matters.", run=answer)


def given_checks(monkeypatch: pytest.MonkeyPatch, *findings: Finding | Callable[[Evidence], Finding]) -> None:
    groups = ("ledger", "ledger", "plan", "leakage")
    made = [check(f"check-{i}", groups[i % 4], finding) for i, finding in enumerate(findings)]
    monkeypatch.setattr(audit, "CHECKS", tuple(made))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: x\n")
    (folder / "summary.json").write_text('{"private":true,"run_id":"run-7f3a"}')
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The console script itself; gives its exit code."""

    def called(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fedcollm-audit", *(str(a) for a in arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return called


def told(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "audit.json").read_text())
    return result


# ---------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("findings", "options", "code", "verdict"),
    [
        ([PASS, PASS], [], 0, "yes"),
        ([PASS, FAIL], [], 1, "no"),
        ([PASS, OPEN], [], 3, "not shown"),
        ([OPEN, FAIL], [], 1, "no"),
        ([PASS, FAIL], ["--skip", "check-1"], 0, "yes"),
        ([PASS, FAIL], ["--only", "check-1"], 1, "no"),
        ([OPEN, PASS, FAIL], ["--only", "ledger"], 3, "not shown"),
        ([PASS, PASS, FAIL], ["--skip", "plan"], 0, "yes"),
    ],
)
def test_the_exit_code_is_the_verdict(
    findings: list[Finding],
    options: list[str],
    code: int,
    verdict: str,
    run_dir: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_checks(monkeypatch, *findings)
    assert command(run_dir, *options) == code
    found = told(run_dir)
    assert (found["exit_code"], found["verdict"]) == (code, verdict)
    assert found["sentence"].startswith({0: "Yes: ", 1: "No: ", 3: "Not shown: "}[code])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "RUN_DIR"),
        (["nowhere"], "RUN_DIR"),
        (["{run}/config.yaml"], "RUN_DIR"),
        (["{run}", "--only", "check-9"], "check-9.*ledger.*check-0.*check-1"),
        (["{run}", "--skip", "ledgers"], "ledgers.*check-0"),
        (["{run}", "--skip", "ledger"], "at least one check"),
        (["{run}", "--governance", "nothing.pub"], "governance"),
        (["{run}", "--out", "{run}/config.yaml"], "--out"),
        (["{run}", "--fast"], "No such option"),
    ],
)
def test_wrong_usage_exits_with_two_and_says_what_is_allowed(
    arguments: list[str],
    words: str,
    run_dir: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given_checks(monkeypatch, PASS, PASS)
    monkeypatch.setenv("COLUMNS", "400")
    assert command(*(argument.format(run=run_dir) for argument in arguments)) == 2
    assert re.search(words, capsys.readouterr().err, re.DOTALL)
    assert sorted(p.name for p in run_dir.iterdir()) == ["config.yaml", "summary.json"]


@pytest.mark.parametrize(
    "error",
    [InvalidValue("a", 1, "b"), LedgerError("torn"), ValueError("v"), KeyError("digest"), TypeError("t"), OSError("o"),
     IndexError("i"), AttributeError("a"), ZeroDivisionError("z"), OverflowError("o"), RecursionError("r"),
     UnicodeDecodeError("utf-8", b"x", 0, 1, "u"), ValueError()],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_a_check_that_stumbles_has_failed_and_the_others_are_asked(error: Exception, run_dir: Path) -> None:
    def stumble(_: Evidence) -> Finding:
        raise error

    asked = [check("first", "plan", stumble), check("second", "plan", PASS)]
    found = run_checks(read(run_dir), asked, lambda *_: None)
    assert [answer.status for answer in found.answers] == ["fail", "pass"]
    assert type(error).__name__ in found.answers[0].reason
    assert found.exit_code == 1


def test_an_interruption_ends_the_audit(run_dir: Path) -> None:
    def interrupted(_: Evidence) -> Finding:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_checks(read(run_dir), [check("first", "plan", interrupted)], lambda *_: None)


def test_nothing_asked_is_no_yes(run_dir: Path) -> None:
    assert run_checks(read(run_dir), [], lambda *_: None).exit_code == 3
    assert run_checks(read(run_dir), [check("a", "plan", PASS)], lambda *_: None, selected=()).verdict == "not shown"


@pytest.mark.parametrize("status", ["passed", "PASS", "", "skip"])
def test_an_answer_that_is_none_is_no_yes(status: Any, run_dir: Path) -> None:
    odd = check("odd", "plan", Finding(status=status, evidence=("?",)))
    assert run_checks(read(run_dir), [odd, check("a", "plan", PASS)], lambda *_: None).exit_code == 1


# ---------------------------------------------------------------------------------------------- selection


NAMES = st.lists(st.sampled_from(["a", "b", "c", "d", "ledger", "plan"]), max_size=4)


@given(NAMES, NAMES)
@settings(max_examples=200)
def test_selection_is_set_algebra(only: list[str], skip: list[str]) -> None:
    groups = {"a": "ledger", "b": "ledger", "c": "plan", "d": "leakage"}
    checks = [check(name, group, PASS) for name, group in groups.items()]

    def meant(words: Sequence[str]) -> set[str]:
        return {name for name, group in groups.items() if name in words or group in words}

    wanted = (meant(only) if only else set(groups)) - meant(skip)
    if wanted:
        assert select(checks, only, skip) == wanted
    else:
        with pytest.raises(InvalidValue, match="at least one check"):
            select(checks, only, skip)


def test_what_was_not_asked_is_listed_as_such(
    run_dir: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: Evidence) -> Finding:
        raise AssertionError

    given_checks(monkeypatch, PASS, never, never)
    assert command(run_dir, "--only", "check-0") == 0
    found = told(run_dir)
    assert [row["status"] for row in found["checks"]] == ["pass", "not selected", "not selected"]
    assert found["totals"] == {"pass": 1, "fail": 0, "not shown": 0, "not selected": 2}
    assert "2 checks were not made; the verdict says nothing of them" in found["sentence"]


# ---------------------------------------------------------------------------------------------- what it writes


def test_audit_json_keeps_its_form_and_order(
    run_dir: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = passed(
        "Odd.", path=Path("a"), nan=float("nan"), inf=float("inf"), names={"b", "a"}, pair=(1, None), surrogate="\ud800"
    )
    given_checks(monkeypatch, PASS, odd, FAIL)
    command(run_dir)
    first = (run_dir / "audit.json").read_text()
    command(run_dir)
    second = (run_dir / "audit.json").read_text()
    assert re.sub('"finished": "[^"]*"', "", first) == re.sub('"finished": "[^"]*"', "", second)
    assert first == json.dumps(json.loads(first), sort_keys=True, indent=2) + "\n"
    found = json.loads(first, parse_constant=pytest.fail)
    assert sorted(found) == [
        "broken", "checks", "command", "controls", "exit_code", "files", "finished", "format", "sentence", "subject",
        "totals", "verdict", "versions",
    ]  # fmt: skip
    assert found["format"] == "fedcollm-audit-v1"
    assert [row["name"] for row in found["checks"]] == ["check-0", "check-1", "check-2"]
    assert all(
        sorted(row) == ["details", "evidence", "group", "name", "question", "status", "why"] for row in found["checks"]
    )
    assert found["checks"][1]["details"] == {
        "path": "a", "nan": "nan", "inf": "inf", "names": ["a", "b"], "pair": [1, None], "surrogate": "\ud800",
    }  # fmt: skip
    assert sorted(found["subject"]) == ["claim", "private", "run_id", "server", "sites", "unit"]
    assert found["subject"]["run_id"] == "run-7f3a"
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(sorted(row)[:2] == ["cannot_answer", "checks"] for row in found["controls"])


def test_files_are_told_by_their_sha256_and_no_link_or_pipe_is_followed(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "ledgers").mkdir()
    (run_dir / "ledgers" / "a.bin").write_bytes(b"\x00" * 100_000)
    (tmp_path / "secret").write_text("not yours")
    (run_dir / "link").symlink_to(tmp_path / "secret")
    (run_dir / "round").symlink_to(run_dir)
    os.mkfifo(run_dir / "pipe")
    for name in audit.OUTPUTS:
        (run_dir / name).write_text("of an earlier audit")
    (tmp_path / "export.jsonl").write_text("{}\n")
    files = run_checks(
        read(run_dir), [], lambda *_: None, also_read=[tmp_path / "export.jsonl", tmp_path / "gone"]
    ).files
    plain = ("config.yaml", "summary.json", "ledgers/a.bin")
    assert {name: files[name] for name in plain} == {
        name: hashlib.sha256((run_dir / name).read_bytes()).hexdigest() for name in plain
    }
    assert files[str(tmp_path / "export.jsonl")] == hashlib.sha256(b"{}\n").hexdigest()
    assert files["link"] == files["pipe"] == "not read: no plain file"
    assert files[str(tmp_path / "gone")].startswith("not read: No such file")
    assert len(files) == len(plain) + 4


def test_a_link_in_place_of_the_output_is_replaced_and_not_followed(
    run_dir: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_checks(monkeypatch, PASS)
    (tmp_path / "precious").write_text("mine")
    for name in audit.OUTPUTS:
        (run_dir / name).symlink_to(tmp_path / "precious")
    assert command(run_dir, "--html") == 0
    assert (tmp_path / "precious").read_text() == "mine"
    assert not any((run_dir / name).is_symlink() for name in audit.OUTPUTS)


def test_with_out_the_folder_stays_as_it_was(
    run_dir: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_checks(monkeypatch, PASS)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run_dir.iterdir()}
    assert command(run_dir, "--out", tmp_path / "new" / "deep", "--html") == 0
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run_dir.iterdir()} == before
    assert sorted(p.name for p in (tmp_path / "new" / "deep").iterdir()) == ["audit.html", "audit.json"]


def test_the_told_command_asks_the_same_again(
    run_dir: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_checks(monkeypatch, PASS, OPEN, FAIL)
    awkward = tmp_path / "an export's name.jsonl"
    awkward.write_text("{}\n")
    key = public(key_of("governance"))
    code = command(run_dir, "--ledger", awkward, "--governance", key, "--only", "ledger", "--skip", "check-1", "--html")
    first = told(run_dir)
    words = shlex.split(first["command"])
    assert words[0] == "fedcollm-audit"
    assert command(*words[1:]) == code
    assert told(run_dir) | {"finished": ""} == first | {"finished": ""}


def test_html_is_written_only_when_asked_for(
    run_dir: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_checks(monkeypatch, PASS)
    command(run_dir)
    assert not (run_dir / "audit.html").exists()
    command(run_dir, "--html")
    assert "✓ YES" in (run_dir / "audit.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- what it prints


def test_progress_table_verdict_and_code_are_printed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    given_checks(monkeypatch, PASS, FAIL, OPEN)
    monkeypatch.setenv("COLUMNS", "160")
    command(run_dir)
    out = capsys.readouterr().out
    for words in (
        "[1/3] check-0: pass", "[2/3] check-1: fail", "[3/3] check-2: not shown", "It is not.", "Nothing shows it.",
        "No: check-1 failed, of 3 checks made. Do not rely on this run's claims.", "exit code 1",
    ):  # fmt: skip
        assert words in out, words
    assert "In round 3." not in out


def test_texts_from_the_run_cannot_steer_the_terminal(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "[green]pass[/green] \x1b[2J\x1b]0;x\x07 \u202essap [/nothing]"
    given_checks(monkeypatch, failed(evil))
    monkeypatch.setenv("COLUMNS", "160")
    (run_dir / "summary.json").write_text(json.dumps({"run_id": evil}))
    assert command(run_dir) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[green]pass[/green] \ufffd[2J" in out


def test_list_prints_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    printed = CliRunner().invoke(app, ["--list"])
    assert printed.exit_code == 0
    for known in CHECKS:
        assert re.search(rf"{known.name}\s.*{known.group}", printed.stdout), known.name


# ---------------------------------------------------------------------------------------------- the real checks


def test_checks_have_names_groups_questions_and_reasons() -> None:
    names = [known.name for known in CHECKS]
    assert len(set(names)) == len(names) > 20
    groups = list(dict.fromkeys(known.group for known in CHECKS))
    assert groups == ["ledger", "plan", "transcript", "artefacts", "statement", "empirical", "leakage"]
    assert not set(names) & set(groups)
    for known in CHECKS:
        assert re.fullmatch("[a-z]+(-[a-z]+)*", known.name)
        assert known.question.endswith((".", "?"))
        assert len(known.why) > 20


def test_a_sound_run_passes_is_not_spoilt_by_its_audit_and_fails_when_it_is_broken(
    tmp_path: Path, command: Callable[..., int]
) -> None:
    made = build(tmp_path / "run")
    records = ["--skip", "empirical", "--skip", "leakage", "--html"]
    assert command(made.folder, *records) == 0
    first = told(made.folder)
    assert command(made.folder, *records) == 0
    again = told(made.folder)
    statuses = [[row["status"] for row in found["checks"]] for found in (first, again)]
    assert statuses[0] == statuses[1]
    assert again["files"] == first["files"]
    assert next(row["status"] for row in again["checks"] if row["name"] == "no-single-update") == "pass"

    text = (made.folder / "transcript.jsonl").read_text().splitlines()
    (made.folder / "transcript.jsonl").write_text("\n".join(text[:3] + text[4:]) + "\n")
    assert command(made.folder, *records) == 1
    assert "transcript-chain" in told(made.folder)["sentence"]


def test_an_empty_folder_is_audited_and_shows_nothing(tmp_path: Path, command: Callable[..., int]) -> None:
    (tmp_path / "empty").mkdir()
    assert command(tmp_path / "empty", "--html") in (1, 3)
    found = told(tmp_path / "empty")
    assert len(found["checks"]) == len(CHECKS)
    assert not any(row["supported"] for row in found["controls"] if row["source"].startswith(("GDPR", "EU AI")))
    assert "config.yaml" in found["broken"]


def test_the_command_is_installed_under_its_name() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["fedcollm-audit"] == "fedcollm_audits.cli:main"
