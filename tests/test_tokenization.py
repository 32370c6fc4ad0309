"""Tokens and batches, against lm-evaluation-harness's own output and against unpadded forwards."""

import dataclasses
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fedcollm_privacy.errors import InvalidValue, ModelError
from secure_fedcollm.records import Record
from secure_fedcollm.tokenization import Example, collate, encode_pair, physical_batches, tokenize

VECTORS = json.loads((Path(__file__).parent / "vectors" / "lm_eval_encode_pair.json").read_text(encoding="utf-8"))
SMALL = list(VECTORS["tokenizers"])
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=30)
WORDS = st.lists(st.sampled_from(["sun", "the ", " star", "a", "\n", "é", "10", "."]), max_size=40).map("".join)
PROPERTY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@cache
def small(name):
    entry = VECTORS["tokenizers"][name]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(entry["json"])), **entry["special"])


@cache
def stories(path):
    return AutoTokenizer.from_pretrained(path)


def has_tokens(tokenizer, text):
    """Whether anything is left of a text: these small vocabularies drop characters that they do not know."""
    return bool(text.strip() and tokenizer.encode(text.strip(), add_special_tokens=False))


def reference_split(tokenizer, prompt, target):
    """lm-evaluation-harness's rule written out again, for non-empty prompts; None where it would lose text."""
    spaces = len(prompt) - len(prompt.rstrip())
    if spaces:
        target, prompt = prompt[-spaces:] + target, prompt[:-spaces]
    context, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + target)
    return (context, whole[len(context) :]) if context and whole[: len(context)] == context else None


@pytest.mark.parametrize("name", [*SMALL, "stories260K"])
def test_tokens_are_those_of_lm_evaluation_harness(name, shared_model):
    tokenizer = small(name) if name in SMALL else stories(shared_model(name))
    cases = [case for case in VECTORS["cases"] if case["tokenizer"] == name]
    # Where a merge crosses the border the rule loses text: the test below.
    sound = [c for c in cases if not c["prompt"] or reference_split(tokenizer, c["prompt"], c["target"])]
    assert len(sound) >= (5 if name == "merging" else 13)
    for case in sound:
        made = encode_pair(tokenizer, case["prompt"], case["target"], max_length=512, append_eos=False)
        assert list(made.input_ids[: made.target_start]) == case["context_ids"], case
        assert list(made.input_ids[made.target_start :]) == case["target_ids"], case


@PROPERTY
@given(name=st.sampled_from(SMALL), prompt=TEXT | WORDS, target=TEXT | WORDS)
def test_any_pair_follows_the_rule_and_has_a_target(name, prompt, target):
    tokenizer = small(name)
    assume(has_tokens(tokenizer, target))
    made = encode_pair(tokenizer, prompt, target, max_length=4096, append_eos=False)
    assert 1 <= made.target_start < len(made.input_ids)
    if prompt.rstrip():
        expected = reference_split(tokenizer, prompt, target)
        if expected is not None:
            assert list(made.input_ids[: made.target_start]) == expected[0]
            assert list(made.input_ids[made.target_start :]) == expected[1]


@PROPERTY
@given(prompt=TEXT | WORDS, target=TEXT | WORDS)
def test_joined_tokens_decode_to_the_joined_text(prompt, target):
    tokenizer = small("gpt2-like")  # byte level: every text has tokens and decodes to itself
    assume(target)
    made = encode_pair(tokenizer, prompt, target, max_length=4096, append_eos=True)
    assert made.input_ids[-1] == tokenizer.eos_token_id
    ids = made.input_ids[made.input_ids[0] == tokenizer.eos_token_id : -1]  # without what stands for no prompt
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == prompt + target


