"""The parent's handle on the aggregator process: start it, feed it uploads, take the encrypted sum, survive it.

Uploads are bytes from strangers. They are checked and added in a process of its own, without a key, without this
process's environment, and with limits on time and memory: a crash or hang there costs the sum, not this process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fedcollm_privacy import wire
from fedcollm_privacy.aggregator_process import ACCEPTED, CODES, MAX_HEADER, chunk_frame
from fedcollm_privacy.errors import ProtocolError, RoundLost, UploadRefused
from fedcollm_privacy.framing import receive_frame, send_frame
from fedcollm_privacy.messages import RoundPlan, canonical_json
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.secure_sum_messages import UploadManifest

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, plan: RoundPlan, roster: Roster) -> None:
        """Start a round's sum; one that was begun before is dropped.

        Args:
            plan: names digest, length and parameters.
            roster: whose signatures count.

        Raises:
            InvalidValue: a sum under this plan could overflow.
            RoundLost: the process does not start, crashes or hangs.
        """
        plan.ckks.prove(plan.max_contributors, plan.value_bits)
        header = {
            "op": "begin",
            "plan_digest": plan.digest,
            "dimension": plan.dimension,
            "max_contributors": plan.max_contributors,
            "parameters": asdict(plan.ckks),
            "signers": {site.name: site.public_key.hex() for site in roster.sites},
        }
        if self._process is not None and self._process.poll() is None:
            try:
                self._exchange("while it began the round", canonical_json(header))
            except RoundLost:  # it died since the last round, when nothing was in it: a fresh one takes this round
                self._start()
                self._exchange("while it began the round", canonical_json(header))
        else:
            self._start()
            self._exchange("while it began the round", canonical_json(header))
        self._plan = plan

    def add(self, manifest: UploadManifest, chunks: Iterable[bytes]) -> None:
        """Add one upload, whole or not at all.

        Args:
            manifest: signed by its site; checked in the process, before any chunk is sent there.
            chunks: taken one at a time while the process adds the one before.

        Raises:
            UploadRefused: it stays out; the sum is as before.
            RoundLost: the process crashed or hung over it, and the sum is gone.
            ProtocolError: no round was begun.
        """
        self._begun()
        when, raw = f"over the upload of site {manifest.site}", wire.encode(manifest)
        if len(raw) > MAX_HEADER:  # the process takes no such frame, and need not die of one
            raise UploadRefused(manifest.site, "malformed_manifest")
        code = self._exchange(when, canonical_json({"op": "add"}), raw)
        if code == ACCEPTED:
            code = self._stream(when, chunks)
        if code != ACCEPTED:
            raise UploadRefused(manifest.site, code)

    def finish(self) -> Iterator[bytes]:
        """The encrypted sum of what was added, chunk by chunk; the round is over for this process.

        Raises:
            RoundLost: the process crashed or hung.
            ProtocolError: no round was begun.
        """
        plan = self._begun()
        self._exchange("while it gave the sum", canonical_json({"op": "finish"}))
        self._plan = None
        return self._sum(plan)

    def _sum(self, plan: RoundPlan) -> Iterator[bytes]:
        # Number and length are this side's own: a process that an upload took over cannot lie about them.
        for _ in range(plan.ckks.chunk_count(plan.dimension)):
            with self._guarded("while it gave the sum") as connection:
                chunk = receive_frame(connection, largest=plan.ckks.ciphertext_bytes, deadline=self._deadline())
            yield chunk

    def _exchange(self, when: str, *frames: bytes) -> str:
        with self._guarded(when) as connection:
            deadline = self._deadline()
            for frame in frames:
                send_frame(connection, frame, deadline=deadline)
            return _receive_code(connection, deadline)

    def _stream(self, when: str, chunks: Iterable[bytes]) -> str:
        plan, sent, done = self._begun(), 0, False
        count = plan.ckks.chunk_count(plan.dimension)
        try:
            for chunk in islice(chunks, count):
                # Of an overlong one so much that it is seen to be.
                frame = chunk_frame(sent, chunk[: plan.ckks.ciphertext_bytes + 1])
                with self._guarded(when) as connection:
                    send_frame(connection, frame, deadline=self._deadline())
                sent += 1
            with self._guarded(when) as connection:
                deadline = self._deadline()
                if sent < count:
                    send_frame(connection, b"", deadline=deadline)
                code = _receive_code(connection, deadline)
            done = True
        finally:
            if not done:  # whoever gives the chunks broke off: half an exchange cannot be continued
                self.close()
        return code

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

    def _begun(self) -> RoundPlan:
        if self._plan is None:
            raise ProtocolError("no round was begun at the aggregator; call begin first")
        return self._plan

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
