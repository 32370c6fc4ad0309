"""A second tokenizer and models that use it, for tests of distillation between vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from secure_fedcollm.models import AdaptedModel, load

TEXTS = ["the patient rests, and the fever is better in the evening; is a cure near? The patient sleeps."] * 4


def sentencepiece(texts: list[str] = TEXTS, size: int = 340) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before the text, spaces as U+2581, BOS in front, bytes for characters it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # The trainer makes the byte tokens special; only their names are wanted.
    state = tokenizer.to_str()
    plain = Tokenizer.from_str(_without_special_bytes(state))
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _without_special_bytes(state: str) -> str:
    parts = json.loads(state)
    parts["added_tokens"] = [token for token in parts["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(parts)


def byte_level(texts: list[str] = TEXTS, size: int = 330, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """As GPT-2's: one special token that is BOS, EOS and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def save_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast, width: int = 48) -> Path:
    """A Llama with random weights and this tokenizer."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(width)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_trained(folder: Path) -> AdaptedModel:
    """With a random B, as after some rounds."""
    adapted = load(
        str(folder),
        dtype="float32",
        device="cpu",
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=None,
        seed=0,
    )
    spec = adapted.shared_spec("rebase")
    adapted.write(0.3 * np.random.default_rng(3).standard_normal(spec.dimension).astype("float32"), spec)
    return adapted
