"""CommonsenseQA, OpenBookQA, ARC-Easy and ARC-Challenge: from the published files to a score and through a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config
from secure_fedcollm.data import load
from secure_fedcollm.evaluation import evaluate
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.run import run_embedded
from secure_fedcollm.strict_build import build

TASKS = ["commonsense_qa", "openbookqa", "arc_easy", "arc_challenge"]
Find = Callable[[str], Path]


@pytest.mark.parametrize("task", TASKS)
def test_accuracy_equals_scoring_one_choice_at_a_time(task: str, shared_data: Find, shared_model: Find) -> None:
    config = build(Config, compose_config([f"data={task}", f"data.path={shared_data(task)}"]))
    records = load(config.data, sites=4, seed=0, unit="record").public_test[:10]
    folder = shared_model("stories260K")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    metrics = evaluate(model, tokenizer, records, max_length=256, append_eos=False, batch_tokens=2048)
    right = right_norm = 0
    for record in records:
        context = tokenizer(record.prompt)["input_ids"]
        scores = []
        for choice in record.choices:
            ids = torch.tensor([tokenizer(record.prompt + choice)["input_ids"]])
            with torch.no_grad():
                log_probabilities = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            target = ids[0, len(context) :]
            scores.append(float(log_probabilities[len(context) - 1 :].gather(1, target[:, None]).sum()))
        lengths = [len(choice.removeprefix(" ")) for choice in record.choices]
        right += int(np.argmax(scores)) == record.answer
        right_norm += int(np.argmax(np.array(scores) / lengths)) == record.answer
    assert metrics["acc"] == pytest.approx(right / len(records))
    assert metrics["acc_norm"] == pytest.approx(right_norm / len(records))


@pytest.mark.parametrize(
    "task", ["arc_easy", *(pytest.param(t, marks=pytest.mark.slow) for t in TASKS if t != "arc_easy")]
)
def test_a_run_on_the_task_scores_the_published_test_split(
    task: str, shared_data: Find, shared_model: Find, tmp_path: Path
) -> None:
    plain = compose_config(
        [
            f"data={task}",
            f"data.path={shared_data(task)}",
            f"model.slm={shared_model('stories-sheared-3L')}",
            f"model.llm={shared_model('stories260K')}",
            f"output_dir={tmp_path / 'out'}",
            "data.max_records_per_site=40",
            "data.max_length=96",
            "federation.rounds=1",
            "federation.local_steps=1",
            "distillation.steps=1",
            "privacy.expected_batch_size=4",
            "evaluation.max_records=6",
        ]
    )
    config = build(Config, plain)
    summary = run_embedded(config, RunFolder.create(config.output_dir, config.name, plain), RunProgress(quiet=True))
    assert "published test split" in summary["note"]
    for name in ("slm", "llm"):
        assert 0.0 <= summary[name]["after"]["acc"] <= 1.0
        assert "acc_norm" in summary[name]["before"]
