"""A site on a machine of its own: offered runs come in, policy and administrator decide, a `Site` does the work.

Everything but the signed offer is the site's own: settings, policy, key, roster, records, model. A run that was joined
is kept on disk before anything is charged, and taken up again after a restart at the server's next request.

A new run that is joined takes the old one's place at once. The old one's round is given up; what it reserved stays
spent, and is settled if that run is offered and joined again. Until then a new run changes nothing: one that waits for
approval, or is refused, leaves the old one as it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.refusals import RefusalLog
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.run_messages import RunAnswer, RunOffer
from fedcollm_privacy.secure_sum_messages import SignedPlan
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.data import SiteData, load_site
from secure_fedcollm.models import AdaptedModel, load, use_fitting_threads
from secure_fedcollm.offered_run import check_offer, facts_of, summary_of
from secure_fedcollm.parties import location_of
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.site import Site
from secure_fedcollm.site_assembly import (
    OpenSite,
    SiteSide,
    commit,
    open_site,
    plan_of,
    require_adapter,
    require_same_caps,
    test_seed_of,
    tokens_of,
)
from secure_fedcollm.site_budgets import budgets_of
from secure_fedcollm.site_guard import SiteGuard, rule_of
from secure_fedcollm.site_settings import SiteSettings
from secure_fedcollm.standing import Joined, Standing
from secure_fedcollm.terms import RunTerms

__all__ = ["SiteHost"]

_LOG = logging.getLogger("fedcollm")
_DECLINED = (BudgetExceeded, InvalidValue, LedgerError, PolicyRefused, ProtocolError)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A run whose rules this site accepts; nothing is charged yet."""

    terms: RunTerms
    digest: str
    guard: SiteGuard
    data: SiteData
    plan: DpPlan | None


