"""The whole seam: encrypted sums equal plain integer sums exactly, and what goes wrong costs a site or the round."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.ckks import CkksParameters, PublicContext, seal
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.errors import InvalidValue, ProtocolError, RoundLost
from fedcollm_privacy.messages import PrivateUpdate, QuantizedUpdate, RoundPlan, SealedUpdate
from fedcollm_privacy.quantization import dequantize_mean, quantize
from fedcollm_privacy.secure_sum import CkksSum, SecureSum

DIMENSION = 2 * 8192 + 77


@pytest.fixture(scope="module")
def ckks_sum() -> Iterator[CkksSum]:
    secure_sum = CkksSum(Aggregator(time_limit_s=60), Decryptor())
    yield secure_sum
    secure_sum.close()


def plan(context: PublicContext, sites: int, **changes: Any) -> RoundPlan:
    fields: dict[str, Any] = {
        "run_id": "r",
        "server_round": 1,
        "attempt": 1,
        "spec_digest": "",
        "dimension": DIMENSION,
        "clip": 0.1,
        "value_bits": 13,
        "min_contributors": 3,
        "max_contributors": sites,
        "key_digest": context.digest,
        "nonce": "",
    }
    return RoundPlan(**(fields | changes))


def begun(
    secure_sum: SecureSum, sites: int = 4, value_bits: int = 13, **changes: Any
) -> tuple[PublicContext, RoundPlan]:
    context = secure_sum.begin(contributors=sites, value_bits=value_bits)
    return context, plan(context, sites, value_bits=value_bits, **changes)


def random_grids(chosen: RoundPlan, sites: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(sites)
    return list(rng.integers(-chosen.levels, chosen.levels + 1, (sites, chosen.dimension)))


def sealed(
    context: PublicContext, chosen: RoundPlan, grids: list[np.ndarray[Any, Any]], tag: str = "site"
) -> Iterator[SealedUpdate]:
    for number, grid in enumerate(grids):
        yield seal(QuantizedUpdate(plan=chosen, grid=grid), context, f"{tag}-{number}")


@pytest.mark.parametrize(("sites", "value_bits"), [(3, 18), (3, 13), (8, 17), (16, 16), (64, 14)])
@pytest.mark.parametrize("content", ["random", "all high", "all low", "alternating"])
def test_encrypted_sums_equal_integer_sums(ckks_sum: CkksSum, sites: int, value_bits: int, content: str) -> None:
    context, chosen = begun(ckks_sum, sites, value_bits, dimension=8192 + 50)
    alternating = chosen.levels * (-1) ** np.arange(chosen.dimension)
    grids = {
        "random": random_grids(chosen, sites),
        "all high": [np.full(chosen.dimension, chosen.levels)] * sites,
        "all low": [np.full(chosen.dimension, -chosen.levels)] * sites,
        "alternating": [alternating] * sites,
    }[content]
    opened = ckks_sum.open(chosen, sealed(context, chosen, grids))
    assert (opened.total == np.sum(grids, axis=0)).all()
    assert len(opened.cohort) == sites
    assert not ckks_sum.rejected


def test_the_mean_of_private_updates_comes_back_to_half_a_grid_step(ckks_sum: CkksSum) -> None:
    context, chosen = begun(ckks_sum, 5)
    vectors = np.random.default_rng(0).uniform(-0.1, 0.1, (5, DIMENSION)).astype(np.float32)
    updates = [PrivateUpdate(vector=vector, spec_digest="", reservation="non-private") for vector in vectors]
    uploads = (seal(quantize(update, chosen), context, f"s{i}") for i, update in enumerate(updates))
    mean = dequantize_mean(ckks_sum.open(chosen, uploads))
    assert np.abs(mean - vectors.astype(np.float64).mean(0)).max() <= chosen.grid_step / 2 * 1.001


def test_bad_uploads_leave_their_sites_out_and_the_others_open(ckks_sum: CkksSum) -> None:
    context, chosen = begun(ckks_sum, 6)
    grids = random_grids(chosen, 6)
    uploads = list(sealed(context, chosen, grids))
    uploads[1] = dataclasses.replace(uploads[1], chunks=(b"\x00" * 99, *uploads[1].chunks[1:]))
    uploads[2] = dataclasses.replace(uploads[2], plan_digest="0" * 64)
    uploads[4] = dataclasses.replace(uploads[4], chunks=uploads[4].chunks[:-1])
    opened = ckks_sum.open(chosen, iter([*uploads, uploads[0]]))
    assert opened.cohort == ("site-0", "site-3", "site-5")
    assert (opened.total == grids[0] + grids[3] + grids[5]).all()
    assert dict(ckks_sum.rejected) == {
        "site-1": "malformed_ciphertext",
        "site-2": "wrong_plan",
        "site-4": "wrong_chunk_count",
    }


def test_too_few_sound_uploads_open_nothing_and_the_next_round_works(ckks_sum: CkksSum) -> None:
    context, chosen = begun(ckks_sum, 3)
    uploads = list(sealed(context, chosen, random_grids(chosen, 3)))
    uploads[2] = dataclasses.replace(uploads[2], chunks=())
    with pytest.raises(RoundLost, match=r"2 sound uploads.*site-2: wrong_chunk_count"):
        ckks_sum.open(chosen, uploads)
    assert dict(ckks_sum.rejected) == {"site-2": "wrong_chunk_count"}
    with pytest.raises(RoundLost):
        ckks_sum.open(chosen, sealed(context, chosen, random_grids(chosen, 3)))
    assert_a_round_works(ckks_sum)


def test_the_plans_minimum_counts_too(ckks_sum: CkksSum) -> None:
    context, chosen = begun(ckks_sum, 5, min_contributors=5)
    with pytest.raises(RoundLost, match="at least 5"):
        ckks_sum.open(chosen, sealed(context, chosen, random_grids(chosen, 4)))


def test_one_key_opens_once(ckks_sum: CkksSum) -> None:
    context, chosen = begun(ckks_sum, 3)
    uploads = list(sealed(context, chosen, random_grids(chosen, 3)))
    ckks_sum.open(chosen, uploads)
    with pytest.raises(RoundLost, match="refused"):
        ckks_sum.open(chosen, uploads)


def test_a_well_formed_upload_under_another_key_spoils_the_round_and_nothing_opens(ckks_sum: CkksSum) -> None:
    foreign, _ = begun(ckks_sum, 3)
    context, chosen = begun(ckks_sum, 3)
    under_foreign = dataclasses.replace(chosen, key_digest=foreign.digest)
    uploads = list(sealed(context, chosen, random_grids(chosen, 3)))
    (stray,) = sealed(foreign, under_foreign, random_grids(chosen, 1))
    uploads[0] = dataclasses.replace(stray, plan_digest=chosen.digest)
    with pytest.raises(RoundLost, match="refused"):
        ckks_sum.open(chosen, uploads)
    assert_a_round_works(ckks_sum)


def test_an_aggregator_killed_mid_round_loses_this_round_only(ckks_sum: CkksSum) -> None:
    context, chosen = begun(ckks_sum, 3)

    def uploads() -> Iterator[SealedUpdate]:
        for number, upload in enumerate(sealed(context, chosen, random_grids(chosen, 3))):
            if number == 2:
                process = ckks_sum._aggregator._process
                assert process is not None
                os.kill(process.pid, signal.SIGKILL)
            yield upload

    with pytest.raises(RoundLost, match="site-2"):
        ckks_sum.open(chosen, uploads())
    assert_a_round_works(ckks_sum)


def test_an_interrupted_iterator_costs_the_key(ckks_sum: CkksSum) -> None:
    context, chosen = begun(ckks_sum, 3)

    def uploads() -> Iterator[SealedUpdate]:
        yield next(sealed(context, chosen, random_grids(chosen, 1)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckks_sum.open(chosen, uploads())
    assert ckks_sum._decryptor._key is None
    assert_a_round_works(ckks_sum)


def test_uploads_are_taken_as_they_arrive(ckks_sum: CkksSum) -> None:
    context, chosen = begun(ckks_sum, 8)
    alive: list[int] = []
    held: list[SealedUpdate] = []

    def uploads() -> Iterator[SealedUpdate]:
        for upload in sealed(context, chosen, random_grids(chosen, 8)):
            held.append(upload)
            alive.append(len(held))
            yield upload
            # Only reached once the consumer came back for more: it did not ask for all of them first.
            held.pop()

    ckks_sum.open(chosen, uploads())
    assert set(alive) == {1}


def test_a_sum_that_could_overflow_is_refused_before_a_key_is_made(ckks_sum: CkksSum) -> None:
    with pytest.raises(InvalidValue, match="value_bits"):
        ckks_sum.begin(contributors=100, value_bits=14)


def test_opening_before_beginning_is_refused() -> None:
    secure_sum = CkksSum(Aggregator(), Decryptor())
    with pytest.raises(ProtocolError, match="begin"):
        secure_sum.open(plan(Decryptor().new_round_key(CkksParameters()), 3), [])


def assert_a_round_works(secure_sum: CkksSum) -> None:
    context, chosen = begun(secure_sum, 3)
    grids = random_grids(chosen, 3)
    assert (secure_sum.open(chosen, sealed(context, chosen, grids)).total == np.sum(grids, axis=0)).all()
