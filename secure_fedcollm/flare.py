"""NVIDIA FLARE as a carrier of bytes, and nothing more. The only module that knows the engine.

FLARE brings mutually authenticated TLS, start-up kits, a list of classes that a party lets a job name, and a process a
job at server and sites. Those processes run the two relays below: each passes messages between FLARE's auxiliary
messages and a Unix socket, at which the party's own process listens or asks. They hold no key, no model and no data,
and may be killed at any moment.

A job is three JSON files that name one class at each side, without arguments. FLARE serializes messages with FOBS,
which is msgpack plus a closed list of types (no pickle); only text, numbers and ``bytes`` are passed on.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from secure_fedcollm.engine_rules import SERVER_RELAY, SITE_RELAY
from secure_fedcollm.local_socket import Field, LocalServer, ask_local

__all__ = ["SOCKET", "FlareJobs", "ServerRelay", "SiteRelay"]

_LOG = logging.getLogger("fedcollm")
_TOPIC = "fedcollm"
_FIELDS = frozenset(
    {"digest", "signature", "wait_s", "offset", "run", "nonce", "operation", "size", "at", "body", "ping"}
    | {"word", "has", "sha256"}
)
_LONGEST_S = 120.0
_JOB_NAME = "fedcollm"

SOCKET = "FEDCOLLM_SOCKET"
"""Environment variable of FLARE's processes: where the party's own process and the relay meet."""


def _plain(found: Mapping[str, object]) -> dict[str, Field] | None:
    """The fields that are passed on; None when one of them is of another type."""
    fields = {name: value for name, value in found.items() if name in _FIELDS}
    if all(type(value) in (bytes, str, float, int) for value in fields.values()):
        return fields  # type: ignore[return-value]
    return None


class SiteRelay(Executor):  # type: ignore[misc]
    """At a site: passes what FLARE brings to the site's door, and its answer back. Takes no arguments."""

    def __init__(self) -> None:
        super().__init__()
        self._socket = Path(os.environ[SOCKET])

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Begin to pass messages on when the job starts."""
        if event_type == EventType.START_RUN:
            fl_ctx.get_engine().register_aux_message_handler(topic=_TOPIC, message_handle_func=self._pass)

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """FLARE's tasks are not used; there are none that this site would do."""
        return make_reply(ReturnCode.TASK_UNKNOWN)

    def _pass(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        fields = _plain(request)
        answer: Mapping[str, Field] | None = {"word": "declined"}
        if fields is not None and "ping" in fields:
            answer = {"word": "here"}
        elif fields is not None:
            wait_s = fields.get("wait_s")
            # Whether the message is sound is for the door to say; here it only must not hold a thread for ever.
            held_s = min(wait_s, 60.0) if isinstance(wait_s, int | float) and wait_s >= 0 else 0.0
            answer = ask_local(self._socket, fields, held_s + 30.0)
        reply = make_reply(ReturnCode.OK)
        reply.update(answer or {"word": "away"})
        return reply


class ServerRelay(Controller):  # type: ignore[misc]
    """At the server: listens at the socket, and sends each message to the site that it names. Takes no arguments.

    A message without a site is for the relay, which answers with the job's id.
    """

    def __init__(self) -> None:
        super().__init__()
        self._socket = Path(os.environ[SOCKET])
        self._engine: Any = None
        self._job = ""

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is prepared."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is left."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Pass messages on until the job is aborted."""
        self._engine, self._job = fl_ctx.get_engine(), fl_ctx.get_job_id()
        listening = LocalServer(self._socket, self._pass, take_over=True)
        try:
            while not abort_signal.triggered:
                time.sleep(0.2)
        finally:
            listening.close(join=False)

    def process_result_of_unknown_task(self, *args: Any, **kwargs: Any) -> None:
        """No tasks are given, so no result is awaited."""

    def _pass(self, fields: dict[str, Field]) -> Mapping[str, Field]:
        site, timeout_s = fields.get("site"), fields.get("timeout_s")
        if type(site) is not str:
            return {"word": "here", "job": self._job}
        request = Shareable()
        request.update({name: value for name, value in fields.items() if name in _FIELDS})
        seconds = min(float(timeout_s), _LONGEST_S) if isinstance(timeout_s, int | float) else _LONGEST_S
        with self._engine.new_context() as context:
            answers = self._engine.send_aux_request(
                targets=[site], topic=_TOPIC, request=request, timeout=seconds, fl_ctx=context, optional=True
            )
        answer = answers.get(site) if isinstance(answers, dict) else None
        if not isinstance(answer, Shareable) or answer.get_return_code() != ReturnCode.OK:
            return {"word": "away"}
        return _plain(answer) or {"word": "failed"}


class FlareJobs:
    """Jobs of relays, through an administrator's session at FLARE's server; opened when needed, again after an error.

    Every method raises FLARE's or the connection's error when the server cannot be reached or says no.

    Args:
        kit: the administrator's start-up kit.
        name: the administrator's, as in its certificate.
        connect_s: how long to try to reach the server, and to wait for an answer.
    """

    def __init__(self, kit: Path, name: str, *, connect_s: float = 10.0) -> None:
        self._kit, self._name, self._connect_s = kit, name, connect_s
        self._session: Any = None

    def connected(self) -> dict[str, float]:
        """When each site's engine process was last heard of, in seconds since 1970; sites that FLARE lists."""
        info = self._ask("get_system_info")
        return {str(client.name): float(client.last_connect_time or 0.0) for client in info.client_info}

    def unfinished(self) -> list[str]:
        """Our jobs that have not ended."""
        jobs = self._ask("list_jobs", name_prefix=_JOB_NAME)
        return [str(job["job_id"]) for job in jobs or () if not str(job.get("status", "")).startswith("FINISHED")]

    def running(self) -> frozenset[str]:
        """The jobs for which FLARE's server has a process."""
        return frozenset(str(job.job_id) for job in self._ask("get_system_info").job_info)

    def status(self, job: str) -> str:
        """FLARE's word, such as ``RUNNING``; it begins with ``FINISHED`` when the job has ended."""
        return str(self._ask("get_job_meta", job)["status"])

    def submit(self, sites: Iterable[str]) -> str:
        """Begin a job at the server and these sites; its id."""
        with TemporaryDirectory(prefix="fedcollm-job-") as temporary:
            return str(self._ask("submit_job", str(_job(Path(temporary), sites))))

    def abort(self, job: str) -> None:
        """End a job; forget one that FLARE only lists, because its server was killed."""
        try:
            self._ask("abort_job", job)
        except Exception:  # FLARE has no error of its own for it
            self._ask("delete_job", job)

    def close(self) -> None:
        """End the session."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(Exception):  # the server may be gone, and there is nothing left to do
                session.close()

    def _ask(self, what: str, *arguments: Any, **options: Any) -> Any:
        from nvflare.fuel.flare_api.flare_api import new_secure_session  # not in the relays' processes

        try:
            if self._session is None:
                self._session = new_secure_session(self._name, str(self._kit), timeout=self._connect_s)
                self._session.set_timeout(self._connect_s)
            return getattr(self._session, what)(*arguments, **options)
        except Exception:
            self.close()
            raise


def _job(folder: Path, sites: Iterable[str]) -> Path:
    """A job's folder: three JSON files that name one class at each side."""
    made = folder / _JOB_NAME
    config = made / "app" / "config"
    config.mkdir(parents=True)
    contents: dict[Path, Any] = {
        made / "meta.json": {
            "name": _JOB_NAME,
            "deploy_map": {"app": ["server", *sites]},
            "min_clients": 1,
            "resource_spec": {},
        },
        config / "config_fed_server.json": {
            "format_version": 2,
            "workflows": [{"id": "relay", "path": SERVER_RELAY}],
            "components": [],
        },
        config / "config_fed_client.json": {
            "format_version": 2,
            "executors": [{"tasks": ["none"], "executor": {"path": SITE_RELAY}}],
            "components": [],
        },
    }
    for path, content in contents.items():
        path.write_text(json.dumps(content))
    return made
