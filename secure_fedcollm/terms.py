"""The terms of a run: all that a run asks of a site, in one object that the server signs and a site can refuse.

The embedded run goes by the same object, so that a site on a machine of its own does exactly what it does there. What
a site decides itself (its data, policy, key, device, memory) stands in no terms.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Literal

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.messages import AdapterSpec, DpTerms, canonical_json, parse_json
from fedcollm_privacy.roster import Roster
from secure_fedcollm.config import AdapterConfig, Config, FederationConfig
from secure_fedcollm.privacy_config import PrivacyConfig
from secure_fedcollm.strict_build import build, check

__all__ = ["FORMAT", "MAX_BYTES", "RunTerms", "dp_terms", "require_offerable", "terms_of"]

FORMAT: Literal["fedcollm-run-terms-v1"] = "fedcollm-run-terms-v1"
MAX_BYTES = 2**16
"""No terms are longer."""

_MOST = 2**53 - 1
# What a signed offer may ask a site to hold or to compute; far beyond every real run.
_LARGEST = {"rounds": 100_000, "local_steps": 100_000, "batch_tokens": 2**24, "batch_size": 2**20}
_LARGEST_BATCH, _LARGEST_RANK, _LONGEST_TEXT = 2**20, 4096, 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTerms:
    """What a run asks of every site.

    Attributes:
        format: `FORMAT`.
        run_id: the run's name.
        server: the server's public name.
        roster_digest: of the roster that names the parties.
        base_model: digest of the model that sites train.
        dtype: of its frozen weights.
        seed: of the initial adapter and of the held-out division; never of sampling or noise.
        adapter: LoRA, as in the configuration.
        spec_digest: of the `AdapterSpec` of what travels.
        dimension: how many values that is.
        privacy: what the run may spend; None in a declared non-private run. Where ledgers lie and what a test is
            seeded with is each site's own, so both fields are null here.
        randomness: where sampling and noise come from; ``insecure_test_seed`` protects nobody and is said aloud.
        federation: the loop.
        max_colluding: c, how many sites may work with the server.
        max_length: tokens per record.
        append_eos: whether targets end with EOS.

    Raises:
        InvalidValue: any of this does not hold.
    """

    format: Literal["fedcollm-run-terms-v1"]
    run_id: str
    server: str
    roster_digest: str
    base_model: str
    dtype: Literal["float32", "bfloat16"]
    seed: int
    adapter: AdapterConfig
    spec_digest: str
    dimension: int
    privacy: PrivacyConfig | None
    randomness: Literal["operating_system", "insecure_test_seed"]
    federation: FederationConfig
    max_colluding: int
    max_length: int
    append_eos: bool

    def __post_init__(self) -> None:
        _validate.public_name(run_id=self.run_id, server=self.server)
        _validate.hex_digest(roster_digest=self.roster_digest, base_model=self.base_model, spec_digest=self.spec_digest)
        _validate.in_range(0, _MOST, seed=self.seed, max_colluding=self.max_colluding)
        _validate.in_range(1, _MOST, dimension=self.dimension)
        check(8 <= self.max_length <= _LONGEST_TEXT, "max_length", self.max_length, f"8 to {_LONGEST_TEXT} tokens")
        if self.privacy is not None:
            for name in ("ledger_dir", "insecure_test_seed"):
                check(
                    getattr(self.privacy, name) is None,
                    f"privacy.{name}",
                    getattr(self.privacy, name),
                    "null: it is each site's own",
                )
        check(
            self.privacy is not None or self.randomness == "operating_system",
            "randomness",
            self.randomness,
            "operating_system in a run without differential privacy",
        )

    @property
    def digest(self) -> str:
        """SHA-256 of `to_bytes`, as 64 hex digits: what an administrator approves."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Canonical JSON; equal terms have equal bytes."""
        return canonical_json(asdict(self))

    @staticmethod
    def from_bytes(data: bytes) -> RunTerms:
        """The terms in ``data``, which must be exactly what `to_bytes` gives.

        Raises:
            ProtocolError: too long, or no canonical JSON.
            InvalidValue: a field is unknown, missing, ill-typed or out of range.
        """
        if len(data) > MAX_BYTES:
            raise ProtocolError(f"the run's terms are {len(data)} bytes long; allowed: at most {MAX_BYTES}")
        try:
            fields = parse_json(data)
            canonical = canonical_json(fields) == data
        except (ValueError, RecursionError) as error:
            raise ProtocolError("the run's terms are malformed: not JSON") from error
        if not canonical or not isinstance(fields, dict):
            raise ProtocolError("the run's terms are malformed: not a canonical JSON object")
        terms = build(RunTerms, fields)
        if terms.to_bytes() != data:  # a number in another spelling, or a list for a tuple's null
            raise ProtocolError("the run's terms are malformed: not what their own fields give")
        return terms


