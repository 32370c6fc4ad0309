"""The settings that protect the sites: budgets and noise, and what the secure sum withstands.

None has a default here: they stand in ``configs/`` where a reviewer reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from secure_fedcollm.strict_build import check

__all__ = ["PrivacyConfig", "SecureSumConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyConfig:
    """What each site may spend in this run, and on its data set over all runs.

    Attributes:
        epsilon: the run's budget per site; sigma is calibrated to it for all rounds together.
        delta: the run's delta; at most 1e-5, and at most 1/(10 N) at every site.
        max_grad_norm: C, the L2 bound on one unit's gradient.
        expected_batch_size: expected number of units in a logical batch.
        unit: what one unit of privacy is; ``person`` needs ``data.unit_field``.
        max_records_per_unit: at most so many records of one person enter one step.
        clipping: ``flat`` shortens what is longer than C; ``automatic`` normalises every unit's gradient to about C.
        noise: ``local``: each site's own noise carries the whole guarantee. ``distributed``: each site adds a share,
            and the guarantee is that of sums (needs ``federation.release=gradient``).
        least_honest: h, the fewest honest sites that any opened sum holds, a site itself among them; at most
            ``federation.min_contributors``, less those that might collude.
        cap_epsilon: the data set's cap over all runs, kept by the ledger.
        cap_delta: likewise for delta.
        ledger_dir: null: the run's folder for public/synthetic data, ``~/.fedcollm/ledgers`` for private data.
        insecure_test_seed: null; a number makes sampling and noise repeatable and the run NOT PRIVATE, as every output
            then says. Refused on data declared private.
    """

    epsilon: float
    delta: float
    max_grad_norm: float
    expected_batch_size: int
    unit: Literal["record", "person"]
    max_records_per_unit: int
    clipping: Literal["flat", "automatic"]
    noise: Literal["local", "distributed"]
    least_honest: int
    cap_epsilon: float
    cap_delta: float
    ledger_dir: str | None
    insecure_test_seed: int | None

    def __post_init__(self) -> None:
        for name in ("epsilon", "max_grad_norm", "cap_epsilon"):
            check(getattr(self, name) > 0, f"privacy.{name}", getattr(self, name), "a number > 0")
        for name in ("delta", "cap_delta"):
            check(0 < getattr(self, name) < 1, f"privacy.{name}", getattr(self, name), "a number in (0, 1)")
        for name in ("expected_batch_size", "max_records_per_unit", "least_honest"):
            check(getattr(self, name) >= 1, f"privacy.{name}", getattr(self, name), "an integer >= 1")
        check(
            self.unit == "person" or self.max_records_per_unit == 1,
            "privacy.max_records_per_unit",
            self.max_records_per_unit,
            "1 when privacy.unit=record",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureSumConfig:
    """How updates become integers, and what the protocol withstands.

    Attributes:
        value_bits: signed bits per parameter, on a grid over [-clip, clip].
        clip: null takes learning rate times local steps.
        threshold: t: so many sites' shares take the masks of a sum away; null takes the least that is safe for the
            number of sites n, 2t > n + c. A larger one withstands more colluders, a smaller one more dropouts.
        max_colluding: c, how many sites may work with the server against the others.
        max_mean_norm: a longer mean update (L2) loses the round; null takes what the range or the privacy plan allows.
    """

    value_bits: int
    clip: float | None
    threshold: int | None
    max_colluding: int
    max_mean_norm: float | None

    def __post_init__(self) -> None:
        check(4 <= self.value_bits <= 18, "secure_sum.value_bits", self.value_bits, "an integer in [4, 18]")
        check(self.clip is None or self.clip > 0, "secure_sum.clip", self.clip, "null or a number > 0")
        check(self.max_colluding >= 0, "secure_sum.max_colluding", self.max_colluding, "an integer >= 0")
        positive = self.max_mean_norm is None or self.max_mean_norm > 0
        check(positive, "secure_sum.max_mean_norm", self.max_mean_norm, "null or a number > 0")

    def threshold_of(self, sites: int) -> int:
        """The threshold t for a federation of so many sites.

        Raises:
            ConfigError: the configured one is not safe, or larger than the number of sites.
        """
        least = (sites + self.max_colluding) // 2 + 1
        chosen = least if self.threshold is None else self.threshold
        check(
            least <= chosen <= sites,
            "secure_sum.threshold",
            self.threshold,
            f"an integer in [{least}, {sites}] (null takes {least}) with {sites} sites and secure_sum.max_colluding = "
            f"{self.max_colluding}"
            if least <= sites
            else "null, with a smaller secure_sum.max_colluding: "
            f"{self.max_colluding} colluders of {sites} sites cannot be withstood",
        )
        return chosen
