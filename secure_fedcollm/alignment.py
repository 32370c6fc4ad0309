"""Where two tokenizers agree on the same text: what distillation between different vocabularies compares.

Tokens are taken as the bytes they stand for. A cut is a border between two tokens, as an offset into the UTF-8 bytes of
prompt and target; a span lies between two neighbouring cuts that both tokenizers make. So spans are as short as both
tokenizers allow, exact to the byte, also where a character is several tokens. Only target tokens are in spans.

Byte-level BPE (GPT-2, OPT, GPT-NeoX, Llama 3, Qwen) and SentencePiece vocabularies (Llama 2, Mistral) are understood.
Where a normaliser changes the text (Unicode NFC, say), everything from the first to the last byte that it changed in a
record lies in one span, or in none if that is longer than ``LONGEST_SPAN``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch

from fedcollm_privacy.errors import ModelError
from secure_fedcollm.models import AdaptedModel, check_same_tokenizer
from secure_fedcollm.records import Record
from secure_fedcollm.tokenization import Example, TokenDataset, encode_pair, tokenize

__all__ = [
    "LONGEST_SPAN",
    "AlignedTokens",
    "Alignment",
    "SharedTokens",
    "Span",
    "align",
    "align_records",
    "check_tokenizers",
    "token_bytes",
    "tokenize_public",
]

Alignment = Literal["same", "common_support"]

# Tokens on either side. Longer stretches have no likelihood worth comparing, and must fit into a chunk of the losses.
LONGEST_SPAN = 64

# GPT-2's way to write every byte as one printable character.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}
_SPACE = "\u2581"  # SentencePiece's space


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens [slm_start, slm_stop) of the SLM and [llm_start, llm_stop) of the LLM that stand for the same text.

    Positions count target tokens from the first of a record, or of a batch.
    """

    slm_start: int
    slm_stop: int
    llm_start: int
    llm_stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTokens:
    """Tokens with the same bytes in both vocabularies, int64 [S] each; EOS is paired with EOS, whatever its bytes."""

    slm_ids: torch.Tensor
    llm_ids: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedTokens:
    """The same records for both models.

    Attributes:
        slm: as the SLM reads them.
        llm: as the LLM reads them.
        spans: of every record, in order and without overlap.
        shared: the tokens that both know.
    """

    slm: TokenDataset
    llm: TokenDataset
    spans: tuple[tuple[Span, ...], ...]
    shared: SharedTokens


def check_tokenizers(slm: AdaptedModel, llm: AdaptedModel, alignment: Alignment) -> None:
    """Refuse a pair that cannot be co-tuned under ``alignment``, before anything is spent.

    Raises:
        ModelError: two tokenizers without ``common_support``, or such that cannot be aligned.
    """
    if alignment == "same" or _same(slm, llm):
        check_same_tokenizer(slm, llm)
        return
    for adapted in (slm, llm):
        rows, tokens = adapted.model.get_output_embeddings().weight.shape[0], len(token_bytes(adapted.tokenizer))
        if rows < tokens:
            raise ModelError(f"{adapted.name} has {rows} output rows for {tokens} tokens")


def tokenize_public(
    records: Sequence[Record], slm: AdaptedModel, llm: AdaptedModel, *, max_length: int, append_eos: bool
) -> TokenDataset | AlignedTokens:
    """D_a for a pair that `check_tokenizers` let pass: encoded once, or for both tokenizers and aligned.

    Raises:
        InvalidValue, ModelError: as `tokenize` and `token_bytes`.
    """
    if _same(slm, llm):
        return tokenize(records, slm.tokenizer, max_length=max_length, append_eos=append_eos)
    return align_records(records, slm.tokenizer, llm.tokenizer, max_length=max_length, append_eos=append_eos)


def _same(slm: AdaptedModel, llm: AdaptedModel) -> bool:
    vocabularies: list[dict[str, int]] = [adapted.tokenizer.get_vocab() for adapted in (slm, llm)]
    return vocabularies[0] == vocabularies[1]


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of every token, by id; special tokens stand for their own name, unused ids for nothing.

    Raises:
        ModelError: a tokenizer that is neither byte-level nor SentencePiece, or without a fast implementation.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("distillation.alignment: a tokenizer without a fast implementation cannot be aligned")
    decoder = json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False)
    byte_level = '"ByteLevel"' in decoder
    if not byte_level and _SPACE not in decoder:
        raise ModelError(
            f"distillation.alignment: a tokenizer that decodes by {decoder:.80} cannot be aligned; byte-level BPE "
            "and SentencePiece can"
        )
    vocabulary, added = tokenizer.get_vocab(), set(tokenizer.get_added_vocab().values())
    spelled = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index in added:
            spelled[index] = token.encode()
        elif byte_level:
            spelled[index] = b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode() for c in token)
        elif _is_byte(token):
            spelled[index] = bytes([int(token[3:5], 16)])
        else:
            spelled[index] = token.replace(_SPACE, " ").encode()
    return spelled


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def align_records(
    records: Sequence[Record], slm_tokenizer: Any, llm_tokenizer: Any, *, max_length: int, append_eos: bool
) -> AlignedTokens:
    """Encode every record for both models, each within ``max_length`` of its own tokens, and find the spans.

    Raises:
        InvalidValue, ModelError: as `tokenize` and `token_bytes`.
    """
    tokenizers = (slm_tokenizer, llm_tokenizer)
    spelled = [token_bytes(tokenizer) for tokenizer in tokenizers]
    slm, llm = (tokenize(records, t, max_length=max_length, append_eos=append_eos) for t in tokenizers)
    return AlignedTokens(
        slm=slm,
        llm=llm,
        spans=tuple(
            align(
                _target_cuts(slm_tokenizer, spelled[0], record, slm_example),
                _target_cuts(llm_tokenizer, spelled[1], record, llm_example),
            )
            for record, slm_example, llm_example in zip(records, slm.examples, llm.examples, strict=True)
        ),
        shared=_shared(slm_tokenizer, llm_tokenizer, spelled),
    )


