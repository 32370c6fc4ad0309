"""Scatter charts of a sweep as SVG: gain against privacy, bytes and seconds, with intervals.

Series differ by colour and by shape, so that nothing rests on colour alone; the colours keep apart under simulated
protanopia, deuteranopia and tritanopia (a test works that out). On the page they follow light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup, escape

__all__ = ["DARK", "LIGHT", "Point", "front_of", "palette_css", "scatter"]

LIGHT: Final = ("#0067b1", "#e01170", "#938b15", "#5d035b", "#1d1b18", "#4c09b9")
DARK: Final = ("#56b4e9", "#e02727", "#eabb23", "#c96176", "#e9e5dc", "#a129d4")
_WIDTH, _LEFT, _RIGHT, _BOTTOM, _PLOT = 640, 62, 16, 44, 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting.

    Attributes:
        x: where; None goes into a column of its own at the right.
        y: its mean gain.
        half: half its interval, None where there is none: then the mark is hollow.
        series: which series it belongs to.
        label: for whoever points at it or has it read out.
        front: whether no other point is at least as good in both and better in one.
    """

    x: float | None
    y: float
    half: float | None
    series: int
    label: str
    front: bool = False


def front_of(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, gain): whether no other is at least as good in both and better in one."""
    return [not any(x <= cost and y >= gain and (x < cost or y > gain) for x, y in points) for cost, gain in points]


def palette_css() -> str:
    """The colours as CSS variables ``--c0`` and so on, for light, dark and print."""
    light, dark = ("; ".join(f"--c{i}: {c}" for i, c in enumerate(colours)) for colours in (LIGHT, DARK))
    return f":root {{ {light} }} @media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def scatter(
    name: str,
    title: str,
    points: Sequence[Point],
    series: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    x_form: Callable[[float], str],
    apart: str = "no DP",
) -> Markup:
    """Draw points with intervals for a page, in its CSS variables; the best of them are joined by a line.

    Args:
        name: begins the ids; unique on the page.
        title: read out first.
        points: at least one.
        series: their names; the last colour and shape serve all beyond the sixth.
        x_label: below the chart.
        y_label: above it.
        x_form: prints a value of x.
        apart: heads the column of points without x.
    """
    xs = [p.x for p in points if p.x is not None]
    lows = [p.y - (p.half or 0.0) for p in points]
    highs = [p.y + (p.half or 0.0) for p in points]
    bottom, top, y_ticks = _scale(min([*lows, 0.0]), max([*highs, 0.0]))
    column = 74 if any(p.x is None for p in points) and xs else 0
    head = 38 + 18 * math.ceil(len(series) / 2) if len(series) > 1 else 32
    right = _WIDTH - _RIGHT - column
    logarithmic = bool(xs) and min(xs) > 0 and max(xs) > 4 * min(xs)

    def place_x(value: float | None) -> float:
        if value is None:
            return _WIDTH - _RIGHT - (column / 2 if column else (_WIDTH - _LEFT - _RIGHT) / 2)
        low, high = (math.log(min(xs)), math.log(max(xs))) if logarithmic else (min(xs), max(xs))
        share = 0.5 if high <= low else ((math.log(value) if logarithmic else value) - low) / (high - low)
        return _LEFT + 26 + share * (right - _LEFT - 52)

    def place_y(value: float) -> float:
        return head + _PLOT * (top - value) / (top - bottom)

    parts = [_text(0, 14, y_label, "start", "muted")]
    if len(series) > 1:
        for i, text in enumerate(series):
            left, down = 12 + (i % 2) * 310, 34 + 18 * (i // 2)
            parts += [_mark(left, down, i, full=True), _text(left + 12, down + 4, text[:48], "start", "ink")]
    for tick in y_ticks:
        level = place_y(tick)
        heavy = "muted" if tick == 0 else "rule"
        parts.append(f'<path d="M{_LEFT} {level:.1f}H{_WIDTH - _RIGHT}" stroke="{{{heavy}}}" stroke-width="0.8"/>')
        parts.append(_text(_LEFT - 8, level + 4, f"{tick:g}".replace("-", "−"), "end", "muted"))
    for x_tick in _x_ticks(xs):
        parts.append(_text(place_x(x_tick), head + _PLOT + 18, x_form(x_tick), "middle", "muted"))
    if column or not xs:
        parts.append(_text(place_x(None), head + _PLOT + 18, apart, "middle", "muted"))
    parts.append(_text((_LEFT + right) / 2, head + _PLOT + 38, x_label, "middle", "muted"))
    best = sorted((p.x, p.y) for p in points if p.front and p.x is not None)
    if len(best) > 1:
        line = "L".join(f"{place_x(x):.1f} {place_y(y):.1f}" for x, y in best)
        parts.append(f'<path d="M{line}" fill="none" stroke="{{muted}}" stroke-width="1" stroke-dasharray="4 3"/>')
    seen: dict[float | None, int] = {}
    for point in points:
        # Points of one x are set side by side, or their intervals would hide each other.
        seen[point.x] = seen.get(point.x, -1) + 1
        crowd = sum(other.x == point.x for other in points)
        x = place_x(point.x) + min(9, 40 / crowd) * (seen[point.x] - (crowd - 1) / 2)
        y = place_y(point.y)
        parts.append(f"<g><title>{_safe(point.label)}</title>")
        if point.half is not None:
            high, low = place_y(point.y + point.half), place_y(point.y - point.half)
            stroke = f'stroke="{{c{min(point.series, len(LIGHT) - 1)}}}" stroke-width="1.3"'
            parts.append(
                f'<path d="M{x:.1f} {high:.1f}V{low:.1f}M{x - 4:.1f} {high:.1f}h8M{x - 4:.1f} {low:.1f}h8" {stroke}/>'
            )
        parts += [_mark(x, y, point.series, full=point.half is not None), "</g>"]
    height = head + _PLOT + _BOTTOM
    described = "; ".join(point.label for point in points)
    body = "".join(parts)
    for colour in ("ink", "muted", "rule", *(f"c{i}" for i in range(len(LIGHT)))):
        body = body.replace(f"{{{colour}}}", f"var(--{colour})")
    return Markup(  # noqa: S704 - every text in it was escaped
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="{name}-title {name}-desc" '
        f'font-size="12"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(described)}</desc>{body}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{{{colour}}}">{_safe(text)}</text>'


def _safe(text: str) -> str:
    # A brace in a name would be taken for a colour.
    return str(escape(text)).replace("{", "&#123;")


def _mark(x: float, y: float, series: int, *, full: bool) -> str:
    kind = min(series, len(LIGHT) - 1)
    paths = (
        "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
        "M-4.5 -4.5h9v9h-9z",
        "M0 -6L5.5 4.5h-11z",
        "M0 -6.5L6 0L0 6.5L-6 0z",
        "M0 6L5.5 -4.5h-11z",
        "M-1.8 -6h3.6v4.2h4.2v3.6h-4.2v4.2h-3.6v-4.2h-4.2v-3.6h4.2z",
    )
    fill = f"{{c{kind}}}" if full else "none"
    return (
        f'<path transform="translate({x:.1f} {y:.1f})" d="{paths[kind]}" fill="{fill}" stroke="{{c{kind}}}" '
        'stroke-width="1.5"/>'
    )


def _scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """Bounds and ticks at round numbers, around four steps."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [round(i * step, 12) for i in range(first, last + 1)]


def _x_ticks(xs: Sequence[float]) -> list[float]:
    distinct = sorted(set(xs))
    return distinct if len(distinct) <= 6 else [distinct[round(i * (len(distinct) - 1) / 5)] for i in range(6)]
