"""Ten thousand hostile uploads and messages: what strangers send is refused by name, and the sum stays what it was.

``FEDCOLLM_FUZZ=100000 pytest tests/test_hostile_uploads.py`` tries 25 times as many of each kind.

Two attackers. The *network* changes what an honest site has signed: nothing of that may reach the sum. The *signer* is
a site that signs whatever it likes: what is no ciphertext may not reach the sum, and what is one is poisoning, which no
check of form can see; masks and residual then see to it that the round opens the true sum or nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcollm_privacy import wire
from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.aggregator_process import ACCEPTED, CODES, Accumulation, chunk_frame
from fedcollm_privacy.ckks_parameters import CkksParameters
from fedcollm_privacy.errors import FedCollmError, ProtocolError, RoundLost, UploadRefused
from fedcollm_privacy.messages import (
    AdapterSpec,
    DpTerms,
    Receipt,
    RoundPlan,
    Settlement,
    TrainRequest,
    canonical_json,
)
from fedcollm_privacy.run_messages import ClaimsRequest, RunAnswer, RunOffer, SiteClaims
from fedcollm_privacy.secure_sum_messages import (
    DIGEST_BYTES,
    Advertisement,
    Agreement,
    PartRequest,
    PeerKeys,
    PeerShares,
    Ready,
    SealedShare,
    SealedShares,
    SignedPlan,
    SurvivorSet,
    UnmaskRequest,
    UnmaskShares,
    UploadManifest,
    UploadPart,
    sign_plan,
    signed,
    verify,
    verify_plan,
)
from fedcollm_privacy.statement_messages import Endorsement, StatementOffer
from fedcollm_privacy.tree_heads import HeadRequest, SignedHead, WitnessedHead
from fedcollm_privacy.wire import decode, encode
from tests.secure_sums import Parties, Round, digest, random_grids, round_plan

FUZZ = int(os.environ.get("FEDCOLLM_FUZZ", "4000"))
CHUNK = CkksParameters().chunk_parameters
PARTIES = Parties.of(4)
PLAN = round_plan(dimension=CHUNK + 1, roster_digest=PARTIES.roster.digest)  # two chunks
OTHER_PLAN = replace(PLAN, attempt=2, nonce="01")
MODULUS, DEGREE = PLAN.ckks.modulus, PLAN.ckks.poly_modulus_degree
NAMES = tuple(PARTIES.sites)


@dataclass(frozen=True)
class Upload:
    """What one site hands over: a signed manifest and its chunks."""

    manifest: UploadManifest
    chunks: tuple[bytes, ...]

    @property
    def frames(self) -> list[bytes]:
        return [chunk_frame(number, chunk) for number, chunk in enumerate(self.chunks)]

    @property
    def words(self) -> Any:
        return np.stack([np.frombuffer(chunk, dtype="<u8").reshape(2, -1) for chunk in self.chunks]).astype(object)


def signed_upload(site: str, chunks: tuple[bytes, ...], plan: RoundPlan = PLAN, **changes: Any) -> Upload:
    """Any chunks, well signed by the site."""
    fields: dict[str, Any] = {
        "plan_digest": plan.digest,
        "keys_digest": digest("keys"),
        "site": site,
        "peers": NAMES,
        "chunk_digests": b"".join(hashlib.sha256(chunk).digest() for chunk in chunks),
    }
    return Upload(signed(UploadManifest(**(fields | changes)), PARTIES.sites[site]), chunks)


def random_words(rng: np.random.Generator) -> bytes:
    """A well-formed ciphertext: to whoever has no key, every one looks like this."""
    return rng.integers(0, MODULUS, 2 * DEGREE, dtype=np.uint64).astype("<u8").tobytes()


RNG = np.random.default_rng(5)
HONEST = {name: signed_upload(name, (random_words(RNG), random_words(RNG))) for name in NAMES}
OTHER_ROUND = {name: signed_upload(name, HONEST[name].chunks, OTHER_PLAN) for name in NAMES}


def accumulation() -> Accumulation:
    return Accumulation(
        plan_digest=PLAN.digest,
        dimension=PLAN.dimension,
        max_contributors=PLAN.max_contributors,
        parameters=PLAN.ckks,
        signers={site.name: site for site in PARTIES.roster.sites},
    )


def offer(sum_so_far: Accumulation, manifest: bytes, frames: list[bytes]) -> str:
    """As `aggregator_process` takes an upload; where frames end too early, the parent sends an empty one."""
    code, checked = sum_so_far.check(manifest)
    if checked is None:
        return code
    left = iter([*frames, b""])
    return sum_so_far.add(checked, lambda: next(left))


def expected_total(*names: str) -> Any:
    return sum(HONEST[name].words for name in names) % MODULUS


def total_of(sum_so_far: Accumulation) -> Any:
    return np.stack([np.frombuffer(c, dtype="<u8").reshape(2, -1) for c in sum_so_far.total.chunks()])


# --- the network ------------------------------------------------------------------------------------------------------

Wire = tuple[bytes, list[bytes]]  # an encoded manifest, and the chunk frames


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def lengthen(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 4096)))


def in_manifest(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Upload, random.Random], Wire]:
    return lambda upload, rng: (change(encode(upload.manifest), rng), upload.frames)


def in_a_frame(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Upload, random.Random], Wire]:
    def mutate(upload: Upload, rng: random.Random) -> Wire:
        frames = upload.frames
        place = rng.randrange(len(frames))
        frames[place] = change(frames[place], rng)
        return encode(upload.manifest), frames

    return mutate


def swapped_field(upload: Upload, rng: random.Random) -> Wire:
    """A field of the manifest is exchanged; the wire's own digest is right, the signature is not."""
    site = rng.choice([name for name in NAMES if name != upload.manifest.site])
    changes: dict[str, Any] = {
        "site": site,
        "plan_digest": OTHER_PLAN.digest,
        "keys_digest": digest(str(rng.random())),
        "peers": NAMES[:3],
        "chunk_digests": HONEST[site].manifest.chunk_digests,
        "signature": rng.choice((b"", bytes(64), rng.randbytes(64), HONEST[site].manifest.signature)),
    }
    name = rng.choice(list(changes))
    frames = HONEST[site].frames if name == "chunk_digests" else upload.frames
    return encode(replace(upload.manifest, **{name: changes[name]})), frames


