"""What all checks that need no training say of a folder, and how tests change one site's entries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedcollm_audits import check_artefacts, check_ledgers, check_plans, check_statement, check_transcript, evidence
from fedcollm_audits.verdict import Finding

from .run_records import Line

CHECKS = tuple(
    check
    for module in (check_ledgers, check_plans, check_transcript, check_artefacts, check_statement)
    for check in module.CHECKS
)


def findings(folder: Path, **given: Any) -> dict[str, Finding]:
    found = evidence.read(folder, **given)
    return {check.name: check.run(found) for check in CHECKS}


def failing(folder: Path, **given: Any) -> set[str]:
    return {name for name, finding in findings(folder, **given).items() if finding.status == "fail"}


def open_questions(folder: Path, **given: Any) -> set[str]:
    return {name for name, finding in findings(folder, **given).items() if finding.status == "not shown"}


def reasons(folder: Path, name: str, **given: Any) -> str:
    return "\n".join(findings(folder, **given)[name].evidence)


def at(site: str, kind: str, change: Callable[[Line], Any], server_round: int = 0) -> Callable[[Line], Line]:
    """An ``on_entry`` that changes the entries of one site and kind (and, of reservations, one round)."""

    def on_entry(entry: Line) -> Line:
        here = server_round in (0, entry.get("server_round"))
        if (entry["site"], entry["kind"]) == (site, kind) and entry["run_id"].startswith("run-") and here:
            change(entry)
        return entry

    return on_entry
