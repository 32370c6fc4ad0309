"""Spans between two tokenizers, against the offsets that the tokenizers themselves tell and against brute force."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fedcollm_privacy.errors import ModelError
from secure_fedcollm.alignment import LONGEST_SPAN, AlignedTokens, Span, align, align_records, token_bytes
from secure_fedcollm.records import Record
from secure_fedcollm.tokenization import Example

from .two_tokenizers import byte_level, sentencepiece

LONG = 10_000
TOKENIZERS = {
    "sentencepiece": sentencepiece(),
    "gpt2": byte_level(),
    "other": byte_level(["The ever better evening; pain, in the end."] * 4, 300),
    "nfc": byte_level(normalizer=normalizers.NFC()),
}
SPELLED = {(t.eos_token_id, len(t)): token_bytes(t) for t in TOKENIZERS.values()}
PAIRS = [("sentencepiece", "gpt2"), ("gpt2", "sentencepiece"), ("gpt2", "other"), ("sentencepiece", "sentencepiece")]
TEXT = st.text(
    st.one_of(
        st.sampled_from("the patient is better?; \n"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"),
        st.sampled_from("éß漢字🌡️👩\u200d⚕\u0301"),
    ),
    max_size=30,
)
TARGET = TEXT.filter(lambda text: bool(text.strip()))
SPECIAL = st.sampled_from(["<s>", "</s>", "<|endoftext|>", "<unk>", "<0x41>"])


def aligned(one: str, other: str, prompt: str, target: str, max_length: int = LONG, eos: bool = True) -> AlignedTokens:
    record = Record(prompt=prompt, target=target, site=None, unit="0")
    return align_records([record], TOKENIZERS[one], TOKENIZERS[other], max_length=max_length, append_eos=eos)


def said(tokenizer: Any, example: Example, start: int, stop: int) -> bytes:
    return b"".join(
        SPELLED[tokenizer.eos_token_id, len(tokenizer)][i]
        for i in example.input_ids[example.target_start + start : example.target_start + stop]
    )


def both_said(got: AlignedTokens, one: str, other: str, span: Span) -> tuple[bytes, bytes]:
    return (
        said(TOKENIZERS[one], got.slm.examples[0], span.slm_start, span.slm_stop),
        said(TOKENIZERS[other], got.llm.examples[0], span.llm_start, span.llm_stop),
    )


def character_cuts(name: str, example: Example, text: str) -> dict[int, int]:
    """By the tokenizer's own offsets: for cuts that divide no character, the character before which each stands."""
    encoding = TOKENIZERS[name].backend_tokenizer.encode(text, add_special_tokens=False)
    offsets = encoding.offsets
    kept = example.input_ids[example.target_start :]
    first = len(offsets) - len(kept) + (1 if kept[-1] == TOKENIZERS[name].eos_token_id else 0)
    cuts = {0: offsets[first][0], len(offsets) - first: len(text)}
    for at, ((_, before), (after, _)) in enumerate(pairwise(offsets[first:]), start=1):
        if before <= after:
            cuts[at] = after
    if first and offsets[first - 1][1] > offsets[first][0]:
        del cuts[0]
    return cuts


@pytest.mark.parametrize(("one", "other"), PAIRS)
@given(prompt=TEXT, target=TARGET)
@settings(max_examples=12)
def test_whole_character_cuts_are_those_both_tokenizers_tell(one: str, other: str, prompt: str, target: str) -> None:
    got = aligned(one, other, prompt, target)
    text = prompt + target
    cuts = [character_cuts(n, e.examples[0], text) for n, e in ((one, got.slm), (other, got.llm))]
    found = {cut for s in got.spans[0] for cut in ((s.slm_start, s.llm_start), (s.slm_stop, s.llm_stop))}
    # A space that SentencePiece puts before the text has no place in it: its own cut is one of two at the beginning.
    wanted = {
        (i, j)
        for i, left in cuts[0].items()
        for j, right in cuts[1].items()
        if left == right and (left > 0 or prompt.strip())
    }
    assert wanted <= found
    for i, j in found - wanted:
        ends = (i, j) in ((s.slm_stop, s.llm_stop) for s in got.spans[0][-1:])  # EOS
        assert ends or (i not in cuts[0] and j not in cuts[1]) or cuts[0].get(i, 0) == cuts[1].get(j, 0) == 0


@pytest.mark.parametrize(("one", "other"), PAIRS)
@given(prompt=TEXT, target=TARGET)
@settings(max_examples=12)
def test_both_sides_of_a_span_are_the_same_bytes_and_none_can_be_divided(
    one: str, other: str, prompt: str, target: str
) -> None:
    got = aligned(one, other, prompt, target)
    assert got.spans[0][-1].slm_stop == len(got.slm.examples[0].input_ids) - got.slm.examples[0].target_start
    joined = b""
    for span in got.spans[0][:-1]:
        left, right = both_said(got, one, other, span)
        assert left == right or ((span.slm_start == 0 or span.llm_start == 0) and left.strip() == right.strip())
        joined += left
        # Brute force: no two inner cuts at the same byte.
        inner = [
            {len(said(TOKENIZERS[n], e.examples[0], start, cut)) for cut in range(start + 1, stop)}
            for n, e, start, stop in (
                (one, got.slm, span.slm_start, span.slm_stop),
                (other, got.llm, span.llm_start, span.llm_stop),
            )
        ]
        assert not inner[0] & inner[1] or left != right
    assert (prompt + target).encode().endswith(joined.removeprefix(b" "))
    assert all(a.slm_stop == b.slm_start and a.llm_stop == b.llm_start for a, b in pairwise(got.spans[0]))


