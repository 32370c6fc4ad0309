"""Adapters: published sizes, exact transport, exact re-basing, and a refusal for whatever cannot carry one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from fedcollm_privacy.errors import ModelError
from fedcollm_privacy.messages import AdapterSpec
from secure_fedcollm.models import LORA_TARGETS, AdaptedModel, check_same_tokenizer, load, merged_delta, rebase

LoadTiny = Callable[..., AdaptedModel]
# peft asks transformers in a way that transformers has deprecated.
PLAIN_PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.tensor([[5, 70, 200, 8, 9, 33], [1, 2, 3, 4, 5, 6]])


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


# Sizes


@PLAIN_PEFT
@pytest.mark.parametrize(
    ("config", "published"),
    [
        # FedCoLLM, table 2: 0.29 M and twice 3.15 M at r = 8; the shapes are the published models'.
        (GPT2Config(), 294_912),
        (OPTConfig(hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32), 3_145_728),
        (
            LlamaConfig(hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16),
            3_145_728,
        ),
    ],
    ids=["gpt2-small", "opt-1.3b", "sheared-llama-1.3b"],
)
def test_targets_give_the_published_number_of_parameters(config: Any, published: int) -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        targets = list(LORA_TARGETS[config.model_type])
        lora = LoraConfig(r=8, target_modules=targets, fan_in_fan_out=config.model_type == "gpt2")
        model = get_peft_model(base, lora)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == published


@pytest.mark.parametrize("architecture", LORA_TARGETS)
def test_every_layer_carries_every_target(load_tiny: LoadTiny, architecture: str) -> None:
    adapted = load_tiny(architecture)
    carriers = {name.split(".lora_")[0] for name in adapted.spec.names}
    for target in LORA_TARGETS[architecture]:
        assert sum(name.endswith(f".{target}") for name in carriers) == 2, target
    assert len(carriers) == 2 * len(LORA_TARGETS[architecture])
    assert len(adapted.spec.names) == 2 * len(carriers)
    assert adapted.spec.dimension == adapted.read().size


def test_all_linear_leaves_the_head_alone(load_tiny: LoadTiny, architecture: str) -> None:
    adapted = load_tiny(architecture, target_modules=["all-linear"])
    assert adapted.spec.dimension > load_tiny(architecture).spec.dimension
    head = adapted.model.get_base_model().get_output_embeddings()
    assert not any("lora" in name for name, _ in head.named_parameters())


# The start


def test_a_fresh_adapter_changes_nothing(
    load_tiny: LoadTiny, tiny_checkpoint: Callable[..., Path], architecture: str
) -> None:
    adapted = load_tiny(architecture)
    assert all((delta == 0).all() for delta in merged_delta(adapted).values())
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(architecture), dtype=torch.float32)
    assert torch.equal(logits(adapted.model), logits(base))


def test_a_starts_with_orthonormal_rows(load_tiny: LoadTiny, architecture: str) -> None:
    for name, a in load_tiny(architecture).model.named_parameters():
        if "lora_A" in name:
            assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 123_456_789])
def test_all_parties_start_equal(load_tiny: LoadTiny, seed: int) -> None:
    torch.manual_seed(1)
    one = load_tiny("llama", seed=seed)
    torch.manual_seed(2)
    other = load_tiny("llama", seed=seed)
    assert (one.read() == other.read()).all()
    assert one.spec == other.spec


def test_seeds_differ_in_a_only(load_tiny: LoadTiny) -> None:
    one, other = load_tiny("llama", seed=0), load_tiny("llama", seed=1)
    assert (one.read() != other.read()).any()
    assert one.spec == other.spec
    assert torch.equal(logits(one.model), logits(other.model))


def test_the_spec_names_the_base_model_and_its_vocabulary(load_tiny: LoadTiny) -> None:
    one, other = load_tiny("gpt2"), load_tiny("gpt2", attn_pdrop=0.5, vocab_size=320)
    assert one.spec.names == other.spec.names
    assert one.spec.digest != other.spec.digest
    assert one.shared_spec("rebase").digest != other.shared_spec("rebase").digest


def test_a_bfloat16_base_keeps_a_float32_adapter(load_tiny: LoadTiny, architecture: str) -> None:
    adapted = load_tiny(architecture, dtype="bfloat16", trained=True)
    types = {p.dtype for name, p in adapted.model.named_parameters() if "lora_" not in name}
    assert types == {torch.bfloat16}
    assert {p.dtype for name, p in adapted.model.named_parameters() if "lora_" in name} == {torch.float32}
    vector = adapted.read() * np.float32(1.000_001)
    adapted.write(vector)
    assert (adapted.read() == vector).all()
    adapted.trunk_and_head()


def test_lora_dropout_is_in_the_model_as_configured(load_tiny: LoadTiny) -> None:
    for rate in (0.0, 0.25):
        model = load_tiny("llama", lora_dropout=rate).model
        rates = [m.p for n, m in model.named_modules() if "lora_dropout" in n and isinstance(m, nn.Dropout)]
        assert rates == ([rate] * 8 if rate else [])


def test_a_tokenizer_without_pad_gets_one(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("gpt2")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    assert _load(tmp_path).tokenizer.pad_token_id == tokenizer.eos_token_id


# Vectors


@given(seed=st.integers(0, 2**32 - 1), aggregation=st.sampled_from(["rebase", "freeze_a", "factor_average"]))
@settings(max_examples=20, deadline=None)
def test_what_is_written_is_read(any_adapted: AdaptedModel, seed: int, aggregation: Any) -> None:
    spec = any_adapted.shared_spec(aggregation)
    before = any_adapted.read()
    vector = np.random.default_rng(seed).standard_normal(spec.dimension).astype(np.float32)
    any_adapted.write(vector, spec)
    assert (any_adapted.read(spec) == vector).all()
    others = AdapterSpec(
        names=tuple(n for n in any_adapted.spec.names if n not in spec.names),
        shapes=tuple(
            s for n, s in zip(any_adapted.spec.names, any_adapted.spec.shapes, strict=True) if n not in spec.names
        ),
        base_model="",
    )
    if others.names:
        kept = any_adapted.read(others)
        any_adapted.write(before)
        assert (any_adapted.read(others) == kept).all()


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def any_adapted(request: pytest.FixtureRequest, load_tiny: LoadTiny) -> AdaptedModel:
    return load_tiny(request.param)


def test_read_is_in_the_order_of_the_spec(load_tiny: LoadTiny) -> None:
    adapted = load_tiny("opt")
    adapted.write(np.arange(adapted.spec.dimension, dtype=np.float32))
    start, parameters = 0, dict(adapted.model.named_parameters())
    for name, shape in zip(adapted.spec.names, adapted.spec.shapes, strict=True):
        want = torch.arange(start, start + np.prod(shape)).reshape(shape)
        assert torch.equal(parameters[name].detach().long(), want)
        start += int(np.prod(shape))


def test_what_was_read_does_not_change_with_the_model(load_tiny: LoadTiny) -> None:
    adapted = load_tiny("llama")
    first = adapted.read()
    copy = first.copy()
    adapted.write(np.ones_like(first))
    assert (first == copy).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_adapters_are_refused_and_the_old_one_stays(load_tiny: LoadTiny, value: float) -> None:
    adapted = load_tiny("llama", trained=True)
    before = adapted.read()
    vector = before * 2
    vector[-1] = value
    with pytest.raises(ModelError, match="NaN or infinity"):
        adapted.write(vector)
    assert (adapted.read() == before).all()


@pytest.mark.parametrize("change", [-1, 1])
def test_adapters_of_another_length_are_refused(load_tiny: LoadTiny, change: int) -> None:
    adapted = load_tiny("llama")
    with pytest.raises(ModelError, match=f"{adapted.spec.dimension} values"):
        adapted.write(np.zeros(adapted.spec.dimension + change, dtype=np.float32))
    with pytest.raises(ModelError, match="values"):
        adapted.write(np.zeros((1, adapted.spec.dimension), dtype=np.float32))


@pytest.mark.parametrize(("aggregation", "factors"), [("rebase", "B"), ("freeze_a", "B"), ("factor_average", "AB")])
def test_only_the_shared_factors_travel_and_train(load_tiny: LoadTiny, aggregation: Any, factors: str) -> None:
    adapted = load_tiny("llama")
    spec = adapted.shared_spec(aggregation)
    parameters = adapted.train_only(spec)
    training = {n for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert training == set(spec.names)
    assert {name.split("lora_")[1][0] for name in spec.names} == set(factors)
    assert [tuple(p.shape) for p in parameters] == list(spec.shapes)


# Files


@PLAIN_PEFT
def test_a_saved_adapter_loads_with_plain_peft(
    load_tiny: LoadTiny, tiny_checkpoint: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    adapted = load_tiny(architecture, trained=True)
    adapted.save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(architecture), dtype=torch.float32)
    untouched = logits(base)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again), logits(adapted.model))
    assert not torch.allclose(logits(again), untouched, atol=1e-2)


def test_code_in_a_checkpoint_is_never_run(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Somebody at a terminal who says yes to every question.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    AutoTokenizer.from_pretrained(tiny_checkpoint("gpt2")).save_pretrained(tmp_path)
    marker = tmp_path / "was_run"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass C: ...\nclass M: ...\n")
    auto_map = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        _load(tmp_path)
    assert not marker.exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded.*config\.json"):
        _load(tmp_path)


# What cannot carry an adapter


def _load(path: Path, r: int = 4, target_modules: list[str] | None = None) -> AdaptedModel:
    return load(
        str(path),
        dtype="float32",
        device="cpu",
        r=r,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=target_modules,
        seed=0,
    )


def _checkpoint_of(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_type: str, **fields: Any) -> Path:
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_an_unknown_architecture_needs_named_targets(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = _checkpoint_of(tmp_path, tiny_tokenizer, "bloom", hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ModelError, match=r"'bloom'.*gpt2, gpt_neox.*adapter\.target_modules"):
        _load(path)
    assert all("query_key_value" in name for name in _load(path, target_modules=["query_key_value"]).spec.names)


@pytest.mark.parametrize("target", ["no_such_layer", "wte", "ln_1", "lm_head", "attn"])
def test_targets_that_are_no_linear_layer_are_refused_with_the_ones_that_are(
    tiny_checkpoint: Callable[..., Path], target: str
) -> None:
    with pytest.raises(ModelError, match=rf"'{target}'.*allowed here: c_attn, c_fc, c_proj, or \[all-linear\]"):
        _load(tiny_checkpoint("gpt2"), target_modules=["c_attn", target])


def test_a_rank_above_the_width_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    _load(tiny_checkpoint("gpt2"), r=32)
    with pytest.raises(ModelError, match=r"adapter\.r = 33.*width 32"):
        _load(tiny_checkpoint("gpt2"), r=33)


# Trunk and head


def test_head_of_trunk_are_the_logits(load_tiny: LoadTiny, architecture: str) -> None:
    adapted = load_tiny(architecture, trained=True)
    adapted.model.train()
    trunk, head = adapted.trunk_and_head()
    assert adapted.model.training
    with torch.no_grad():
        ours = head(trunk(input_ids=IDS).last_hidden_state)
    assert torch.allclose(ours, logits(adapted.model), atol=1e-5)


def test_an_architecture_that_changes_logits_after_the_head_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = _checkpoint_of(
        tmp_path,
        tiny_tokenizer,
        "gemma2",
        **sizes,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.5,
        final_logit_softcapping=1.0,
    )
    adapted = _load(path, target_modules=["q_proj"])
    with pytest.raises(ModelError, match="not supported"):
        adapted.trunk_and_head()


# The pair


def test_a_pair_shares_its_tokenizer(load_tiny: LoadTiny) -> None:
    slm, llm = load_tiny("gpt2"), load_tiny("gpt2", width=48)
    check_same_tokenizer(slm, llm)
    # Padding rows of the output layer do no harm.
    check_same_tokenizer(slm, load_tiny("llama", vocab_size=320))


def test_different_vocabularies_are_refused(load_tiny: LoadTiny, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    slm, llm = load_tiny("gpt2"), load_tiny("gpt2", width=48)
    more = AutoTokenizer.from_pretrained(slm.name)
    more.add_tokens(["fever!"])
    with pytest.raises(ModelError, match="different vocabularies"):
        check_same_tokenizer(slm, dataclasses.replace(llm, tokenizer=more))
    # As many tokens, the same words, but two of them swapped.
    backend = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer.backend_tokenizer).from_str(json.dumps(backend))
    )
    assert len(swapped) == len(tiny_tokenizer)
    with pytest.raises(ModelError, match="4 entries differ"):
        check_same_tokenizer(slm, dataclasses.replace(llm, tokenizer=swapped))


def test_an_output_layer_without_a_row_for_every_token_is_refused(load_tiny: LoadTiny) -> None:
    with pytest.raises(ModelError, match="output rows"):
        check_same_tokenizer(load_tiny("llama"), load_tiny("llama", vocab_size=298))


# Re-basing


def factors(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> AdaptedModel:
    """A single module's factors as an adapted model; re-basing needs no more of one."""
    model = nn.ModuleDict(
        {"lora_A": nn.Linear(*a.shape[::-1], bias=False), "lora_B": nn.Linear(*b.shape[::-1], bias=False)}
    )
    spec = AdapterSpec(names=("lora_A.weight", "lora_B.weight"), shapes=(a.shape, b.shape), base_model="")
    adapted = AdaptedModel(name="factors", model=model, tokenizer=None, spec=spec)
    adapted.write(np.concatenate([a.reshape(-1), b.reshape(-1)]).astype(np.float32))
    return adapted


