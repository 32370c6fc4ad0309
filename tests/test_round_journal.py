"""What a site must not forget: each plan answered once, one set signed, shares given once, by whatever process."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcollm_privacy.errors import LedgerError, ProtocolError
from fedcollm_privacy.messages import RoundPlan
from fedcollm_privacy.round_journal import RoundJournal
from fedcollm_privacy.secure_sum_messages import SignedPlan, UnmaskShares
from fedcollm_privacy.wire import decode, encode

from .secure_sums import Round, digest, random_grids, round_plan

SET, OTHER_SET = digest("these survivors"), digest("others")

Do = Callable[[str, RoundPlan, str], None]


def plan(**changes: Any) -> RoundPlan:
    return round_plan(**({"nonce": digest(str(sorted(changes.items())))} | changes))


def in_this_object(path: Path) -> Do:
    """One journal, open all the time."""
    journal = RoundJournal(path)

    def do(call: str, chosen: RoundPlan, survivors: str) -> None:
        journal.accept(chosen) if call == "accept" else getattr(journal, call)(chosen, survivors)

    return do


def in_new_objects(path: Path) -> Do:
    """The file is opened anew for every call."""
    return lambda call, chosen, survivors: in_this_object(path)(call, chosen, survivors)


PROGRAM = """
import sys
sys.path[:0] = {path!r}
from fedcollm_privacy.errors import LedgerError, ProtocolError
from fedcollm_privacy.round_journal import RoundJournal
from fedcollm_privacy.secure_sum_messages import SignedPlan
from fedcollm_privacy.wire import decode
from pathlib import Path
file, call, *more, plan = sys.argv[1:]
plan = decode(bytes.fromhex(plan), SignedPlan).plan
journal = RoundJournal(Path(file))
print("ready", flush=True)
sys.stdin.readline()
try:
    getattr(journal, call)(plan, *more)
except (ProtocolError, LedgerError) as error:
    print(type(error).__name__, error)
else:
    print("done")
