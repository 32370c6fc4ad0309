"""READ FIRST. The whole system in one function: one round of private, encrypted co-tuning.

Everything else deepens one numbered stage: 1 `server`, 2 `fedcollm_privacy.secure_sum` and ``contributor``, 3 `site`
(with ``ledger``, ``dp_sgd``, ``quantization``, ``ckks``, ``masks``), 4 ``secure_sum``, ``aggregator``, ``decryptor``,
5-6 `server`, `distillation`, 7 `site`, ``ledger``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.errors import ProtocolError, RoundLost
from fedcollm_privacy.messages import OpenedSum, Receipt, RoundPlan, Settlement, TrainRequest, vector_digest
from fedcollm_privacy.secure_sum import SecureSum
from fedcollm_privacy.secure_sum_messages import UploadManifest
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.distillation import CoTuningReport
from secure_fedcollm.heads import LedgerHeads
from secure_fedcollm.server import Server
from secure_fedcollm.server_optimizer import AdamState
from secure_fedcollm.site import Site
from secure_fedcollm.transcript import Transcript
from secure_fedcollm.transport import Reply, Transport

__all__ = [
    "Federation",
    "Offers",
    "RoundOutcome",
    "State",
    "Uploads",
    "adapter_digests",
    "conclude_round",
    "run_round",
    "run_round_alone",
]

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What one round hands to the next.

    Attributes:
        slm: the SLM's adapter, as broadcast next, float32 [D].
        llm: the LLM's adapter, float32 [D'].
        alone: without exchange, every site's own adapter.
        adam: the server's optimizer, where sites send gradients.
    """

    slm: Float32
    llm: Float32
    alone: Mapping[str, Float32] = field(default_factory=dict)
    adam: AdamState = field(default_factory=AdamState)


