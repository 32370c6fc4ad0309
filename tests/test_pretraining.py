"""The embedded pair: learns, is cached whole or not at all, shares one tokenizer, can be reproduced."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedcollm_privacy.errors import ModelError
from secure_fedcollm import pretraining
from secure_fedcollm.embedded_text import article
from secure_fedcollm.pretraining import EMBEDDED_PAIR, ModelRecipe, PairRecipe, embedded_pair

TINY = PairRecipe(
    texts=600,
    vocab_size=400,
    row_length=64,
    context=128,
    slm=ModelRecipe(hidden_size=16, intermediate_size=32, layers=1, heads=2, steps=6, rows=4, learning_rate=8e-3),
    llm=ModelRecipe(hidden_size=48, intermediate_size=96, layers=2, heads=2, steps=60, rows=8, learning_rate=8e-3),
)


def ignore(name, step, steps):
    pass


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def built(cache):
    calls = []
    return embedded_pair(cache, 7, lambda *call: calls.append(call), TINY), calls


def held_out_loss(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rng = np.random.Generator(np.random.PCG64(999))
    losses = []
    for _ in range(30):
        ids = torch.tensor([tokenizer(article(rng))["input_ids"][:60]])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    return np.mean(losses)


def test_both_learn_and_the_larger_one_is_better(built):
    (slm, llm), calls = built
    assert held_out_loss(llm) < held_out_loss(slm) - 0.3
    assert held_out_loss(slm) < math.log(400) - 0.1  # better than a uniform guess
    assert calls == [("slm", i, 6) for i in range(1, 7)] + [("llm", i, 60) for i in range(1, 61)]


def test_a_second_call_trains_nothing_and_gives_the_same_folders(cache, built, monkeypatch):
    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(pretraining, "_build", refuse)
    assert embedded_pair(cache, 7, refuse, TINY) == built[0]


def test_both_share_one_tokenizer_with_bos_eos_and_pad(built):
    small, large = (AutoTokenizer.from_pretrained(folder) for folder in built[0])
    assert small.get_vocab() == large.get_vocab()
    assert len(small) == 400
    assert None not in (small.bos_token_id, small.eos_token_id, small.pad_token_id)
    assert small.pad_token_id != small.eos_token_id
    for folder in built[0]:
        config = json.loads((folder / "config.json").read_text())
        assert config["vocab_size"] == 400
        assert (config["eos_token_id"], config["pad_token_id"]) == (small.eos_token_id, small.pad_token_id)


def test_any_text_survives_the_tokenizer_and_every_code_of_four_digits_has_as_many_tokens(built):
    tokenizer = AutoTokenizer.from_pretrained(built[0][0])
    for text in ("Straße 東京 🏥\n\ttabs", " 0417", "Ward: cardiology. O/E x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert len({len(tokenizer(f" {code:04d}")["input_ids"]) for code in range(0, 10_000, 37)}) == 1


def test_the_same_seed_gives_the_same_weights_and_the_callers_random_state_stays(tmp_path, built):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = embedded_pair(tmp_path, 7, ignore, TINY)
    assert torch.equal(torch.rand(3), expected)
    for one, two in zip(built[0], again, strict=True):
        first, second = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (one, two))
        assert all(torch.allclose(first[k], second[k], atol=1e-4) for k in first)


def test_other_settings_or_another_seed_get_a_cache_of_their_own(cache, built, monkeypatch):
    names = set()
    monkeypatch.setattr(pretraining, "_build", lambda building, *_: (building / "slm").mkdir())
    for seed, recipe in ((7, dataclasses.replace(TINY, texts=601)), (8, TINY), (7, EMBEDDED_PAIR)):
        names.add(embedded_pair(cache, seed, ignore, recipe)[0].parent.name)
    assert len(names | {built[0][0].parent.name}) == 4


@pytest.mark.parametrize("damage", ["no marker", "empty weights", "file missing", "broken marker"])
def test_a_half_written_cache_is_built_anew(tmp_path, monkeypatch, damage):
    def build(building, *_):
        for name in ("slm", "llm"):
            (building / name).mkdir()
            (building / name / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(pretraining, "_build", build)
    slm, llm = embedded_pair(tmp_path, 0, ignore, TINY)
    marker = slm.parent / pretraining.MARKER
    if damage == "no marker":
        marker.unlink()
    elif damage == "broken marker":
        marker.write_text('{"slm/mod')
    elif damage == "file missing":
        (llm / "model.safetensors").unlink()
    else:
        (slm / "model.safetensors").write_bytes(b"")
    assert embedded_pair(tmp_path, 0, ignore, TINY) == (slm, llm)
    assert {(f / "model.safetensors").read_bytes() for f in (slm, llm)} == {b"weights"}
    assert marker.exists()
    assert not list(tmp_path.glob(".building-*"))


def test_a_run_that_dies_leaves_nothing_and_a_killed_ones_leftover_goes(tmp_path):
    stale, fresh = tmp_path / ".building-old", tmp_path / ".building-other-run"
    stale.mkdir()
    fresh.mkdir()
    os.utime(stale, (time.time() - 7200,) * 2)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded_pair(tmp_path, 0, interrupt, TINY)
    assert list(tmp_path.iterdir()) == [fresh]


def test_a_diverged_training_is_an_error_and_caches_nothing(tmp_path):
    wild = dataclasses.replace(TINY, slm=dataclasses.replace(TINY.slm, learning_rate=math.inf))
    with pytest.raises(ModelError, match="slm diverged"):
        embedded_pair(tmp_path, 0, ignore, wild)
    assert not list(tmp_path.iterdir())


def test_recipe_of_the_real_pair_has_the_sizes_that_are_promised():
    slm, llm = (
        pretraining.LlamaForCausalLM(pretraining._model_config(_FakeTokenizer(), EMBEDDED_PAIR, r)).num_parameters()
        for r in (EMBEDDED_PAIR.slm, EMBEDDED_PAIR.llm)
    )
    assert 150_000 <= slm <= 250_000
    assert 1_000_000 <= llm <= 1_500_000


class _FakeTokenizer:
    bos_token_id = eos_token_id = 0
    pad_token_id = 1

    def __len__(self):
        return EMBEDDED_PAIR.vocab_size