@pytest.mark.parametrize(("one", "other"), PAIRS)
@given(prompt=TEXT, target=TARGET, max_length=st.integers(4, 30))
@settings(max_examples=12)
def test_cutting_records_short_only_takes_spans_away(
    one: str, other: str, prompt: str, target: str, max_length: int
) -> None:
    whole, cut = aligned(one, other, prompt, target), aligned(one, other, prompt, target, max_length)
    slm, llm = (len(e.examples[0].input_ids) - e.examples[0].target_start for e in (cut.slm, cut.llm))
    assert cut.spans[0] == tuple(s for s in whole.spans[0] if s.slm_stop <= slm and s.llm_stop <= llm)


@given(pieces=st.lists(st.one_of(TEXT, SPECIAL), min_size=1, max_size=6), prompt=st.one_of(TEXT, SPECIAL))
@settings(max_examples=12)
def test_names_of_special_tokens_in_a_text_are_text(pieces: list[str], prompt: str) -> None:
    target = "x" + "".join(pieces)
    got = aligned("gpt2", "other", prompt, target)
    for span in got.spans[0][:-1]:
        left, right = both_said(got, "gpt2", "other", span)
        assert left == right
        assert left in (prompt + target).encode()
    # SentencePiece adds a space after each special token; no span may pair different words for it.
    got = aligned("sentencepiece", "gpt2", prompt, target)
    for span in got.spans[0][:-1]:
        left, right = both_said(got, "sentencepiece", "gpt2", span)
        assert left.replace(b" ", b"") == right.replace(b" ", b"")


def test_records_end_together_only_where_both_keep_the_end() -> None:
    prompt, target = "the patient?", " rests in the evening; the fever is better"
    got = aligned("sentencepiece", "gpt2", prompt, target)
    slm, llm = got.slm.examples[0], got.llm.examples[0]
    last = got.spans[0][-1]
    assert slm.input_ids[slm.target_start + last.slm_start :] == (TOKENIZERS["sentencepiece"].eos_token_id,)
    assert llm.input_ids[llm.target_start + last.llm_start :] == (TOKENIZERS["gpt2"].eos_token_id,)
    without = aligned("sentencepiece", "gpt2", prompt, target, eos=False)
    assert without.spans[0] == got.spans[0][:-1]
    short = aligned("sentencepiece", "gpt2", prompt, target, max_length=12)
    assert short.spans[0]
    for span in short.spans[0]:
        left, right = both_said(short, "sentencepiece", "gpt2", span)
        assert left == right


def test_one_tokenizer_aligns_token_by_token() -> None:
    got = aligned("gpt2", "gpt2", "the café?", " is 🌡️ better")
    tokens = len(got.slm.examples[0].input_ids) - got.slm.examples[0].target_start
    assert got.spans[0] == tuple(Span(slm_start=i, slm_stop=i + 1, llm_start=i, llm_stop=i + 1) for i in range(tokens))


def test_what_a_normaliser_changed_lies_in_one_span() -> None:
    got = aligned("gpt2", "nfc", "the", " fever cafe\u0301 is better")
    said_by = [both_said(got, "gpt2", "nfc", span) for span in got.spans[0][:-1]]
    differing = [pair for pair in said_by if pair[0] != pair[1]]
    assert differing == [("e\u0301".encode(), "é".encode())]
    assert (b" is", b" is") in said_by


def test_a_text_may_hold_sentencepieces_own_space() -> None:
    got = aligned("sentencepiece", "gpt2", "the ", " x\u2581y z")
    said_by = [both_said(got, "sentencepiece", "gpt2", span) for span in got.spans[0][:-1]]
    (changed,) = (pair for pair in said_by if pair[0] != pair[1])
    assert changed[0] == changed[1].replace("\u2581".encode(), b" ")
    assert said_by[0][0].startswith(b" ")
    assert said_by[-1] != changed


def test_a_stretch_that_is_too_long_is_not_compared() -> None:
    cuts = [0, *[None] * (LONGEST_SPAN - 1), 500, 501]
    assert len(align(cuts, [0, 500, 501])) == 2
    assert [s.llm_start for s in align([0, None, *cuts[1:]], [0, 500, 501])] == [1]
    assert align([0, 3], [1, 2]) == ()


def test_shared_tokens_have_the_same_bytes() -> None:
    got = aligned("sentencepiece", "gpt2", "", "the")
    slm_ids, llm_ids = got.shared.slm_ids.tolist(), got.shared.llm_ids.tolist()
    left, right = token_bytes(TOKENIZERS["sentencepiece"]), token_bytes(TOKENIZERS["gpt2"])
    assert (slm_ids[-1], llm_ids[-1]) == (2, TOKENIZERS["gpt2"].eos_token_id)
    assert all(left[i] == right[j] for i, j in zip(slm_ids[:-1], llm_ids[:-1], strict=True))
    assert len(set(slm_ids)) == len(slm_ids) == len(set(llm_ids)) == len(llm_ids)
    # Brute force; bytes and characters that are written alike count once.
    assert len(slm_ids) - 1 == len({*left[3:]} & {*right} - {b"<|endoftext|>"})
    spelled = TOKENIZERS["sentencepiece"].convert_ids_to_tokens(slm_ids)
    assert "a" in spelled
    assert "<0x61>" not in spelled
    assert "<0xC3>" in spelled


def test_tokenizers_that_write_no_bytes_are_refused() -> None:
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match=r"distillation\.alignment.*WordPiece"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=pieces))
    with pytest.raises(ModelError, match="fast"):
        token_bytes(object())
