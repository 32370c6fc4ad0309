"""Plans that may change after data was read: a privacy filter at one Rényi order.

Privacy loss distributions only compose over a schedule that was fixed before the data was looked at; a stop rule on a
running PLD or PRV is no valid filter. Rényi divergences at one order may be chosen adaptively and added: as long as
their sum stays within a budget that was fixed beforehand, the whole interaction is Rényi private with that budget
(Feldman and Zrnic 2021). The order is part of the plan and cannot change; taking the best of several afterwards has no
proof here. A filter admits 17 to 39 % fewer steps than a committed plan would take: the price of being free to change.

Which rule applies is decided by the plan's type: `plan.DpPlan` is committed, `AdaptivePlan` is filtered.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedcollm_privacy import _validate
from fedcollm_privacy.accounting import Steps, renyi_divergences
from fedcollm_privacy.errors import BudgetExceeded, InvalidValue
from fedcollm_privacy.messages import digest_of

__all__ = ["ADAPTIVE_ACCOUNTANT", "AdaptivePlan", "RdpFilter", "best_order"]

ADAPTIVE_ACCOUNTANT = "RDP filter at one order (Feldman and Zrnic 2021), divergences by dp-accounting"
# Where optimal orders of DP-SGD lie for epsilon from 0.1 to 50.
_ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *(float(order) for order in range(11, 257)))


def _rdp_budget(order: float, target_epsilon: float, delta: float) -> float:
    """The divergence at ``order`` that implies (epsilon, delta); Canonne, Kamath and Steinke 2020, proposition 12."""
    return target_epsilon - math.log1p(-1 / order) + (math.log(delta) + math.log(order)) / (order - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptivePlan:
    """What is fixed of a run whose noise, rates and steps may depend on what was seen.

    Attributes:
        order: the one Rényi order that is counted; see `best_order`.
        target_epsilon: charged as a whole at commitment, however little is used.
        delta: of the guarantee for the whole run, in (0, 0.5].
        unit: of privacy; the same for all rounds.
        neighboring_relation: data sets that differ by adding or removing one unit.
    """

    order: float
    target_epsilon: float
    delta: float
    unit: Literal["record", "person"]
    neighboring_relation: Literal["add_or_remove_one"] = "add_or_remove_one"

    def __post_init__(self) -> None:
        _validate.positive(order=self.order, target_epsilon=self.target_epsilon, delta=self.delta)
        _validate.in_range(0, 0.5, delta=self.delta)
        _validate.one_of(("record", "person"), unit=self.unit)
        _validate.one_of(("add_or_remove_one",), neighboring_relation=self.neighboring_relation)
        if not self.order > 1:
            raise InvalidValue("order", self.order, "a finite number > 1")
        if not self.rdp_budget > 0:
            raise InvalidValue(
                "order",
                self.order,
                f"an order whose conversion leaves something of epsilon {self.target_epsilon} at delta {self.delta}: "
                "take a larger one, or best_order()",
            )

    @property
    def rdp_budget(self) -> float:
        """The Rényi divergence at `order`, in nats, that all steps together may reach."""
        return _rdp_budget(self.order, self.target_epsilon, self.delta)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ledger and statement."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """SHA-256 over all fields."""
        return digest_of(self.as_dict())


class RdpFilter:
    """Counts the divergence of what was admitted, and refuses what would cross the plan's budget.

    Args:
        plan: fixes order and budget.
        spent: steps that were admitted before, for instance those a ledger holds.

    Raises:
        BudgetExceeded: ``spent`` alone crosses the budget.
    """

    def __init__(self, plan: AdaptivePlan, spent: tuple[Steps, ...] = ()) -> None:
        self._plan = plan
        self._admitted: tuple[Steps, ...] = ()
        self.spend(*spent)

    @property
    def divergence(self) -> float:
        """What was spent, in nats at the plan's order."""
        return renyi_divergences(self._admitted, [self._plan.order])[0]

    def admits(self, *steps: Steps) -> bool:
        """Whether these steps fit beside what was spent; changes nothing."""
        # Infinity, where the library's series does not converge, fits nowhere.
        return renyi_divergences((*self._admitted, *steps), [self._plan.order])[0] <= self._plan.rdp_budget

    def spend(self, *steps: Steps) -> None:
        """Count steps, before they are taken.

        Raises:
            BudgetExceeded: they would cross the budget; nothing was counted.
        """
        if not self.admits(*steps):
            raise BudgetExceeded(
                f"these steps would cross the adaptive plan's epsilon {self._plan.target_epsilon:.4g} at delta "
                f"{self._plan.delta:.3g}: at order {self._plan.order:g}, {self.divergence:.4g} of a divergence of "
                f"{self._plan.rdp_budget:.4g} is spent. Nothing was spent now. Take fewer steps or more noise, or stop"
            )
        self._admitted = (*self._admitted, *steps)


def best_order(target_epsilon: float, delta: float, expected: Steps) -> float:
    """The order at which a filter admits most steps like ``expected``; to be asked before any data is read.

    A wrong expectation costs steps, not privacy. Only its noise and rate matter, not how many steps it names.

    Raises:
        InvalidValue: an argument is out of range, or no order up to 256 leaves any budget.
    """
    _validate.positive(target_epsilon=target_epsilon, delta=delta)
    _validate.in_range(0, 0.5, delta=delta)
    orders = [order for order in _ORDERS if _rdp_budget(order, target_epsilon, delta) > 0]
    one = Steps(noise_multiplier=expected.noise_multiplier, sample_rate=expected.sample_rate, steps=1)
    admitted = {
        order: _rdp_budget(order, target_epsilon, delta) / divergence
        for order, divergence in zip(orders, renyi_divergences([one], orders), strict=True)
        if 0 < divergence < math.inf
    }
    if not admitted:
        raise InvalidValue("target_epsilon", target_epsilon, "a budget that some order up to 256 can use")
    return max(admitted, key=admitted.__getitem__)
