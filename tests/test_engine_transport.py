"""A request over a line that loses, repeats and reorders messages is worked on once, and only if signed."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcollm_privacy.errors import InvalidValue, SiteFailed
from fedcollm_privacy.identity import SigningKey
from secure_fedcollm import door as door_module
from secure_fedcollm import engine_transport
from secure_fedcollm.answer_memory import request_digest
from secure_fedcollm.door import SiteDoor
from secure_fedcollm.engine_transport import NO_RELAY, EngineTransport, RequestEvent, addressed, relay_post
from secure_fedcollm.local_socket import ask_local, packed, unpacked
from secure_fedcollm.transport import Handler

KEY = SigningKey.generate("server")
FAULTS = ("deliver", "lose", "lose answer", "twice", "late")
PIECE = 8


class Line:
    """A `Post` to a door in this process; each message in turn meets a fault, and later ones none.

    ``lose`` loses it on the way, ``lose answer`` on the way back, ``twice`` brings it twice, ``late`` brings it only
    after the next one.
    """

    def __init__(self, door: SiteDoor, faults: list[str]) -> None:
        self.door, self.faults = door, list(faults)
        self.late: list[dict[str, Any]] = []
        self.pieces = self.wanted = 0
        self.longest = 0

    def __call__(self, site: str, fields: Any, timeout_s: float) -> Any:
        fault = self.faults.pop(0) if self.faults else "deliver"
        self.pieces += "body" in fields
        self.longest = max(self.longest, len(fields.get("body", b"")))
        if fault == "lose":
            return None
        if fault == "late":
            self.late.append(dict(fields))
            return None
        reply = self._brought(fields)
        if fault == "twice":
            reply = self._brought(fields)
        while self.late:
            self._brought(self.late.pop())
        if fault == "lose answer":
            return None
        self.wanted += reply["word"] == "wanted"
        return reply

    def _brought(self, fields: Any) -> Any:
        reply = unpacked(packed(self.door.answer(unpacked(packed(fields)) or {})))
        self.longest = max(self.longest, len((reply or {}).get("body", b"")))  # type: ignore[arg-type]
        return reply


class Counting:
    def __init__(self) -> None:
        self.calls: list[bytes] = []

    def __call__(self, operation: str, body: bytes) -> bytes:
        self.calls.append(body)
        if operation in ("declined", "diverged", "failed"):
            raise SiteFailed("s00", operation)
        if operation == "crash":
            raise KeyError("a patient's name")
        return body[::-1]


@pytest.fixture
def handler() -> Counting:
    return Counting()


@pytest.fixture
def make_door(tmp_path: Path) -> Iterator[Callable[..., SiteDoor]]:
    made: list[SiteDoor] = []

    def make(handler: Handler, **options: Any) -> SiteDoor:
        given = {"name": "s00", "server": KEY.public, "socket": tmp_path / f"d{len(made)}"} | options
        made.append(SiteDoor(handler, **given))
        return made[-1]

    yield make
    for door in made:
        door.close()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_transport, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(door_module, "PIECE_BYTES", PIECE)
    hurry(monkeypatch)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(min(seconds, 0.001)))
    monkeypatch.setattr(engine_transport, "time", clock)


def over(post: Any, **options: Any) -> EngineTransport:
    return EngineTransport(post, "run", ("s00",), **({"key": KEY, "deadline_s": 30.0, "wait_s": 0.05} | options))


def asked(transport: EngineTransport, operation: str, body: bytes) -> tuple[bytes | None, str | None]:
    (reply,) = transport.ask(operation, {"s00": body})
    return reply.body, reply.code


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("length", [0, 1, PIECE, 3 * PIECE, 3 * PIECE + 1])
def test_pieces_that_are_lost_repeated_or_reordered_change_no_answer_and_nothing_is_worked_on_twice(
    make_door: Callable[..., SiteDoor], handler: Counting, length: int
) -> None:
    door = make_door(handler)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.sampled_from(FAULTS), max_size=12), st.binary(min_size=length, max_size=length))
    def holds(faults: list[str], body: bytes) -> None:
        handler.calls.clear()
        line = Line(door, faults)
        assert asked(over(line), "train", body) == (body[::-1], None)
        assert handler.calls == [body]
        assert line.longest <= PIECE

    holds()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("faults", [*itertools.product(FAULTS[:4], repeat=3)])
def test_a_body_goes_out_again_only_when_the_site_says_that_it_has_not_got_it(
    make_door: Callable[..., SiteDoor], handler: Counting, faults: tuple[str, ...]
) -> None:
    line = Line(make_door(handler), list(faults))
    assert asked(over(line), "train", b"abc") == (b"cba", None)
    # The first message holds it; the next question then hears whether it came.
    assert line.pieces == 1 + line.wanted
    assert handler.calls == [b"abc"]


def test_the_same_question_asked_twice_is_two_requests(make_door: Callable[..., SiteDoor], handler: Counting) -> None:
    transport = over(Line(make_door(handler), []))
    assert asked(transport, "train", b"abc") == asked(transport, "train", b"abc") == (b"cba", None)
    assert handler.calls == [b"abc", b"abc"]


@pytest.mark.usefixtures("small_pieces")
def test_a_site_that_is_started_again_between_two_pieces_of_its_answer_never_gives_a_mixture(
    make_door: Callable[..., SiteDoor],
) -> None:
    doors = [make_door(lambda operation, body, fill=fill: fill * 50) for fill in (b"a", b"b")]
    line = Line(doors[0], [])
    messages = 0

    def post(site: str, fields: Any, timeout_s: float) -> Any:
        nonlocal messages
        messages += 1
        line.door = doors[messages > 4]
        return line(site, fields, timeout_s)

    assert asked(over(post), "train", b"abc") == (b"b" * 50, None)


@pytest.mark.usefixtures("small_pieces")
def test_a_site_that_is_started_again_before_it_answered_is_sent_the_body_again(
    make_door: Callable[..., SiteDoor], handler: Counting
) -> None:
    waiting = threading.Event()
    doors = [make_door(lambda operation, body: bytes(waiting.wait(30))), make_door(handler)]
    line = Line(doors[0], [])
    count = itertools.count()

    def post(site: str, fields: Any, timeout_s: float) -> Any:
        line.door = doors[next(count) > 8]
        return line(site, fields, timeout_s)

    assert asked(over(post), "train", b"x" * 30) == (b"x" * 30, None)
    assert handler.calls == [b"x" * 30]
    waiting.set()


@pytest.mark.parametrize("operation", ["declined", "diverged", "failed", "crash"])
def test_a_site_says_no_by_a_code_and_no_text_of_an_error_leaves(
    make_door: Callable[..., SiteDoor], handler: Counting, operation: str
) -> None:
    code = "failed" if operation == "crash" else operation
    assert asked(over(Line(make_door(handler), [])), operation, b"abc") == (None, code)


def test_a_site_that_cannot_be_reached_gives_no_answer_long_before_a_long_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hurry(monkeypatch)
    transport = over(lambda site, fields, timeout_s: None, deadline_s=10.0**6, unreachable_s=0.2)
    assert asked(transport, "train", b"abc") == (None, "no answer")


def test_a_site_that_was_away_is_asked_a_short_question_first_and_waited_for_in_full_once_it_answers(
    make_door: Callable[..., SiteDoor], handler: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(engine_transport, "_AWAY_S", 0.05)
    line = Line(make_door(handler), ["lose"] * 10**6)
    transport = over(line, unreachable_s=0.3, deadline_s=60.0)
    assert asked(transport, "train", b"one") == (None, "no answer")
    sent = line.pieces
    assert sent >= 1
    assert asked(transport, "train", b"two") == (None, "no answer")
    assert line.pieces == sent  # its body was not sent to nobody
    line.faults = []
    assert asked(transport, "train", b"three") == (b"eerht", None)
    assert handler.calls == [b"three"]
    # It is as good as any site again: what is lost now is waited for as long as elsewhere.
    line.faults = ["lose"] * 3
    assert asked(transport, "train", b"four") == (b"ruof", None)
    assert line.pieces > sent + 1


def test_while_the_server_own_relay_is_away_no_site_is_given_up(
    make_door: Callable[..., SiteDoor], handler: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    line = Line(make_door(handler), [])
    until = time.monotonic() + 0.4

    def post(site: str, fields: Any, timeout_s: float) -> Any:
        return {"word": NO_RELAY} if time.monotonic() < until else line(site, fields, timeout_s)

    assert asked(over(post, unreachable_s=0.1), "train", b"abc") == (b"cba", None)
    away = over(lambda site, fields, timeout_s: {"word": NO_RELAY}, deadline_s=0.3)
    assert asked(away, "train", b"abc") == (None, "no answer")


def test_a_run_that_is_stopped_waits_for_nobody(make_door: Callable[..., SiteDoor], handler: Counting) -> None:
    transport = over(Line(make_door(handler), []), stopped=lambda: True)
    assert asked(transport, "train", b"abc") == (None, "no answer")


SHA = hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    "reply",
    [
        {"word": "answered", "sha256": SHA, "size": 1, "offset": 0, "body": "text"},
        {"word": "answered", "sha256": SHA, "size": 1, "offset": 0, "body": b"x"},  # another hash than said
        {"word": "answered", "sha256": SHA, "size": 11, "offset": 0, "body": bytes(11)},  # longer than allowed
        {"word": "answered", "sha256": SHA, "size": 2, "offset": 0, "body": b"x"},
        {"word": "answered", "sha256": SHA, "size": -1, "offset": 0, "body": b""},
        {"word": "answered", "sha256": SHA, "size": 1, "offset": 1, "body": b"x"},
        {"word": "answered", "size": 0, "offset": 0, "body": b""},
        {"word": "a text that data wrote"},
        {"word": 5},
        {},
        {"word": "wanted"},
        {"word": "wanted", "has": 3},
        {"word": "wanted", "has": True},
        {"word": "wanted", "has": -1},
    ],
)
def test_a_reply_that_no_door_gives_is_the_word_failed(reply: dict[str, Any]) -> None:
    transport = over(lambda site, fields, timeout_s: reply, largest_answer=10)
    assert asked(transport, "train", b"abc") == (None, "failed")


def message(whole: bytes = b"abc", site: str = "s00", key: SigningKey = KEY, **change: Any) -> dict[str, Any]:
    digest = request_digest("run", bytes(16), "train", whole)
    fields: dict[str, Any] = {"digest": digest, "operation": "train", "run": "run", "nonce": bytes(16), "wait_s": 5.0}
    fields |= {"size": len(whole), "at": 0, "offset": 0, "body": whole} | change
    signature = key.sign("request", addressed(str(fields["digest"]), site))
    return {"signature": signature} | fields


@pytest.mark.parametrize(
    "change",
    [
        {"digest": 5},
        {"digest": "0" * 64},
        {"digest": "0" * 63},
        {"operation": "o" * 129},
        {"operation": 5},
        {"operation": "settle"},
        {"run": "another"},
        {"nonce": bytes(15)},
        {"nonce": bytes([1]) * 16},
        {"body": "abc"},
        {"body": b"abd"},
        {"body": b"abcd"},
        {"body": bytes(2**21 + 1), "size": 2**21 + 1},
        {"size": -1},
        {"size": 10**12},
        {"size": True},
        {"wait_s": float("nan")},
        {"wait_s": -1.0},
        {"wait_s": "1"},
        {"offset": -1},
        {"offset": "0"},
        {"signature": bytes(64)},
        {"signature": "text"},
        {"signature": message(site="s01")["signature"]},
        {"signature": message(key=SigningKey.generate("server"))["signature"]},
        {"signature": KEY.sign("plan", addressed(message()["digest"], "s00"))},
    ],
)
def test_a_request_of_another_shape_or_signature_is_declined_and_never_worked_on(
    make_door: Callable[..., SiteDoor], handler: Counting, change: dict[str, Any]
) -> None:
    door = make_door(handler)
    assert door.answer(message(**change)) == {"word": "declined"}
    assert handler.calls == []
    door = make_door(handler)
    assert door.answer(message())["word"] == "answered"


def test_a_request_that_is_replayed_is_answered_from_memory(
    make_door: Callable[..., SiteDoor], handler: Counting
) -> None:
    door = make_door(handler)
    assert door.answer(message()) == door.answer(message())
    assert handler.calls == [b"abc"]


def test_a_body_longer_than_allowed_is_declined_unread(make_door: Callable[..., SiteDoor], handler: Counting) -> None:
    door = make_door(handler, largest_body=3)
    assert asked(over(Line(door, [])), "train", b"abc") == (b"cba", None)
    assert asked(over(Line(door, [])), "train", b"abcd") == (None, "declined")
    assert handler.calls == [b"abc"]


@pytest.mark.usefixtures("small_pieces")
def test_bodies_that_never_become_whole_take_bounded_memory_and_the_newest_gets_through(
    make_door: Callable[..., SiteDoor], handler: Counting
) -> None:
    door = make_door(handler, largest_body=40)
    for index in range(100):
        body = bytes([index]) * 40
        assert door.answer(message(body) | {"body": body[:PIECE]}) == {"word": "wanted", "has": PIECE}
        assert sum(len(unfinished.data) for unfinished in door._unfinished.values()) <= 40
    body = bytes([99]) * 40
    for at in range(PIECE, 40, PIECE):
        told = door.answer(message(body) | {"body": body[at : at + PIECE], "at": at})
    assert told["word"] == "answered"
    assert handler.calls == [body]


def test_who_watches_hears_of_every_request_and_cannot_stop_one(
    make_door: Callable[..., SiteDoor], handler: Counting
) -> None:
    heard: list[RequestEvent] = []

    def observe(event: RequestEvent) -> None:
        heard.append(event)
        raise RuntimeError("the page is gone")

    line = Line(make_door(handler), [])
    assert asked(over(line, observe=observe), "train", b"abc") == (b"cba", None)
    assert asked(over(line, observe=observe), "declined", b"abc") == (None, "declined")
    told = [(e.site, e.operation, e.state, e.bytes_out, e.bytes_in) for e in heard]
    assert told == [
        ("s00", "train", "asked", 0, 0),
        ("s00", "train", "answered", 3, 3),
        ("s00", "declined", "asked", 0, 0),
        ("s00", "declined", "declined", 3, 0),
    ]
    assert all(event.seconds >= 0 for event in heard)


@pytest.mark.parametrize("field", ["deadline_s", "unreachable_s", "wait_s"])
def test_a_time_that_is_none_is_refused(field: str) -> None:
    with pytest.raises(InvalidValue, match=field):
        over(lambda site, fields, timeout_s: None, **{field: float("nan")})
    with pytest.raises(InvalidValue, match="train"):
        over(lambda site, fields, timeout_s: None, deadlines_s={"train": 0.0})


def test_all_sites_are_asked_at_once() -> None:
    both = threading.Barrier(2, timeout=30)

    def post(site: str, fields: Any, timeout_s: float) -> Any:
        both.wait()
        return {"word": "declined"}

    replies = list(EngineTransport(post, "run", ("a", "b"), key=KEY).ask("train", {"a": b"", "b": b""}))
    assert sorted(reply.site for reply in replies) == ["a", "b"]


def test_over_its_socket_a_door_answers_the_relay(
    make_door: Callable[..., SiteDoor], handler: Counting, tmp_path: Path
) -> None:
    make_door(handler)
    reply = ask_local(tmp_path / "d0", message(), 30.0)
    assert reply is not None
    assert reply["body"] == b"cba"
    assert relay_post(tmp_path / "nobody")("s00", message(), 1.0) == {"word": NO_RELAY}
