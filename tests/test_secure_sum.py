"""The whole seam: masked encrypted sums equal plain integer sums, and what goes wrong costs a site or the round."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcollm_privacy import decryptor
from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.ciphertext_sum import Words, words_of
from fedcollm_privacy.ckks_secret import SecretKey, decrypt_sum
from fedcollm_privacy.errors import InvalidValue, OpeningRefused, ProtocolError, RoundLost
from fedcollm_privacy.masks import MaskSum, subtract_mod
from fedcollm_privacy.messages import PrivateUpdate, QuantizedUpdate
from fedcollm_privacy.quantization import dequantize_mean, quantize
from fedcollm_privacy.sealing import seal
from fedcollm_privacy.secure_sum_messages import PartRequest, UploadManifest, UploadPart, signed
from fedcollm_privacy.wire import decode, encode

from .secure_sums import Bend, Grid, Round, digest, random_grids

DIMENSION = 2 * 8192 + 77


@pytest.fixture(scope="module")
def aggregator() -> Iterator[Aggregator]:
    """One process for all of these federations."""
    with Aggregator(time_limit_s=60) as shared:
        yield shared


@pytest.fixture
def federation(tmp_path: Path, aggregator: Aggregator) -> Iterator[Any]:
    """``federation(sites, dimension=..., value_bits=13)``: sites with random grids, ready for rounds."""

    def make(sites: int, dimension: int = 77, value_bits: int = 13, grids: list[Grid] | None = None) -> Round:
        chosen = random_grids(sites, dimension, value_bits, seed=sites) if grids is None else grids
        return Round.of(tmp_path, chosen, aggregator=aggregator)

    return make


def total_of(a_round: Round, *sites: str) -> np.ndarray[Any, Any]:
    chosen = sites or tuple(a_round.participants)
    return np.sum([a_round.participants[site].grid for site in chosen], axis=0, dtype=np.int64)


def assert_a_round_works(a_round: Round, **changes: Any) -> None:
    """All honest again, the next round opens the right sum."""
    a_round.channel.bend = a_round.channel.bend_request = lambda operation, site, body: body
    opened = a_round.run(server_round=9, nonce="ee", max_colluding=0, **changes)
    assert (opened.total == total_of(a_round)).all()
    assert opened.cohort == tuple(a_round.participants)
    assert not a_round.secure_sum.rejected


@pytest.mark.parametrize(("sites", "value_bits"), [(3, 18), (5, 13), (8, 17)])
@pytest.mark.parametrize("content", ["random", "all high", "all low", "alternating"])
def test_opened_sums_equal_integer_sums(federation: Any, sites: int, value_bits: int, content: str) -> None:
    """Of more sites: `test_ckks.test_encrypted_sums_equal_integer_sums`."""
    dimension, levels = 8192 + 50, 2 ** (value_bits - 1) - 1
    high = np.full(dimension, levels, dtype=np.int32)
    grids = {
        "random": random_grids(sites, dimension, value_bits),
        "all high": [high] * sites,
        "all low": [-high] * sites,
        "alternating": [high * (-1) ** np.arange(dimension, dtype=np.int32)] * sites,
    }[content]
    a_round = federation(sites, grids=grids)
    opened = a_round.run(value_bits=value_bits, max_colluding=0)
    assert (opened.total == np.sum(grids, axis=0, dtype=np.int64)).all()
    assert opened.cohort == tuple(a_round.participants)
    assert not a_round.secure_sum.rejected


def test_the_mean_of_private_updates_comes_back_to_half_a_grid_step(federation: Any) -> None:
    a_round = federation(5, DIMENSION)
    plan = a_round.begin(clip=0.1)
    ready = a_round.secure_sum.enrol(plan)
    vectors = np.random.default_rng(0).uniform(-0.1, 0.1, (5, DIMENSION)).astype(np.float32)
    for participant, vector in zip(a_round.participants.values(), vectors, strict=True):
        update = PrivateUpdate(vector=vector, spec_digest=plan.spec_digest, reservation="non-private")
        participant.grid = quantize(update, plan).grid
    mean = dequantize_mean(a_round.secure_sum.open(a_round.manifests(ready)))
    assert np.abs(mean - vectors.astype(np.float64).mean(0)).max() <= plan.grid_step / 2 * 1.001


def instead(a_round: Round, site: str, chunks: list[bytes]) -> Bend:
    """That site signs and hands over these chunks in place of its upload."""

    def bend(operation: str, asked: str, body: bytes | None) -> bytes | None:
        if asked != site or body is None or operation not in ("upload", "part"):
            return body
        if operation == "part":
            return encode(dataclasses.replace(decode(body, UploadPart), chunks=tuple(chunks)))
        manifest = decode(body, UploadManifest)
        digests = b"".join(sha256(chunk).digest() for chunk in chunks)
        return encode(signed(dataclasses.replace(manifest, chunk_digests=digests), a_round.parties.sites[site]))

    return bend


def test_bad_uploads_leave_their_sites_out_and_the_others_open(federation: Any) -> None:
    a_round = federation(9)
    length = 2 * 8 * 4096
    bends = [instead(a_round, "s01", [bytes(length)]), instead(a_round, "s04", [])]

    def bend(operation: str, site: str, body: bytes | None) -> bytes | None:
        for change in bends:
            body = change(operation, site, body)
        if (operation, site) == ("upload", "s02"):
            manifest = dataclasses.replace(decode(body or b"", UploadManifest), plan_digest=digest("another"))
            return encode(signed(manifest, a_round.parties.sites["s02"]))
        if (operation, site) == ("part", "s06"):
            part = decode(body or b"", UploadPart)
            return encode(dataclasses.replace(part, chunks=(b"\x00" + part.chunks[0][1:],)))
        return body

    a_round.channel.bend = bend
    plan = a_round.begin(max_colluding=0)
    manifests = list(a_round.manifests(a_round.secure_sum.enrol(plan)))
    opened = a_round.secure_sum.open([*manifests, manifests[0]])
    good = ("s00", "s03", "s05", "s07", "s08")
    assert opened.cohort == good
    assert (opened.total == total_of(a_round, *good)).all()
    assert dict(a_round.secure_sum.rejected) == {
        "s01": "malformed_ciphertext",
        "s02": "sent no upload",
        "s04": "wrong_chunk_count",
        "s06": "wrong_chunk",
    }


@pytest.mark.parametrize(
    "view",
    [{"keys_digest": digest("other keys")}, {"peers": ("s00", "s01", "s02", "s03")}, {"peers": ()}],
    ids=lambda view: next(iter(view)),
)
def test_an_upload_masked_for_another_view_is_not_even_asked_for(federation: Any, view: dict[str, Any]) -> None:
    """Its masks would not come off: the round would be lost for all."""
    a_round = federation(5)

    def bend(operation: str, site: str, body: bytes | None) -> bytes | None:
        if (operation, site) != ("upload", "s02"):
            return body
        manifest = decode(body or b"", UploadManifest)
        return encode(signed(dataclasses.replace(manifest, **view), a_round.parties.sites["s02"]))

    a_round.channel.bend = bend
    others = ("s00", "s01", "s03", "s04")
    opened = a_round.run(max_colluding=0)
    assert opened.cohort == others
    assert (opened.total == total_of(a_round, *others)).all()
    assert dict(a_round.secure_sum.rejected) == {"s02": "masked for another view"}
    assert ("part", "s02") not in [(operation, site) for operation, site, _ in a_round.channel.log]


def test_too_few_sound_uploads_open_nothing_and_the_next_round_works(federation: Any) -> None:
    a_round = federation(3)
    a_round.channel.bend = instead(a_round, "s02", [])
    with pytest.raises(RoundLost, match=r"2 sound uploads.*at least 3"):
        a_round.run(max_colluding=0)
    assert dict(a_round.secure_sum.rejected) == {"s02": "wrong_chunk_count"}
    assert a_round.secure_sum._decryptor._key is None
    assert_a_round_works(a_round)


@pytest.mark.parametrize(("changes", "least"), [({"min_contributors": 5}, 5), ({"threshold": 5}, 5), ({}, 4)])
def test_the_plans_minimum_and_threshold_count_too(federation: Any, changes: dict[str, int], least: int) -> None:
    a_round = federation(5)
    lost = [f"s{i:02d}" for i in range(6 - least)]
    a_round.channel.bend = lambda operation, site, body: None if operation == "upload" and site in lost else body
    with pytest.raises(RoundLost, match=f"{least - 1} sound uploads; at least {least}"):
        a_round.run(**({"max_colluding": 1} | changes))


def test_one_key_opens_once(federation: Any) -> None:
    a_round = federation(3)
    plan = a_round.begin(max_colluding=0)
    manifests = list(a_round.manifests(a_round.secure_sum.enrol(plan)))
    a_round.secure_sum.open(manifests)
    with pytest.raises(ProtocolError, match="enrol"):
        a_round.secure_sum.open(manifests)
    # Nor do the sites take part in that plan again, whatever key there is by now.
    a_round.secure_sum.begin(contributors=3, value_bits=13)
    with pytest.raises(RoundLost, match="0 sites accept the plan"):
        a_round.secure_sum.enrol(plan)
    assert_a_round_works(a_round)


def test_a_well_formed_upload_of_something_else_spoils_the_round_and_nothing_opens(federation: Any) -> None:
    """Under another key, or not encrypted at all: words are words, and the sum of all is noise."""
    a_round = federation(5)
    words_2N = np.random.default_rng(4).integers(0, 2**59, (2, 4096), dtype=np.uint64)
    a_round.channel.bend = instead(a_round, "s01", [words_2N.tobytes()])
    with pytest.raises(RoundLost, match="the decryptor refused"):
        a_round.run(max_colluding=0)
    assert_a_round_works(a_round)


def process_of(a_round: Round) -> int:
    process = a_round.secure_sum._aggregator._process
    assert process is not None
    return process.pid


def test_whoever_brings_the_aggregator_down_stays_out_and_the_others_open(federation: Any) -> None:
    a_round, killed = federation(5, DIMENSION), []

    def bend(operation: str, site: str, body: bytes | None) -> bytes | None:
        if (operation, site) == ("part", "s02"):
            killed.append(process_of(a_round))
            os.kill(killed[-1], signal.SIGKILL)
        return body

    a_round.channel.bend = bend
    opened = a_round.run(max_colluding=0)
    others = ("s00", "s01", "s03", "s04")
    assert len(killed) == 1
    assert opened.cohort == others
    assert (opened.total == total_of(a_round, *others)).all()
    assert dict(a_round.secure_sum.rejected) == {"s02": "crashed_the_aggregator"}
    a_round.channel.bend = lambda operation, site, body: body
    assert_a_round_works(a_round)


@pytest.mark.parametrize("when", ["agree", "unmask"])
def test_an_aggregator_killed_after_the_last_upload_loses_this_round_only(federation: Any, when: str) -> None:
    a_round = federation(3)

    def bend(operation: str, site: str, body: bytes | None) -> bytes | None:
        if (operation, site) == (when, "s01"):
            os.kill(process_of(a_round), signal.SIGKILL)
        return body

    a_round.channel.bend = bend
    with pytest.raises(RoundLost, match="aggregator process ended while it gave the sum"):
        a_round.run(max_colluding=0)
    assert_a_round_works(a_round)


def test_an_interrupted_iterator_costs_the_key(federation: Any) -> None:
    a_round = federation(3)
    plan = a_round.begin(max_colluding=0)
    ready = a_round.secure_sum.enrol(plan)

    def uploads() -> Iterator[UploadManifest]:
        yield next(a_round.manifests(ready))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        a_round.secure_sum.open(uploads())
    assert a_round.secure_sum._decryptor._key is None
    assert_a_round_works(a_round)


def test_uploads_are_taken_as_they_arrive(federation: Any) -> None:
    a_round = federation(8)
    plan = a_round.begin(max_colluding=0)
    ready = a_round.secure_sum.enrol(plan)
    alive: list[int] = []
    held: list[UploadManifest] = []

    def uploads() -> Iterator[UploadManifest]:
        for manifest in a_round.manifests(ready):
            held.append(manifest)
            alive.append(len(held))
            yield manifest
            # Only reached once the consumer came back for more: it did not ask for all of them first, and it took
            # this one's chunks before.
            assert ("part", manifest.site) in [(operation, site) for operation, site, _ in a_round.channel.log]
            held.pop()

    a_round.secure_sum.open(uploads())
    assert set(alive) == {1}


def test_no_upload_and_no_sum_of_some_opens_under_the_rounds_key(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decryptor's key alone is not enough: on everything but the sum of all survivors lies a mask."""
    keys: list[SecretKey] = []
    original = decryptor.generate

    def noting(parameters: Any) -> Any:
        key, context = original(parameters)
        keys.append(key)
        return key, context

    monkeypatch.setattr(decryptor, "generate", noting)
    a_round = federation(4)
    a_round.run(max_colluding=0)
    parts = [body for operation, _, body in a_round.channel.log if operation == "part"]
    chunks = [decode(body or b"", UploadPart).chunks[0] for body in parts]
    uploads = [words_of(chunk, keys[0].parameters).astype(object) for chunk in chunks]
    assert len(uploads) == 4
    for chosen in ([0], [1], [2], [3], [0, 1], [0, 2, 3], [0, 1, 2, 3]):
        summed = sum(uploads[i] for i in chosen) % keys[0].parameters.modulus
        with pytest.raises(OpeningRefused):
            decrypt_sum(keys[0], [summed.astype(np.uint64)], dimension=77, largest=4 * 4095)


