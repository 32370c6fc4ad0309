"""Sites and a server of a secure sum in processes of their own, for tests/test_secure_sum_processes.py.

Run as ``python -m tests.secure_sum_site_process site FOLDER NAME`` or ``... server FOLDER REQUEST``. The folder holds
the roster, the keys, each site's journal and its socket. A request is two frames, operation and body; the answer is one
frame, empty for a refusal.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.ckks import PublicContext
from fedcollm_privacy.contributor import Contributor, SumPolicy
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.errors import ProtocolError, RoundLost
from fedcollm_privacy.framing import receive_frame, send_frame
from fedcollm_privacy.identity import SigningKey, load_key
from fedcollm_privacy.messages import OpenedSum, RoundPlan
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.round_journal import RoundJournal
from fedcollm_privacy.secure_sum import MaskedSum
from fedcollm_privacy.secure_sum_messages import UploadManifest
from fedcollm_privacy.wire import decode, encode
from tests.secure_sums import NOW, Answer, Grid, Participant, round_plan

DIMENSION, VALUE_BITS = 40, 13
LARGEST = 2**24
LOST = 3
"""Exit status of a server whose round was lost."""


def grid_of(name: str, server_round: int) -> Grid:
    """What this site puts into this round, so that every process and the test know it."""
    rng = np.random.default_rng([server_round, *name.encode()])
    return rng.integers(-4095, 4096, DIMENSION).astype(np.int32)


class SocketChannel:
    """One connection a request; a site that is gone gives no answer.

    Args:
        folder: where the sites' sockets are.
        answered: told of every answer before the server gets it; gives what the server gets.
    """

    def __init__(
        self,
        folder: Path,
        sites: tuple[str, ...],
        answered: Callable[[str, str, bytes | None], bytes | None] = lambda operation, site, body: body,
    ) -> None:
        self._folder, self._sites, self._answered = folder, sites, answered
        self.asked: list[tuple[str, str, bytes]] = []

    @property
    def sites(self) -> tuple[str, ...]:
        return self._sites

    def ask(self, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Answer]:
        for site, body in bodies.items():
            self.asked.append((operation, site, body))
            answer = self._answered(operation, site, self.ask_one(operation, site, body))
            yield Answer(site=site, body=answer, code=None if answer is not None else "failed")

    def ask_one(self, operation: str, site: str, body: bytes) -> bytes | None:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(30)
                connection.connect(str(self._folder / f"{site}.sock"))
                send_frame(connection, operation.encode())
                send_frame(connection, body)
                return receive_frame(connection, largest=LARGEST) or None
        except (OSError, EOFError):
            return None


class RoundServer:
    """The server's part, from a plan to the opened sum."""

    def __init__(self, key: SigningKey, roster: Roster, channel: SocketChannel) -> None:
        self.channel, self._roster = channel, roster
        self.decryptor = Decryptor(roster)
        self.secure_sum = MaskedSum(
            aggregator=Aggregator(time_limit_s=60),
            decryptor=self.decryptor,
            key=key,
            roster=roster,
            channel=channel,
            witness=lambda event, **facts: None,
        )

    def plan(self, server_round: int, attempt: int) -> RoundPlan:
        sites = len(self.channel.sites)
        self._context = self.secure_sum.begin(contributors=sites, value_bits=VALUE_BITS)
        return round_plan(
            server_round=server_round,
            attempt=attempt,
            dimension=DIMENSION,
            value_bits=VALUE_BITS,
            max_contributors=sites,
            roster_digest=self._roster.digest,
            key_digest=self._context.digest,
            nonce=os.urandom(16).hex(),
            expires_at=NOW + 3600,
        )

    def run(self, server_round: int, attempt: int = 1) -> OpenedSum:
        """A round; `RoundLost` as the secure sum."""
        ready = self.secure_sum.enrol(self.plan(server_round, attempt))
        context = self._context.to_bytes()
        answers = self.channel.ask("train", dict.fromkeys(ready, server_round.to_bytes(4, "big") + context))
        return self.secure_sum.open(decode(a.body, UploadManifest) for a in answers if a.body is not None)


class SiteServer:
    """A real `Contributor` with a durable journal, behind a socket."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name, self._path = name, folder / f"{name}.sock"
        contributor = Contributor(
            key=load_key(folder / f"{name}.key", None),
            roster=Roster.from_bytes((folder / "roster.json").read_bytes()),
            policy=SumPolicy(min_contributors=3, max_colluding=1),
            journal=RoundJournal(folder / f"{name}.sqlite"),
            clock=lambda: NOW,
        )
        self._participant = Participant(contributor, grid_of(name, 0))

    def serve(self) -> None:
        self._path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._path))
            listener.listen()
            print("ready", flush=True)
            while True:
                connection, _ = listener.accept()
                with connection:
                    try:
                        operation = receive_frame(connection, largest=64).decode()
                        send_frame(connection, self._answer(operation, receive_frame(connection, largest=LARGEST)))
                    except (OSError, EOFError, ProtocolError):
                        continue  # who asked is gone

    def _answer(self, operation: str, body: bytes) -> bytes:
        if operation != "train":
            return self._participant.handle(operation, body) or b""
        self._participant.grid = grid_of(self._name, int.from_bytes(body[:4], "big"))
        manifest = self._participant.upload(PublicContext.from_bytes(body[4:]))
        return b"" if manifest is None else encode(manifest)


def run_server(folder: Path, request: dict[str, Any]) -> None:
    """One round; this process kills itself once so many sites have answered the phase where it is to die."""
    left = request["answers"]

    def answered(operation: str, site: str, body: bytes | None) -> bytes | None:
        nonlocal left
        if operation == request["dies_at"] and body is not None:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return body

    channel = SocketChannel(folder, tuple(request["sites"]), answered)
    server = RoundServer(
        load_key(folder / "server.key", None), Roster.from_bytes((folder / "roster.json").read_bytes()), channel
    )
    if request["dies_at"] == "open":
        server.decryptor.open_sum = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    try:
        server.run(request["server_round"], request["attempt"])
    except RoundLost:
        raise SystemExit(LOST) from None


if __name__ == "__main__":
    if sys.argv[1] == "site":
        SiteServer(Path(sys.argv[2]), sys.argv[3]).serve()
    else:
        run_server(Path(sys.argv[2]), json.loads(sys.argv[3]))
