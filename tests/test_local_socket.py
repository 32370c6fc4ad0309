"""Messages over a Unix socket: only their owner may send them, and no peer can stop the next one."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcollm_privacy.errors import InvalidValue
from secure_fedcollm.local_socket import LARGEST_MESSAGE, LocalServer, ask_local, packed, unpacked

FLAT = st.one_of(st.binary(), st.text(), st.floats(allow_nan=False), st.integers(-(2**63), 2**64 - 1), st.booleans())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "s"


@pytest.fixture
def server(place: Path) -> Iterator[LocalServer]:
    listening = LocalServer(place, lambda fields: fields | {"seen": 1})
    yield listening
    listening.close()


@given(st.dictionaries(st.text(), FLAT, max_size=20))
def test_what_is_packed_is_unpacked(fields: dict[str, Any]) -> None:
    assert unpacked(packed(fields)) == fields


@pytest.mark.parametrize(
    "found", [{"a": {}}, {"a": [1]}, {"a": None}, {1: 2}, [], 5, "text", {"a": msgpack.ExtType(1, b"x")}]
)
def test_a_message_that_is_not_flat_is_none(found: Any) -> None:
    assert unpacked(msgpack.packb(found)) is None


@given(st.binary(max_size=50))
def test_no_bytes_make_the_parser_fail(data: bytes) -> None:
    found = unpacked(data)
    assert found is None or unpacked(packed(found)) == found or any(value != value for value in found.values())


@pytest.mark.parametrize("value", [None, [1], {}, bytearray(b"x"), object()])
def test_only_flat_messages_are_sent(value: Any) -> None:
    with pytest.raises(InvalidValue, match="fields"):
        packed({"a": value})


@pytest.mark.usefixtures("server")
def test_only_the_owner_reaches_the_socket(place: Path) -> None:
    assert ask_local(place, {"a": b"x"}, 30.0) == {"a": b"x", "seen": 1}
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(place.stat().st_mode) == 0o600


def test_a_path_that_is_too_long_is_refused_by_its_length(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="107 bytes"):
        LocalServer(tmp_path / ("x" * 120), lambda fields: fields)
    with pytest.raises(InvalidValue, match="107 bytes"):
        LocalServer(Path("/tmp") / ("ä" * 60), lambda fields: fields)


def test_nobody_at_the_socket_is_no_answer(place: Path) -> None:
    assert ask_local(place, {}, 1.0) is None


def test_a_socket_of_a_killed_process_is_replaced(place: Path) -> None:
    place.parent.mkdir()
    code = f"import socket, os; s = socket.socket(socket.AF_UNIX); s.bind({str(place)!r}); s.listen(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert place.exists()
    server = LocalServer(place, lambda fields: fields)
    assert ask_local(place, {"a": 1}, 30.0) == {"a": 1}
    server.close()
    assert not place.exists()


@pytest.mark.usefixtures("server")
def test_where_somebody_listens_nobody_else_does_unless_he_takes_over(place: Path, server: LocalServer) -> None:
    with pytest.raises(InvalidValue, match="no other process listens"):
        LocalServer(place, lambda fields: fields)
    newer = LocalServer(place, lambda fields: {"newer": 1}, take_over=True)
    assert ask_local(place, {}, 30.0) == {"newer": 1}
    server.close()  # must not take the newer one's socket away
    assert ask_local(place, {}, 30.0) == {"newer": 1}
    newer.close()


def test_what_is_no_socket_is_left_alone(place: Path) -> None:
    place.parent.mkdir()
    place.write_text("a letter")
    for take_over in (False, True):
        with pytest.raises(InvalidValue, match="socket"):
            LocalServer(place, lambda fields: fields, take_over=take_over)
    assert place.read_text() == "a letter"


def raw(place: Path, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(os.fspath(place))
        try:
            end.sendall(data)
            end.shutdown(socket.SHUT_WR)
            return end.recv(100)
        except (BrokenPipeError, ConnectionResetError):  # it hung up before it had read everything
            return b""


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        struct.pack("!i", 1000) + b"only the beginning",
        struct.pack("!i", LARGEST_MESSAGE + 1) + b"x",
        struct.pack("!i", -1) + struct.pack("!Q", 2**40),
        struct.pack("!i", 5) + b"\xc1\xc1\xc1\xc1\xc1",
        struct.pack("!i", 0),
    ],
)
def test_a_peer_that_dies_in_the_middle_or_sends_something_else_stops_nobody(place: Path, data: bytes) -> None:
    for _ in range(70):  # more than there are threads
        assert raw(place, data) == b""
    assert ask_local(place, {"a": 1}, 30.0) == {"a": 1, "seen": 1}


def test_an_answer_that_fails_stops_nobody_and_tells_nothing(place: Path) -> None:
    def answer(fields: dict[str, Any]) -> dict[str, Any]:
        if "crash" in fields:
            raise KeyError("a patient's name")
        return fields

    server = LocalServer(place, answer)
    assert ask_local(place, {"crash": 1}, 30.0) is None
    assert ask_local(place, {"a": 1}, 30.0) == {"a": 1}
    server.close()


def test_many_are_answered_at_once(place: Path) -> None:
    together = threading.Barrier(8, timeout=30)
    server = LocalServer(place, lambda fields: {**fields, "met": together.wait() >= 0})
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask_local(place, {"i": i}, 30.0), range(8)))
    assert [answer and answer["i"] for answer in answers] == list(range(8))
    server.close()


def test_whoever_does_not_wait_long_enough_hears_nothing_and_closing_ends_all_threads(place: Path) -> None:
    gate = threading.Event()
    before = threading.active_count()
    server = LocalServer(place, lambda fields: {"late": gate.wait(30)})
    assert ask_local(place, {}, 0.05) is None
    gate.set()
    server.close()
    assert threading.active_count() == before
    assert ask_local(place, {}, 1.0) is None
