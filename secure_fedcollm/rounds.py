"""READ FIRST. The whole system in one function: one round of private, encrypted co-tuning.

Everything else deepens one numbered stage: 1 `server`, 2 `site` (with `fedcollm_privacy.ledger`, ``dp_sgd``,
``quantization``, ``ckks``), 3-4 `fedcollm_privacy.secure_sum`, 5-6 `server`, `distillation`, 7 `site`, ``ledger``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.errors import ProtocolError, RoundLost
from fedcollm_privacy.messages import Receipt, RoundPlan, SealedUpdate, Settlement, TrainRequest
from fedcollm_privacy.secure_sum import SecureSum
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.distillation import CoTuningReport
from secure_fedcollm.server import Server
from secure_fedcollm.server_optimizer import AdamState
from secure_fedcollm.site import Site
from secure_fedcollm.transcript import Transcript
from secure_fedcollm.transport import Reply, Transport

__all__ = ["Federation", "RoundOutcome", "State", "Uploads", "run_round", "run_round_alone"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """Who takes part. ``sites`` is used by the baselines without exchange only; a round goes through ``transport``."""

    server: Server
    transport: Transport
    secure_sum: SecureSum
    transcript: Transcript
    sites: tuple[Site, ...]


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


def run_round(federation: Federation, state: State, server_round: int, attempt: int, value_bits: int) -> RoundOutcome:
    """Algorithm 1 of FedCoLLM with every upload private and encrypted.

    A site that fails is left out; fewer than k uploads, a refused opening or a diverged model lose the round: the state
    stays as it was, reserved budget stays spent, and the next round goes on.
    """
    # 1. A fresh encryption key, and the plan that every later message of the round is bound to.
    server, transport, sites = federation.server, federation.transport, federation.transport.sites
    context = federation.secure_sum.begin(contributors=len(sites), value_bits=value_bits)
    plan = server.plan_round(server_round, attempt, context.digest)
    federation.transcript.record("plan", server_round=server_round, attempt=attempt, plan=plan.digest)

    # 2. Broadcast. Each site reserves its budget, trains with DP-SGD, clips, quantises, encrypts, uploads.
    request = encode(TrainRequest(plan=plan, adapter=state.slm, public_key=context.to_bytes()))
    uploads = Uploads(federation.transcript, plan, transport.ask("train", dict.fromkeys(sites, request)))
    try:
        # 3. A process without any key adds the ciphertexts.  4. The decryptor opens the sum, once, as integers.
        opened = federation.secure_sum.open(plan, uploads)
        # 5. The mean update moves the SLM's adapter.
        aggregated, adam = server.apply(state.slm, state.adam, opened)
        # 6. SLM and LLM teach each other on public text; the distilled SLM is what the sites get next.
        tuned = server.co_tune(aggregated, state.llm, server_round)
    except RoundLost as lost:
        result = RoundOutcome(outcome="lost", state=state, reason=str(lost))
    else:
        next_state = replace(state, slm=tuned.slm, llm=tuned.llm, adam=adam)
        mean_norm = float(np.linalg.norm(opened.total * (plan.grid_step / len(opened.cohort))))
        result = RoundOutcome(
            outcome="opened", state=next_state, cohort=opened.cohort, sum_norm=mean_norm, co_tuning=tuned.report
        )
    federation.transcript.record(
        result.outcome, server_round=server_round, plan=plan.digest, cohort=list(result.cohort)
    )

    # 7. Every site closes its reservation and says what its ledger has spent.
    settlements = _settle(transport, plan, result)
    left_out = {**dict.fromkeys(set(sites) - set(result.cohort), "not in the sum"), **uploads.failed}
    left_out.update(federation.secure_sum.rejected)
    return replace(result, left_out=left_out, settlements=settlements, bytes_up=uploads.bytes_up)


def run_round_alone(federation: Federation, state: State, server_round: int) -> RoundOutcome:
    """The baselines without exchange: every site trains on and keeps what it has."""
    alone = {site.name: site.train_alone(state.alone[site.name], server_round) for site in federation.sites}
    receipt = Receipt(plan_digest="", server_round=server_round, outcome="left_out")
    settlements = tuple(site.settle(receipt) for site in federation.sites)
    federation.transcript.record("kept", server_round=server_round)
    return RoundOutcome(outcome="kept", state=replace(state, alone=alone), settlements=settlements)


class Uploads:
    """The uploads of a round as they arrive, noted in the transcript by size and digest.

    Attributes:
        failed: sites that sent none, with their code; complete once iterated to the end.
        bytes_up: encrypted bytes so far.
    """

    def __init__(self, transcript: Transcript, plan: RoundPlan, replies: Iterable[Reply]) -> None:
        self._transcript, self._plan, self._replies = transcript, plan, replies
        self.failed: dict[str, str] = {}
        self.bytes_up = 0

    def __iter__(self) -> Iterator[SealedUpdate]:
        for reply in self._replies:
            if reply.body is None:
                self.failed[reply.site] = reply.code or "failed"
                continue
            try:
                upload = decode(reply.body, SealedUpdate)
            except ProtocolError:
                self.failed[reply.site] = "malformed upload"
                continue
            if upload.site != reply.site or upload.plan_digest != self._plan.digest:
                self.failed[reply.site] = "upload of another site or round"
                continue
            self.bytes_up += len(reply.body)
            self._transcript.record(
                "upload", server_round=self._plan.server_round, site=upload.site, bytes=len(reply.body)
            )
            yield upload


def _settle(transport: Transport, plan: RoundPlan, result: RoundOutcome) -> tuple[Settlement, ...]:
    def outcome(site: str) -> str:
        return "lost" if result.outcome == "lost" else "included" if site in result.cohort else "left_out"

    receipts = {
        site: encode(Receipt(plan_digest=plan.digest, server_round=plan.server_round, outcome=outcome(site)))
        for site in transport.sites
    }
    settlements = []
    for reply in transport.ask("settle", receipts):
        try:
            settlements.append(decode(reply.body or b"", Settlement))
        except ProtocolError:  # a site that cannot say what it spent has still spent it, in its own ledger
            continue
    return tuple(settlements)
