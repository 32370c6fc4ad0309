"""How requests reach sites and answers come back. Bytes only, so that one machine and many run the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedcollm_privacy.errors import SiteFailed

__all__ = ["Handler", "InProcessTransport", "Reply", "Transport"]

# What a site does with one request: operation and body in, answer out, or SiteFailed.
Handler = Callable[[str, bytes], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One site's answer: ``body``, or a ``code`` when it could not or would not."""

    site: str
    body: bytes | None
    code: str | None


class Transport(Protocol):
    """Reaches every site of the federation."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that can be asked."""
        ...

    def ask(self, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Reply]:
        """Send each named site its body; yield one reply a site, as they arrive."""
        ...


class InProcessTransport:
    """Sites in this process, asked one after the other.

    Args:
        handlers: for every site, what answers its requests.
    """

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order given."""
        return tuple(self._handlers)

    def ask(self, operation: str, bodies: Mapping[str, bytes]) -> Iterator[Reply]:
        """Ask each site in turn; a site that fails gives its code and does not stop the others."""
        for site, body in bodies.items():
            try:
                yield Reply(site=site, body=self._handlers[site](operation, body), code=None)
            except SiteFailed as failure:
                yield Reply(site=site, body=None, code=failure.code)
