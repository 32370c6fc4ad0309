"""The decryptor opens one agreed sum per key, of enough sites, and refuses everything else with one text."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from fedcollm_privacy import ckks_secret
from fedcollm_privacy.ciphertext_sum import CiphertextSum, words_of
from fedcollm_privacy.ckks import CkksParameters, PublicContext, Words, encrypt, parameters_for
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.errors import OpeningRefused, ProtocolError
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.masks import MaskSum, add_mod
from fedcollm_privacy.messages import QuantizedUpdate, RoundPlan, SealedSum
from fedcollm_privacy.secure_sum_messages import Agreement, SurvivorSet, signed
from fedcollm_privacy.wire import encode

from .secure_sums import Parties, digest, round_plan

PARAMETERS = parameters_for(4, 13)
GRID = np.array([4095, -4095, 0, 1, -1], dtype=np.int32)
PARTIES = Parties.named("a", "b", "c", "d", "e")
SITES = ("a", "b", "c", "d")


def plan(context: PublicContext, **changes: Any) -> RoundPlan:
    """Of four sites, k = t = 3."""
    fields: dict[str, Any] = {
        "roster_digest": PARTIES.roster.digest,
        "ckks": PARAMETERS,
        "key_digest": context.digest,
    }
    return round_plan(**(fields | changes))


def unchecked(kind: type, **fields: Any) -> Any:
    """A message as somebody may send it who does not use our constructors."""
    made = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def survivors_of(chosen: RoundPlan, cohort: tuple[str, ...], **changes: Any) -> SurvivorSet:
    fields = {
        "plan_digest": chosen.digest,
        "keys_digest": digest("keys"),
        "sharers": SITES,
        "survivors": cohort,
        "upload_digests": tuple(digest(site) for site in cohort),
    }
    made: SurvivorSet = unchecked(SurvivorSet, **(fields | changes))
    return made


def agreed(
    survivors: SurvivorSet, signers: Iterable[str], keys: Mapping[str, SigningKey] = PARTIES.sites, **changes: Any
) -> tuple[bytes, ...]:
    agreements = []
    for site in signers:
        fields = {"plan_digest": survivors.plan_digest, "survivors_digest": survivors.digest} | changes
        agreements.append(encode(signed(Agreement(site=site, **fields), keys[site])))
    return tuple(agreements)


def summed(context: PublicContext, chosen: RoundPlan, addends: int) -> list[Words]:
    total = CiphertextSum(PARAMETERS, chosen.dimension)
    for _ in range(addends):
        for number, words_2N in enumerate(encrypt(QuantizedUpdate(plan=chosen, grid=GRID), context)):
            total.add(number, words_2N)
    return [words_of(chunk, PARAMETERS) for chunk in total.chunks()]


def sealed(
    context: PublicContext,
    chosen: RoundPlan,
    cohort: tuple[str, ...] = SITES,
    *,
    addends: int | None = None,
    survivors: SurvivorSet | None = None,
    **changes: Any,
) -> SealedSum:
    """A sound sum of this cohort, or one with some change to it."""
    of_these = survivors_of(chosen, cohort) if survivors is None else survivors
    fields: dict[str, Any] = {
        "plan_digest": chosen.digest,
        "cohort": cohort,
        "survivors": encode(of_these),
        "agreements": agreed(of_these, [site for site in cohort if site in PARTIES.sites]),
    }
    if "chunks" not in changes:
        fields["chunks"] = iter(summed(context, chosen, len(cohort) if addends is None else addends))
    return SealedSum(**(fields | changes))


def a_key(**changes: Any) -> tuple[Decryptor, PublicContext, RoundPlan]:
    decryptor = Decryptor(PARTIES.roster)
    context = decryptor.new_round_key(PARAMETERS)
    return decryptor, context, plan(context, **changes)


@pytest.mark.parametrize("cohort", [SITES[:3], SITES, ("a", "c", "d")])
def test_a_sum_of_enough_sites_opens_exactly(cohort: tuple[str, ...]) -> None:
    decryptor, context, chosen = a_key()
    opened = decryptor.open_sum(chosen, sealed(context, chosen, cohort))
    assert (opened.total == len(cohort) * GRID).all()
    assert opened.cohort == cohort
    assert opened.plan == chosen


def test_the_signatures_of_as_many_as_the_plan_asks_for_are_enough() -> None:
    decryptor, context, chosen = a_key()
    survivors = survivors_of(chosen, SITES)
    opened = decryptor.open_sum(chosen, sealed(context, chosen, agreements=agreed(survivors, "abd")))
    assert opened.cohort == SITES


def refused(decryptor: Decryptor, chosen: RoundPlan, sealed_sum: SealedSum) -> str:
    with pytest.raises(OpeningRefused) as refusal:
        decryptor.open_sum(chosen, sealed_sum)
    assert refusal.value.__cause__ is None
    return str(refusal.value)


def text_of(decryptor: Decryptor, chosen: RoundPlan, sealed_sum: SealedSum) -> str:
    """Of the refusal, or whatever else happened."""
    try:
        return f"opened for {decryptor.open_sum(chosen, sealed_sum).cohort}"
    except OpeningRefused as refusal:
        return str(refusal)
    except Exception as error:
        return repr(error)


def unsound(context: PublicContext, chosen: RoundPlan) -> Iterator[tuple[str, SealedSum]]:
    """Every way in which a sum is not what so many sites agreed on, each by its name."""

    def of(cohort: tuple[str, ...] = SITES, **changes: Any) -> SealedSum:
        return sealed(context, chosen, cohort, **changes)

    survivors, other = survivors_of(chosen, SITES), survivors_of(chosen, SITES, keys_digest=digest("other keys"))
    strangers = Parties.named(*SITES)
    elsewhere = survivors_of(plan(context, nonce="01"), SITES)
    yield "another plan's sum", of(plan_digest="0" * 64)
    yield "another plan's survivors", of(survivors=elsewhere)
    agreements = agreed(elsewhere, SITES, plan_digest=chosen.digest)
    yield "another plan's survivors, signed for this one", of(survivors=elsewhere, agreements=agreements)
    yield "two sites", of(("a", "b"))
    yield "one site", of(("a",))
    yield "nobody", of((), addends=1)
    yield "one upload posed as a sum of three", of(SITES[:3], addends=1, survivors=survivors)
    yield "a site twice", of(("a", "b", "b"))
    yield "a site twice in a cohort of three", of(("a", "b", "b", "c"))
    yield "more than the plan's n", of(("a", "b", "c", "d", "e"))
    yield "a name that is none", of(("a", "b", "../c"))
    yield "another cohort than agreed", of(SITES[:3], survivors=survivors)
    yield "another order than agreed", of(cohort=("b", "a", "c", "d"), survivors=survivors)
    yield "a survivor that did not share", of(survivors=survivors_of(chosen, SITES, sharers=("a", "b", "c")))
    yield "a digest too few", of(survivors=survivors_of(chosen, SITES, upload_digests=(digest("a"),) * 3))
    for name, raw in {"no bytes": b"", "noise": bytes(200), "another message": encode(survivors)}.items():
        yield f"agreements: {name}", of(agreements=(*agreed(survivors, "abc"), raw))
    for name, raw in {"no bytes": b"", "noise": bytes(200), "another message": agreed(survivors, "a")[0]}.items():
        yield f"survivors: {name}", dataclasses.replace(of(), survivors=raw)
    yield "no signature", of(agreements=())
    yield "a signature too few", of(agreements=agreed(survivors, "ab"))
    yield "one site's signature thrice", of(agreements=agreed(survivors, "abbb"))
    yield "a signature for another set", of(agreements=agreed(survivors, "ab") + agreed(other, "c"))
    yield "all signatures for another set", of(agreements=agreed(other, "abcd"))
    yield (
        "all signatures for another round",
        of(agreements=agreed(survivors, "abcd", plan_digest=elsewhere.plan_digest)),
    )
    yield "strangers' signatures", of(agreements=agreed(survivors, "abcd", strangers.sites))
    yield "one stranger's signature", of(agreements=agreed(survivors, "abc") + agreed(survivors, "d", strangers.sites))
    yield (
        "a signature under another name",
        of(agreements=agreed(survivors, "ab") + agreed(survivors, "c", {"c": PARTIES.sites["a"]})),
    )
    yield (
        "a site outside the set signed",
        sealed(context, chosen, SITES[:3], agreements=agreed(survivors_of(chosen, SITES[:3]), "abd")),
    )
    yield (
        "a site outside the set signed too",
        sealed(context, chosen, SITES[:3], agreements=agreed(survivors_of(chosen, SITES[:3]), "abcd")),
    )
    yield (
        "a site outside the roster signed",
        of(agreements=agreed(survivors, "abc") + agreed(survivors, "x", {"x": SigningKey.generate("x")})),
    )
    (words_2N,) = summed(context, chosen, 4)
    modulus = PARAMETERS.modulus
    mask_N = MaskSum([(bytes(32), 1)], modulus).chunk(0, words_2N.shape[1])
    beyond, flipped = words_2N.copy(), words_2N.copy()
    beyond[0, 9], flipped[0, 9] = modulus, flipped[0, 9] ^ 1
    for name, chunks in {
        "no chunk": [],
        "a chunk too many": [words_2N, words_2N],
        "half a chunk": [words_2N[:, ::2]],
        "a word beyond the modulus": [beyond],
        "a changed bit": [flipped],
        "a transparent chunk": [np.stack([words_2N[0], np.zeros_like(words_2N[1])])],
        "a mask left on": [np.stack([add_mod(words_2N[0], mask_N, modulus), words_2N[1]])],
        "noise": [np.random.default_rng(0).integers(0, modulus, words_2N.shape, dtype=np.uint64)],
    }.items():
        yield f"chunks: {name}", of(chunks=iter(chunks))


def test_every_refusal_has_one_text_and_costs_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ckks_secret.generate(PARAMETERS)
    # One key for all, to save the time; the decryptor forgets it each time as it would any other.
    monkeypatch.setattr("fedcollm_privacy.decryptor.generate", lambda parameters: pair)
    decryptor, context, chosen = a_key()
    found = {}
    for name, bad in unsound(context, chosen):
        found[name] = {text_of(decryptor, chosen, bad), text_of(decryptor, chosen, sealed(context, chosen))}
        decryptor.new_round_key(PARAMETERS)
        assert decryptor.open_sum(chosen, sealed(context, chosen)).cohort == SITES
        decryptor.new_round_key(PARAMETERS)
    assert len(found) > 35
    assert {name: texts for name, texts in found.items() if texts != {str(OpeningRefused())}} == {}


def test_a_second_opening_is_refused() -> None:
    decryptor, context, chosen = a_key()
    decryptor.open_sum(chosen, sealed(context, chosen))
    refused(decryptor, chosen, sealed(context, chosen))


def test_nothing_opens_before_there_is_a_key_or_after_it_was_destroyed() -> None:
    decryptor, context, chosen = a_key()
    refused(Decryptor(PARTIES.roster), chosen, sealed(context, chosen))
    decryptor.destroy_key()
    refused(decryptor, chosen, sealed(context, chosen))


def test_a_plan_for_another_key_roster_or_encryption_is_refused() -> None:
    for changes in (
        {"key_digest": "0" * 64},
        {"roster_digest": "0" * 64},
        {"ckks": CkksParameters()},
        {"ckks": dataclasses.replace(PARAMETERS, lsb_bits=PARAMETERS.lsb_bits - 1)},
    ):
        decryptor, context, chosen = a_key()
        other = dataclasses.replace(chosen, **changes)
        # Agreed on by all, and of this very key but for the plan's own fields.
        (words_2N,) = summed(context, chosen, 4)
        refused(decryptor, other, sealed(context, other, chunks=iter([words_2N])))


def test_only_the_decryptors_own_roster_counts() -> None:
    theirs = Parties.named(*SITES)
    decryptor = Decryptor(theirs.roster)
    context = decryptor.new_round_key(PARAMETERS)
    refused(decryptor, plan(context), sealed(context, plan(context)))
    context = decryptor.new_round_key(PARAMETERS)
    chosen = plan(context, roster_digest=theirs.roster.digest)
    refused(decryptor, chosen, sealed(context, chosen))
    context = decryptor.new_round_key(PARAMETERS)
    chosen = plan(context, roster_digest=theirs.roster.digest)
    agreements = agreed(survivors_of(chosen, SITES), SITES, theirs.sites)
    assert decryptor.open_sum(chosen, sealed(context, chosen, agreements=agreements)).cohort == SITES


def test_last_rounds_sum_is_refused_under_this_rounds_key() -> None:
    decryptor, context, chosen = a_key()
    last = summed(context, chosen, 4)
    now = plan(decryptor.new_round_key(PARAMETERS))
    refused(decryptor, now, sealed(context, now, chunks=iter(last)))
    decryptor.new_round_key(PARAMETERS)
    refused(decryptor, chosen, sealed(context, chosen))


def test_fewer_than_the_plans_minimum_or_threshold_are_refused() -> None:
    for changes in ({"min_contributors": 4}, {"threshold": 4}):
        decryptor, context, chosen = a_key(**changes)
        refused(decryptor, chosen, sealed(context, chosen, SITES[:3]))
        decryptor, context, chosen = a_key(**changes)
        agreements = agreed(survivors_of(chosen, SITES), SITES[:3])
        refused(decryptor, chosen, sealed(context, chosen, agreements=agreements))
        decryptor, context, chosen = a_key(**changes)
        assert decryptor.open_sum(chosen, sealed(context, chosen)).cohort == SITES


def test_two_sites_are_refused_whatever_the_plan_says() -> None:
    decryptor, context, chosen = a_key()
    fields = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
    lax: RoundPlan = unchecked(RoundPlan, **(fields | {"min_contributors": 2, "threshold": 2}))
    refused(decryptor, lax, sealed(context, lax, ("a", "b")))


def test_a_sum_beyond_what_its_cohort_can_hold_is_refused() -> None:
    decryptor, context, chosen = a_key()
    refused(decryptor, chosen, sealed(context, chosen, SITES[:3], addends=4))


def test_a_plan_that_could_overflow_is_refused() -> None:
    decryptor, context, chosen = a_key()
    wider = dataclasses.replace(chosen, value_bits=18)
    chunks = iter(summed(context, chosen, 4))
    refused(decryptor, wider, sealed(context, wider, chunks=chunks))


def test_what_is_not_agreed_on_is_not_even_decrypted() -> None:
    decryptor, context, chosen = a_key()

    def untouched() -> Iterator[Words]:
        pytest.fail("a chunk was asked for")
        yield

    refused(decryptor, chosen, sealed(context, chosen, agreements=(), chunks=untouched()))


def test_a_key_is_fresh_each_round_and_gone_after_the_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Any]] = []

    class Watched(ckks_secret.SecretKey):
        __slots__ = ("__weakref__",)

        def __init__(self, seal_key: Any, parameters: CkksParameters) -> None:
            super().__init__(seal_key, parameters)
            kept.append(weakref.ref(self))

    monkeypatch.setattr(ckks_secret, "SecretKey", Watched)
    decryptor = Decryptor(PARTIES.roster)
    first = decryptor.new_round_key(PARAMETERS)
    second = decryptor.new_round_key(PARAMETERS)
    gc.collect()
    assert first.digest != second.digest
    assert kept[0]() is None
    assert kept[1]() is not None
    chosen = plan(second)
    decryptor.open_sum(chosen, sealed(second, chosen, SITES[:3]))
    gc.collect()
    assert kept[1]() is None


def test_a_refusal_is_a_protocol_error() -> None:
    assert issubclass(OpeningRefused, ProtocolError)
