"""`fedcollm ledger` as a person types it: look, check, take elsewhere, give a run up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedcollm_privacy.errors import KeyFileError, LedgerError
from fedcollm_privacy.identity import save_key, save_public
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.tree_heads import HeadRequest, countersigned
from secure_fedcollm.cli import app, main

from .ledgers import PLAN, commit, filled, key_of, kinds, path_in, private_of, rechained, reserve, settle
from .test_ledger_file import old_file

RUNNER = CliRunner()
NORTH, SERVER = key_of("north"), key_of("server")


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDCOLLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEDCOLLM_PASSPHRASE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def invoked(*arguments: object) -> Result:
    result = RUNNER.invoke(app, ["ledger", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def said(*arguments: object) -> str:
    result = invoked(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def refused(*arguments: object) -> str:
    result = invoked(*arguments)
    assert result.exit_code == 1, result.output
    return " ".join(result.output.split())


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Six entries, the first of them counter-signed; the site's keys lie beside it."""
    ledger = filled(tmp_path)
    witnessed(ledger)
    save_key(NORTH, tmp_path / "north.key", None)
    save_public(NORTH.public, tmp_path / "north.pub")
    save_public(key_of("north", "another secret").public, tmp_path / "other.pub")
    return ledger


def witnessed(ledger: Ledger) -> None:
    head = ledger.file.show_head(HeadRequest(run_id="run-1", server_round=2, tree_size=0), NORTH)
    ledger.file.keep_head(countersigned(head, SERVER), SERVER.public)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def export_of(ledger: Ledger, tmp_path: Path) -> Path:
    ledger.file.export(tmp_path / "export.jsonl")
    return tmp_path / "export.jsonl"


# ---------------------------------------------------------------- show


def test_show_prints_every_entry_and_the_last_counter_signed_head(ledger: Ledger, tmp_path: Path) -> None:
    shown = said("show", path_in(tmp_path))
    assert "site north" in shown
    for entry in ledger.entries():
        assert entry["kind"] in shown
        assert entry["digest"][:12] in shown
    assert f"{PLAN.epsilon(6):.4f}" in shown
    assert "included" in shown
    assert "counter-signed by the server up to entry 6 (run run-1, round 2)" in shown
    assert ledger.file.commitment("notes") not in shown


def test_show_says_when_no_server_has_seen_the_ledger(tmp_path: Path) -> None:
    filled(tmp_path)
    assert "no server has counter-signed this ledger yet" in said("show", path_in(tmp_path))


def test_show_needs_no_key_and_reads_old_files(tmp_path: Path) -> None:
    old_file(tmp_path)
    shown = said("show", path_in(tmp_path))
    assert "PLAN" in shown
    assert LedgerFile(path_in(tmp_path)).identity is None


# ---------------------------------------------------------------- verify


def test_verify_says_who_signed_and_what_to_compare(ledger: Ledger, tmp_path: Path) -> None:
    for path in (path_in(tmp_path), export_of(ledger, tmp_path)):
        answer = said("verify", path)
        assert "6 entries, the chain holds; 6 signed by north" in answer
        assert NORTH.public.fingerprint in answer
        assert "1 heads counter-signed" in answer
        assert "Compare the key with the roster, or give --key" in answer
        pinned = said("verify", path, "--key", "north.pub")
        assert "6 signed by north" in pinned
        assert "Compare" not in pinned


def test_verify_counts_older_entries_as_unsigned(tmp_path: Path) -> None:
    old_file(tmp_path)
    assert "3 entries, the chain holds; 3 older entries have no signature" in said("verify", path_in(tmp_path))
    ledger = Ledger(path_in(tmp_path), NORTH)
    commit(ledger, "run-1")
    answer = said("verify", export_of(ledger, tmp_path))
    assert "4 entries" in answer
    assert "1 signed by north" in answer
    assert "3 older entries have no signature" in answer


def test_verify_against_another_key_fails(ledger: Ledger, tmp_path: Path) -> None:
    for path in (path_in(tmp_path), export_of(ledger, tmp_path)):
        answer = refused("verify", path, "--key", "other.pub")
        assert "entry 1: not signed by the site's key" in answer
        assert "it names another key than other.pub" in answer


def test_verify_names_an_altered_entry(ledger: Ledger, tmp_path: Path) -> None:
    lines = lines_of(export_of(ledger, tmp_path))
    lines[1]["epsilon"] = 0.1
    assert "entry 1: content does not match its digest" in refused("verify", write(tmp_path / "x.jsonl", lines))


def test_verify_finds_a_chain_made_anew_without_the_key(ledger: Ledger, tmp_path: Path) -> None:
    lines = lines_of(export_of(ledger, tmp_path))
    lines[1]["epsilon"] = 0.1
    opening, entries, heads = lines[:1], lines[1:-1], lines[-1:]
    forged = write(tmp_path / "x.jsonl", opening + rechained(entries) + heads)
    assert "entry 1: not signed by the site's key" in refused("verify", forged)
    # With a key of the forger's own, and its name in the first line, the pinned key finds it.
    stranger = {"public_key": key_of("north", "forger").public.public_key.hex()}
    signed = [{**entry, "schema": 2} for entry in rechained(entries, private_of("forger"))]
    assert signed[0]["signature"] != entries[0]["signature"]
    forged = write(tmp_path / "y.jsonl", [opening[0] | stranger, *signed])
    assert "it names another key" in refused("verify", forged, "--key", "north.pub")


