"""FLARE's processes beside a party's own: started, started again when they die, and never left behind.

FLARE starts a process of its own session for each job, which outlives a killed parent. So all processes of a kit's
engine carry a mark in their environment, by which they are found; a list of process ids would miss those.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil  # type: ignore[import-untyped]

from fedcollm_privacy._validate import integer_at_least, one_of
from secure_fedcollm.engine_rules import engine_rules
from secure_fedcollm.local_socket import usable_path

if TYPE_CHECKING:
    from secure_fedcollm.kit import Kit

__all__ = ["EngineProcess"]

_LOG = logging.getLogger("fedcollm")
_MARK = "FEDCOLLM_ENGINE"
# What FLARE's processes get of our environment; a passphrase that stands there is not among it.
_INHERITED = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_GENTLY_S = 3.0
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 60.0


class EngineProcess:
    """FLARE's parent process of a kit, kept running from `start` to `stop`.

    Args:
        side: ``server`` or ``site``.
        engine: FLARE's start-up kit, which is its workspace.
        name: the site's, or the server's as in its certificate.
        org: as in the certificate.
        socket: where the relay and the party's process meet.
        state: holds the mark ``engine.id`` and ``logs/engine.log``.
        log_bytes: a longer log becomes ``engine.log.1``.
        environment: given to FLARE's processes besides.

    Raises:
        InvalidValue: another side, or the socket's path is too long.
    """

    def __init__(
        self,
        *,
        side: Literal["server", "site"],
        engine: Path,
        name: str,
        org: str,
        socket: Path,
        state: Path,
        log_bytes: int = 16 * 2**20,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        one_of(("server", "site"), side=side)
        integer_at_least(1, log_bytes=log_bytes)
        self._engine, self._log_bytes = engine.absolute(), log_bytes
        part = "server" if side == "server" else "client"
        self._command = [sys.executable, "-u", "-m", f"nvflare.private.fed.app.{part}.{part}_train"]
        self._command += ["-m", str(self._engine), "-s", f"fed_{part}.json", "--set", "secure_train=true"]
        self._command += [f"org={org}", "config_folder=config", *([f"uid={name}"] if part == "client" else [])]
        self._log = state / "logs" / "engine.log"
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._mark = _mark(state / "engine.id")
        self._environment = {
            **{key: os.environ[key] for key in _INHERITED if key in os.environ},
            **{"HOME": str(self._engine), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONWARNINGS": "ignore"},
            **{"FEDCOLLM_SOCKET": str(usable_path(socket.absolute())), _MARK: self._mark},
            **(environment or {}),
        }
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, kit: Kit) -> EngineProcess:
        """The engine of a kit; its rules are written anew, so that it never starts under wider ones."""
        engine_rules(kit.engine / "local", kit.role)
        name = kit.server_host if kit.role == "server" else kit.name
        return cls(side=kit.role, engine=kit.engine, name=name, org=kit.party.org, socket=kit.socket, state=kit.state)

    def start(self) -> None:
        """End what an earlier process left, and keep FLARE running from now on."""
        self._end_all()
        (self._engine / "transfer").mkdir(exist_ok=True)
        self._stopped.clear()
        self._thread = threading.Thread(target=self._keep, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End FLARE and all processes it started; none is left when this returns."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._end_all()

    def processes(self) -> list[psutil.Process]:
        """All processes of this engine, those that have lost their parent included."""
        return list(self._marked())

    def _keep(self) -> None:
        pause_s = 1.0
        # The kernel ends FLARE with the thread that started it, which is this one and lives until `stop`.
        while not self._stopped.is_set():
            begun = time.monotonic()
            with self._log.open("ab") as log:
                command = [sys.executable, "-m", "secure_fedcollm.engine_child", str(os.getpid()), *self._command]
                process = subprocess.Popen(  # noqa: S603 our own interpreter
                    command,
                    env=self._environment,
                    cwd=self._engine,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            while process.poll() is None and not self._stopped.wait(0.5):
                self._rotate()
            self._end_all()
            process.wait()
            if self._stopped.is_set():
                return
            lived_s = time.monotonic() - begun
            pause_s = 1.0 if lived_s > _STEADY_S else min(_LONGEST_PAUSE_S, pause_s * 2)
            _LOG.warning("the engine ended after %.0f s (see %s); again in %.0f s", lived_s, self._log, pause_s)
            self._stopped.wait(pause_s)

    def _rotate(self) -> None:
        # Copied and cut, because FLARE's processes hold the open file, to whose end they write.
        with suppress(OSError):
            if self._log.stat().st_size > self._log_bytes:
                shutil.copyfile(self._log, self._log.with_name("engine.log.1"))
                os.truncate(self._log, 0)

    def _marked(self) -> Iterator[psutil.Process]:
        own = os.getpid()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != own and process.environ().get(_MARK) == self._mark:
                    yield process

    def _end_all(self) -> None:
        left = list(self._marked())
        for process in left:
            with suppress(psutil.Error):
                process.terminate()
        _, left = psutil.wait_procs(left, timeout=_GENTLY_S)
        end = time.monotonic() + 30.0
        # A parent may have started another one in the meantime.
        while left := [*left, *(p for p in self._marked() if p not in left)]:
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            _, left = psutil.wait_procs(left, timeout=2.0)
            if time.monotonic() > end:
                _LOG.error("processes %s of the engine do not end", [process.pid for process in left])
                return


def _mark(path: Path) -> str:
    try:
        kept = path.read_text()
    except FileNotFoundError:
        kept = ""
    if len(kept) != 32:
        kept = secrets.token_hex(16)
        path.write_text(kept)
        path.chmod(0o600)
    return kept
