"""The server's side of who takes part: the signed offer of a run, and what each site answered to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.run_messages import RunAnswer, RunOffer
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.terms import RunTerms, require_offerable
from secure_fedcollm.transport import Transport

__all__ = ["RunOffers"]

_LOG = logging.getLogger("fedcollm")
_WORDS = {
    "joined": "takes part",
    "waiting": "waits for its administrator's approval; it is asked again before the next round",
    "declined": "declines; its own log says why, and its administrator may",
}


class RunOffers:
    """Offers one run to its sites; the same bytes to all, signed once.

    Args:
        terms: of the run.
        key: the server's.
        told: is told of every site's standing when it changes, ``joined`` or ``waiting``.

    Raises:
        ConfigError: such a run cannot be offered to sites on machines of their own.
    """

    def __init__(
        self, terms: RunTerms, key: SigningKey, told: Callable[[str, str], None] = lambda site, standing: None
    ) -> None:
        require_offerable(terms)
        data = terms.to_bytes()
        self._digest, self._run_id, self._told = terms.digest, terms.run_id, told
        self._offer = encode(RunOffer(run_id=terms.run_id, terms=data, signature=key.sign("run_offer", data)))
        self._standings: dict[str, str] = {}

    @property
    def standings(self) -> Mapping[str, str]:
        """Of every site that was asked: ``joined``, ``waiting``, or the code with which it gave no answer."""
        return MappingProxyType(self._standings)

    def enlist(self, transport: Transport) -> Mapping[str, str]:
        """Offer the run to every site that has not joined it, and remember what each says.

        A site that says no, or nothing, is asked again the next time: administrators change their minds, and machines
        come back. Nothing but a code is known of a refusal.

        Returns:
            As `standings`.
        """
        left = [site for site in transport.sites if self._standings.get(site) != "joined"]
        for reply in transport.ask("offer", dict.fromkeys(left, self._offer)):
            self._note(reply.site, self._answer(reply.site, reply.body, reply.code))
        return self.standings

    def _answer(self, site: str, body: bytes | None, code: str | None) -> str:
        if body is None:
            return code or "failed"
        try:
            answer = decode(body, RunAnswer)
        except ProtocolError:
            return "malformed answer"
        if (answer.site, answer.run_id, answer.terms_digest) != (site, self._run_id, self._digest):
            return "answer of another site or run"
        return answer.standing

    def _note(self, site: str, standing: str) -> None:
        if self._standings.get(site) == standing:
            return
        self._standings[site] = standing
        _LOG.info("site %s %s", site, _WORDS.get(standing, f"gives no answer to the offer ({standing})"))
        if standing in ("joined", "waiting"):
            self._told(site, standing)