def test_a_merge_across_the_border_loses_no_text():
    tokenizer = small("merging")
    for prompt, target in (("People ask quest", "ions and get"), ("sugar;", " water"), ("The s", "un")):
        assert reference_split(tokenizer, prompt, target) is None
        made = encode_pair(tokenizer, prompt, target, max_length=64, append_eos=False)
        context, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + target)
        assert list(made.input_ids) in (whole, [tokenizer.eos_token_id, *whole])
        start = made.target_start - (len(made.input_ids) - len(whole))
        assert whole[:start] == context[:start]
        assert whole[start] != context[start]


@PROPERTY
@given(name=st.sampled_from(SMALL), prompt=WORDS, target=WORDS, choices=st.lists(WORDS, max_size=3))
def test_target_tokens_are_the_same_in_training_and_in_scoring(name, prompt, target, choices):
    tokenizer = small(name)
    options = [text for text in (target, *choices) if has_tokens(tokenizer, text)]
    assume(has_tokens(tokenizer, target))
    record = Record(prompt=prompt, target=target, site=None, unit="u", choices=tuple(options), answer=0)
    trained = tokenize([record], tokenizer, max_length=4096, append_eos=False).examples[0]
    scored = [encode_pair(tokenizer, prompt, text, max_length=4096, append_eos=False) for text in options]
    assert dataclasses.replace(scored[0], unit="u") == trained
    free = encode_pair(tokenizer, prompt, target, max_length=4096, append_eos=True)
    assert free.input_ids == (*trained.input_ids, tokenizer.eos_token_id)
    assert free.target_start == trained.target_start


@PROPERTY
@given(name=st.sampled_from(SMALL), prompt=WORDS, target=WORDS, max_length=st.integers(4, 60), eos=st.booleans())
def test_truncation_keeps_the_prompts_end_and_the_targets_beginning(name, prompt, target, max_length, eos):
    tokenizer = small(name)
    assume(has_tokens(tokenizer, target))
    whole = encode_pair(tokenizer, prompt, target, max_length=4096, append_eos=eos)
    cut = encode_pair(tokenizer, prompt, target, max_length=max_length, append_eos=eos)
    context, answer = whole.input_ids[: whole.target_start], whole.input_ids[whole.target_start :]
    kept_context, kept_answer = cut.input_ids[: cut.target_start], cut.input_ids[cut.target_start :]
    assert len(cut.input_ids) == min(max_length, len(whole.input_ids))
    assert kept_context
    assert kept_answer == answer[: len(kept_answer)]
    bos = tokenizer.bos_token_id
    if bos is not None and context[0] == bos:
        assert kept_context[0] == bos
        context, kept_context = context[1:], kept_context[1:]
    assert kept_context == context[len(context) - len(kept_context) :]
    if len(kept_answer) < len(answer):  # the target is cut only when the prompt is down to its quarter
        assert cut.target_start <= max_length // 4
        assert cut.target_start == min(whole.target_start, max_length // 4)


def test_a_long_target_keeps_question_and_answer_and_gets_no_eos():
    tokenizer = small("gpt2-like")
    made = encode_pair(tokenizer, "Question: why?\nAnswer:", " because" * 90, max_length=64, append_eos=True)
    assert len(made.input_ids) == 64
    assert tokenizer.decode(made.input_ids[: made.target_start]).endswith("Answer:")
    assert made.input_ids[-1] != tokenizer.eos_token_id


def test_an_eos_that_the_tokenizer_appends_hides_no_target_token():
    from tokenizers.processors import TemplateProcessing

    entry = VECTORS["tokenizers"]["llama-like"]
    backend = Tokenizer.from_str(json.dumps(entry["json"]))
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    ending = PreTrainedTokenizerFast(tokenizer_object=backend, **entry["special"])
    assert ending.encode("sun")[-1] == ending.eos_token_id
    for append in (True, False):
        made = encode_pair(ending, "The sun is a", " star", max_length=64, append_eos=append)
        assert made == encode_pair(small("llama-like"), "The sun is a", " star", max_length=64, append_eos=append)


def test_missing_special_tokens_are_named():
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(VECTORS["tokenizers"]["gpt2-like"]["json"]))
    )
    with pytest.raises(ModelError, match="EOS"):
        encode_pair(bare, "a", " b", max_length=8, append_eos=True)
    with pytest.raises(ModelError, match="BOS"):
        encode_pair(bare, "", "b", max_length=8, append_eos=False)
    assert encode_pair(bare, "a", " b", max_length=8, append_eos=False).target_start == 1
    with pytest.raises(InvalidValue, match="max_length"):
        encode_pair(bare, "a", " b", max_length=3, append_eos=False)
    with pytest.raises(InvalidValue, match="target"):
        encode_pair(bare, "a", "", max_length=8, append_eos=False)


