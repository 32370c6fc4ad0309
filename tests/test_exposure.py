"""Rank and exposure against brute force, one candidate at a time, and against models whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedcollm_privacy.errors import InvalidValue
from secure_fedcollm.exposure import exposure
from secure_fedcollm.records import PlantedSecret

LETTERS = {c: i for i, c in enumerate(["<s>", "?", *"abcdefghijklmnopqrstuvwxyz0123456789: "])}


@pytest.fixture(scope="module")
def tokenizer():
    letters = Tokenizer(models.WordLevel(LETTERS, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="<s>", pad_token="<s>", unk_token="?"
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that ranks spread
    return model


def planted(prompt, secret, candidates):
    return PlantedSecret(site="a", prompt=prompt, secret=secret, candidates=tuple(candidates), repetitions=3)


CODES = [f" {i:03d}" for i in range(0, 1000, 7)]


def brute_force_scores(model, tokenizer, prompt, candidates):
    """One at a time, no batch, no padding, in double precision; text after the prompt only."""
    double = LlamaForCausalLM(model.config).double()
    double.load_state_dict(model.state_dict())
    scores = []
    for candidate in candidates:
        prompt_ids, ids = (tokenizer(text)["input_ids"] for text in (prompt, prompt + candidate))
        with torch.no_grad():
            log_p = double(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        scores.append(sum(float(log_p[i - 1, ids[i]]) for i in range(len(prompt_ids), len(ids))))
    return scores


@pytest.mark.parametrize("secret", [CODES[0], CODES[71], CODES[-1]])
def test_rank_equals_brute_force_ranking(model, tokenizer, secret):
    prompts = ["door code:", "alarm code of the archive:"]  # of different lengths, in one call
    results = exposure(model, tokenizer, [planted(p, secret, CODES) for p in prompts], max_length=64)
    assert [r.prompt for r in results] == prompts
    for result in results:
        scores = brute_force_scores(model, tokenizer, result.prompt, CODES)
        own = scores[CODES.index(secret)]
        assert min(abs(own - s) for s in scores if s != own) > 1e-4 * 1e-2  # no near-tie that float32 could turn
        assert result.rank == 1 + sum(score > own for score in scores)
        assert result.exposure == pytest.approx(math.log2(len(CODES) / result.rank))
        assert (result.candidates, result.repetitions, result.secret) == (len(CODES), 3, secret)


def test_ranks_of_all_candidates_are_a_permutation(model, tokenizer):
    codes = CODES[:20]
    results = exposure(model, tokenizer, [planted("code:", code, codes) for code in codes], max_length=32)
    assert sorted(r.rank for r in results) == list(range(1, 21))


def test_exposure_of_a_memorised_secret_is_all_bits_and_of_an_avoided_one_is_zero(model, tokenizer):
    learner = LlamaForCausalLM(model.config)
    ids = torch.tensor([tokenizer("door code: 777")["input_ids"]])
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    codes = [f" {i:03d}" for i in range(770, 780)]
    for _ in range(60):
        optimizer.zero_grad()
        learner(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    (known,) = exposure(learner, tokenizer, [planted("door code:", " 777", codes)], max_length=32)
    assert (known.rank, known.exposure) == (1, pytest.approx(math.log2(10)))
    with torch.no_grad():
        learner.lm_head.weight.neg_()  # the likeliest becomes the least likely
    (avoided,) = exposure(learner, tokenizer, [planted("door code:", " 777", codes)], max_length=32)
    assert avoided.exposure < known.exposure


def test_a_tie_counts_as_leakage(tokenizer, model):
    flat = LlamaForCausalLM(model.config)
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    (result,) = exposure(flat, tokenizer, [planted("code:", " 003", [" 001", " 002", " 003", " 004"])], max_length=16)
    assert (result.rank, result.exposure) == (1, 2.0)


def test_training_mode_is_kept_and_no_secrets_give_no_result(model, tokenizer):
    model.train()
    assert exposure(model, tokenizer, [], max_length=16) == ()
    exposure(model, tokenizer, [planted("code:", " 1", [" 1", " 2"])], max_length=16)
    assert model.training
    model.eval()


@pytest.mark.parametrize("candidates", [[], [" 1", " 2"], [" 3", " 3", " 2"]])
def test_a_secret_outside_its_candidates_or_repeated_candidates_are_refused_without_naming_it(
    model, tokenizer, candidates
):
    with pytest.raises(InvalidValue) as error:
        exposure(model, tokenizer, [planted("code:", " 3", candidates)], max_length=16)
    assert " 3" not in str(error.value).split("allowed")[0].replace(f"{len(candidates)} texts", "")
