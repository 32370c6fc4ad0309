"""A site's door: what comes from the engine is worked on only if the server of the roster has signed it for this site.

Requests arrive in pieces and are worked on once; answers leave in pieces, or as one of three codes. No text of an
error leaves.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from fedcollm_privacy._validate import integer_at_least, public_name
from fedcollm_privacy.errors import SignatureInvalid
from fedcollm_privacy.identity import PublicIdentity
from secure_fedcollm.answer_memory import NONCE_BYTES, AnswerMemory, Kept, Request
from secure_fedcollm.engine_transport import PIECE_BYTES, addressed
from secure_fedcollm.local_socket import Field, Fields, LocalServer
from secure_fedcollm.transport import Handler

__all__ = ["SiteDoor"]

_LONGEST_WAIT_S = 60.0
_MOST_UNFINISHED = 8


@dataclass(slots=True)
class _Unfinished:
    run: str
    nonce: bytes
    operation: str
    size: int
    data: bytearray = field(default_factory=bytearray)


class SiteDoor:
    """Answers the server's requests at a Unix socket until it is closed.

    Bodies that are not whole yet take at most ``largest_body`` bytes together; the oldest of them are dropped, and the
    server sends a dropped one again.

    Args:
        handler: works on a request; called in one thread, one request at a time.
        name: the site's; requests for another site are declined.
        server: whose signature is believed.
        socket: where the engine's process at this site finds the door.
        largest_body: a longer request is declined unread.

    Raises:
        InvalidValue: the socket's path is too long, or somebody listens there; a name or length is not allowed.
    """

    def __init__(
        self, handler: Handler, *, name: str, server: PublicIdentity, socket: Path, largest_body: int = 2**29
    ) -> None:
        public_name(name=name)
        integer_at_least(1, largest_body=largest_body)
        self._name, self._server, self._largest_body = name, server, largest_body
        self._lock = threading.Lock()
        self._unfinished: OrderedDict[str, _Unfinished] = OrderedDict()
        self._memory = AnswerMemory(handler, largest_body=largest_body)
        self._listening = LocalServer(socket, self.answer)

    def answer(self, fields: dict[str, Field]) -> Fields:
        """What is said to one message, whoever sent it."""
        digest, wait_s, offset = fields.get("digest"), fields.get("wait_s"), fields.get("offset")
        if type(digest) is not str or len(digest) != 64 or not self._signed(digest, fields.get("signature")):
            return {"word": "declined"}
        if type(wait_s) not in (int, float) or not math.isfinite(wait_s) or wait_s < 0:  # type: ignore[arg-type, operator]
            return {"word": "declined"}
        if type(offset) is not int or offset < 0:
            return {"word": "declined"}
        seconds = min(float(wait_s), _LONGEST_WAIT_S)  # type: ignore[arg-type]
        kept = self._memory.ask(digest, None, seconds)
        if kept.word == "unknown":
            whole = self._assembled(digest, fields) if "body" in fields else self._has(digest)
            if not isinstance(whole, Request):
                return {"word": "declined"} if whole is None else {"word": "wanted", "has": whole}
            kept = self._memory.ask(digest, whole, seconds)
        return _told(kept, offset)

    def close(self) -> None:
        """Listen no more; wait until the request that is being worked on is done, and for all threads."""
        self._memory.close()
        self._listening.close()

    def _signed(self, digest: str, signature: object) -> bool:
        if type(signature) is not bytes:
            return False
        try:
            self._server.verify("request", addressed(digest, self._name), signature)
        except SignatureInvalid:
            return False
        return True

    def _has(self, digest: str) -> int:
        with self._lock:
            unfinished = self._unfinished.get(digest)
            return len(unfinished.data) if unfinished else 0

    def _assembled(self, digest: str, fields: Fields) -> Request | int | None:
        """The request, if this piece was its last; how many bytes of it are here; None for a piece that cannot be."""
        run, nonce, operation = fields.get("run"), fields.get("nonce"), fields.get("operation")
        size, at, piece = fields.get("size"), fields.get("at"), fields.get("body")
        if type(run) is not str or type(nonce) is not bytes or type(operation) is not str or type(piece) is not bytes:
            return None
        if type(size) is not int or type(at) is not int or not 0 <= size <= self._largest_body:
            return None
        if len(nonce) != NONCE_BYTES or max(len(run), len(operation)) > 128 or len(piece) > PIECE_BYTES:
            return None
        with self._lock:
            begun = self._unfinished.get(digest)
            if begun is None:
                if at != 0:
                    return 0
                begun = self._unfinished[digest] = _Unfinished(run, nonce, operation, size)
            if (begun.run, begun.nonce, begun.operation, begun.size) != (run, nonce, operation, size):
                return None
            if at != len(begun.data):  # came twice, or late
                return len(begun.data)
            if at + len(piece) > size or (not piece and size):
                return None
            begun.data += piece
            self._drop_oldest(digest)
            if len(begun.data) < size:
                return len(begun.data)
            del self._unfinished[digest]
        return Request(run=run, nonce=nonce, operation=operation, body=bytes(begun.data))

    def _drop_oldest(self, digest: str) -> None:
        self._unfinished.move_to_end(digest)
        while len(self._unfinished) > 1 and (
            len(self._unfinished) > _MOST_UNFINISHED
            or sum(len(u.data) for u in self._unfinished.values()) > self._largest_body
        ):
            self._unfinished.popitem(last=False)


def _told(kept: Kept, offset: int) -> Fields:
    if kept.word != "answered":
        return {"word": kept.word}
    piece = kept.body[offset : offset + PIECE_BYTES]
    return {"word": "answered", "sha256": kept.sha256, "size": len(kept.body), "offset": offset, "body": piece}
