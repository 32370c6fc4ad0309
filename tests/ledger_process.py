"""A process that spends on a ledger while others race it, or until it is killed.

``python -m tests.ledger_process race`` answers a line on stdin with a line on stdout; ``... crash FOLDER`` lets copies
of itself die one SQL statement later each time, and some at any moment.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedcollm_privacy import cross_checks
from fedcollm_privacy.errors import BudgetExceeded
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.tree_heads import HeadRequest, countersigned

from .ledgers import ADAPTIVE, NOISIER, PLAN, RAN, commit, key_of, upto

SHORT = dataclasses.replace(PLAN, rounds=1)  # every reservation after the first raises the charge
KILLS_AT_ANY_MOMENT = 12
AT_ONCE = 6


def history(folder: Path, note: Callable[[str], None]) -> None:
    """What one site does, each operation noted before and after."""
    north, server = key_of("north"), key_of("server")
    ledger: Any = None
    last: Any = None

    def opened() -> Ledger:
        return Ledger(folder / "north.sqlite", north)

    def reserved(server_round: int) -> Any:
        return ledger.reserve(run_id="run-1", plan=SHORT, server_round=server_round)

    def settled(outcome: str) -> None:
        ledger.settle(run_id="run-1", reservation=last.entry, outcome=outcome, ran=RAN)

    def witnessed() -> None:
        head = ledger.file.show_head(HeadRequest(run_id="run-1", server_round=1, tree_size=0), north)
        ledger.file.keep_head(countersigned(head, server), server.public)

    operations: list[Callable[[], Any]] = [
        opened,
        lambda: commit(ledger, "run-1", SHORT),
        lambda: reserved(1),
        lambda: settled("included"),
        lambda: reserved(2),
        opened,
        lambda: commit(ledger, "run-1", SHORT),
        lambda: reserved(2),  # resumed: settles what was left open
        lambda: settled("lost"),
        lambda: commit(ledger, "run-2", NOISIER),
        lambda: ledger.abort("run-2"),
        witnessed,
        lambda: commit(ledger, "run-3", ADAPTIVE),
        lambda: ledger.reserve_adaptive(run_id="run-3", plan=ADAPTIVE, round_plan=PLAN, server_round=1),
        lambda: ledger.abort("run-3"),  # two entries at once
        lambda: ledger.record_statement(run_id="run-1", statement="5" * 64, epsilon=50.0, delta=1e-5),
        lambda: ledger.file.export(folder / "north.jsonl"),
    ]
    for number, operation in enumerate(operations):
        note(f"begin {number}")
        result = operation()
        if isinstance(result, Ledger):
            ledger = result
        elif hasattr(result, "redeem"):
            last = result
        note(f"done {number}")


def die_before(number: int) -> Callable[[], int]:
    """SIGKILL before SQL statement ``number``, counted over all connections; gives what counts them."""
    seen = 0
    real = sqlite3.connect

    def count(_: str) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = real(*arguments, **options)
        connection.set_trace_callback(count)
        return connection

    sqlite3.connect = connect  # type: ignore[assignment]
    return lambda: seen


def note_in(folder: Path) -> Callable[[str], None]:
    folder.mkdir()
    log = os.open(folder / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    return lambda line: (os.write(log, f"{line}\n".encode()), None)[1]


def states(folder: Path) -> list[list[dict[str, Any]]]:
    """The entries after each operation of an undisturbed history."""
    after: list[list[dict[str, Any]]] = []
    path = folder / "whole" / "north.sqlite"

    def look(line: str) -> None:
        if line.startswith("done"):
            db = sqlite3.connect(path)
            after.append([json.loads(body) for (body,) in db.execute("SELECT body FROM entries ORDER BY seq")])
            db.close()

    (folder / "whole").mkdir()
    history(folder / "whole", look)
    return after


def write_in_halves() -> None:
    """Plants a break: every entry is committed by itself."""
    real = LedgerFile.append

    def append(self: LedgerFile, db: sqlite3.Connection, *arguments: Any) -> str:
        digest = real(self, db, *arguments)
        db.execute("COMMIT")
        db.execute("BEGIN IMMEDIATE")
        return digest

    setattr(LedgerFile, "append", append)  # noqa: B010


def killed(folder: Path, *, before: int = -1, broken: bool = False) -> int:
    """A copy of this process that goes through the history in a new folder; its process id."""
    child = os.fork()
    if child:
        return child
    if broken:
        write_in_halves()
    die_before(before)
    history(folder, note_in(folder))
    os._exit(0)


def crash(folder: Path) -> None:
    (folder / "states.json").write_text(json.dumps(states(folder)))
    started = time.monotonic()
    count = die_before(-1)
    history(folder / "counted", note_in(folder / "counted"))
    took, statements = time.monotonic() - started, count()
    deaths: list[dict[str, Any]] = [{"folder": folder / f"at-{n}", "before": n} for n in range(1, statements + 1)]
    # The operation of two entries is near the end, and the broken one executes more statements.
    late = range(statements - 15, statements + 30)
    deaths += [{"folder": folder / f"broken-{n}", "before": n, "broken": True} for n in late]
    running = 0
    for death in deaths:  # several at once, because each waits for the disk
        killed(**death)
        running += 1
        if running == AT_ONCE:
            os.wait()
            running -= 1
    for _ in range(running):
        os.wait()
    for number in range(KILLS_AT_ANY_MOMENT):
        child = killed(folder / f"moment-{number}")
        time.sleep(took * (number + 1) / (KILLS_AT_ANY_MOMENT + 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(statements)


def race() -> None:
    PLAN.epsilon(8)  # remembered, so that the race is about the ledger
    key = key_of("north")
    print("ready", flush=True)
    for line in sys.stdin:
        what, path, run_id = line.split()
        ledger = Ledger(Path(path), key)
        print("set", flush=True)
        sys.stdin.readline()
        try:
            if what == "commit":
                commit(ledger, run_id, caps=upto(1.5 * PLAN.epsilon(6)))
            else:
                ledger.reserve(run_id="run-1", plan=PLAN, server_round=3)
            answer = "won"
        except BudgetExceeded:
            answer = "refused"
        print(answer, flush=True)


if __name__ == "__main__":
    cross_checks.MAX_PRV_CELLS = 0  # it would load torch, for seconds, and plays no part here
    if sys.argv[1] == "race":
        race()
    else:
        PLAN.epsilon(6)
        crash(Path(sys.argv[2]))
