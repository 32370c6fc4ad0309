"""One line of what ``fedcollm site --check`` and ``fedcollm server --check`` found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedcollm_privacy.errors import FedCollmError
from secure_fedcollm.statement_page import visible

__all__ = ["Finding", "found", "show_findings"]

_WORDS = {True: ("ok", "green"), None: ("look", "yellow"), False: ("FAILED", "bold red")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was looked at, and what came of it.

    Attributes:
        name: what was looked at.
        ok: True; False: nothing works until it is put right; None: it works, or could not be looked at, and a person
            should know.
        detail: what was found. Nothing secret, nothing of records, not how many there are.
        remedy: a command, or whom to call; empty when all is well.
    """

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def found(name: str, remedy: str, look: Callable[[], Finding | str]) -> Finding:
    """What a check found: its finding, its words when all is well, or its refusal.

    Args:
        name: what is looked at.
        remedy: what to do when ``look`` refuses.
        look: the check.
    """
    try:
        result = look()
    except (FedCollmError, OSError) as error:
        return Finding(name=name, ok=False, detail=str(error), remedy=remedy)
    return result if isinstance(result, Finding) else Finding(name=name, ok=True, detail=result)


def show_findings(findings: Iterable[Finding], console: Console) -> int:
    """Print all findings; 0 unless one failed, then 1."""
    listed = tuple(findings)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in listed:
        word, style = _WORDS[finding.ok]
        said = Text(visible(finding.detail))
        if finding.remedy:
            said.append(f"\n→ {visible(finding.remedy)}", style="bold")
        table.add_row(Text(word, style=style), Text(visible(finding.name)), said)
    console.print(table)
    failed = sum(finding.ok is False for finding in listed)
    look = sum(finding.ok is None for finding in listed)
    closing = f"{failed} of {len(listed)} checks failed" if failed else f"nothing failed in {len(listed)} checks"
    console.print(Text(closing + (f"; {look} to look at" if look else ""), style="bold red" if failed else "green"))
    return 1 if failed else 0