def align(slm_cuts: Sequence[int | None], llm_cuts: Sequence[int | None]) -> tuple[Span, ...]:
    """Spans between neighbouring cuts that both have.

    Args:
        slm_cuts: for each target token the text offset before it, then the one after the last; None where unknown.
            Offsets never fall. A token without text (SentencePiece's first space) ends the span before it.
        llm_cuts: likewise.
    """
    slm, llm = ({cut: at for at, cut in enumerate(cuts) if cut is not None} for cuts in (slm_cuts, llm_cuts))
    spans = (
        Span(slm_start=slm[start], slm_stop=slm[stop], llm_start=llm[start], llm_stop=llm[stop])
        for start, stop in pairwise(sorted(slm.keys() & llm.keys()))
    )
    return tuple(s for s in spans if max(s.slm_stop - s.slm_start, s.llm_stop - s.llm_start) <= LONGEST_SPAN)


def _target_cuts(tokenizer: Any, spelled: Sequence[bytes], record: Record, kept: Example) -> list[int | None]:
    """The cuts around the target tokens that truncation left; EOS ends one byte behind the text."""
    whole = encode_pair(tokenizer, record.prompt, record.target, max_length=sys.maxsize, append_eos=False)
    text = (record.prompt + record.target).encode()
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    ends = _ends([spelled[i] for i in whole.input_ids], text, opens=whole.input_ids[0] in specials)
    cuts = [*ends[whole.target_start - 1 :], len(text) + 1]
    return cuts[: len(kept.input_ids) - kept.target_start + 1]


def _ends(pieces: Sequence[bytes], text: bytes, *, opens: bool) -> list[int | None]:
    """Where in ``text`` each token ends.

    Args:
        pieces: the bytes of all tokens; the first may be a token that the tokenizer put before the text, and the text
            may begin with a space that it added.
        opens: whether the first is one that may be so.
    """
    readings = [(b"".join(pieces), 0)]
    if opens:
        readings.append((b"".join(pieces[1:]), len(pieces[0])))
    readings += [(said[1:], skipped + 1) for said, skipped in readings if said.startswith(b" ")]
    matches = [(_common(said, text), said, skipped) for said, skipped in readings]
    # Of equal matches the one that leaves least over.
    same, said, skipped = max(matches, key=lambda match: (match[0], -len(match[1])))
    room = min(len(said), len(text)) - same
    behind = min(room, _common(said[::-1], text[::-1]))
    ends: list[int | None] = []
    for end in accumulate(len(piece) for piece in pieces):
        at = max(0, end - skipped)
        if at <= same:
            ends.append(at)
        else:
            ends.append(len(text) - (len(said) - at) if at >= len(said) - behind else None)
    return ends


def _common(one: bytes, other: bytes) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _shared(slm_tokenizer: Any, llm_tokenizer: Any, spelled: Sequence[Sequence[bytes]]) -> SharedTokens:
    slm, llm = (_by_bytes(t, s) for t, s in zip((slm_tokenizer, llm_tokenizer), spelled, strict=True))
    pairs = [(slm[said], llm[said]) for said in sorted(slm.keys() & llm.keys())]
    ends = (slm_tokenizer.eos_token_id, llm_tokenizer.eos_token_id)
    if None not in ends:
        pairs.append(ends)
    slm_ids, llm_ids = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return SharedTokens(slm_ids=slm_ids.contiguous(), llm_ids=llm_ids.contiguous())


def _by_bytes(tokenizer: Any, spelled: Sequence[bytes]) -> dict[bytes, int]:
    """One id for every byte string; SentencePiece's byte tokens only where no character is written so."""
    special = set(tokenizer.all_special_ids)
    ids = [(said, i) for i, said in enumerate(spelled) if said and i not in special]
    names = dict(zip((i for _, i in ids), tokenizer.convert_ids_to_tokens([i for _, i in ids]), strict=True))
    return dict(sorted(ids, key=lambda pair: (not _is_byte(names[pair[1]]), -pair[1])))
