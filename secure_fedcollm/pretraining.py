"""The embedded pair: a small and a larger Llama, pre-trained in seconds on synthetic general health text.

The text (:func:`secure_fedcollm.embedded_text.article`) has the words of the hospitals' notes but neither what goes
with what nor who writes how, so both models have something to learn from the federation; the larger one is the
better of the two. Both share one byte-level BPE tokenizer that has seen the same public text only. This module and
``models.py`` are the only ones that import transformers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from fedcollm_privacy.errors import ModelError
from secure_fedcollm.embedded_text import article

__all__ = ["EMBEDDED_PAIR", "ModelRecipe", "PairRecipe", "embedded_pair"]

END_OF_TEXT: Final = "<|endoftext|>"
PADDING: Final = "<|padding|>"
MARKER: Final = "finished.json"
_STALE_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecipe:
    """Shape of one model and how long it is trained.

    Attributes:
        steps: optimizer steps, each on ``rows`` rows of the packed text.
        learning_rate: highest of the one-cycle schedule.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    steps: int
    rows: int
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecipe:
    """Everything that decides the two checkpoints besides the seed.

    Attributes:
        texts: articles generated for tokenizer and training; each step draws rows of the packed stream.
        row_length: tokens per training row.
        context: ``max_position_embeddings`` of both models.
    """

    texts: int
    vocab_size: int
    row_length: int
    context: int
    slm: ModelRecipe
    llm: ModelRecipe


EMBEDDED_PAIR: Final = PairRecipe(
    texts=8_000,
    vocab_size=1536,
    row_length=128,
    context=256,
    slm=ModelRecipe(hidden_size=64, intermediate_size=176, layers=2, heads=4, steps=400, rows=4, learning_rate=8e-3),
    llm=ModelRecipe(hidden_size=144, intermediate_size=384, layers=4, heads=4, steps=500, rows=4, learning_rate=3e-3),
)


def embedded_pair(
    cache_dir: Path,
    seed: int,
    progress: Callable[[str, int, int], None],
    recipe: PairRecipe = EMBEDDED_PAIR,
) -> tuple[Path, Path]:
    """Folders of the SLM and the LLM in Hugging Face format; trained on the first call, cached afterwards.

    Args:
        cache_dir: parent of the cache folders; made if missing.
        seed: of text, initial weights and order of rows.
        progress: called as ``progress("slm" | "llm", step, steps)`` during training, never on a cached pair.
        recipe: sizes and steps.

    Returns:
        ``(slm, llm)``: each folder holds config, safetensors weights and the shared tokenizer.

    Raises:
        ModelError: training gave a non-finite loss.
    """
    texts = _texts(recipe.texts, seed)
    folder = cache_dir / f"embedded-{_digest(texts, seed, recipe)}"
    if not _is_finished(folder):
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache_dir)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=cache_dir))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # matrices this small lose time to a second thread (50 s against 133 s measured)
        try:
            _build(building, texts, seed, recipe, progress)
            _publish(building, folder)
        finally:
            torch.set_num_threads(threads)
            shutil.rmtree(building, ignore_errors=True)
    return folder / "slm", folder / "llm"


def _texts(count: int, seed: int) -> list[str]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return [article(rng) for _ in range(count)]


def _digest(texts: list[str], seed: int, recipe: PairRecipe) -> str:
    """Names the cache by everything that went in, the generator's output and the libraries included."""
    settings = dataclasses.asdict(recipe) | {
        "seed": seed,
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
    }
    state = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    state.update("\0".join(texts).encode())
    return state.hexdigest()[:16]


def _is_finished(folder: Path) -> bool:
    """Whether the marker is there and every file still has the digest that it names."""
    try:
        wanted = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return bool(wanted == _file_digests(folder))


def _file_digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _remove_stale(cache_dir: Path) -> None:
    """Drop what a killed run left; an hour old, because another run may be building right now."""
    for left in cache_dir.glob(".building-*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _publish(building: Path, folder: Path) -> None:
    """Rename into place; another run may have won the race, then its pair is as good as ours."""
    (building / MARKER).write_text(json.dumps(_file_digests(building), indent=1), encoding="utf-8")
    if folder.exists() and not _is_finished(folder):
        shutil.rmtree(folder)
    try:
        building.rename(folder)
    except OSError:
        if not _is_finished(folder):
            raise


def _build(
    building: Path,
    texts: list[str],
    seed: int,
    recipe: PairRecipe,
    progress: Callable[[str, int, int], None],
) -> None:
    tokenizer = _train_tokenizer(texts, recipe)
    ids_N = torch.tensor(
        [i for ids in tokenizer(texts)["input_ids"] for i in (*ids, tokenizer.eos_token_id)],
        dtype=torch.long,
    )
    for name, model_recipe in (("slm", recipe.slm), ("llm", recipe.llm)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(_model_config(tokenizer, recipe, model_recipe))
        for step, loss in _train(model, ids_N, recipe.row_length, model_recipe, seed):
            if not np.isfinite(loss):
                raise ModelError(
                    f"pre-training of the embedded {name} diverged at step {step}; lower its learning rate"
                )
            progress(name, step, model_recipe.steps)
        _save(model, tokenizer, building / name)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # it would draw over the caller's own progress
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _train_tokenizer(texts: list[str], recipe: PairRecipe) -> Any:
    """Byte-level BPE; digits stay single, so that every code of four digits has the same number of tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=recipe.vocab_size,
            special_tokens=[END_OF_TEXT, PADDING],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="right",
        model_max_length=recipe.context,
    )


def _model_config(tokenizer: Any, recipe: PairRecipe, model: ModelRecipe) -> Any:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train(
    model: Any, ids_N: torch.Tensor, row_length: int, recipe: ModelRecipe, seed: int
) -> Iterator[tuple[int, float]]:
    """AdamW with one warm-up and decay over packed rows that start at random places; yields (step, loss)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    rows_NT = ids_N.unfold(0, row_length, 1)
    rng = np.random.Generator(np.random.PCG64(seed))
    model.train()
    for step in range(1, recipe.steps + 1):
        batch_BT = rows_NT[torch.from_numpy(rng.integers(len(rows_NT), size=recipe.rows))]
        loss = model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield step, float(loss.detach())
    model.eval()
