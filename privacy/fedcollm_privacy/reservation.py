"""Paid steps of DP-SGD, handed from the ledger to the training step, which takes them once."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedcollm_privacy.errors import PrivacyViolation

__all__ = ["Ran", "Reservation", "code_digest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What private steps say of themselves when they are done; the same whatever the records were.

    Attributes:
        steps: how many were taken.
        noise_multiplier: of the noise that this site added, in units of C; the least over the steps.
        max_grad_norm: C.
        sample_rate: "p/q".
        sampling: ``poisson``.
        clipping: ``flat`` or ``automatic``.
        randomness: where coins and noise came from.
        code: `code_digest` of the package that took them.
    """

    steps: int
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: str
    sampling: str
    clipping: str
    randomness: str
    code: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the ledger."""
        return asdict(self)


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over this package's sources: name, NUL, length as 8 bytes big-endian, content, sorted by name."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py"), key=lambda path: path.name):
        content = path.read_bytes()
        digest.update(path.name.encode() + b"\x00" + len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


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