"""


def process(path: Path, call: str, chosen: RoundPlan, survivors: str, program: str = PROGRAM) -> subprocess.Popen[str]:
    """A process of its own that makes this call once a line is written to it."""
    raw = encode(SignedPlan(plan=chosen, signature=b"")).hex()
    more = [] if call == "accept" else [survivors]
    return subprocess.Popen(
        [sys.executable, "-c", program.format(path=sys.path), str(path), call, *more, raw],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(started: subprocess.Popen[str]) -> str:
    out, _ = started.communicate("\n", timeout=60)
    return out.removeprefix("ready\n").strip()


@pytest.fixture(params=[in_this_object, in_new_objects], ids=["open", "reopened"])
def do(request: pytest.FixtureRequest, tmp_path: Path) -> Do:
    """A call on the journal, by a site that never stopped, or that opens the file for every call."""
    made: Do = request.param(tmp_path / "site" / "rounds.sqlite")
    return made


def refused(do: Do, call: str, chosen: RoundPlan, survivors: str = SET, *, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        do(call, chosen, survivors)


def test_a_plan_is_answered_once_and_no_other_of_its_round_and_attempt(do: Do) -> None:
    first = plan()
    do("accept", first, "")
    refused(do, "accept", first, match="answered before")
    refused(do, "accept", plan(nonce="ff"), match="answered before")


def test_rounds_and_attempts_move_forward_only(do: Do) -> None:
    do("accept", plan(server_round=2, attempt=2), "")
    for server_round, attempt in ((2, 1), (2, 2), (1, 9), (1, 1)):
        refused(do, "accept", plan(server_round=server_round, attempt=attempt, nonce="ff"), match="later one")
    do("accept", plan(server_round=2, attempt=3), "")
    do("accept", plan(server_round=4, attempt=1), "")
    refused(do, "accept", plan(server_round=3, attempt=7), match="later one")
    do("accept", plan(run_id="another", server_round=1), "")


def test_one_set_is_signed_in_a_round_and_the_same_again_as_often_as_asked(do: Do) -> None:
    first, second = plan(), plan(attempt=2)
    do("sign", first, SET)
    do("sign", first, SET)
    refused(do, "sign", first, OTHER_SET, match="another survivor set")
    for survivors in (SET, OTHER_SET):  # of another attempt it is another set, whoever is in it
        refused(do, "sign", second, survivors, match="another survivor set")
    do("sign", first, SET)
    do("sign", plan(server_round=2), OTHER_SET)


def test_shares_are_given_once_a_round_whatever_the_attempt(do: Do) -> None:
    first, second = plan(), plan(attempt=2)
    do("sign", first, SET)
    do("unmask", first, SET)
    refused(do, "unmask", first, match="given before")
    refused(do, "unmask", second, match="not signed")
    next_round = plan(server_round=2)
    do("sign", next_round, SET)
    do("unmask", next_round, SET)
    other_run = plan(run_id="another")
    do("sign", other_run, SET)
    do("unmask", other_run, SET)


def test_shares_are_given_for_the_signed_set_only_and_a_refusal_uses_nothing_up(do: Do) -> None:
    first = plan()
    refused(do, "unmask", first, match="not signed")
    do("sign", first, SET)
    refused(do, "unmask", first, OTHER_SET, match="not signed")
    refused(do, "unmask", plan(attempt=2), match="not signed")
    do("unmask", first, SET)


def test_a_signed_round_is_over_and_so_are_those_before_it(do: Do) -> None:
    """Whether or not this site is asked for its shares: those of the others may do to open the sum."""
    third = plan(server_round=3)
    do("accept", third, "")
    do("sign", third, SET)
    for server_round, attempt in ((3, 1), (3, 2), (2, 5), (1, 1)):
        refused(
            do, "accept", plan(server_round=server_round, attempt=attempt, nonce="ff"), match="may have been opened"
        )
    do("accept", plan(server_round=4), "")


def test_a_restarted_process_remembers_it_all(tmp_path: Path) -> None:
    path, first, second = tmp_path / "rounds.sqlite", plan(), plan(attempt=2)
    for call, chosen, survivors, says in (
        ("accept", first, "", "done"),
        ("accept", first, "", "answered before"),
        ("sign", first, SET, "done"),
        ("sign", first, OTHER_SET, "another survivor set"),
        ("unmask", first, OTHER_SET, "not signed"),
        ("unmask", first, SET, "done"),
        ("unmask", first, SET, "given before"),
        ("accept", second, "", "may have been opened"),
    ):
        said = answer(process(path, call, chosen, survivors))
        assert says in said, (call, said)
        assert said.startswith("ProtocolError" if says != "done" else "done")


CALLS = st.tuples(
    st.sampled_from(["accept", "sign", "unmask"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["00", "ff"]),
    st.sampled_from([SET, OTHER_SET]),
)


class Model:
    """The rules as sets, without a data base."""

    def __init__(self) -> None:
        self.accepted: set[tuple[int, int]] = set()
        self.signed: dict[int, tuple[str, str]] = {}
        self.unmasked: set[int] = set()

    def __call__(self, call: str, chosen: RoundPlan, survivors: str) -> bool:
        place = (chosen.server_round, chosen.attempt)
        if call == "accept":
            allowed = all(place > known for known in self.accepted)
            allowed &= all(chosen.server_round > known for known in self.signed)
            self.accepted |= {place} if allowed else set()
        elif call == "sign":
            this = (chosen.digest, survivors)
            allowed = self.signed.setdefault(chosen.server_round, this) == this
        else:
            allowed = self.signed.get(chosen.server_round) == (chosen.digest, survivors)
            allowed &= chosen.server_round not in self.unmasked
            self.unmasked |= {chosen.server_round} if allowed else set()
        return allowed


@settings(max_examples=40)
@given(st.lists(CALLS, max_size=20))
def test_every_sequence_of_calls_goes_by_the_rules(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[str, int, int, str, str]]
) -> None:
    path, model = tmp_path_factory.mktemp("journal") / "rounds.sqlite", Model()
    for call, server_round, attempt, nonce, survivors in calls:
        chosen = round_plan(server_round=server_round, attempt=attempt, nonce=nonce)
        try:
            in_new_objects(path)(call, chosen, survivors)
        except ProtocolError:
            allowed = False
        else:
            allowed = True
        assert allowed is model(call, chosen, survivors)


@pytest.mark.parametrize(("call", "refusal"), [("unmask", "given before"), ("accept", "answered before")])
def test_of_two_processes_at_once_exactly_one_gets_through(tmp_path: Path, call: str, refusal: str) -> None:
    path = tmp_path / "rounds.sqlite"
    for server_round in (1, 2):
        chosen = plan(server_round=server_round)
        if call == "unmask":
            RoundJournal(path).sign(chosen, SET)
        racers = [process(path, call, chosen, SET) for _ in range(2)]
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:  # both are let go before either is waited for
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        said = sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)
        assert said[1] == "done", said
        assert said[0].startswith("ProtocolError")
        assert refusal in said[0]


def test_two_sets_at_once_leave_one_signed(tmp_path: Path) -> None:
    path, chosen = tmp_path / "rounds.sqlite", plan()
    racers = {chosen_set: process(path, "sign", chosen, chosen_set) for chosen_set in (SET, OTHER_SET)}
    for racer in racers.values():
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    said = {chosen_set: answer(racer) for chosen_set, racer in racers.items()}
    (won,) = (chosen_set for chosen_set, text in said.items() if text == "done")
    (lost,) = {SET, OTHER_SET} - {won}
    assert "another survivor set" in said[lost]
    RoundJournal(path).unmask(chosen, won)


CALLS_ON = [
    lambda journal: journal.accept(plan(server_round=2)),
    lambda journal: journal.sign(plan(server_round=2), SET),
    lambda journal: journal.unmask(plan(), SET),
]


@pytest.fixture
def journal(tmp_path: Path) -> RoundJournal:
    made = RoundJournal(tmp_path / "rounds.sqlite")
    made.accept(plan())
    made.sign(plan(), SET)
    return made


@pytest.mark.parametrize("call", CALLS_ON, ids=["accept", "sign", "unmask"])
@pytest.mark.parametrize("content", [b"", b"not a data base at all" * 100, bytes(4096)], ids=["empty", "text", "zeros"])
def test_a_journal_that_was_damaged_answers_nothing(
    journal: RoundJournal, tmp_path: Path, call: Callable[[RoundJournal], None], content: bytes
) -> None:
    (tmp_path / "rounds.sqlite").write_bytes(content)
    with pytest.raises(LedgerError, match=r"rounds\.sqlite cannot be used.*nothing is answered"):
        call(journal)


@pytest.mark.parametrize("call", CALLS_ON, ids=["accept", "sign", "unmask"])
def test_a_journal_whose_pages_were_damaged_answers_nothing(
    journal: RoundJournal, tmp_path: Path, call: Callable[[RoundJournal], None]
) -> None:
    path = tmp_path / "rounds.sqlite"
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xa5" * (len(whole) - 4096))
    with pytest.raises(LedgerError, match="nothing is answered"):
        call(journal)


@pytest.mark.parametrize("call", CALLS_ON, ids=["accept", "sign", "unmask"])
def test_a_journal_that_cannot_be_written_answers_nothing(
    journal: RoundJournal, monkeypatch: pytest.MonkeyPatch, call: Callable[[RoundJournal], None]
) -> None:
    real = sqlite3.connect

    def read_only(path: Path, **more: Any) -> sqlite3.Connection:
        return real(f"file:{path}?mode=ro", uri=True, **more)  # file permissions do not stop root

    monkeypatch.setattr("fedcollm_privacy.durable.sqlite3.connect", read_only)
    with pytest.raises(LedgerError, match="readonly"):
        call(journal)
    monkeypatch.undo()
    call(journal)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file_is_refused_when_it_is_opened(journal: RoundJournal, tmp_path: Path) -> None:
    (tmp_path / "rounds.sqlite").chmod(0o400)
    with pytest.raises(LedgerError, match="cannot be opened or made"):
        RoundJournal(tmp_path / "rounds.sqlite")


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    RoundJournal(tmp_path / "site" / "rounds.sqlite")
    assert (tmp_path / "site" / "rounds.sqlite").stat().st_mode & 0o777 == 0o600


def test_what_is_no_file_or_no_data_base_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be opened or made"):
        RoundJournal(tmp_path)
    (tmp_path / "text").write_text("a text, and long enough to be one" * 100)
    with pytest.raises(LedgerError, match="cannot be used as a round journal"):
        RoundJournal(tmp_path / "text")


def test_it_is_on_disk_before_the_call_returns(tmp_path: Path) -> None:
    """A process killed at once after the call has given its shares, as far as the next one knows."""
    path, chosen = tmp_path / "rounds.sqlite", plan()
    program = PROGRAM.replace('    print("done")', "    import os; os.kill(os.getpid(), 9)")
    RoundJournal(path).sign(chosen, SET)
    killed = process(path, "unmask", chosen, SET, program)
    assert answer(killed) == ""
    assert killed.returncode == -9
    with pytest.raises(ProtocolError, match="given before"):
        RoundJournal(path).unmask(chosen, SET)


def test_no_secret_stands_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a whole round with a lost site: only names, numbers and digests, none of the shares that were given."""
    drawn: list[bytes] = []
    real = os.urandom

    def noting(size: int) -> bytes:
        drawn.append(real(size))
        return drawn[-1]

    monkeypatch.setattr("fedcollm_privacy.contributor.os.urandom", noting)
    a_round = Round.of(tmp_path, random_grids(4, 5))
    a_round.channel.bend = lambda operation, site, body: None if (operation, site) == ("upload", "s03") else body
    answers = a_round.channel.log
    a_round.run(max_colluding=0)
    a_round.close()
    unmasked = [decode(body or b"", UnmaskShares) for operation, _, body in answers if operation == "unmask"]
    shares = [share for message in unmasked for share in (*message.self_shares, *message.mask_shares)]
    private = [key._private.private_bytes_raw() for key in a_round.parties.sites.values()]
    assert len(drawn) == 4
    assert len(shares) == 3 * 4
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        for secret in (*drawn, *shares, *private):
            assert secret not in content
            assert secret.hex().encode() not in content
        with sqlite3.connect(path) as db:
            tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            values = [value for table in tables for row in db.execute(f"SELECT * FROM {table}") for value in row]
        db.close()
        assert values
        assert all(isinstance(value, int) or re.fullmatch("[0-9a-f]{64}|r", value) for value in values)
