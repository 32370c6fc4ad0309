"""The paper's experiments: they say what was published, read the published data, and run; models of their size fit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcollm_privacy.errors import ConfigError, ModelError
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config
from secure_fedcollm.data import load as load_data
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.models import LORA_TARGETS, load
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.run import run_embedded
from secure_fedcollm.strict_build import build
from secure_fedcollm.sweep_cells import Axis, new_cells

ROOT = Path(__file__).parents[1]
Find = Callable[[str], Path]
# hub id, folder, published training and test records, the right prompt for a question
TASKS: dict[str, tuple[str, str, int, int, str]] = {
    "cqa": ("hub:tau/commonsense_qa", "commonsense_qa", 9741, 1221, "{}"),
    "obqa": ("hub:allenai/openbookqa:main", "openbookqa", 4957, 500, "{}"),
    "arc_c": ("hub:allenai/ai2_arc:ARC-Challenge", "arc_challenge", 1119, 1172, "Question: {}\nAnswer:"),
    "arc_e": ("hub:allenai/ai2_arc:ARC-Easy", "arc_easy", 2251, 2376, "Question: {}\nAnswer:"),
}
SETTINGS: dict[str, tuple[str, str, float]] = {
    "s1": ("openai-community/gpt2", "openai-community/gpt2-large", 3e-4),
    "s2": ("facebook/opt-1.3b", "facebook/opt-6.7b", 3e-5),
    "s3": ("princeton-nlp/Sheared-LLaMA-1.3B", "meta-llama/Llama-2-7b-hf", 3e-5),
}
ALL = [(task, setting) for task in TASKS for setting in SETTINGS]
METHODS = sorted(path.stem for path in (ROOT / "configs" / "method").glob("*.yaml"))
FEW_STEPS = [
    "data.max_records_per_site=8",
    "federation.rounds=1",
    "federation.local_steps=1",
    "distillation.steps=2",
    "evaluation.max_records=4",
    "device=cpu",
]


def composed(task: str, setting: str, *overrides: str) -> Config:
    return build(Config, compose_config([f"experiment=paper_{task}_{setting}", *overrides]))


# ------------------------------------------------------------------------------------------- what they say


def test_there_is_an_experiment_for_every_task_in_every_setting_and_no_other() -> None:
    files = {path.stem for path in (ROOT / "configs" / "experiment").glob("paper_*.yaml")}
    assert files == {f"paper_{task}_{setting}" for task, setting in ALL}


@pytest.mark.parametrize(("task", "setting"), ALL)
def test_an_experiment_is_the_papers(task: str, setting: str) -> None:
    config = composed(task, setting)
    slm, llm, rate = SETTINGS[setting]
    assert (config.model.slm, config.model.llm, config.data.path) == (slm, llm, TASKS[task][0])
    assert (config.method, config.private, config.privacy, config.data.declared) == ("FedCoLLM", False, None, "public")
    assert (config.federation.sites, config.data.partition, config.data.public_fraction) == (4, "iid", 0.2)
    assert (config.adapter.r, config.adapter.aggregation) == (8, "factor_average")
    slower = task == "arc_e" and setting != "s1"  # FedMKT's rates on ARC-E
    assert config.distillation.llm_learning_rate == (2e-5 if slower else rate)
    assert config.federation.learning_rate == (2e-5 if slower and setting == "s3" else rate)
    assert config.distillation.slm_learning_rate == config.federation.learning_rate
    assert config.evaluation.max_records >= TASKS[task][3]


def test_the_families_adapters_are_where_table_2_puts_them() -> None:
    assert LORA_TARGETS["gpt2"] == ("c_attn",)
    assert LORA_TARGETS["opt"] == ("q_proj", "k_proj", "v_proj", "out_proj")
    assert LORA_TARGETS["llama"] == ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(("task", "setting"), [("cqa", "s1"), ("arc_e", "s3")])
def test_every_method_is_one_override_away_and_trains_as_long(task: str, setting: str) -> None:
    own = composed(task, setting)
    for method in METHODS:
        config = composed(task, setting, f"method={method}")
        federation = config.federation
        steps = federation.rounds * federation.local_steps
        if method == "zero_shot":
            assert federation.rounds == 0
        elif federation.pool:  # five times the records: the same passes over them are five times the steps
            assert steps == 5 * own.federation.rounds * own.federation.local_steps
            assert federation.rounds // config.evaluation.every == own.federation.rounds
        else:
            assert steps == own.federation.rounds * own.federation.local_steps
        distils = method in ("fedcollm", "fedavg_public", "llm_to_slm")
        assert method == "zero_shot" or (config.distillation.steps > 0) is distils
        assert (config.distillation.kd_weight > 0) is (method != "fedavg_public")
        assert config.distillation.train_llm is (method != "llm_to_slm")
        of_llm = federation.site_model == "llm"
        rate = own.distillation.llm_learning_rate if of_llm else own.federation.learning_rate
        assert federation.learning_rate == rate


@pytest.mark.parametrize("privacy", ["standard", "strict"])
def test_differential_privacy_can_be_added_and_must_be_said(privacy: str) -> None:
    config = composed("arc_e", "s1", "private=true", f"privacy={privacy}")
    assert config.privacy is not None
    assert config.guaranteed
    with pytest.raises(ConfigError, match="private"):
        composed("arc_e", "s1", f"privacy={privacy}")


def test_a_row_of_the_table_is_one_sweep(tmp_path: Path) -> None:
    axes = [Axis(field="method", values=tuple(METHODS)), Axis(field="seed", values=("0",))]
    cells = new_cells(tmp_path, axes, ["experiment=paper_arc_e_s1"], compose_config)
    assert len(cells) == len(METHODS)
    assert [cell.refusal for cell in cells if cell.config is None] == []
    assert len({(cell.config or {})["method"] for cell in cells}) == len(METHODS)


# ------------------------------------------------------------------------------------------- what they read


def rows_of(folder: Path, pattern: str) -> list[dict[str, Any]]:
    (file,) = folder.glob(pattern)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_the_published_data_divides_as_published_and_a_round_is_one_pass(task: str, shared_data: Find) -> None:
    _, folder, train, test, prompt = TASKS[task]
    config = composed(task, "s1", f"data.path={shared_data(folder)}")
    data = load_data(config.data, sites=config.federation.sites, seed=0, unit="record")
    sites = [len(site.train) + len(site.held_out) for site in data.sites]
    assert sum(sites) + len(data.public_train) == train
    assert len(data.public_test) == test
    assert len(sites) == 4
    assert max(sites) - min(sites) <= 1
    assert abs(len(data.public_train) - train / 5) <= 4  # equal questions stay together
    assert sum(len(site.held_out) for site in data.sites) <= 8
    longest = max(len(site.train) for site in data.sites)
    assert config.federation.local_steps == math.ceil(longest / config.federation.batch_size)
    assert abs(config.distillation.steps - len(data.public_train) / config.distillation.batch_size) < 2

    # lm-evaluation-harness: context, one space, choice
    raw = rows_of(shared_data(folder), "dev_*" if task == "cqa" else "*est.jsonl")
    for row, record in zip(raw, data.public_test, strict=True):
        assert record.prompt == prompt.format(row["question"]["stem"])
        assert record.choices == tuple(" " + choice["text"] for choice in row["question"]["choices"])
        right = [choice["text"] for choice in row["question"]["choices"] if choice["label"] == row["answerKey"].strip()]
        assert [record.target] == [" " + text for text in right]
    assert not data.append_eos


# ------------------------------------------------------------------------------------------- that they run


def run_few_steps(task: str, setting: str, shared_data: Find, shared_model: Find, out: Path, *more: str) -> Any:
    plain = compose_config(
        [
            f"experiment=paper_{task}_{setting}",
            f"data.path={shared_data(TASKS[task][1])}",
            f"model.slm={shared_model('stories-sheared-3L')}",
            f"model.llm={shared_model('stories260K')}",
            f"output_dir={out}",
            *FEW_STEPS,
            *more,
        ]
    )
    config = build(Config, plain)
    return run_embedded(config, RunFolder.create(config.output_dir, config.name, plain), RunProgress(quiet=True))


def changed(adapter: Path) -> bool:
    from safetensors.numpy import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    values = [value for name, value in tensors.items() if "lora_B" in name]
    assert values
    assert all(np.isfinite(value).all() for value in tensors.values())
    return any(np.abs(value).max() > 0 for value in values)


def test_the_papers_method_runs_end_to_end_in_its_own_precision(
    shared_data: Find, shared_model: Find, tmp_path: Path
) -> None:
    # S3's: bfloat16 weights, activation checkpointing; and a device map, which has one device to choose from here.
    out = tmp_path / "out"
    summary = run_few_steps("arc_e", "s3", shared_data, shared_model, out, "model.llm_device_map=auto")
    assert summary["private"] is False
    assert "NOT PRIVATE" in summary["note"]
    for name in ("slm", "llm"):
        for metrics in (summary[name]["before"], summary[name]["after"]):
            assert all(math.isfinite(value) for value in metrics.values())
            assert 0.0 <= metrics["acc"] <= 1.0
        assert changed(out / f"{name}_adapter")


@pytest.mark.slow
def test_the_papers_experiment_runs_with_differential_privacy(
    shared_data: Find, shared_model: Find, tmp_path: Path
) -> None:
    more = ["private=true", "privacy=standard", "privacy.expected_batch_size=2"]
    summary = run_few_steps("obqa", "s1", shared_data, shared_model, tmp_path / "out", *more)
    assert summary["private"] is True
    assert len(summary["sites"]) == 4
    assert all(0 < site["epsilon"] <= 8.0 for site in summary["sites"].values())
    assert changed(tmp_path / "out" / "slm_adapter")


# ------------------------------------------------------------------------------------------- large models


def _load(path: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"dtype": "float32", "device": "cpu", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    return load(str(path), **(given | {"target_modules": None, "seed": 0} | options))


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"], ids=["named", "auto"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="auto takes the accelerator")
def test_a_device_map_places_and_changes_nothing(
    tiny_checkpoint: Callable[..., Path], architecture: str, device_map: Any
) -> None:
    ids = torch.tensor([[5, 70, 200, 8, 9, 33]])
    found = []
    for chosen in (None, device_map):
        adapted = _load(tiny_checkpoint(architecture), device_map=chosen)
        adapted.write(np.random.default_rng(0).standard_normal(adapted.spec.dimension).astype("float32"))
        adapted.model.eval()
        logits = adapted.model(input_ids=ids).logits
        torch.autograd.backward(logits.square().mean(), inputs=adapted.train_only(adapted.spec))
        gradients = [p.grad for n, p in adapted.model.named_parameters() if n in adapted.spec.names]
        found.append((adapted.spec, adapted.read(), logits.detach(), gradients))
    assert found[0][0] == found[1][0]
    assert (found[0][1] == found[1][1]).all()
    assert torch.equal(found[0][2], found[1][2])
    assert all(torch.equal(one, other) for one, other in zip(found[0][3], found[1][3], strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device_map": {"model.nonsense": "cpu"}}, r"no module 'model\.nonsense'"),
        ({"device_map": {"": "disk"}}, r"would stay on disk.*model\.dtype=bfloat16"),
        ({"device_map": {"": "cuda:7"}}, "cannot be loaded: .*CUDA"),
        ({"device_map": "everywhere"}, "cannot be loaded: .*'balanced'"),
        ({"device": "cuda"}, "cannot be put on device=cuda: .*CUDA"),
    ],
    ids=["module", "disk", "device", "strategy", "no accelerator"],
)
def test_a_placement_that_cannot_be_is_refused(
    tiny_checkpoint: Callable[..., Path], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        _load(tiny_checkpoint("llama"), **options)


def test_only_known_strategies_are_configured() -> None:
    assert composed("cqa", "s3", "model.llm_device_map=balanced").model.llm_device_map == "balanced"
    with pytest.raises(ConfigError, match=r"model\.llm_device_map.*auto \| balanced"):
        composed("cqa", "s3", "model.llm_device_map=everywhere")


@pytest.mark.slow
def test_a_model_spread_over_two_devices_trains_and_co_tunes_without_mixing_them() -> None:
    cases = ["llama,cpu", "gpt2,gpu:0", "opt,cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.two_devices", *cases], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for case, said in zip(cases, json.loads(done.stdout), strict=True):
        assert said["ends"] == ["cpu", "cpu"], case  # it begins on the accelerator
        assert said["trained"] == said["co-tuned"] == ["cpu", "gpu:0"], case  # both halves learn
        assert said["slm"] == case.partition(",")[2]
        assert "at least two devices, gpu:0 and cpu" in said["control"]


# ------------------------------------------------------------------------------------------- models of the hub


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a model behind a licence, and for one that is not there."""

    def do_GET(self) -> None:
        gated = "/gated/" in self.path
        self.send_response(401 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


ERRORS = """
import sys
from fedcollm_privacy.errors import ModelError
from secure_fedcollm.checkpoints import read_checkpoint
for name in sys.argv[1:]:
    try:
        read_checkpoint(name, "float32")
    except ModelError as error:
        print(error)
"""


def errors_of(names: list[str], home: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ERRORS, *names],
        env={**os.environ, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_gated_model_says_where_to_ask_and_how_to_log_in(hub: str, tmp_path: Path) -> None:
    gated, absent = errors_of(["some/gated", "some/absent"], tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0")
    assert gated.startswith("some/gated cannot be loaded: its authors give access on request; ask at https://hugg")
    assert "huggingface.co/some/gated" in gated
    assert "HF_TOKEN" in gated
    assert absent.startswith("some/absent cannot be loaded: some/absent is not a local folder and is not a valid model")


def test_without_network_a_hub_id_says_so(tmp_path: Path) -> None:
    slm, llm, _ = SETTINGS["s3"]
    for name, said in zip((slm, llm), errors_of([slm, llm], tmp_path, HF_HUB_OFFLINE="1"), strict=True):
        assert said.startswith(f"{name} cannot be loaded: We couldn't connect")
        assert "needs network or a filled cache" in said