def test_a_sum_that_could_overflow_is_refused_before_a_key_is_made(federation: Any) -> None:
    a_round = federation(3)
    with pytest.raises(InvalidValue, match="value_bits"):
        a_round.secure_sum.begin(contributors=2**20, value_bits=18)
    assert a_round.secure_sum._decryptor._key is None


def test_opening_before_enrolling_is_refused(federation: Any) -> None:
    a_round = federation(3)
    with pytest.raises(ProtocolError, match="enrol"):
        a_round.secure_sum.open([])
    a_round.begin(max_colluding=0)
    with pytest.raises(ProtocolError, match="enrol"):
        a_round.secure_sum.open([])


def test_closing_destroys_the_key_and_ends_the_process(tmp_path: Path) -> None:
    a_round = Round.of(tmp_path, random_grids(3, 5))
    plan = a_round.begin(max_colluding=0)
    ready = a_round.secure_sum.enrol(plan)
    a_round.secure_sum._aggregator.begin(plan, a_round.parties.roster)
    a_round.close()
    a_round.close()
    assert a_round.secure_sum._decryptor._key is None
    assert a_round.secure_sum._aggregator._process is None
    with pytest.raises(RoundLost, match="refused"):
        a_round.secure_sum.open(a_round.manifests(ready))
    a_round.close()