def test_padding_id_falls_back_to_eos():
    record = Record(prompt="a", target=" b", site=None, unit="u")
    tokenizer = small("gpt2-like")
    assert tokenizer.pad_token_id is None
    dataset = tokenize([record], tokenizer, max_length=8, append_eos=True)
    assert (dataset.pad_token_id, dataset.examples[0].unit) == (tokenizer.eos_token_id, "u")


def examples(max_size=6):
    ids = st.lists(st.integers(0, 99), min_size=2, max_size=9)
    one = ids.flatmap(lambda row: st.tuples(st.just(row), st.integers(1, len(row) - 1)))
    return st.lists(one, min_size=1, max_size=max_size).map(
        lambda rows: [Example(input_ids=tuple(row), target_start=start, unit="") for row, start in rows]
    )


@given(examples(), st.integers(0, 99))
def test_collate_marks_exactly_the_real_tokens_and_the_target(batch, pad):
    made = collate(batch, pad)
    width = max(len(example.input_ids) for example in batch)
    assert made.input_ids_BT.shape == made.labels_BT.shape == made.attention_mask_BT.shape == (len(batch), width)
    for row, example in enumerate(batch):
        for position in range(width):
            real = position < len(example.input_ids)
            learnt = real and position >= example.target_start
            token = example.input_ids[position] if real else pad
            assert made.input_ids_BT[row, position] == token
            assert made.attention_mask_BT[row, position] == real
            assert made.labels_BT[row, position] == (token if learnt else -100)
    assert made.labels_BT.dtype == made.input_ids_BT.dtype == torch.int64


def test_collate_and_example_refuse_what_cannot_be_learnt():
    with pytest.raises(InvalidValue):
        collate([], 0)
    for start in (0, 2, -1):
        with pytest.raises(InvalidValue):
            Example(input_ids=(1, 2), target_start=start, unit="")


def test_padding_changes_no_logit_of_a_real_checkpoint(shared_model):
    path = shared_model("stories-sheared-3L")
    tokenizer, model = stories(path), AutoModelForCausalLM.from_pretrained(path).eval()
    assert tokenizer.padding_side == "left"  # the trap: left padding would shift the positions
    prompts = ["Question: why?\nAnswer:", "Once upon a time", ""]
    records = [
        Record(prompt=p, target=" there was a dog." * (i + 1), site=None, unit="") for i, p in enumerate(prompts)
    ]
    dataset = tokenize(records, tokenizer, max_length=96, append_eos=True)
    batch = collate(dataset.examples, dataset.pad_token_id)
    with torch.no_grad():
        logits_BTV = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        for row, example in enumerate(dataset.examples):
            alone_TV = model(input_ids=torch.tensor([example.input_ids])).logits[0]
            torch.testing.assert_close(logits_BTV[row, : len(alone_TV)], alone_TV, atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 90))
def test_physical_batches_are_a_permutation_within_the_token_budget(lengths, budget):
    batches = physical_batches(lengths, budget)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths)
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    # No two neighbours could have been one batch.
    for one, two in pairwise(batches):
        assert (len(one) + 1) * lengths[two[0]] > budget
