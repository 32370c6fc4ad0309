"""Where the real data sets and checkpoints lie (beside the project, in ``../shared``), and tiny ones made here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from . import tiny_checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from secure_fedcollm.models import AdaptedModel
    from secure_fedcollm.tokenization import TokenDataset

# Tiny models lose time to threads, most of all when tests run side by side. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The same examples on every machine, and no verdict by the clock. `HYPOTHESIS_PROFILE=search` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
# Files of minutes go first, those that mostly wait before all others, so that no worker is left alone with one at the
# end.
LONGEST = ("flare", "deployment", "run", "resume", "check_empirical", "sweep", "distributed_noise", "only_the_sum")
SHARED = Path(os.environ.get("FEDCOLLM_SHARED", Path(__file__).parents[2] / "shared"))
ARCHITECTURES = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gpt_neox")
POSITIONS = tiny_checkpoints.POSITIONS
QUESTIONS = (
    ("What helps?", " Rest."),
    ("", "The fever of the patient is better in the morning."),
    ("How long is the fever?", " A day."),
    ("Is the patient better now, and may the patient go out?", " No."),
    ("Q: is rest the cure?\nA:", " It is, in the end."),
    ("When?", " In the morning, and then again in the evening."),
    ("Who rests?", " The patient."),
    ("Name a sign of it:", " fever"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def _find(kind: str, name: str) -> Path:
    path = SHARED / kind / name
    if not path.exists():
        pytest.skip(f"{kind}/{name} is not beside the project (set FEDCOLLM_SHARED to its parent folder)")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of a real data set, or skip."""
    return lambda name: _find("data", name)


@pytest.fixture(scope="session")
def shared_model() -> Callable[[str], Path]:
    """Path of a small real checkpoint, or skip."""
    return lambda name: _find("models", name)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Every supported architecture in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few dozen merges, so that one word may be several tokens; 300 tokens."""
    return tiny_checkpoints.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """``tiny_checkpoint(architecture, width=32, **config)``: a folder with random weights and the tiny tokenizer."""
    made: dict[str, Path] = {}

    def make(architecture: str, *, width: int = 32, **changes: Any) -> Path:
        key = f"{architecture}-{width}-{sorted(changes.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp("checkpoint") / architecture
            made[key] = tiny_checkpoints.save_tiny(path, architecture, width=width, tokenizer=tiny_tokenizer, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def load_tiny(tiny_checkpoint: Callable[..., Path]) -> Callable[..., AdaptedModel]:
    """``load_tiny(architecture, width=32, trained=False, r=4, ..., **config)``: such a checkpoint with its adapter.

    Fresh at every call. With ``trained``, B is random instead of 0, as after some rounds.
    """

    def load(architecture: str, *, width: int = 32, trained: bool = False, **options: Any) -> AdaptedModel:
        import numpy as np

        from secure_fedcollm import models

        ours = {
            "dtype": "float32",
            "device": "cpu",
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "target_modules": None,
            "seed": 0,
            "activation_checkpointing": False,
        }
        config = {key: options.pop(key) for key in list(options) if key not in ours}
        adapted = models.load(str(tiny_checkpoint(architecture, width=width, **config)), **(ours | options))
        if trained:
            spec = adapted.shared_spec("rebase")
            adapted.write(0.3 * np.random.default_rng(width).standard_normal(spec.dimension).astype("float32"), spec)
        return adapted

    return load


@pytest.fixture(scope="session")
def tiny_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> TokenDataset:
    """Eight questions and answers of different lengths, each of its own unit."""
    from secure_fedcollm.records import Record
    from secure_fedcollm.tokenization import tokenize

    records = [Record(prompt=p, target=t, site=None, unit=str(i)) for i, (p, t) in enumerate(QUESTIONS)]
    return tokenize(records, tiny_tokenizer, max_length=POSITIONS, append_eos=True)
