"""The board of a long-lived process: told what happens, it keeps ``status.json`` true for whoever watches.

Watching never disturbs what is watched: no method waits for a disk longer than one small file takes, and a file that
cannot be written is logged once and not an error of the run.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import FedCollmError, InvalidValue
from secure_fedcollm.snapshot import (
    FORMAT,
    ROUND_SECONDS,
    LeftOut,
    OwnStatus,
    PastRound,
    Requests,
    SiteStatus,
    Snapshot,
    Standing,
    State,
    clipped,
    read_status,
    write_status,
)

if TYPE_CHECKING:  # importing it would import torch, and `fedcollm status` needs none
    from secure_fedcollm.rounds import RoundOutcome

__all__ = ["HISTORY", "OPERATIONS", "Event", "StatusBoard", "read_status"]

_LOG = logging.getLogger("fedcollm")

HISTORY = 200
"""So many past rounds are kept."""
OPERATIONS = (
    *("offer", "advertise", "share", "accept", "train", "part", "agree", "unmask", "settle", "head", "witness"),
    *("claims", "endorse", "distil", "evaluate"),
)
"""What can be under way: what sites are asked, and the last two at the server."""
STATES = ("asked", "answered", "declined", "diverged", "failed", "no answer")

_JOINED = ("advertise", "share", "accept", "train")  # what only a site that takes part answers

_EVERY_S = 1.0  # between two writings, apart from the ends of rounds
_HEARTBEAT_S = 10.0


class Event(Protocol):
    """`secure_fedcollm.engine_transport.RequestEvent`: a request begins or ends.

    Bytes and seconds of an event whose state is ``asked`` are not counted: the one that ends the request has them all.
    """

    @property
    def site(self) -> str:
        """Whom it is for."""
        ...

    @property
    def operation(self) -> str:
        """What is asked."""
        ...

    @property
    def state(self) -> str:
        """One of `STATES`."""
        ...

    @property
    def seconds(self) -> float:
        """Since it was asked."""
        ...

    @property
    def bytes_out(self) -> int:
        """Sent to the site."""
        ...

    @property
    def bytes_in(self) -> int:
        """Received from it."""
        ...


def _fresh(name: str) -> SiteStatus:
    counts = dict.fromkeys(("bytes_up", "bytes_down", "round_bytes_up", "round_bytes_down"), 0)
    nothing = dict.fromkeys(("seen", "train_seconds", "epsilon", "charged", "delta", "unit"))
    return SiteStatus(name=name, standing="unknown", operation="", state="", code="", **counts, **nothing)  # type: ignore[arg-type]


def _heard(site: SiteStatus, event: Event, now: float) -> SiteStatus:
    site = replace(site, operation=clipped(event.operation), state=event.state)
    if event.state == "asked":
        return site
    site = replace(
        site,
        bytes_up=site.bytes_up + event.bytes_in,
        bytes_down=site.bytes_down + event.bytes_out,
        round_bytes_up=site.round_bytes_up + event.bytes_in,
        round_bytes_down=site.round_bytes_down + event.bytes_out,
        code="" if event.state == "answered" else event.state,
        seen=site.seen if event.state == "no answer" else now,
    )
    trained = event.operation == "train" and event.state == "answered"
    return replace(site, train_seconds=event.seconds) if trained else site


def _agreed(before: Standing, event: Event) -> Standing:
    """What a site said of its taking part, once this event is heard."""
    if event.state == "declined" and event.operation in ("offer", "advertise"):
        return "declined"
    if event.state == "answered" and event.operation in _JOINED:
        return "joined"
    if event.state == "answered" and event.operation == "offer" and before != "joined":
        return "waiting"  # until `enlisted` or the round says more
    return before


class StatusBoard:
    """What one process does, kept in memory and on disk. Every method may be called from any thread.

    A thread of its own writes the file at most once a second and at least every ten: a file that is older belongs to a
    process that hangs.

    Args:
        path: the ``status.json``; its folder exists.
        role: ``server`` or ``site``.
        name: the party's public name.
        federation: the federation's public name.
        clock: Unix time in seconds.

    Raises:
        InvalidValue: role or name is not allowed.
    """

    def __init__(
        self, path: Path, role: str, name: str, *, federation: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        _validate.one_of(("server", "site"), role=role)
        _validate.public_name(name=name)
        self._path, self._role, self._name, self._federation, self._clock = path, role, name, federation, clock
        self._lock, self._writing, self._changed = threading.Lock(), threading.Lock(), threading.Event()
        self._closed, self._unwritable = threading.Event(), False
        self._since = self._phase_since = clock()
        self._state: State = "starting"
        self._failure = self._run_id = self._phase = ""
        self._rounds = self._opened = self._lost = self._server_round = self._attempt = 0
        self._budget: tuple[float | None, float | None] = (None, None)
        self._sites: dict[str, SiteStatus] = {}
        self._said: dict[str, Standing] = {}
        self._requests, self._outcomes = Counter[tuple[str, str]](), Counter[str]()
        self._classes, self._round_seconds = [0] * (len(ROUND_SECONDS) + 1), 0.0
        self._round_began = clock()
        self._history: deque[PastRound] = deque(maxlen=HISTORY)
        self._own: OwnStatus | None = None
        self._thread = threading.Thread(target=self._keep, name="status", daemon=True)
        self._thread.start()

    def begin(
        self,
        run_id: str,
        rounds: int,
        sites: Iterable[str],
        *,
        epsilon: float | None = None,
        delta: float | None = None,
    ) -> None:
        """A run begins, or goes on in this process: then what the file says of its rounds is taken up.

        Args:
            run_id: the run's name.
            rounds: planned for the whole run.
            sites: their public names.
            epsilon: what one site may spend in it, by the configuration; None in a non-private run.
            delta: likewise.

        Raises:
            InvalidValue: a value is not allowed.
        """
        names = tuple(sites)
        for name in names:
            _validate.public_name(site=name)
        _validate.integer_at_least(0, rounds=rounds)
        before = self._before(run_id)
        with self._lock:
            self._run_id, self._rounds, self._opened, self._lost = clipped(run_id), rounds, 0, 0
            self._budget, self._state, self._failure = (epsilon, delta), "running", ""
            self._sites = {name: self._sites.get(name) or _fresh(name) for name in names}
            if before is not None:
                self._take_up(before)
        self._changed.set()

    def round(self, server_round: int, attempt: int) -> None:
        """A round begins; what this round has moved is counted from zero."""
        _validate.integer_at_least(1, server_round=server_round, attempt=attempt)
        with self._lock:
            self._server_round, self._attempt, self._round_began = server_round, attempt, self._clock()
            for name, site in self._sites.items():
                self._sites[name] = replace(site, round_bytes_up=0, round_bytes_down=0)
        self._changed.set()

    def stage(self, kind: str) -> None:
        """A stage of `RunProgress` begins; ``distil`` and ``evaluate`` are phases that no request tells of."""
        if kind in OPERATIONS:
            with self._lock:
                self._enter(kind)
            self._changed.set()

    def enlisted(self, site: str, standing: str) -> None:
        """What a site answered to the offer of a run: ``joined`` or ``waiting``."""
        if standing not in ("joined", "waiting"):
            raise InvalidValue("standing", standing, "joined | waiting")
        with self._lock:
            self._said[site] = "joined" if standing == "joined" else "waiting"
            self._put(site, standing=self._said[site])
        self._changed.set()

    def observe(self, event: Event) -> None:
        """A request begins or ends; InvalidValue for a state or size that cannot be."""
        _validate.one_of(STATES, state=event.state)
        _validate.integer_at_least(0, bytes_out=event.bytes_out, bytes_in=event.bytes_in)
        with self._lock:
            heard = _heard(self._site(event.site), event, self._clock())
            self._said[event.site] = said = _agreed(self._said.get(event.site, "unknown"), event)
            if event.state != "asked":
                heard = replace(heard, standing="away" if event.state == "no answer" else said)
            self._sites[event.site] = heard
            if event.state == "asked":
                self._enter(event.operation)
            else:
                self._requests[clipped(event.operation), event.state] += 1
        self._changed.set()

    def round_done(self, outcome: RoundOutcome) -> None:
        """A round has ended; on disk when this returns."""
        with self._lock:
            now = self._clock()
            seconds = max(0.0, now - self._round_began)
            self._opened += outcome.outcome == "opened"
            self._lost += outcome.outcome == "lost"
            self._outcomes[outcome.outcome] += 1
            self._classes[bisect_left(ROUND_SECONDS, seconds)] += 1
            self._round_seconds += seconds
            for settlement in outcome.settlements:
                if settlement.private:
                    paid = {name: getattr(settlement, name) for name in ("epsilon", "charged", "delta", "unit")}
                    self._put(settlement.site, **paid)
            for name, code in outcome.left_out.items():
                self._put(name, code=self._site(name).code or clipped(code))
            self._history.append(
                PastRound(
                    server_round=self._server_round,
                    attempt=self._attempt,
                    outcome=outcome.outcome,
                    reason=clipped(outcome.reason),
                    cohort=tuple(outcome.cohort),
                    left_out=tuple(LeftOut(site=n, code=clipped(c)) for n, c in sorted(outcome.left_out.items())),
                    seconds=seconds,
                    bytes_up=sum(site.round_bytes_up for site in self._sites.values()),
                    bytes_down=sum(site.round_bytes_down for site in self._sites.values()),
                    ended=now,
                )
            )
            self._enter("")
        self._write()

    def site(self, status: Mapping[str, Any]) -> None:
        """What `SiteHost.status` says; a site's board shows it."""
        own = OwnStatus.of(status)
        with self._lock:
            self._state = "running" if self._state == "starting" else self._state
            self._run_id, self._own = clipped(own.run), own
            self._server_round = own.server_round or 0
            self._enter(own.operation)
        self._changed.set()

    def finished(self) -> None:
        """The run has ended well; on disk when this returns."""
        self._end("finished", "")

    def failed(self, text: str) -> None:
        """The run has ended otherwise, with this reason; on disk when this returns."""
        self._end("failed", clipped(text))

    def close(self) -> None:
        """Write a last time and write no more."""
        self._closed.set()
        self._changed.set()
        self._thread.join()
        self._write()

    def snapshot(self) -> Snapshot:
        """What is known now."""
        with self._lock:
            return Snapshot(
                format=FORMAT,
                role="server" if self._role == "server" else "site",
                name=self._name,
                federation=self._federation,
                pid=os.getpid(),
                since=self._since,
                written=self._clock(),
                state=self._state,
                failure=self._failure,
                run_id=self._run_id,
                rounds=self._rounds,
                opened=self._opened,
                lost=self._lost,
                server_round=self._server_round,
                attempt=self._attempt,
                phase=self._phase,
                phase_since=self._phase_since,
                epsilon_budget=self._budget[0],
                delta_budget=self._budget[1],
                sites=tuple(self._sites.values()),
                requests=tuple(
                    Requests(operation=operation, state=state, count=count)
                    for (operation, state), count in sorted(self._requests.items())
                ),
                round_seconds=tuple(self._classes),
                round_seconds_sum=self._round_seconds,
                outcomes=tuple(
                    Requests(operation="round", state=outcome, count=count)
                    for outcome, count in sorted(self._outcomes.items())
                ),
                history=tuple(self._history),
                own=self._own,
                trouble="",
            )

    def _site(self, name: str) -> SiteStatus:
        return self._sites.setdefault(name, _fresh(name))

    def _put(self, name: str, **fields: Any) -> None:
        self._sites[name] = replace(self._site(name), **fields)

    def _before(self, run_id: str) -> Snapshot | None:
        try:
            before = read_status(self._path)
        except FedCollmError:  # none yet, or one that is damaged or of another version: then it is begun anew
            return None
        return before if before.run_id == run_id and before.role == self._role else None

    def _take_up(self, before: Snapshot) -> None:
        self._opened, self._lost = before.opened, before.lost
        self._history = deque(before.history, maxlen=HISTORY)
        for site in before.sites:
            if site.name in self._sites:
                fields = {name: getattr(site, name) for name in ("seen", "epsilon", "charged", "delta", "unit")}
                self._put(site.name, **fields)

    def _enter(self, operation: str) -> None:
        if operation != self._phase:
            self._phase, self._phase_since = clipped(operation), self._clock()

    def _end(self, state: State, failure: str) -> None:
        with self._lock:
            self._state, self._failure = state, failure
            self._enter("")
        self._write()

    def _keep(self) -> None:
        while not self._closed.is_set():
            self._changed.wait(_HEARTBEAT_S)
            self._changed.clear()
            self._write()
            self._closed.wait(_EVERY_S)

    def _write(self) -> None:
        # The snapshot is taken inside, so that no older one can overwrite a newer one.
        with self._writing:
            try:
                write_status(self._path, self.snapshot())
                self._unwritable = False
            except OSError as error:
                if not self._unwritable:
                    _LOG.warning("%s cannot be written (%s); the run goes on unwatched", self._path, error.strerror)
                self._unwritable = True
