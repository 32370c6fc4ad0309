"""Which setting to take, in sentences that the numbers carry: nothing is called better that seeds do not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from secure_fedcollm.report import duration, epsilon, number, size
from secure_fedcollm.sweep_results import Estimate, Setting, differ

__all__ = ["advice", "gain_text", "kept", "level_of"]

_NAMES: Final = {"slm": "SLM", "llm": "LLM"}
_NAMED: Final = 3  # settings that are not told apart from the best; the table has them all


def level_of(setting: Setting) -> float | None:
    """The privacy budget that its runs were given; None without DP."""
    if not setting.private:
        return None
    budgets = [row.numbers.get("epsilon_budget") for row in setting.rows]
    return max(round(budget, 6) for budget in budgets if budget is not None)


def gain_text(value: Estimate) -> str:
    """Mean, half its interval and the number of seeds."""
    mean = f"{value.mean:+.3f}".replace("-", "−")
    if value.half is None:
        return f"{mean} (one seed)"
    return f"{mean} ± {value.half:.3f} ({value.count} seeds)"


def advice(settings: Sequence[Setting], model: str, unit: str) -> list[str]:
    """One sentence or more for every privacy budget, the strictest first and no DP last.

    Args:
        settings: of one sweep.
        model: ``slm`` or ``llm``.
        unit: what gains are counted in.

    Returns:
        Nothing for a budget at which no run changed that model or none has gains of it.
    """
    column = f"{model}_gain"
    known = [s for s in settings if s.of(column) is not None]
    changed = {level_of(s) for s in known if any(row.numbers[column] != 0 for row in s.rows)}
    levels = sorted(changed, key=lambda level: (level is None, level or 0.0))
    return [_at(level, [s for s in known if level_of(s) == level], model, unit) for level in levels]


def _at(level: float | None, settings: Sequence[Setting], model: str, unit: str) -> str:
    column = f"{model}_gain"
    where = f"{_NAMES[model]}, {'without DP' if level is None else f'ε ≤ {epsilon(level)}'}: "
    gains = {id(s): gain for s in settings if (gain := s.of(column)) is not None}
    best = max(settings, key=lambda s: gains[id(s)].mean)
    others = [s for s in settings if s is not best]
    top = gains[id(best)]
    told = f"the highest mean gain is that of {best.label}, {gain_text(top)} {unit}. "
    if not others:
        told = f"only {best.label} was run, with a gain of {gain_text(top)} {unit}. "
    if any(gains[id(s)].half is None for s in settings):
        return where + told + (
            "A setting with one seed says nothing about the next one, and the order may be chance. Run again with "
            "seed=0,1,2,3,4 in the same sweep_dir before taking any."
        )  # fmt: skip
    alike = [s for s in others if not differ(best, s, column, len(others))]
    if others and not alike:
        told += "Its seeds differ from those of every other setting here. "
    if alike:
        nearest = sorted(alike, key=lambda s: -gains[id(s)].mean)[:_NAMED]
        names = "; ".join(f"{s.label} ({gain_text(gains[id(s)])})" for s in nearest)
        if len(alike) > _NAMED:
            names += f"; and {len(alike) - _NAMED} more with lower means"
        told += f"These seeds do not tell it apart from {names}. "
    helping = [s for s in [best, *alike] if gains[id(s)].low > 0]
    if not helping:
        return where + told + "No interval here leaves out 0: that any of these helps is not shown. Run more seeds."
    cheapest = min(helping, key=_cost)
    among = "the cheapest of those that are shown to help, " if len(helping) > 1 else ""
    return where + told + f"Take {among}{cheapest.label}{_price(cheapest)}."


def _cost(setting: Setting) -> tuple[float, float]:
    sent, seconds = setting.of("bytes_up"), setting.of("seconds")
    return (sent.mean if sent else 0.0, seconds.mean if seconds else 0.0)


def _price(setting: Setting) -> str:
    sent, seconds = setting.of("bytes_up"), setting.of("seconds")
    parts = [size(sent.mean)] if sent else []
    parts += [duration(seconds.mean)] if seconds else []
    return f" ({', '.join(parts)} a run)" if parts else ""


def kept(setting: Setting, settings: Sequence[Setting], model: str) -> str:
    """The share of the gain without DP that a private setting keeps; "" where that one is not in the sweep."""
    plain = {**setting.values, "privacy.epsilon": "null"}
    control = next((s for s in settings if s.values == plain and s is not setting), None)
    if control is None or "privacy.epsilon" not in setting.values:
        return ""
    ours, theirs = setting.of(f"{model}_gain"), control.of(f"{model}_gain")
    if ours is None or theirs is None or not theirs.mean > 0:
        return ""
    return f"{number(100 * ours.mean / theirs.mean)} %"