class SiteHost:
    """Answers the server for one site, over all runs.

    Args:
        settings: ``site.yaml``.
        key: the site's identity.
        roster: pinned, verified by the governance's key.
        state: folder of the site's memory: ledger, journal, refusals, standing.
        progress: where a person sees the steps.
        policy: the policy's file, read again at every round; default is ``policy.yaml`` beside ``state``.
        clock: Unix time in seconds.

    Raises:
        FedCollmError: the key is not the roster's for this site, or the memory cannot be used.
    """

    def __init__(
        self,
        *,
        settings: SiteSettings,
        key: SigningKey,
        roster: Roster,
        state: Path,
        progress: RunProgress,
        policy: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = settings.site
        if key.name != settings.site or roster.site(settings.site) != key.public:
            raise ProtocolError(f"the roster names another key for site {settings.site} than the one at hand")
        self._settings, self._key, self._roster, self._state = settings, key, roster, state
        self._policy, self._progress, self._clock = policy or state.parent / "policy.yaml", progress, clock
        self._standing, self._refusals = Standing(state), RefusalLog(state / "refusals.jsonl")
        self._lock = threading.RLock()
        self._open: tuple[str, OpenSite] | None = None  # digest of the terms, and the site
        self._run: _Run | None = None
        self._model: tuple[tuple[object, ...], AdaptedModel] | None = None
        self._server_round: int | None = None
        self._operation, self._run_id, self._requests = "", "", 0
        self._shown: tuple[int, int, list[dict[str, Any]]] = (-1, 0, [])
        self._standing.joined()  # a damaged file is said now and not in the middle of a run

    def handle(self, operation: str, body: bytes) -> bytes:
        """Answer one request of the server; one after the other.

        Raises:
            SiteFailed: with a code and no detail; the detail stays in the site's own log and refusals.
        """
        with self._lock:
            self._operation = operation[:40]
            try:
                if operation == "offer":
                    return encode(self._offer(body))
                site = self._for_round(body) if operation == "advertise" else self._taken_up()
                return site.handle(operation, body)
            except SiteFailed:
                raise
            except (FedCollmError, ArithmeticError, MemoryError, OSError, RuntimeError, ValueError) as error:
                raise self._failure(error) from error
            finally:
                self._requests += 1

    def status(self) -> dict[str, Any]:
        """What the site's own status page shows, by name of `OwnStatus`; it does not wait for a request under way."""
        stopped = self._standing.stopped
        told: dict[str, Any] = {
            "run": "",
            "standing": stopped or "idle",
            "server_round": self._server_round,
            "operation": self._operation,
            "refusals": 0,
            "paused": stopped is not None,
            "budgets": [],
            "trouble": "",
        }
        try:
            joined, offers = self._standing.joined(), self._standing.offers()
            if joined is not None:
                standing = "declined" if self._standing.declined(joined.digest) else "joined"
                told |= {"run": joined.run_id, "standing": stopped or standing}
            elif stopped is None and any(offer.standing == "waiting" for offer in offers):
                told["standing"] = "waiting"
            if self._shown[0] != self._requests:
                requests, refusals = self._requests, len(self._refusals.entries())
                budgets = budgets_of(self._policy, self.name, self._state / "ledger.sqlite", self._clock())
                self._shown = (requests, refusals, budgets)
            told |= {"refusals": self._shown[1], "budgets": self._shown[2]}
        except (FedCollmError, OSError) as error:
            told["trouble"] = str(error)
        return told

    def close(self) -> None:
        """Give up the round that is under way; what it reserved stays spent, and is settled when the run goes on."""
        with self._lock:
            self._give_up()

    def _offer(self, body: bytes) -> RunAnswer:
        offer = decode(body, RunOffer)
        self._run_id = offer.run_id
        terms = check_offer(offer, self._roster, self._clock())
        asked = Joined(run_id=terms.run_id, terms=offer.terms, signature=offer.signature)
        self._require_willing(asked.digest)
        before, standing = self._standing.joined(), "joined"
        if before is not None and before.digest == asked.digest:
            self._taken_up()
        else:
            run = self._accepted(terms, asked.digest)
            summary = summary_of(terms)
            facts = facts_of(terms, run.guard.rule.name, run.plan)
            new = self._standing.remember(asked.digest, run_id=terms.run_id, summary=summary, facts=facts)
            if self._settings.approval == "auto" or self._standing.approved(asked.digest):
                self._join(run, asked, before)
            else:
                standing = "waiting"
                said = "run %s waits for your approval (%s): fedcollm site approve %s"
                _LOG.log(logging.WARNING if new else logging.DEBUG, said, terms.run_id, summary, asked.digest[:16])
        return RunAnswer(site=self.name, run_id=terms.run_id, terms_digest=asked.digest, standing=standing)

    def _join(self, run: _Run, asked: Joined, before: Joined | None) -> None:
        adapted = self._loaded(run.terms)
        # On disk before anything is charged: after a crash in between, this site still knows what it has begun.
        self._standing.join(asked)
        opened = None
        try:
            opened = self._opened(run, adapted)
        finally:
            if opened is None and before is None:
                self._standing.unjoin()
            elif opened is None and before is not None:
                self._standing.join(before)
        self._give_up()
        self._open, self._server_round = (asked.digest, opened), None
        _LOG.info("site %s takes part in run %s", self.name, run.terms.run_id)

    def _for_round(self, body: bytes) -> Site:
        joined = self._standing.joined()
        if joined is not None:
            self._run_id = joined.run_id
            self._require_willing(joined.digest)
        site = self._taken_up()
        self._server_round = decode(body, SignedPlan).plan.server_round
        return site

    def _require_willing(self, digest: str) -> None:
        stopped = self._standing.stopped
        if stopped is not None:
            raise PolicyRefused(stopped, "the administrator wants this site to take part in nothing")
        if self._standing.declined(digest):
            raise PolicyRefused("declined", "the administrator declined this run; `fedcollm site approve` allows it")

    def _taken_up(self) -> Site:
        """The site of the run that was joined, opened again after a restart."""
        joined = self._standing.joined()
        if joined is None:
            raise ProtocolError("this site takes part in no run")
        self._run_id = joined.run_id
        if self._open is None or self._open[0] != joined.digest:
            offer = RunOffer(run_id=joined.run_id, terms=joined.terms, signature=joined.signature)
            terms = check_offer(offer, self._roster, self._clock())
            opened = self._opened(self._accepted(terms, joined.digest), self._loaded(terms))
            self._give_up()
            self._open = (joined.digest, opened)
            _LOG.info("site %s takes run %s up again", self.name, terms.run_id)
        return self._open[1].site

    def _accepted(self, terms: RunTerms, digest: str) -> _Run:
        """Ask the policy, what needs no records first; each time anew, because it may have changed."""
        settings = self._settings
        guard = SiteGuard.of(
            self._policy,
            self.name,
            location=location_of(settings.data.path),
            server=self._roster.server,
            base_model=terms.base_model,
            refusals=self._refusals,
            clock=self._clock,
        )
        guard.check_offer()
        test_seed_of(terms, settings.insecure_test_seed)
        if self._run is not None and self._run.digest == digest:
            data, plan = self._run.data, self._run.plan
        else:
            unit = "record" if terms.privacy is None else terms.privacy.unit
            with self._progress.stage("load", f"{self.name}: read the records"):
                data = load_site(settings.data.config(terms.max_length), site=self.name, seed=terms.seed, unit=unit)
            plan = plan_of(terms, len({record.unit for record in data.train}))
        guard.check_privacy(plan)
        self._run = _Run(terms=terms, digest=digest, guard=guard, data=data, plan=plan)
        return self._run

    def _loaded(self, terms: RunTerms) -> AdaptedModel:
        """The model with the run's adapter; the one at hand if it is the same."""
        wanted, rank = (terms.dtype, terms.adapter), terms.adapter.rank_of(self.name)
        if self._model is None or self._model[0] != wanted:
            self._model = None  # before the next one takes its memory
            with self._progress.stage("load", f"{self.name}: load {self._settings.model}"):
                adapted = load(
                    self._settings.model,
                    dtype=terms.dtype,
                    device=self._settings.device,
                    r=rank,
                    lora_alpha=terms.adapter.lora_alpha * rank / terms.adapter.r,
                    lora_dropout=terms.adapter.lora_dropout,
                    target_modules=terms.adapter.target_modules,
                    seed=terms.seed,
                    activation_checkpointing=self._settings.activation_checkpointing,
                )
            use_fitting_threads(adapted, adapted)
            self._model = (wanted, adapted)
        require_adapter(terms, self._model[1], self.name)
        return self._model[1]

    def _opened(self, run: _Run, adapted: AdaptedModel) -> OpenSite:
        ledger = None
        with self._progress.stage("load", f"{self.name}: tokenise, commit the plan"):
            tokens = tokens_of(run.terms, run.data.train, adapted)
            if run.plan is not None:
                ledger = Ledger(self._state / "ledger.sqlite", self._key, self._clock)
                require_same_caps(run.terms, run.guard, ledger)
                commit(run.terms, run.guard, ledger, run.plan)
            side = SiteSide(
                key=self._key,
                roster=self._roster,
                guard=run.guard,
                journal=self._state / "rounds.sqlite",
                observable=self._settings.data.declared != "private",
                test_seed=self._settings.insecure_test_seed,
                persons_known=self._settings.data.unit_field is not None,
                progress=self._progress,
            )
            return open_site(run.terms, side, adapted=adapted, tokens=tokens, plan=run.plan, ledger=ledger)

    def _give_up(self) -> None:
        if self._open is not None:
            self._open[1].contributor.forget()
            self._open = None

    def _failure(self, error: Exception) -> SiteFailed:
        """The code that the server gets; everything else stays here."""
        if not isinstance(error, FedCollmError):
            _LOG.error("site %s fails", self.name, exc_info=error)
            return SiteFailed(self.name, "failed")
        declined = isinstance(error, _DECLINED)
        _LOG.error("site %s %s: %s", self.name, "declines" if declined else "fails", error)
        if declined:
            reason, rule = str(error), rule_of(error)
            try:
                self._refusals.record(rule=rule, reason=reason, run_id=self._run_id, server_round=None)
            except LedgerError as unwritten:
                _LOG.error("site %s: %s", self.name, unwritten)
        return SiteFailed(self.name, "declined" if declined else "failed")
