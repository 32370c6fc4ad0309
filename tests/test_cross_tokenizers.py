"""Models with different tokenizers teach each other: one co-tuning call and a whole run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcollm_privacy.errors import ModelError
from secure_fedcollm import distillation
from secure_fedcollm.alignment import AlignedTokens, align_records, check_tokenizers, tokenize_public
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config, DistillationConfig
from secure_fedcollm.distillation import CoTuningReport, co_tune
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.losses import target_hidden_states
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.records import Record
from secure_fedcollm.run import run_embedded
from secure_fedcollm.strict_build import build
from secure_fedcollm.tokenization import TokenDataset, collate

from .conftest import QUESTIONS
from .two_tokenizers import byte_level, load_trained, save_checkpoint, sentencepiece

RECORDS = [Record(prompt=p, target=t, site=None, unit=str(i)) for i, (p, t) in enumerate(QUESTIONS)]
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("two")
    return (
        save_checkpoint(folder / "slm", byte_level(), width=32),
        save_checkpoint(folder / "llm", sentencepiece(), width=48),
    )


@pytest.fixture
def two(checkpoints: Pair) -> tuple[AdaptedModel, AdaptedModel]:
    return load_trained(checkpoints[0]), load_trained(checkpoints[1])


def tokens_of(two: tuple[AdaptedModel, AdaptedModel]) -> AlignedTokens:
    return align_records(RECORDS, two[0].tokenizer, two[1].tokenizer, max_length=64, append_eos=True)


def tune(
    two: tuple[AdaptedModel, AdaptedModel], tokens: AlignedTokens | TokenDataset, **changes: Any
) -> CoTuningReport:
    config = DistillationConfig(
        **{
            "steps": 1,
            "warm_start_steps": 0,
            "batch_size": 5,
            "kd_weight": 1.0,
            "temperature": 1.0,
            "direction": "forward",
            "top_k": None,
            "alignment": "common_support",
            "train_slm": True,
            "train_llm": True,
            "slm_learning_rate": 1e-2,
            "llm_learning_rate": 1e-2,
        }
        | changes
    )
    return co_tune(slm=two[0], llm=two[1], tokens=tokens, config=config, train_slm_a=True, seed=4, on_step=lambda: None)


# Which pairs are taken


def test_a_pair_with_two_tokenizers_needs_the_option(two: tuple[AdaptedModel, AdaptedModel]) -> None:
    with pytest.raises(ModelError, match=r"different vocabularies.*distillation\.alignment=common_support"):
        check_tokenizers(*two, "same")
    check_tokenizers(*two, "common_support")
    assert isinstance(tokenize_public(RECORDS, *two, max_length=64, append_eos=True), AlignedTokens)


def test_a_pair_with_one_tokenizer_is_co_tuned_as_ever(
    load_tiny: Callable[..., AdaptedModel], tiny_tokens: TokenDataset
) -> None:
    slm, llm = load_tiny("llama", trained=True), load_tiny("llama", width=48, trained=True)
    check_tokenizers(slm, llm, "common_support")
    tokens = tokenize_public(RECORDS, slm, llm, max_length=64, append_eos=True)
    assert tokens == tiny_tokens
    start = slm.read(), llm.read()
    results = []
    for alignment in ("same", "common_support"):
        slm.write(start[0])
        llm.write(start[1])
        results.append((tune((slm, llm), tokens, alignment=alignment), slm.read().tobytes(), llm.read().tobytes()))
    assert results[0] == results[1]
    # The other way, through spans of one token each, is the same KL but for special tokens, which it counts as one.
    aligned = align_records(RECORDS, slm.tokenizer, llm.tokenizer, max_length=64, append_eos=True)
    slm.write(start[0])
    llm.write(start[1])
    report = tune((slm, llm), aligned)
    assert (report.slm_ce, report.llm_ce) == pytest.approx((results[0][0].slm_ce, results[0][0].llm_ce), rel=1e-5)
    assert (report.slm_kl, report.llm_kl) == pytest.approx((results[0][0].slm_kl, results[0][0].llm_kl), rel=0.05)


def test_an_output_layer_without_a_row_for_every_token_is_refused(two: tuple[AdaptedModel, AdaptedModel]) -> None:
    two[0].tokenizer.add_tokens(["a fever!"])
    with pytest.raises(ModelError, match="output rows"):
        check_tokenizers(*two, "common_support")


# One step


def test_each_model_reads_its_own_tokens_and_learns_from_the_other(two: tuple[AdaptedModel, AdaptedModel]) -> None:
    tokens = tokens_of(two)
    start = two[0].read(), two[1].read()
    moved = {}
    for weight in (0.0, 1.0):
        two[0].write(start[0])
        two[1].write(start[1])
        report = tune(two, tokens, kd_weight=weight, batch_size=8)
        moved[weight] = two[0].read(), two[1].read()
        for adapted, side, told in ((two[0], tokens.slm, report.slm_ce), (two[1], tokens.llm, report.llm_ce)):
            adapted.write(start[0] if adapted is two[0] else start[1])
            batch = collate(side.examples, side.pad_token_id)
            usual = adapted.model(
                input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT
            ).loss
            assert told == pytest.approx(float(usual.detach()), rel=1e-5)
        assert (report.slm_kl > 0.1 and report.llm_kl > 0.1) is (weight > 0)
    for side in (0, 1):
        assert np.abs(moved[0.0][side] - start[side]).max() > 1e-3
        assert np.abs(moved[1.0][side] - moved[0.0][side]).max() > 1e-4


def test_spans_of_a_batch_point_at_the_rows_that_say_the_same(
    two: tuple[AdaptedModel, AdaptedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, seen = tokens_of(two), list[dict[str, Any]]()
    real = distillation.cross_tokenizer_loss
    monkeypatch.setattr(distillation, "cross_tokenizer_loss", lambda **how: (seen.append(how), real(**how))[1])
    tune(two, tokens, batch_size=8)
    assert len(seen) == 2
    for how, student, teacher in zip(seen, two, reversed(two), strict=True):
        compared = 0
        for start, stop, first, last in how["aligned"].spans_S4.tolist():
            # Decoding is the tokenizers' own; it leaves out special tokens and a text's first space.
            texts = [
                adapted.tokenizer.decode(labels.tolist(), skip_special_tokens=True).strip()
                for adapted, labels in (
                    (student, how["labels_N"][start:stop]),
                    (teacher, how["teacher_labels_M"][first:last]),
                )
            ]
            assert texts[0] == texts[1]
            compared += len(texts[0]) > 0
        assert compared > 40
        assert len(how["student_NH"]) == len(how["labels_N"]) != len(how["teacher_labels_M"])


def test_a_frozen_model_only_teaches(two: tuple[AdaptedModel, AdaptedModel]) -> None:
    tokens, start = tokens_of(two), (two[0].read(), two[1].read())
    tune(two, tokens, train_llm=False)
    assert two[1].read().tobytes() == start[1].tobytes()
    assert two[0].read().tobytes() != start[0].tobytes()


def test_a_student_comes_closer_to_its_teacher_than_without_it(two: tuple[AdaptedModel, AdaptedModel]) -> None:
    tokens, start = tokens_of(two), two[0].read()
    apart = []
    for weight in (0.0, 5.0):
        two[0].write(start)
        tune(two, tokens, kd_weight=weight, steps=12, batch_size=8, train_llm=False)
        # What is left between them: measured by one more step of weight, on all records.
        apart.append(tune(two, tokens, batch_size=8, train_slm=False, train_llm=False).slm_kl)
    assert apart[1] < 0.8 * apart[0]


# A whole run


def test_a_run_with_two_tokenizers(checkpoints: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCOLLM_HOME", str(tmp_path / "home"))
    generator = np.random.default_rng(0)
    words = ["the", "patient", "rests", "fever", "better", "evening", "cure", "sleeps"]
    notes = tmp_path / "notes.jsonl"
    with notes.open("w") as file:
        for row in range(60):
            text = f"{' '.join(generator.choice(words, size=6))} {row}."
            file.write(json.dumps({"text": text, "site": f"s{row % 3}"}) + "\n")

    def start(*overrides: str) -> dict[str, Any]:
        given = [
            f"data.path={notes}",
            "data.declared=public",
            "data.partition=column",
            "data.site_field=site",
            f"model.slm={checkpoints[0]}",
            f"model.llm={checkpoints[1]}",
            f"output_dir={tmp_path / 'out'}",
            "federation.rounds=1",
            "federation.local_steps=2",
            "distillation.steps=3",
            "distillation.batch_size=4",
            "privacy.expected_batch_size=8",
            "evaluation.max_records=4",
            "evaluation.generations=0",
            "data.max_length=32",
            "adapter.r=2",
        ]
        plain = compose_config([*given, *overrides])
        config = build(Config, plain)
        folder = RunFolder.create(config.output_dir, config.name, plain)
        return run_embedded(config, folder, RunProgress(quiet=True))

    with pytest.raises(ModelError, match="common_support"):
        start()
    summary = start("distillation.alignment=common_support", f"output_dir={tmp_path / 'aligned'}")
    for model in ("slm", "llm"):
        assert summary[model]["before"] != summary[model]["after"]
    lines = [json.loads(line) for line in (tmp_path / "aligned" / "metrics.jsonl").read_text().splitlines()]
    (told,) = (line["distillation"] for line in lines if line.get("distillation"))
    assert all(np.isfinite(value) and value > 0 for value in told.values())


def test_hidden_states_of_both_sides_are_as_many_as_their_targets(two: tuple[AdaptedModel, AdaptedModel]) -> None:
    tokens = tokens_of(two)
    for adapted, side in ((two[0], tokens.slm), (two[1], tokens.llm)):
        hidden_NH, labels_N = target_hidden_states(
            adapted.trunk_and_head()[0], collate(side.examples, side.pad_token_id)
        )
        targets = sum(len(e.input_ids) - e.target_start for e in side.examples)
        assert len(hidden_NH) == len(labels_N) == targets
