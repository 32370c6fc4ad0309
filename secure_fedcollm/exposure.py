"""Exposure of planted secrets (Carlini et al. 2019, "The Secret Sharer", USENIX Security, section 4.2).

A secret was drawn uniformly from known candidates, so a model that learnt nothing of it ranks it anywhere; the bits
by which its rank beats that are what leaked. Exposure is a measurement on this one draw, not a bound: the guarantee
is epsilon and delta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from fedcollm_privacy.errors import InvalidValue
from secure_fedcollm.evaluation import log_likelihoods
from secure_fedcollm.records import PlantedSecret
from secure_fedcollm.tokenization import Tokenizer

__all__ = ["Exposure", "exposure"]

BATCH_TOKENS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """How well a model knows one secret.

    Attributes:
        site: the site that holds it.
        prompt: the text before it.
        secret: the planted continuation.
        repetitions: records of the site that contain it.
        candidates: number of continuations it was drawn from.
        rank: 1 is the likeliest candidate, ``candidates`` the least likely.
        exposure: ``log2(candidates) - log2(rank)`` bits; 0 at the last rank, ``log2(candidates)`` at the first, and
            1.44 expected of a model that never saw the secret (uniform rank, many candidates).
    """

    site: str
    prompt: str
    secret: str
    repetitions: int
    candidates: int
    rank: int
    exposure: float


def exposure(
    model: nn.Module, tokenizer: Tokenizer, secrets: Sequence[PlantedSecret], *, max_length: int
) -> tuple[Exposure, ...]:
    """Rank every secret among its candidates by log-likelihood after the prompt.

    The score is the sum over a candidate's own tokens, end of text left out. Only a strictly likelier candidate
    counts before the secret: a tie counts as leakage, so exposure is never understated. Candidates of one secret
    should have equally many tokens, or short ones win.

    Args:
        model: as in ``evaluation.evaluate``; its training mode is as before afterwards.
        tokenizer: the model's own.
        secrets: any number; none gives an empty result.
        max_length: tokens per prompt and candidate, as in training.

    Raises:
        InvalidValue: candidates repeat, or the secret is not one of them.
        ModelError: a log-likelihood is not finite.
    """
    for secret in secrets:
        if len(set(secret.candidates)) != len(secret.candidates) or secret.secret not in secret.candidates:
            # The value stays out of the message: a secret has no place in logs.
            raise InvalidValue(
                "secret.candidates",
                f"<{len(secret.candidates)} texts of site {secret.site}>",
                "distinct texts, the planted secret among them",
            )
    pairs = [(secret.prompt, candidate) for secret in secrets for candidate in secret.candidates]
    scores = iter(log_likelihoods(model, tokenizer, pairs, max_length=max_length, batch_tokens=BATCH_TOKENS))
    results = []
    for secret in secrets:
        score_of = {candidate: next(scores) for candidate in secret.candidates}
        rank = 1 + sum(score > score_of[secret.secret] for score in score_of.values())
        results.append(
            Exposure(
                site=secret.site,
                prompt=secret.prompt,
                secret=secret.secret,
                repetitions=secret.repetitions,
                candidates=len(score_of),
                rank=rank,
                exposure=math.log2(len(score_of)) - math.log2(rank),
            )
        )
    return tuple(results)
