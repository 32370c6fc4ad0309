"""Metrics equal an unbatched recomputation, lm-evaluation-harness, and hand-made answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from fedcollm_privacy.errors import InvalidValue, ModelError
from secure_fedcollm import evaluation
from secure_fedcollm.evaluation import Sample, evaluate, generate_samples, log_likelihoods, rouge_l
from secure_fedcollm.records import Record
from secure_fedcollm.tokenization import encode_pair

V = 258  # 256 bytes, <s>, </s>
SIZES = {"vocab_size": V, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
LLAMA_LIKE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Weights ten times the usual size, so that a wrong position or a leaking pad changes the result.
WIDE = {"initializer_range": 0.3, **SIZES}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=96, **WIDE),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=96, init_std=0.3, **SIZES,
    ),
    "gpt_neox": GPTNeoXConfig(max_position_embeddings=96, **LLAMA_LIKE, **WIDE),
    "qwen2": Qwen2Config(max_position_embeddings=96, num_key_value_heads=2, **LLAMA_LIKE, **WIDE),
    "llama": LlamaConfig(max_position_embeddings=96, num_key_value_heads=2, **LLAMA_LIKE, **WIDE),
}  # fmt: skip
RECORDS = tuple(
    Record(prompt=prompt, target=target, site=None, unit=str(i))
    for i, (prompt, target) in enumerate([
        ("What helps?", " Rest."),
        ("", "Fever and a cough since Monday, worse at night."),
        ("A longer question about the heart, its valves and its rhythm?", " No."),
        ("Q: é ü 漢\nA:", " ß"),
        ("x" * 150, " the prompt was cut"),
        ("Short", " " + "long answer " * 5),
    ])
)  # fmt: skip
LIMITS: dict[str, Any] = {"max_length": 64, "append_eos": True}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, so that counts can be done by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", padding_side="left")


TOKENIZER = byte_tokenizer()


def tiny(name: str) -> Any:
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny("gpt2")


class Uniform(nn.Module):
    """Every token is equally likely."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert attention_mask.shape == input_ids.shape
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, V) + self.weight})


def unbatched(model: Any, tokenizer: Any, record: Record, **limits: Any) -> tuple[float, int, int]:
    """Log-likelihood, correct and number of target tokens; one text, no padding, no mask, float64."""
    example = encode_pair(tokenizer, record.prompt, record.target, **limits)
    with torch.no_grad():
        logits_TV = model(torch.tensor([example.input_ids])).logits[0].double()
    total, correct = 0.0, 0
    for t in range(example.target_start, len(example.input_ids)):
        log_p_V = torch.log_softmax(logits_TV[t - 1], dim=-1)
        total += float(log_p_V[example.input_ids[t]])
        correct += int(log_p_V.argmax()) == example.input_ids[t]
    return total, correct, len(example.input_ids) - example.target_start


def expected(model: Any, tokenizer: Any, records: Any, **limits: Any) -> dict[str, float]:
    rows = [unbatched(model, tokenizer, record, **limits) for record in records]
    tokens = sum(row[2] for row in rows)
    loss = -sum(row[0] for row in rows) / tokens
    return {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": sum(row[1] for row in rows) / tokens}


@pytest.mark.parametrize("name", CONFIGS)
def test_batched_equals_unbatched(name: str) -> None:
    model = tiny(name)
    want = expected(model, TOKENIZER, RECORDS, **LIMITS)
    for batch_tokens in (1, 130, 10_000):
        got = evaluate(model, TOKENIZER, RECORDS, **LIMITS, batch_tokens=batch_tokens)
        assert got == pytest.approx(want, rel=1e-5)


def test_batched_equals_unbatched_on_a_real_checkpoint(shared_model: Callable[[str], Path]) -> None:
    path = shared_model("stories260K")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    texts = [
        "Once upon a time",
        ", there was a little girl named Lily.",
        " She saw a big red ball in the park",
        " and ran.",
    ]
    records = [Record(prompt=a, target=b, site=None, unit="") for a, b in pairwise(texts)] + [*RECORDS[:3]]
    want = expected(model, tokenizer, records, max_length=96, append_eos=True)
    got = evaluate(model, tokenizer, records, max_length=96, append_eos=True, batch_tokens=256)
    assert got == pytest.approx(want, rel=1e-5)
    assert got["token_accuracy"] > 0.2


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab é\n", max_size=40), st.text("xyz", min_size=1, max_size=40)), min_size=1, max_size=9
    ),
    st.integers(1, 400),
)
def test_log_likelihoods_do_not_depend_on_neighbours_or_batch_size(
    gpt2: Any, pairs: list[tuple[str, str]], batch_tokens: int
) -> None:
    got = log_likelihoods(gpt2, TOKENIZER, pairs, max_length=64, batch_tokens=batch_tokens)
    records = [Record(prompt=a, target=b, site=None, unit="") for a, b in pairs]
    want = [unbatched(gpt2, TOKENIZER, record, max_length=64, append_eos=False)[0] for record in records]
    assert got == pytest.approx(want, rel=1e-5)