def test_a_site_that_cancels_c1_in_the_sum_loses_the_round_and_nothing_escapes(federation: Any) -> None:
    """A rushing site that sees the others' chunks; what would be left is transparent."""
    a_round = federation(4)
    forged: dict[str, bytes] = {}

    def bend(operation: str, site: str, body: bytes | None) -> bytes | None:
        if (operation, site) == ("upload", "s03"):
            parts = [decode(b or b"", UploadPart).chunks[0] for o, _, b in a_round.channel.log if o == "part"]
            assert a_round.plan is not None
            modulus = a_round.plan.ckks.modulus
            rest = sum(words_of(chunk, a_round.plan.ckks)[1].astype(object) for chunk in parts)
            c1 = ((-rest) % modulus).astype(np.uint64)
            forged["chunk"] = np.stack([c1, c1]).tobytes()
        return instead(a_round, "s03", [forged["chunk"]])(operation, site, body) if forged else body

    a_round.channel.bend = bend
    with pytest.raises(RoundLost, match="refused"):
        a_round.run(max_colluding=0)
    assert forged
    assert_a_round_works(a_round)


@pytest.mark.parametrize("second", ["is gone", "crashes it too"])
def test_after_a_crash_sites_that_cannot_be_added_again_stay_out(federation: Any, second: str) -> None:
    a_round = federation(5)
    asked = {"s01": 0}

    def bend(operation: str, site: str, body: bytes | None) -> bytes | None:
        if (operation, site) == ("part", "s03"):
            os.kill(process_of(a_round), signal.SIGKILL)
        if (operation, site) == ("part", "s01"):
            asked["s01"] += 1
            if asked["s01"] > 1 and second == "is gone":
                return None
            if asked["s01"] > 1:
                os.kill(process_of(a_round), signal.SIGKILL)
        return body

    a_round.channel.bend = bend
    opened = a_round.run(max_colluding=0)
    assert opened.cohort == ("s00", "s02", "s04")
    assert (opened.total == total_of(a_round, *opened.cohort)).all()
    reason = "broken_off" if second == "is gone" else "crashed_the_aggregator"
    assert dict(a_round.secure_sum.rejected) == {"s01": reason, "s03": "crashed_the_aggregator"}