def split(adapted: AdaptedModel) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    parameters = dict(adapted.model.named_parameters())
    a, b = (parameters[name].detach().double().numpy() for name in adapted.spec.names)
    return a, b


@given(
    r=st.integers(1, 8),
    more_columns=st.integers(0, 20),
    rows=st.integers(1, 24),
    rank=st.integers(0, 8),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    orthonormal=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_rebase_keeps_the_product_and_makes_a_orthonormal(
    r: int, more_columns: int, rows: int, rank: int, scale: float, orthonormal: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((r, r + more_columns))
    if orthonormal:
        a = np.linalg.qr(a.T)[0].T
    b = scale * rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, r))
    adapted = factors(a, b)
    a, b = split(adapted)
    rebase(adapted)
    new_a, new_b = split(adapted)
    assert np.linalg.norm(new_b @ new_a - b @ a) <= 1e-6 * np.linalg.norm(b @ a)
    assert np.abs(new_a @ new_a.T - np.eye(r)).max() <= 1e-6
    if rank == 0:
        assert (new_b == 0).all()
    if rows >= r:
        # The columns of B are the left singular vectors of BA times its singular values, by another library.
        singular = np.linalg.svd(b @ a, compute_uv=False)[:r]
        assert np.linalg.norm(new_b, axis=0) == pytest.approx(singular, rel=1e-5, abs=1e-5 * (singular[0] + 1e-30))
        gram = new_b.T @ new_b
        assert np.abs(gram - np.diag(np.diag(gram))).max() <= 1e-5 * (gram.max() + 1e-30)


