"""The server's requests over an engine whose processes may die at any moment: bytes in, bytes out.

A request is named by its digest. Its body goes out once, in pieces; from then on the site is asked for the answer by
the digest. So an operation may take hours, a message that was lost costs one more question, and an engine that is
started again finds the request where it was.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from fedcollm_privacy._validate import integer_at_least, positive
from fedcollm_privacy.identity import SigningKey
from secure_fedcollm.answer_memory import CODES, NONCE_BYTES, request_digest
from secure_fedcollm.local_socket import Field, Fields, ask_local, usable_path
from secure_fedcollm.transport import Reply

__all__ = [
    "NO_ANSWER",
    "NO_RELAY",
    "PIECE_BYTES",
    "EngineTransport",
    "Observe",
    "Post",
    "RequestEvent",
    "addressed",
    "relay_post",
]

_LOG = logging.getLogger("fedcollm")

NO_ANSWER = "no answer"
"""The code of a site that gave none before the deadline, or could not be reached."""

NO_RELAY = "no relay"
"""The word of a `Post` whose own end of the engine is away; no site is blamed for that."""

PIECE_BYTES = 2**21
"""Longest part of a body or answer in one message."""

_AWAY_S = 8.0  # so long a site is tried that could not be reached the last time
_SLOWEST_BYTES_S = 2**16  # a line that moves fewer bytes a second cannot be worked with

# Sends a site one message within so many seconds; None when no answer came back.
Post = Callable[[str, Fields, float], Fields | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvent:
    """What became of a request, for whoever watches.

    Attributes:
        site: the site that is asked.
        operation: what it is asked for.
        state: ``asked``, and later one of ``answered``, ``declined``, ``diverged``, ``failed``, ``no answer``.
        seconds: since it was asked.
        bytes_out: of bodies, what was sent again included.
        bytes_in: of answers.
    """

    site: str
    operation: str
    state: str
    seconds: float
    bytes_out: int
    bytes_in: int


Observe = Callable[[RequestEvent], None]


def addressed(digest: str, site: str) -> bytes:
    """What the server signs of a request: its digest, and whom it is for."""
    return f"{digest}\0{site}".encode()


def relay_post(socket: Path) -> Post:
    """Sends messages through the engine's process that listens at ``socket``; InvalidValue for too long a path."""
    usable_path(socket)

    def post(site: str, fields: Fields, timeout_s: float) -> Fields | None:
        answer = ask_local(socket, {**fields, "site": site, "timeout_s": timeout_s}, timeout_s + 5.0)
        if answer is None:
            return {"word": NO_RELAY}
        return None if answer.get("word") == "away" else answer

    return post


