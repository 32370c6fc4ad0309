"""What ``status.json`` holds: the state of one long-lived process at one moment, for whoever watches it.

Only what the party may know anyway: names, operations, codes, times, bytes, and the privacy costs that sites publish in
their settlements. A site's own file also holds its own budgets; it stays at the site. Nothing here is computed from
records, and nothing says how many there are.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import ConfigError, FedCollmError, InvalidValue
from fedcollm_privacy.messages import canonical_json
from secure_fedcollm.strict_build import build

__all__ = [
    "FORMAT",
    "ROUND_SECONDS",
    "STALE_S",
    "Budget",
    "LeftOut",
    "OwnStatus",
    "PastRound",
    "Requests",
    "SiteStatus",
    "Snapshot",
    "Standing",
    "State",
    "clipped",
    "read_status",
    "write_status",
]

FORMAT = "fedcollm-status-v1"
STALE_S = 30.0
"""A process that works writes its file more often than every so many seconds."""
ROUND_SECONDS = (1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 10800.0, 36000.0)
"""Upper ends of the classes in which the rounds' durations are counted; one more class has none."""

_LARGEST = 2**26
_MAX_TEXT = 2000

State = Literal["starting", "running", "finished", "failed"]
Standing = Literal["unknown", "joined", "waiting", "away", "declined"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatus:
    """One site, as the server sees it.

    Attributes:
        name: the site's public name.
        standing: ``joined``; ``waiting`` for its administrator; ``declined``; ``away``: gave no answer; ``unknown``:
            not asked yet.
        operation: what it was asked last; empty before that.
        state: how that stands: ``asked``, ``answered``, ``declined``, ``diverged``, ``failed``, ``no answer``.
        seen: Unix time of its last answer, a refusal included.
        code: why it was last left out of a round, or its last refusal; empty when all is well.
        train_seconds: how long its last training took, as the server waited for it.
        bytes_up: from the site to the server, of all requests since the process started.
        bytes_down: from the server to the site, likewise.
        round_bytes_up: those of this round.
        round_bytes_down: likewise.
        epsilon: spent in this run so far, as its last settlement says; None before that and in a non-private run.
        charged: what its ledger has charged for this run.
        delta: of both.
        unit: ``record`` or ``person``.
    """

    name: str
    standing: Standing
    operation: str
    state: str
    seen: float | None
    code: str
    train_seconds: float | None
    bytes_up: int
    bytes_down: int
    round_bytes_up: int
    round_bytes_down: int
    epsilon: float | None
    charged: float | None
    delta: float | None
    unit: str | None

    def __post_init__(self) -> None:
        counts = ("bytes_up", "bytes_down", "round_bytes_up", "round_bytes_down")
        _validate.integer_at_least(0, **{name: getattr(self, name) for name in counts})
        numbers = ("seen", "train_seconds", "epsilon", "charged", "delta")
        given = {name: value for name in numbers if (value := getattr(self, name)) is not None}
        _validate.at_least(0, **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """How many requests of one operation ended so."""

    operation: str
    state: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A site that was not in a round's sum, and the code that says why."""

    site: str
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRound:
    """How a round ended; bytes are those of its requests, seconds from its begin to its end."""

    server_round: int
    attempt: int
    outcome: str
    reason: str
    cohort: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    seconds: float
    bytes_up: int
    bytes_down: int
    ended: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a site's own ledger says of one cap of one data set; ``days`` is the cap's window, None for ever."""

    data_set: str
    epsilon: float
    cap_epsilon: float
    delta: float
    cap_delta: float
    days: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnStatus:
    """A site about itself; never leaves its machine.

    Attributes:
        run: the run it takes part in; empty without one.
        standing: towards that run.
        server_round: the last round that it was asked about; None before the first.
        operation: the last operation.
        refusals: how many its policy has refused so far.
        paused: whether its administrator has it answer nothing for now.
        budgets: one for each cap of each data set of its policy.
        trouble: why the above is not known, in words; else empty.
    """

    run: str
    standing: str
    server_round: int | None
    operation: str
    refusals: int
    paused: bool
    budgets: tuple[Budget, ...]
    trouble: str

    @staticmethod
    def of(status: Mapping[str, Any]) -> OwnStatus:
        """What `SiteHost.status` says. One that cannot be read becomes the trouble: it must not stop the site."""
        empty: dict[str, Any] = {"run": "", "standing": "", "server_round": None, "operation": ""}
        empty |= {"refusals": 0, "paused": False, "budgets": [], "trouble": ""}
        try:
            return build(OwnStatus, empty | {k: v for k, v in status.items() if v is not None}, "site.")
        except ConfigError as error:
            return build(OwnStatus, empty | {"trouble": clipped(str(error))}, "site.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A party's process at one moment.

    Attributes:
        format: `FORMAT`.
        role: ``server`` or ``site``.
        name: the party's public name.
        federation: the federation's public name.
        pid: the process that wrote this.
        since: Unix time of its start.
        written: Unix time of this snapshot.
        state: ``starting`` before a run is known, ``running``, ``finished``, ``failed``.
        failure: why it failed, in words.
        run_id: the run; empty before it is known.
        rounds: planned for the whole run.
        opened: rounds that gave a sum, those before a restart included where the run told so.
        lost: rounds that gave none.
        server_round: the current round; 0 before the first.
        attempt: of that round; 0 before the first.
        phase: the operation that is under way.
        phase_since: Unix time at which it began.
        epsilon_budget: what one site may spend in the whole run, by the configuration; None in a non-private run.
        delta_budget: likewise.
        sites: in the order of the roster; empty at a site.
        requests: counts since the process started.
        round_seconds: how many rounds fell into each class of `ROUND_SECONDS` since the process started; one count
            more than there are ends.
        round_seconds_sum: of all of them.
        outcomes: how many rounds ended how since the process started.
        history: the last rounds, the oldest first.
        own: a site about itself; None at the server.
        trouble: what a reader should know about this file: the process is gone, or hangs; else empty.
    """

    format: str
    role: Literal["server", "site"]
    name: str
    federation: str
    pid: int
    since: float
    written: float
    state: State
    failure: str
    run_id: str
    rounds: int
    opened: int
    lost: int
    server_round: int
    attempt: int
    phase: str
    phase_since: float
    epsilon_budget: float | None
    delta_budget: float | None
    sites: tuple[SiteStatus, ...]
    requests: tuple[Requests, ...]
    round_seconds: tuple[int, ...]
    round_seconds_sum: float
    outcomes: tuple[Requests, ...]
    history: tuple[PastRound, ...]
    own: OwnStatus | None
    trouble: str

    def __post_init__(self) -> None:
        _validate.one_of((FORMAT,), format=self.format)
        counts = ("rounds", "opened", "lost", "server_round", "attempt")
        _validate.integer_at_least(0, **{name: getattr(self, name) for name in counts})
        _validate.integer_at_least(1, pid=self.pid)
        if len(self.round_seconds) != len(ROUND_SECONDS) + 1:
            raise InvalidValue("round_seconds", len(self.round_seconds), f"{len(ROUND_SECONDS) + 1} counts")

    @property
    def over(self) -> bool:
        """Whether the run has ended, well or not; then nobody writes any more, and that is no trouble."""
        return self.state in ("finished", "failed")

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(asdict(self))


def write_status(path: Path, snapshot: Snapshot) -> None:
    """Replace the file at once, mode 600: a reader sees the old or the new one. A crash may lose the newest second.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(snapshot.to_bytes())
    os.replace(temporary, path)


def read_status(path: Path, clock: Callable[[], float] = time.time) -> Snapshot:
    """What a process last wrote; ``trouble`` says when that is not what happens now.

    Args:
        path: a ``status.json``.
        clock: Unix time in seconds.

    Raises:
        FedCollmError: there is no such file, or it cannot be read.
        ConfigError: it holds something else; the text names the field.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise FedCollmError(
            f"{path} does not exist: nothing has run with this kit yet; start `fedcollm server` or `fedcollm site`"
        ) from None
    except OSError as error:
        raise FedCollmError(
            f"{path} cannot be read ({error.strerror}): ask as the user that the service runs as"
        ) from error
    snapshot = build(Snapshot, _parsed(path, data))
    return replace(snapshot, trouble=_trouble(snapshot, clock()))


def _parsed(path: Path, data: bytes) -> Mapping[str, Any]:
    try:
        if len(data) > _LARGEST:
            raise ValueError("too long")
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise ConfigError(
            "status", str(path), "a status.json that `fedcollm server` or `fedcollm site` wrote"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError("status", str(path), "a JSON object")
    return tree


def _trouble(snapshot: Snapshot, now: float) -> str:
    if snapshot.over:
        return ""
    if not _alive(snapshot):
        return "the process that wrote this is gone: it was stopped or has crashed; its log says which"
    age = now - snapshot.written
    if age > STALE_S:
        return f"the process has written nothing for {_span(age)}: it hangs, or its disk is full"
    if age < -STALE_S:
        return f"this was written {_span(-age)} from now: the clock was set back"
    return ""


def _alive(snapshot: Snapshot) -> bool:
    try:
        # A second of grace: the start that the system reports is rounded.
        return bool(psutil.Process(snapshot.pid).create_time() <= snapshot.since + 1.0)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _span(seconds: float) -> str:
    return f"{math.floor(seconds)} s" if seconds < 120 else f"{math.floor(seconds / 60)} min"


def clipped(text: str) -> str:
    """The text as it may stand in a status file: no lone surrogates, not endless."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")[:_MAX_TEXT]
