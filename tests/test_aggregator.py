"""The aggregator's process: blind, hard to kill, and harmless when it dies."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedcollm_privacy
from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.aggregator_process import Accumulation
from fedcollm_privacy.ckks import CkksParameters, seal
from fedcollm_privacy.ckks_secret import decrypt_sum, generate
from fedcollm_privacy.errors import InvalidValue, OpeningRefused, ProtocolError, RoundLost, UploadRefused
from fedcollm_privacy.framing import receive_frame, send_frame
from fedcollm_privacy.messages import QuantizedUpdate, RoundPlan, SealedUpdate

PARAMETERS = CkksParameters()
KEY, CONTEXT = generate(PARAMETERS)
DIMENSION = PARAMETERS.chunk_parameters + 10
PACKAGE_PARENT = str(Path(next(iter(fedcollm_privacy.__path__))).parent)


def plan(**changes: Any) -> RoundPlan:
    fields: dict[str, Any] = {
        "run_id": "r",
        "server_round": 1,
        "attempt": 1,
        "spec_digest": "",
        "dimension": DIMENSION,
        "clip": 1.0,
        "value_bits": 13,
        "min_contributors": 3,
        "max_contributors": 5,
        "key_digest": CONTEXT.digest,
        "nonce": "",
    }
    return RoundPlan(**(fields | changes))


def grid_of(seed: int, dimension: int = DIMENSION) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(-4095, 4096, dimension)


def upload(site: str, seed: int, chosen: RoundPlan) -> SealedUpdate:
    return seal(QuantizedUpdate(plan=chosen, grid=grid_of(seed, chosen.dimension)), CONTEXT, site)


def pid(aggregator: Aggregator) -> int:
    assert aggregator._process is not None
    return aggregator._process.pid


def gone(process: int, *, within_s: float = 10) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def shared() -> Iterator[Aggregator]:
    with Aggregator(time_limit_s=60) as aggregator:
        yield aggregator


def test_it_adds_what_it_cannot_read(shared: Aggregator) -> None:
    chosen = plan()
    shared.begin(chosen, PARAMETERS)
    for seed, site in enumerate("abc"):
        shared.add(upload(site, seed, chosen))
    sealed_sum = shared.finish()
    assert sealed_sum.cohort == ("a", "b", "c")
    assert sealed_sum.plan_digest == chosen.digest
    total = decrypt_sum(KEY, sealed_sum.chunks, dimension=DIMENSION, largest=3 * 4095)
    assert (total == grid_of(0) + grid_of(1) + grid_of(2)).all()


def test_each_bad_upload_is_left_out_by_name_and_the_others_go_on(shared: Aggregator) -> None:
    chosen = plan()
    good = upload("a", 0, chosen)
    first, second = good.chunks
    shared.begin(chosen, PARAMETERS)
    shared.add(good)
    for code, changes in (
        ("wrong_plan", {"site": "x", "plan_digest": plan(nonce="other").digest}),
        ("already_in_sum", {}),
        ("wrong_chunk_count", {"site": "x", "chunks": (first,)}),
        ("wrong_chunk_count", {"site": "x", "chunks": ()}),
        ("wrong_chunk_count", {"site": "x", "chunks": (first,) * 2_000_000}),
        ("wrong_chunk_length", {"site": "x", "chunks": (first, b"")}),
        ("wrong_chunk_length", {"site": "x", "chunks": (first, bytes(2**20))}),
        ("malformed_ciphertext", {"site": "x", "chunks": (bytes(100), second)}),
        ("malformed_ciphertext", {"site": "x", "chunks": (first, second[:-1])}),
        ("malformed_ciphertext", {"site": "x", "chunks": (first, second + b"\x00")}),
    ):
        bad = dataclasses.replace(good, **changes)
        with pytest.raises(UploadRefused, match=bad.site) as refusal:
            shared.add(bad)
        assert (refusal.value.site, refusal.value.code) == (bad.site, code)
    for seed, site in enumerate("bcde", start=1):
        shared.add(upload(site, seed, chosen))
    with pytest.raises(UploadRefused, match="cohort_full"):
        shared.add(upload("f", 5, chosen))
    sealed_sum = shared.finish()
    assert sealed_sum.cohort == ("a", "b", "c", "d", "e")
    total = decrypt_sum(KEY, sealed_sum.chunks, dimension=DIMENSION, largest=5 * 4095)
    assert (total == sum(grid_of(seed) for seed in range(5))).all()


def test_a_new_round_drops_the_unfinished_one(shared: Aggregator) -> None:
    shared.begin(plan(), PARAMETERS)
    shared.add(upload("a", 0, plan()))
    process = pid(shared)
    chosen = plan(server_round=2)
    shared.begin(chosen, PARAMETERS)
    assert pid(shared) == process
    shared.add(upload("b", 1, chosen))
    sealed_sum = shared.finish()
    assert sealed_sum.cohort == ("b",)
    assert (decrypt_sum(KEY, sealed_sum.chunks, dimension=DIMENSION, largest=4095) == grid_of(1)).all()


def test_a_sum_of_nobody_is_empty(shared: Aggregator) -> None:
    shared.begin(plan(), PARAMETERS)
    assert shared.finish().cohort == ()
    shared.begin(plan(), PARAMETERS)
    assert shared.finish().chunks == ()


def test_calls_out_of_order_are_refused(shared: Aggregator) -> None:
    shared.begin(plan(), PARAMETERS)
    shared.finish()
    with pytest.raises(ProtocolError, match="begin"):
        shared.add(upload("a", 0, plan()))
    with pytest.raises(ProtocolError, match="begin"):
        Aggregator().finish()


def test_a_plan_that_could_overflow_is_refused(shared: Aggregator) -> None:
    with pytest.raises(InvalidValue, match="value_bits"):
        shared.begin(plan(value_bits=18), PARAMETERS)


def test_the_process_never_has_the_secret_half() -> None:
    program = (
        "import sys; sys.path.append(sys.argv[1]); import fedcollm_privacy.aggregator_process; "
        "sys.exit('fedcollm_privacy.ckks_secret' in sys.modules or 'fedcollm_privacy.decryptor' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-I", "-c", program, PACKAGE_PARENT], env={}, check=False, timeout=60)
    assert finished.returncode == 0


def test_the_process_is_started_blind(shared: Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_PASSPHRASE", "hunter2")
    with Aggregator() as aggregator:
        aggregator.begin(plan(), PARAMETERS)
        process = Path(f"/proc/{pid(aggregator)}")
        assert b"hunter2" not in (process / "environ").read_bytes()
        command = (process / "cmdline").read_bytes().split(b"\x00")
        assert b"-I" in command
        opened = {os.readlink(link) for link in (process / "fd").iterdir()}
        sockets = [link for link in opened if link.startswith("socket:")]
        assert len(sockets) == 1


def test_what_it_receives_holds_no_secret_key(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    def recording(connection: socket.socket, data: bytes, *, deadline: float | None = None) -> None:
        sent.append(data)
        send_frame(connection, data, deadline=deadline)

    monkeypatch.setattr("fedcollm_privacy.aggregator.send_frame", recording)
    chosen = plan()
    sealed = upload("a", 0, chosen)
    with Aggregator() as aggregator:
        aggregator.begin(chosen, PARAMETERS)
        aggregator.add(sealed)
        aggregator.finish()
    assert sum(map(len, sent)) < sum(map(len, sealed.chunks)) + 3000
    array = KEY._seal_key.data().dyn_array()
    words = b"".join(array[index].to_bytes(8, "little") for index in range(4))
    assert not any(words in frame for frame in sent)


@pytest.mark.parametrize("when", ["add", "finish"])
def test_killed_mid_round_the_round_is_lost_and_the_next_one_works(when: str) -> None:
    chosen = plan()
    with Aggregator(time_limit_s=60) as aggregator:
        aggregator.begin(chosen, PARAMETERS)
        aggregator.add(upload("a", 0, chosen))
        os.kill(pid(aggregator), signal.SIGKILL)
        late = upload("b", 1, chosen)
        call, says = (partial(aggregator.add, late), "site b") if when == "add" else (aggregator.finish, "sum")
        with pytest.raises(RoundLost, match=says):
            call()
        with pytest.raises(ProtocolError, match="begin"):
            aggregator.finish()
        aggregator.begin(chosen, PARAMETERS)
        aggregator.add(upload("b", 1, chosen))
        assert aggregator.finish().cohort == ("b",)


def test_killed_between_rounds_the_next_begin_starts_it_again() -> None:
    with Aggregator(time_limit_s=60) as aggregator:
        aggregator.begin(plan(), PARAMETERS)
        first = pid(aggregator)
        os.kill(first, signal.SIGKILL)
        assert gone(first)
        aggregator.begin(plan(), PARAMETERS)
        assert pid(aggregator) != first


def test_a_hanging_process_costs_the_round_after_the_time_limit() -> None:
    chosen = plan()
    with Aggregator(time_limit_s=60) as aggregator:
        aggregator.begin(chosen, PARAMETERS)
        process = pid(aggregator)
        os.kill(process, signal.SIGSTOP)
        aggregator._time_limit_s = 0.3
        started = time.monotonic()
        with pytest.raises(RoundLost, match=r"no answer in 0\.3 s over the upload of site a"):
            aggregator.add(upload("a", 0, chosen))
        assert time.monotonic() - started < 5
        assert gone(process)


def test_a_process_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcollm_privacy.aggregator._BOOTSTRAP", "raise SystemExit('no such module')")
    with Aggregator() as aggregator, pytest.raises(RoundLost, match="no such module"):
        aggregator.begin(plan(), PARAMETERS)


def test_a_process_that_answers_nonsense_costs_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    nonsense = "import socket; s = socket.socket(fileno=0); s.recv(9); s.sendall(b'\\0\\0\\0\\5hello'); s.recv(9**5)"
    monkeypatch.setattr("fedcollm_privacy.aggregator._BOOTSTRAP", nonsense)
    with Aggregator() as aggregator, pytest.raises(RoundLost):
        aggregator.begin(plan(), PARAMETERS)


def test_it_ends_with_close() -> None:
    aggregator = Aggregator()
    aggregator.begin(plan(), PARAMETERS)
    process = pid(aggregator)
    aggregator.close()
    aggregator.close()
    assert gone(process)


def test_it_does_not_outlive_a_killed_parent() -> None:
    program = f"""
