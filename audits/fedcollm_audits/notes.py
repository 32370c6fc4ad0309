"""What a check writes down while it looks, and the finding that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fedcollm_audits.evidence import Evidence
from fedcollm_audits.verdict import Finding, failed, not_shown, passed
from fedcollm_privacy.errors import FedCollmError

__all__ = ["Notes", "asked"]

_SHOWN: Final = 25
# What a forged value of the wrong kind makes Python raise.
_STUMBLES = (
    ArithmeticError,
    AttributeError,
    FedCollmError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


class Notes:
    """Problems, gaps and what was seen. One problem and the check fails; else one gap, and it is not shown."""

    def __init__(self) -> None:
        self._problems: list[str] = []
        self._gaps: list[str] = []
        self._seen: list[str] = []
        self._details: dict[str, Any] = {}

    @property
    def failing(self) -> bool:
        """Whether a problem was written down."""
        return bool(self._problems)

    def problem(self, sentence: str) -> None:
        """This contradicts what the check asks."""
        self._problems.append(sentence)

    def require(self, holds: bool, sentence: str) -> bool:
        """Write a problem down unless it holds; gives ``holds`` back."""
        if not holds:
            self._problems.append(sentence)
        return holds

    def gap(self, sentence: str) -> None:
        """What lies here neither shows this nor refutes it."""
        self._gaps.append(sentence)

    def saw(self, sentence: str, **details: Any) -> None:
        """This was looked at."""
        self._seen.append(sentence)
        self._details |= details

    def finding(self) -> Finding:
        """The answer: problems first, then gaps, then what was seen; long lists are cut and counted."""
        problems, gaps, seen = _cut(self._problems), _cut(self._gaps), _cut(self._seen)
        if problems:
            return failed(*problems, *gaps, *seen, **self._details, problems=len(self._problems))
        if gaps:
            return not_shown(*gaps, *seen, **self._details)
        return passed(*(seen or ["Nothing here contradicts it."]), **self._details)


def asked(look: Callable[[Evidence, Notes], None]) -> Callable[[Evidence], Finding]:
    """A check's function: ``look`` writes notes, and whatever a forged value makes it raise is a failure."""

    def run(evidence: Evidence) -> Finding:
        notes = Notes()
        try:
            look(evidence, notes)
        except _STUMBLES as error:
            notes.problem(f"A value of the wrong kind stopped this check ({type(error).__name__}: {error!s:.200}).")
        return notes.finding()

    return run


def _cut(sentences: list[str]) -> list[str]:
    sentences = list(dict.fromkeys(sentences))
    if len(sentences) <= _SHOWN:
        return sentences
    return [*sentences[:_SHOWN], f"And {len(sentences) - _SHOWN} more."]