class EngineTransport:
    """Sites reached through an engine.

    Args:
        post: sends one message to a site.
        run: names the run in every request's digest.
        sites: names of the sites.
        key: the server's; it signs every request, for one site each.
        deadlines_s: seconds for an operation, by its name.
        deadline_s: seconds for every other operation.
        unreachable_s: a site that cannot be reached for so long has given no answer, however late the deadline. Longer
            than the engine needs to be started again. While the server's own end is away, it does not count.
        wait_s: how long a site holds a question for an answer that is not ready.
        largest_answer: a longer answer counts as ``failed``.
        observe: is told of every request; called from several threads.
        stopped: says that the run is being stopped; then nobody is waited for.

    Raises:
        InvalidValue: a time that is not positive, a length below one.
    """

    def __init__(
        self,
        post: Post,
        run: str,
        sites: tuple[str, ...],
        *,
        key: SigningKey,
        deadlines_s: Mapping[str, float] | None = None,
        deadline_s: float = 600.0,
        unreachable_s: float = 120.0,
        wait_s: float = 5.0,
        largest_answer: int = 2**28,
        observe: Observe | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        for operation, seconds in (deadlines_s or {}).items():
            positive(**{f"deadlines_s[{operation}]": seconds})
        positive(deadline_s=deadline_s, unreachable_s=unreachable_s, wait_s=wait_s)
        integer_at_least(1, largest_answer=largest_answer)
        self._post, self._run, self._sites, self._key = post, run, sites, key
        self._deadlines_s, self._deadline_s = dict(deadlines_s or {}), deadline_s
        self._unreachable_s, self._wait_s, self._largest_answer = unreachable_s, wait_s, largest_answer
        self._observe, self._stopped = observe, stopped
        self._away = set[str]()  # sites that could not be reached the last time

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order given."""
        return self._sites

    def ask(self, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Reply]:
        """Ask all named sites at once; yield one reply a site, as they arrive."""
        replies = SimpleQueue[Reply]()

        def one(site: str, body: bytes) -> None:
            code, answer = "failed", None
            try:
                code, answer = self._one(site, operation, body)
            finally:  # a reply a site, whatever happened; else the round would wait for ever
                replies.put(Reply(site=site, body=answer, code=None if answer is not None else code))

        for site, body in bodies.items():
            threading.Thread(target=one, args=(site, body), name=f"ask {site}", daemon=True).start()
        for _ in bodies:
            yield replies.get()

    def _one(self, site: str, operation: str, body: bytes) -> tuple[str, bytes | None]:
        begun = time.monotonic()
        exchange = _Exchange(self._run, operation, body, self._largest_answer)
        signature = self._key.sign("request", addressed(exchange.digest, site))
        self._tell(site, operation, "asked", begun, exchange)
        code = "failed"
        try:
            code = self._exchanged(site, exchange, signature, begun, self._deadlines_s.get(operation, self._deadline_s))
        finally:
            self._tell(site, operation, code or "answered", begun, exchange)
        return code, None if code else bytes(exchange.answer)

    def _exchanged(self, site: str, exchange: _Exchange, signature: bytes, begun: float, deadline_s: float) -> str:
        """Ask until there is an answer (the empty code), or a code instead."""
        now, deadline, reached, patience_s = begun, begun + deadline_s, begun, self._unreachable_s
        if site in self._away:  # a round asks several times, and each would wait for it anew
            patience_s = min(patience_s, _AWAY_S)
            exchange.has = None  # a short question first; the body goes out once the site is back
        while now < min(deadline, reached + patience_s) and not self._stopped():
            wait_s = min(self._wait_s, deadline - now)
            fields = exchange.message(wait_s) | {"signature": signature}
            # A piece takes its time on a slow line, in either direction.
            timeout_s = wait_s + 10.0 + PIECE_BYTES / _SLOWEST_BYTES_S
            reply = self._post(site, fields, min(timeout_s, deadline - now, patience_s))
            word = exchange.heard(reply)
            if word in ("", *CODES):
                return word
            asked, now = now, time.monotonic()
            if reply is not None:
                reached = now
            if word not in ("lost", NO_RELAY):
                patience_s = self._unreachable_s
                self._away.discard(site)
            # What a site says at once instead of holding the line is not asked for in a busy loop.
            if word in ("lost", NO_RELAY) or (word == "again" and now - asked < min(0.1, wait_s)):
                time.sleep(max(0.0, min(0.5 if word != "again" else 0.1, deadline - now)))
                now = time.monotonic()
        if now >= reached + patience_s and not self._stopped():
            self._away.add(site)
        return NO_ANSWER

    def _tell(self, site: str, operation: str, state: str, begun: float, exchange: _Exchange) -> None:
        if self._observe is None:
            return
        event = RequestEvent(
            site=site,
            operation=operation,
            state=state,
            seconds=time.monotonic() - begun,
            bytes_out=exchange.bytes_out,
            bytes_in=exchange.bytes_in,
        )
        try:
            self._observe(event)
        except Exception:  # who watches must not change what is watched
            _LOG.exception("a request's observer failed")


@dataclass(slots=True)
class _Exchange:
    """One request on its way: which bytes of its body the site has, and which of the answer are here."""

    run: str
    operation: str
    body: bytes
    largest_answer: int
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(NONCE_BYTES))
    digest: str = ""
    has: int | None = 0  # bytes of the body at the site; None: not known, or all of them
    answer: bytearray = field(default_factory=bytearray)
    sha256: str = ""
    bytes_out: int = 0
    bytes_in: int = 0

    def __post_init__(self) -> None:
        self.digest = request_digest(self.run, self.nonce, self.operation, self.body)

    def message(self, wait_s: float) -> dict[str, Field]:
        """The next message: a piece of the body, or a question for the answer."""
        fields: dict[str, Field] = {"digest": self.digest, "wait_s": wait_s, "offset": len(self.answer)}
        if self.has is not None:
            piece = self.body[self.has : self.has + PIECE_BYTES]
            fields |= {"run": self.run, "nonce": self.nonce, "operation": self.operation}
            fields |= {"size": len(self.body), "at": self.has, "body": piece}
            self.bytes_out += len(piece)
        return fields

    def heard(self, reply: Fields | None) -> str:
        """What came of it: empty when all of the answer is here, a code, or ``lost``, ``again``, ``on``, `NO_RELAY`."""
        had, self.has = self.has, None
        word = None if reply is None else reply.get("word")
        if reply is None or word == NO_RELAY:
            return "lost" if reply is None else NO_RELAY
        if word == "working":
            return "again"
        if word == "wanted":
            has = reply.get("has")
            if type(has) is not int or not 0 <= has <= max(0, len(self.body) - 1):
                return "failed"
            self.has = has
            return "on" if had is None or has > had else "again"
        if word == "answered":
            return self._answered(reply)
        return word if isinstance(word, str) and word in CODES else "failed"

    def _answered(self, reply: Fields) -> str:
        sha256, size, offset, piece = (reply.get(name) for name in ("sha256", "size", "offset", "body"))
        if type(sha256) is not str or type(size) is not int or type(offset) is not int or type(piece) is not bytes:
            return "failed"
        self.bytes_in += len(piece)
        if self.sha256 != sha256:  # the first piece, or a site that was started again has worked on it anew
            self.sha256, begun = sha256, len(self.answer)
            self.answer.clear()
            if begun:
                return "again"
        if not 0 <= size <= self.largest_answer or offset != len(self.answer):
            return "failed"
        if len(piece) != min(PIECE_BYTES, size - offset):
            return "failed"
        self.answer += piece
        if len(self.answer) < size:
            return "on"
        return "" if hashlib.sha256(self.answer).hexdigest() == sha256 else "failed"