import os, sys, signal
sys.path[:0] = {sys.path!r}
from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.ckks import CkksParameters
from fedcollm_privacy.messages import RoundPlan
aggregator = Aggregator()
aggregator.begin(RoundPlan(run_id="r", server_round=1, attempt=1, spec_digest="", dimension=5, clip=1.0, value_bits=13,
    min_contributors=3, max_contributors=5, key_digest="", nonce=""), CkksParameters())
print(aggregator._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=60)
    assert parent.returncode == -signal.SIGKILL
    assert gone(int(parent.stdout))


def test_a_frame_longer_than_allowed_is_not_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall((2**32 - 1).to_bytes(4, "big"))
        with pytest.raises(ProtocolError, match="4294967295"):
            receive_frame(ours, largest=10)


def mutations(true: bytes, other: bytes, rng: random.Random) -> Iterator[bytes]:
    """Bit flips everywhere and near the front, cuts, splices, repeats, noise, foreign streams."""
    while True:
        raw = bytearray(true)
        match rng.randrange(7):
            case 0:
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            case 1:
                raw[rng.randrange(200)] = rng.randrange(256)
            case 2:
                del raw[rng.randrange(len(raw)) :]
            case 3:
                # Not from the very front: that would be the other upload, whole and valid; telling those apart takes
                # signatures.
                at = rng.randrange(2000, len(raw))
                raw[at:] = other[at:]
            case 4:
                start = rng.randrange(len(raw) - 64)
                raw[start : start + 64] = rng.randbytes(64)
            case 5:
                raw = bytearray(rng.randbytes(rng.randrange(1, 2000)))
            case 6:
                at = rng.randrange(16, len(raw))
                raw = raw[:at] + raw[at + 1 :]
        # Half of them with a length field that fits, so that they reach SEAL's own parser.
        if len(raw) >= 16 and rng.random() < 0.5:
            raw[8:16] = len(raw).to_bytes(8, "little")
        yield bytes(raw)


