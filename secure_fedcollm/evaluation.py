"""What a model knows: perplexity, next-token accuracy, choice accuracy, samples, ROUGE-L.

Choice accuracy follows lm-evaluation-harness 0.4 (``api/task.py``, ``output_type: multiple_choice``): every choice
is scored by the summed log-likelihood of its tokens after the prompt; ``acc`` takes the largest sum, ``acc_norm``
the largest sum per character of the choice, the space that joins it to the prompt not counted. Equal scores go to
the first, as ``numpy.argmax`` does.

Shape suffixes: B batch, T tokens, V vocabulary, N target tokens of a batch, C a chunk of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue, ModelError
from secure_fedcollm.records import Record
from secure_fedcollm.tokenization import (
    IGNORED,
    TokenDataset,
    Tokenizer,
    collate,
    encode_pair,
    physical_batches,
    tokenize,
)

__all__ = ["Sample", "evaluate", "generate_samples", "log_likelihoods", "rouge_l"]

_UNBOUNDED = 1 << 30  # positions of a model that does not say
_FEWEST_PROMPT_TOKENS = 3
_LARGEST_LOSS = 700.0  # exp(710) is beyond a float
_ROWS_PER_CHUNK = 1024  # bounds the float32 copy of the target rows: 0.6 GB at a vocabulary of 150 000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a model writes after a prompt, beside what the data says.

    Attributes:
        prompt: the record's prompt.
        target: the record's target text.
        text: the greedy continuation, without special tokens.
    """

    prompt: str
    target: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Score:
    log_likelihood: float
    correct: int
    tokens: int


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    max_length: int,
    append_eos: bool,
    batch_tokens: int,
) -> dict[str, float]:
    """Measure a model on records; the model is left as it was found.

    Args:
        model: called as ``model(input_ids=, attention_mask=).logits``, logits ``(B, T, V)`` in any float type.
        tokenizer: the model's own.
        records: at least one. Choice scores are given only when every record has choices.
        max_length: tokens per record; the prompt's beginning is cut first.
        append_eos: whether the end-of-text token counts as the last target token. Choices are scored without it.
        batch_tokens: padded tokens per forward pass; bounds memory, changes no result beyond float rounding.

    Returns:
        ``loss``: mean cross-entropy in nats over all target tokens of all records (a long record weighs more);
        ``perplexity``: exp(loss); ``token_accuracy``: share of target tokens that were the likeliest;
        and ``acc``, ``acc_norm`` on choice tasks.

    Raises:
        InvalidValue: no records, or a choice record whose answer or choices cannot be scored.
        ModelError: loss or perplexity is beyond a float, so the model has diverged.
    """
    if not records:
        raise InvalidValue("records", records, "at least one record to evaluate on")
    has_choices = all(record.choices for record in records)
    if has_choices:
        choice_scores = _score_choices(model, tokenizer, records, max_length, batch_tokens)
    if has_choices and not append_eos:
        scores = [row[_answer(record)] for row, record in zip(choice_scores, records, strict=True)]
    else:
        dataset = tokenize(records, tokenizer, max_length=max_length, append_eos=append_eos)
        scores = _score(model, dataset, batch_tokens)

    tokens = sum(score.tokens for score in scores)
    loss = -math.fsum(score.log_likelihood for score in scores) / tokens
    if loss > _LARGEST_LOSS:
        raise _diverged()
    metrics = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "token_accuracy": sum(score.correct for score in scores) / tokens,
    }
    if has_choices:
        metrics |= _choice_accuracy(choice_scores, records)
    return metrics


def log_likelihoods(
    model: nn.Module,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    max_length: int,
    batch_tokens: int,
) -> list[float]:
    """Summed log-likelihood in nats of each continuation after its prompt, in the order given.

    Args:
        model: as in ``evaluate``.
        tokenizer: the model's own.
        pairs: ``(prompt, continuation)``; the continuation carries its leading space. No end-of-text token is added.
        max_length: tokens per pair; the prompt's beginning is cut first.
        batch_tokens: padded tokens per forward pass.

    Raises:
        ModelError: a log-likelihood is not finite.
    """
    records = [Record(prompt=prompt, target=text, site=None, unit=str(i)) for i, (prompt, text) in enumerate(pairs)]
    dataset = tokenize(records, tokenizer, max_length=max_length, append_eos=False)
    return [score.log_likelihood for score in _score(model, dataset, batch_tokens)]


def generate_samples(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    count: int,
    max_new_tokens: int,
) -> tuple[Sample, ...]:
    """Continue the first prompts greedily, one at a time, up to the end-of-text token.

    Args:
        model: has ``generate`` as in transformers and peft.
        tokenizer: the model's own.
        records: prompts, and targets to lay beside the text.
        count: how many of the records, from the first; all when there are fewer.
        max_new_tokens: at most so many tokens are written. A prompt that would not fit into the model's positions
            together with them loses its beginning.

    Raises:
        InvalidValue: negative count, no token to write, or a model with fewer positions than ``max_new_tokens``.
    """
    _validate.at_least(0, count=count)
    _validate.at_least(1, max_new_tokens=max_new_tokens)
    return tuple(
        Sample(prompt=r.prompt, target=r.target, text=_continue(model, tokenizer, r.prompt, max_new_tokens))
        for r in records[:count]
    )


