"""Claims and what attacks showed at least, as one inline SVG: a bar for each audit, a line where its claim stands.

Hand-made, because every mark carries its number in words: the picture must be read in print, in grey, and aloud. Its
colours are the page's CSS variables.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, Final, TypeGuard

from markupsafe import Markup, escape

__all__ = ["Bound", "bounds_chart", "bounds_of", "numbers"]

_WIDTH: Final = 400
_RIGHT: Final = 390
_LETTERS: Final = 52
_LINE: Final = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One audit's result.

    Attributes:
        name: of the attack, for people.
        claim: epsilon that the run claims for what was attacked.
        lower: epsilon that the attack shows at least.
        confidence: of ``lower``, in (0, 1); None where it was not told.
    """

    name: str
    claim: float
    lower: float
    confidence: float | None

    @property
    def exceeds(self) -> bool:
        """Whether more leaked than the claim allows."""
        return self.lower > self.claim


def bounds_of(details: Mapping[str, Any]) -> tuple[Bound, ...]:
    """The drawable bounds in a finding's details: ``{"claim", "bounds": [{"name", "lower", "confidence", "claim"}]}``.

    A bound without a claim of its own is held against the finding's; one without finite numbers is left out.
    """
    given = details.get("bounds")
    found = []
    for row in given if isinstance(given, Sequence) and not isinstance(given, str) else ():
        if not isinstance(row, Mapping):
            continue
        claim, lower, confidence = row.get("claim", details.get("claim")), row.get("lower"), row.get("confidence")
        if _finite(claim) and _finite(lower):
            found.append(
                Bound(
                    name=str(row.get("name", "attack")),
                    claim=max(0.0, float(claim)),
                    lower=max(0.0, float(lower)),
                    confidence=float(confidence) if _finite(confidence) and 0 < float(confidence) < 1 else None,
                )
            )
    return tuple(found)


def numbers(bound: Bound) -> tuple[str, str]:
    """Lower bound and claim as text: "at least" is rounded down, "at most" up, and no rounding hides an excess."""
    for digits in range(2, 9):
        unit = Decimal(1).scaleb(-digits)
        lower = Decimal(repr(bound.lower)).quantize(unit, rounding=ROUND_FLOOR)
        claim = Decimal(repr(bound.claim)).quantize(unit, rounding=ROUND_CEILING)
        if not bound.exceeds or lower > claim:
            return str(lower), str(claim)
    return repr(bound.lower), repr(bound.claim)


def bounds_chart(bounds: Sequence[Bound], *, name: str = "bounds") -> Markup:
    """Draw claims and lower bounds on one scale that begins at zero.

    Args:
        bounds: at least one.
        name: makes the ids in the picture the page's only ones.

    Returns:
        A ``<svg>`` with ``<title>`` and ``<desc>`` that say all its numbers in words.
    """
    scale = 0.97 * (_RIGHT - 1) / (max(max(b.claim, b.lower) for b in bounds) or 1.0)
    parts, said, y = [], [], 0
    for bound in bounds:
        lower, claim = numbers(bound)
        sure = "" if bound.confidence is None else f", {100 * bound.confidence:g} % sure"
        verdict = "more than the claim" if bound.exceeds else "within the claim"
        said.append(f"{bound.name}: at least ε {lower}{sure}; claim at most ε {claim}; {verdict}")
        for line in textwrap.wrap(bound.name, _LETTERS) or [""]:
            y += _LINE
            parts.append(f'<text x="1" y="{y}" font-weight="600" fill="var(--ink)">{escape(line)}</text>')
        top, at = y + 7, 1 + bound.claim * scale
        colour = "var(--bad)" if bound.exceeds else "var(--slm)"
        parts += [
            f'<path d="M1 {top + 10}H{at:.1f}" stroke="var(--muted)" stroke-width="1" fill="none"/>',
            f'<rect x="1" y="{top + 4}" width="{max(bound.lower * scale, 1.0):.1f}" height="12" fill="{colour}"/>',
            f'<path d="M{at:.1f} {top}V{top + 20}" stroke="var(--ink)" stroke-width="3" fill="none"/>',
        ]
        y = top + 20 + _LINE
        parts.append(f'<text x="1" y="{y}" fill="{colour}">bar: at least ε {lower}{sure}</text>')
        y += _LINE
        parts.append(f'<text x="1" y="{y}" fill="var(--ink)">line: claim at most ε {claim} · {verdict}</text>')
        y += 12
    return Markup(  # noqa: S704 - names are escaped, the rest are numbers
        f'<svg viewBox="0 0 {_WIDTH} {y}" role="img" aria-labelledby="{name}-title {name}-desc" font-size="13">'
        f'<title id="{name}-title">Claimed and found privacy loss</title>'
        f'<desc id="{name}-desc">{escape(". ".join(said))}.</desc>{"".join(parts)}</svg>'
    )


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
