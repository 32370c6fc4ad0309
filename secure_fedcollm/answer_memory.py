"""A site answers every request once: a request that arrives again is answered from memory, never worked on again."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

from fedcollm_privacy._validate import at_least, integer_at_least
from fedcollm_privacy.errors import SiteFailed
from secure_fedcollm.transport import Handler

__all__ = ["CODES", "NONCE_BYTES", "AnswerMemory", "Kept", "Request", "request_digest"]

_LOG = logging.getLogger("fedcollm")

CODES = ("declined", "diverged", "failed")
"""What a site may say instead of an answer; the words of `SiteFailed`."""

NONCE_BYTES = 16
"""Bytes that make one request another than the same question asked before."""

_MOST_WAITING = 64


def request_digest(run: str, nonce: bytes, operation: str, body: bytes) -> str:
    """SHA-256 that names a request: the same run, nonce, operation and body give the same, and nothing else does."""
    hashed = hashlib.sha256()
    for part in (run.encode(), nonce, operation.encode()):
        hashed.update(len(part).to_bytes(4, "big") + part)
    hashed.update(body)
    return hashed.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A whole request, as its digest names it."""

    run: str
    nonce: bytes
    operation: str
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is known of a request: ``body`` when answered, else a ``word``.

    Attributes:
        word: ``answered``; one of `CODES`; ``working`` when it is not done yet; ``unknown`` when it never came.
        body: the answer.
        sha256: of the answer, in hex; empty when there is none.
    """

    word: str
    body: bytes = b""
    sha256: str = ""


class AnswerMemory:
    """Works on requests one at a time, in order of arrival, each of them once.

    Args:
        handler: answers a request, as `secure_fedcollm.site.Site.handle` does.
        largest_body: a longer request is declined unread.
        kept_bytes: so many bytes of answers are kept, the newest; the newest answer always is.
        kept_requests: of so many requests it is known that they came. A request whose answer is no longer kept is
            declined. Beyond this number the oldest is forgotten, and would be worked on again.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        largest_body: int = 2**29,
        kept_bytes: int = 2**25,
        kept_requests: int = 2**16,
    ) -> None:
        integer_at_least(1, largest_body=largest_body, kept_bytes=kept_bytes, kept_requests=kept_requests)
        self._handler, self._largest_body = handler, largest_body
        self._kept_bytes, self._kept_requests = kept_bytes, kept_requests
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="site")
        self._requests: OrderedDict[str, Future[Kept] | None] = OrderedDict()  # None: done, answer no longer kept
        self._done: OrderedDict[str, int] = OrderedDict()  # digest to size, oldest first
        self._waiting, self._held_bytes = 0, 0

    def ask(self, digest: str, request: Request | None, wait_s: float) -> Kept:
        """The answer, waiting at most ``wait_s`` for it.

        Args:
            digest: what `request_digest` says of the request.
            request: None asks for the answer of a request that was sent before.
            wait_s: 0 does not wait.
        """
        at_least(0, wait_s=wait_s)
        with self._lock:
            future = self._requests.get(digest)
            known = digest in self._requests
        if not known:
            if request is None:
                return Kept(word="unknown")
            named = request_digest(request.run, request.nonce, request.operation, request.body)
            if len(request.body) > self._largest_body or named != digest:
                return Kept(word="declined")
            with self._lock:
                future = self._requests.get(digest)
                if digest not in self._requests:
                    if self._waiting >= _MOST_WAITING:
                        return Kept(word="failed")
                    future = self._started(digest, request)
        if future is None:
            return Kept(word="declined")
        try:
            return future.result(timeout=wait_s)
        except (FutureTimeout, CancelledError):
            return Kept(word="working")

    def close(self) -> None:
        """Take no more requests; wait until the one that is being worked on is done."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _started(self, digest: str, request: Request) -> Future[Kept]:
        future = self._worker.submit(self._work, digest, request.operation, request.body)
        self._requests[digest] = future
        self._waiting += 1
        return future

    def _work(self, digest: str, operation: str, body: bytes) -> Kept:
        try:
            answer = self._handler(operation, body)
            kept = Kept(word="answered", body=answer, sha256=hashlib.sha256(answer).hexdigest())
        except SiteFailed as failure:
            kept = Kept(word=failure.code if failure.code in CODES else "failed")
        except Exception:  # whatever it was, its text stays here and the server is told a code
            _LOG.exception("a request of operation %.40r failed", operation)
            kept = Kept(word="failed")
        self._forget_old(digest, len(kept.body))
        return kept

    def _forget_old(self, digest: str, size: int) -> None:
        with self._lock:
            self._waiting -= 1
            self._done[digest] = size
            self._held_bytes += size
            while self._held_bytes > self._kept_bytes and len(self._done) > 1:
                oldest, freed = self._done.popitem(last=False)
                self._requests[oldest] = None
                self._held_bytes -= freed
            # Never one that is being worked on: at most _MOST_WAITING are, and they are the newest.
            while len(self._requests) > self._kept_requests + _MOST_WAITING:
                gone, _ = self._requests.popitem(last=False)
                self._held_bytes -= self._done.pop(gone, 0)