def rouge_l(samples: Sequence[Sample]) -> float:
    """Mean ROUGE-L F-measure of texts against targets, in [0, 1].

    Longest common subsequence of lower-case alphanumeric words without stemming (Lin 2004), by Google's
    ``rouge_score``.

    Raises:
        InvalidValue: no samples.
    """
    if not samples:
        raise InvalidValue("samples", samples, "at least one sample")
    from rouge_score.rouge_scorer import RougeScorer  # pulls in nltk, which a run without samples need not load

    scorer = RougeScorer(["rougeL"])
    return math.fsum(scorer.score(s.target, s.text)["rougeL"].fmeasure for s in samples) / len(samples)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; afterwards every submodule has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _continue(model: nn.Module, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", _UNBOUNDED)
    room = positions - max_new_tokens
    if room < _FEWEST_PROMPT_TOKENS:
        allowed = f"an integer <= {positions - _FEWEST_PROMPT_TOKENS}: the model has {positions} positions"
        raise InvalidValue("max_new_tokens", max_new_tokens, allowed)
    # With a target of one token the example begins with the very prompt tokens of training.
    example = encode_pair(tokenizer, prompt, ".", max_length=room + 1, append_eos=False)
    prompt_1T = torch.tensor([example.input_ids[: example.target_start]], device=next(model.parameters()).device)
    with _evaluating(model):
        output_1T = model.generate(  # type: ignore[operator]
            input_ids=prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            # neutral, because a checkpoint's own generation settings may say otherwise
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(output_1T[0, prompt_1T.shape[1] :], skip_special_tokens=True))


def _score(model: nn.Module, dataset: TokenDataset, batch_tokens: int) -> list[_Score]:
    device = next(model.parameters()).device
    scores: dict[int, _Score] = {}
    with _evaluating(model):
        for indices in physical_batches([len(e.input_ids) for e in dataset.examples], batch_tokens):
            batch = collate([dataset.examples[i] for i in indices], dataset.pad_token_id)
            labels_BT = batch.labels_BT[:, 1:].to(device)  # position t predicts token t + 1
            is_target_BT = labels_BT != IGNORED
            rows_NV = model(
                input_ids=batch.input_ids_BT.to(device), attention_mask=batch.attention_mask_BT.to(device)
            ).logits[:, :-1][is_target_BT]  # a copy of the target rows; B x T x V is free from here on
            log_likelihood_N, correct_N = _score_rows(rows_NV, labels_BT[is_target_BT])
            row_of_N = is_target_BT.nonzero()[:, 0]
            for row, index in enumerate(indices):
                mine_N = row_of_N == row
                scores[index] = _Score(
                    log_likelihood=float(log_likelihood_N[mine_N].sum()),
                    correct=int(correct_N[mine_N].sum()),
                    tokens=int(mine_N.sum()),
                )
    ordered = [scores[i] for i in range(len(dataset.examples))]
    if not all(math.isfinite(score.log_likelihood) for score in ordered):
        raise _diverged()
    return ordered


def _diverged() -> ModelError:
    return ModelError(
        "the model's loss is beyond any number: it has diverged; go back to the last good adapter, or lower the "
        "learning rate"
    )


def _score_rows(rows_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood (float64) and whether the target was the likeliest token, per row."""
    log_likelihoods, corrects = [], []
    for rows_CV, targets_C in zip(
        torch.split(rows_NV, _ROWS_PER_CHUNK), torch.split(targets_N, _ROWS_PER_CHUNK), strict=True
    ):
        log_p_CV = torch.log_softmax(rows_CV.float(), dim=-1)  # bfloat16 keeps 8 bits: not enough for a sum
        log_likelihoods.append(log_p_CV.gather(-1, targets_C[:, None])[:, 0].double())
        corrects.append(rows_CV.argmax(dim=-1) == targets_C)
    return torch.cat(log_likelihoods), torch.cat(corrects)


def _answer(record: Record) -> int:
    answer = record.answer
    if answer is None or not 0 <= answer < len(record.choices) or record.target != record.choices[answer]:
        raise InvalidValue("record.answer", answer, "the index in record.choices of the record's target")
    return answer


def _score_choices(
    model: nn.Module, tokenizer: Tokenizer, records: Sequence[Record], max_length: int, batch_tokens: int
) -> list[list[_Score]]:
    """Scores of every choice of every record, in order."""
    single = [
        dataclasses.replace(record, target=choice, choices=(), answer=None)
        for record in records
        for choice in record.choices
    ]
    flat = iter(_score(model, tokenize(single, tokenizer, max_length=max_length, append_eos=False), batch_tokens))
    return [[next(flat) for _ in record.choices] for record in records]


def _choice_accuracy(choice_scores: list[list[_Score]], records: Sequence[Record]) -> dict[str, float]:
    acc = acc_norm = 0
    for row, record in zip(choice_scores, records, strict=True):
        sums = np.array([score.log_likelihood for score in row])
        characters = np.array([len(choice.removeprefix(" ")) for choice in record.choices])
        if not characters.all():
            raise InvalidValue("record.choices", record.choices, "choices with at least one character each")
        acc += int(np.argmax(sums)) == _answer(record)
        acc_norm += int(np.argmax(sums / characters)) == _answer(record)
    return {"acc": acc / len(records), "acc_norm": acc_norm / len(records)}
