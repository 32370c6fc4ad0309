"""The key ceremony as a person types it: from names to a roster that everybody can check."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedcollm_privacy.errors import FedCollmError, InvalidValue, KeyFileError, ProtocolError, SignatureInvalid
from fedcollm_privacy.identity import is_encrypted, load_key, load_public
from fedcollm_privacy.roster import Roster, SignedRoster
from secure_fedcollm.cli import app, main

RUNNER = CliRunner()
PASSPHRASE = "long winding river under stone"


@pytest.fixture(autouse=True)
def no_passphrase_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDCOLLM_PASSPHRASE", raising=False)
    monkeypatch.chdir(tmp_path)


def keys(*arguments: object, typed: str | None = None) -> Result:
    result = RUNNER.invoke(app, ["keys", *map(str, arguments)], input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr("sys.argv", ["fedcollm", "keys", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.fixture
def parties() -> list[str]:
    for name in ("server", "site-2", "site-1", "site-3", "governance"):
        keys("new", name, "--no-passphrase")
    return ["site-2.pub", "site-1.pub", "site-3.pub"]


@pytest.fixture
def signed(parties: list[str]) -> Path:
    keys("roster", "--federation", "clinics", "--server", "server.pub", *parties)
    keys("sign", "roster.json", "--key", "governance.key")
    return Path("roster.signed.json")


def test_the_whole_ceremony_ends_with_a_roster_that_verifies(signed: Path) -> None:
    result = keys("verify", signed, "--governance", "governance.pub")
    assert result.exit_code == 0
    roster = SignedRoster.from_bytes(signed.read_bytes()).verified_by(load_public(Path("governance.pub")), time.time())
    assert roster.site_names == ("site-1", "site-2", "site-3")
    assert roster.server == load_public(Path("server.pub"))
    assert roster.federation == "clinics"
    for name in ("server", "site-1", "site-2", "site-3", "governance"):
        assert load_public(Path(f"{name}.pub")).fingerprint in result.output


def test_a_new_pair_belongs_together_and_says_what_to_do_next(tmp_path: Path) -> None:
    (tmp_path / "safe").mkdir()
    result = keys("new", "site-1", "--out", "safe", "--no-passphrase")
    key = load_key(Path("safe/site-1.key"), None)
    assert load_public(Path("safe/site-1.pub")) == key.public
    assert Path("safe/site-1.key").stat().st_mode & 0o777 == 0o600
    assert key.public.fingerprint in result.output
    assert re.search("NOT encrypted", result.output)
    assert re.search(r"send site-1\.pub to the governance.*phone", result.output)


def test_by_default_the_passphrase_is_asked_twice_and_not_shown() -> None:
    typed = f"{PASSPHRASE}\nanother\n{PASSPHRASE}\n{PASSPHRASE}\n"
    result = keys("new", "site-1", typed=typed)
    assert PASSPHRASE not in result.output
    assert "do not match" in result.output
    assert load_key(Path("site-1.key"), PASSPHRASE.encode()).name == "site-1"
    shown = keys("show", "site-1.key", typed=f"{PASSPHRASE}\n")
    assert PASSPHRASE not in shown.output
    assert "encrypted" in shown.output


def test_without_an_answer_no_key_is_written() -> None:
    assert keys("new", "site-1", typed="").exit_code != 0
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_the_passphrase_of_a_file_the_environment_and_the_keyboard_is_the_same(
    monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    Path("secret").write_bytes((PASSPHRASE + ending).encode())
    keys("new", "site-1", "--passphrase-file", "secret")
    assert keys("show", "site-1.key", typed=f"{PASSPHRASE}\n").exit_code == 0
    monkeypatch.setenv("FEDCOLLM_PASSPHRASE", PASSPHRASE)
    assert keys("show", "site-1.key").exit_code == 0
    keys("new", "site-2")
    assert is_encrypted(Path("site-2.key"))
    monkeypatch.delenv("FEDCOLLM_PASSPHRASE")
    assert keys("show", "site-2.key", "--passphrase-file", "secret").exit_code == 0


def test_an_empty_passphrase_is_refused_wherever_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("empty").write_text("\n")
    with pytest.raises(InvalidValue, match="passphrase"):
        keys("new", "site-1", "--passphrase-file", "empty")
    with pytest.raises(KeyFileError, match="nowhere"):
        keys("new", "site-1", "--passphrase-file", "nowhere")
    monkeypatch.setenv("FEDCOLLM_PASSPHRASE", "")
    with pytest.raises(InvalidValue, match="passphrase"):
        keys("new", "site-1")
    assert not Path("site-1.key").exists()
    assert not Path("site-1.pub").exists()


def test_two_answers_about_the_passphrase_are_refused() -> None:
    Path("secret").write_text(PASSPHRASE)
    with pytest.raises(InvalidValue, match="one of"):
        keys("new", "site-1", "--passphrase-file", "secret", "--no-passphrase")


def test_neither_half_of_a_pair_is_overwritten() -> None:
    for kept, other in (("site-1.key", "site-1.pub"), ("site-1.pub", "site-1.key")):
        Path(kept).write_text("kept")
        with pytest.raises(KeyFileError, match=rf"{kept} exists"):
            keys("new", "site-1", "--no-passphrase")
        assert Path(kept).read_text() == "kept"
        assert not Path(other).exists()
        Path(kept).unlink()


@pytest.mark.parametrize("name", ["../site", "a b", "", ".x"])
def test_a_name_that_is_no_public_name_writes_nothing(name: str) -> None:
    with pytest.raises(InvalidValue, match="name"):
        keys("new", name, "--no-passphrase")
    assert list(Path().iterdir()) == []


def test_show_tells_kind_and_mode_and_refuses_a_bare_key_open_to_others(parties: list[str]) -> None:
    private, public = keys("show", "site-1.key").output, keys("show", "site-1.pub").output
    fingerprint = load_public(Path("site-1.pub")).fingerprint
    assert fingerprint in private
    assert fingerprint in public
    assert "private key, NOT encrypted, mode 0600" in private
    assert "public key" in public
    Path("site-1.key").chmod(0o644)
    with pytest.raises(KeyFileError, match=r"chmod 600 site-1\.key"):
        keys("show", "site-1.key")
    with pytest.raises(KeyFileError, match="nobody"):
        keys("show", "nobody.key")


def test_no_command_prints_the_private_key(parties: list[str]) -> None:
    secret = load_key(Path("governance.key"), None)._private.private_bytes_raw().hex()
    body = Path("governance.key").read_text().splitlines()[2]
    output = keys("show", "governance.key").output
    output += keys("roster", "--federation", "clinics", "--server", "server.pub", *parties).output
    output += keys("sign", "roster.json", "--key", "governance.key").output
    assert secret not in output
    assert body not in output


def test_a_roster_lists_every_fingerprint_and_the_days_it_holds(parties: list[str]) -> None:
    before = int(time.time())
    arguments = ["--federation", "clinics", "--server", "server.pub", "--valid-days", "10", "--out", "list.json"]
    result = keys("roster", *arguments, *parties)
    roster = Roster.from_bytes(Path("list.json").read_bytes())
    assert before + 864_000 <= roster.valid_until <= time.time() + 864_000
    for identity in (roster.server, *roster.sites):
        assert identity.fingerprint in result.output


def test_a_roster_of_two_sites_of_one_twice_or_of_private_keys_is_refused(parties: list[str]) -> None:
    common = ["roster", "--federation", "clinics", "--server", "server.pub"]
    with pytest.raises(InvalidValue, match="3 to"):
        keys(*common, *parties[:2])
    with pytest.raises(InvalidValue, match="site-2"):
        keys(*common, *parties, parties[0])
    with pytest.raises(InvalidValue, match="server"):
        keys(*common, *parties, "server.pub")
    with pytest.raises(KeyFileError, match=r"NAME\.pub"):
        keys(*common, *parties, "governance.key")
    assert keys(*common, "--valid-days", "0", *parties).exit_code == 2
    assert not Path("roster.json").exists()


def test_rosters_are_not_overwritten(signed: Path, parties: list[str]) -> None:
    before = Path("roster.json").read_bytes(), signed.read_bytes()
    with pytest.raises(KeyFileError, match="never overwritten"):
        keys("roster", "--federation", "clinics", "--server", "server.pub", *parties)
    with pytest.raises(KeyFileError, match="never overwritten"):
        keys("sign", "roster.json", "--key", "governance.key")
    assert (Path("roster.json").read_bytes(), signed.read_bytes()) == before


def test_signing_with_an_encrypted_key_asks_for_its_passphrase(parties: list[str]) -> None:
    Path("secret").write_text(PASSPHRASE)
    keys("new", "board", "--passphrase-file", "secret")
    keys("roster", "--federation", "clinics", "--server", "server.pub", *parties)
    with pytest.raises(KeyFileError, match="passphrase"):
        keys("sign", "roster.json", "--key", "board.key", typed="wrong\n")
    assert not Path("roster.signed.json").exists()
    keys("sign", "roster.json", "--key", "board.key", "--out", "one.json", typed=f"{PASSPHRASE}\n")
    keys("sign", "roster.json", "--key", "board.key", "--out", "two.json", "--passphrase-file", "secret")
    assert Path("one.json").read_bytes() == Path("two.json").read_bytes()
    assert keys("verify", "one.json", "--governance", "board.pub").exit_code == 0


def test_only_an_unsigned_roster_that_has_not_expired_is_signed(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProtocolError, match=r"roster\.signed\.json"):
        keys("sign", signed, "--key", "governance.key", "--out", "twice.json")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 366 * 86_400)
    with pytest.raises(ProtocolError, match="not valid any more"):
        keys("sign", "roster.json", "--key", "governance.key", "--out", "late.json")
    assert not Path("twice.json").exists()
    assert not Path("late.json").exists()


def test_verify_refuses_another_governance_a_changed_file_and_an_expired_roster(
    signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SignatureInvalid, match="site-1"):
        keys("verify", signed, "--governance", "site-1.pub")
    Path("changed.json").write_bytes(signed.read_bytes().replace(b"clinics", b"klinics"))
    with pytest.raises(SignatureInvalid, match="governance"):
        keys("verify", "changed.json", "--governance", "governance.pub")
    for path in ("roster.json", "nowhere.json", "governance.pub", "governance.key"):
        with pytest.raises(FedCollmError, match=path):
            keys("verify", path, "--governance", "governance.pub")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 366 * 86_400)
    with pytest.raises(ProtocolError, match="not valid any more"):
        keys("verify", signed, "--governance", "governance.pub")


def test_a_roster_that_does_not_hold_exits_with_two_and_one_reason(
    signed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, "verify", str(signed), "--governance", "governance.pub") == 0
    assert "clinics" in capsys.readouterr().out
    assert ended(monkeypatch, "verify", str(signed), "--governance", "site-1.pub") == 2
    told = capsys.readouterr()
    assert "does not hold" in told.err
    assert "Traceback" not in told.err
    assert told.out == ""


def test_every_command_explains_itself() -> None:
    for command in ("new", "show", "roster", "sign", "verify"):
        result = keys(command, "--help")
        assert result.exit_code == 0
        assert len(result.output.split("Usage")[1].split("Options")[0]) > 80
