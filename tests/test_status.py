"""The status board: totals are exact under many threads, the file always parses, and a dead process is called dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from fedcollm_privacy.errors import ConfigError, FedCollmError, InvalidValue
from fedcollm_privacy.messages import Settlement
from secure_fedcollm.rounds import RoundOutcome, State
from secure_fedcollm.snapshot import ROUND_SECONDS, Snapshot, read_status, write_status
from secure_fedcollm.status import HISTORY, OPERATIONS, STATES, StatusBoard
from secure_fedcollm.status_table import show, status

SITES = ("ward-a", "ward-b", "ward-c")
NOTHING = State(slm=np.zeros(1, np.float32), llm=np.zeros(1, np.float32))


@dataclass(frozen=True, kw_only=True)
class Event:
    site: str
    operation: str = "train"
    state: str = "answered"
    seconds: float = 1.5
    bytes_out: int = 0
    bytes_in: int = 0


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def board(tmp_path: Path) -> Iterator[StatusBoard]:
    made = StatusBoard(tmp_path / "status.json", "server", "hub", federation="north")
    made.begin("run-1", 5, SITES, epsilon=3.0, delta=1e-5)
    yield made
    made.close()


def settlement(site: str, epsilon: float, **changes: Any) -> Settlement:
    fields = {"private": True, "charged": 3.0, "delta": 1e-5, "unit": "person", "steps": 7, "clipped_fraction": 0.25}
    return Settlement(site=site, epsilon=epsilon, **(fields | changes))


def ended(outcome: str = "opened", **changes: Any) -> RoundOutcome:
    return RoundOutcome(outcome=outcome, state=NOTHING, **changes)


def site_of(snapshot: Snapshot, name: str) -> Any:
    return next(site for site in snapshot.sites if site.name == name)


def test_totals_are_exact_when_many_threads_tell_the_board(board: StatusBoard, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    told = [
        [
            Event(
                site=str(rng.choice(SITES)),
                operation=str(rng.choice(OPERATIONS[:13])),
                state=str(rng.choice(STATES)),
                bytes_out=int(rng.integers(0, 10**6)),
                bytes_in=int(rng.integers(0, 10**6)),
            )
            for _ in range(1500)
        ]
        for _ in range(8)
    ]
    threads = [threading.Thread(target=lambda mine=mine: [board.observe(event) for event in mine]) for mine in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    board.close()

    counted = [event for mine in told for event in mine if event.state != "asked"]
    found = read_status(tmp_path / "status.json")
    for name in SITES:
        site = site_of(found, name)
        assert site.bytes_up == site.round_bytes_up == sum(e.bytes_in for e in counted if e.site == name)
        assert site.bytes_down == site.round_bytes_down == sum(e.bytes_out for e in counted if e.site == name)
    expected = Counter((e.operation, e.state) for e in counted)
    assert {(r.operation, r.state): r.count for r in found.requests} == expected


def test_the_file_parses_at_every_moment_while_it_is_written(board: StatusBoard, tmp_path: Path) -> None:
    path, stop = tmp_path / "status.json", threading.Event()
    board.round_done(ended())

    def tell() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            board.observe(Event(site=SITES[number % 3], bytes_in=number))
            board.round_done(ended(left_out={SITES[number % 3]: "x" * (number % 1000)}))

    writers = [threading.Thread(target=tell) for _ in range(3)]
    for writer in writers:
        writer.start()
    seen = [read_status(path) for _ in range(60)]
    stop.set()
    for writer in writers:
        writer.join()
    board.close()  # its own thread may be writing still
    opened = [snapshot.opened for snapshot in seen]
    assert opened == sorted(opened)
    assert opened[-1] > opened[0]
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_a_round_that_ends_is_on_disk_at_once(board: StatusBoard, tmp_path: Path) -> None:
    board.round(1, 1)
    board.observe(Event(site="ward-a", bytes_in=10, bytes_out=4))
    outcome = ended(
        cohort=("ward-a", "ward-b"),
        left_out={"ward-c": "no answer"},
        settlements=(settlement("ward-a", 0.75), settlement("ward-b", 0.5)),
    )
    board.round_done(outcome)

    found = read_status(tmp_path / "status.json")
    assert (found.opened, found.lost, found.rounds) == (1, 0, 5)
    (past,) = found.history
    assert past.cohort == ("ward-a", "ward-b")
    assert [(left.site, left.code) for left in past.left_out] == [("ward-c", "no answer")]
    assert (past.bytes_up, past.bytes_down) == (10, 4)
    assert site_of(found, "ward-a").epsilon == 0.75
    assert site_of(found, "ward-b").epsilon == 0.5
    assert site_of(found, "ward-c").epsilon is None
    assert site_of(found, "ward-c").code == "no answer"
    assert site_of(found, "ward-a").train_seconds == 1.5


def test_bytes_of_the_round_start_at_zero_and_totals_do_not(board: StatusBoard) -> None:
    board.round(1, 1)
    board.observe(Event(site="ward-a", bytes_in=10, bytes_out=4))
    board.round(2, 1)
    board.observe(Event(site="ward-a", bytes_in=1, bytes_out=2))
    site = site_of(board.snapshot(), "ward-a")
    assert (site.bytes_up, site.bytes_down) == (11, 6)
    assert (site.round_bytes_up, site.round_bytes_down) == (1, 2)


@given(
    told=st.lists(
        st.tuples(st.sampled_from(OPERATIONS[:13]), st.sampled_from(("answered", "declined", "no answer", "failed")))
    )
)
def test_a_sites_standing_is_what_it_said_last(told: list[tuple[str, str]], tmp_path_factory: Any) -> None:
    board = StatusBoard(tmp_path_factory.mktemp("board") / "status.json", "server", "hub")
    board.begin("run", 1, SITES)
    for operation, state in told:
        board.observe(Event(site="ward-a", operation=operation, state=state))
    found = site_of(board.snapshot(), "ward-a").standing
    board.close()

    expected = "unknown"
    for operation, state in told:  # what was agreed; being away neither gives nor takes it
        if operation in ("offer", "advertise") and state == "declined":
            expected = "declined"
        if operation in ("advertise", "share", "accept", "train") and state == "answered":
            expected = "joined"
        if operation == "offer" and state == "answered" and expected != "joined":
            expected = "waiting"
    if told and told[-1][1] == "no answer":
        expected = "away"
    assert found == expected


def test_an_enlisted_site_is_what_its_answer_says(board: StatusBoard) -> None:
    board.enlisted("ward-a", "waiting")
    board.enlisted("ward-b", "joined")
    assert [site.standing for site in board.snapshot().sites] == ["waiting", "joined", "unknown"]
    with pytest.raises(InvalidValue, match="standing"):
        board.enlisted("ward-a", "perhaps")


def test_only_the_last_rounds_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    clock = Clock(1000.0)
    board = StatusBoard(tmp_path / "status.json", "server", "hub", clock=clock)
    board.begin("run", HISTORY + 9, SITES)
    durations = [float(seconds) for seconds in np.random.default_rng(1).exponential(500, HISTORY + 9)]
    for number, seconds in enumerate(durations, start=1):
        board.round(number, 1)
        clock.now += seconds
        board.round_done(ended("lost" if number % 4 == 0 else "opened", reason="too few"))
    found = board.snapshot()
    board.close()
    assert [past.server_round for past in found.history] == list(range(10, HISTORY + 10))
    assert found.opened + found.lost == HISTORY + 9
    assert found.lost == (HISTORY + 9) // 4
    edges = [-1.0, *ROUND_SECONDS, np.inf]
    brute = [sum(low < s <= high for s in durations) for low, high in pairwise(edges)]
    assert list(found.round_seconds) == brute
    assert found.round_seconds_sum == pytest.approx(sum(durations))


def test_what_was_written_is_what_is_read(board: StatusBoard, tmp_path: Path) -> None:
    board.round(1, 2)
    board.stage("load")
    board.stage("distil")
    snapshot = board.snapshot()
    write_status(tmp_path / "copy.json", snapshot)
    assert read_status(tmp_path / "copy.json", lambda: snapshot.written) == snapshot


def test_a_process_that_starts_again_takes_up_what_was_told_of_the_same_run(board: StatusBoard, tmp_path: Path) -> None:
    board.round(1, 1)
    board.round_done(ended(settlements=(settlement("ward-a", 0.75),)))
    board.close()
    again = StatusBoard(tmp_path / "status.json", "server", "hub")
    again.begin("run-1", 5, SITES)
    found = again.snapshot()
    assert (found.opened, len(found.history), site_of(found, "ward-a").epsilon) == (1, 1, 0.75)
    assert (found.server_round, found.outcomes) == (0, ())
    again.close()
    other = StatusBoard(tmp_path / "status.json", "server", "hub")
    other.begin("run-2", 5, SITES)
    found = other.snapshot()
    assert (found.opened, found.history, site_of(found, "ward-a").epsilon) == (0, (), None)
    (tmp_path / "status.json").write_text("{}")
    other.begin("run-2", 5, SITES)
    other.close()


def test_nothing_but_public_facts_of_a_settlement_is_shown(board: StatusBoard) -> None:
    board.round_done(ended(settlements=(settlement("ward-a", 0.75, clipped_fraction=0.4321, steps=1234567),)))
    text = board.snapshot().to_bytes().decode()
    assert "0.75" in text
    assert "4321" not in text
    assert "1234567" not in text


def test_a_non_private_site_has_no_epsilon(board: StatusBoard) -> None:
    none = settlement("ward-a", -1.0, private=False, charged=-1.0, delta=0.0, unit="none")
    board.round_done(ended(settlements=(none,)))
    assert site_of(board.snapshot(), "ward-a").epsilon is None


def _gone() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


CHANGES: list[tuple[str, Callable[[Snapshot], Snapshot], float, str]] = [
    ("fresh", lambda s: s, 5.0, ""),
    ("hangs", lambda s: s, 31.0, "has written nothing for 31 s"),
    ("hangs long", lambda s: s, 600.0, "has written nothing for 10 min"),
    ("gone", lambda s: replace(s, pid=_gone()), 1.0, "gone"),
    ("another process has its number", lambda s: replace(s, since=s.since - 10**6), 1.0, "gone"),
    ("clock set back", lambda s: s, -100.0, "clock was set back"),
    ("finished", lambda s: replace(s, state="finished", pid=_gone()), 10**6, ""),
]


@pytest.mark.parametrize(("change", "later", "trouble"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_a_reader_is_told_when_nobody_writes_any_more(
    change: Callable[[Snapshot], Snapshot], later: float, trouble: str, board: StatusBoard, tmp_path: Path
) -> None:
    snapshot = change(board.snapshot())
    write_status(tmp_path / "other.json", snapshot)
    found = read_status(tmp_path / "other.json", lambda: snapshot.written + later).trouble
    assert trouble in found
    assert bool(trouble) == bool(found)


BROKEN = {
    "empty": (b"", "status"),
    "no JSON": (b"{", "status"),
    "a list": (b"[]", "a JSON object"),
    "nested without end": (b"[" * 100_000, "status"),
    "another format": ("format", "v0"),
    "another role": ("role", "root"),
    "unknown standing": ("sites.standing", "king"),
    "negative bytes": ("sites.bytes_up", -1),
    "text for a number": ("since", "now"),
    "not a number": ("written", float("nan")),
    "a class too few": ("round_seconds", [0]),
    "no process": ("pid", 0),
}


@pytest.mark.parametrize(("field", "value"), BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_says_something_impossible_is_refused(
    field: str | bytes, value: Any, board: StatusBoard, tmp_path: Path
) -> None:
    path = tmp_path / "broken.json"
    if isinstance(field, bytes):
        path.write_bytes(field)
        named = value
    else:
        tree: Any = json.loads(board.snapshot().to_bytes())
        place, _, inner = field.rpartition(".")
        (tree[place][0] if place else tree)[inner] = value
        path.write_text(json.dumps(tree))
        named = inner
    with pytest.raises(InvalidValue, match=named):
        read_status(path)


def test_a_missing_field_and_an_unknown_one_are_named(board: StatusBoard, tmp_path: Path) -> None:
    tree = json.loads(board.snapshot().to_bytes())
    path = tmp_path / "other.json"
    path.write_text(json.dumps(tree | {"secret": 1}))
    with pytest.raises(ConfigError, match="secret"):
        read_status(path)
    del tree["phase"]
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="phase"):
        read_status(path)
    with pytest.raises(FedCollmError, match="does not exist"):
        read_status(tmp_path / "none.json")


def test_a_board_that_cannot_write_says_so_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board = StatusBoard(tmp_path / "missing" / "status.json", "server", "hub")
    board.begin("run", 1, SITES)
    board.round_done(ended())
    board.round_done(ended())
    assert board.snapshot().opened == 2
    assert sum("cannot be written" in record.message for record in caplog.records) == 1
    (tmp_path / "missing").mkdir()
    board.close()
    assert read_status(tmp_path / "missing" / "status.json").opened == 2


def test_a_file_is_written_without_a_rounds_end_too(tmp_path: Path) -> None:
    board = StatusBoard(tmp_path / "status.json", "server", "hub")
    board.begin("run", 1, SITES)
    board.observe(Event(site="ward-a", bytes_in=7))
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        if (tmp_path / "status.json").exists():
            found = read_status(tmp_path / "status.json")
            if found.sites and found.sites[0].bytes_up == 7:
                break
        time.sleep(0.02)
    board.close()
    assert found.sites[0].bytes_up == 7


def text_of(snapshot: Snapshot, width: int = 160) -> str:
    console = Console(width=width, record=True, file=StringIO(), highlight=False)
    show(snapshot, console)
    return console.export_text()


def test_the_table_says_what_to_do_about_each_site(board: StatusBoard) -> None:
    board.round(3, 1)
    board.observe(Event(site="ward-a", operation="offer"))
    board.observe(Event(site="ward-b", operation="offer", state="declined"))
    board.observe(Event(site="ward-c", operation="train", state="no answer"))
    text = " ".join(text_of(board.snapshot()).split())
    assert "run-1, round 3 of 5" in text
    assert "ward-a: its administrator has to agree: `fedcollm site offers`" in text
    assert "ward-b: its policy or its administrator says no" in text
    assert "ward-c: gives no answer. Is `fedcollm site` running there" in text


def test_the_table_shows_epsilon_rounded_up_beside_its_budget(board: StatusBoard) -> None:
    board.round(1, 1)
    board.round_done(ended(cohort=SITES, settlements=(settlement("ward-a", 1.2301),)))
    row = next(line for line in text_of(board.snapshot()).splitlines() if "ward-a" in line)
    assert "1.24" in row
    assert "3.00" in row


def test_nothing_a_file_holds_steers_the_terminal(board: StatusBoard) -> None:
    hostile = "\x1b[2J[red]x[/red]\u202e"
    snapshot = board.snapshot()
    sites = tuple(replace(site, name=hostile, state=hostile, code=hostile) for site in snapshot.sites)
    text = text_of(replace(snapshot, sites=sites, run_id=hostile, federation=hostile, failure=hostile, state="failed"))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]x[/red]" in text


def test_a_sites_own_status_shows_its_budgets_and_the_server_never_has_them(tmp_path: Path) -> None:
    board = StatusBoard(tmp_path / "status.json", "site", "ward-a")
    budget = {"data_set": "notes", "epsilon": 1.5, "cap_epsilon": 4.0, "delta": 1e-5, "cap_delta": 1e-4, "days": 365}
    board.site(
        {
            "run": "run-1",
            "standing": "joined",
            "server_round": 4,
            "operation": "train",
            "refusals": 2,
            "paused": False,
            "budgets": [budget],
        }
    )
    snapshot = board.snapshot()
    board.close()
    assert snapshot.own is not None
    assert [asdict(b) for b in snapshot.own.budgets] == [budget]
    text = text_of(snapshot)
    assert "takes part in run run-1" in text
    assert "2.5" in text
    assert "any 365 days" in text


def test_a_status_that_a_site_cannot_give_is_said_and_stops_nothing(tmp_path: Path) -> None:
    board = StatusBoard(tmp_path / "status.json", "site", "ward-a")
    board.site({"refusals": "many"})
    board.close()
    assert "refusals" in text_of(read_status(tmp_path / "status.json"))


def test_the_command_prints_json_and_its_exit_status_tells_trouble(board: StatusBoard, tmp_path: Path) -> None:
    app = Typer()
    app.command()(status)
    (tmp_path / "state").mkdir()
    path = tmp_path / "state" / "status.json"
    write_status(path, board.snapshot())
    runner = CliRunner()
    good = runner.invoke(app, ["--kit", str(tmp_path), "--json"])
    assert good.exit_code == 0
    assert json.loads(good.output)["run_id"] == "run-1"
    write_status(path, replace(board.snapshot(), pid=_gone()))
    bad = runner.invoke(app, ["--kit", str(tmp_path)])
    assert bad.exit_code == 1
    assert "NOT RUNNING OR NOT WELL" in bad.output