def test_an_overlong_chunk_costs_its_site_and_not_the_process(federation: Any) -> None:
    a_round = federation(5)
    assert_a_round_works(a_round)
    process = process_of(a_round)
    a_round.channel.bend = instead(a_round, "s02", [bytes(2**24 + 1)])
    opened = a_round.run(server_round=10, nonce="ff", max_colluding=0)
    assert dict(a_round.secure_sum.rejected) == {"s02": "wrong_chunk"}
    assert (opened.total == total_of(a_round, *opened.cohort)).all()
    assert process_of(a_round) == process


@pytest.mark.parametrize("processes", [1, 2])
def test_an_upload_sealed_by_several_processes_is_the_same_update_under_the_same_masks(
    federation: Any, processes: int
) -> None:
    dimension = 40 * 8192 + 5  # more than one block
    grids = random_grids(3, dimension)
    a_round = federation(3, grids=grids)
    plan = a_round.begin(max_colluding=0)
    terms = [(bytes([term]) * 32, 1 if term % 2 else -1) for term in range(5)]
    upload = seal(QuantizedUpdate(plan=plan, grid=grids[0]), a_round.context, terms, processes=processes)
    chunks = [upload.part(PartRequest(plan_digest=plan.digest, first=i, count=1))[0] for i in range(upload.count)]
    assert upload.digests == b"".join(sha256(chunk).digest() for chunk in chunks)
    masks, modulus = MaskSum(terms, plan.ckks.modulus), plan.ckks.modulus

    def without_masks() -> Iterator[Words]:
        for index, chunk in enumerate(chunks):
            words_2N = words_of(chunk, plan.ckks)
            yield np.stack([subtract_mod(words_2N[0], masks.chunk(index, words_2N.shape[1]), modulus), words_2N[1]])

    key = a_round.secure_sum._decryptor._key
    assert (decrypt_sum(key, without_masks(), dimension=dimension, largest=4095) == grids[0]).all()
