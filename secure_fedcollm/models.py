"""Load the pair, attach LoRA, and carry adapters between models and flat vectors.

The one module that imports peft.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fedcollm_privacy.errors import ModelError
from fedcollm_privacy.messages import AdapterSpec, digest_of
from secure_fedcollm.checkpoints import DeviceMap, load_base, read_checkpoint

__all__ = [
    "LORA_TARGETS",
    "AdaptedModel",
    "base_digest_of",
    "check_same_tokenizer",
    "load",
    "merged_delta",
    "rebase",
    "use_fitting_threads",
]

# All attention projections of each family: what the paper's parameter counts imply (0.29 M for GPT-2, 3.15 M for
# OPT-1.3B and Sheared-LLaMA at r = 8). OPT's feed-forward layers merge batch and time and are left alone.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value", "dense"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj"),
}

Float32 = NDArray[np.float32]
Aggregation = Literal["rebase", "freeze_a", "factor_average"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModel:
    """A frozen base model with a LoRA adapter, its tokenizer, and the order in which the adapter is flattened.

    Attributes:
        name: hub id or folder, as given.
        model: the peft model, float32 adapter over a base of any dtype.
        tokenizer: of the base model.
        spec: every adapter tensor (A and B); what `read` and `write` carry.
    """

    name: str
    model: PeftModel
    tokenizer: Any
    spec: AdapterSpec

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs; all of the model is there unless it was spread by a device map."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def shared_spec(self, aggregation: Aggregation) -> AdapterSpec:
        """The tensors that travel: B alone, or both factors with ``factor_average``."""
        keep = [i for i, n in enumerate(self.spec.names) if aggregation == "factor_average" or "lora_B" in n]
        return AdapterSpec(
            names=tuple(self.spec.names[i] for i in keep),
            shapes=tuple(self.spec.shapes[i] for i in keep),
            base_model=self.spec.base_model,
        )

    def train_only(self, spec: AdapterSpec) -> list[nn.Parameter]:
        """Let gradients flow into the tensors of ``spec`` and no others; returns them in its order."""
        chosen = set(spec.names)
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
        return [parameters[name] for name in spec.names]

    def read(self, spec: AdapterSpec | None = None) -> Float32:
        """The tensors of ``spec`` (default: the whole adapter) as one float32 vector [d]."""
        parameters = dict(self.model.named_parameters())
        names = (spec or self.spec).names
        flat = [parameters[name].detach().to("cpu", torch.float32).reshape(-1) for name in names]
        vector: Float32 = torch.cat(flat).numpy()
        return vector

    def write(self, vector: Float32, spec: AdapterSpec | None = None) -> None:
        """Set the tensors of ``spec`` (default: the whole adapter) from a float32 vector [d].

        Raises:
            ModelError: wrong length, or a value is not finite.
        """
        spec = spec or self.spec
        if vector.shape != (spec.dimension,):
            raise ModelError(f"an adapter of {spec.dimension} values is needed, got {list(vector.shape)}")
        if not np.isfinite(vector).all():
            raise ModelError("the adapter holds NaN or infinity; it was not loaded")
        parameters = dict(self.model.named_parameters())
        start = 0
        with torch.no_grad():
            for name, shape in zip(spec.names, spec.shapes, strict=True):
                size = int(np.prod(shape))
                piece = torch.from_numpy(np.array(vector[start : start + size])).reshape(shape)
                parameters[name].copy_(piece)
                start += size

    def trunk_and_head(self) -> tuple[nn.Module, nn.Module]:
        """The transformer without its head, and the head: ``head(trunk(ids).last_hidden_state)`` are the logits.

        Raises:
            ModelError: this architecture does something between the two (soft-capping, scaling), so that distillation
                through the head alone would be wrong.
        """
        base = self.model.get_base_model()
        trunk, head = getattr(base, base.base_model_prefix), base.get_output_embeddings()
        probe = torch.arange(4, device=self.device).unsqueeze(0)
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            whole = self.model(input_ids=probe, use_cache=False).logits
            same = torch.allclose(
                head(trunk(input_ids=probe, use_cache=False).last_hidden_state).to(whole.device).float(),
                whole.float(),
                atol=1e-3,
                rtol=1e-3,
            )
        self.model.train(was_training)
        if not same:
            raise ModelError(f"{self.name}: logits are not head(hidden states); this architecture is not supported")
        return trunk, head

    def save(self, folder: Path) -> None:
        """Write the adapter in PEFT format, loadable with plain ``PeftModel.from_pretrained``."""
        self.model.save_pretrained(str(folder))


def load(
    name: str,
    *,
    dtype: Literal["float32", "bfloat16"],
    device: str,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    target_modules: Sequence[str] | None,
    seed: int,
    activation_checkpointing: bool = False,
    device_map: DeviceMap | None = None,
) -> AdaptedModel:
    """Load a causal language model by hub id or folder and attach a LoRA adapter with ΔW = 0.

    A is drawn from ``seed`` with orthonormal rows, so every party that loads the same model starts equal and the first
    broadcast changes nothing. No code from the checkpoint is run.

    Args:
        name: hub id or folder.
        dtype: of the frozen weights; the adapter is float32.
        device: where the whole model goes without a device map.
        r: rank of the adapter.
        lora_alpha: the adapter counts ``lora_alpha / r`` times.
        lora_dropout: on the adapter's inputs, in training.
        target_modules: names of the linear layers that carry an adapter; null takes `LORA_TARGETS`.
        seed: of A.
        activation_checkpointing: compute activations again in the backward pass.
        device_map: spreads the model over devices instead.

    Raises:
        ModelError: not loadable or not placeable, no LoRA targets known or found, or targets outside linear layers.
    """
    base, tokenizer = load_base(name, dtype=dtype, device=device, device_map=device_map)
    if activation_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    targets = _targets(base, target_modules, name)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=base.config.model_type == "gpt2",
    )
    try:
        with warnings.catch_warnings():
            # peft asks transformers in a way that transformers has deprecated.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            model = get_peft_model(base, config)
    except ValueError as error:
        raise ModelError(_no_targets(base, target_modules or (), name)) from error
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    names = tuple(sorted(lora))
    spec = AdapterSpec(
        names=names, shapes=tuple(tuple(lora[n].shape) for n in names), base_model=_base_digest(base, tokenizer)
    )
    adapted = AdaptedModel(name=name, model=model, tokenizer=tokenizer, spec=spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor_name, parameter in lora.items():
            if "lora_A" in tensor_name:
                rows, columns = parameter.shape
                if rows > columns:
                    raise ModelError(f"adapter.r = {r} is larger than the width {columns} of a layer of {name}")
                draw = torch.randn(columns, rows, generator=generator, dtype=torch.float64)
                parameter.copy_(torch.linalg.qr(draw).Q.T)
    return adapted


def base_digest_of(name: str, dtype: Literal["float32", "bfloat16"]) -> str:
    """What `load` writes as ``base_model`` into the specs of this model: SHA-256 over its weights and vocabulary.

    Raises:
        ModelError: not loadable.
    """
    return _base_digest(*read_checkpoint(name, dtype))


def _targets(base: Any, given: Sequence[str] | None, name: str) -> list[str] | str:
    if given is not None:
        if list(given) == ["all-linear"]:
            return "all-linear"
        targets = list(given)
    else:
        model_type = str(base.config.model_type)
        if model_type not in LORA_TARGETS:
            raise ModelError(
                f"{name}: no LoRA targets are known for architecture {model_type!r} (known: "
                f"{', '.join(sorted(LORA_TARGETS))}); set adapter.target_modules, for example [all-linear]"
            )
        targets = list(LORA_TARGETS[model_type])
    missing = [t for t in targets if t not in _linear_layers(base)]
    if missing:
        raise ModelError(_no_targets(base, missing, name))
    return targets


def _linear_layers(base: Any) -> set[str]:
    """Names of the linear layers, without the output layer."""
    head = base.get_output_embeddings()
    return {
        n.rsplit(".", 1)[-1]
        for n, m in base.named_modules()
        if m is not head and type(m).__name__ in ("Linear", "Conv1D")
    }


def _no_targets(base: Any, missing: Sequence[str], name: str) -> str:
    return (
        f"adapter.target_modules: {list(missing)} cannot carry an adapter in {name}; allowed here: "
        f"{', '.join(sorted(_linear_layers(base)))}, or [all-linear]"
    )


def _base_digest(base: nn.Module, tokenizer: Any) -> str:
    """SHA-256 over the base model's weights and its vocabulary."""
    weights = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        if "lora_" not in name:
            weights.update(name.replace(".base_layer", "").encode())
            weights.update(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest_of({"weights": weights.hexdigest(), "vocabulary": sorted(tokenizer.get_vocab().items())})


def use_fitting_threads(slm: AdaptedModel, llm: AdaptedModel) -> None:
    """One thread for models below five million parameters.

    Their matrices gain little from a second core and lose fourfold as soon as anything else wants it (the embedded
    run's training: 45 s on one thread, 160 s on two of a busy machine). Larger models keep torch's own choice.
    """
    if max(sum(p.numel() for p in adapted.model.parameters()) for adapted in (slm, llm)) < 5_000_000:
        torch.set_num_threads(1)


def check_same_tokenizer(slm: AdaptedModel, llm: AdaptedModel) -> None:
    """SLM and LLM must read and write the same tokens; distillation compares their next-token distributions.

    Raises:
        ModelError: vocabularies or output sizes differ.
    """
    small, large = slm.tokenizer.get_vocab(), llm.tokenizer.get_vocab()
    if small != large:
        only = sorted(set(small.items()) ^ set(large.items()))
        raise ModelError(
            f"model.slm ({slm.name}) and model.llm ({llm.name}) have different vocabularies ({len(small)} and "
            f"{len(large)} tokens; {len(only)} entries differ, for example {only[0][0]!r}); co-tuning needs a pair "
            "that shares its tokenizer, or distillation.alignment=common_support"
        )
    rows = [m.model.get_output_embeddings().weight.shape[0] for m in (slm, llm)]
    if min(rows) < max(small.values()) + 1:
        raise ModelError(f"{slm.name} and {llm.name} have {rows} output rows for {max(small.values()) + 1} tokens")


def _pairs(spec: AdapterSpec) -> list[tuple[str, str]]:
    return [(n, n.replace("lora_A", "lora_B")) for n in spec.names if "lora_A" in n]


def merged_delta(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """BA of every module, float64 [out, in], without LoRA's scaling."""
    parameters = dict(adapted.model.named_parameters())
    return {b: parameters[b].detach().double() @ parameters[a].detach().double() for a, b in _pairs(adapted.spec)}


def rebase(adapted: AdaptedModel) -> None:
    """Re-base every module's factors so that A has orthonormal rows and BA is unchanged (after FedSVD).

    With A^T = Q R and B R^T = U S W^T, the new factors are A' = W^T Q^T and B' = U S; B = 0 stays 0. Done in float64,
    so that BA changes by float32 rounding only.
    """
    parameters = dict(adapted.model.named_parameters())
    with torch.no_grad():
        for name_a, name_b in _pairs(adapted.spec):
            a, b = parameters[name_a], parameters[name_b]
            basis, triangle = torch.linalg.qr(a.detach().double().T)
            left, singular, right = torch.linalg.svd(b.detach().double() @ triangle.T, full_matrices=False)
            if right.shape[0] < a.shape[0]:  # fewer outputs than r: keep the old basis, which spans more
                a.copy_(basis.T)
                b.copy_(b.detach().double() @ triangle.T)
            else:
                a.copy_(right @ basis.T)
                b.copy_(left * singular)
