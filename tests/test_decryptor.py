"""The decryptor opens one sum per key, of enough sites, and refuses everything else with one text."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import numpy as np
import pytest

from fedcollm_privacy import ckks_secret
from fedcollm_privacy.ckks import CiphertextSum, CkksParameters, PublicContext, seal
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.errors import OpeningRefused, ProtocolError
from fedcollm_privacy.messages import QuantizedUpdate, RoundPlan, SealedSum

PARAMETERS = CkksParameters()
GRID = np.array([4095, -4095, 0, 1, -1])
SITES = ("a", "b", "c", "d")


def plan(context: PublicContext, **changes: Any) -> RoundPlan:
    fields: dict[str, Any] = {
        "run_id": "r",
        "server_round": 1,
        "attempt": 1,
        "spec_digest": "",
        "dimension": 5,
        "clip": 1.0,
        "value_bits": 13,
        "min_contributors": 3,
        "max_contributors": 4,
        "key_digest": context.digest,
        "nonce": "",
    }
    return RoundPlan(**(fields | changes))


def encrypted_sum(context: PublicContext, chosen: RoundPlan, addends: int, cohort: tuple[str, ...]) -> SealedSum:
    total = CiphertextSum(PARAMETERS, chosen.dimension)
    for _ in range(addends):
        total.add(seal(QuantizedUpdate(plan=chosen, grid=GRID), context, "a").chunks)
    return SealedSum(plan_digest=chosen.digest, cohort=cohort, chunks=tuple(total.chunks()))


def a_round(cohort: tuple[str, ...] = SITES, **changes: Any) -> tuple[Decryptor, RoundPlan, SealedSum]:
    decryptor = Decryptor()
    context = decryptor.new_round_key(PARAMETERS)
    chosen = plan(context, **changes)
    return decryptor, chosen, encrypted_sum(context, chosen, max(len(cohort), 1), cohort)


@pytest.mark.parametrize("count", [3, 4])
def test_a_sum_of_enough_sites_opens_exactly(count: int) -> None:
    decryptor, chosen, sealed_sum = a_round(SITES[:count])
    opened = decryptor.open_sum(chosen, sealed_sum)
    assert (opened.total == count * GRID).all()
    assert opened.cohort == SITES[:count]
    assert opened.plan == chosen


def refused(decryptor: Decryptor, chosen: RoundPlan, sealed_sum: SealedSum) -> str:
    with pytest.raises(OpeningRefused) as refusal:
        decryptor.open_sum(chosen, sealed_sum)
    assert refusal.value.__cause__ is None
    return str(refusal.value)


def test_every_refusal_has_one_text_and_costs_the_key() -> None:
    texts = set()
    for changes in (
        {"plan_digest": "0" * 64},
        {"cohort": ("a", "b")},
        {"cohort": ("a",)},
        {"cohort": ()},
        {"cohort": ("a", "b", "b")},
        {"cohort": ("a", "b", "c", "d", "e")},
        {"cohort": ("a", "b", "../c")},
        {"chunks": ()},
        {"chunks": (b"",)},
        {"chunks": (bytes(100),)},
    ):
        decryptor, chosen, sealed_sum = a_round()
        texts.add(refused(decryptor, chosen, dataclasses.replace(sealed_sum, **changes)))
        texts.add(refused(decryptor, chosen, sealed_sum))
    assert texts == {str(OpeningRefused())}


def test_a_second_opening_is_refused() -> None:
    decryptor, chosen, sealed_sum = a_round()
    decryptor.open_sum(chosen, sealed_sum)
    refused(decryptor, chosen, sealed_sum)


def test_nothing_opens_before_there_is_a_key() -> None:
    _, chosen, sealed_sum = a_round()
    refused(Decryptor(), chosen, sealed_sum)


def test_a_plan_for_another_key_is_refused() -> None:
    decryptor, chosen, sealed_sum = a_round()
    other = dataclasses.replace(chosen, key_digest="0" * 64)
    refused(decryptor, other, dataclasses.replace(sealed_sum, plan_digest=other.digest))


def test_last_rounds_sum_is_refused_under_this_rounds_key() -> None:
    decryptor, chosen, sealed_sum = a_round()
    context = decryptor.new_round_key(PARAMETERS)
    now = plan(context)
    refused(decryptor, now, dataclasses.replace(sealed_sum, plan_digest=now.digest))
    decryptor.new_round_key(PARAMETERS)
    refused(decryptor, chosen, sealed_sum)


def test_fewer_than_the_plans_minimum_are_refused() -> None:
    decryptor, chosen, sealed_sum = a_round(SITES[:3], min_contributors=4)
    refused(decryptor, chosen, sealed_sum)


def test_one_upload_posed_as_the_sum_of_one_is_refused() -> None:
    decryptor, chosen, sealed_sum = a_round(("a",))
    refused(decryptor, chosen, sealed_sum)


def test_a_sum_beyond_what_its_cohort_can_hold_is_refused() -> None:
    decryptor = Decryptor()
    context = decryptor.new_round_key(PARAMETERS)
    chosen = plan(context)
    refused(decryptor, chosen, encrypted_sum(context, chosen, 4, SITES[:3]))


def test_a_plan_that_could_overflow_is_refused() -> None:
    decryptor, chosen, sealed_sum = a_round()
    wider = dataclasses.replace(chosen, value_bits=18, max_contributors=100)
    refused(decryptor, wider, dataclasses.replace(sealed_sum, plan_digest=wider.digest))


def test_a_changed_ciphertext_is_refused() -> None:
    decryptor, chosen, sealed_sum = a_round()
    raw = bytearray(sealed_sum.chunks[0])
    raw[30_000] ^= 1
    refused(decryptor, chosen, dataclasses.replace(sealed_sum, chunks=(bytes(raw),)))


def test_a_key_is_fresh_each_round_and_gone_after_the_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Any]] = []

    class Watched(ckks_secret.SecretKey):
        __slots__ = ("__weakref__",)

        def __init__(self, seal_key: Any, parameters: CkksParameters) -> None:
            super().__init__(seal_key, parameters)
            kept.append(weakref.ref(self))

    monkeypatch.setattr(ckks_secret, "SecretKey", Watched)
    decryptor = Decryptor()
    first = decryptor.new_round_key(PARAMETERS)
    second = decryptor.new_round_key(PARAMETERS)
    gc.collect()
    assert first.digest != second.digest
    assert kept[0]() is None
    assert kept[1]() is not None
    chosen = plan(second)
    decryptor.open_sum(chosen, encrypted_sum(second, chosen, 3, SITES[:3]))
    gc.collect()
    assert kept[1]() is None


def test_a_refusal_is_a_protocol_error() -> None:
    assert issubclass(OpeningRefused, ProtocolError)
