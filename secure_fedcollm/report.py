"""``report.html``: what a run did, on one self-contained page.

Reads a run folder (``summary.json``, ``metrics.jsonl``, ``statement.json``) and nothing else, and the page loads
nothing from anywhere. A part whose numbers are missing is left out; a file that says something impossible is
refused. Whatever comes from data is escaped by Jinja; figures are inline SVG whose colours are the page's CSS
variables, so that they follow light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from secure_fedcollm import run_files
from secure_fedcollm.figures import Line, line_chart

__all__ = ["render"]

_MODELS = {"slm": "SLM", "llm": "LLM"}
# metric -> (label, +1 where more is better, whether it is a share); the order is the order on the page
_METRICS = {
    "perplexity": ("Perplexity", -1, False),
    "loss": ("Cross-entropy, nats per token", -1, False),
    "token_accuracy": ("Next-token accuracy", +1, True),
    "acc": ("Choice accuracy", +1, True),
    "acc_norm": ("Choice accuracy per character", +1, True),
    "rouge_l": ("ROUGE-L", +1, False),
}
_UNDRAWABLE = 1e12  # a diverged model's perplexity; the tables still print it


def render(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder.

    Args:
        run_dir: a folder with ``summary.json``; ``metrics.jsonl`` and ``statement.json`` may be missing.

    Returns:
        The path of the page.

    Raises:
        InvalidValue: a file is missing or no JSON, holds NaN, or has a field of the wrong kind (the text names
            file and field); or a run calls itself private and has a site without an epsilon.
    """
    files = run_files.read(run_dir)
    summary, rounds, statement = files.summary, files.rounds, files.statement
    private = summary.get("private", False)

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {f.__name__: f for f in (number, percent, epsilon, delta, size, duration)}
    source = resources.files("secure_fedcollm").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        s=summary,
        rounds=rounds,
        statement=statement,
        private=private,
        models=_MODELS,
        lede=_lede(summary, private),
        changes={key: _changes(summary.get(key, {})) for key in _MODELS},
        figures=_figures(summary, rounds),
        budget_scale=_budget_scale(summary),
        flow=_flow(summary, rounds),
        samples=_samples(summary.get("samples", [])),
        secrets_reading=_secrets_reading(summary.get("secrets", [])),
        stages=sorted(summary.get("seconds", {}).items(), key=lambda stage: -stage[1]),
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------- words


def number(value: float | None) -> str:
    """Three or four digits, thousands grouped by thin spaces, a true minus."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 1000:
        text = f"{value:,.0f}".replace(",", "\u202f")
    elif value == 0:
        text = "0"
    elif abs(value) >= 0.001:
        text = f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}"
    else:
        text = f"{value:.1e}".replace("e-0", "e-")
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """A share in [0, 1] as a percentage."""
    return "–" if value is None else f"{100 * value:.1f}\u202f%".replace("-", "−")


def epsilon(value: float | None) -> str:
    """Two decimals, rounded up: a spend is never shown smaller than it was."""
    if value is None:
        return "–"
    if value > 1e6:
        return "over 1e6"
    return str(Decimal(repr(float(value))).quantize(Decimal("0.01"), rounding=ROUND_CEILING))


def delta(value: float | None) -> str:
    """As in ``1e-5``."""
    return "–" if value is None else f"{value:.2g}".replace("e-0", "e-")


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.{1 if value < 100 * factor else 0}f} {unit}"
    return f"{value:.0f} bytes"


def duration(value: float | None) -> str:
    """Seconds, or minutes and seconds."""
    if value is None:
        return "–"
    if value >= 60:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds:02d} s"
    return "under 0.1 s" if 0 < value < 0.1 else f"{value:.{1 if value < 10 else 0}f} s"


def _lede(summary: Mapping[str, Any], private: bool) -> str:
    """One or two sentences in plain words, from the numbers alone."""
    text = ""
    for key, what, form in (("perplexity", "perplexity", number), ("acc", "choice accuracy", percent)):
        parts = []
        for model, name in _MODELS.items():
            before = summary.get(model, {}).get("before", {}).get(key)
            after = summary.get(model, {}).get("after", {}).get(key)
            if before is not None and after is not None:
                verb = "fell" if after < before else "rose" if after > before else "went"
                parts.append(f"{name} {what} {verb} from {form(before)} to {form(after)}")
        text += " and ".join(parts) + ". " if parts else ""
    rows = summary.get("sites", {}).values()
    if private and rows:
        worst, unit = max(row["epsilon"] for row in rows), next(iter(rows)).get("unit")
        deltas = [row["delta"] for row in rows if row.get("delta") is not None]
        bound = f" (δ = {delta(max(deltas))})" if deltas else ""
        seen = " towards whoever sees sums only" if summary.get("noise") == "distributed" else ""
        text += f"No site spent more than ε = {epsilon(worst)}{bound}{f' for any one {unit}' if unit else ''}{seen}."
    elif not private:
        text += "No noise was added and no budget was kept: what this run learned can give single records away."
    return text


def _changes(model: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the before/after table; metrics that nobody told the direction of get no verdict."""
    before, after = model.get("before", {}), model.get("after", {})
    rows = []
    for key in [*(k for k in _METRICS if k in before), *(k for k in before if k not in _METRICS)]:
        if key not in after:
            continue
        label, direction, is_share = _METRICS.get(key, (key, 0, False))
        form, difference = (percent if is_share else number), after[key] - before[key]
        if is_share:
            change = f"{100 * difference:+.1f} points"
        else:
            change = f"{'+' if difference > 0 else ''}{number(float(difference))}"
            if key == "perplexity" and before[key]:
                change += f" ({100 * difference / before[key]:+.0f}\u202f%)"
        verdict = "" if not direction or not difference else "better" if direction * difference > 0 else "worse"
        rows.append({
            "label": label, "before": form(before[key]), "after": form(after[key]), "verdict": verdict,
            "change": change.replace("-", "−"), "arrow": "▲" if difference > 0 else "▼" if difference else "",
        })  # fmt: skip
    return rows


