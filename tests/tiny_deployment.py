"""A deployment of tiny models on made-up notes, for tests and benchmarks that are about everything around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .deployment import Deployment
from .tiny_checkpoints import save_tiny

WORDS = (
    *("the", "ward", "nurse", "noted", "calm", "breath", "steady", "pulse"),
    *("fever", "cough", "pain", "rest", "water", "sleep", "walk", "home"),
)


def write_site_notes(path: Path, site: int, rows: int, seed: int = 0) -> Path:
    generator = np.random.default_rng([seed, site])
    with path.open("w") as file:
        for row in range(rows):
            words = generator.choice(WORDS, size=int(generator.integers(3, 9)))
            record = {
                "text": f"{' '.join(words)} {site}{row}.",
                "site": f"s{site:02d}",
                "person": f"p{site}-{row // 2}",
            }
            file.write(json.dumps(record) + "\n")
    return path


def tiny_deployment(root: Path, sites: tuple[str, ...], rows: int = 40, **options: Any) -> Deployment:
    """Notes and models are made under ``root``; the ceremony is still to come."""
    root.mkdir(parents=True, exist_ok=True)
    notes = {name: write_site_notes(root / f"{name}.notes.jsonl", i, rows) for i, name in enumerate(sites)}
    write_site_notes(root / "public.jsonl", len(sites), 60, seed=1)
    slm = save_tiny(root / "slm", width=32)
    save_tiny(root / "llm", width=64)
    return Deployment(root=root, sites=sites, notes=notes, model=slm, **options)


def small_run(deployment: Deployment) -> tuple[str, ...]:
    """Overrides of a small private run in this deployment."""
    root = deployment.root
    return (
        *SMALL,
        f"data.public_path={root / 'public.jsonl'}",
        f"model.slm={root / 'slm'}",
        f"model.llm={root / 'llm'}",
    )


SMALL = (
    "data=at_sites",
    "data.declared=synthetic",
    "data.max_length=32",
    "adapter.r=2",
    "federation.rounds=2",
    "federation.local_steps=2",
    "federation.batch_size=4",
    "distillation.batch_size=4",
    "distillation.steps=4",
    "privacy.expected_batch_size=8",
    "privacy.delta=1e-5",
    "privacy.cap_epsilon=10000.0",
    "privacy.cap_delta=0.3",
    "evaluation.max_records=8",
    "evaluation.generations=1",
    "evaluation.max_new_tokens=4",
)
