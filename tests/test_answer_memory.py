"""A request that arrives again, early, late or from two threads, is worked on once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcollm_privacy.errors import InvalidValue, SiteFailed
from secure_fedcollm.answer_memory import CODES, AnswerMemory, Kept, Request, request_digest

RUN, NONCE = "run-1", bytes(range(16))


class Counting:
    """Answers with the body reversed; counts; waits where the gate is shut."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bytes]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, operation: str, body: bytes) -> bytes:
        self.calls.append((operation, body))
        self.gate.wait(30)
        if operation in (*CODES, "other"):
            raise SiteFailed("s", operation)
        if operation == "crash":
            raise KeyError("a patient's name")
        return body[::-1]


@pytest.fixture
def handler() -> Iterator[Counting]:
    counting = Counting()
    yield counting
    counting.gate.set()


def put(memory: AnswerMemory, operation: str, body: bytes, wait_s: float = 30.0) -> Kept:
    request = Request(run=RUN, nonce=NONCE, operation=operation, body=body)
    return memory.ask(request_digest(RUN, NONCE, operation, body), request, wait_s)


def answered(body: bytes) -> Kept:
    return Kept(word="answered", body=body, sha256=hashlib.sha256(body).hexdigest())


def test_a_digest_is_sha256_over_length_prefixed_run_nonce_and_operation_and_the_body() -> None:
    spelled = b"\0\0\0\x01r" + b"\0\0\0\x02\x07\x08" + b"\0\0\0\x02op" + b"body"
    assert request_digest("r", b"\x07\x08", "op", b"body") == hashlib.sha256(spelled).hexdigest()


PARTS = st.tuples(st.text(), st.binary(), st.text(), st.binary())


@settings(max_examples=200)
@given(PARTS, PARTS)
def test_different_requests_have_different_digests(
    a: tuple[str, bytes, str, bytes], b: tuple[str, bytes, str, bytes]
) -> None:
    assert (request_digest(*a) == request_digest(*b)) == (a == b)


def test_bytes_cannot_move_between_run_nonce_operation_and_body() -> None:
    spread = [("ab", b"c", "d", b"e"), ("a", b"bc", "d", b"e"), ("a", b"b", "cd", b"e"), ("a", b"b", "c", b"de")]
    assert len({request_digest(*parts) for parts in spread}) == 4


def test_a_request_that_comes_again_is_answered_from_memory(handler: Counting) -> None:
    memory = AnswerMemory(handler)
    first, again = put(memory, "train", b"abc"), put(memory, "train", b"abc")
    by_digest = memory.ask(request_digest(RUN, NONCE, "train", b"abc"), None, 0)
    assert first == again == by_digest == answered(b"cba")
    assert handler.calls == [("train", b"abc")]


def test_while_it_is_worked_on_a_repeated_request_waits_for_the_one_result(handler: Counting) -> None:
    memory = AnswerMemory(handler)
    handler.gate.clear()
    assert put(memory, "train", b"abc", 0.0).word == "working"
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(put, memory, "train", b"abc") for _ in range(8)]
        handler.gate.set()
        assert {future.result().body for future in asked} == {b"cba"}
    assert len(handler.calls) == 1


@pytest.mark.parametrize("operation", CODES)
def test_a_refusal_is_remembered_like_an_answer(handler: Counting, operation: str) -> None:
    memory = AnswerMemory(handler)
    assert put(memory, operation, b"") == put(memory, operation, b"") == Kept(word=operation)
    assert len(handler.calls) == 1


@pytest.mark.parametrize("operation", ["other", "crash"])
def test_whatever_else_goes_wrong_is_the_word_failed_and_no_text(handler: Counting, operation: str) -> None:
    assert put(AnswerMemory(handler), operation, b"") == Kept(word="failed")


@pytest.mark.parametrize(
    ("run", "operation", "body"), [("run-2", "train", b"x"), (RUN, "settle", b"x"), (RUN, "train", b"y")]
)
def test_a_request_that_is_not_what_its_digest_says_is_declined(
    handler: Counting, run: str, operation: str, body: bytes
) -> None:
    memory = AnswerMemory(handler)
    named = request_digest(run, NONCE, operation, body)
    request = Request(run=RUN, nonce=NONCE, operation="train", body=b"x")
    assert memory.ask(named, request, 1).word == "declined"
    assert memory.ask(request_digest(RUN, NONCE, "train", b"x"), request, 30).word == "answered"
    handler.calls.pop()
    assert handler.calls == []


def test_a_body_that_is_too_long_is_declined_unread(handler: Counting) -> None:
    memory = AnswerMemory(handler, largest_body=3)
    assert put(memory, "train", b"abc").word == "answered"
    assert put(memory, "train", b"abcd").word == "declined"
    assert len(handler.calls) == 1


def test_an_answer_asked_for_before_its_request_came_is_unknown(handler: Counting) -> None:
    memory = AnswerMemory(handler)
    assert memory.ask(request_digest(RUN, NONCE, "train", b"x"), None, 0).word == "unknown"


def test_answers_take_bounded_memory_and_a_dropped_one_is_declined_not_made_again(handler: Counting) -> None:
    memory = AnswerMemory(handler, kept_bytes=100)
    bodies = [bytes([i]) * 30 for i in range(10)]
    for body in bodies:
        put(memory, "part", body)
    words = [put(memory, "part", body).word for body in bodies]
    assert words == ["declined"] * 7 + ["answered"] * 3
    assert len(handler.calls) == 10


def test_the_newest_answer_is_kept_however_long(handler: Counting) -> None:
    memory = AnswerMemory(handler, kept_bytes=1)
    assert put(memory, "part", b"abc").body == put(memory, "part", b"abc").body == b"cba"


def test_requests_are_worked_on_one_at_a_time_in_order(handler: Counting) -> None:
    memory = AnswerMemory(handler)
    handler.gate.clear()
    for i in range(5):
        put(memory, "part", bytes([i]), 0.0)
    assert len(handler.calls) <= 1
    handler.gate.set()
    assert put(memory, "part", b"last").word == "answered"
    assert [body for _, body in handler.calls] == [*(bytes([i]) for i in range(5)), b"last"]


def test_too_many_waiting_requests_are_turned_away_and_may_come_again(handler: Counting) -> None:
    memory = AnswerMemory(handler)
    handler.gate.clear()
    words = [put(memory, "part", i.to_bytes(2, "big"), 0.0).word for i in range(70)]
    assert words == ["working"] * 64 + ["failed"] * 6
    handler.gate.set()
    assert put(memory, "part", b"\0\x00").word == "answered"
    assert put(memory, "part", (69).to_bytes(2, "big")).word == "answered"


@pytest.mark.parametrize("wait_s", [float("nan"), -1.0, float("inf"), "1"])
def test_a_wait_that_is_no_time_is_refused(handler: Counting, wait_s: float) -> None:
    with pytest.raises(InvalidValue):
        put(AnswerMemory(handler), "train", b"", wait_s)
