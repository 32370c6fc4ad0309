"""Checkpoints with random weights and a tokenizer of 300 tokens: real formats, made in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

POSITIONS = 64


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few dozen merges, so that one word may be several tokens; 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the patient rests and the fever of the patient is better in the morning"] * 4, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def _tiny_config(architecture: str, tokenizer: PreTrainedTokenizerFast, width: int, changes: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    # Weights ten times the usual size, so that a wrong position or a leaking pad changes the result.
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
    }
    if architecture == "gpt2":
        fields |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if architecture == "opt":
        fields |= {"ffn_dim": 48, "word_embed_proj_dim": width, "dropout": 0.0, "init_std": 0.3}
    if architecture in ("llama", "mistral", "qwen2", "qwen3"):
        fields |= {"num_key_value_heads": 2}
    if architecture == "qwen3":
        fields |= {"head_dim": 8}
    return AutoConfig.for_model(architecture, **(fields | changes))


def save_tiny(
    path: Path,
    architecture: str = "llama",
    *,
    width: int = 32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **changes: Any,
) -> Path:
    """A folder with random weights, the same for the same width, and the tiny tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer or tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(width)
        model = AutoModelForCausalLM.from_config(_tiny_config(architecture, tokenizer, width, changes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
