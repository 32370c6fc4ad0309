"""Records to tokens to batches. Training and scoring use the same function, so they see the same target tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedcollm_privacy._validate import at_least
from fedcollm_privacy.errors import InvalidValue, ModelError
from secure_fedcollm.records import Record

__all__ = [
    "IGNORED",
    "Batch",
    "Example",
    "TokenDataset",
    "Tokenizer",
    "collate",
    "encode_pair",
    "physical_batches",
    "tokenize",
]

IGNORED = -100
"""Label of a position that is not learnt; the value torch's cross-entropy ignores."""
PROMPT_SHARE = 4
"""A cut prompt keeps at least ``max_length // PROMPT_SHARE`` tokens before the target's end is cut too."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    @property
    def bos_token_id(self) -> int | None: ...  # noqa: D102

    @property
    def eos_token_id(self) -> int | None: ...  # noqa: D102

    @property
    def pad_token_id(self) -> int | None: ...  # noqa: D102

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One encoded record.

    Attributes:
        input_ids: prompt and target.
        target_start: index of the first target token; at least 1, because position 0 is predicted by nothing.
        unit: the record's unit.
    """

    input_ids: tuple[int, ...]
    target_start: int
    unit: str

    def __post_init__(self) -> None:
        if not 1 <= self.target_start < len(self.input_ids):
            raise InvalidValue("target_start", self.target_start, f"1 to {len(self.input_ids) - 1}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDataset:
    """Encoded records, and the id that fills up shorter rows of a batch."""

    examples: tuple[Example, ...]
    pad_token_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Right-padded examples, int64 [B, T] each; labels are not shifted and ``IGNORED`` outside the target."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    labels_BT: torch.Tensor


def encode_pair(
    tokenizer: Tokenizer, prompt: str, target: str, *, max_length: int, append_eos: bool, unit: str = ""
) -> Example:
    """Encode a prompt and its continuation as lm-evaluation-harness does (``TemplateLM._encode_pair``).

    White space at the prompt's end moves to the target; prompt and target are encoded as one text, and the tokens
    after those of the prompt alone are the target's. An empty prompt becomes BOS, or EOS without BOS. Where a merge
    crosses the border, the merged token is the target's first; lm-evaluation-harness loses its text there.

    When it is longer than ``max_length``, the prompt's beginning is cut first (BOS stays), down to a quarter of
    ``max_length``; then the target keeps its beginning and gets no EOS. So neither question nor answer is ever lost
    whole, however long the other is.

    Args:
        tokenizer: a Hugging Face tokenizer; its own padding and truncation settings do not matter.
        prompt: may be empty.
        target: not blank.
        max_length: most tokens, at least 4.
        append_eos: end the target with EOS.
        unit: carried into the example.

    Raises:
        InvalidValue: ``max_length`` too small, or a target without any token.
        ModelError: the tokenizer lacks the BOS or EOS token that is needed.
    """
    at_least(4, max_length=max_length)
    eos = tokenizer.eos_token_id
    if append_eos and eos is None:
        raise ModelError("the tokenizer has no EOS token to end targets with; set tokenizer.eos_token")
    context_ids, target_ids = _split(tokenizer, prompt, target)
    if not target_ids:
        raise InvalidValue("target", "<text>", "a text with at least one token; this one has none")
    if append_eos and eos is not None:
        target_ids = [*target_ids, eos]
    context_kept = max(max_length - len(target_ids), min(len(context_ids), max_length // PROMPT_SHARE))
    context_ids = _cut_beginning(context_ids, context_kept, tokenizer.bos_token_id)
    target_ids = target_ids[: max_length - len(context_ids)]
    return Example(input_ids=(*context_ids, *target_ids), target_start=len(context_ids), unit=unit)


def _split(tokenizer: Tokenizer, prompt: str, target: str) -> tuple[list[int], list[int]]:
    context = prompt.rstrip()
    target = prompt[len(context) :] + target
    if context:
        context_ids, whole_ids = _encode(tokenizer, context), _encode(tokenizer, context + target)
        pairs = zip(context_ids, whole_ids, strict=False)
        shared = next((i for i, (one, two) in enumerate(pairs) if one != two), len(context_ids))
        if shared:
            return whole_ids[:shared], whole_ids[shared:]
    else:
        whole_ids = tokenizer.encode(target, add_special_tokens=False)
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise ModelError("the tokenizer has neither BOS nor EOS token, so nothing can stand for an empty prompt")
    return [prefix], whole_ids


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """With special tokens, but without an EOS that some tokenizers put at the end: it would hide one target token."""
    ids = list(tokenizer.encode(text, add_special_tokens=True))
    if ids and ids[-1] == tokenizer.eos_token_id:
        plain = tokenizer.encode(text, add_special_tokens=False)
        if not plain or plain[-1] != tokenizer.eos_token_id:
            ids.pop()
    return ids


def _cut_beginning(ids: list[int], keep: int, bos: int | None) -> list[int]:
    if len(ids) <= keep:
        return ids
    if bos is not None and ids[0] == bos:
        return [bos, *ids[len(ids) - keep + 1 :]]
    return ids[len(ids) - keep :]


def tokenize(records: Sequence[Record], tokenizer: Tokenizer, *, max_length: int, append_eos: bool) -> TokenDataset:
    """Encode every record, in order.

    Padding takes the tokenizer's PAD id, else EOS, else 0: the attention mask and the labels exclude it either way.

    Raises:
        InvalidValue, ModelError: as ``encode_pair``.
    """
    examples = tuple(
        encode_pair(tokenizer, r.prompt, r.target, max_length=max_length, append_eos=append_eos, unit=r.unit)
        for r in records
    )
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return TokenDataset(examples=examples, pad_token_id=next(pad for pad in pads if pad is not None))


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad on the right to the longest example, whatever side the tokenizer pads on.

    Args:
        examples: at least one.
        pad_token_id: fills ``input_ids_BT``.

    Raises:
        InvalidValue: no examples.
    """
    if not examples:
        raise InvalidValue("examples", 0, "at least one example in a batch")
    shape = len(examples), max(len(example.input_ids) for example in examples)
    input_ids_BT = torch.full(shape, pad_token_id, dtype=torch.long)
    attention_mask_BT = torch.zeros(shape, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        ids_T, start = torch.tensor(example.input_ids, dtype=torch.long), example.target_start
        input_ids_BT[row, : len(ids_T)] = ids_T
        attention_mask_BT[row, : len(ids_T)] = 1
        labels_BT[row, start : len(ids_T)] = ids_T[start:]
    return Batch(input_ids_BT=input_ids_BT, attention_mask_BT=attention_mask_BT, labels_BT=labels_BT)


def physical_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cut a logical batch into physical ones of similar length.

    Args:
        lengths: tokens per example.
        batch_tokens: most padded tokens (examples x longest) per physical batch; a longer example stands alone.

    Returns:
        Indices into ``lengths``, shortest first, each exactly once; empty for no examples.
    """
    at_least(1, batch_tokens=batch_tokens)
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Ascending order, so the newcomer is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
