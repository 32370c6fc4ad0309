"""The page of `watch`: what a server or site does now, for a browser on the same machine.

It looks like the privacy statement, loads nothing from anywhere, and is whole without scripts. With them it asks
its own server every two seconds and exchanges the parts that changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Final

from jinja2 import Template

from secure_fedcollm.report import duration, size
from secure_fedcollm.snapshot import PastRound, Snapshot
from secure_fedcollm.statement_page import environment, stylesheet
from secure_fedcollm.status_table import advice, ago, doing, headline, left_out

__all__ = ["render_watch"]

_BARS: Final = 60
_SYMBOLS: Final = {"joined": "●", "waiting": "◔", "declined": "✕", "away": "○", "unknown": "·"}


def render_watch(snapshot: Snapshot, nonce: str, clock: Callable[[], float] = time.time) -> str:
    """The page as HTML.

    Args:
        snapshot: what is shown.
        nonce: of the style sheet and the script, as the answer's security policy names it.
        clock: Unix time in seconds, for the words "ago".
    """
    now = clock()
    return _template().render(
        s=snapshot,
        nonce=nonce,
        stylesheet=stylesheet(),
        headline=headline(snapshot),
        doing=doing(snapshot),
        bad=bool(snapshot.trouble) or snapshot.state == "failed",
        bars=_bars(snapshot.history),
        symbols=_SYMBOLS,
        advice=advice,
        left_out=left_out,
        ago=lambda when: ago(when, now),
        stamp=lambda when: f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M:%S}",
        width=_share,
    )


@cache
def _template() -> Template:
    made = environment()
    made.filters |= {"size": size, "duration": duration}
    source = resources.files("secure_fedcollm").joinpath("watch.html.j2").read_text(encoding="utf-8")
    return made.from_string(source)


def _bars(history: tuple[PastRound, ...]) -> list[tuple[PastRound, float]]:
    """The last rounds with their heights in [2, 60]: their durations, the longest 60."""
    shown = history[-_BARS:]
    longest = max((past.seconds for past in shown), default=0.0) or 1.0
    return [(past, max(2.0, 60 * past.seconds / longest)) for past in shown]


def _share(part: float | None, whole: float | None, length: float) -> float:
    """How far a bar of this length is filled; a budget that is over fills it."""
    if part is None or whole is None or whole <= 0:
        return 0.0
    return round(length * min(1.0, part / whole), 2)