def test_mutated_uploads_crash_nothing_and_never_give_a_wrong_sum(shared: Aggregator) -> None:
    rng = random.Random(20)
    chosen = plan(dimension=50)
    honest = [upload(site, seed, chosen) for seed, site in enumerate("abc")]
    victim, other = upload("d", 3, chosen), upload("d", 4, chosen)
    expected = sum(grid_of(seed, 50) for seed in range(4))
    outcomes = {"left out": 0, "refused at opening": 0, "right": 0}
    source = mutations(victim.chunks[0], other.chunks[0], rng)
    for _ in range(400):
        shared.begin(chosen, PARAMETERS)
        for sealed in honest:
            shared.add(sealed)
        try:
            shared.add(dataclasses.replace(victim, chunks=(next(source),)))
        except UploadRefused:
            outcomes["left out"] += 1
            continue
        try:
            total = decrypt_sum(KEY, shared.finish().chunks, dimension=50, largest=4 * 4095)
        except OpeningRefused:
            outcomes["refused at opening"] += 1
            continue
        assert (total == expected).all()
        outcomes["right"] += 1
    # The test would be empty if nothing ever got past the first gate.
    assert outcomes["left out"] > 50
    assert outcomes["refused at opening"] > 50


def test_an_accumulation_checks_in_the_order_of_the_codes() -> None:
    chosen = plan(dimension=5, max_contributors=3)
    accumulation = Accumulation(chosen, PARAMETERS)
    sealed = upload("a", 0, chosen)
    assert accumulation.check("a", chosen.digest, [len(sealed.chunks[0])]) == "accepted"
    assert accumulation.add("a", iter(sealed.chunks)) == "accepted"
    assert accumulation.check("a", chosen.digest, []) == "already_in_sum"
    assert accumulation.check("b", "", []) == "wrong_plan"
    leftovers = iter((b"bad", b"rest"))
    assert accumulation.add("b", leftovers) == "malformed_ciphertext"
    assert next(leftovers, None) is None
