"""The privacy plan of one site for one run: committed before training, and the guarantee itself.

Sampler, clipping, noise and accountant all read this one object. Step counts are integers and the sampling rate is a
rational; nothing is derived from a float.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from fedcollm_privacy import _validate, accounting
from fedcollm_privacy.accounting import Steps
from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.messages import DpTerms, digest_of

__all__ = ["DpPlan", "calibrate", "nominal_size"]

RELATION: Literal["add_or_remove_one"] = "add_or_remove_one"


def nominal_size(units: int) -> int:
    """The site's size as the plan may know it: the number of units, rounded to two significant digits.

    The plan's sampling rate is public to whoever reads the ledger, and an exact rate would give away the exact number
    of units. The rounded size is treated as public; the statement says so.
    """
    _validate.integer_at_least(1, units=units)
    return max(1, int(float(f"{units:.1e}")))


@dataclass(frozen=True, slots=True, kw_only=True)
class DpPlan:
    """DP-SGD at one site (Abadi et al. 2016) with Poisson sampling of units.

    Per step: every unit enters with probability ``sample_rate``; the gradient of each unit (at most
    ``max_records_per_unit`` of its records, summed) is clipped to L2 norm ``max_grad_norm``; to the sum is added
    Gaussian noise of standard deviation ``noise_multiplier * max_grad_norm``; the result is divided by the public
    ``expected_batch_size``.

    With ``noise="distributed"`` a site adds only ``noise_multiplier / sqrt(least_honest)`` of it, and the guarantee is
    that of the sum: it holds towards everybody who sees sums only, as long as every sum holds the noise of at least
    ``least_honest`` honest sites, this one included.

    Attributes:
        unit: what one unit of privacy is: one record, or all records of one person.
        clipping: ``flat`` scales down what is longer than C (Abadi et al. 2016); ``automatic`` scales every gradient g
            to ``C g / (|g| + 0.01 C)`` (Bu et al. 2023, AUTO-S), so that C needs no tuning. Both have sensitivity C.
        noise: whose noise the guarantee counts: this site's alone, or that of the fewest honest sites in a sum.
        least_honest: h, see above; with local noise it only enters the view of who sees sums.
        release: ``update``: what a round's steps did to the adapter; ``gradient``: the noisy gradient of one step.
        randomness: ``insecure_test_seed`` makes a run repeatable and void of any guarantee.
        neighboring_relation: data sets that differ by adding or removing one unit.
        steps_per_round: E, steps between two uploads.
        rounds: T.
        delta: of the guarantee for all rounds together.
    """

    unit: Literal["record", "person"]
    max_records_per_unit: int
    max_grad_norm: float
    noise_multiplier: float
    sample_rate: Fraction
    expected_batch_size: int
    steps_per_round: int
    rounds: int
    delta: float
    clipping: Literal["flat", "automatic"] = "flat"
    noise: Literal["local", "distributed"] = "local"
    least_honest: int = 1
    release: Literal["update", "gradient"] = "update"
    randomness: Literal["operating_system", "insecure_test_seed"] = "operating_system"
    neighboring_relation: Literal["add_or_remove_one"] = RELATION

    def __post_init__(self) -> None:
        _validate.one_of(("record", "person"), unit=self.unit)
        _validate.one_of(("flat", "automatic"), clipping=self.clipping)
        _validate.one_of(("local", "distributed"), noise=self.noise)
        _validate.one_of(("update", "gradient"), release=self.release)
        _validate.one_of(("operating_system", "insecure_test_seed"), randomness=self.randomness)
        _validate.one_of((RELATION,), neighboring_relation=self.neighboring_relation)
        _validate.positive(max_grad_norm=self.max_grad_norm, noise_multiplier=self.noise_multiplier)
        counts = ("max_records_per_unit", "expected_batch_size", "steps_per_round", "rounds", "least_honest")
        _validate.integer_at_least(1, **{name: getattr(self, name) for name in counts})
        if not isinstance(self.sample_rate, Fraction) or not 0 < self.sample_rate <= 1:
            raise InvalidValue("sample_rate", self.sample_rate, "a Fraction in (0, 1]")
        _validate.positive(delta=self.delta)
        _validate.in_range(0, 0.5, delta=self.delta)
        if self.unit == "record" and self.max_records_per_unit != 1:
            raise InvalidValue("max_records_per_unit", self.max_records_per_unit, "1 when unit is 'record'")
        if self.release == "gradient" and self.steps_per_round != 1:
            raise InvalidValue("steps_per_round", self.steps_per_round, "1 when the gradient itself is released")
        if self.noise == "distributed" and self.release != "gradient":
            # Inside several local steps the other sites' noise is absent, so it protects nothing there.
            raise InvalidValue("noise", self.noise, "'local' unless release is 'gradient' (one-step rounds)")

    @property
    def steps(self) -> int:
        """All steps of the run, T * E."""
        return self.rounds * self.steps_per_round

    @property
    def site_noise_multiplier(self) -> float:
        """What this site itself adds, in units of C: all of sigma, or its share sigma / sqrt(h)."""
        return self.noise_multiplier / (math.sqrt(self.least_honest) if self.noise == "distributed" else 1.0)

    @property
    def terms(self) -> DpTerms:
        """What of this plan is the same at all sites of a round, and stands in the round's plan."""
        return DpTerms(
            unit=self.unit,
            max_records_per_unit=self.max_records_per_unit,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=self.expected_batch_size,
            steps_per_round=self.steps_per_round,
            clipping=self.clipping,
            noise=self.noise,
        )

    @property
    def event(self) -> Any:
        """The run's claim as dp-accounting's ``DpEvent``."""
        return self.schedule(self.steps).event

    def schedule(self, steps: int) -> Steps:
        """What the accountant composes for ``steps`` steps of this plan."""
        return Steps(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps)

    def epsilon(self, steps: int) -> float:
        """Upper bound on epsilon at ``delta`` after ``steps`` steps: what the plan claims and the ledger charges."""
        return self._epsilon(self.noise_multiplier, steps)

    def epsilon_one_update(self, steps: int) -> float:
        """The same towards somebody who sees every upload of this site in clear."""
        return self._epsilon(self.site_noise_multiplier, steps)

    def epsilon_sum_only(self, steps: int) -> float:
        """The same towards somebody who sees only sums over at least ``least_honest`` honest sites, and models.

        Equal to `epsilon_one_update` where rounds have several steps: inside them other sites' noise is absent.
        """
        others = math.sqrt(self.least_honest) if self.release == "gradient" else 1.0
        return self._epsilon(self.site_noise_multiplier * others, steps)

    def _epsilon(self, noise_multiplier: float, steps: int) -> float:
        return accounting.epsilon(noise_multiplier, self.sample_rate, steps, self.delta)

    @property
    def gradient_clip(self) -> float:
        """Largest coordinate, in gradient units, of a released gradient: public, so that all sites share one grid.

        A sum's coordinate beyond C * max(1, B/16) is moved there before the noise (a projection, which cannot raise
        the sensitivity), and no noise is longer than 9 standard deviations (`SecureRandom.normals`).
        """
        return self.max_grad_norm * (max(1.0, self.expected_batch_size / 16) + 9.0 * self.site_noise_multiplier)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ledger and statement; the rate is written as "p/q"."""
        return {
            **asdict(self),
            "sample_rate": f"{self.sample_rate.numerator}/{self.sample_rate.denominator}",
        }

    @property
    def digest(self) -> str:
        """SHA-256 over all fields."""
        return digest_of(self.as_dict())


def calibrate(
    *,
    target_epsilon: float,
    delta: float,
    unit: Literal["record", "person"],
    max_records_per_unit: int,
    max_grad_norm: float,
    expected_batch_size: int,
    steps_per_round: int,
    rounds: int,
    units: int,
    clipping: Literal["flat", "automatic"] = "flat",
    noise: Literal["local", "distributed"] = "local",
    least_honest: int = 1,
    release: Literal["update", "gradient"] = "update",
    randomness: Literal["operating_system", "insecure_test_seed"] = "operating_system",
) -> DpPlan:
    """The plan with the least noise whose whole run costs at most ``target_epsilon`` at ``delta``.

    Args:
        units: number of units the site trains on; enters only as its nominal size.

    Raises:
        InvalidValue: delta is above 1e-5 or 1/(10 N) (a larger one could mean publishing records), or the expected
            batch is larger than the site's data, or the budget cannot be met.
    """
    size = nominal_size(units)
    _validate.integer_at_least(
        1, expected_batch_size=expected_batch_size, steps_per_round=steps_per_round, rounds=rounds
    )
    if not delta <= min(1e-5, 1 / (10 * units)):
        raise InvalidValue(
            "privacy.delta",
            delta,
            "a number <= 1e-5, and <= 1/(10 N) for every site's number of units N; choose a smaller one",
        )
    if expected_batch_size > size:
        raise InvalidValue(
            "privacy.expected_batch_size",
            expected_batch_size,
            "at most the number of units of the smallest site; use a smaller batch or leave that site out",
        )
    sample_rate = Fraction(expected_batch_size, size)
    sigma = accounting.calibrate_noise_multiplier(
        target_epsilon=target_epsilon, delta=delta, sample_rate=sample_rate, steps=rounds * steps_per_round
    )
    return DpPlan(
        unit=unit,
        max_records_per_unit=max_records_per_unit,
        max_grad_norm=max_grad_norm,
        noise_multiplier=sigma,
        sample_rate=sample_rate,
        expected_batch_size=expected_batch_size,
        steps_per_round=steps_per_round,
        rounds=rounds,
        delta=delta,
        clipping=clipping,
        noise=noise,
        least_honest=least_honest,
        release=release,
        randomness=randomness,
    )
