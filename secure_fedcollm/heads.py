"""After every round: each site's signed ledger head, counter-signed by the server, kept by both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.head_witness import HeadWitness
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.tree_heads import HeadRequest, SignedHead, WitnessedHead
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.transcript import Transcript
from secure_fedcollm.transport import Transport

__all__ = ["LedgerHeads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerHeads:
    """The server's side of it.

    Attributes:
        witness: what it has counter-signed so far, over all runs.
        roster: whose signature a head must carry.
    """

    witness: HeadWitness
    roster: Roster

    def exchange(
        self, transport: Transport, transcript: Transcript, *, run_id: str, server_round: int
    ) -> Mapping[str, str]:
        """Ask all sites for their heads, counter-sign those that extend what was seen, and note all in the transcript.

        Returns:
            Sites without a counter-signed head, with the reason: ``no head`` came, or it ``contradicts`` another.
        """
        signed, refused = self._ask(transport, transport.sites, run_id, server_round)
        if refused:
            # Another run of the same site may have been counter-signed between question and answer.
            again, refused = self._ask(transport, tuple(refused), run_id, server_round)
            signed |= again
        noted = {site: head.as_fields() for site, head in signed.items()}
        transcript.record("tree_heads", run_id=run_id, server_round=server_round, heads=noted, refused=refused)
        for _ in transport.ask("witness", {site: encode(head) for site, head in signed.items()}):
            pass  # a site that cannot keep it has said so in its own log; the server has it
        return MappingProxyType(refused)

    def _ask(
        self, transport: Transport, sites: tuple[str, ...], run_id: str, server_round: int
    ) -> tuple[dict[str, WitnessedHead], dict[str, str]]:
        asked = dict[str, bytes]()
        for site in sites:
            seen = self.witness.seen(self.roster.site(site))
            asked[site] = encode(HeadRequest(run_id=run_id, server_round=server_round, tree_size=seen))
        signed, refused = dict[str, WitnessedHead](), dict.fromkeys(sites, "no head")
        for reply in transport.ask("head", asked):
            try:
                head = decode(reply.body or b"", SignedHead)
            except ProtocolError:
                continue
            try:
                identity = self.roster.site(reply.site)
                signed[reply.site] = self.witness.countersign(head, identity, run_id=run_id, server_round=server_round)
                del refused[reply.site]
            except ProtocolError:
                refused[reply.site] = "contradicts"
        return signed, refused
