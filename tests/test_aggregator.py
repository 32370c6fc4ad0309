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
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedcollm_privacy
from fedcollm_privacy import wire
from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.aggregator_process import ACCEPTED, CODES, Accumulation, chunk_frame
from fedcollm_privacy.ciphertext_sum import words_of
from fedcollm_privacy.ckks import encrypt, parameters_for
from fedcollm_privacy.ckks_secret import decrypt_sum, generate
from fedcollm_privacy.errors import InvalidValue, OpeningRefused, ProtocolError, RoundLost, UploadRefused
from fedcollm_privacy.framing import receive_frame, send_frame
from fedcollm_privacy.messages import QuantizedUpdate, RoundPlan
from fedcollm_privacy.secure_sum_messages import UploadManifest, signed

from .secure_sums import Parties, digest, round_plan

PARAMETERS = parameters_for(5, 13)
KEY, CONTEXT = generate(PARAMETERS)
PARTIES = Parties.named(*"abcdef")
DIMENSION = PARAMETERS.chunk_parameters + 10
WORDS_2N = (2, PARAMETERS.poly_modulus_degree)
PACKAGE_PARENT = str(Path(next(iter(fedcollm_privacy.__path__))).parent)


def plan(**changes: Any) -> RoundPlan:
    fields: dict[str, Any] = {
        "dimension": DIMENSION,
        "max_contributors": 5,
        "roster_digest": PARTIES.roster.digest,
        "ckks": PARAMETERS,
        "key_digest": CONTEXT.digest,
    }
    return round_plan(**(fields | changes))


def grid_of(seed: int, dimension: int = DIMENSION) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(-4095, 4096, dimension, dtype=np.int32)


def manifest_of(chosen: RoundPlan, site: str, chunks: Iterable[bytes], **changes: Any) -> UploadManifest:
    """What a site signs, sound or not."""
    manifest = UploadManifest(
        plan_digest=chosen.digest,
        keys_digest=digest("keys"),
        site=site,
        peers=tuple(PARTIES.sites),
        chunk_digests=b"".join(sha256(chunk).digest() for chunk in chunks),
    )
    return signed(dataclasses.replace(manifest, **changes), PARTIES.sites[site])


def upload(site: str, seed: int, chosen: RoundPlan) -> tuple[UploadManifest, list[bytes]]:
    """Without masks, so that what was added can be opened here."""
    update = QuantizedUpdate(plan=chosen, grid=grid_of(seed, chosen.dimension))
    chunks = [words_2N.astype("<u8").tobytes() for words_2N in encrypt(update, CONTEXT)]
    return manifest_of(chosen, site, chunks), chunks


def opened(chunks: Iterable[bytes], sites: int, dimension: int = DIMENSION) -> np.ndarray[Any, Any]:
    words = (words_of(chunk, PARAMETERS) for chunk in chunks)
    return decrypt_sum(KEY, words, dimension=dimension, largest=sites * 4095)


def refused(aggregator: Aggregator, manifest: UploadManifest, chunks: Iterable[bytes]) -> str:
    with pytest.raises(UploadRefused, match=manifest.site) as refusal:
        aggregator.add(manifest, chunks)
    assert refusal.value.site == manifest.site
    return refusal.value.code


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
    shared.begin(chosen, PARTIES.roster)
    for seed, site in enumerate("abc"):
        shared.add(*upload(site, seed, chosen))
    assert (opened(shared.finish(), 3) == grid_of(0) + grid_of(1) + grid_of(2)).all()


def changed(chunk: bytes, polynomial: int, value: int) -> bytes:
    words_2N = np.frombuffer(chunk, dtype="<u8").reshape(WORDS_2N).copy()
    words_2N[polynomial, 33] = value
    return words_2N.tobytes()


