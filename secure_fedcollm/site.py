"""A site: its records never leave this object; what leaves is an encrypted, differentially private update."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.ckks import PublicContext
from fedcollm_privacy.contributor import Contributor
from fedcollm_privacy.dp_sgd import Observation, require_agreement
from fedcollm_privacy.endorsement import endorse, site_claims
from fedcollm_privacy.entries import open_reservations
from fedcollm_privacy.errors import (
    BudgetExceeded,
    FedCollmError,
    InvalidValue,
    LedgerError,
    PolicyRefused,
    ProtocolError,
    SiteFailed,
)
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.messages import (
    PrivateUpdate,
    QuantizedUpdate,
    Receipt,
    RoundPlan,
    Settlement,
    TrainRequest,
    canonical_json,
    vector_digest,
)
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.quantization import clipped_fraction, on_grid, quantize
from fedcollm_privacy.randomness import SecureRandom
from fedcollm_privacy.ranks import rank_of
from fedcollm_privacy.reservation import Ran
from fedcollm_privacy.run_messages import ClaimsRequest, SiteClaims
from fedcollm_privacy.secure_sum_messages import (
    Advertisement,
    PartRequest,
    PeerKeys,
    PeerShares,
    SignedPlan,
    SurvivorSet,
    UnmaskRequest,
    UploadManifest,
)
from fedcollm_privacy.statement_messages import Endorsement, StatementOffer
from fedcollm_privacy.tree_heads import HeadRequest, SignedHead, WitnessedHead
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.models import AdaptedModel, Aggregation
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.ranks import narrowed, rank_in, widened, with_rank
from secure_fedcollm.site_guard import SiteGuard
from secure_fedcollm.tokenization import TokenDataset
from secure_fedcollm.training import (
    LocalTraining,
    Paid,
    prove_records_independent,
    release_gradient,
    train_non_private,
    train_private,
)

__all__ = ["NonPrivate", "PrivateBudget", "Site"]

_LOG = logging.getLogger("fedcollm")
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateBudget:
    """Under which plan a site trains, and the ledger that pays for it.

    Attributes:
        observable: whether clipping and signal-to-noise may be looked at: the records are nobody's, or public.
        test_seed: makes a run repeatable and not private; the plan says so too.
        persons_known: whether the data says which records are one person's; the statement then says more.
    """

    plan: DpPlan
    ledger: Ledger
    observable: bool = False
    test_seed: int | None = None
    persons_known: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NonPrivate:
    """A site of a declared non-private experiment: no clipping, no noise, no ledger."""

    steps: int
    batch_size: int
    seed: int


class Site:
    """One data holder.

    Args:
        key: its identity; signs ledger heads and the run's statement.
        contributor: its part in the secure sum: pinned roster, demands, journal.
        guard: its administrator's policy, and the log of refusals.
        run_id: the run it takes part in; requests of another run are refused.
        adapted: the model it trains (in one process, sites share the frozen base).
        tokens: its training records.
        aggregation: which tensors it trains and sends.
        run_rank: the rank of the run's adapter, which this site's may be below (`secure_fedcollm.ranks`).
        budget: privacy plan and ledger, or the declaration that there is none.
        how: learning rate and physical batches.
        progress: where a person sees the steps.
    """

    def __init__(
        self,
        *,
        key: SigningKey,
        contributor: Contributor,
        guard: SiteGuard,
        run_id: str,
        adapted: AdaptedModel,
        tokens: TokenDataset,
        aggregation: Aggregation,
        run_rank: int,
        budget: PrivateBudget | NonPrivate,
        how: LocalTraining,
        progress: RunProgress,
    ) -> None:
        self.name = contributor.name
        self._key, self._contributor, self._guard = key, contributor, guard
        self._run_id, self._adapted, self._tokens, self._how = run_id, adapted, tokens, how
        self._spec, self._run_rank = adapted.shared_spec(aggregation), run_rank
        self._rank = rank_in(adapted.spec)
        self._budget, self._progress = budget, progress
        self._open: str | None = None
        self._finished = True  # whether what the open reservation paid for was made
        self._ran: Ran | None = None
        self._take_up()
        self._clipped_fraction = 0.0
        self._answers: dict[str, tuple[type[Any], Callable[[Any], object]]] = {
            "advertise": (SignedPlan, self.advertise),
            "share": (PeerKeys, contributor.share),
            "accept": (PeerShares, contributor.accept_shares),
            "train": (TrainRequest, self.train),
            "part": (PartRequest, contributor.part),
            "agree": (SurvivorSet, contributor.agree),
            "unmask": (UnmaskRequest, contributor.unmask),
            "settle": (Receipt, self.settle),
            "head": (HeadRequest, self.head),
            "witness": (WitnessedHead, self.witness),
            "claims": (ClaimsRequest, self.claims),
            "endorse": (StatementOffer, self.endorse),
        }
        self.observations: list[Observation] = []

    def handle(self, operation: str, body: bytes) -> bytes:
        """Answer one request from the server.

        Raises:
            SiteFailed: with a code and no detail; the detail stays in the site's own log.
        """
        server_round = None
        try:
            if operation not in self._answers:
                raise ProtocolError(f"unknown operation {operation!r:.40}")
            kind, answer = self._answers[operation]
            message = decode(body, kind)
            server_round = getattr(getattr(message, "plan", message), "server_round", None)
            return encode(answer(message))
        except (BudgetExceeded, LedgerError, PolicyRefused, ProtocolError, InvalidValue) as error:
            _LOG.error("site %s declines: %s", self.name, error)
            self._guard.log(error, self._run_id, server_round)
            raise SiteFailed(self.name, "declined") from error
        except FedCollmError as error:
            _LOG.error("site %s: %s", self.name, error)
            raise SiteFailed(self.name, "diverged" if "diverged" in str(error) else "failed") from error
        except (ArithmeticError, MemoryError, OSError, RuntimeError) as error:
            _LOG.exception("site %s", self.name)
            raise SiteFailed(self.name, "failed") from error

    def advertise(self, signed_plan: SignedPlan) -> Advertisement:
        """Take part in a round, if policy, privacy plan and budget allow it; nothing is spent yet.

        Raises:
            ProtocolError: the plan is not the pinned server's, of another run, adapter or roster, expired, replayed,
                weaker than this site allows, or not what its privacy plan promises.
            PolicyRefused: the site's policy says no.
            BudgetExceeded: the ledger would refuse the round's steps; no key material leaves.
        """
        plan = self._contributor.check(signed_plan)
        self._guard.check_round(plan)
        shared = with_rank(self._spec, self._run_rank)
        adapter = (shared.digest, shared.dimension)
        if (rank_of(plan, self.name) or self._run_rank) != self._rank:
            raise ProtocolError(f"the round plan gives this site another rank than {self._rank}, the one it trains")
        if plan.run_id != self._run_id or (plan.spec_digest, plan.dimension) != adapter:
            raise ProtocolError("the round plan is for another run or another adapter")
        if isinstance(self._budget, PrivateBudget):
            require_agreement(self._budget.plan, plan)
            self._budget.ledger.admit(run_id=self._run_id, plan=self._budget.plan)
        elif plan.release != "update" or plan.dp is not None:
            raise ProtocolError("the round has privacy terms or releases gradients; this site has no privacy plan")
        return self._contributor.advertise(signed_plan)

    def train(self, request: TrainRequest) -> UploadManifest:
        """Reserve, train from the broadcast, quantise, encrypt, mask.

        Raises:
            ProtocolError: no such round is under way here, or the key or the adapter is not the plan's.
            PrivacyViolation: the model mixes records.
            BudgetExceeded: the ledger refuses; no gradient was computed.
            FedCollmError: training diverged; the reservation stays spent.
        """
        plan = self._contributor.ready(request.plan_digest)
        context = PublicContext.from_bytes(request.public_key)
        if context.digest != plan.key_digest or context.parameters != plan.ckks:
            raise ProtocolError("the encryption key is not the one in the round plan")
        if vector_digest(request.adapter) != plan.adapter_digest:
            raise ProtocolError("the adapter is not the one in the round plan, which all sites start from")
        whole = with_rank(self._adapted.spec, self._run_rank)
        self._adapted.write(narrowed(request.adapter, whole, self._rank))
        quantized = self._gradient(plan) if plan.release == "gradient" else self._update(plan)
        with self._progress.stage("encrypt", f"{self.name}: encrypt and mask {plan.dimension:,} parameters"):
            manifest = self._contributor.upload(quantized, context)
        self._finished = True
        if isinstance(self._budget, PrivateBudget) and self._open is not None and self._ran is not None:
            self._budget.ledger.file.note_ran(self._open, self._ran)
        return manifest

    def _take_up(self) -> None:
        """What a crash left open: its round may have been summed, and is settled when the server says how it ended."""
        if isinstance(self._budget, PrivateBudget):
            ledger = self._budget.ledger
            for reserved in open_reservations(ledger.entries(), self._run_id):
                self._open, self._ran = reserved["digest"], ledger.file.noted_ran(reserved["digest"])
                self._finished = self._ran is not None

    def _update(self, plan: RoundPlan) -> QuantizedUpdate:
        update = self._train(plan.server_round, plan.attempt)
        self._ran = update.ran
        shared = with_rank(self._spec, self._run_rank)
        vector = widened(update.vector, self._spec, self._run_rank)
        update = replace(update, vector=vector, spec_digest=shared.digest)
        self._clipped_fraction = clipped_fraction(update, plan)
        return quantize(update, plan)

    def _gradient(self, plan: RoundPlan) -> QuantizedUpdate:
        with self._progress.stage("train", f"{self.name}: round {plan.server_round}, gradient"):
            noisy = release_gradient(
                adapted=self._adapted,
                spec=self._spec,
                tokens=self._tokens,
                paid=self._pay(plan.server_round, plan.attempt),
                round_plan=plan,
                how=self._how,
            )
        self._ran = noisy.ran
        return on_grid(noisy, plan)

    def _pay(self, server_round: int, attempt: int) -> Paid:
        """Test the model with the adapter of this round, which the server chose, then reserve the round's steps."""
        if isinstance(self._budget, NonPrivate):
            raise ProtocolError("a site without a privacy plan has nothing to reserve")
        budget = self._budget
        independence = prove_records_independent(self._adapted, self._spec, self._tokens.pad_token_id)
        reservation = budget.ledger.reserve(run_id=self._run_id, plan=budget.plan, server_round=server_round)
        self._open, self._finished, self._ran, self._clipped_fraction = reservation.entry, False, None, 0.0
        self.observations.clear()
        seeded = budget.test_seed is not None
        purpose = f"{self.name} {server_round} {attempt}"
        return Paid(
            plan=budget.plan,
            reservation=reservation,
            independence=independence,
            random=SecureRandom.insecure_for_tests(budget.test_seed or 0, purpose) if seeded else SecureRandom(),
            observe=self.observations.append if budget.observable else None,
        )

    def _train(self, server_round: int, attempt: int = 1) -> PrivateUpdate:
        steps = self._budget.steps if isinstance(self._budget, NonPrivate) else self._budget.plan.steps_per_round
        with self._progress.stage("train", f"{self.name}: round {server_round}, training", steps) as step:
            if isinstance(self._budget, NonPrivate):
                return train_non_private(
                    adapted=self._adapted,
                    spec=self._spec,
                    tokens=self._tokens,
                    steps=steps,
                    batch_size=self._budget.batch_size,
                    seed=self._budget.seed + 1_000_003 * server_round,
                    how=self._how,
                    on_step=step,
                )
            return train_private(
                adapted=self._adapted,
                spec=self._spec,
                tokens=self._tokens,
                paid=self._pay(server_round, attempt),
                how=self._how,
                on_step=step,
            )

    def train_alone(self, adapter: Float32, server_round: int) -> Float32:
        """One round without exchange (the standalone and centralised baselines): the site keeps its adapter.

        Args:
            adapter: where this site stood after its last round, float32 [D].

        Returns:
            Where it stands now, float32 [D].
        """
        self._adapted.write(adapter)
        self._ran = self._train(server_round).ran
        self._finished = True
        self.settle(Receipt(plan_digest="", server_round=server_round, outcome="left_out"))
        return self._adapted.read()

    def settle(self, receipt: Receipt) -> Settlement:
        """End the round here, close its reservation, and tell what the ledger says was spent in this run."""
        self._contributor.forget()
        if isinstance(self._budget, NonPrivate):
            return Settlement(
                site=self.name,
                private=False,
                epsilon=-1.0,
                charged=-1.0,
                delta=0.0,
                unit="none",
                steps=0,
                clipped_fraction=self._clipped_fraction,
            )
        ledger = self._budget.ledger
        if self._open is not None:
            outcome = receipt.outcome if self._finished else "failed"
            ledger.settle(run_id=self._run_id, reservation=self._open, outcome=outcome, ran=self._ran)
            self._open = None
        spent = ledger.spent_in_run(self._run_id)
        private = self._budget.test_seed is None
        return Settlement(
            site=self.name,
            private=private,
            epsilon=self._budget.plan.epsilon(spent.steps) if private else -1.0,
            charged=spent.epsilon if private else -1.0,
            delta=spent.delta,
            unit=self._budget.plan.unit,
            steps=spent.steps,
            clipped_fraction=self._clipped_fraction,
        )

    def head(self, request: HeadRequest) -> SignedHead:
        """The ledger's head, signed, with the proof that it extends what the server has counter-signed.

        Raises:
            ProtocolError: another run's, or this site has no ledger.
            LedgerError: the server has seen more entries than there are.
        """
        return self._ledger(request.run_id).file.show_head(request, self._key)

    def witness(self, head: WitnessedHead) -> WitnessedHead:
        """Keep the head that the server has counter-signed; gives it back.

        Raises:
            ProtocolError: another run's, not signed by both, or this site has no ledger.
            LedgerError: it is not this ledger's.
        """
        self._ledger(head.run_id).file.keep_head(head, self._guard.server)
        return head

    def claims(self, request: ClaimsRequest) -> SiteClaims:
        """What the run's statement may say of this site; ProtocolError if it has no ledger of that run."""
        ledger, budget = self._ledger(request.run_id), self._budget
        if isinstance(budget, NonPrivate):
            raise ProtocolError("a site without a privacy plan has nothing to claim")
        own = site_claims(ledger, budget.plan, self._run_id, persons_known=budget.persons_known)
        return SiteClaims(site=self.name, run_id=self._run_id, claims=canonical_json(own))

    def endorse(self, offer: StatementOffer) -> Endorsement:
        """Sign the run's privacy statement, if it says of this site what the ledger says.

        Raises:
            ProtocolError: it does not.
        """
        budget = self._budget
        plan, ledger = (budget.plan, budget.ledger) if isinstance(budget, PrivateBudget) else (None, None)
        return endorse(offer, key=self._key, run_id=self._run_id, plan=plan, ledger=ledger)

    def _ledger(self, run_id: str) -> Ledger:
        if run_id != self._run_id or isinstance(self._budget, NonPrivate):
            raise ProtocolError("the ledger of another run is asked for, or of a site that has none")
        return self._budget.ledger