@pytest.mark.parametrize("change", ["a root", "the end cut off", "the server's signature", "another ledger", "no key"])
def test_verify_checks_the_counter_signed_heads_of_an_export(ledger: Ledger, tmp_path: Path, change: str) -> None:
    lines = lines_of(export_of(ledger, tmp_path))
    words = "head 1"
    if change == "a root":
        lines[-1]["head"]["tree_root"] = "0" * 64
    elif change == "the end cut off":
        del lines[-2]
        words = "it had 6 entries when the server counter-signed them"
    elif change == "the server's signature":
        lines[-1]["witness"] = "00" * 64
    elif change == "another ledger":
        lines[0]["ledger"] = "0" * 64
        words = "another ledger"
    else:
        lines[0]["public_key"] = None
        words = "it names no key"
    assert words in refused("verify", write(tmp_path / "x.jsonl", lines))


def test_verify_does_not_call_signed_entries_sound_that_it_cannot_check(ledger: Ledger, tmp_path: Path) -> None:
    entries = lines_of(export_of(ledger, tmp_path))[1:-1]
    assert "it names no key" in refused("verify", write(tmp_path / "x.jsonl", entries))
    assert "6 signed by north" in said("verify", tmp_path / "x.jsonl", "--key", "north.pub")


@pytest.mark.parametrize("content", ["{", "[]\n", '{"no": "kind"}\n', "\xff", '{"kind":"LEDGER"}\n', "[" * 100_000])
def test_what_is_no_export_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(LedgerError, match="cannot be read as an export"):
        invoked("verify", tmp_path / "x.jsonl")
    with pytest.raises(LedgerError, match="cannot be read as an export"):
        invoked("verify", tmp_path / "nobody.jsonl")


# ---------------------------------------------------------------- export, import


def test_an_exported_ledger_verifies_and_holds_no_secret(ledger: Ledger, tmp_path: Path) -> None:
    said("export", path_in(tmp_path), tmp_path / "out" / "north.jsonl")
    assert "6 entries" in said("verify", tmp_path / "out" / "north.jsonl", "--key", "north.pub")
    lines = lines_of(tmp_path / "out" / "north.jsonl")
    assert "salt" not in lines[0]
    assert lines[1:-1] == ledger.entries()
    with pytest.raises(LedgerError, match="no salt"):
        invoked("import", tmp_path / "out" / "north.jsonl", tmp_path / "new.sqlite")


def test_a_backup_is_restored_where_there_is_nothing(ledger: Ledger, tmp_path: Path) -> None:
    said("export", path_in(tmp_path), "backup.jsonl", "--backup")
    assert Path("backup.jsonl").stat().st_mode & 0o777 == 0o600
    assert "6 entries of site north restored" in said("import", "backup.jsonl", "new.sqlite")
    assert LedgerFile(Path("new.sqlite")).commitment("notes") == ledger.file.commitment("notes")
    with pytest.raises(LedgerError, match="never overwritten"):
        invoked("import", "backup.jsonl", "new.sqlite")
    with pytest.raises(LedgerError, match="cannot be written"):
        invoked("export", path_in(tmp_path), "backup.jsonl", "--backup")
    with pytest.raises(LedgerError, match="damaged or no backup"):
        invoked("import", "nobody.jsonl", "newer.sqlite")


# ---------------------------------------------------------------- abort


def test_abort_gives_a_run_up_and_says_what_stays_charged(ledger: Ledger, tmp_path: Path) -> None:
    assert "run run-2 is given up; charged: ε 0.0000, δ 0.0e+00" in said(
        "abort", path_in(tmp_path), "run-2", "--key", "north.key"
    )
    answer = said("abort", path_in(tmp_path), "run-1", "--key", "north.key")
    assert f"charged: ε {PLAN.epsilon(6):.4f}, δ 1.0e-05" in answer
    assert kinds(ledger)[-2:] == ["ABORT", "ABORT"]
    assert "8 signed by north" in said("verify", path_in(tmp_path))
    with pytest.raises(LedgerError, match="given up"):
        invoked("abort", path_in(tmp_path), "run-1", "--key", "north.key")
    with pytest.raises(LedgerError, match="given up"):
        settle(ledger, "run-1", reserve(ledger, "run-1", 3))


def test_abort_needs_the_sites_own_key(ledger: Ledger, tmp_path: Path) -> None:
    before = ledger.entries()
    for name, secret in (("north", "another secret"), ("south", None)):
        save_key(key_of(name, secret), tmp_path / f"{name}-2.key", None)
        with pytest.raises(LedgerError, match=r"another key of north|not of 'south'"):
            invoked("abort", path_in(tmp_path), "run-1", "--key", f"{name}-2.key")
    with pytest.raises(KeyFileError):
        invoked("abort", path_in(tmp_path), "run-1", "--key", "north.pub")
    with pytest.raises(LedgerError, match="has not committed"):
        invoked("abort", path_in(tmp_path), "run-9", "--key", "north.key")
    assert ledger.entries() == before


# ---------------------------------------------------------------- missing and damaged files


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "nobody.sqlite"),
        ("verify", "nobody.sqlite"),
        ("export", "nobody.sqlite", "out.jsonl"),
        ("export", "nobody.sqlite", "out.jsonl", "--backup"),
        ("abort", "nobody.sqlite", "run-1", "--key", "north.key"),
    ],
)
@pytest.mark.usefixtures("ledger")
def test_a_missing_ledger_is_an_error_and_is_not_made(arguments: tuple[str, ...]) -> None:
    with pytest.raises(LedgerError, match="does not exist"):
        invoked(*arguments)
    assert not Path("nobody.sqlite").exists()
    assert not Path("out.jsonl").exists()


def test_an_error_is_one_line_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ledger: Ledger, tmp_path: Path
) -> None:
    path_in(tmp_path).write_bytes(b"this is no database" * 100)
    monkeypatch.setattr("sys.argv", ["fedcollm", "ledger", "show", str(path_in(tmp_path))])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "restore it from a backup" in " ".join(message.split())
    assert "Traceback" not in message
