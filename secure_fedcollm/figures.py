"""Small line charts as inline SVG for the report; the one module that imports matplotlib.

The SVG names no outside address, keeps its text as text, and takes its colours from CSS variables of the page
(``--ink``, ``--muted``, ``--rule``, ``--slm``, ``--llm``, ``--bad``), so that it follows light, dark and print.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from markupsafe import Markup, escape

__all__ = ["Line", "line_chart"]

# matplotlib knows no CSS variables: it draws in these colours, which are replaced in its output
_COLOURS = {name: f"#01020{i}" for i, name in enumerate(("ink", "muted", "rule", "slm", "llm", "bad"))}
_STYLE: dict[Any, Any] = {  # matplotlib types every key
    "svg.fonttype": "none",
    "text.parse_math": False,  # a site may be named with a dollar sign
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "text.color": _COLOURS["ink"],
    "axes.edgecolor": _COLOURS["muted"],
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "axes.labelcolor": _COLOURS["muted"],
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        points: ``(server_round, value)``, in order of rounds.
        colour: ``ink``, ``slm`` or ``llm``.
        label: written at the line's end, before the value; may be empty.
    """

    points: tuple[tuple[float, float], ...]
    colour: str
    label: str = ""


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    form: Callable[[float], str],
    lost: Sequence[int] = (),
    level: float | None = None,
) -> Markup:
    """Draw values over rounds.

    Args:
        title: stands above the chart and begins its description for screen readers.
        lines: at least one with a point. Ends are labelled with their values when there are at most two lines,
            and the highest end otherwise. The scale is logarithmic when positive values span more than a factor of 20.
        form: prints a value.
        lost: rounds to mark as lost.
        level: a budget to draw as a dashed line.

    Returns:
        A ``<svg>`` element with ``<title>``; no ids but those it refers to, which the title makes its own.
    """
    from matplotlib import rc_context  # a run that writes no report does not pay for it
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    lines = [line for line in lines if line.points]
    values = [value for line in lines for _, value in line.points]
    buffer = StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.7, 2.7), layout="constrained")
        axes = figure.add_subplot()
        width, dot = (1.6, 3.5) if len(lines) <= 2 else (0.8, 2.0)
        for line in lines:
            axes.plot(*zip(*line.points, strict=True), color=_COLOURS[line.colour], linewidth=width, clip_on=False)
            axes.plot(
                *zip(line.points[0], line.points[-1], strict=True),
                color=_COLOURS[line.colour], linestyle="", marker="o", markersize=dot, clip_on=False,
            )  # fmt: skip
        if min(values) > 1e-3 and max(values) > 20 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("round")
        axes.margins(x=0.03, y=0.16)
        _annotate(axes, lines, form, lost, level)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    ends = "; ".join(
        f"{line.label} from {form(line.points[0][1])} at round {line.points[0][0]:.0f} "
        f"to {form(line.points[-1][1])} at round {line.points[-1][0]:.0f}".strip()
        for line in lines
    )
    return _inline(buffer.getvalue(), title, f"{title}: {ends}.")


def _annotate(
    axes: Any, lines: Sequence[Line], form: Callable[[float], str], lost: Sequence[int], level: float | None
) -> None:
    def write(text: str, point: tuple[float, float], colour: str, dx: int, dy: int, anchor: str) -> None:
        axes.annotate(
            text, point, (dx, dy), textcoords="offset points", ha=anchor, va="center", color=_COLOURS[colour],
            annotation_clip=False,
        )  # fmt: skip

    labelled = lines if len(lines) <= 2 else [max(lines, key=lambda line: line.points[-1][1])]
    for line in labelled:
        (x0, y0), (x1, y1) = line.points[0], line.points[-1]
        # beside the line, not on it
        start, end = (9, -9) if y0 >= y1 else (-9, 9)
        write(form(y0), (x0, y0), line.colour, 4, start, "left")
        write(f"{line.label} {form(y1)}".strip(), (x1, y1), line.colour, 0, end, "right")
    for server_round in lost:
        axes.axvline(server_round, color=_COLOURS["bad"], linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            "lost", (server_round, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="left", va="top", color=_COLOURS["bad"],
        )  # fmt: skip
    if level is not None:
        axes.axhline(level, color=_COLOURS["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            f"budget {form(level)}", (0, level), (4, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="left", va="bottom", color=_COLOURS["muted"],
        )  # fmt: skip


def _inline(svg: str, title: str, description: str) -> Markup:
    """The bare ``<svg>`` for an HTML page: no prologue, metadata, namespaces or foreign ids; page colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([-0-9. ]+)"', svg)
    body = svg[svg.index(">") + 1 :]
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{name}-", body).replace("xlink:href", "href")
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it would style the whole page
    body = re.sub(r"font-family: [^;]*; ", "", body)  # the page's own
    for colour, code in _COLOURS.items():
        body = body.replace(code, f"var(--{colour})")
    box = view_box[1] if view_box else "0 0 338 194"
    return Markup(  # noqa: S704 - matplotlib escaped its text; title and description are escaped here
        f'<svg viewBox="{box}" role="img" aria-labelledby="{name}-title">'
        f'<title id="{name}-title">{escape(description)}</title>{body}'
    )