def reordered(upload: Upload, rng: random.Random) -> Wire:
    first, second = upload.chunks
    return encode(upload.manifest), rng.choice(
        (
            [chunk_frame(0, second), chunk_frame(1, first)],
            [chunk_frame(1, second), chunk_frame(0, first)],
            [chunk_frame(0, first), chunk_frame(0, first)],
            [chunk_frame(0, first), chunk_frame(1, first)],
            [chunk_frame(0, second), chunk_frame(1, second)],
        )
    )


def wrong_number(upload: Upload, rng: random.Random) -> Wire:
    frames = upload.frames
    place = rng.randrange(len(frames))
    number = rng.choice([n for n in (0, 1, 2, 2**16, 2**32 - 1) if n != place])
    frames[place] = chunk_frame(number, upload.chunks[place])
    return encode(upload.manifest), frames


def anothers_chunk(upload: Upload, rng: random.Random) -> Wire:
    frames = upload.frames
    other = HONEST[rng.choice([name for name in NAMES if name != upload.manifest.site])]
    place = rng.randrange(len(frames))
    frames[place] = other.frames[place]
    return encode(upload.manifest), frames


def broken_off(upload: Upload, rng: random.Random) -> Wire:
    frames = upload.frames[: rng.randrange(len(upload.frames))]
    return encode(upload.manifest), [*frames, *rng.choice(([], [b""], [b"\x00"], [b"\x00" * 4]))]


def of_another_round(upload: Upload, rng: random.Random) -> Wire:
    return encode(OTHER_ROUND[upload.manifest.site].manifest), upload.frames


def of_another_kind(upload: Upload, rng: random.Random) -> Wire:
    kinds = (PeerKeys(plan_digest=PLAN.digest, advertisements=()), Ready(plan_digest=PLAN.digest, site="s00"))
    return encode(rng.choice(kinds)), upload.frames


IN_TRANSIT: dict[str, Callable[[Upload, random.Random], Wire]] = {
    "a bit of the manifest": in_manifest(flip),
    "a cut manifest": in_manifest(cut),
    "a longer manifest": in_manifest(lengthen),
    "a swapped field": swapped_field,
    "another round's manifest": of_another_round,
    "another kind of message": of_another_kind,
    "a bit of a chunk": in_a_frame(flip),
    "a cut chunk": in_a_frame(cut),
    "a longer chunk": in_a_frame(lengthen),
    "chunks in another order": reordered,
    "a wrong number": wrong_number,
    "another site's chunk": anothers_chunk,
    "broken off": broken_off,
}