def test_each_bad_upload_is_left_out_by_name_and_the_others_go_on(shared: Aggregator) -> None:
    chosen = plan()
    good, chunks = upload("a", 0, chosen)
    (first, second), largest = chunks, PARAMETERS.modulus - 1
    flipped = first[:-1] + bytes([first[-1] ^ 1])
    stranger = Parties.named("x", "y", "z").sites["x"]
    theirs = manifest_of(chosen, "b", chunks)
    shared.begin(chosen, PARTIES.roster)
    shared.add(good, chunks)
    # What others did to an upload on its way, or passed off as one.
    for code, manifest, sent in (
        ("already_in_sum", good, chunks),
        ("unknown_site", signed(dataclasses.replace(good, site="x"), stranger), chunks),
        ("wrong_signature", dataclasses.replace(good, site="b"), chunks),
        ("wrong_signature", signed(dataclasses.replace(good, site="b"), stranger), chunks),
        ("wrong_signature", dataclasses.replace(theirs, signature=b""), chunks),
        ("wrong_signature", dataclasses.replace(theirs, keys_digest=digest("others")), chunks),
        ("wrong_signature", dataclasses.replace(theirs, peers=("a", "b")), chunks),
        ("wrong_signature", dataclasses.replace(theirs, chunk_digests=bytes(64)), chunks),
        ("wrong_signature", manifest_of(plan(nonce="01"), "b", chunks), chunks),
        ("broken_off", theirs, []),
        ("broken_off", theirs, [first]),
        ("wrong_chunk", theirs, [second, first]),
        ("wrong_chunk", theirs, [first, first]),
        ("wrong_chunk", theirs, [flipped, second]),
        ("wrong_chunk", theirs, [first, b""]),
        ("wrong_chunk", theirs, [first[:-1], second]),
        ("wrong_chunk", theirs, [first, second + b"\x00"]),
        ("wrong_chunk", theirs, [first, bytes(2**20)]),
    ):
        assert (refused(shared, manifest, sent), manifest.site) == (code, manifest.site)
    # What a site signed and yet is no upload.
    for code, sent in (
        ("wrong_chunk_count", []),
        ("wrong_chunk_count", [first]),
        ("wrong_chunk_count", [first, second, second]),
        ("wrong_chunk_count", [b""] * 200_000),
        ("malformed_ciphertext", [first, b""]),
        ("malformed_ciphertext", [first, second[:-1]]),
        ("malformed_ciphertext", [first, second + b"\x00"]),
        # Of what is longer by more than a byte, the process gets so much that it sees it.
        ("wrong_chunk", [first, bytes(2**20)]),
        ("wrong_chunk", [first, first + second]),
        ("malformed_ciphertext", [changed(first, 0, largest + 1), second]),
        ("malformed_ciphertext", [first, changed(second, 1, largest + 1)]),
        ("malformed_ciphertext", [first, changed(second, 0, 2**64 - 1)]),
        ("malformed_ciphertext", [bytes(len(first)), second]),
        ("malformed_ciphertext", [first, second[: len(second) // 2] + bytes(len(second) // 2)]),
    ):
        assert refused(shared, manifest_of(chosen, "b", sent), sent) == code
    for seed, site in enumerate("bcde", start=1):
        shared.add(*upload(site, seed, chosen))
    assert refused(shared, *upload("f", 5, chosen)) == "cohort_full"
    assert refused(shared, good, chunks) == "already_in_sum"
    assert (opened(shared.finish(), 5) == sum(grid_of(seed) for seed in range(5))).all()


def test_of_an_upload_no_more_is_taken_than_it_must_have(shared: Aggregator) -> None:
    chosen, taken = plan(), []
    manifest, chunks = upload("a", 0, chosen)

    def endless() -> Iterator[bytes]:
        for chunk in (*chunks, *[bytes(2**20)] * 1000):
            taken.append(len(chunk))
            yield chunk

    shared.begin(chosen, PARTIES.roster)
    shared.add(manifest, endless())
    assert taken == [PARAMETERS.ciphertext_bytes] * 2
    assert refused(shared, manifest, endless()) == "already_in_sum"
    assert len(taken) == 2, "what the manifest tells is judged before a chunk is asked for"
    assert (opened(shared.finish(), 1) == grid_of(0)).all()


def test_an_upload_whose_giver_breaks_off_costs_the_round_and_not_the_next(shared: Aggregator) -> None:
    chosen = plan()
    manifest, chunks = upload("a", 0, chosen)

    def breaking() -> Iterator[bytes]:
        yield chunks[0]
        raise KeyboardInterrupt

    shared.begin(chosen, PARTIES.roster)
    with pytest.raises(KeyboardInterrupt):
        shared.add(manifest, breaking())
    with pytest.raises(ProtocolError, match="begin"):
        shared.add(manifest, chunks)
    shared.begin(chosen, PARTIES.roster)
    shared.add(manifest, chunks)
    assert (opened(shared.finish(), 1) == grid_of(0)).all()


def test_a_new_round_drops_the_unfinished_one(shared: Aggregator) -> None:
    shared.begin(plan(), PARTIES.roster)
    shared.add(*upload("a", 0, plan()))
    process = pid(shared)
    chosen = plan(server_round=2)
    shared.begin(chosen, PARTIES.roster)
    assert pid(shared) == process
    shared.add(*upload("b", 1, chosen))
    assert (opened(shared.finish(), 1) == grid_of(1)).all()


def test_a_sum_that_nobody_takes_to_its_end_costs_nothing_of_the_next(shared: Aggregator) -> None:
    chosen = plan()
    for taken in (0, 1):
        shared.begin(chosen, PARTIES.roster)
        shared.add(*upload("a", 0, chosen))
        sum_chunks = shared.finish()
        for _ in range(taken):
            next(sum_chunks)
    shared.begin(chosen, PARTIES.roster)
    shared.add(*upload("b", 1, chosen))
    assert (opened(shared.finish(), 1) == grid_of(1)).all()


def test_a_sum_of_nobody_holds_nothing(shared: Aggregator) -> None:
    for _ in range(2):
        shared.begin(plan(), PARTIES.roster)
        assert list(shared.finish()) == [bytes(PARAMETERS.ciphertext_bytes)] * 2


def test_calls_out_of_order_are_refused(shared: Aggregator) -> None:
    shared.begin(plan(), PARTIES.roster)
    list(shared.finish())
    with pytest.raises(ProtocolError, match="begin"):
        shared.add(*upload("a", 0, plan()))
    with pytest.raises(ProtocolError, match="begin"):
        next(shared.finish())
    with pytest.raises(ProtocolError, match="begin"):
        next(Aggregator().finish())


def test_a_plan_that_could_overflow_is_refused(shared: Aggregator) -> None:
    with pytest.raises(InvalidValue, match="value_bits"):
        shared.begin(plan(value_bits=18), PARTIES.roster)


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
        aggregator.begin(plan(), PARTIES.roster)
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
    manifest, chunks = upload("a", 0, chosen)
    with Aggregator() as aggregator:
        aggregator.begin(chosen, PARTIES.roster)
        aggregator.add(manifest, chunks)
        list(aggregator.finish())
    assert sum(map(len, sent)) < sum(map(len, chunks)) + 3000
    array = KEY._seal_key.data().dyn_array()
    words = b"".join(array[index].to_bytes(8, "little") for index in range(4))
    assert not any(words in frame for frame in sent)
    private = [key._private.private_bytes_raw() for key in PARTIES.sites.values()]
    assert not any(raw in frame or raw.hex().encode() in frame for frame in sent for raw in private)


@pytest.mark.parametrize("when", ["add", "finish", "sum"])
def test_killed_mid_round_the_round_is_lost_and_the_next_one_works(when: str) -> None:
    chosen = plan(dimension=10 * DIMENSION)  # more than what a socket buffers
    with Aggregator(time_limit_s=60) as aggregator:
        aggregator.begin(chosen, PARTIES.roster)
        aggregator.add(*upload("a", 0, chosen))
        if when == "sum":
            half = aggregator.finish()
            next(half)
        os.kill(pid(aggregator), signal.SIGKILL)
        late = upload("b", 1, chosen)
        call: Callable[[], object] = partial(aggregator.add, *late)
        if when == "finish":
            call = aggregator.finish
        if when == "sum":
            assert gone(pid(aggregator))
            call = partial(list, half)
        with pytest.raises(RoundLost, match="site b" if when == "add" else "sum"):
            call()
        with pytest.raises(ProtocolError, match="begin"):
            next(aggregator.finish())
        aggregator.begin(chosen, PARTIES.roster)
        aggregator.add(*late)
        assert (opened(aggregator.finish(), 1, chosen.dimension) == grid_of(1, chosen.dimension)).all()


def test_killed_between_rounds_the_next_begin_starts_it_again() -> None:
    with Aggregator(time_limit_s=60) as aggregator:
        aggregator.begin(plan(), PARTIES.roster)
        first = pid(aggregator)
        os.kill(first, signal.SIGKILL)
        assert gone(first)
        aggregator.begin(plan(), PARTIES.roster)
        assert pid(aggregator) != first


def test_a_hanging_process_costs_the_round_after_the_time_limit() -> None:
    chosen = plan()
    with Aggregator(time_limit_s=60) as aggregator:
        aggregator.begin(chosen, PARTIES.roster)
        process = pid(aggregator)
        os.kill(process, signal.SIGSTOP)
        aggregator._time_limit_s = 0.3
        started = time.monotonic()
        with pytest.raises(RoundLost, match=r"no answer in 0\.3 s over the upload of site a"):
            aggregator.add(*upload("a", 0, chosen))
        assert time.monotonic() - started < 5
        assert gone(process)


def test_a_process_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcollm_privacy.aggregator._BOOTSTRAP", "raise SystemExit('no such module')")
    with Aggregator() as aggregator, pytest.raises(RoundLost, match="no such module"):
        aggregator.begin(plan(), PARTIES.roster)


def test_a_process_that_answers_nonsense_costs_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    nonsense = "import socket; s = socket.socket(fileno=0); s.recv(9); s.sendall(b'\\0\\0\\0\\5hello'); s.recv(9**5)"
    monkeypatch.setattr("fedcollm_privacy.aggregator._BOOTSTRAP", nonsense)
    with Aggregator() as aggregator, pytest.raises(RoundLost):
        aggregator.begin(plan(), PARTIES.roster)


def test_it_ends_with_close() -> None:
    aggregator = Aggregator()
    aggregator.begin(plan(), PARTIES.roster)
    process = pid(aggregator)
    aggregator.close()
    aggregator.close()
    assert gone(process)


def test_it_does_not_outlive_a_killed_parent() -> None:
    program = f"""
import os, sys, signal
sys.path[:0] = {sys.path!r}
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from fedcollm_privacy.aggregator import Aggregator
from tests.secure_sums import Parties, round_plan
aggregator = Aggregator()
aggregator.begin(round_plan(), Parties.of(4).roster)
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
    """Bit flips everywhere and near the front, cuts, splices, repeats, noise, foreign words."""
    while True:
        raw = bytearray(true)
        match rng.randrange(8):
            case 0:
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            case 1:
                raw[rng.randrange(200)] = rng.randrange(256)
            case 2:
                del raw[rng.randrange(len(raw)) :]
            case 3:
                # Not from the very front: that would be the other upload, whole and valid.
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
            case 7:
                at = 8 * rng.randrange(len(raw) // 8)
                raw[at : at + 8] = rng.randrange(PARAMETERS.modulus).to_bytes(8, "little")
        yield bytes(raw)


def test_mutated_uploads_crash_nothing_and_never_give_a_wrong_sum(shared: Aggregator) -> None:
    """Signed as they are, so that nothing but their words can betray them."""
    rng = random.Random(20)
    chosen = plan(dimension=50)
    honest = [upload(site, seed, chosen) for seed, site in enumerate("abc")]
    (_, (victim,)), (_, (other,)) = upload("d", 3, chosen), upload("d", 4, chosen)
    expected = sum(grid_of(seed, 50) for seed in range(4))
    outcomes = {"left out": 0, "refused at opening": 0, "right": 0}
    source = mutations(victim, other, rng)
    process, codes = None, set()
    for _ in range(400):
        shared.begin(chosen, PARTIES.roster)
        assert process in (None, pid(shared))
        process = pid(shared)
        for sealed in honest:
            shared.add(*sealed)
        chunk = next(source)
        try:
            shared.add(manifest_of(chosen, "d", [chunk]), [chunk])
        except UploadRefused as refusal:
            codes.add(refusal.code)
            outcomes["left out"] += 1
            continue
        try:
            total = opened(shared.finish(), 4, 50)
        except OpeningRefused:
            outcomes["refused at opening"] += 1
            continue
        assert (total == expected).all()
        outcomes["right"] += 1
    assert codes == {"malformed_ciphertext"}
    # The test would be empty if nothing ever got past the first gate.
    assert outcomes["left out"] > 50
    assert outcomes["refused at opening"] > 50


def accumulation_of(chosen: RoundPlan) -> Accumulation:
    return Accumulation(
        plan_digest=chosen.digest,
        dimension=chosen.dimension,
        max_contributors=chosen.max_contributors,
        parameters=PARAMETERS,
        signers={site.name: site for site in PARTIES.roster.sites},
    )


def frames_of(chunks: Iterable[bytes]) -> list[bytes]:
    return [chunk_frame(number, chunk) for number, chunk in enumerate(chunks)]


def test_mutated_manifests_crash_nothing_and_none_is_taken() -> None:
    rng, chosen = random.Random(21), plan(dimension=50)
    manifest, _ = upload("a", 0, chosen)
    raw = wire.encode(manifest)
    accumulation, codes = accumulation_of(chosen), set()
    for _ in range(2000):
        bad = bytearray(raw[:-32])
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(16, len(bad))] ^= rng.randrange(1, 256)
        if rng.random() < 0.2:
            del bad[rng.randrange(len(bad)) :]
        if rng.random() < 0.8 and len(bad) > 16:  # whoever may change the bytes may also make length and digest fit
            bad[8:16] = (len(bad) + 32).to_bytes(8, "little")
            bad += sha256(bad).digest()
        code, taken = accumulation.check(bytes(bad))
        assert taken is None
        codes.add(code)
    assert accumulation.check(b"") == ("malformed_manifest", None)
    assert accumulation.check(raw) == (ACCEPTED, manifest)
    assert codes >= {"malformed_manifest", "wrong_signature"}
    assert codes <= set(CODES) - {ACCEPTED}


def test_an_accumulation_checks_in_the_order_of_the_codes() -> None:
    chosen = plan(max_contributors=3)
    accumulation = accumulation_of(chosen)
    manifest, chunks = upload("a", 0, chosen)

    def code_of(manifest: UploadManifest) -> str:
        return accumulation.check(wire.encode(manifest))[0]

    assert code_of(manifest) == ACCEPTED
    assert accumulation.add(manifest, iter(frames_of(chunks)).__next__) == ACCEPTED
    alike = {"site": "b", "chunk_digests": b""}
    assert code_of(dataclasses.replace(manifest, site="x", signature=b"")) == "unknown_site"
    assert code_of(dataclasses.replace(manifest, chunk_digests=b"")) == "wrong_signature"
    assert code_of(manifest_of(chosen, "a", [])) == "already_in_sum"
    assert code_of(manifest_of(chosen, "b", [])) == "wrong_chunk_count"
    assert code_of(signed(dataclasses.replace(manifest, **alike), PARTIES.sites["b"])) == "wrong_chunk_count"
    for site in "bc":
        other, chunks_of_other = upload(site, 1, chosen)
        assert accumulation.add(other, iter(frames_of(chunks_of_other)).__next__) == ACCEPTED
    assert code_of(manifest_of(chosen, "d", [])) == "cohort_full"
    assert code_of(manifest) == "already_in_sum"


def test_a_broken_upload_is_used_up_and_taken_back_whole() -> None:
    chosen = plan(dimension=3 * PARAMETERS.chunk_parameters)
    accumulation = accumulation_of(chosen)
    accumulation.add(*begun(upload("a", 0, chosen)))
    before = list(accumulation.total.chunks())
    manifest, chunks = upload("b", 1, chosen)
    first, second, third = frames_of(chunks)
    renumbered = [first, third[:4] + second[4:], second[:4] + third[4:]]
    ends = [b"\xff", b"\x00" * 3, first, second + b"\x00"]
    for code, frames in (
        ("wrong_chunk", renumbered),
        ("wrong_chunk", [second, first, third]),
        *(("wrong_chunk", [first, second, end]) for end in ends),
        ("wrong_chunk", [b"x", second, third]),
        ("broken_off", [first, second, b""]),
        ("broken_off", [b""]),
    ):
        left = iter([*frames, b"next"])
        assert accumulation.add(manifest, left.__next__) == code
        assert list(left) == [b"next"]
        assert list(accumulation.total.chunks()) == before
    bad = [chunks[0], chunks[1], bytes(PARAMETERS.ciphertext_bytes)]
    frames = iter(frames_of(bad))
    assert accumulation.add(manifest_of(chosen, "b", bad), frames.__next__) == "malformed_ciphertext"
    assert list(accumulation.total.chunks()) == before
    assert accumulation.add(*begun((manifest, chunks))) == ACCEPTED
    assert (
        opened(accumulation.total.chunks(), 2, chosen.dimension)
        == grid_of(0, chosen.dimension) + grid_of(1, chosen.dimension)
    ).all()


def begun(made: tuple[UploadManifest, list[bytes]]) -> tuple[UploadManifest, Callable[[], bytes]]:
    manifest, chunks = made
    return manifest, iter(frames_of(chunks)).__next__
