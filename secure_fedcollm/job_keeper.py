"""Keeps one job of relays running at FLARE's server, whatever dies: the engine itself never begins a job again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedcollm_privacy._validate import positive
from secure_fedcollm.local_socket import ask_local, usable_path

if TYPE_CHECKING:
    from secure_fedcollm.kit import Kit

__all__ = ["JobKeeper", "Jobs"]

_LOG = logging.getLogger("fedcollm")
_QUICK_S = 20.0  # a job that lived no longer than this failed at its start
_LONGEST_PAUSE_S = 300.0
_FRESH_S = 30.0  # three of FLARE's heartbeats


class Jobs(Protocol):
    """The engine's jobs, as `secure_fedcollm.flare.FlareJobs` reaches them."""

    def connected(self) -> dict[str, float]:
        """When each connected site was last heard of, by this machine's clock."""
        ...

    def unfinished(self) -> list[str]:
        """Our jobs that have not ended."""
        ...

    def running(self) -> frozenset[str]:
        """The jobs for which the engine's server has a process."""
        ...

    def status(self, job: str) -> str:
        """It begins with ``FINISHED`` when the job has ended."""
        ...

    def submit(self, sites: Iterable[str]) -> str:
        """Begin a job at these sites; its id."""
        ...

    def abort(self, job: str) -> None:
        """End a job."""
        ...

    def close(self) -> None:
        """End the session."""
        ...