def test_what_the_network_changed_never_reaches_the_sum() -> None:
    sum_so_far, rng, codes = accumulation(), random.Random(0), Counter[str]()
    assert offer(sum_so_far, encode(HONEST["s00"].manifest), HONEST["s00"].frames) == ACCEPTED
    before = total_of(sum_so_far)
    assert (before == expected_total("s00")).all()
    kinds = list(IN_TRANSIT)
    for number in range(FUZZ):
        site = NAMES[1 + number % 2]
        manifest, frames = IN_TRANSIT[kinds[number % len(kinds)]](HONEST[site], rng)
        code = offer(sum_so_far, manifest, frames)
        assert code in CODES
        assert code != ACCEPTED, kinds[number % len(kinds)]
        codes[code] += 1
        assert (total_of(sum_so_far) == before).all(), kinds[number % len(kinds)]
    assert set(codes) >= {"malformed_manifest", "wrong_signature", "broken_off", "wrong_chunk"}
    # The honest originals are as welcome as ever, once.
    for site in NAMES[1:]:
        assert offer(sum_so_far, encode(HONEST[site].manifest), HONEST[site].frames) == ACCEPTED
        assert offer(sum_so_far, encode(HONEST[site].manifest), HONEST[site].frames) == "already_in_sum"
    assert (total_of(sum_so_far) == expected_total(*NAMES)).all()


# --- the signer -------------------------------------------------------------------------------------------------------


