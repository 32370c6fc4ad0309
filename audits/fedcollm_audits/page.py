"""``audit.html``: an audit on one self-contained page for a data protection officer and a regulator.

It loads nothing from anywhere, runs no script, and shares the statement's style sheet. Whatever comes from the run's
folder is escaped, and characters that could hide or turn text are made visible.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Final

from fedcollm_audits.audit import Answer, Audit
from fedcollm_audits.controls import NO_SOFTWARE_ANSWERS, rows
from fedcollm_audits.picture import Bound, bounds_chart, bounds_of, numbers
from secure_fedcollm.statement_page import environment, stylesheet, visible, words

__all__ = ["render", "visible"]

GROUPS: Final = {
    "ledger": "The sites' ledgers",
    "plan": "Plans and privacy accounting",
    "transcript": "The server's transcript",
    "artefacts": "Files that were released",
    "statement": "The privacy statement",
    "empirical": "Attacks on the private training",
    "leakage": "Attacks on the released models",
}
_SAID: Final = {
    "pass": ("✓ pass", "good"),
    "fail": ("✗ FAIL", "bad"),
    "not shown": ("? not shown", "amber"),
    "not selected": ("– not asked", "muted"),
}

_COLUMNS: Final = {
    "of": "Attack",
    "auc": "AUC",
    "tpr": "found at 1 % false alarms",
    "dp": "against the claim",
    "p_value": "p",
    "bits": "bits",
    "first": "ranked first",
    "first_before": "ranked first before",
}


def render(audit: Audit) -> str:
    """The page.

    Returns:
        HTML; parts for which no finding has numbers (claims and bounds, leakage) are left out.
    """
    source = resources.files("fedcollm_audits").joinpath("audit.html.j2").read_text(encoding="utf-8")
    bounds = [b for a in audit.answers if a.finding is not None for b in bounds_of(a.finding.details)]
    return (
        environment()
        .from_string(source)
        .render(
            audit=audit,
            style=stylesheet(),
            said=_SAID,
            groups=_grouped(audit.answers),
            bounds=[_bound_row(bound) for bound in bounds],
            chart=bounds_chart(bounds) if bounds else None,
            leakage=[t for a in audit.answers if a.check.group == "leakage" for t in _tables(a)],
            controls=[(s, list(r)) for s, r in itertools.groupby(rows(audit), key=lambda row: row["source"])],
            no_software_answers=NO_SOFTWARE_ANSWERS,
        )
    )


def _grouped(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    names = dict.fromkeys([*GROUPS, *(answer.check.group for answer in answers)])
    groups = []
    for name in names:
        inside = [answer for answer in answers if answer.check.group == name]
        if inside:
            said = [answer.status for answer in inside]
            counts = {status: said.count(status) for status in _SAID}
            groups.append({"title": GROUPS.get(name, name), "answers": inside, "counts": counts})
    return groups


def _bound_row(bound: Bound) -> dict[str, str]:
    lower, claim = numbers(bound)
    return {
        "name": bound.name,
        "lower": lower,
        "claim": claim,
        "confidence": "not told" if bound.confidence is None else f"{100 * bound.confidence:g}\u202f%",
        "verdict": "MORE than the claim" if bound.exceeds else "within the claim",
    }


def _tables(answer: Answer) -> list[dict[str, Any]]:
    """A finding's details as tables: its objects are one, a row each; a list of objects is one of its own."""
    details = {} if answer.finding is None else answer.finding.details
    named = {str(key): value for key, value in details.items() if isinstance(value, Mapping) and key != "claim"}
    lists = {key: value for key, value in details.items() if key != "bounds"}
    for name, value in named.items():
        lists |= {f"{name}, {key}": inner for key, inner in value.items()}
    tables = [_table(answer.check.name, [{"of": name, **value} for name, value in named.items()])]
    for key, value in lists.items():
        if isinstance(value, list | tuple) and all(isinstance(line, Mapping) for line in value):
            tables.append(_table(f"{answer.check.name}: {words(key)}", value))
    return [table for table in tables if table["columns"]]


def _table(caption: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = [c for c in dict.fromkeys(c for line in lines for c in line) if not _is_list(lines, c)]
    return {
        "caption": caption,
        "columns": [_COLUMNS.get(column, words(column)) for column in columns],
        "rows": [[_cell(line.get(column)) for column in columns] for line in lines],
    }


def _is_list(lines: Sequence[Mapping[str, Any]], column: str) -> bool:
    return any(isinstance(line.get(column), list | tuple) for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        if {"estimate", "low", "high"} <= value.keys():
            return f"{_cell(value['estimate'])} ({_cell(value['low'])} to {_cell(value['high'])})"
        return "; ".join(f"{words(key)} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.3g}"
    return "–" if value is None else str(value)
