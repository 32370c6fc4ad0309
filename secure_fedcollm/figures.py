"""Small line charts as inline SVG for the report, scatter charts as files for a paper; matplotlib's one home.

The inline SVG names no outside address, keeps its text as text, and takes its colours from CSS variables of the page
(``--ink``, ``--muted``, ``--rule``, ``--slm``, ``--llm``, ``--bad``), so that it follows light, dark and print.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from secure_fedcollm.sweep_figures import LIGHT, Point

__all__ = ["Line", "line_chart", "scatter_files"]

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


# A file for a paper stands alone: every glyph is in it, and the same numbers give the same bytes.
_PAPER: dict[Any, Any] = {
    "pdf.fonttype": 42,  # TrueType: publishers refuse matplotlib's default, type 3
    "svg.fonttype": "path",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
}
_MARKS = ("o", "s", "^", "D", "v", "P")
_TWO_COLUMNS = 24  # letters of a legend's entry that fit twice into the width


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


def scatter_files(
    folder: Path,
    name: str,
    points: Sequence[Point],
    series: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    x_form: Callable[[float], str],
    apart: str = "no DP",
) -> None:
    """Write ``<name>.svg`` and ``<name>.pdf``, one column (3.5 inches) wide; the same points as on a sweep's page.

    Bars are the points' intervals, a hollow mark has none, the dashed line joins the points of the front. Series differ
    by colour and by shape.

    Args:
        folder: made if it is not there.
        name: of both files, without ending.
        points: at least one; those without x stand apart at the right.
        series: their names; the last colour and shape serve all beyond the sixth.
        x_label: below the chart.
        y_label: beside it.
        x_form: prints a value of x.
        apart: what points without x are.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    folder.mkdir(parents=True, exist_ok=True)
    xs = sorted({point.x for point in points if point.x is not None})
    mixed = bool(xs) and any(point.x is None for point in points)
    with rc_context({**_PAPER, "svg.hashsalt": name}):
        figure = Figure(figsize=(3.5, 2.6), layout="constrained")
        shape = {"width_ratios": [5, 1]} if mixed else {}
        plots = figure.subplots(1, 2 if mixed else 1, sharey=True, squeeze=False, gridspec_kw=shape)[0]
        for axes, with_x in zip(plots, (True, False) if mixed else (bool(xs),), strict=True):
            shown = [point for point in points if (point.x is not None) is with_x]
            _scatter(figure, axes, shown)
            axes.axhline(0, color="#8a847b", linewidth=0.5, zorder=0)
            if with_x:
                axes.set_xlabel(x_label)
                _x_scale(axes, xs, x_form)
            else:
                axes.set_xticks([0.0], [apart])
                axes.set_xlim(-1, 1)
        low = min(0.0, *(point.y - (point.half or 0.0) for point in points))
        high = max(0.0, *(point.y + (point.half or 0.0) for point in points))
        edge = 0.06 * (high - low) or 0.5
        plots[0].set_ylim(low - edge, high + edge)
        plots[0].set_ylabel(y_label)
        if mixed:
            plots[1].spines["left"].set_visible(False)
            plots[1].tick_params(left=False)
        if len(series) > 1:
            keys = [
                Line2D([], [], color=LIGHT[kind], marker=_MARKS[kind], linestyle="", markersize=4, label=text)
                for kind, text in enumerate(series[: len(LIGHT)])
            ]
            columns = 2 if max(map(len, series)) <= _TWO_COLUMNS else 1  # wider ones would be cut at the edge
            figure.legend(handles=keys, loc="outside upper left", ncols=columns, handletextpad=0.1, columnspacing=1)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})


def _scatter(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    from matplotlib.transforms import ScaledTranslation

    best = sorted((point.x, point.y) for point in points if point.front and point.x is not None)
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color="#67625a", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    seen: dict[float | None, int] = {}
    for point in points:
        # Points of one x are set side by side, or their intervals would hide each other.
        seen[point.x] = seen.get(point.x, -1) + 1
        crowd = sum(other.x == point.x for other in points)
        aside = min(5.0, 24 / crowd) * (seen[point.x] - (crowd - 1) / 2)
        kind = min(point.series, len(LIGHT) - 1)
        axes.errorbar(
            point.x or 0.0, point.y, yerr=point.half, color=LIGHT[kind], marker=_MARKS[kind], markersize=4,
            markerfacecolor="none" if point.half is None else LIGHT[kind], capsize=1.5, elinewidth=0.8, capthick=0.8,
            transform=axes.transData + ScaledTranslation(aside / 72, 0, figure.dpi_scale_trans), zorder=2,
        )  # fmt: skip


def _x_scale(axes: Any, xs: Sequence[float], form: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    logarithmic = xs[0] > 0 and xs[-1] > 4 * xs[0]
    # Points that were set aside do not count for matplotlib's own limits.
    if logarithmic:
        axes.set_xscale("log")
        edge = (xs[-1] / xs[0]) ** 0.1
        axes.set_xlim(xs[0] / edge, xs[-1] * edge)
    else:
        edge = 0.1 * (xs[-1] - xs[0]) or 0.5 * abs(xs[0]) or 0.5
        axes.set_xlim(xs[0] - edge, xs[-1] + edge)
    if len(xs) <= 4:
        axes.set_xticks(xs)
    elif logarithmic:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=5))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
