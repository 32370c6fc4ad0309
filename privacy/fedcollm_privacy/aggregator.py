"""The parent's handle on the aggregator process: start it, feed it uploads, take the encrypted sum, survive it.

Uploads are bytes from strangers, and the library that parses them is C++. So it happens in a process of its own,
without a key, without this process's environment, and with a time limit: a crash or hang there costs the round.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fedcollm_privacy import wire
from fedcollm_privacy.aggregator_process import ACCEPTED, CODES, MAX_HEADER
from fedcollm_privacy.ckks_parameters import CkksParameters
from fedcollm_privacy.errors import ProtocolError, RoundLost, UploadRefused
from fedcollm_privacy.framing import receive_frame, send_frame
from fedcollm_privacy.messages import RoundPlan, SealedSum, SealedUpdate, canonical_json

__all__ = ["Aggregator"]

# Isolated mode (-I) drops PYTHONPATH and the current folder; the folder that this package lies in comes last on the
# path, so the child runs this very code whether it is installed, editable or on PYTHONPATH.
_BOOTSTRAP = (
    "import runpy, sys; sys.path.append(sys.argv.pop()); "
    "runpy.run_module('fedcollm_privacy.aggregator_process', run_name='__main__')"
)
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR")


class Aggregator:
    """Adds a round's uploads in a process that has no key. A context manager; POSIX only.

    Call order: `begin`, then `add` any number of times, then `finish`. After `RoundLost` the next `begin` starts a
    fresh process.
    """

    def __init__(self, *, time_limit_s: float = 300.0) -> None:
        self._time_limit_s = time_limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._stderr: IO[bytes] | None = None
        self._plan: RoundPlan | None = None
        self._parameters: CkksParameters | None = None
        self._cohort: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, plan: RoundPlan, parameters: CkksParameters) -> None:
        """Start a round's sum; one that was begun before is dropped.

        Raises:
            InvalidValue: a sum under this plan could overflow.
            RoundLost: the process does not start, crashes or hangs.
        """
        parameters.prove(plan.max_contributors, plan.value_bits)
        if self._process is not None and self._process.poll() is None:
            try:
                self._begin_round(plan, parameters)
            except RoundLost:  # it died since the last round, when nothing was in it: a fresh one takes this round
                self._start()
                self._begin_round(plan, parameters)
        else:
            self._start()
            self._begin_round(plan, parameters)
        self._plan, self._parameters, self._cohort = plan, parameters, []

    def _begin_round(self, plan: RoundPlan, parameters: CkksParameters) -> None:
        with self._guarded("while it began the round") as connection:
            deadline = self._deadline()
            header = {"op": "begin", "parameters": asdict(parameters)}
            send_frame(connection, canonical_json(header), deadline=deadline)
            send_frame(connection, wire.encode(plan), deadline=deadline)
            _receive_code(connection, deadline)

    def add(self, sealed: SealedUpdate) -> None:
        """Add one upload, whole or not at all.

        Raises:
            UploadRefused: it stays out; the sum is as before.
            RoundLost: the process crashed or hung over it, and the sum is gone.
            ProtocolError: no round was begun.
        """
        self._begun()
        header = {
            "op": "add",
            "site": sealed.site,
            "plan_digest": sealed.plan_digest,
            "lengths": [len(chunk) for chunk in sealed.chunks],
        }
        raw = canonical_json(header)
        if len(raw) > MAX_HEADER:
            raise UploadRefused(sealed.site, "wrong_chunk_count")
        with self._guarded(f"over the upload of site {sealed.site}") as connection:
            deadline = self._deadline()
            send_frame(connection, raw, deadline=deadline)
            code = _receive_code(connection, deadline)
            if code == ACCEPTED:
                for chunk in sealed.chunks:
                    send_frame(connection, chunk, deadline=deadline)
                code = _receive_code(connection, deadline)
        if code != ACCEPTED:
            raise UploadRefused(sealed.site, code)
        self._cohort.append(sealed.site)

    def finish(self) -> SealedSum:
        """The encrypted sum of what was added; the round is over for this process.

        Raises:
            RoundLost: the process crashed or hung.
            ProtocolError: no round was begun.
        """
        plan, parameters = self._begun()
        # Count and cohort are this side's own: a process that an upload took over cannot lie about them.
        count = parameters.chunk_count(plan.dimension) if self._cohort else 0
        largest = parameters.max_ciphertext_bytes
        with self._guarded("while it gave the sum") as connection:
            deadline = self._deadline()
            send_frame(connection, canonical_json({"op": "finish"}), deadline=deadline)
            _receive_code(connection, deadline)
            chunks = tuple(receive_frame(connection, largest=largest, deadline=deadline) for _ in range(count))
        self._plan = None
        return SealedSum(plan_digest=plan.digest, cohort=tuple(self._cohort), chunks=chunks)

    def close(self) -> None:
        """End the process; safe to call twice, and `begin` may follow."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._stderr is not None:
            self._stderr.close()
        self._process = self._connection = self._stderr = self._plan = None

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        self._connection = ours
        # A file and not a pipe: nobody need read it, so the child can never block on it.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        child_limit = str(int(self._time_limit_s) + 1)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 (fixed program, no shell)
                [sys.executable, "-I", "-B", "-c", _BOOTSTRAP, child_limit, str(Path(__file__).parents[1])],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                start_new_session=True,
            )

    def _deadline(self) -> float:
        return time.monotonic() + self._time_limit_s

    def _begun(self) -> tuple[RoundPlan, CkksParameters]:
        if self._plan is None or self._parameters is None:
            raise ProtocolError("no round was begun at the aggregator; call begin first")
        return self._plan, self._parameters

    @contextmanager
    def _guarded(self, when: str) -> Iterator[socket.socket]:
        if self._connection is None:
            raise ProtocolError("the aggregator was closed")
        done = False
        try:
            yield self._connection
            done = True
        except TimeoutError as error:
            raise RoundLost(f"the aggregator process gave no answer in {self._time_limit_s:g} s {when}") from error
        except (OSError, EOFError, ValueError, ProtocolError) as error:
            raise RoundLost(f"the aggregator process ended {when}{self._last_words()}") from error
        finally:
            # Also after KeyboardInterrupt: half an exchange cannot be continued.
            if not done:
                self.close()

    def _last_words(self) -> str:
        if self._stderr is None:
            return ""
        # It may still be writing; the pause is only on the way to an error.
        time.sleep(0.05)
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 400))
        text = self._stderr.read().decode(errors="replace").strip()
        return f"; its last words: {text.splitlines()[-1]}" if text else ""


def _receive_code(connection: socket.socket, deadline: float) -> str:
    code = receive_frame(connection, largest=64, deadline=deadline).decode(errors="replace")
    if code not in CODES:
        raise ProtocolError("the aggregator process answered out of turn")
    return code
