"""The configuration as frozen dataclasses.

Hydra only composes YAML (``cli.py``); nothing here knows it. ``strict_build.build`` refuses unknown and missing fields,
wrong types, NaN and values out of range, each with the field's full path. What protects the sites stands in
`privacy_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from secure_fedcollm.privacy_config import PrivacyConfig, SecureSumConfig
from secure_fedcollm.strict_build import check

__all__ = [
    "AdapterConfig",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "EvaluationConfig",
    "FederationConfig",
    "ModelConfig",
    "PrivacyConfig",
    "SecureSumConfig",
]

Task = Literal["text", "chat", "medquad", "commonsense_qa", "openbookqa", "arc", "embedded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the sites' text and the public text D_a come from.

    Attributes:
        task: which reader and prompt; ``text`` takes ``prompt_field``/``target_field``/``prompt_template``.
        declared: what the records are. ``private`` keeps the ledger across runs and evaluates on public text only;
            ``public`` and ``synthetic`` allow evaluation on the sites' held-out records.
        path: JSONL/CSV file or folder, or ``hub:<dataset id>``; null is the embedded synthetic data.
        policy_dir: folder of the sites' policies, ``<site>.yaml``; null takes ``~/.fedcollm/policies`` for private
            data, and writes the run's own for data that is declared public or synthetic.
        public_path: the public set D_a in the same format; null takes ``public_fraction``, or the packaged
            synthetic text when that is 0.
        public_fraction: share of the records that becomes D_a; refused for private data.
        partition: how records go to sites: by ``site_field``, ``iid``, or ``dirichlet`` over ``dirichlet_field``.
        held_out_fraction: share of each site's units that is never trained on.
        max_length: tokens per record; the prompt's beginning is cut first and the target is never dropped.
    """

    task: Task
    declared: Literal["private", "public", "synthetic"]
    path: str | None
    policy_dir: str | None
    public_path: str | None
    public_fraction: float
    split: str
    prompt_field: str | None
    target_field: str | None
    prompt_template: str | None
    site_field: str | None
    unit_field: str | None
    partition: Literal["column", "iid", "dirichlet"]
    dirichlet_alpha: float
    dirichlet_field: str | None
    site_names: tuple[str, ...]
    max_records_per_site: int | None
    held_out_fraction: float
    max_length: int

    def __post_init__(self) -> None:
        check(0 <= self.public_fraction < 1, "data.public_fraction", self.public_fraction, "a number in [0, 1)")
        check(0 < self.held_out_fraction < 1, "data.held_out_fraction", self.held_out_fraction, "in (0, 1)")
        check(self.dirichlet_alpha > 0, "data.dirichlet_alpha", self.dirichlet_alpha, "a number > 0")
        check(self.max_length >= 8, "data.max_length", self.max_length, "an integer >= 8")
        check(
            self.public_fraction == 0 or self.declared != "private",
            "data.public_fraction",
            self.public_fraction,
            "0 for private data: no record of a site may become public; give data.public_path, or say "
            "data.declared=public|synthetic if the records really are",
        )
        check(
            self.partition != "column" or self.site_field is not None or self.path is None,
            "data.site_field",
            self.site_field,
            "the column that names a record's site, because data.partition=column (or data.partition=iid)",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The pair: hub ids or local folders; null/null is the embedded pair.

    Attributes:
        slm: the small model.
        llm: the large model.
        dtype: of the frozen base weights; adapters stay float32.
        activation_checkpointing: compute activations again in the backward pass: less memory, a third more time.
        llm_device_map: spread the LLM's layers over all accelerators, by a strategy of transformers; null puts the LLM
            whole on ``device``, where the SLM always is.
    """

    slm: str | None
    llm: str | None
    dtype: Literal["float32", "bfloat16"]
    activation_checkpointing: bool
    llm_device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None

    def __post_init__(self) -> None:
        check(
            (self.slm is None) == (self.llm is None),
            "model.llm",
            self.llm,
            "give model.slm and model.llm together",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """LoRA; names as in peft.

    Attributes:
        site_ranks: sites that train an adapter of a lower rank than ``r``, with their ranks; null: none.
    """

    r: int
    site_ranks: Mapping[str, int] | None
    lora_alpha: int
    lora_dropout: float
    target_modules: tuple[str, ...] | None
    aggregation: Literal["rebase", "freeze_a", "factor_average"]

    def __post_init__(self) -> None:
        check(self.r >= 1, "adapter.r", self.r, "an integer >= 1")
        check(self.lora_alpha >= 1, "adapter.lora_alpha", self.lora_alpha, "an integer >= 1")
        check(0 <= self.lora_dropout < 1, "adapter.lora_dropout", self.lora_dropout, "a number in [0, 1)")
        for site, rank in (self.site_ranks or {}).items():
            allowed = f"an integer from 1 to adapter.r - 1 = {self.r - 1}"
            check(1 <= rank < self.r, f"adapter.site_ranks.{site}", rank, allowed)
        check(
            not self.site_ranks or self.aggregation == "rebase",
            "adapter.aggregation",
            self.aggregation,
            "rebase with adapter.site_ranks: only there the first components are the ones that matter most",
        )

    def rank_of(self, site: str) -> int:
        """The rank of a site's adapter."""
        return (self.site_ranks or {}).get(site, self.r)


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationConfig:
    """The loop, and the switches that turn it into every baseline.

    Attributes:
        rounds: communication rounds T; 0 is zero-shot.
        local_steps: optimizer steps per site and round.
        release: what sites send: ``update``, what their steps did to the adapter; ``gradient``, with one step a round:
            the noisy gradient itself, which the server's Adam takes.
        sites: number of sites when records are dealt out (``partition=iid|dirichlet``).
        min_contributors: k, the fewest uploads a sum may hold.
        exchange: ``secure_sum``: sites send encrypted updates; ``none``: every site keeps its own adapter.
        pool: all sites' records and D_a in one place (the centralised baselines; nothing federated about it).
        site_model: which model the sites train.
        learning_rate: of the sites' optimizer; with ``release=gradient`` of the server's.
        batch_tokens: padded tokens per physical batch; bounds memory, changes no result.
        batch_size: records per step when no DP is on.
        round_time_limit_s: a round's plan expires so many seconds after it was signed; no site answers later.
    """

    rounds: int
    local_steps: int
    release: Literal["update", "gradient"]
    sites: int
    min_contributors: int
    exchange: Literal["secure_sum", "none"]
    pool: bool
    site_model: Literal["slm", "llm"]
    learning_rate: float
    batch_tokens: int
    batch_size: int
    round_time_limit_s: int

    def __post_init__(self) -> None:
        check(self.rounds >= 0, "federation.rounds", self.rounds, "an integer >= 0")
        for name in ("local_steps", "sites", "batch_tokens", "batch_size", "round_time_limit_s"):
            check(getattr(self, name) >= 1, f"federation.{name}", getattr(self, name), "an integer >= 1")
        check(self.learning_rate > 0, "federation.learning_rate", self.learning_rate, "a number > 0")
        check(
            self.min_contributors >= 3,
            "federation.min_contributors",
            self.min_contributors,
            "an integer >= 3",
        )
        check(
            not (self.pool and self.exchange == "secure_sum"),
            "federation.pool",
            self.pool,
            "false with federation.exchange=secure_sum: pooled data has one holder and nothing to sum",
        )
        check(
            self.site_model == "slm" or self.exchange == "none",
            "federation.site_model",
            self.site_model,
            "slm with federation.exchange=secure_sum: only the SLM's adapter moves",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationConfig:
    """Server-side co-tuning on D_a; ``steps=0`` switches it off, ``kd_weight=0`` leaves plain fine-tuning.

    Attributes:
        warm_start_steps: such steps before the first round. They read public text only and cost no privacy; the first
            private step then starts from adapters that know it.
        kd_weight: lambda, the weight of the KL term beside cross-entropy, on both sides.
        direction: ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher).
        top_k: keep the teacher's k largest probabilities and one bucket for the rest; null is the full vocabulary.
        alignment: ``same`` refuses a pair with two tokenizers; ``common_support`` takes it and compares what both can
            tell of (docs/distillation.md). With one tokenizer both are the same.
        train_slm: whether the SLM learns on D_a.
        train_llm: whether the LLM learns on D_a; false is the one-way method LLM -> SLM.
    """

    steps: int
    warm_start_steps: int
    batch_size: int
    kd_weight: float
    temperature: float
    direction: Literal["forward", "reverse"]
    top_k: int | None
    alignment: Literal["same", "common_support"]
    train_slm: bool
    train_llm: bool
    slm_learning_rate: float
    llm_learning_rate: float

    def __post_init__(self) -> None:
        for name in ("steps", "warm_start_steps"):
            check(getattr(self, name) >= 0, f"distillation.{name}", getattr(self, name), "an integer >= 0")
        check(self.batch_size >= 1, "distillation.batch_size", self.batch_size, "an integer >= 1")
        check(self.kd_weight >= 0, "distillation.kd_weight", self.kd_weight, "a number >= 0")
        check(self.top_k is None or self.top_k >= 1, "distillation.top_k", self.top_k, "null or an integer >= 1")
        for name in ("temperature", "slm_learning_rate", "llm_learning_rate"):
            check(getattr(self, name) > 0, f"distillation.{name}", getattr(self, name), "a number > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """What is measured: every ``every`` rounds (and before and after), on at most ``max_records`` records."""

    every: int
    max_records: int
    generations: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        for name in ("every", "max_records", "max_new_tokens"):
            check(getattr(self, name) >= 1, f"evaluation.{name}", getattr(self, name), "an integer >= 1")
        check(self.generations >= 0, "evaluation.generations", self.generations, "an integer >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run. ``seed`` fixes data split, initial adapters and server batches; never sampling or noise."""

    name: str
    method: str
    private: bool
    seed: int
    output_dir: str | None
    device: str
    data: DataConfig
    model: ModelConfig
    adapter: AdapterConfig
    privacy: PrivacyConfig | None
    federation: FederationConfig
    distillation: DistillationConfig
    secure_sum: SecureSumConfig
    evaluation: EvaluationConfig

    def __post_init__(self) -> None:
        check(
            self.private == (self.privacy is not None),
            "private",
            self.private,
            "true together with a privacy section, false without one; a non-private run is an experiment of its "
            "own (experiment=..._non_private) and says so in every output",
        )
        self._check_release()
        check(
            self.data.partition == "column" or self.data.declared != "private",
            "data.partition",
            self.data.partition,
            "column for private data, with data.site_field=<column that names a record's site>: records that are dealt "
            "out by chance would be charged to other ledgers in the next run. Or say data.declared=public|synthetic if "
            "the records really are",
        )
        check(
            not self.federation.pool or self.data.declared != "private",
            "federation.pool",
            self.federation.pool,
            "false for private data: pooled records would be charged to another ledger than their sites'",
        )
        check(
            self.federation.exchange == "secure_sum" or not self.adapter.site_ranks,
            "adapter.site_ranks",
            self.adapter.site_ranks,
            "null with federation.exchange=none: nothing is summed",
        )
        check(
            self.federation.exchange == "secure_sum" or self.distillation.warm_start_steps == 0,
            "distillation.warm_start_steps",
            self.distillation.warm_start_steps,
            "0 with federation.exchange=none: the server gives nothing to sites that train alone",
        )
        least = max(3, self.secure_sum.max_colluding + 2)
        check(
            self.federation.exchange == "none" or self.federation.min_contributors >= least,
            "federation.min_contributors",
            self.federation.min_contributors,
            f"at least secure_sum.max_colluding + 2 = {least}: from a smaller sum the colluders learn a single update",
        )
        if self.privacy is not None:
            check(
                self.privacy.insecure_test_seed is None or self.data.declared != "private",
                "privacy.insecure_test_seed",
                self.privacy.insecure_test_seed,
                "null on data declared private: a seeded run protects nobody",
            )
            check(
                self.privacy.unit == "record" or self.data.unit_field is not None or self.data.path is None,
                "data.unit_field",
                self.data.unit_field,
                "the column that names a record's person, because privacy.unit=person",
            )

    @property
    def guaranteed(self) -> bool:
        """Whether the sites' training is differentially private: neither declared non-private nor a seeded test."""
        return self.privacy is not None and self.privacy.insecure_test_seed is None

    def _check_release(self) -> None:
        federation, gradient = self.federation, self.federation.release == "gradient"
        noise = "local" if self.privacy is None else self.privacy.noise
        check(
            gradient or noise == "local",
            "privacy.noise",
            noise,
            "local, or federation.release=gradient beside it (privacy=distributed sets both): only one-step rounds add "
            "the sites' noise up",
        )
        if not gradient:
            return
        check(
            federation.local_steps == 1,
            "federation.local_steps",
            federation.local_steps,
            "1 with federation.release=gradient: take more rounds instead",
        )
        check(
            self.privacy is not None and federation.exchange == "secure_sum",
            "federation.release",
            federation.release,
            "update in a run without DP or without exchange",
        )
        check(
            self.adapter.aggregation != "rebase",
            "adapter.aggregation",
            self.adapter.aggregation,
            "factor_average | freeze_a with federation.release=gradient: the server's Adam would lose its coordinates, "
            "and a mean of gradients at one point is exact for both factors",
        )
        least = self.privacy.least_honest if self.privacy else 1
        honest = federation.min_contributors - self.secure_sum.max_colluding
        check(
            least <= honest,
            "privacy.least_honest",
            least,
            f"at most federation.min_contributors - secure_sum.max_colluding = {honest}: no sum is sure to hold more "
            "sites' noise",
        )
