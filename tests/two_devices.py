"""Co-tune a model that is spread over two devices, as a program of its own: it teaches torch a made-up accelerator.

Tensors are fake (no values), but torch checks the device of every operand, forwards and backwards, and refuses
whatever mixes the two. Hooks are accelerate's, one for each placed module, as ``dispatch_model`` attaches them.
Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from secure_fedcollm import losses
from secure_fedcollm.losses import co_tuning_loss, per_record_loss, target_hidden_states
from secure_fedcollm.tokenization import Batch

ONE, OTHER = "gpu:0", "cpu"
SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
CONFIGS = {
    "llama": (LlamaConfig(intermediate_size=48, **SIZES), ["q_proj", "o_proj"]),
    "gpt2": (GPT2Config(**SIZES), ["c_attn"]),
    "opt": (OPTConfig(word_embed_proj_dim=32, ffn_dim=48, **SIZES), ["q_proj", "out_proj"]),
}
PLACES = {
    "llama": {"model.embed_tokens": ONE, "model.rotary_emb": ONE, "model.layers.0": ONE, "model.layers.1": OTHER,
              "model.norm": OTHER, "lm_head": OTHER},
    # The head shares its weights with the embedding, so it is where the model begins.
    "gpt2": {"transformer.wte": ONE, "transformer.wpe": ONE, "transformer.drop": ONE, "transformer.h.0": ONE,
             "transformer.h.1": OTHER, "transformer.ln_f": OTHER, "lm_head": ONE},
    "opt": {"model.decoder.embed_tokens": ONE, "model.decoder.embed_positions": ONE, "model.decoder.layers.0": ONE,
            "model.decoder.layers.1": OTHER, "model.decoder.final_layer_norm": OTHER, "lm_head": ONE},
}  # fmt: skip


class Head(nn.Module):
    """The other model's head, whole on one device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.weight = torch.empty(300, 16, device=device)

    def forward(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        return hidden_NH @ self.weight.T


def spread(base: Any, places: dict[str, str]) -> None:
    moved: dict[int, tuple[Any, nn.Parameter]] = {}
    for name, device in places.items():
        for module in base.get_submodule(name).modules():
            for key, tensor in list(module._parameters.items()):
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    parameter = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    module._parameters[key] = moved.setdefault(id(tensor), (tensor, parameter))[1]
            for key, tensor in list(module._buffers.items()):
                if tensor is not None:
                    module._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    skip = base._skip_keys_device_placement
    add_hook_to_module(base, AlignDevicesHook(execution_device=ONE, io_same_device=True, skip_keys=skip))
    for name, device in places.items():
        add_hook_to_module(base.get_submodule(name), AlignDevicesHook(execution_device=device, skip_keys=skip))


def devices_with_gradient(model: nn.Module) -> list[str]:
    found = sorted({str(p.grad.device) for p in model.parameters() if p.grad is not None})
    model.zero_grad()
    return found


def main(architecture: str, slm_device: str) -> dict[str, Any]:
    config, targets = CONFIGS[architecture]
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, target_modules=targets))
    base = model.get_base_model()
    said: dict[str, Any] = {}
    with FakeTensorMode(shape_env=ShapeEnv()):
        spread(base, PLACES[architecture])
        trunk, head = getattr(base, base.base_model_prefix), base.get_output_embeddings()
        ids_BT = torch.ones(3, 7, dtype=torch.long, device=ONE)
        batch = Batch(input_ids_BT=ids_BT, attention_mask_BT=ids_BT, labels_BT=ids_BT)
        per_record_loss(model, batch).sum().backward()
        said["trained"] = devices_with_gradient(model)

        states_NH, labels_N = target_hidden_states(trunk, batch)
        said["ends"] = [str(states_NH.device), str(labels_N.device)]
        # The number of targets is data, which fake tensors lack; from here on it is 21.
        hidden_NH = trunk(input_ids=ids_BT, attention_mask=ids_BT, use_cache=False).last_hidden_state.reshape(21, 32)
        labels_N = torch.zeros(21, dtype=torch.long, device=hidden_NH.device)
        slm_NH = torch.empty(21, 16, device=slm_device, requires_grad=True)
        slm_head = Head(slm_device)
        for student_NH, student_head, teacher_NH, teacher_head in (
            (hidden_NH, head, slm_NH, slm_head),
            (slm_NH, slm_head, hidden_NH, head),
        ):
            labels = labels_N.to(student_NH.device)
            co_tuning_loss(
                student_NH=student_NH,
                student_head=student_head,
                teacher_NH=teacher_NH,
                teacher_head=teacher_head,
                labels_N=labels,
                kd_weight=0.5,
                temperature=2.0,
                direction="forward",
                top_k=4,
            ).total.backward()
        said["co-tuned"] = devices_with_gradient(model)
        said["slm"] = None if slm_NH.grad is None else str(slm_NH.grad.device)
        try:
            functional.cross_entropy(torch.empty(21, 300, device=ONE), torch.empty(21, dtype=torch.long, device=OTHER))
        except RuntimeError as error:
            said["control"] = str(error)
    return said


def without_values(*arguments: Any) -> tuple[Any, float, float]:
    """`fused_loss`, whose two parts fake tensors cannot be asked for."""
    return fused_loss(*arguments)[0], 0.0, 0.0


if __name__ == "__main__":
    fused_loss, losses.fused_loss = losses.fused_loss, without_values
    warnings.simplefilter("ignore")
    _setup_privateuseone_for_python_backend("gpu")
    print(json.dumps([main(*arguments.split(",")) for arguments in sys.argv[1:]]))
