"""``results.csv``, ``results.parquet``, ``sweep.html`` and ``figures/``: tables, intervals, and which setting to take.

Reads the folders of the cells and nothing else; the page loads nothing from anywhere. Numbers of a setting are means
over its seeds with Student's 95 % t-interval.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedcollm_privacy.accounting import Steps, rdp_epsilon
from fedcollm_privacy.tuning import TrialLaw, selected_epsilon
from secure_fedcollm.figures import scatter_files
from secure_fedcollm.report import delta, duration, epsilon, number, size
from secure_fedcollm.statement_page import stylesheet
from secure_fedcollm.sweep_advice import advice, gain_text, kept
from secure_fedcollm.sweep_cells import Cell
from secure_fedcollm.sweep_charts import charts
from secure_fedcollm.sweep_figures import palette_css, scatter
from secure_fedcollm.sweep_results import Row, Setting, fields_of, rows_of, settings_of, write_csv, write_parquet

__all__ = ["SelectionPrice", "selection_price", "write_report"]

_NAMES: Final = {"slm": "SLM", "llm": "LLM"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionPrice:
    """What choosing would have cost, had the records been private; by Rényi DP, at the delta of one run.

    Attributes:
        trials: runs of the sweep.
        one: epsilon of the dearest run alone.
        every: of as many such runs, all seen.
        selected: of the best of a random number of such runs, so many in the mean, when the others are never seen.
        delta: of all three.
    """

    trials: int
    one: float
    every: float
    selected: float
    delta: float


def selection_price(cells: Sequence[Cell]) -> SelectionPrice | None:
    """Work out the price from the plans in the runs' ledgers; None where no run has one.

    The law of the number of trials is the geometric one (eta 1), the middle of Papernot and Steinke's examples.
    """
    plans = {json.dumps(plan, sort_keys=True): plan for cell in cells if cell.finished for plan in _plans(cell.run)}
    dearest: tuple[float, Steps, float] | None = None
    for plan in plans.values():
        steps = Steps(
            noise_multiplier=plan["noise_multiplier"],
            sample_rate=Fraction(plan["sample_rate"]),
            steps=plan["rounds"] * plan["steps_per_round"],
        )
        cost = rdp_epsilon([steps], plan["delta"])
        if dearest is None or cost > dearest[0]:
            dearest = (cost, steps, plan["delta"])
    if dearest is None:
        return None
    one, steps, bound = dearest
    trials = sum(cell.finished for cell in cells)
    law = TrialLaw(kind="truncated_negative_binomial", expected=float(min(trials, 500)), eta=1.0)
    return SelectionPrice(
        trials=trials,
        one=one,
        every=rdp_epsilon([steps] * trials, bound),
        selected=selected_epsilon([steps], law, bound),
        delta=bound,
    )


def _plans(run: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted((run / "ledgers").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            entry = json.loads(line) if line else {}
            if entry.get("kind") == "PLAN" and "steps_per_round" in entry.get("plan", {}):
                found.append(entry["plan"])
    return found


def write_report(sweep_dir: Path, cells: Sequence[Cell]) -> Path:
    """Write the table in both forms, the page, and every chart as SVG and PDF for a paper.

    Args:
        sweep_dir: the sweep's folder.
        cells: all that lie in it, finished or not.

    Returns:
        The path of ``sweep.html``.
    """
    rows = rows_of(cells)
    settings = settings_of(rows)
    fields = [field for field in fields_of(cells) if field != "seed"]
    write_csv(sweep_dir / "results.csv", rows)
    write_parquet(sweep_dir / "results.parquet", rows)
    unit = _unit(rows)
    told = {model: advice(settings, model, unit) for model in _NAMES}
    models = [model for model in _NAMES if told[model]]
    drawn = charts(settings, models, unit)
    for chart in drawn:
        scatter_files(
            sweep_dir / "figures", chart.name, chart.points, chart.series,
            x_label=chart.x_label, y_label=chart.y_label, x_form=chart.x_form,
        )  # fmt: skip
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {f.__name__: f for f in (number, epsilon, delta, size, duration)}
    source = resources.files("secure_fedcollm").joinpath("sweep.html.j2").read_text(encoding="utf-8")
    declared = sorted({cell.config["data"]["declared"] for cell in cells if cell.config is not None})
    page = environment.from_string(source).render(
        style=stylesheet(),
        palette=Markup(palette_css()),  # noqa: S704 - our own constants
        name=sweep_dir.resolve().name,
        fields=fields,
        rows=rows,
        finished=sum(row.status == "finished" for row in rows),
        failed=[row for row in rows if row.status != "finished"],
        table=[_line(setting, settings, fields) for setting in settings],
        unit=unit,
        declared=" and ".join(declared),
        mixed=[f for f in fields if f.partition(".")[0] in ("data", "model", "experiment", "evaluation")],
        advice=[text for model in models for text in told[model]],
        seeds=min((len(setting.rows) for setting in settings), default=0),
        price=selection_price(cells),
        charts=[
            (
                chart.title,
                scatter(
                    chart.name,
                    chart.title,
                    chart.points,
                    chart.series,
                    x_label=chart.x_label,
                    y_label=chart.y_label,
                    x_form=chart.x_form,
                ),
            )
            for chart in drawn
        ],
        worst=[(s.label, e) for s in settings if (e := s.of("worst_site_gain")) is not None],
        gain_text=gain_text,
    )
    path = sweep_dir / "sweep.html"
    path.write_text(page, encoding="utf-8")
    return path


def _unit(rows: Sequence[Row]) -> str:
    choices = any("slm_acc_after" in row.numbers for row in rows)
    return "in choice accuracy" if choices else "nats per token"


def _line(setting: Setting, settings: Sequence[Setting], fields: Sequence[str]) -> dict[str, Any]:
    shown = {"values": [setting.values[f] for f in fields], "seeds": len(setting.rows)}
    for model in _NAMES:
        gain = setting.of(f"{model}_gain")
        shown[f"{model}_gain"] = "–" if gain is None else gain_text(gain).partition(" (")[0]
        measure = "acc" if setting.of(f"{model}_acc_after") else "perplexity"
        ends = [setting.of(f"{model}_{measure}_{when}") for when in ("before", "after")]
        shown[f"{model}_ends"] = " → ".join("–" if end is None else number(end.mean) for end in ends)
        shown[f"{model}_kept"] = kept(setting, settings, model)
    spent = [row.numbers.get("epsilon") for row in setting.rows]
    # The worst seed's, and never a mean: a spend is not shown smaller than it was.
    shown["epsilon"] = max(value for value in spent if value is not None) if setting.private else None
    for column in ("bytes_up", "seconds"):
        estimate = setting.of(column)
        shown[column] = None if estimate is None else estimate.mean
    return shown