class JobKeeper:
    """A thread that begins a job when there is none, and another one instead of a job that does not do its work.

    A job is given up when it has ended, when its relay at the server does not answer, and when a site cannot be
    reached through it from which the engine has heard since: that site came back and waits for the next job. Jobs that
    fail at once, or that such a site does not join, are followed by longer and longer pauses.

    Args:
        jobs: the engine's.
        sites: names of the roster's sites.
        socket: where the server's relay listens.
        pause_s: between two looks.
        settle_s: a first job waits so long for sites that are still connecting.
        silent_s: a relay may be silent for so long.
        cool_s: a job is not given up for a returned site before this age. Twice this age, if the site has never been
            reached through the job: it may still be starting there.

    Raises:
        InvalidValue: a time that is not positive, or too long a path.
    """

    def __init__(
        self,
        jobs: Jobs,
        sites: Iterable[str],
        socket: Path,
        *,
        pause_s: float = 1.0,
        settle_s: float = 3.0,
        silent_s: float = 30.0,
        cool_s: float = 15.0,
    ) -> None:
        positive(pause_s=pause_s, settle_s=settle_s, silent_s=silent_s, cool_s=cool_s)
        self._jobs, self._sites, self._socket = jobs, tuple(sites), usable_path(socket)
        self._pause_s, self._settle_s, self._silent_s, self._cool_s = pause_s, settle_s, silent_s, cool_s
        self._job: str | None = None
        self._begun = self._heard = self._changed = self._not_before = 0.0
        self._seen: frozenset[str] = frozenset()
        self._missing: dict[str, tuple[float, int]] = {}  # by site: first failed look, and how many since
        self._quick_ends = self._gone = 0
        self._reachable: frozenset[str] = frozenset()
        self._joined: frozenset[str] = frozenset()
        self._error, self._others_left = "", False
        self._stopped = threading.Event()
        self._pings = ThreadPoolExecutor(max_workers=max(1, min(16, len(self._sites))), thread_name_prefix="ping")
        self._thread = threading.Thread(target=self._keep, name="job keeper", daemon=True)

    @classmethod
    def of(cls, kit: Kit, sites: Iterable[str]) -> JobKeeper:
        """The keeper at a server's kit, for these sites."""
        from secure_fedcollm.flare import FlareJobs

        return cls(FlareJobs(kit.engine_admin, kit.lead), sites, kit.socket)

    @property
    def reachable(self) -> frozenset[str]:
        """The sites whose relay answered at the last look."""
        return self._reachable

    def start(self) -> None:
        """Begin to look after the job."""
        self._thread.start()

    def close(self) -> None:
        """End the job and the thread."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._pings.shutdown(wait=True)
        if self._job is not None:
            with suppress(Exception):  # the engine may be gone already, and its jobs with it
                self._jobs.abort(self._job)
        self._jobs.close()

    def _keep(self) -> None:
        while not self._stopped.wait(self._pause_s):
            try:
                self.look()
                self._error = ""
            except Exception as error:  # whatever the engine does, its keeper stays; told once
                if type(error).__name__ != self._error:
                    _LOG.warning("the engine's server does not answer (%s); trying on", type(error).__name__)
                self._error = type(error).__name__

    def look(self) -> None:
        """Look once, and do what is due. Raises what the engine raises when it cannot be asked."""
        if self._job is None:
            self._begin()
        else:
            self._check(self._job)

    def _begin(self) -> None:
        now = time.time()
        if now < self._not_before:
            return
        heard = self._jobs.connected()
        fresh = frozenset(site for site in self._sites if now - heard.get(site, 0.0) < _FRESH_S)
        if fresh != self._seen:
            self._seen, self._changed = fresh, now
        if not fresh or (len(fresh) < len(self._sites) and now - self._changed < self._settle_s):
            return
        self._job = self._jobs.submit(sorted(fresh))
        self._others_left = True
        self._begun = self._heard = time.time()
        self._gone = 0
        self._missing, self._reachable, self._joined = {}, frozenset(), frozenset()
        _LOG.info("engine job begun at %s", ", ".join(sorted(fresh)))

    def _check(self, job: str) -> None:
        now = time.time()
        hello = ask_local(self._socket, {"hello": 1}, 5.0)
        if hello is not None and hello.get("job") == job:
            self._heard = now
            self._end_others(job)
            self._look_for_sites(job)
            return
        status = self._jobs.status(job)
        if status.startswith("FINISHED"):
            self._give_up("it has ended", ended=True)
            return
        # So it stays after the server was killed. Once may be a moment between the engine's own two steps.
        gone = status == "RUNNING" and job not in self._jobs.running()
        self._gone = self._gone + 1 if gone else 0
        if self._gone > 1:
            self._give_up("nothing runs of it", ended=True)
        elif now - self._heard > self._silent_s:
            self._give_up("its relay does not answer")

    def _end_others(self, job: str) -> None:
        # Only now: until the new relay had taken the socket, the one before it still served the other sites.
        if self._others_left:
            for other in self._jobs.unfinished():
                if other != job:
                    with suppress(Exception):  # the engine may list as running what it no longer knows
                        self._jobs.abort(other)
            self._others_left = False

    def _look_for_sites(self, job: str) -> None:
        started = time.time()
        here = dict(zip(self._sites, self._pings.map(self._reaches, self._sites), strict=True))
        self._reachable = frozenset(site for site in self._sites if here[site])
        self._joined |= self._reachable
        for site in self._sites:
            first, count = self._missing.get(site, (started, 0))
            if here[site]:
                self._missing.pop(site, None)
            else:
                self._missing[site] = first, count + 1
        if not self._missing:
            self._quick_ends = 0
            return
        if self._jobs.status(job).startswith("FINISHED"):
            self._give_up("it has ended", ended=True)
            return
        heard = self._jobs.connected()
        back = [s for s, (first, count) in self._missing.items() if count > 1 and heard.get(s, 0.0) > first]
        patience = 2 ** min(self._quick_ends, 10) * (1 if self._joined & set(back) else 2)
        if back and time.time() - self._begun > min(_LONGEST_PAUSE_S, self._cool_s * patience):
            self._quick_ends += 1
            self._give_up(f"{', '.join(back)} came back")

    def _reaches(self, site: str) -> bool:
        answer = ask_local(self._socket, {"site": site, "ping": 1, "timeout_s": 3.0}, 5.0)
        return answer is not None and answer.get("word") == "here"

    def _give_up(self, reason: str, *, ended: bool = False) -> None:
        _LOG.warning("engine job given up: %s; another one follows", reason)
        self._job, self._reachable = None, frozenset()
        lived_s = time.time() - self._begun
        if ended and lived_s < _QUICK_S:
            self._quick_ends += 1
            self._not_before = time.time() + min(_LONGEST_PAUSE_S, 2.0 ** min(self._quick_ends, 10) - 1)