def test_loss_of_one_record_equals_the_model_s_own(gpt2: Any) -> None:
    record = RECORDS[2]
    example = encode_pair(TOKENIZER, record.prompt, record.target, **LIMITS)
    labels = torch.tensor([[-100] * example.target_start + list(example.input_ids[example.target_start :])])
    with torch.no_grad():
        want = float(gpt2(input_ids=torch.tensor([example.input_ids]), labels=labels).loss)
    assert evaluate(gpt2, TOKENIZER, [record], **LIMITS, batch_tokens=64)["loss"] == pytest.approx(want, rel=1e-5)


def test_inputs_are_padded_on_the_right_and_masked(gpt2: Any) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(Uniform):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            seen.append((input_ids, attention_mask))
            return super().forward(input_ids, attention_mask)

    evaluate(Spy(), TOKENIZER, RECORDS, **LIMITS, batch_tokens=10_000)
    ((input_ids_BT, mask_BT),) = seen
    rows = sorted(tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids_BT, mask_BT, strict=True))
    assert rows == sorted(encode_pair(TOKENIZER, r.prompt, r.target, **LIMITS).input_ids for r in RECORDS)
    assert bool((mask_BT.diff(dim=1) <= 0).all())


def test_uniform_model_has_the_vocabulary_s_size_as_perplexity() -> None:
    got = evaluate(Uniform(), TOKENIZER, RECORDS, **LIMITS, batch_tokens=200)
    assert got["perplexity"] == pytest.approx(V, rel=1e-5)


def test_long_records_weigh_by_their_tokens(gpt2: Any) -> None:
    pair = [RECORDS[0], RECORDS[5]]
    alone = [evaluate(gpt2, TOKENIZER, [r], **LIMITS, batch_tokens=64)["loss"] for r in pair]
    tokens = [unbatched(gpt2, TOKENIZER, r, **LIMITS)[2] for r in pair]
    together = evaluate(gpt2, TOKENIZER, pair, **LIMITS, batch_tokens=64)["loss"]
    assert together == pytest.approx((alone[0] * tokens[0] + alone[1] * tokens[1]) / sum(tokens), rel=1e-6)


