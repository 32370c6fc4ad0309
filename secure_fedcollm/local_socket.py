"""Small messages between processes of one machine and one user: a Unix domain socket, one question a connection.

A message is a flat map of text to text, numbers, bytes or booleans, packed by msgpack: no pickle, no nesting, no types
of its own. Framing is `multiprocessing.connection`'s, of which only the byte calls are used. The socket's folder is for
its owner alone, which is what decides who may speak.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import msgpack

from fedcollm_privacy._validate import at_least
from fedcollm_privacy.errors import InvalidValue

__all__ = ["LARGEST_MESSAGE", "Field", "Fields", "LocalServer", "ask_local", "packed", "unpacked", "usable_path"]

_LOG = logging.getLogger("fedcollm")

Field = bytes | str | float | int
Fields = Mapping[str, Field]

LARGEST_MESSAGE = 2**22
"""Bytes of one message; a longer one is not read."""

_MOST_CONNECTIONS = 64
_LONGEST_PATH = 107  # bytes, of Linux's sockaddr_un
_STALLED_S = 60.0


def packed(fields: Fields) -> bytes:
    """The message's bytes; InvalidValue for a value that is neither text, number, boolean nor bytes."""
    for name, value in fields.items():
        if type(name) is not str or type(value) not in (bytes, str, float, int, bool):
            raise InvalidValue("fields", f"{name}: {type(value).__name__}", "bytes, str, float, int or bool by name")
    data: bytes = msgpack.packb(dict(fields), use_bin_type=True)
    return data


def unpacked(data: bytes) -> dict[str, Field] | None:
    """The message in these bytes; None when they hold none."""
    try:
        found = msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0, max_array_len=0, max_map_len=32)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError):
        return None
    flat = type(found) is dict and all(type(value) in (bytes, str, float, int, bool) for value in found.values())
    return found if flat and all(type(name) is str for name in found) else None


def usable_path(path: Path) -> Path:
    """The path, if a socket can have it; InvalidValue beyond 107 bytes, which is the operating system's limit."""
    length = len(os.fsencode(path))
    if length > _LONGEST_PATH:
        raise InvalidValue(
            "socket",
            str(path),
            f"a path of at most {_LONGEST_PATH} bytes (this one has {length}); put the kit into a shorter folder",
        )
    return path


def ask_local(path: Path, fields: Fields, timeout_s: float) -> dict[str, Field] | None:
    """The answer of whoever listens at ``path``; None when nobody does, or gives none within ``timeout_s`` seconds."""
    at_least(0, timeout_s=timeout_s)
    data = packed(fields)
    try:
        with _connected(path) as line:
            line.send_bytes(data)
            return unpacked(line.recv_bytes(LARGEST_MESSAGE)) if line.poll(timeout_s) else None
    except (OSError, EOFError):  # nobody there, died in the middle of its answer, or sent too much
        return None


def _connected(path: Path) -> Connection:
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(os.fspath(path))
        _limit_stalls(end)
        return Connection(end.detach())


def _limit_stalls(end: socket.socket) -> None:
    # A peer that stops in the middle of a message would hold this thread for ever.
    limit = struct.pack("ll", int(_STALLED_S), 0)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, limit)


class LocalServer:
    """Answers at a Unix socket until it is closed; a thread for each connection, each with one question.

    A socket that is left from a process that has died is replaced.

    Args:
        path: where; its folder is made or set to mode 0700, the socket is 0600.
        answer: gives the answer; called from several threads. What it raises is logged, and the peer gets nothing.
        take_over: replace also a socket at which somebody still listens, who is then never asked again.

    Raises:
        InvalidValue: the path is too long, is no socket, or somebody listens there.
    """

    def __init__(self, path: Path, answer: Callable[[dict[str, Field]], Fields], *, take_over: bool = False) -> None:
        self._path, self._answer = usable_path(path), answer
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        _remove_stale(path, take_over=take_over)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(os.fspath(path))
        path.chmod(0o600)
        self._inode = path.stat().st_ino
        self._listening.listen(_MOST_CONNECTIONS)
        self._lock, self._closed = threading.Lock(), False
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._open: dict[threading.Thread, socket.socket] = {}
        self._accepting = threading.Thread(target=self._accept, name=f"listen {path.name}", daemon=True)
        self._accepting.start()

    def close(self, *, join: bool = True) -> None:
        """Listen no more and cut all connections; wait for their threads, unless the process is about to end."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            for end in self._open.values():
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            left = list(self._open)
        self._accepting.join()
        self._listening.close()
        for thread in left if join else ():
            thread.join()
        with suppress(OSError):
            if self._path.stat().st_ino == self._inode:  # else a newer process has taken the place
                self._path.unlink()

    def _accept(self) -> None:
        while True:
            self._free.acquire()
            try:
                end, _ = self._listening.accept()
            except OSError:
                return
            _limit_stalls(end)
            with self._lock:
                if self._closed:
                    end.close()
                    return
                thread = threading.Thread(target=self._serve, args=(end,), name=self._path.name, daemon=True)
                self._open[thread] = end
                thread.start()

    def _serve(self, end: socket.socket) -> None:
        try:
            with Connection(os.dup(end.fileno())) as line, suppress(OSError, EOFError):
                asked = unpacked(line.recv_bytes(LARGEST_MESSAGE))
                if asked is not None:
                    line.send_bytes(packed(self._answer(asked)))
        except Exception:  # the next question must find a thread; the text stays in this log
            _LOG.exception("a question at %s was not answered", self._path.name)
        finally:
            with self._lock:
                self._open.pop(threading.current_thread(), None)
                end.close()
            self._free.release()


def _remove_stale(path: Path, *, take_over: bool) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InvalidValue("socket", str(path), "a path at which there is nothing, or a socket")
    except FileNotFoundError:
        return
    if not take_over:
        with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError, FileNotFoundError):
            probe.connect(os.fspath(path))
            raise InvalidValue("socket", str(path), "a socket at which no other process listens; end that one first")
    with suppress(FileNotFoundError):
        path.unlink()
