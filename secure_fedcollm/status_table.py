"""``fedcollm status``: what a server or site does now, for a terminal, in words that say what to do."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedcollm_privacy.errors import FedCollmError
from secure_fedcollm.report import delta, duration, epsilon, size
from secure_fedcollm.snapshot import LeftOut, OwnStatus, PastRound, SiteStatus, Snapshot, read_status
from secure_fedcollm.statement_page import visible

__all__ = ["advice", "ago", "doing", "headline", "show", "status"]

_HERE = Path(os.environ.get("FEDCOLLM_KIT", "."))
_SHOWN_ROUNDS: Final = 8
_ADVICE: Final = {
    "waiting": "its administrator has to agree: `fedcollm site offers`, then `fedcollm site approve`, on its machine",
    "declined": "its policy or its administrator says no; the reason stands in its own log only. Call its "
    "administrator: `fedcollm policy refusals` there",
    "away": "gives no answer. Is `fedcollm site` running there, and may it reach this server? "
    "`fedcollm site --check` there says which",
    "unknown": "was not asked yet",
}
_STYLE: Final = {"joined": "green", "waiting": "yellow", "declined": "red", "away": "red", "unknown": "dim"}
_OWN: Final = {
    "left": "has left the federation: everything is declined, and the ledger stays",
    "paused": "paused by its administrator: no round reserves budget here; `fedcollm site resume` goes on",
    "waiting": "a run waits for this site's administrator: `fedcollm site offers`, then `fedcollm site approve`",
    "declined": "its administrator has declined the run that it had joined",
}
_PHASES: Final = {
    "offer": "offering the run to sites",
    "advertise": "sites check the plan and give keys",
    "share": "sites share out their secrets",
    "accept": "sites accept each other's shares",
    "train": "sites train and upload",
    "part": "uploads arrive, part by part",
    "agree": "survivors sign who is in the sum",
    "unmask": "survivors take the sum's masks away",
    "settle": "sites settle their budget",
    "head": "sites show their ledgers' heads",
    "witness": "sites keep the counter-signed heads",
    "claims": "sites say what they spent",
    "endorse": "sites sign the statement",
    "distil": "the two models teach each other",
    "evaluate": "measuring on public text",
}


def status(
    kit: Annotated[
        Path, typer.Option(help="The kit's folder. Default: $FEDCOLLM_KIT, or the folder you are in.")
    ] = _HERE,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print status.json as it is, with its trouble.")] = False,
) -> None:
    """Show what the server or site of a kit does now; exit 1 when its process is gone, hangs or has failed."""
    path = kit / "state" / "status.json"
    console = Console(highlight=False, emoji=False)
    if watch and not as_json:
        _follow(path, console)
        return
    snapshot = read_status(path)
    if as_json:
        console.file.write(snapshot.to_bytes().decode() + "\n")
    else:
        show(snapshot, console)
    if snapshot.trouble or snapshot.state == "failed":
        raise typer.Exit(1)


def show(snapshot: Snapshot, console: Console) -> None:
    """Print rounds, sites or budgets, and what is to be done."""
    console.print(_shown(snapshot, time.time()))


def _follow(path: Path, console: Console) -> None:
    read_status(path)  # a wrong path is an error, a file that breaks meanwhile is not
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                try:
                    live.update(_shown(read_status(path), time.time()), refresh=True)
                except FedCollmError as error:
                    live.update(Text(visible(str(error)), style="red"), refresh=True)
                time.sleep(1.0)
        except KeyboardInterrupt:
            return


def headline(snapshot: Snapshot) -> str:
    """One sentence: what this process does."""
    if snapshot.trouble:
        return f"NOT RUNNING OR NOT WELL: {snapshot.trouble}"
    if snapshot.state == "failed":
        return f"failed: {snapshot.failure}"
    if snapshot.role == "site":
        own = snapshot.own
        if own is None:
            return "starting: it has not heard from its server yet"
        if own.trouble:
            return f"its own state cannot be read: {own.trouble}"
        if own.standing in _OWN:
            return _OWN[own.standing]
        return f"takes part in run {own.run}" if own.run else "waits for its server to offer a run"
    if snapshot.state == "finished":
        return f"run {snapshot.run_id} has finished: {snapshot.opened} rounds opened, {snapshot.lost} lost"
    if snapshot.state == "starting":
        return "starting: loading models and data"
    return f"run {snapshot.run_id}, round {snapshot.server_round} of {snapshot.rounds}"


def doing(snapshot: Snapshot) -> str:
    """What is under way at a server, or was asked of a site last, in words; empty when nothing is."""
    if snapshot.over:
        return ""
    return snapshot.phase if snapshot.role == "site" else _PHASES.get(snapshot.phase, snapshot.phase)


def advice(site: SiteStatus) -> str:
    """What to do about a site, in words; empty when all is well."""
    if site.standing != "joined":
        return _ADVICE[site.standing]
    if site.code == "diverged":
        return "its training diverged: lower federation.learning_rate in the next run"
    if site.code in ("failed", "malformed upload"):
        return "failed; the reason stands in its own log only. Call its administrator: state/logs/fedcollm.jsonl there"
    return ""


def ago(when: float | None, now: float) -> str:
    """How long ago, in the largest unit that fits."""
    if when is None:
        return "never"
    seconds = max(0.0, now - when)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _shown(snapshot: Snapshot, now: float) -> RenderableType:
    bad = bool(snapshot.trouble) or snapshot.state == "failed"
    title = f"{snapshot.role} {snapshot.name}" + (f" of {snapshot.federation}" if snapshot.federation else "")
    parts: list[RenderableType] = [
        Text(visible(title), style="bold"),
        Text(visible(headline(snapshot)), style="bold red" if bad else "green" if snapshot.state == "finished" else ""),
    ]
    if doing(snapshot):
        what = "now" if snapshot.role == "server" else "last asked"
        parts.append(Text(f"{what}: {visible(doing(snapshot))}, begun {ago(snapshot.phase_since, now)}"))
    if snapshot.role == "server":
        parts.append(Text(f"rounds: {snapshot.opened} opened, {snapshot.lost} lost, {snapshot.rounds} planned"))
        parts.append(_sites(snapshot, now))
        if snapshot.history:
            parts.append(_rounds(snapshot.history[-_SHOWN_ROUNDS:]))
        words = [(site.name, advice(site)) for site in snapshot.sites]
        parts.extend(Text(visible(f"{name}: {text}"), style="yellow") for name, text in words if text)
    elif snapshot.own is not None:
        parts.extend(_own(snapshot.own))
    written = f"{datetime.fromtimestamp(snapshot.written, UTC):%Y-%m-%d %H:%M:%S} UTC"
    parts.append(Text(f"as of {written} ({ago(snapshot.written, now)}), process {snapshot.pid}", style="dim"))
    return Group(*parts)


def _sites(snapshot: Snapshot, now: float) -> Table:
    table = _table("sites", "site", "standing", "last asked", "seen", "ε spent", "of", "δ", "up", "down", "training")
    for site in snapshot.sites:
        table.add_row(
            Text(visible(site.name)),
            Text(site.standing, style=_STYLE[site.standing]),
            Text(visible(f"{site.operation} {site.state}".strip())),
            ago(site.seen, now),
            epsilon(site.epsilon),
            epsilon(snapshot.epsilon_budget),
            delta(site.delta),
            size(site.bytes_up),
            size(site.bytes_down),
            duration(site.train_seconds),
        )
    return table


def _rounds(history: tuple[PastRound, ...]) -> Table:
    table = _table("last rounds", "round", "outcome", "in the sum", "left out", "time", "up", "down")
    for past in reversed(history):
        number = str(past.server_round) if past.attempt <= 1 else f"{past.server_round}, attempt {past.attempt}"
        table.add_row(
            number,
            Text(visible(past.outcome), style="green" if past.outcome == "opened" else "red"),
            str(len(past.cohort)),
            Text(visible("; ".join(filter(None, (past.reason, left_out(past.left_out)))))),
            duration(past.seconds),
            size(past.bytes_up),
            size(past.bytes_down),
        )
    return table


def left_out(sites: tuple[LeftOut, ...]) -> str:
    """Sites with their codes, as a line."""
    return ", ".join(f"{left.site}: {left.code}" for left in sites)


def _own(own: OwnStatus) -> list[RenderableType]:
    facts = [f"standing: {own.standing or 'none'}", f"refused so far: {own.refusals}"]
    if own.server_round is not None:
        facts.insert(1, f"last round: {own.server_round}")
    table = _table("budgets", "data set", "window", "ε spent", "cap", "left", "δ spent", "cap")
    for budget in own.budgets:
        left = budget.cap_epsilon - budget.epsilon
        table.add_row(
            Text(visible(budget.data_set)),
            "for ever" if budget.days is None else f"any {budget.days} days",
            epsilon(budget.epsilon),
            f"{budget.cap_epsilon:g}",
            Text(f"{max(0.0, left):.4g}", style="red" if left <= 0 else ""),
            delta(budget.delta),
            delta(budget.cap_delta),
        )
    return [Text(visible("; ".join(facts))), *([table] if own.budgets else [])]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
