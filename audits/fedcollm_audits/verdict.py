"""What an auditor's check is, and what it says: pass, fail, or not shown, with the evidence beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedcollm_audits.evidence import Evidence

__all__ = ["Check", "Finding", "Status", "failed", "not_shown", "passed"]

Status = Literal["pass", "fail", "not shown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A check's answer.

    Attributes:
        status: ``not shown``: what lies here neither proves nor refutes it.
        evidence: what was looked at and found, a sentence each; the first one is the reason for the status.
        details: the same for programs; plain JSON values.
    """

    status: Status
    evidence: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question that an auditor asks.

    Attributes:
        name: short and stable, for ``--only`` and ``--skip``.
        group: ``ledger``, ``plan``, ``transcript``, ``artefacts``, ``statement``, ``empirical`` or ``leakage``.
        question: what a yes means, in one sentence.
        why: why it matters, in one or two sentences for somebody who is no cryptographer.
        run: answers it.
    """

    name: str
    group: str
    question: str
    why: str
    run: Callable[[Evidence], Finding]


def passed(*evidence: str, **details: Any) -> Finding:
    """It holds, and this shows it."""
    return Finding(status="pass", evidence=evidence, details=details)


def failed(*evidence: str, **details: Any) -> Finding:
    """It does not hold, and this shows it."""
    return Finding(status="fail", evidence=evidence, details=details)


def not_shown(*evidence: str, **details: Any) -> Finding:
    """Nothing here shows it either way, and this is why."""
    return Finding(status="not shown", evidence=evidence, details=details)
