"""Paid steps of DP-SGD, handed from the ledger to the training step, which takes them once."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from fedcollm_privacy.errors import PrivacyViolation

__all__ = ["Reservation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Steps that are paid for, once; the training step runs on nothing else.

    Attributes:
        entry: digest of the ledger entry.
        plan_digest: of the `DpPlan` whose steps these are.
        steps: how many steps may be taken.
    """

    entry: str
    plan_digest: str
    steps: int
    # Taken and never released; a lock, so that of two threads one gets the steps.
    _used: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def redeem(self, plan_digest: str) -> int:
        """The steps, on the first call; whoever calls takes them at once or lets them lapse.

        Raises:
            PrivacyViolation: the steps are another plan's, which leaves them usable, or were taken before.
        """
        if plan_digest != self.plan_digest:
            raise PrivacyViolation(
                f"reservation {self.entry[:12]} is for plan {self.plan_digest[:12]}, not {plan_digest[:12]}; "
                "reserve steps of the plan that is run"
            )
        if not self._used.acquire(blocking=False):
            raise PrivacyViolation(
                f"reservation {self.entry[:12]} was used before; its {self.steps} steps are paid for once. Reserve anew"
            )
        return self.steps