def _budget_scale(summary: Mapping[str, Any]) -> float:
    """The ε at the right end of every site's bar."""
    keys = ("epsilon", "epsilon_budget", "epsilon_cap", "spent_on_data_set")
    return max((row.get(key) or 0.0 for row in summary.get("sites", {}).values() for key in keys), default=0.0)


def _flow(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Numbers of the picture of what was encrypted and opened; None when nothing was."""
    sums, per_parameter, parameters = (
        summary.get(k) for k in ("secure_sum", "bytes_per_parameter", "uploaded_parameters")
    )
    opened = [len(r.get("cohort", [])) for r in rounds if r.get("outcome") == "opened"]
    if not sums or not summary.get("bytes_up"):
        return None
    upload = per_parameter * parameters if per_parameter and parameters else None
    ciphertext = None
    if "poly_modulus_degree" in sums:
        ciphertext = 2 * sums["poly_modulus_degree"] * 8  # two polynomials of 64-bit words
    return {
        "upload": upload,
        "ciphertexts": round(upload / ciphertext) if upload and ciphertext else None,
        "opened": len(opened),
        "lost": sum(r.get("outcome") == "lost" for r in rounds),
        "cohorts": sorted(set(opened)),
    }


def _samples(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """By prompt and target, so that what both models wrote stands together."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for sample in samples:
        grouped.setdefault((sample.get("prompt", ""), sample.get("target", "")), []).append(sample)
    return grouped


def _secrets_reading(secrets: Sequence[Mapping[str, Any]]) -> str:
    rows = [row for row in secrets if {"rank_after", "candidates", "exposure_after"} <= row.keys()]
    if not rows:
        return ""
    worst = max(rows, key=lambda row: float(row["exposure_after"]))
    first = sum(row["rank_after"] == 1 for row in rows)
    found = "None is" if not first else f"{first} of {len(rows)} {'is' if first == 1 else 'are'}"
    candidates = max(worst["candidates"], 1)
    highest = math.log2(candidates)
    by_chance = highest - math.lgamma(candidates + 1) / (candidates * math.log(2))  # mean over all ranks
    return (
        f"{found} the model's first guess after training. The most exposed one ranks {number(worst['rank_after'])} of "
        f"{number(candidates)}: {number(float(worst['exposure_after']))} bits, where {number(highest)} would be "
        f"certainty and {number(by_chance)} is what guessing at random gives on average."
    )


# ---------------------------------------------------------------------------------------------- figures


def _line(values: Iterable[tuple[int, float | None]], colour: str, label: str = "") -> Line:
    drawable = tuple((x, y) for x, y in values if y is not None and abs(y) < _UNDRAWABLE)
    return Line(points=drawable, colour=colour, label=label)


def _figures(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, Markup]]]:
    """Titled charts by section; a chart needs a line of two points."""

    def metric(model: str, name: str) -> list[tuple[int, float | None]]:
        return [(r["server_round"], (r.get(model) or {}).get(name)) for r in rounds]

    def site_perplexity(site: str) -> list[tuple[int, float | None]]:
        return [(r["server_round"], (r.get("sites", {}).get(site) or {}).get("perplexity")) for r in rounds]

    charts: list[tuple[str, list[Line], Callable[[float], str]]] = []
    for model, name in _MODELS.items():
        charts.append((f"{name} perplexity", [_line(metric(model, "perplexity"), model)], number))
    alone = sorted({site for r in rounds for site in r.get("sites", {})})
    charts.append(("Perplexity, each site alone", [_line(site_perplexity(site), "slm") for site in alone], number))
    accuracy = [
        _line([(t, None if acc is None else 100 * acc) for t, acc in metric(model, "acc")], model, name)
        for model, name in _MODELS.items()
    ]
    charts.append(("Choice accuracy, %", accuracy, number))

    lost = sorted({r["server_round"] for r in rounds if r.get("outcome") == "lost"})
    sites = summary.get("sites", {})
    budgets = {row["epsilon_budget"] for row in sites.values() if row.get("epsilon_budget")}
    spent = [_line([(r["server_round"], r.get("epsilon", {}).get(site)) for r in rounds], "ink") for site in sites]

    def draw(title: str, lines: list[Line], form: Callable[[float], str], level: float | None = None) -> list[Any]:
        if not any(len(line.points) > 1 for line in lines):
            return []
        return [(title, line_chart(title, lines, form=form, lost=lost, level=level))]

    return {
        "curves": [chart for title, lines, form in charts for chart in draw(title, lines, form)],
        "spent": draw("ε spent, a line per site", spent, epsilon, budgets.pop() if len(budgets) == 1 else None),
    }
