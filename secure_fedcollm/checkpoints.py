"""Load a base model and its tokenizer from the hub or a folder, and put it on its devices.

The one module that imports transformers (`pretraining` builds the embedded pair from a bare configuration).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fedcollm_privacy.errors import ModelError

__all__ = ["DeviceMap", "load_base", "read_checkpoint"]

DeviceMap = str | Mapping[str, str | int]
"""A strategy of transformers (``auto``, ``balanced``, ...), or module names to devices."""


def load_base(
    name: str, *, dtype: Literal["float32", "bfloat16"], device: str, device_map: DeviceMap | None
) -> tuple[Any, Any]:
    """The model without adapter where it will run, and its tokenizer, which has a padding token.

    Args:
        name: hub id or folder. No code from the checkpoint is run.
        dtype: of the weights.
        device: where the whole model goes without a device map.
        device_map: spreads the layers over devices, by accelerate; ``device`` is not used then.

    Raises:
        ModelError: not loadable, not placeable, or parts of it would not be in an accelerator's memory.
    """
    base, tokenizer = read_checkpoint(name, dtype, device_map)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if device_map is None:
        try:
            base.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"{name} cannot be put on device={device}: {_reason(error, name)}") from error
    else:
        _check_spread(base, device_map, name)
    return base, tokenizer


def read_checkpoint(
    name: str, dtype: Literal["float32", "bfloat16"], device_map: DeviceMap | None = None
) -> tuple[Any, Any]:
    """The model as it lies in the checkpoint, and its tokenizer.

    Raises:
        ModelError: not loadable, access not given, or weights are missing.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its length warnings are moot: truncation is ours
    try:
        # Said outright: left open, transformers asks at the terminal whether to run the checkpoint's code.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        base, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            output_loading_info=True,
            device_map=dict(device_map) if isinstance(device_map, Mapping) else device_map,
        )
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise ModelError(
            f"{name} cannot be loaded: {_reason(error, name)}. Give a hub id (needs network or a filled cache) or a "
            "folder with config.json, model.safetensors and tokenizer files."
        ) from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        absent = sorted(str(key) for key in {*loading["missing_keys"], *loading["mismatched_keys"]})
        raise ModelError(f"{name} lacks weights ({len(absent)} tensors, for example {absent[0]}); they would be random")
    return base, tokenizer


def _reason(error: BaseException, name: str) -> str:
    """The first line of an error, or what to do where access is what is missing."""
    chain: BaseException | None = error
    while chain is not None:
        if type(chain).__name__ == "GatedRepoError":
            return (
                f"its authors give access on request; ask at https://huggingface.co/{name}, then log in here "
                "(`hf auth login`, or the token in HF_TOKEN)"
            )
        chain = chain.__cause__ or chain.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def _check_spread(base: Any, device_map: DeviceMap, name: str) -> None:
    """Refuse a placement that is not what was asked for, or that would leave parts where nothing can be trained."""
    if isinstance(device_map, Mapping):
        known = {module for module, _ in base.named_modules()} | {tensor for tensor, _ in base.named_parameters()}
        unknown = sorted(set(device_map) - known)
        if unknown:
            raise ModelError(f"{name} has no module {unknown[0]!r}, which the device map names")
    places = {str(place) for place in (getattr(base, "hf_device_map", None) or {}).values()}
    outside = places & {"cpu", "disk"}
    if "disk" in outside or (outside and len(places) > 1):
        raise ModelError(
            f"{name} does not fit into the accelerators' free memory: parts of it would stay on "
            f"{' and '.join(sorted(outside))}, where no adapter can be trained. Take model.dtype=bfloat16, more or "
            "larger accelerators, or a smaller model"
        )
