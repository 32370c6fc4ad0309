"""What it costs to try several settings on private data and keep the best: Papernot and Steinke (2022).

Choosing among results is a look at the data too. When the number of trials is itself random, drawn from one of the
laws below before the first trial and kept secret, the best of all trials costs far less than all trials together
(theorems 2 and 6 of "Hyperparameter tuning with Rényi differential privacy"; the arithmetic is dp-accounting's).

What it takes for these figures to hold:

- every trial is drawn anew from the same list of settings, independently, and costs at most the given schedule;
- one result leaves: the best one's. Neither the others, nor their scores, nor the number of trials are ever seen;
- the score by which the best is found is a function of what the trial itself would have released.

A table of all trials breaks the second rule, whatever was drawn. So does a server that sees every trial's sums: towards
it the trials cost their plain composition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final, Literal

import dp_accounting
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq

from fedcollm_privacy import _validate
from fedcollm_privacy.accounting import Steps
from fedcollm_privacy.errors import InvalidValue
from fedcollm_privacy.randomness import SecureRandom

__all__ = ["TrialLaw", "selected_epsilon"]

_MOST_EXPECTED: Final = 500.0
_LARGEST_ETA: Final = 100.0
_BITS: Final = 53


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialLaw:
    """How the number of trials is drawn.

    Attributes:
        kind: ``truncated_negative_binomial`` gives at least one trial; ``poisson`` may give none at all, and then there
            is no result.
        expected: mean number of trials, in [1, 500].
        eta: shape of the truncated negative binomial, in [0, 100]; 0 is the logarithmic law, 1 the geometric one.
            Smaller costs less and more often gives a single trial. None for ``poisson``.
    """

    kind: Literal["truncated_negative_binomial", "poisson"]
    expected: float
    eta: float | None = None

    def __post_init__(self) -> None:
        _validate.one_of(("truncated_negative_binomial", "poisson"), kind=self.kind)
        _validate.in_range(1, _MOST_EXPECTED, expected=self.expected)
        if self.kind == "truncated_negative_binomial":
            _validate.in_range(0, _LARGEST_ETA, eta=self.eta)
        elif self.eta is not None:
            raise InvalidValue("eta", self.eta, "None with kind 'poisson', which has no shape")

    @property
    def gamma(self) -> float:
        """The truncated negative binomial's other parameter, in (0, 1]; 1 always gives a single trial.

        Raises:
            InvalidValue: of a Poisson law, which has none.
        """
        if self.eta is None:
            raise InvalidValue("kind", self.kind, "truncated_negative_binomial: a Poisson law has no gamma")
        return _gamma(float(self.eta), float(self.expected))

    def probability(self, trials: int) -> float:
        """The chance of exactly so many trials (definition 1 of the paper)."""
        _validate.integer_at_least(0, trials=trials)
        chance, count = self._first()
        while count < trials:
            chance *= self._ratio(count)
            count += 1
        return chance if count == trials else 0.0

    def _first(self) -> tuple[float, int]:
        """Probability of the least number of trials, and that number."""
        if self.eta is None:
            return math.exp(-self.expected), 0
        gamma = self.gamma
        if gamma == 1:
            return 1.0, 1
        if self.eta == 0:
            return (1 - gamma) / -math.log(gamma), 1
        return (1 - gamma) * self.eta / math.expm1(-self.eta * math.log(gamma)), 1

    def _ratio(self, trials: int) -> float:
        """Probability of one more trial, over that of so many."""
        if self.eta is None:
            return self.expected / (trials + 1)
        return (1 - self.gamma) * (trials + self.eta) / (trials + 1)

    def draw(self, random: SecureRandom) -> int:
        """Draw the number of trials; once, before the first one, and tell nobody.

        53 fair coins against the cumulative law: each number's chance is off by 1e-14 at most, a change of delta far
        below any that is stated.
        """
        coins = random.poisson_mask(Fraction(1, 2), _BITS)
        drawn = sum(1 << place for place, coin in enumerate(coins) if coin) * 2.0**-_BITS
        chance, trials = self._first()
        below = chance
        # Past the mode, chances this small never add up to another 2^-53: the sum's float error ends the tail.
        while drawn >= below and (chance > 2.0**-80 or trials <= self.expected):
            chance *= self._ratio(trials)
            trials += 1
            below += chance
        return trials


@lru_cache(maxsize=256)
def _gamma(eta: float, expected: float) -> float:
    if expected == 1:
        return 1.0

    def excess(log_gamma: float) -> float:
        odds = math.expm1(-log_gamma)  # 1/gamma - 1
        return odds / (-log_gamma if eta == 0 else -math.expm1(eta * log_gamma) / eta) - expected

    # The mean falls from infinity to 1 as gamma goes to 1, and lies at 1/gamma or below 2 (eta + 1)/gamma.
    least = -math.log(2 * (eta + 1) * expected) - math.log1p(math.log(expected)) - 2
    return math.exp(float(brentq(excess, least, -1e-12, xtol=1e-15)))


def selected_epsilon(schedule: Sequence[Steps], law: TrialLaw, delta: float) -> float:
    """Upper bound on epsilon at ``delta`` of the best of a random number of trials; see the module for when it holds.

    By Rényi DP over dp-accounting's default orders, so it is to be compared with `accounting.rdp_epsilon` of a single
    trial and of all of them; add or remove one.

    Args:
        schedule: what one trial costs at most, committed before it starts; 0.0 for no steps, where nothing is learnt.
        law: how the number of trials is drawn.
        delta: target delta in (0, 1).

    Raises:
        InvalidValue: a value is out of range (NaN included).
    """
    _validate.positive(delta=delta)
    if not delta < 1:
        raise InvalidValue("delta", delta, "a number in (0, 1)")
    for block in schedule:
        if not isinstance(block, Steps):
            raise InvalidValue("schedule", block, "a sequence of Steps")
    events = [block.event for block in schedule if block.steps > 0]
    if not events:
        return 0.0
    shape = math.inf if law.eta is None else float(law.eta)
    accountant = RdpAccountant()
    accountant.compose(
        RepeatAndSelectDpEvent(dp_accounting.ComposedDpEvent(events), mean=float(law.expected), shape=shape)
    )
    return float(accountant.get_epsilon(delta))