def test_model_is_left_as_it_was_and_dropout_is_off() -> None:
    model = tiny("gpt2")
    want = evaluate(model, TOKENIZER, RECORDS, **LIMITS, batch_tokens=200)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    weights = [parameter.clone() for parameter in model.parameters()]
    assert evaluate(model, TOKENIZER, RECORDS, **LIMITS, batch_tokens=200) == want
    generate_samples(model, TOKENIZER, RECORDS, count=1, max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_mode_is_restored_after_a_failure() -> None:
    class Broken(Uniform):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            raise MemoryError

    model = Broken().train()
    with pytest.raises(MemoryError):
        evaluate(model, TOKENIZER, RECORDS, **LIMITS, batch_tokens=200)
    assert model.training
    assert torch.is_grad_enabled()


def test_bfloat16_model_is_scored_in_float32() -> None:
    model = tiny("llama").to(torch.bfloat16)
    want = expected(model, TOKENIZER, RECORDS, **LIMITS)  # float64 softmax over the same bfloat16 logits
    assert evaluate(model, TOKENIZER, RECORDS, **LIMITS, batch_tokens=1) == pytest.approx(want, rel=1e-5)


def test_softmax_sees_target_rows_only_and_chunks_change_nothing(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    want = evaluate(gpt2, TOKENIZER, RECORDS, **LIMITS, batch_tokens=10_000)
    softmax, rows = torch.log_softmax, []

    def counted(rows_CV: Tensor, dim: int) -> Tensor:
        rows.append(rows_CV.shape)
        return softmax(rows_CV, dim=dim)

    monkeypatch.setattr(evaluation, "_ROWS_PER_CHUNK", 7)
    monkeypatch.setattr(torch, "log_softmax", counted)
    got = evaluate(gpt2, TOKENIZER, RECORDS, **LIMITS, batch_tokens=10_000)
    monkeypatch.undo()
    assert got == pytest.approx(want, rel=1e-6)
    assert all(shape[0] <= 7 and shape[1] == V for shape in rows)
    assert sum(shape[0] for shape in rows) == sum(unbatched(gpt2, TOKENIZER, r, **LIMITS)[2] for r in RECORDS)


# ------------------------------------------------------------------------------------------------ choices


def choice(*choices: str, answer: int = 0, prompt: str = "Which?") -> Record:
    return Record(prompt=prompt, target=choices[answer], site=None, unit="", choices=choices, answer=answer)


def accuracies(record: Record, **limits: Any) -> tuple[float, float]:
    got = evaluate(Uniform(), TOKENIZER, [record], **{**LIMITS, "append_eos": False, **limits}, batch_tokens=64)
    return got["acc"], got["acc_norm"]


def test_acc_takes_the_sum_and_acc_norm_divides_by_characters() -> None:
    # A uniform model gives each byte the same: "a" 2 tokens, 1 character; "abcd" 5 tokens, 4 characters; 2 > 5/4.
    assert accuracies(choice(" a", " abcd", answer=0)) == (1.0, 0.0)
    assert accuracies(choice(" a", " abcd", answer=1)) == (0.0, 1.0)


def test_acc_norm_counts_characters_not_bytes() -> None:
    # "éé": 5 tokens, 2 characters, 4 bytes; "ab": 3 tokens, 2 characters. By bytes "éé" would win, 5/4 < 3/2.
    assert accuracies(choice(" ab", " éé", answer=0)) == (1.0, 1.0)


def test_equal_scores_go_to_the_first() -> None:
    assert accuracies(choice(" ab", " cd", " ef", answer=0)) == (1.0, 1.0)
    assert accuracies(choice(" ab", " cd", " ef", answer=1)) == (0.0, 0.0)


def test_choices_are_scored_without_eos_and_the_loss_is_the_right_choice_s(gpt2: Any) -> None:
    records = [choice(" tea", " a glass of water", " rest", answer=i, prompt=p) for i, p in enumerate("ABC")]
    plain = evaluate(gpt2, TOKENIZER, records, max_length=64, append_eos=False, batch_tokens=100)
    ended = evaluate(gpt2, TOKENIZER, records, max_length=64, append_eos=True, batch_tokens=100)
    assert plain == pytest.approx(
        expected(gpt2, TOKENIZER, records, max_length=64, append_eos=False)
        | {"acc": plain["acc"], "acc_norm": plain["acc_norm"]},
        rel=1e-5,
    )
    assert {k: ended[k] for k in ("acc", "acc_norm")} == {k: plain[k] for k in ("acc", "acc_norm")}
    assert ended["loss"] == pytest.approx(
        expected(gpt2, TOKENIZER, records, max_length=64, append_eos=True)["loss"], rel=1e-5
    )


def test_choice_scores_need_choices_everywhere(gpt2: Any) -> None:
    assert "acc" not in evaluate(gpt2, TOKENIZER, [choice(" a", " b"), RECORDS[0]], **LIMITS, batch_tokens=64)


def arc_easy(path: Path) -> Iterator[tuple[str, Record]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        labels = [c["label"] for c in row["question"]["choices"]]
        texts = [" " + c["text"] for c in row["question"]["choices"]]
        prompt = f"Question: {row['question']['stem']}\nAnswer:"
        yield row["id"], choice(*texts, answer=labels.index(row["answerKey"]), prompt=prompt)


def test_choice_accuracy_equals_lm_evaluation_harness(
    shared_model: Callable[[str], Path], shared_data: Callable[[str], Path]
) -> None:
    vectors = json.loads((Path(__file__).parent / "vectors" / "lm_eval_arc_easy.json").read_text())
    path = shared_model(vectors["model"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    folder, file = vectors["data"].split("/")
    questions = dict(arc_easy(shared_data(folder) / file))
    records = [questions[question["id"]] for question in vectors["questions"]]
    limits: dict[str, Any] = {"max_length": 512, "batch_tokens": 2048}
    for record, question in zip(records, vectors["questions"], strict=True):
        pairs = [(record.prompt, text) for text in record.choices]
        scores = log_likelihoods(model, tokenizer, pairs, **limits)
        assert scores == pytest.approx(question["loglikelihoods"], rel=1e-5)
        alone = evaluate(model, tokenizer, [record], append_eos=False, **limits)
        assert (alone["acc"], alone["acc_norm"]) == (question["acc"], question["acc_norm"]), question["id"]
    together = evaluate(model, tokenizer, records, append_eos=False, **limits)
    assert (together["acc"], together["acc_norm"]) == pytest.approx((vectors["acc"], vectors["acc_norm"]))


# ------------------------------------------------------------------------------------------------ refusals


def test_nothing_to_evaluate_on_is_refused(gpt2: Any) -> None:
    with pytest.raises(InvalidValue, match="records"):
        evaluate(gpt2, TOKENIZER, [], **LIMITS, batch_tokens=64)
    with pytest.raises(InvalidValue, match="samples"):
        rouge_l([])


@pytest.mark.parametrize("answer", [None, 2, -1, 1])
def test_answer_that_is_not_the_target_is_refused(gpt2: Any, answer: int | None) -> None:
    record = Record(prompt="?", target=" a", site=None, unit="", choices=(" a", " b"), answer=answer)
    with pytest.raises(InvalidValue, match=r"record\.answer"):
        evaluate(gpt2, TOKENIZER, [record], **LIMITS, batch_tokens=64)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_diverged_model_is_refused(value: float) -> None:
    class Diverged(Uniform):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            output = super().forward(input_ids, attention_mask)
            output.logits[..., 0] = value
            return output

    with pytest.raises(ModelError, match="diverged"):
        evaluate(Diverged(), TOKENIZER, RECORDS, **LIMITS, batch_tokens=64)


# ------------------------------------------------------------------------------------------------ samples


def greedy(model: Any, ids: list[int], steps: int) -> list[int]:
    written: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        if written[-1] == SIZES["eos_token_id"]:
            break
    return written


@pytest.mark.parametrize("name", CONFIGS)
def test_samples_are_greedy_from_the_training_prompt(name: str) -> None:
    model = tiny(name)
    # what a chat checkpoint may carry; greedy must stay greedy
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_k=3, repetition_penalty=1.7)
    samples = generate_samples(model, TOKENIZER, RECORDS, count=2, max_new_tokens=12)
    assert [(s.prompt, s.target) for s in samples] == [(r.prompt, r.target) for r in RECORDS[:2]]
    for sample in samples:
        example = encode_pair(TOKENIZER, sample.prompt, sample.target, max_length=96, append_eos=False)
        written = greedy(model, list(example.input_ids[: example.target_start]), 12)
        assert sample.text == TOKENIZER.decode(written, skip_special_tokens=True)


def test_sample_stops_at_eos() -> None:
    model = tiny("gpt2")
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))  # untied; then EOS wins everywhere
    model.lm_head.bias = nn.Parameter(torch.zeros(V))
    with torch.no_grad():
        model.lm_head.bias[257] = 1.0
    model.generation_config = GenerationConfig(eos_token_id=5)  # the tokenizer's EOS is what targets end with
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    (sample,) = generate_samples(model, TOKENIZER, RECORDS[:1], count=3, max_new_tokens=5)
    assert sample.text == ""
    assert len(passes) == 1


def test_long_prompt_loses_its_beginning_and_still_fits(gpt2: Any) -> None:
    record = Record(prompt="y" * 300 + "z", target=" t", site=None, unit="")
    (sample,) = generate_samples(gpt2, TOKENIZER, [record], count=1, max_new_tokens=10)
    kept = TOKENIZER.encode("y" * 85 + "z")
    assert sample.text == TOKENIZER.decode(greedy(gpt2, kept, 10), skip_special_tokens=True)
    with pytest.raises(InvalidValue, match="max_new_tokens"):
        generate_samples(gpt2, TOKENIZER, [record], count=1, max_new_tokens=95)


def test_rouge_l_equals_the_longest_common_subsequence() -> None:
    def words(target: str, text: str) -> float:
        a, b = target.lower().split(), text.lower().split()
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        common = table[-1][-1]
        return 2 * common / (len(a) + len(b)) if common else 0.0

    pairs = [("the cat sat on the mat", "The cat on mat"), ("a b c", "c b a"), ("one two", "three"), ("x", "")]
    samples = [Sample(prompt="", target=target, text=text) for target, text in pairs]
    assert words(*pairs[0]) == 0.8
    assert rouge_l(samples) == pytest.approx(sum(words(*pair) for pair in pairs) / 4)
