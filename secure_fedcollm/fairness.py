"""What each site has of a run: the model it ends up with, measured on its own held-out records."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from secure_fedcollm.assembly import Assembly
from secure_fedcollm.evaluation import evaluate
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.records import Record
from secure_fedcollm.rounds import State

__all__ = ["per_site"]

Metrics = dict[str, float]


def per_site(parts: Assembly, state: State, progress: RunProgress) -> dict[str, dict[str, Metrics]]:
    """Metrics of every site's model on that site's held-out records, ``before`` and ``after``.

    A site's model is the federation's SLM; without exchange it is the site's own, and in a pooled run the pooled one
    (the LLM, where sites train that). Together at most ``evaluation.max_records`` records are scored twice, of each
    site equally many if it has them, and at least one.

    Returns:
        Nothing where records are declared private, since such a metric is a release that no budget pays for; nothing
        for a site without held-out records, or where sites are on machines of their own.
    """
    records: dict[str, list[Record]] = {}
    for data in parts.data.sites:
        for record in data.held_out:
            records.setdefault(record.site or data.name, []).append(record)
    if parts.config.data.declared == "private" or not records:
        return {}
    most = max(1, parts.config.evaluation.max_records // len(records))
    measured: dict[str, dict[str, Metrics]] = {}
    with progress.stage("evaluate", f"evaluate for each of {len(records)} sites", 2 * len(records)) as step:
        for when, now in (("before", parts.start), ("after", state)):
            for site, own in sorted(records.items()):
                chosen = list(own)
                random.Random(parts.config.seed).shuffle(chosen)  # noqa: S311 - which records are scored is no secret
                metrics = _measure(parts, _adapter(parts, now, site), chosen[:most])
                measured.setdefault(site, {})[when] = metrics
                step()
    return measured


def _adapter(parts: Assembly, state: State, site: str) -> NDArray[np.float32]:
    if state.alone:
        return state.alone[site] if site in state.alone else next(iter(state.alone.values()))
    return state.slm if parts.config.federation.site_model == "slm" else state.llm


def _measure(parts: Assembly, adapter: NDArray[np.float32], records: list[Record]) -> Metrics:
    adapted = parts.slm if parts.config.federation.site_model == "slm" else parts.llm
    adapted.write(adapter)
    return evaluate(
        adapted.model,
        adapted.tokenizer,
        records,
        max_length=parts.config.data.max_length,
        append_eos=parts.data.append_eos,
        batch_tokens=4 * parts.config.federation.batch_tokens,
    )