def spoilt(chunk: bytes, rng: random.Random) -> bytes:
    """No ciphertext: of another length, with a word that is not below q, or one that hides nothing."""
    words = np.frombuffer(chunk, dtype="<u8").copy()
    kind = rng.randrange(7)
    if kind == 0:
        return rng.randbytes(len(chunk))  # a word is at least q 15 times of 16
    if kind == 1:
        words[rng.randrange(len(words))] = rng.choice((MODULUS, MODULUS + 1, 2**60, 2**63, 2**64 - 1))
    elif kind == 2:
        words[DEGREE:] = 0
    elif kind == 3:
        words[:] = 2**64 - 1
    elif kind == 4:
        words[:] = 0
    elif kind == 5:
        return chunk[: rng.choice((0, 1, 8, len(chunk) // 2, len(chunk) - 8, len(chunk) - 1))]
    else:
        return chunk + bytes(rng.choice((1, 8, len(chunk))))
    return words.tobytes()


def signed_nonsense(site: str, rng: random.Random) -> tuple[Upload, set[str]]:
    """An upload that its site signed, and the codes that are right for it."""
    chunks = list(HONEST[site].chunks)
    kind = rng.randrange(4)
    if kind == 0:
        count = rng.choice((0, 1, 3, 4, 100, 10_000))
        return signed_upload(site, (), chunk_digests=rng.randbytes(DIGEST_BYTES) * count), {"wrong_chunk_count"}
    if kind == 1:
        return signed_upload(site, tuple(chunks), OTHER_PLAN), {"wrong_signature"}
    if kind == 2:
        upload = signed_upload(site, tuple(chunks))
        return replace(upload, chunks=(chunks[0],)), {"broken_off"}
    place = rng.randrange(2)
    chunks[place] = spoilt(chunks[place], rng)
    return signed_upload(site, tuple(chunks)), {"malformed_ciphertext"}


def test_what_a_malicious_site_signed_reaches_the_sum_as_a_ciphertext_or_not_at_all() -> None:
    sum_so_far, rng, codes = accumulation(), random.Random(1), Counter[str]()
    assert offer(sum_so_far, encode(HONEST["s00"].manifest), HONEST["s00"].frames) == ACCEPTED
    before = total_of(sum_so_far)
    for _ in range(FUZZ // 2):
        upload, right = signed_nonsense("s03", rng)
        code = offer(sum_so_far, encode(upload.manifest), upload.frames)
        assert code in right
        codes[code] += 1
        assert (total_of(sum_so_far) == before).all()
    assert set(codes) == {"wrong_chunk_count", "wrong_signature", "broken_off", "malformed_ciphertext"}
    for site in NAMES[1:]:
        assert offer(sum_so_far, encode(HONEST[site].manifest), HONEST[site].frames) == ACCEPTED
    assert (total_of(sum_so_far) == expected_total(*NAMES)).all()


def test_hundreds_of_both_through_the_real_process() -> None:
    rng = random.Random(2)
    with Aggregator(time_limit_s=60) as aggregator:
        aggregator.begin(PLAN, PARTIES.roster)
        process = aggregator._process
        assert process is not None
        aggregator.add(HONEST["s00"].manifest, HONEST["s00"].chunks)
        refused = Counter[str]()
        for number in range(max(400, FUZZ // 40)):
            site = NAMES[1 + number % 3]
            if number % 2:
                upload, _ = signed_nonsense(site, rng)
                manifest, chunks = upload.manifest, list(upload.chunks)
            else:
                try:
                    raw, frames = IN_TRANSIT[list(IN_TRANSIT)[number // 2 % len(IN_TRANSIT)]](HONEST[site], rng)
                    manifest, chunks = decode(raw, UploadManifest), [frame[4:] for frame in frames]
                except ProtocolError:  # the parent does not get so far either
                    continue
                if (manifest, tuple(chunks)) == (HONEST[site].manifest, HONEST[site].chunks):
                    continue  # only a number was wrong, and the parent counts anew
            with pytest.raises(UploadRefused) as refusal:
                aggregator.add(manifest, iter(chunks))
            assert refusal.value.site == manifest.site
            refused[refusal.value.code] += 1
        assert process.poll() is None  # still the same process
        assert aggregator._process is process
        assert set(refused) >= {"wrong_signature", "wrong_chunk_count", "malformed_ciphertext", "wrong_chunk"}
        for site in NAMES[1:]:
            aggregator.add(HONEST[site].manifest, HONEST[site].chunks)
        total = np.stack([np.frombuffer(chunk, dtype="<u8").reshape(2, -1) for chunk in aggregator.finish()])
        assert (total == expected_total(*NAMES)).all()


# --- poisoning: well-formed, well signed, and not what the protocol asks for ------------------------------------------


@pytest.fixture
def make_round(tmp_path: Path) -> Iterator[Callable[..., Round]]:
    made: list[Round] = []

    def make(sites: int = 5, dimension: int = CHUNK + 1, time_limit_s: float = 60) -> Round:
        grids = random_grids(sites, dimension)
        made.append(Round.of(tmp_path / str(len(made)), grids, aggregator=Aggregator(time_limit_s=time_limit_s)))
        return made[-1]

    yield make
    for each in made:
        each.close()


MakeRound = Callable[..., Round]


def exact(a_round: Round, cohort: tuple[str, ...], total: Any) -> bool:
    grids = [a_round.participants[site].grid.astype(np.int64) for site in cohort]
    return bool((np.sum(grids, axis=0) == total).all())


def replace_upload(
    a_round: Round, site: str, make: Callable[[tuple[bytes, ...]], tuple[bytes, ...]], /, **changes: Any
) -> None:
    """The site signs and hands over what ``make`` makes of its honest chunks."""
    replaced: list[tuple[bytes, ...]] = []

    def bend(operation: str, name: str, body: bytes | None) -> bytes | None:
        if name != site or body is None or operation not in ("upload", "part"):
            return body
        if operation == "upload":
            manifest = decode(body, UploadManifest)
            count = len(manifest.chunk_digests) // DIGEST_BYTES
            asked = PartRequest(plan_digest=manifest.plan_digest, first=0, count=count)
            replaced[:] = [make(a_round.participants[site].contributor.part(asked).chunks)]
            digests = b"".join(hashlib.sha256(chunk).digest() for chunk in replaced[0])
            changed = replace(manifest, **({"chunk_digests": digests} | changes), signature=b"")
            return encode(signed(changed, a_round.parties.sites[site]))
        return encode(replace(decode(body, UploadPart), chunks=replaced[0]))

    a_round.channel.bend = bend


POISON: dict[str, Callable[[tuple[bytes, ...]], tuple[bytes, ...]]] = {
    "random words": lambda chunks: tuple(random_words(np.random.default_rng(9)) for _ in chunks),
    "chunks in another order": lambda chunks: chunks[::-1],
    "one chunk twice": lambda chunks: (chunks[0], chunks[0]),
    "one bit of c0": lambda chunks: (bytes([chunks[0][0] ^ 1]) + chunks[0][1:], *chunks[1:]),
    "one bit of c1": lambda chunks: (chunks[0][:-8] + bytes([chunks[0][-8] ^ 1]) + chunks[0][-7:], *chunks[1:]),
    "c0 for c1": lambda chunks: tuple(chunk[len(chunk) // 2 :] + chunk[: len(chunk) // 2] for chunk in chunks),
}


@pytest.mark.parametrize("poison", POISON)
def test_a_well_formed_ciphertext_that_is_not_under_the_sites_masks_opens_nothing(
    make_round: MakeRound, poison: str
) -> None:
    # One such site costs the round and cannot be told from the others: denial of service, never a wrong sum.
    a_round = make_round()
    replace_upload(a_round, "s01", POISON[poison])
    with pytest.raises(RoundLost, match=r"^the decryptor refused to open this sum$"):
        a_round.run()


def test_a_copy_of_anothers_upload_opens_nothing(make_round: MakeRound) -> None:
    a_round = make_round()
    copied: dict[str, tuple[bytes, ...]] = {}

    def copy_of_s00(chunks: tuple[bytes, ...]) -> tuple[bytes, ...]:
        assert a_round.plan is not None
        request = PartRequest(plan_digest=a_round.plan.digest, first=0, count=len(chunks))
        copied["s00"] = a_round.participants["s00"].contributor.part(request).chunks
        return copied["s00"]

    replace_upload(a_round, "s01", copy_of_s00)
    with pytest.raises(RoundLost, match=r"^the decryptor refused to open this sum$"):
        a_round.run()
    assert copied


@pytest.mark.parametrize(
    "spoil",
    [
        lambda chunks: tuple(bytes(len(chunk)) for chunk in chunks),
        lambda chunks: tuple(b"\xff" * len(chunk) for chunk in chunks),
        lambda chunks: tuple(b"" for _ in chunks),
        lambda chunks: tuple(chunk[:-1] for chunk in chunks),
    ],
    ids=["zeros", "0xff", "empty", "short"],
)
def test_what_is_no_ciphertext_leaves_its_site_out_and_the_round_opens(
    make_round: MakeRound, spoil: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]
) -> None:
    a_round = make_round()
    replace_upload(a_round, "s01", spoil)
    opened = a_round.run()
    assert a_round.secure_sum.rejected == {"s01": "malformed_ciphertext"}
    assert exact(a_round, opened.cohort, opened.total)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"chunk_digests": b""}, "wrong_chunk_count"),
        ({"chunk_digests": bytes(DIGEST_BYTES * 300_000)}, "wrong_chunk_count"),
        ({"peers": ("s01",)}, "masked for another view"),
        ({"keys_digest": digest("other")}, "masked for another view"),
        # Not signed for this round, or by nobody in it: whoever stands there has not said it.
        ({"plan_digest": digest("other")}, "sent no upload"),
        ({"site": "s99"}, "sent no upload"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_signed_manifest_of_another_form_leaves_its_site_out(
    make_round: MakeRound, changes: dict[str, Any], code: str
) -> None:
    a_round = make_round()
    replace_upload(a_round, "s01", lambda chunks: chunks, **changes)
    opened = a_round.run()
    assert a_round.secure_sum.rejected == {"s01": code}
    assert "s01" not in opened.cohort
    assert exact(a_round, opened.cohort, opened.total)


# --- the aggregator's process under attack ----------------------------------------------------------------------------


def pid_of(a_round: Round) -> int:
    process = a_round.secure_sum._aggregator._process
    assert process is not None
    return process.pid


def during_the_upload_of(a_round: Round, site: str, do: Callable[[], None], *, once: bool = True) -> None:
    """Something happens to the process while this site's chunks are on their way."""
    done = [False]

    def bend(operation: str, name: str, body: bytes | None) -> bytes | None:
        if (operation, name) == ("part", site) and not (once and done[0]):
            done[0] = True
            do()
        return body

    a_round.channel.bend = bend


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP], ids=lambda kind: kind.name)
def test_a_process_that_dies_or_hangs_over_an_upload_costs_that_site_only(
    make_round: MakeRound, kind: signal.Signals
) -> None:
    a_round = make_round(time_limit_s=5)
    before: list[int] = []

    def strike() -> None:
        before.append(pid_of(a_round))
        os.kill(before[-1], kind)
        time.sleep(0.1)

    during_the_upload_of(a_round, "s02", strike)
    opened = a_round.run()
    assert len(before) == 1
    assert opened.cohort == ("s00", "s01", "s03", "s04")
    assert a_round.secure_sum.rejected == {"s02": "crashed_the_aggregator"}
    assert exact(a_round, opened.cohort, opened.total)
    assert pid_of(a_round) != before[0]


def test_two_sites_that_bring_the_process_down_are_both_out(make_round: MakeRound) -> None:
    a_round = make_round(6)  # t = 4
    hit: list[str] = []

    def bend(operation: str, name: str, body: bytes | None) -> bytes | None:
        if operation == "part" and name in ("s01", "s04") and name not in hit:
            hit.append(name)
            os.kill(pid_of(a_round), signal.SIGKILL)
            time.sleep(0.1)
        return body

    a_round.channel.bend = bend
    opened = a_round.run()
    assert a_round.secure_sum.rejected == dict.fromkeys(("s01", "s04"), "crashed_the_aggregator")
    assert exact(a_round, opened.cohort, opened.total)


def test_a_process_that_runs_out_of_memory_costs_the_site_that_it_happened_over(make_round: MakeRound) -> None:
    a_round = make_round()

    def no_more_memory() -> None:
        pid = pid_of(a_round)
        limit, hard = resource.prlimit(pid, resource.RLIMIT_AS)
        assert 0 < limit < 2**33  # its own limit, set when the round began
        mapped = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        assert mapped < limit <= mapped + 2**29
        resource.prlimit(pid, resource.RLIMIT_AS, (mapped, hard))  # as if it had used it up

    # The manifest is the one message of a site that the process takes whole, up to 16 MiB.
    def manifests(operation: str, name: str, body: bytes | None) -> bytes | None:
        if (operation, name) == ("upload", "s02"):
            no_more_memory()
        return body

    replace_upload(a_round, "s02", lambda chunks: chunks, chunk_digests=bytes(2**23))
    before = a_round.channel.bend
    a_round.channel.bend = lambda operation, name, body: manifests(operation, name, before(operation, name, body))
    opened = a_round.run()
    assert a_round.secure_sum.rejected == {"s02": "crashed_the_aggregator"}
    assert exact(a_round, opened.cohort, opened.total)


def test_a_site_that_sends_eight_mebibytes_for_a_chunk_is_refused_within_the_memory_limit(
    make_round: MakeRound,
) -> None:
    a_round = make_round()
    replace_upload(a_round, "s02", lambda chunks: (bytes(2**23), *chunks[1:]))
    opened = a_round.run()
    assert a_round.secure_sum.rejected == {"s02": "wrong_chunk"}
    assert exact(a_round, opened.cohort, opened.total)


@pytest.mark.parametrize("what", ["chunk", "manifest"])
def test_a_message_beyond_the_process_limit_costs_its_site_only(make_round: MakeRound, what: str) -> None:
    a_round = make_round()
    if what == "chunk":
        replace_upload(a_round, "s02", lambda chunks: (bytes(2**24), *chunks[1:]))
    else:
        replace_upload(a_round, "s02", lambda chunks: chunks, chunk_digests=bytes(2**24 + DIGEST_BYTES))
    opened = a_round.run()
    assert "s02" not in opened.cohort
    assert exact(a_round, opened.cohort, opened.total)


@pytest.mark.parametrize("what", ["chunk", "manifest"])
def test_no_message_of_a_site_ends_the_process(make_round: MakeRound, what: str) -> None:
    a_round = make_round()
    if what == "chunk":
        replace_upload(a_round, "s04", lambda chunks: (bytes(2**24), *chunks[1:]))
    else:
        replace_upload(a_round, "s04", lambda chunks: chunks, chunk_digests=bytes(2**24 + DIGEST_BYTES))
    a_round.run()
    assert a_round.secure_sum.rejected["s04"] != "crashed_the_aggregator"


def test_a_site_that_is_gone_when_all_is_added_again_is_left_out(make_round: MakeRound) -> None:
    a_round = make_round(6)
    asked = Counter[str]()

    def bend(operation: str, name: str, body: bytes | None) -> bytes | None:
        if operation != "part":
            return body
        asked[name] += 1
        if name == "s03":
            os.kill(pid_of(a_round), signal.SIGKILL)
            time.sleep(0.1)
        return None if name == "s00" and asked[name] > 1 else body

    a_round.channel.bend = bend
    opened = a_round.run()
    assert set(opened.cohort) == {"s01", "s02", "s04", "s05"}
    assert exact(a_round, opened.cohort, opened.total)


# --- messages ---------------------------------------------------------------------------------------------------------

HEX = digest("any")
DP = DpTerms(
    unit="record",
    max_records_per_unit=1,
    max_grad_norm=1.0,
    expected_batch_size=8,
    steps_per_round=2,
    clipping="flat",
    noise="local",
)
NAMED = {"plan_digest": HEX, "site": "s00"}
HEAD: dict[str, Any] = {
    "ledger": HEX,
    "site": "s00",
    "run_id": "run",
    "server_round": 1,
    "tree_size": 3,
    "tree_root": HEX,
    "signature": bytes(64),
}
MESSAGES: tuple[Any, ...] = (
    HeadRequest(run_id="run", server_round=1, tree_size=2),
    SignedHead(**HEAD, consistency=(bytes(32), bytes(32))),
    WitnessedHead(**HEAD, witness=bytes(64)),
    StatementOffer(run_id="run", payload=b'{"predicate":{}}'),
    Endorsement(site="s00", statement=HEX, signature=bytes(64)),
    ClaimsRequest(run_id="run"),
    SiteClaims(site="s00", run_id="run", claims=b'{"epsilon":1}'),
    RunOffer(run_id="run", terms=b'{"server":"server"}', signature=bytes(64)),
    RunAnswer(site="s00", run_id="run", terms_digest=HEX, standing="waiting"),
    TrainRequest(plan_digest=HEX, adapter=np.arange(3, dtype=np.float32), public_key=b"key"),
    Receipt(plan_digest=HEX, server_round=1, outcome="included"),
    Settlement(
        site="s00",
        private=True,
        epsilon=1.5,
        charged=8.0,
        delta=1e-5,
        unit="record",
        steps=3,
        clipped_fraction=0.25,
    ),
    AdapterSpec(names=("a", "b"), shapes=((2, 3), (4,)), base_model=HEX),
    sign_plan(PLAN, PARTIES.server),
    sign_plan(replace(PLAN, dp=DP), PARTIES.server),
    signed(Advertisement(**NAMED, share_key=bytes(32), mask_key=bytes(32)), PARTIES.sites["s00"]),
    PeerKeys(plan_digest=HEX, advertisements=(b"one", b"", b"three")),
    signed(
        SealedShare(
            **NAMED,
            keys_digest=HEX,
            receiver="s01",
            box=bytes(80),
            self_commitment=bytes(32),
            mask_commitment=bytes(32),
            seed_commitment=bytes(32),
        ),
        PARTIES.sites["s00"],
    ),
    SealedShares(**NAMED, shares=(b"x" * 40, b"y" * 40)),
    HONEST["s00"].manifest,
    PartRequest(plan_digest=HEX, first=3, count=4),
    UploadPart(**NAMED, first=0, chunks=(b"chunk", b"chunk two")),
    SurvivorSet(
        plan_digest=HEX,
        keys_digest=HEX,
        sharers=NAMES,
        survivors=NAMES[:3],
        upload_digests=(HEX,) * 3,
    ),
    signed(Agreement(**NAMED, survivors_digest=HEX), PARTIES.sites["s00"]),
    UnmaskRequest(plan_digest=HEX, survivors_digest=HEX, agreements=(b"a", b"b")),
    signed(
        UnmaskShares(
            **NAMED,
            survivors_digest=HEX,
            self_of=NAMES[:2],
            self_shares=(bytes(32),) * 2,
            mask_of=NAMES[2:3],
            mask_shares=(bytes(32),),
        ),
        PARTIES.sites["s00"],
    ),
    PeerShares(plan_digest=HEX, shares=(b"share",)),
    Ready(plan_digest=HEX, site="s00"),
)
PREFIX = struct.Struct("<4sHHQ")
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**53 + 1,
    2**64,
    10**400,
    0.5,
    1e308,
    -0.0,
    "",
    "s00",
    "../../etc/passwd",
    "a" * 65,
    "\x00",
    "é",
    HEX,
    HEX.upper(),
    [],
    ["s01", "s00"],
    ["s00", "s00"],
    [["s00"]],
    [1],
    {},
    {"plan": 1},
)


def resealed(body: bytes) -> bytes:
    """The bytes with a right length and a right digest, so that the decoder reads on."""
    magic, version, kind, _ = PREFIX.unpack_from(body.ljust(PREFIX.size, b"\x00"))
    sealed = PREFIX.pack(magic, version, kind, len(body) + 32) + body[PREFIX.size :]
    return sealed + hashlib.sha256(sealed).digest()


def spelled(header: Any) -> bytes:
    """As a sender would spell it, or in Python's way where there is no such spelling: integers beyond all floats."""
    try:
        return canonical_json(header)
    except ValueError:
        return json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
            errors="surrogatepass"
        )


def with_header(data: bytes, header: Any) -> bytes:
    length = int.from_bytes(data[PREFIX.size : PREFIX.size + 4], "little")
    raw = spelled(header) if not isinstance(header, bytes) else header
    rest = data[PREFIX.size + 4 + length : -32]
    return resealed(data[: PREFIX.size] + len(raw).to_bytes(4, "little") + raw + rest)


def header_of(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[PREFIX.size : PREFIX.size + 4], "little")
    header: dict[str, Any] = json.loads(data[PREFIX.size + 4 : PREFIX.size + 4 + length])
    return header


def mutated(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(10)
    if kind == 0:
        return flip(data, rng)
    if kind == 1:
        return cut(data, rng)
    if kind == 2:
        return lengthen(data, rng)
    if kind == 3:  # deep: the digest is right again
        return resealed(flip(data[:-32], rng))
    if kind == 4:
        return resealed(cut(data[:-32], rng))
    if kind == 5:
        return resealed(lengthen(data[:-32], rng))
    if kind == 6:  # a block is repeated or left out
        start, stop = sorted((rng.randrange(len(data) - 32), rng.randrange(len(data) - 32)))
        return resealed(data[:start] + data[start:stop] * rng.choice((0, 2, 3)) + data[stop:-32])
    header = header_of(data)
    target = header
    while isinstance(inner := target[rng.choice(list(target))], dict) and inner and rng.random() < 0.8:
        target = inner
    name = rng.choice(list(target))
    if kind == 7:
        target[name] = rng.choice(VALUES)
    elif kind == 8:
        del target[name]
    else:
        target[rng.choice(("extra", "signature", "plan_digest", "site"))] = rng.choice(VALUES)
    return with_header(data, header)


def test_every_kind_of_message_is_among_them() -> None:
    assert {type(message) for message in MESSAGES} == set(wire.KINDS.values())
    for message in MESSAGES:
        data = encode(message)
        assert with_header(data, header_of(data)) == resealed(data[:-32]) == data


def use(message: Any) -> None:
    """What is done with a message next, before anything in it is believed."""
    if isinstance(message, SignedPlan):
        verify_plan(message, PARTIES.roster.server)
    elif isinstance(message, Advertisement | SealedShare | UploadManifest | Agreement | UnmaskShares):
        verify(message, PARTIES.roster.site(message.site), HEX)
    elif isinstance(message, SurvivorSet | AdapterSpec):
        _ = message.digest


def test_a_mutated_message_is_refused_or_is_a_message_and_nothing_else_happens() -> None:
    rng, refused, read, longest = random.Random(3), 0, 0, 0
    encoded = [(type(message), encode(message)) for message in MESSAGES]
    for number in range(FUZZ):
        kind, data = encoded[number % len(encoded)]
        changed = mutated(data, rng)
        try:
            message = decode(changed, kind)
        except ProtocolError as error:
            refused, longest = refused + 1, max(longest, len(str(error)))
            continue
        read += 1
        assert type(message) is kind
        assert encode(message) == changed  # one spelling only
        try:
            use(message)
        except ProtocolError:
            continue
    assert refused > FUZZ / 2
    assert longest < 500  # no text repeats a message
    assert read > FUZZ / 100


def test_messages_of_one_kind_are_no_messages_of_another() -> None:
    for message in MESSAGES:
        for kind in wire.KINDS.values():
            if kind is not type(message):
                with pytest.raises(ProtocolError):
                    decode(encode(message), kind)


def test_a_header_nested_or_long_without_end_is_refused() -> None:
    data = encode(Ready(plan_digest=HEX, site="s00"))
    for header in (b"[" * 100_000, b'{"site":' * 50_000, b"9" * 10_000, b'"' + b"a" * 2**20 + b'"', b"{}" * 9):
        with pytest.raises(ProtocolError):
            decode(with_header(data, header), Ready)


# --- whole rounds with one hostile party ------------------------------------------------------------------------------


def bent(body: bytes, rng: random.Random) -> bytes:
    """A mutation of a message of the protocol, or of one that is packed in it."""
    kind = wire.KINDS[PREFIX.unpack_from(body)[2]]
    message: Any = decode(body, kind)
    packed = next((n for n in ("shares", "advertisements", "agreements") if getattr(message, n, None)), None)
    if packed is not None and rng.random() < 0.6:
        inner = list(getattr(message, packed))
        place = rng.randrange(len(inner))
        change = rng.randrange(4)
        if change == 0:
            inner[place] = mutated(inner[place], rng)
        elif change == 1:
            del inner[place]
        elif change == 2:
            inner.append(inner[place])
        else:
            inner[place] = inner[rng.randrange(len(inner))]
        return encode(replace(message, **{packed: tuple(inner)}))
    return mutated(body, rng)


@pytest.mark.parametrize("hostile", ["site", "server"])
def test_a_party_that_sends_mutated_messages_gets_the_true_sum_or_none(make_round: MakeRound, hostile: str) -> None:
    # A hostile site answers nonsense in every step; a hostile server asks one site nonsense in every step. Whatever
    # that one does not refuse, the round opens exactly or is lost, and nobody dies of another exception.
    a_round, rng = make_round(4, dimension=30), random.Random(4)
    outcomes = Counter[str]()
    for number in range(1, 1 + max(60, FUZZ // 160)):
        phase = rng.choice(("advertise", "share", "accept", "upload", "part", "agree", "unmask"))

        def bend(operation: str, site: str, body: bytes | None, phase: str = phase) -> bytes | None:
            return bent(body, rng) if (operation, site) == (phase, "s01") and body is not None else body

        if hostile == "site":
            a_round.channel.bend = bend
        else:
            a_round.channel.bend_request = bend
        try:
            opened = a_round.run(server_round=number)
        except RoundLost:
            outcomes["lost"] += 1
        except ProtocolError:
            assert phase == "upload"  # the harness decodes a manifest for the server: `run_round` leaves it out
            outcomes["lost"] += 1
        else:
            outcomes["opened"] += 1
            assert exact(a_round, opened.cohort, opened.total)
    assert outcomes["opened"] > 10


def test_a_refusal_is_always_one_of_ours() -> None:
    assert issubclass(UploadRefused, FedCollmError)
    assert issubclass(RoundLost, FedCollmError)
