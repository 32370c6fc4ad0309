"""What each site has of a run: its own records, the model it ends up with, and nothing of private records."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from secure_fedcollm.data import FederationData, SiteData
from secure_fedcollm.evaluation import evaluate
from secure_fedcollm.fairness import per_site
from secure_fedcollm.models import AdaptedModel, load
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.records import Record
from secure_fedcollm.rounds import State

WORDS = ("the patient was seen", "no fever today", "blood pressure is normal", "returns in a week", "rest and fluids")


@pytest.fixture(scope="module")
def slm(tiny_checkpoint: Callable[..., Path]) -> AdaptedModel:
    return load(
        str(tiny_checkpoint("llama")), dtype="float32", device="cpu", r=2, lora_alpha=4, lora_dropout=0.0,
        target_modules=None, seed=0,
    )  # fmt: skip


def records(site: str, count: int) -> tuple[Record, ...]:
    return tuple(
        Record(prompt=f"note {i}", target=f" {WORDS[i % 5]}", site=site, unit=f"{site}{i}") for i in range(count)
    )


def parts(slm: AdaptedModel, sites: tuple[SiteData, ...], start: State, **changed: Any) -> Any:
    said = {"declared": "public", "max_records": 100, "site_model": "slm", **changed}
    config = SimpleNamespace(
        data=SimpleNamespace(declared=said["declared"], max_length=32),
        evaluation=SimpleNamespace(max_records=said["max_records"]),
        federation=SimpleNamespace(site_model=said["site_model"], batch_tokens=512),
        seed=0,
    )
    data = FederationData(sites=sites, public_train=(), public_test=(), append_eos=True)
    return SimpleNamespace(config=config, data=data, slm=slm, llm=slm, start=start)


def site_data(name: str, held_out: tuple[Record, ...]) -> SiteData:
    return SiteData(name=name, train=(), held_out=held_out)


def direct(slm: AdaptedModel, adapter: Any, chosen: tuple[Record, ...]) -> dict[str, float]:
    slm.write(adapter)
    return evaluate(slm.model, slm.tokenizer, chosen, max_length=32, append_eos=True, batch_tokens=64)


def moved(slm: AdaptedModel, start: Any, seed: int) -> Any:
    noise = np.random.default_rng(seed).normal(0, 0.3, start.shape)
    return (start + noise).astype(np.float32)


def test_the_shared_model_is_measured_on_each_sites_own_records(slm: AdaptedModel) -> None:
    first = slm.read()
    after = moved(slm, first, 1)
    sites = (site_data("a", records("a", 6)), site_data("b", records("b", 9)), site_data("c", ()))
    start = State(slm=first, llm=first)
    found = per_site(parts(slm, sites, start), State(slm=after, llm=first), RunProgress(quiet=True))
    assert list(found) == ["a", "b"]  # c holds nothing out
    for data in sites[:2]:
        for when, adapter in (("before", first), ("after", after)):
            assert found[data.name][when] == pytest.approx(direct(slm, adapter, data.held_out), rel=1e-4)
    assert not math.isclose(found["a"]["before"]["loss"], found["a"]["after"]["loss"], rel_tol=1e-3)


def test_a_site_with_a_model_of_its_own_is_measured_with_that(slm: AdaptedModel) -> None:
    first = slm.read()
    own = {"a": first, "b": moved(slm, first, 2)}
    sites = tuple(site_data(name, records(name, 5)) for name in "ab")
    start = State(slm=first, llm=first, alone=dict.fromkeys("ab", first))
    found = per_site(parts(slm, sites, start), State(slm=first, llm=first, alone=own), RunProgress(quiet=True))
    assert found["a"]["before"] == found["a"]["after"]
    assert found["b"]["after"] == pytest.approx(direct(slm, own["b"], sites[1].held_out), rel=1e-4)
    assert found["b"]["after"]["loss"] != found["b"]["before"]["loss"]


def test_pooled_records_are_told_apart_by_their_site(slm: AdaptedModel) -> None:
    first = slm.read()
    pooled = moved(slm, first, 3)
    held_out = records("a", 4) + records("b", 7)
    start = State(slm=first, llm=first, alone={"pooled": first})
    made = parts(slm, (site_data("pooled", held_out),), start)
    found = per_site(made, State(slm=first, llm=first, alone={"pooled": pooled}), RunProgress(quiet=True))
    assert found["b"]["after"] == pytest.approx(direct(slm, pooled, held_out[4:]), rel=1e-4)
    assert list(found) == ["a", "b"]


def test_no_private_record_is_measured_and_never_more_than_was_asked_for(
    slm: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def count(model: Any, tokenizer: Any, chosen: list[Record], **rest: Any) -> dict[str, float]:
        seen.append(len(chosen))
        return {"loss": 1.0}

    monkeypatch.setattr("secure_fedcollm.fairness.evaluate", count)
    first = slm.read()
    state = State(slm=first, llm=first)
    sites = tuple(site_data(name, records(name, 5)) for name in "abc")
    assert per_site(parts(slm, sites, state, declared="private"), state, RunProgress(quiet=True)) == {}
    assert seen == []
    per_site(parts(slm, sites, state, max_records=7), state, RunProgress(quiet=True))
    assert seen == [2] * 6
    seen.clear()
    per_site(parts(slm, sites, state, max_records=1), state, RunProgress(quiet=True))
    assert seen == [1] * 6
