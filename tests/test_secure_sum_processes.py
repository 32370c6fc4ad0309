"""A secure sum between real processes, any of which is killed with SIGKILL at any phase and started again.

Five sites over Unix sockets (c = 1: t = 4, k = 3), each with its journal on disk. A killed process loses its answer and
all that it had in memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcollm_privacy.errors import RoundLost
from fedcollm_privacy.identity import save_key
from fedcollm_privacy.messages import OpenedSum
from fedcollm_privacy.secure_sum_messages import UnmaskShares
from fedcollm_privacy.wire import decode
from tests.secure_sum_site_process import RoundServer, SocketChannel, grid_of
from tests.secure_sums import Parties

ROOT = Path(__file__).parents[1]
PHASES = ("advertise", "share", "accept", "train", "part", "agree", "unmask", "open")
IN_THE_SUM = ("agree", "unmask", "open")  # whoever falls after its upload was added is in the sum
SITES = tuple(f"s{i:02d}" for i in range(5))


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.secure_sum_site_process", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


class Federation:
    """Site processes that outlive rounds and tests; every round has a number of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.parties, self.server_round = folder, Parties.of(len(SITES)), 0
        (folder / "roster.json").write_bytes(self.parties.roster.to_bytes())
        for key in (self.parties.server, *self.parties.sites.values()):
            save_key(key, folder / f"{key.name}.key", None)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start(*SITES)

    def start(self, *names: str) -> None:
        for name in names:
            self.processes[name] = start("site", str(self.folder), name)
        for name in names:
            output = self.processes[name].stdout
            assert output is not None
            assert output.readline() == b"ready\n"

    def kill(self, name: str) -> None:
        process = self.processes[name]
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def restart(self, name: str) -> None:
        self.kill(name)
        self.start(name)

    def next_round(self) -> int:
        self.server_round += 1
        return self.server_round

    @contextmanager
    def server(self, answered: Any = lambda operation, site, body: body) -> Iterator[RoundServer]:
        """A server in this process, fresh: it knows nothing of any round before."""
        channel = SocketChannel(self.folder, SITES, answered)
        server = RoundServer(self.parties.server, self.parties.roster, channel)
        try:
            yield server
        finally:
            server.secure_sum.close()

    def run(self, server_round: int, attempt: int = 1) -> OpenedSum:
        with self.server() as server:
            return server.run(server_round, attempt)

    def kill_a_server(self, server_round: int, dies_at: str, answers: int) -> None:
        """A server process that dies in this round, once so many sites have answered in a phase."""
        request = {
            "sites": SITES,
            "server_round": server_round,
            "attempt": 1,
            "dies_at": dies_at,
            "answers": answers,
        }
        process = start("server", str(self.folder), json.dumps(request))
        process.communicate(timeout=60)
        assert process.returncode == -9

    def close(self) -> None:
        for name in SITES:
            self.kill(name)


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="sum-") as folder:
        made = Federation(Path(folder))
        yield made
        made.close()


def true_sum(cohort: Sequence[str], server_round: int) -> Any:
    return np.sum([grid_of(site, server_round).astype(np.int64) for site in cohort], axis=0)


def require_exact(opened: OpenedSum, cohort: Sequence[str], server_round: int) -> None:
    assert opened.cohort == tuple(cohort)
    assert (opened.total == true_sum(cohort, server_round)).all()


