"""What a person sees while a run works: bars on a terminal, plain log lines elsewhere, nothing with ``--quiet``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["RunProgress"]

_LOG = logging.getLogger("fedcollm")


class RunProgress:
    """Stages with bars, and the seconds each kind of stage took.

    A stage inside a stage stops the outer one's clock, so that seconds add up to the time that passed.

    Args:
        quiet: show nothing (errors are raised, not shown here).
        console: where to show; plain lines when it is no terminal.
        told: hears of every stage's kind when it begins.
    """

    def __init__(
        self, *, quiet: bool = False, console: Console | None = None, told: Callable[[str], None] = lambda kind: None
    ) -> None:
        self._told = told
        self.console = console or Console(stderr=True, quiet=quiet)
        self._live = self.console.is_terminal and not quiet
        self._quiet = quiet
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self._live,
            transient=True,
        )
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = time.perf_counter()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def stage(self, kind: str, text: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Show a stage; gives the function that moves its bar by one.

        Args:
            kind: under which name its seconds are added up.
            text: what is shown.
            total: bar length; null when there is nothing to count.
        """
        self._charge()
        self._stack.append(kind)
        self._told(kind)
        bar = self._bars.add_task(text, total=total)
        if not self._live and not self._quiet:
            _LOG.debug("%s", text)
        try:
            yield lambda: self._bars.advance(bar)
        finally:
            self._bars.remove_task(bar)
            self._charge()
            self._stack.pop()

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._live:
            self.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            _LOG.info("%s", text)
