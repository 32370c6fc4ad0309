"""Frames over a stream socket: 4 bytes of length, big-endian, then so many bytes."""

from __future__ import annotations

import socket
import struct
import time

from fedcollm_privacy.errors import ProtocolError

__all__ = ["receive_frame", "send_frame"]

_LENGTH = struct.Struct(">I")


def send_frame(connection: socket.socket, data: bytes, *, deadline: float | None = None) -> None:
    """Send one frame.

    Args:
        connection: a connected stream socket.
        data: fewer than 2^32 bytes.
        deadline: `time.monotonic` at which to give up; None waits for ever.

    Raises:
        OSError: the other side is gone, or `TimeoutError` at the deadline.
    """
    _set_timeout(connection, deadline)
    connection.sendall(_LENGTH.pack(len(data)))
    _set_timeout(connection, deadline)
    connection.sendall(data)


def receive_frame(connection: socket.socket, *, largest: int, deadline: float | None = None) -> bytes:
    """Receive one frame of at most ``largest`` bytes; nothing is allocated for a longer one.

    Raises:
        EOFError: the other side closed.
        OSError: the connection broke, or `TimeoutError` at the deadline.
        ProtocolError: the frame says it is longer.
    """
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size, deadline))
    if length > largest:
        raise ProtocolError(f"a frame of {length} bytes; allowed: {largest}")
    return bytes(_receive_exactly(connection, length, deadline))


def _receive_exactly(connection: socket.socket, length: int, deadline: float | None) -> bytearray:
    buffer = bytearray(length)
    rest = memoryview(buffer)
    while rest:
        _set_timeout(connection, deadline)
        received = connection.recv_into(rest)
        if not received:
            raise EOFError
        rest = rest[received:]
    return buffer


def _set_timeout(connection: socket.socket, deadline: float | None) -> None:
    if deadline is None:
        connection.settimeout(None)
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)