class Offers(Protocol):
    """Invites sites on machines of their own, which join a run when they and their administrators want to."""

    def enlist(self, transport: Transport) -> Mapping[str, str]:
        """Offer the run to every site that has not joined it; every site's standing, ``joined`` or why not."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """Who takes part.

    Attributes:
        keep: puts an opened sum on disk before anything is made of it: sites give their shares once a round, so a sum
            that was lost in a crash could not be had again.
        heads: counter-signs the heads of the sites' ledgers; None in a declared non-private run, which has none.
        sites: used by the baselines without exchange only; a round goes through ``transport``.
        offers: invites sites that are on machines of their own; None in one process tree, where all take part.
    """

    server: Server
    transport: Transport
    secure_sum: SecureSum
    transcript: Transcript
    keep: Callable[[OpenedSum], None]
    heads: LedgerHeads | None
    sites: tuple[Site, ...]
    offers: Offers | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOutcome:
    """How a round ended.

    Attributes:
        outcome: ``opened``; ``lost``, then ``state`` is as before; ``kept`` in the baselines without exchange.
        cohort: sites in the opened sum.
        left_out: sites that are not, with their code.
        reason: why the round was lost, for the server's log.
        bytes_up: encrypted bytes received.
        sum_norm: L2 norm of the mean update.
        distrusted: sites whose ledger's head the server did not counter-sign, with the reason.
    """

    outcome: str
    state: State
    cohort: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    settlements: tuple[Settlement, ...] = ()
    bytes_up: int = 0
    sum_norm: float | None = None
    co_tuning: CoTuningReport | None = None
    distrusted: Mapping[str, str] = field(default_factory=dict)


def run_round(federation: Federation, state: State, server_round: int, attempt: int, value_bits: int) -> RoundOutcome:
    """Algorithm 1 of FedCoLLM with every upload private, encrypted and masked.

    A site that fails is left out; fewer than k or t of them, a refused opening, a sum beyond its gates or a diverged
    model lose the round: the state stays as it was, reserved budget stays spent, and the next round goes on.
    """
    # 1. A fresh encryption key, and the plan that every later message, key and signature of the round is bound to.
    server, transport, secure_sum = federation.server, federation.transport, federation.secure_sum
    context = secure_sum.begin(contributors=len(transport.sites), value_bits=value_bits)
    plan = server.plan_round(server_round, attempt, context, state.slm)
    facts = {"server_round": server_round, "attempt": attempt, "plan": plan.digest, "terms": asdict(plan)}
    federation.transcript.record("plan", **facts)
    uploads = Uploads(federation.transcript, plan)
    try:
        # 2. Sites check the signed plan; those that accept it exchange keys for masks, and shares of their secrets.
        ready = secure_sum.enrol(plan)
        # 3. Broadcast. Each site reserves its budget, trains with DP-SGD, clips, quantises, encrypts, masks, uploads.
        request = TrainRequest(plan_digest=plan.digest, adapter=state.slm, public_key=context.to_bytes())
        uploads.expect(transport.ask("train", dict.fromkeys(ready, encode(request))))
        # 4. A process without any key adds the ciphertexts. All survivors sign who they are and take the sum's masks
        #    away, and nothing else's. The decryptor opens the sum, once, as integers.
        opened = secure_sum.open(uploads)
        federation.keep(opened)
    except RoundLost as lost:
        result = RoundOutcome(outcome="lost", state=state, reason=str(lost))
        result = _settled(federation, plan, result)
    else:
        result = conclude_round(federation, state, opened)
    absent = dict.fromkeys(set(transport.sites) - set(result.cohort), "not in the sum")
    left_out = {**absent, **secure_sum.rejected, **uploads.failed}
    return replace(result, left_out=left_out, bytes_up=uploads.bytes_up)


def conclude_round(federation: Federation, state: State, opened: OpenedSum) -> RoundOutcome:
    """What is left of a round once its sum is open; also where a run was cut right after the opening."""
    server, plan = federation.server, opened.plan
    try:
        # 5. The mean update, if it is within its gates, moves the SLM's adapter.
        aggregated, adam = server.apply(state.slm, state.adam, opened)
        # 6. SLM and LLM teach each other on public text; the distilled SLM is what the sites get next.
        tuned = server.co_tune(aggregated, state.llm, plan.server_round)
    except RoundLost as lost:
        result = RoundOutcome(outcome="lost", state=state, reason=str(lost))
    else:
        next_state = replace(state, slm=tuned.slm, llm=tuned.llm, adam=adam)
        mean_norm = float(np.linalg.norm(opened.total * (plan.grid_step / len(opened.cohort))))
        result = RoundOutcome(
            outcome="opened", state=next_state, cohort=opened.cohort, sum_norm=mean_norm, co_tuning=tuned.report
        )
    return _settled(federation, plan, result)


def run_round_alone(federation: Federation, state: State, server_round: int) -> RoundOutcome:
    """The baselines without exchange: every site trains on and keeps what it has."""
    alone = {site.name: site.train_alone(state.alone[site.name], server_round) for site in federation.sites}
    receipt = Receipt(plan_digest="", server_round=server_round, outcome="left_out")
    settlements = tuple(site.settle(receipt) for site in federation.sites)
    federation.transcript.record("kept", server_round=server_round)
    return RoundOutcome(outcome="kept", state=replace(state, alone=alone), settlements=settlements)


class Uploads:
    """The uploads of a round as they are announced, noted in the transcript by digest.

    Attributes:
        failed: sites that announced none, with their code; complete once iterated to the end.
        bytes_up: encrypted bytes announced so far.
    """

    def __init__(self, transcript: Transcript, plan: RoundPlan) -> None:
        self._transcript, self._plan = transcript, plan
        self._replies: Iterator[Reply] = iter(())
        self.failed: dict[str, str] = {}
        self.bytes_up = 0

    def expect(self, replies: Iterable[Reply]) -> None:
        """Take the sites' answers to the request to train."""
        self._replies = iter(replies)

    def __iter__(self) -> Iterator[UploadManifest]:
        plan = self._plan
        for reply in self._replies:
            if reply.body is None:
                self.failed[reply.site] = reply.code or "failed"
                continue
            try:
                manifest = decode(reply.body, UploadManifest)
            except ProtocolError:
                self.failed[reply.site] = "malformed upload"
                continue
            if manifest.site != reply.site or manifest.plan_digest != plan.digest:
                self.failed[reply.site] = "upload of another site or round"
                continue
            self.bytes_up += len(reply.body) + plan.ckks.chunk_count(plan.dimension) * plan.ckks.ciphertext_bytes
            self._transcript.record(
                "upload", server_round=plan.server_round, site=manifest.site, manifest=manifest.digest
            )
            yield manifest


def _settled(federation: Federation, plan: RoundPlan, result: RoundOutcome) -> RoundOutcome:
    """7. Every site closes its reservation, says what its ledger has spent, has the ledger's head counter-signed."""
    facts = {"server_round": plan.server_round, "plan": plan.digest, "cohort": list(result.cohort)}
    federation.transcript.record(result.outcome, **facts, **adapter_digests(result.state))

    def outcome(site: str) -> str:
        return "lost" if result.outcome == "lost" else "included" if site in result.cohort else "left_out"

    receipts = {
        site: encode(Receipt(plan_digest=plan.digest, server_round=plan.server_round, outcome=outcome(site)))
        for site in federation.transport.sites
    }
    settlements = []
    for reply in federation.transport.ask("settle", receipts):
        try:
            settlement = decode(reply.body or b"", Settlement)
        except ProtocolError:  # a site that cannot say what it spent has still spent it, in its own ledger
            continue
        if settlement.site == reply.site:
            settlements.append(settlement)
    return replace(result, settlements=tuple(settlements), distrusted=_heads(federation, plan))


def _heads(federation: Federation, plan: RoundPlan) -> Mapping[str, str]:
    if federation.heads is None:
        return {}
    return federation.heads.exchange(
        federation.transport, federation.transcript, run_id=plan.run_id, server_round=plan.server_round
    )


def adapter_digests(state: State) -> dict[str, str]:
    """Digests of the shared adapters, as the transcript and the statement name them."""
    return {"slm": vector_digest(state.slm), "llm": vector_digest(state.llm)}