def terms_of(config: Config, *, run_id: str, roster: Roster, spec: AdapterSpec, append_eos: bool) -> RunTerms:
    """The terms of a configured run.

    Args:
        config: of the run.
        run_id: its name.
        roster: of its parties.
        spec: of what travels.
        append_eos: of its public text.
    """
    privacy = config.privacy
    seeded = privacy is not None and privacy.insecure_test_seed is not None
    return RunTerms(
        format=FORMAT,
        run_id=run_id,
        server=roster.server.name,
        roster_digest=roster.digest,
        base_model=spec.base_model,
        dtype=config.model.dtype,
        seed=config.seed,
        adapter=config.adapter,
        spec_digest=spec.digest,
        dimension=spec.dimension,
        privacy=None if privacy is None else replace(privacy, ledger_dir=None, insecure_test_seed=None),
        randomness="insecure_test_seed" if seeded else "operating_system",
        federation=config.federation,
        max_colluding=config.secure_sum.max_colluding,
        max_length=config.data.max_length,
        append_eos=append_eos,
    )


def dp_terms(privacy: PrivacyConfig | None, federation: FederationConfig) -> DpTerms | None:
    """What of every site's privacy plan a round fixes, without any site's plan; None where nothing is trained with DP.

    Equal to `DpPlan.terms` of every plan that is calibrated for this run.
    """
    if privacy is None or federation.rounds == 0:
        return None
    return DpTerms(
        unit=privacy.unit,
        max_records_per_unit=privacy.max_records_per_unit,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=privacy.expected_batch_size,
        steps_per_round=federation.local_steps,
        clipping=privacy.clipping,
        noise=privacy.noise,
    )


def require_offerable(terms: RunTerms) -> None:
    """Return if these terms can be offered to sites on machines of their own.

    Raises:
        ConfigError: they need what only one process tree gives, or ask for more than any site should hold or compute.
    """
    federation = terms.federation
    for name, needed, because in (
        ("release", "update", "a common noise would have to be agreed on between machines, which is not offered yet"),
        ("exchange", "secure_sum", "a site that keeps its adapter needs no server"),
        ("pool", False, "records do not leave their sites"),
        ("site_model", "slm", "the LLM stays at the server"),
    ):
        value = getattr(federation, name)
        check(value == needed, f"federation.{name}", value, f"{needed} with sites on machines of their own: {because}")
    check(federation.rounds >= 1, "federation.rounds", federation.rounds, "an integer >= 1")
    for name, most in _LARGEST.items():
        check(getattr(federation, name) <= most, f"federation.{name}", getattr(federation, name), f"at most {most}")
    check(terms.adapter.r <= _LARGEST_RANK, "adapter.r", terms.adapter.r, f"at most {_LARGEST_RANK}")
    if terms.privacy is not None:
        batch = terms.privacy.expected_batch_size
        check(batch <= _LARGEST_BATCH, "privacy.expected_batch_size", batch, f"at most {_LARGEST_BATCH}")
    least = max(3, terms.max_colluding + 2)
    check(
        federation.min_contributors >= least,
        "federation.min_contributors",
        federation.min_contributors,
        f"at least max_colluding + 2 = {least}",
    )
