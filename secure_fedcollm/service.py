"""What both long-lived commands need of their machine: one process a kit, logs, signals, readiness."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType

from fedcollm_privacy.errors import FedCollmError

__all__ = ["Stop", "log_to", "only_one", "ready", "signals"]

_LOG = logging.getLogger("fedcollm")
_LOG_BYTES, _LOG_FILES = 16 * 2**20, 8


class _JsonLines(logging.Formatter):
    """One JSON object a line. An exception's text stays on this machine, in this file."""

    def __init__(self, party: str) -> None:
        super().__init__()
        self._party = party

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "party": self._party,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _PlainLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S")
        text = "".join(c if c.isprintable() else " " for c in record.getMessage())
        return f"{stamp} {'' if record.levelno < logging.WARNING else record.levelname.lower() + ': '}{text}"


def log_to(folder: Path, party: str, *, quiet: bool) -> None:
    """Everything as JSON lines in ``folder``/fedcollm.jsonl, rotated by size; plain lines on stderr.

    Args:
        folder: made when absent, for its owner alone: tracebacks may quote what a site read.
        party: stands in every line.
        quiet: only errors on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = RotatingFileHandler(folder / "fedcollm.jsonl", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8")
    file.setFormatter(_JsonLines(party))
    stream = logging.StreamHandler()
    stream.setFormatter(_PlainLines())
    stream.setLevel(logging.ERROR if quiet else logging.INFO)
    logging.basicConfig(level=logging.WARNING, handlers=[file, stream], force=True)
    for ours in ("fedcollm", "secure_fedcollm"):
        logging.getLogger(ours).setLevel(logging.INFO)


@contextmanager
def only_one(state: Path) -> Iterator[None]:
    """Hold the kit's lock: two processes would share ledger, journal and socket.

    Raises:
        FedCollmError: another process works with this kit.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FedCollmError(
                f"another process works with {state.parent}; stop it first (systemctl stop, or Ctrl-C where it runs)"
            ) from None
        (state / "ready").unlink(missing_ok=True)  # of a process that was killed
        try:
            yield
        finally:
            (state / "ready").unlink(missing_ok=True)
    finally:
        os.close(descriptor)


class Stop:
    """Set by the first SIGTERM or SIGINT; a second one ends the process as a crash would, which loses nothing."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> bool:
        """Whether the process was asked to stop."""
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait for it, at most so long."""
        return self._event.wait(seconds)

    def set(self) -> None:
        """Ask for it."""
        self._event.set()


@contextmanager
def signals(stop: Stop) -> Iterator[None]:
    """Have SIGTERM and SIGINT set ``stop`` while inside."""

    def heard(number: int, frame: FrameType | None) -> None:
        if stop():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.set()

    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ready(state: Path, text: str) -> None:
    """Say that the service works: a log line, the file ``ready``, and systemd's notification where it asks for one."""
    _LOG.info("%s", text)
    (state / "ready").write_text(f"{os.getpid()}\n")
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.sendall(b"READY=1")