def test_rebase_does_not_change_the_model(load_tiny: LoadTiny, architecture: str) -> None:
    adapted = load_tiny(architecture, trained=True)
    adapted.write(adapted.read() * np.float32(1.7))
    before, vector = logits(adapted.model), adapted.read()
    rebase(adapted)
    assert np.abs(adapted.read() - vector).max() > 0.1
    assert torch.allclose(logits(adapted.model), before, atol=1e-4)
    again = adapted.read()
    rebase(adapted)
    # A second time only signs may turn.
    assert np.abs(adapted.read()) == pytest.approx(np.abs(again), abs=1e-4)


def test_rebase_leaves_a_fresh_adapter_at_zero(load_tiny: LoadTiny) -> None:
    adapted = load_tiny("gpt2")
    rebase(adapted)
    assert all((delta == 0).all() for delta in merged_delta(adapted).values())


def test_merged_delta_is_what_peft_merges(load_tiny: LoadTiny, architecture: str) -> None:
    adapted = load_tiny(architecture, trained=True)
    modules = dict(adapted.model.named_modules())
    for name, delta in merged_delta(adapted).items():
        layer = modules[name.split(".lora_B")[0]]
        want = layer.get_delta_weight("default") / layer.scaling["default"]
        want = want.T if layer.fan_in_fan_out else want
        assert torch.allclose(delta.float(), want, atol=1e-5)


def test_the_mean_of_b_is_the_mean_of_products(load_tiny: LoadTiny) -> None:
    adapted = load_tiny("llama", trained=True)
    spec = adapted.shared_spec("rebase")
    vectors = np.random.default_rng(3).standard_normal((4, spec.dimension)).astype(np.float32)
    products = []
    for vector in vectors:
        adapted.write(vector, spec)
        products.append(merged_delta(adapted))
    adapted.write(vectors.mean(0), spec)
    for name, of_mean in merged_delta(adapted).items():
        mean_of = torch.stack([p[name] for p in products]).mean(0)
        assert torch.allclose(of_mean, mean_of, atol=1e-6)


def test_a_checkpoint_that_lacks_weights_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_checkpoint(architecture), folder)
    weights = load_file(folder / "model.safetensors")
    removed = next(
        name for name in sorted(weights) if (name.endswith("weight") and "layers.1" in name) or ".h.1." in name
    )
    del weights[removed]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights"):
        load(
            str(folder),
            dtype="float32",
            device="cpu",
            r=2,
            lora_alpha=2,
            lora_dropout=0.0,
            target_modules=None,
            seed=0,
        )
