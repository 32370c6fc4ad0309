"""What a site's administrator decided, asked at every step: the policy, and the log of what it refused.

The policy's file is read again whenever it is asked. So a policy that was tightened, taken away, left open to others or
that has expired holds from the next round on, and nothing has to be restarted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Self

from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import BudgetExceeded, FedCollmError, LedgerError, PolicyRefused, ProtocolError
from fedcollm_privacy.identity import PublicIdentity
from fedcollm_privacy.messages import RoundPlan
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.policy_file import load_policy
from fedcollm_privacy.refusals import RefusalLog
from fedcollm_privacy.site_policy import DataSetRule, SitePolicy

__all__ = ["SiteGuard", "rule_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteGuard:
    """A site's policy, applied to one data set and one federation.

    Attributes:
        policy: the site's own file as the run began; nothing from the server can widen it.
        path: where the file lies.
        rule: what it said then of the data set that is trained on.
        server: the pinned server.
        base_model: digest of the model that is trained.
        refusals: where each refusal is written, with the rule that said no.
        promised: the privacy plan that was committed to under this policy; None without one.
        clock: Unix time in seconds.
    """

    policy: SitePolicy
    path: Path
    rule: DataSetRule
    server: PublicIdentity
    base_model: str
    refusals: RefusalLog
    promised: DpPlan | None = None
    clock: Callable[[], float] = field(default=time.time)

    @classmethod
    def of(
        cls,
        path: Path,
        site: str,
        *,
        location: str,
        server: PublicIdentity,
        base_model: str,
        refusals: RefusalLog,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """The guard over the policy in a file, for the data set at ``location``.

        Raises:
            PolicyRefused: there is no sound policy of this site, or it does not list the data set.
        """
        policy = load_policy(path, site)
        return cls(
            policy=policy,
            path=path,
            rule=policy.data_set(location),
            server=server,
            base_model=base_model,
            refusals=refusals,
            clock=clock,
        )

    def check_offer(self) -> None:
        """Refuse a run before any record is read, if its server or its model is not listed; PolicyRefused."""
        policy, _ = self._current()
        if self.server not in policy.servers:
            listed = "; ".join(f"{s.name} with key {s.public_key.hex()}" for s in policy.servers)
            raise PolicyRefused("servers", f"{self.server.name} offers a run; listed: {listed}")
        if self.base_model not in policy.base_models:
            listed = ", ".join(policy.base_models)
            raise PolicyRefused("base_models", f"the base model {self.base_model} is asked for; listed: {listed}")

    def caps(self, asked: Cap) -> tuple[Cap, ...]:
        """The policy's caps, and the run's own where it asks for less."""
        return tuple(dict.fromkeys((*self.rule.caps, asked)))

    def check_privacy(self, plan: DpPlan | None) -> None:
        """Refuse a run that the policy, as it is now, does not allow; logged by whoever begins the run.

        Raises:
            PolicyRefused: any rule says no.
        """
        policy, rule = self._current()
        policy.check_privacy(plan, rule, self.base_model, self._today)

    def check_round(self, plan: RoundPlan) -> None:
        """Refuse a round that the policy, as it is now, does not allow; logged by whoever answers the server.

        Raises:
            PolicyRefused: any rule says no to the round or to the run it belongs to, or the data set's account or caps
                are others than those that the run was committed under.
        """
        policy, rule = self._current()
        policy.check_privacy(self.promised, rule, self.base_model, self._today)
        policy.check_round(plan, self.server, self._today, rule)

    def log(self, refusal: FedCollmError, run_id: str, server_round: int | None) -> None:
        """Write down who or what said no, for the site's own eyes."""
        self.refusals.record(rule=rule_of(refusal), reason=str(refusal), run_id=run_id, server_round=server_round)

    def _current(self) -> tuple[SitePolicy, DataSetRule]:
        policy = load_policy(self.path, self.policy.site)
        policy.require_valid(self._today)
        rule = policy.data_set(self.rule.location)
        if rule.name != self.rule.name:
            raise PolicyRefused(
                "data_sets",
                f"the data set is called {rule.name!r:.80} now and was {self.rule.name!r:.80} at the start: under "
                "another name it would have another account",
            )
        if rule.caps != self.rule.caps:
            raise PolicyRefused(
                "data_sets.caps",
                "the caps are not those that the run was committed under; it takes part in no further round. A run "
                "that is begun anew is committed under the new ones",
            )
        return policy, rule

    @property
    def _today(self) -> date:
        return datetime.fromtimestamp(self.clock(), UTC).date()


def rule_of(refusal: FedCollmError) -> str:
    """The policy's field that said no, or a word for what did."""
    if isinstance(refusal, PolicyRefused):
        return refusal.rule
    for kind, word in ((BudgetExceeded, "data_sets.caps"), (LedgerError, "ledger"), (ProtocolError, "protocol")):
        if isinstance(refusal, kind):
            return word
    return "message"
