"""The server: plans rounds, takes the opened sum (never an update), co-tunes SLM and LLM on public text."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.ckks import PublicContext
from fedcollm_privacy.errors import RoundLost
from fedcollm_privacy.messages import DpTerms, OpenedSum, RoundPlan, vector_digest
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.quantization import dequantize_mean
from fedcollm_privacy.ranks import rank_of
from secure_fedcollm.alignment import AlignedTokens
from secure_fedcollm.config import Config
from secure_fedcollm.distillation import CoTuningReport, co_tune
from secure_fedcollm.models import AdaptedModel, rebase
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.ranks import reach
from secure_fedcollm.server_optimizer import AdamState, adam_step
from secure_fedcollm.tokenization import TokenDataset

__all__ = ["CoTuned", "Server"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoTuned:
    """Both adapters after a round, float32 [D]; ``slm`` is what the next round broadcasts."""

    slm: Float32
    llm: Float32
    report: CoTuningReport | None


class Server:
    """Holds public text, both models, and opened sums.

    Args:
        config: of the run.
        run_id: the run's name.
        slm: the server's copy of the SLM.
        llm: the LLM; it never leaves the server.
        public_tokens: D_a, aligned where the models have two tokenizers.
        sites: number of sites, the most that a sum may hold.
        roster_digest: of the roster that names them.
        progress: where a person sees the steps.
        terms: what of the sites' privacy plans a round fixes; None in a declared non-private run.
        clock: Unix time in seconds.
        gradient_plan: any site's plan where sites send gradients; what it says of grid and noise is the same at all.
    """

    def __init__(
        self,
        *,
        config: Config,
        run_id: str,
        slm: AdaptedModel,
        llm: AdaptedModel,
        public_tokens: TokenDataset | AlignedTokens,
        sites: int,
        roster_digest: str,
        progress: RunProgress,
        terms: DpTerms | None,
        gradient_plan: DpPlan | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._gradient_plan, self._roster_digest, self._terms, self._clock = gradient_plan, roster_digest, terms, clock
        self._config, self._run_id, self._sites, self._progress = config, run_id, sites, progress
        self._slm, self._llm, self._public_tokens = slm, llm, public_tokens
        self._spec = slm.shared_spec(config.adapter.aggregation)

    @property
    def clip(self) -> float:
        """Range of one update coordinate on the grid.

        Adam moves a coordinate by about the learning rate a step, so a whole round stays within steps * rate except in
        rare, saturated coordinates. Nothing here depends on data.
        """
        if self._gradient_plan is not None:
            return self._gradient_plan.gradient_clip
        federation = self._config.federation
        return self._config.secure_sum.clip or federation.learning_rate * federation.local_steps

    @property
    def max_mean_norm(self) -> float:
        """The longest mean update (L2, update units) that is taken.

        Released gradients have a bound that honest sites stay within (all but 1 in 10^9 of a Poisson batch clipped to
        C, and their noise); an update's is what its range allows, unless the configuration says less.
        """
        config, dimension = self._config, self._spec.dimension
        if config.secure_sum.max_mean_norm is not None:
            return config.secure_sum.max_mean_norm
        plan = self._gradient_plan
        if plan is None:
            return self.clip * math.sqrt(dimension)
        batch = plan.expected_batch_size
        noise = plan.site_noise_multiplier * (math.sqrt(dimension) + 6.0)
        return plan.max_grad_norm * (batch + 6.0 * math.sqrt(batch) + 6.0 + noise)

    def plan_round(self, server_round: int, attempt: int, context: PublicContext, adapter: Float32) -> RoundPlan:
        """What all parties of the round agree on, with a fresh nonce.

        Args:
            server_round: 1, 2, ...
            attempt: of this round.
            context: the round's public key.
            adapter: the SLM's adapter that all sites will start from, float32 [D].
        """
        config, plan = self._config, self._gradient_plan
        narrow = config.adapter.site_ranks or {}
        contributors = max(self._sites, config.federation.min_contributors)
        return RoundPlan(
            run_id=self._run_id,
            server_round=server_round,
            attempt=attempt,
            spec_digest=self._spec.digest,
            adapter_digest=vector_digest(adapter),
            dimension=self._spec.dimension,
            clip=self.clip,
            value_bits=config.secure_sum.value_bits,
            min_contributors=config.federation.min_contributors,
            max_contributors=contributors,
            threshold=config.secure_sum.threshold_of(contributors),
            max_colluding=config.secure_sum.max_colluding,
            roster_digest=self._roster_digest,
            ckks=context.parameters,
            key_digest=context.digest,
            max_mean_norm=self.max_mean_norm,
            nonce=os.urandom(16).hex(),
            expires_at=int(self._clock() + config.federation.round_time_limit_s),
            dp=self._terms,
            release="update" if plan is None else "gradient",
            noise_multiplier=0.0 if plan is None else plan.noise_multiplier,
            least_honest=1 if plan is None else plan.least_honest,
            narrow_sites=tuple(sorted(narrow)),
            narrow_ranks=tuple(narrow[site] for site in sorted(narrow)),
        )

    def apply(self, adapter: Float32, adam: AdamState, opened: OpenedSum) -> tuple[Float32, AdamState]:
        """Add the mean update to the broadcast adapter, or take one step of Adam with the mean gradient.

        Returns:
            The adapter, float32 [D], and the optimizer's state (as it was, where sites send updates).

        Raises:
            RoundLost: the sum is not of this adapter, or its mean is longer than the plan allows.
        """
        if opened.plan.spec_digest != self._spec.digest or opened.total.shape != (self._spec.dimension,):
            raise RoundLost("the opened sum is of another adapter")
        mean = dequantize_mean(opened)
        if opened.plan.narrow_sites:
            ranks = [rank_of(opened.plan, site) or self._config.adapter.r for site in opened.cohort]
            # A coordinate that none fills is 0 in the sum.
            mean *= (len(ranks) / np.maximum(reach(self._spec, ranks), 1)).astype(np.float32)
        norm = float(np.linalg.norm(mean.astype(np.float64)))
        if not norm <= opened.plan.max_mean_norm * (1 + 1e-6):
            raise RoundLost(
                f"the mean update has norm {norm:.4g}, the plan allows {opened.plan.max_mean_norm:.4g}; nothing of it "
                "was taken. A site may be sending too much: find out which before the next run"
            )
        self._slm.write(adapter)
        shared = self._slm.read(self._spec)
        if self._gradient_plan is None:
            shared = shared + mean
        else:
            mean = mean / np.float32(self._gradient_plan.expected_batch_size)
            rate = self._config.federation.learning_rate
            shared, adam = adam_step(shared, mean, adam, learning_rate=rate)
        self._slm.write(shared, self._spec)
        return self._slm.read(), adam

    def co_tune(self, slm: Float32, llm: Float32, server_round: int) -> CoTuned:
        """Mutual distillation on D_a, then re-basing; without steps only the re-basing.

        Round 0 is the warm start, ``distillation.warm_start_steps`` before any site has trained.

        Raises:
            RoundLost: a model diverged (NaN or infinity); the adapters are as before.
        """
        config = self._config
        how = config.distillation
        if server_round == 0:
            how = replace(how, steps=how.warm_start_steps)
        self._slm.write(slm)
        self._llm.write(llm)
        report = None
        if how.steps > 0:
            with self._progress.stage(
                "distil", f"server: round {server_round}, co-tuning SLM and LLM", how.steps
            ) as step:
                report = co_tune(
                    slm=self._slm,
                    llm=self._llm,
                    tokens=self._public_tokens,
                    config=how,
                    train_slm_a=config.adapter.aggregation != "freeze_a",
                    seed=config.seed + 7_919 * server_round,
                    on_step=step,
                )
        # No SVD takes NaN.
        if config.adapter.aggregation == "rebase" and np.isfinite(self._slm.read()).all():
            rebase(self._slm)
        tuned = CoTuned(slm=self._slm.read(), llm=self._llm.read(), report=report)
        if not (np.isfinite(tuned.slm).all() and np.isfinite(tuned.llm).all()):
            raise RoundLost(
                "co-tuning diverged (NaN or infinity); lower distillation.slm_learning_rate or llm_learning_rate"
            )
        return tuned