def test_the_sum_of_five_processes_is_exact(federation: Federation) -> None:
    number = federation.next_round()
    require_exact(federation.run(number), SITES, number)
    require_exact(federation.run(next_ := federation.next_round()), SITES, next_)


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_site_is_lost_to_its_round_and_back_in_the_next(federation: Federation, phase: str) -> None:
    number, victim = federation.next_round(), "s01"

    def dies(operation: str, site: str, body: bytes | None) -> bytes | None:
        if (operation, site) == (phase, victim) and body is not None:
            federation.kill(victim)  # it has answered; the answer is lost
            return None
        return body

    with federation.server(dies) as server:
        if phase == "open":
            opener = server.decryptor.open_sum
            server.decryptor.open_sum = lambda *sealed: (  # type: ignore[method-assign]
                federation.kill(victim),  # type: ignore[func-returns-value]
                opener(*sealed),
            )[1]
        opened = server.run(number)
    assert federation.processes[victim].poll() == -9
    survivors = [site for site in SITES if site != victim or phase in IN_THE_SUM]
    require_exact(opened, survivors, number)

    federation.start(victim)
    # It has forgotten the round, and is not talked into it again: neither by what it was asked then, nor by what the
    # others were asked after it had died.
    requests = {operation: body for operation, site, body in server.channel.asked if site in (victim, "s02")}
    requests |= {operation: body for operation, site, body in server.channel.asked if site == victim}
    assert list(requests) == ["advertise", "share", "accept", "train", "part", "agree", "unmask"]
    for operation, body in requests.items():
        assert server.channel.ask_one(operation, victim, body) is None
    number = federation.next_round()
    require_exact(federation.run(number), SITES, number)


@pytest.mark.parametrize(
    ("phase", "answers"),
    [("advertise", 2), ("share", 3), ("accept", 3), ("train", 3), ("part", 3), ("agree", 1)],
)
def test_a_server_killed_before_the_survivors_are_signed_tries_the_round_again(
    federation: Federation, phase: str, answers: int
) -> None:
    number = federation.next_round()
    federation.kill_a_server(number, phase, answers)
    with pytest.raises(RoundLost):  # not the same attempt: those who answered it do not answer it again
        federation.run(number)
    # Who has signed takes no part in another attempt of that round.
    require_exact(federation.run(number, attempt=2), SITES[1:] if phase == "agree" else SITES, number)
    with pytest.raises(RoundLost):  # and once it is open, never again
        federation.run(number, attempt=3)


@pytest.mark.parametrize(("phase", "answers"), [("agree", 5), ("unmask", 1), ("open", 0)])
def test_a_server_killed_once_the_survivors_are_signed_never_opens_that_round(
    federation: Federation, phase: str, answers: int
) -> None:
    number = federation.next_round()
    federation.kill_a_server(number, phase, answers)
    federation.restart("s00")  # the journal remembers, not the process
    for attempt in (1, 2, 7):
        with pytest.raises(RoundLost), federation.server() as server:
            server.run(number, attempt)
        refused = {site for site, code in server.secure_sum.rejected.items()}
        assert not any(operation == "unmask" for operation, _, _ in server.channel.asked)
        assert not refused or "s00" in refused
    number = federation.next_round()
    require_exact(federation.run(number), SITES, number)


class ServerDies(Exception):
    """In place of a signal, so that the test knows what the server had asked."""


def test_a_server_that_asks_all_of_it_again_learns_nothing_new(federation: Federation) -> None:
    # In the middle of the round, when sites hold all their secrets, and after it.
    number = federation.next_round()
    answered: dict[tuple[str, str], bytes | None] = {}

    def dies(operation: str, site: str, body: bytes | None) -> bytes | None:
        answered[operation, site] = body
        if (operation, site) == ("unmask", SITES[1]):
            raise ServerDies
        return body

    with pytest.raises(ServerDies), federation.server(dies) as server:
        server.run(number)
    given = [decode(body, UnmaskShares) for (asked, _), body in answered.items() if asked == "unmask" and body]
    assert [message.site for message in given] == ["s00", "s01"]
    assert all(message.self_of == SITES and message.mask_of == () for message in given)
    for operation, site, body in server.channel.asked:
        again = server.channel.ask_one(operation, site, body)
        # Parts of the masked upload and the one signature, the same as before, from those that have not unmasked.
        same = operation in ("part", "agree") and site not in ("s00", "s01")
        assert again == (answered[operation, site] if same else None)
    federation.restart("s02")
    with pytest.raises(RoundLost):  # all have signed
        federation.run(number, attempt=2)
    for operation, site, body in server.channel.asked:
        again = server.channel.ask_one(operation, site, body)
        same = operation in ("part", "agree") and site in ("s03", "s04")
        assert again == (answered[operation, site] if same else None)
