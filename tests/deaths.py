"""The ``fedcollm server`` command with a schedule of deaths: who is killed, by SIGKILL, in which phase of which round.

``python -m tests.deaths SCHEDULE.json server --kit KIT [overrides]``. The schedule is a list of ``{"round", "phase",
"victim", "kit"}``. Each death happens once, whatever is restarted: a mark beside the schedule says that it has. Nothing
else of the command is changed: the deaths come from a thread while the phase goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

PHASES = ("advertise", "share", "upload", "agree", "unmask", "distil", "broadcast")
# The operation in which a phase takes place; an upload is fetched part by part, the adapter goes out with `train`.
_OPERATION = {"upload": "part", "broadcast": "train"}
VICTIMS = ("server", "site", "server job", "server parent", "site job", "site parent")


def engine_processes(pid: int, kind: str) -> list[psutil.Process]:
    """FLARE's processes below a party's: its ``parent`` or the ``job`` that it started."""
    marks = ("worker_process", "runner_process") if kind == "job" else ("client_train", "server_train")
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = " ".join(child.cmdline())
                if any(mark in line for mark in marks):
                    found.append(child)
    return found


def kill(victim: str, kit: Path) -> list[int]:
    """Kill it now; gives what was killed."""
    pid = int((kit / "state" / "ready").read_text())
    _party, _, kind = victim.partition(" ")
    targets = [psutil.Process(pid)] if not kind else engine_processes(pid, kind)
    killed = [target.pid for target in targets]
    for target in targets:
        with contextlib.suppress(psutil.Error):
            os.kill(target.pid, signal.SIGKILL)
    return killed


class Deaths:
    def __init__(self, schedule: Path) -> None:
        self._path, self._deaths = schedule, json.loads(schedule.read_text())
        self._round = 0
        self.transport: Any = None

    def plan(self, server_round: int, ask: Any) -> None:
        """A round begins: with a death in it, only once everybody answers, so that it is the one thing amiss."""
        self._round = server_round
        end = time.monotonic() + 180
        while self.transport is not None and time.monotonic() < end and self._due(server_round):
            replies = ask(self.transport, "probe", dict.fromkeys(self.transport.sites, b""))
            if all([reply.code == "declined" for reply in replies]):  # what a site says to an unknown operation
                return
            time.sleep(1.0)

    def _due(self, server_round: int) -> bool:
        return any(death["round"] == server_round for death in self._deaths)

    def phase(self, operation: str) -> None:
        for index, death in enumerate(self._deaths):
            mark = self._path.with_suffix(f".{index}")
            wanted = _OPERATION.get(death["phase"], death["phase"])
            if death["round"] == self._round and wanted == operation and not mark.exists():
                mark.write_text(json.dumps({"at": time.time(), **death}))
                if death["victim"] == "server":
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Thread(target=self._kill, args=(death, mark), daemon=True).start()

    def _kill(self, death: Mapping[str, Any], mark: Path) -> None:
        killed = kill(death["victim"], Path(death["kit"]))
        mark.write_text(json.dumps({"at": time.time(), "killed": killed, **death}))


def main() -> None:
    deaths = Deaths(Path(sys.argv.pop(1)))
    from secure_fedcollm import engine_transport
    from secure_fedcollm import server as server_module

    ask, plan_round, co_tune = (
        engine_transport.EngineTransport.ask,
        server_module.Server.plan_round,
        server_module.Server.co_tune,
    )

    def asking(self: Any, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Any]:
        deaths.transport = self
        deaths.phase(operation)
        return ask(self, operation, bodies)

    def planning(self: Any, server_round: int, *args: Any) -> Any:
        deaths.plan(server_round, ask)
        return plan_round(self, server_round, *args)

    def tuning(self: Any, *args: Any) -> Any:
        deaths.phase("distil")
        time.sleep(0.2)  # the thread that kills somebody else must not come after the phase
        return co_tune(self, *args)

    engine_transport.EngineTransport.ask = asking  # type: ignore[method-assign]
    server_module.Server.plan_round = planning  # type: ignore[method-assign]
    server_module.Server.co_tune = tuning  # type: ignore[method-assign]
    from secure_fedcollm.cli import main as command

    command()


if __name__ == "__main__":
    main()
