"""What a site's administrator decided, asked at every step: the policy, and the log of what it refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime

from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import BudgetExceeded, FedCollmError, LedgerError, PolicyRefused, ProtocolError
from fedcollm_privacy.identity import PublicIdentity
from fedcollm_privacy.messages import RoundPlan
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.refusals import RefusalLog
from fedcollm_privacy.site_policy import DataSetRule, SitePolicy

__all__ = ["SiteGuard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteGuard:
    """A site's policy, applied to one data set and one federation.

    Attributes:
        policy: the site's own file; nothing from the server can widen it.
        rule: what it says of the data set that is trained on.
        server: the pinned server.
        base_model: digest of the model that is trained.
        refusals: where each refusal is written, with the rule that said no.
        clock: Unix time in seconds.
    """

    policy: SitePolicy
    rule: DataSetRule
    server: PublicIdentity
    base_model: str
    refusals: RefusalLog
    clock: Callable[[], float] = field(default=time.time)

    def caps(self, asked: Cap) -> tuple[Cap, ...]:
        """The policy's caps, and the run's own where it asks for less."""
        return tuple(dict.fromkeys((*self.rule.caps, asked)))

    def check_privacy(self, plan: DpPlan | None, run_id: str) -> None:
        """Refuse a run that the policy does not allow, and log it; PolicyRefused."""
        try:
            self.policy.check_privacy(plan, self.rule, self.base_model, self._today)
        except PolicyRefused as refusal:
            self.log(refusal, run_id, None)
            raise

    def check_round(self, plan: RoundPlan) -> None:
        """Refuse a round that the policy does not allow; PolicyRefused, logged by whoever answers the server."""
        self.policy.check_round(plan, self.server, self._today, self.rule)

    def log(self, refusal: FedCollmError, run_id: str, server_round: int | None) -> None:
        """Write down who or what said no, for the site's own eyes."""
        rule = "message"
        if isinstance(refusal, PolicyRefused):
            rule = refusal.rule
        elif isinstance(refusal, BudgetExceeded):
            rule = "data_sets.caps"
        elif isinstance(refusal, LedgerError):
            rule = "ledger"
        elif isinstance(refusal, ProtocolError):
            rule = "protocol"
        self.refusals.record(rule=rule, reason=str(refusal), run_id=run_id, server_round=server_round)

    @property
    def _today(self) -> date:
        return datetime.fromtimestamp(self.clock(), UTC).date()
