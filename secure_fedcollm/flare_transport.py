"""The same requests and answers over NVIDIA FLARE 2.9: bytes in, bytes out. The only module that knows the engine.

FLARE brings mutually authenticated TLS, start-up kits, a list of classes that a site lets a job name, and a process per
job at server and sites. What runs in those processes is installed there; a job is three JSON files that name one class
at each side. Requests go over FLARE's auxiliary messages, which are pushed; its tasks are polled for.

FLARE serializes messages with FOBS, which is msgpack plus a closed list of types (no pickle). Here only text, numbers
and ``bytes`` go into a message, and an answer or request with anything else in these places is refused.

FLARE carries messages of one site to another, who cannot tell them from the server's. So every request is signed by
the server over its digest and the name of the site that it is for, and a site works on no other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedcollm_privacy._validate import at_least, integer_at_least, positive
from secure_fedcollm.answer_memory import CODES, AnswerMemory, Kept, request_digest
from secure_fedcollm.transport import Handler, Reply, Transport

__all__ = ["NO_ANSWER", "FlareTransport", "ServerController", "SiteExecutor"]

_LOG = logging.getLogger("fedcollm")
_TOPIC = "fedcollm.request"
NO_ANSWER = "no answer"
"""The code of a site that gave none before the deadline, or could not be reached."""

# What the server has sites do, given the way to them and the run's name.
Lead = Callable[[Transport, str], None]
# What answers at a site, given its name and the run's; opened by the first request.
OpenSite = Callable[[str, str], Handler]
# The server's signature over these bytes; and whether a signature over them is the server's.
Sign = Callable[[bytes], bytes]
Signed = Callable[[bytes, bytes], bool]


class FlareTransport:
    """Sites reached through a FLARE job's engine.

    A request is sent once with its body; from then on the site is asked for the answer by the request's digest, so
    that an operation may take hours, and a message that was lost costs a few seconds and nothing else.

    Args:
        engine: FLARE's engine in the server's job process.
        run: names the run in every request's digest.
        sites: names of the sites; FLARE's client names are the roster's.
        sign: the server's signature over a request's digest and site.
        deadlines_s: seconds for an operation, by its name.
        deadline_s: seconds for every other operation.
        unreachable_s: a site that cannot be reached for so long has given no answer, however late the deadline.
        wait_s: how long a site holds a question for an answer that is not ready.
        largest_answer: a longer answer counts as ``failed``.
        stopped: says that the job is being stopped; then nobody is waited for.
    """

    def __init__(
        self,
        engine: Any,
        run: str,
        sites: tuple[str, ...],
        *,
        sign: Sign,
        deadlines_s: Mapping[str, float] | None = None,
        deadline_s: float = 600.0,
        unreachable_s: float = 60.0,
        wait_s: float = 10.0,
        largest_answer: int = 2**26,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        for operation, seconds in (deadlines_s or {}).items():
            positive(**{f"deadlines_s[{operation}]": seconds})
        positive(deadline_s=deadline_s, unreachable_s=unreachable_s, wait_s=wait_s)
        integer_at_least(1, largest_answer=largest_answer)
        self._engine, self._run, self._sites = engine, run, sites
        self._deadlines_s, self._deadline_s = dict(deadlines_s or {}), deadline_s
        self._unreachable_s, self._wait_s, self._largest_answer = unreachable_s, wait_s, largest_answer
        self._sign, self._stopped = sign, stopped

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
        digest = request_digest(self._run, operation, body)
        now = time.monotonic()
        deadline, reached = now + self._deadlines_s.get(operation, self._deadline_s), now
        sent: bytes | None = body
        while now < min(deadline, reached + self._unreachable_s) and not self._stopped():
            left_s = deadline - now
            kept = self._sent(site, digest, operation, sent, min(self._wait_s, left_s), left_s)
            if kept is None:
                time.sleep(max(0.0, min(1.0, deadline - time.monotonic())))
            elif kept.word == "answered":
                return ("", kept.body) if len(kept.body) <= self._largest_answer else ("failed", None)
            elif kept.word in CODES:
                return kept.word, None
            now = time.monotonic()
            reached = reached if kept is None else now
            # A message that was lost may have held the body: the site says so, and only then it goes out again.
            sent = body if kept is not None and kept.word == "unknown" else None
        return NO_ANSWER, None

    def _sent(
        self, site: str, digest: str, operation: str, body: bytes | None, wait_s: float, left_s: float
    ) -> Kept | None:
        """One message and its answer; None when there was none."""
        request = Shareable()
        request.update(digest=digest, operation=operation, wait_s=wait_s)
        request["signature"] = self._sign(_addressed(digest, site))
        if body is not None:
            request["body"] = body
        # A long body takes its time on a slow line; a question without one does not.
        timeout_s = left_s if body is not None and len(body) > 2**20 else min(left_s, wait_s + 10.0)
        with self._engine.new_context() as context:
            answers = self._engine.send_aux_request(
                targets=[site], topic=_TOPIC, request=request, timeout=timeout_s, fl_ctx=context, optional=True
            )
        answer = answers.get(site) if isinstance(answers, dict) else None
        if not isinstance(answer, Shareable) or answer.get_return_code() != ReturnCode.OK:
            return None
        word, given = answer.get("word"), answer.get("body")
        if type(given) is not bytes or word not in (*CODES, "answered", "working", "unknown"):
            return Kept(word="failed")
        return Kept(word=word, body=given)


def _addressed(digest: str, site: str) -> bytes:
    return f"{digest}\0{site}".encode()


class SiteExecutor(Executor):  # type: ignore[misc]
    """A site inside FLARE's job process. A deployment derives a class without arguments and lists it as allowed.

    Without arguments, because FLARE gives a component whatever arguments the server's job names.

    Args:
        open_site: makes the handler at the first request, in the thread that then works on the requests.
        signed: tells the server's signature from others, by a key that is pinned here.
        largest_body: a longer request is declined unread.
    """

    def __init__(self, open_site: OpenSite, *, signed: Signed, largest_body: int = 2**29) -> None:
        super().__init__()
        self._open_site, self._signed, self._largest_body = open_site, signed, largest_body
        self._name = ""
        self._memory: AnswerMemory | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin to answer when the job starts, and end with it."""
        if event_type == EventType.START_RUN:
            name, run = fl_ctx.get_identity_name(), fl_ctx.get_job_id()
            self._name = name
            opened: list[Handler] = []

            def handle(operation: str, body: bytes) -> bytes:
                if not opened:
                    opened.append(self._open_site(name, run))
                return opened[0](operation, body)

            self._memory = AnswerMemory(handle, run, largest_body=self._largest_body)
            fl_ctx.get_engine().register_aux_message_handler(topic=_TOPIC, message_handle_func=self._answer)
        elif event_type == EventType.END_RUN and self._memory is not None:
            self._memory.close()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """FLARE's tasks are not used; there are none that this site would do."""
        return make_reply(ReturnCode.TASK_UNKNOWN)

    def _answer(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        kept = Kept(word="declined")
        digest, operation, body = request.get("digest"), request.get("operation"), request.get("body")
        wait_s, signature = request.get("wait_s"), request.get("signature")
        shapes = type(digest) is str and type(operation) is str and type(body) in (bytes, type(None))
        small = shapes and len(digest) == 64 and len(operation) <= 64 and type(signature) is bytes
        if small and self._memory is not None and self._signed(_addressed(digest, self._name), signature):
            with suppress(ValueError):  # InvalidValue: no time to wait
                at_least(0, wait_s=wait_s)
                kept = self._memory.ask(digest, operation, body, min(wait_s, 60.0))
        reply = make_reply(ReturnCode.OK)
        reply.update(word=kept.word, body=kept.body)
        return reply


class ServerController(Controller):  # type: ignore[misc]
    """The server's loop inside FLARE's job process. A deployment derives a class without arguments.

    Args:
        lead: runs the rounds; ordinary blocking code, and the job ends when it returns.
        sites: names of the sites.
        sign: the server's signature.
        deadlines: keyword arguments of `FlareTransport`: deadlines and sizes.
    """

    def __init__(self, lead: Lead, sites: tuple[str, ...], *, sign: Sign, **deadlines: Any) -> None:
        super().__init__()
        self._lead, self._names, self._sign, self._deadlines = lead, sites, sign, deadlines

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is prepared."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is left."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run the loop; a loop that fails fails the job, and the reason stays in the server's log."""
        run = fl_ctx.get_job_id()
        transport = FlareTransport(
            fl_ctx.get_engine(),
            run,
            self._names,
            sign=self._sign,
            stopped=lambda: abort_signal.triggered,
            **self._deadlines,
        )
        try:
            self._lead(transport, run)
        except Exception:
            _LOG.exception("the server's loop of job %s failed", run)
            self.system_panic("the server's loop failed; its log says why", fl_ctx)

    def process_result_of_unknown_task(self, *args: Any, **kwargs: Any) -> None:
        """No tasks are given, so no result is awaited."""
