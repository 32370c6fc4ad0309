"""A page, a JSON file and metrics of one party's process, on this machine only; it can be looked at and nothing else.

Whoever may log in to this machine may look. Pages of other origins may not: the browser's own rules keep answers from
them, and a name that somebody points at 127.0.0.1 is refused by its Host header.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path
from typing import Final, Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import FedCollmError
from secure_fedcollm.snapshot import ROUND_SECONDS, OwnStatus, Snapshot, read_status
from secure_fedcollm.watch_page import render_watch

__all__ = ["Board", "Watch"]

_LOG = logging.getLogger("fedcollm")
_HERE: Final = "127.0.0.1"
_PLAIN: Final = "text/plain; charset=utf-8"
_SECONDS: Final = 10  # a connection that says nothing for so long is closed


class Board(Protocol):
    """What can say what happens: `secure_fedcollm.status.StatusBoard`."""

    def snapshot(self) -> Snapshot:
        """What is known now."""
        ...


class Watch:
    """Serves ``/``, ``/status.json`` and ``/metrics`` on 127.0.0.1 until closed.

    Args:
        source: a board of this process, or the ``status.json`` that a process writes.
        port: 1 to 65535; 0 takes a free one.

    Raises:
        FedCollmError: the port is taken or not allowed.
    """

    def __init__(self, source: Board | Path, port: int) -> None:
        _validate.integer_at_least(0, port=port)
        _validate.in_range(0, 65535, port=port)
        read = (lambda: read_status(source)) if isinstance(source, Path) else source.snapshot
        registry = CollectorRegistry()
        registry.register(_Metrics(read))
        try:
            self._server = ThreadingHTTPServer((_HERE, port), _handler(read, registry))
        except OSError as error:
            raise FedCollmError(
                f"port {port} of {_HERE} cannot be used ({error.strerror}): choose another with --port"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="watch", daemon=True)
        self._thread.start()
        _LOG.info("watch it on %s", self.address)

    @property
    def address(self) -> str:
        """Where the page is, as a browser takes it."""
        return f"http://{_HERE}:{self._server.server_address[1]}/"

    def close(self) -> None:
        """Answer no more; the port is free when this returns."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(read: Callable[[], Snapshot], registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _SECONDS

        def do_GET(self) -> None:
            port = self.connection.getsockname()[1]
            # A page of another name that resolves to this machine would be of the same origin as this one.
            if self.headers.get_all("Host") not in ([f"{_HERE}:{port}"], [f"localhost:{port}"]):
                self._send(403, _PLAIN, b"this page answers to 127.0.0.1 and localhost only\n")
                return
            try:
                if self.path == "/":
                    nonce = secrets.token_urlsafe(16)
                    self._send(200, "text/html; charset=utf-8", render_watch(read(), nonce).encode(), nonce)
                elif self.path == "/status.json":
                    self._send(200, "application/json", read().to_bytes())
                elif self.path == "/metrics":
                    self._send(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                else:
                    self._send(404, _PLAIN, b"there is /, /status.json and /metrics\n")
            except FedCollmError as error:
                self._send(503, _PLAIN, f"{error}\n".encode("utf-8", "backslashreplace"))

        def _refuse(self) -> None:
            self.close_connection = True  # a body that nobody reads would be taken for the next request
            self._send(405, _PLAIN, b"this can be looked at (GET) and nothing else\n")

        do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

        def _send(self, code: int, kind: str, body: bytes, nonce: str = "") -> None:
            may = f"; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'" if nonce else ""
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header(
                "Content-Security-Policy",
                f"default-src 'none'{may}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            )
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Cache-Control", "no-store")
            if code == 405:
                self.send_header("Allow", "GET")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def version_string(self) -> str:
            return "fedcollm"

        def log_message(self, format: str, *args: object) -> None:
            _LOG.debug(format, *args)

    return Handler


class _Metrics(Collector):
    """A snapshot's numbers as they are when somebody asks, so that page, file and metrics never disagree."""

    def __init__(self, read: Callable[[], Snapshot]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """All metrics; only ``fedcollm_up 0`` where there is no snapshot."""
        up = GaugeMetricFamily("fedcollm_up", "1 while the process works; 0 when it is gone, hangs or has failed.")
        try:
            snapshot = self._read()
        except FedCollmError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], int(not snapshot.trouble and snapshot.state != "failed"))
        yield up
        yield from _own(snapshot.own) if snapshot.own is not None else _server(snapshot)


def _server(snapshot: Snapshot) -> Iterator[Metric]:
    rounds = CounterMetricFamily("fedcollm_rounds", "Rounds since the process started, by outcome.", labels=["outcome"])
    for outcome in ("opened", "lost"):
        rounds.add_metric([outcome], 0 + sum(o.count for o in snapshot.outcomes if o.state == outcome))
    yield rounds
    yield GaugeMetricFamily("fedcollm_rounds_planned", "Rounds of the whole run.", value=snapshot.rounds)
    yield GaugeMetricFamily("fedcollm_server_round", "The current round.", value=snapshot.server_round)
    requests = CounterMetricFamily(
        "fedcollm_site_requests", "Requests to sites that ended, by outcome.", labels=["operation", "state"]
    )
    for request in snapshot.requests:
        requests.add_metric([request.operation, request.state], request.count)
    yield requests
    moved = CounterMetricFamily(
        "fedcollm_site_bytes", "Bytes of requests; up is from the site to the server.", labels=["site", "direction"]
    )
    spent = GaugeMetricFamily(
        "fedcollm_site_epsilon_spent", "What the site published as spent in this run.", labels=["site"]
    )
    joined = GaugeMetricFamily("fedcollm_site_joined", "1 while the site takes part in the run.", labels=["site"])
    for site in snapshot.sites:
        moved.add_metric([site.name, "up"], site.bytes_up)
        moved.add_metric([site.name, "down"], site.bytes_down)
        joined.add_metric([site.name], int(site.standing == "joined"))
        if site.epsilon is not None:
            spent.add_metric([site.name], site.epsilon)
    yield from (moved, joined, spent)
    if snapshot.epsilon_budget is not None:
        yield GaugeMetricFamily(
            "fedcollm_epsilon_budget", "What a site may spend in this run.", value=snapshot.epsilon_budget
        )
    ends = [*map(str, ROUND_SECONDS), "+Inf"]
    counts = accumulate(snapshot.round_seconds)
    yield HistogramMetricFamily(
        "fedcollm_round_seconds",
        "Duration of rounds.",
        buckets=list(zip(ends, counts, strict=True)),
        sum_value=snapshot.round_seconds_sum,
    )


def _own(own: OwnStatus) -> Iterator[Metric]:
    yield CounterMetricFamily("fedcollm_refusals", "What the site's policy has refused.", value=own.refusals)
    yield GaugeMetricFamily("fedcollm_paused", "1 while the site's administrator has paused it.", value=own.paused)
    labels = ["data_set", "days"]
    spent = GaugeMetricFamily(
        "fedcollm_data_set_epsilon_spent", "Charged to the data set in the window.", labels=labels
    )
    cap = GaugeMetricFamily("fedcollm_data_set_epsilon_cap", "The window's cap.", labels=labels)
    for budget in own.budgets:
        window = ["" if budget.days is None else str(budget.days)]
        spent.add_metric([budget.data_set, *window], budget.epsilon)
        cap.add_metric([budget.data_set, *window], budget.cap_epsilon)
    yield from (spent, cap)
