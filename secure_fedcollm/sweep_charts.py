"""Which charts a sweep has, and what is in them: gain against privacy, bytes, seconds, and every field with numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from secure_fedcollm.report import duration, epsilon, number, size
from secure_fedcollm.sweep_advice import gain_text
from secure_fedcollm.sweep_figures import LIGHT, Point, front_of
from secure_fedcollm.sweep_results import Setting

__all__ = ["Chart", "charts"]

_NAMES: Final = {"slm": "SLM", "llm": "LLM", "worst_site": "worst site"}
_ENOUGH_VALUES: Final = 5  # of a field, for a chart of its own; fewer are told apart in the table


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One scatter chart.

    Attributes:
        name: fit for a file and for an id.
        title: in words.
        points: one a setting.
        series: names of what colours tell apart.
        x_label: below it.
        y_label: above or beside it.
        x_form: prints a value of x.
    """

    name: str
    title: str
    points: tuple[Point, ...]
    series: tuple[str, ...]
    x_label: str
    y_label: str
    x_form: Callable[[float], str]


def charts(settings: Sequence[Setting], models: Sequence[str], unit: str) -> list[Chart]:
    """Every chart that has a point.

    Args:
        settings: of one sweep.
        models: ``slm`` and ``llm``, those that changed.
        unit: what gains are counted in.
    """
    drawn = []
    for whose in [*models, *(["worst_site"] if any(s.of("worst_site_gain") for s in settings) else [])]:
        columns = _COLUMNS if whose in ("slm", "llm") else _COLUMNS[:1]
        for column, title, label, form in columns:
            if any(setting.of(column) for setting in settings):
                x = _mean_of(column)
                drawn.append(_chart(settings, whose, column, title, label, form, x, unit, costs=True))
    for whose in models:
        for field in _numeric(settings):
            title = f"gain against {field}"
            drawn.append(_chart(settings, whose, field, title, field, number, _value_of(field), unit, costs=False))
    return [chart for chart in drawn if chart.points]


def _chart(
    settings: Sequence[Setting],
    whose: str,
    column: str,
    title: str,
    label: str,
    form: Callable[[float], str],
    x_of: Callable[[Setting], float | None],
    unit: str,
    *,
    costs: bool,
) -> Chart:
    names, series = _series(settings, column)
    shown = [
        (setting, kind, gain, x_of(setting))
        for setting, kind in zip(settings, series, strict=True)
        if (gain := setting.of(f"{whose}_gain")) is not None and (column == "epsilon" or x_of(setting) is not None)
    ]
    best = iter(front_of([(x, gain.mean) for _, _, gain, x in shown if x is not None]))
    points = tuple(
        Point(
            x=x,
            y=gain.mean,
            half=gain.half,
            series=kind,
            label=f"{setting.label}: gain {gain_text(gain)} {unit}" + (", no DP" if x is None else f" at {form(x)}"),
            front=costs and x is not None and next(best),
        )
        for setting, kind, gain, x in shown
    )
    return Chart(
        name=re.sub(r"[^A-Za-z0-9_]+", "_", f"{whose}_{column}"),
        title=f"{_NAMES[whose]}: {title}",
        points=points,
        series=tuple(names),
        x_label=label,
        y_label=f"gain of the {_NAMES[whose]}, {unit}",
        x_form=form,
    )


def _series(settings: Sequence[Setting], column: str) -> tuple[list[str], list[int]]:
    """What colours tell apart: the first field with two to six values, other than the budget and the chart's own."""
    for field in settings[0].values if settings else ():
        texts = list(dict.fromkeys(setting.values[field] for setting in settings))
        if field not in ("privacy.epsilon", column) and 2 <= len(texts) <= len(LIGHT):
            return [f"{field}={text or '–'}" for text in texts], [texts.index(s.values[field]) for s in settings]
    return ["all settings"], [0] * len(settings)


def _mean_of(column: str) -> Callable[[Setting], float | None]:
    def mean(setting: Setting) -> float | None:
        estimate = setting.of(column)
        return None if estimate is None else float(f"{estimate.mean:.9g}")  # or one value's mean would be many x

    return mean


def _value_of(field: str) -> Callable[[Setting], float | None]:
    return lambda setting: float(setting.values[field])


def _numeric(settings: Sequence[Setting]) -> list[str]:
    """Fields whose values are numbers, and enough of them; the privacy budget has its chart already."""
    found = []
    for field in settings[0].values if settings else ():
        texts = {setting.values[field] for setting in settings}
        if field != "privacy.epsilon" and len(texts) >= _ENOUGH_VALUES and all(_is_number(text) for text in texts):
            found.append(field)
    return found


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text) is not None


def _epsilon_words(value: float) -> str:
    return f"ε {epsilon(value)}"


_COLUMNS: Final[tuple[tuple[str, str, str, Callable[[float], str]], ...]] = (
    ("epsilon", "what privacy costs", "ε spent by the site that spent most", _epsilon_words),
    ("bytes_up", "gain against bytes sent", "bytes sent by all sites", size),
    ("seconds", "gain against time", "seconds of the run", duration),
)
