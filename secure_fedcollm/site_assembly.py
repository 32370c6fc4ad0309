"""From a run's terms and a site's own side to a `Site`; the same for all roles in one process tree and for a machine.

In this order: tokenise, calibrate the privacy plan, ask the policy, commit the plan to the ledger, open the site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedcollm_privacy.contributor import Contributor, SumPolicy
from fedcollm_privacy.entries import Cap, caps_of
from fedcollm_privacy.errors import ConfigError, PolicyRefused, ProtocolError
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.plan import DpPlan, calibrate
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.round_journal import RoundJournal
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.ranks import rank_in, with_rank
from secure_fedcollm.records import Record
from secure_fedcollm.site import NonPrivate, PrivateBudget, Site
from secure_fedcollm.site_guard import SiteGuard
from secure_fedcollm.terms import RunTerms
from secure_fedcollm.tokenization import TokenDataset, tokenize
from secure_fedcollm.training import LocalTraining

__all__ = [
    "OpenSite",
    "SiteSide",
    "commit",
    "open_site",
    "plan_of",
    "require_adapter",
    "require_same_caps",
    "test_seed_of",
    "tokens_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSide:
    """What a site brings to a run, and no server decides.

    Attributes:
        key: its identity.
        roster: pinned.
        guard: its policy for this data set.
        journal: file of its memory of rounds.
        observable: whether clipping and signal-to-noise may be looked at.
        test_seed: of a run that says that it is seeded; any other run ignores it.
        persons_known: whether the records say whose they are; the statement then says more.
        progress: where a person sees the steps.
    """

    key: SigningKey
    roster: Roster
    guard: SiteGuard
    journal: Path
    observable: bool
    test_seed: int | None
    persons_known: bool
    progress: RunProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSite:
    """A site that takes part in a run, and its part in the secure sum, which can be told to give a round up."""

    site: Site
    contributor: Contributor


def tokens_of(terms: RunTerms, records: Sequence[Record], adapted: AdaptedModel) -> TokenDataset:
    """A site's training records as the run wants them."""
    return tokenize(records, adapted.tokenizer, max_length=terms.max_length, append_eos=terms.append_eos)


def plan_of(terms: RunTerms, units: int) -> DpPlan | None:
    """A site's privacy plan for a run; None in a run without DP or rounds.

    Args:
        terms: of the run.
        units: number of units that the site trains on; enters as its nominal size only.

    Raises:
        InvalidValue: the budget cannot be met with so many units.
    """
    privacy, federation = terms.privacy, terms.federation
    if privacy is None or federation.rounds == 0:
        return None
    return calibrate(
        target_epsilon=privacy.epsilon,
        delta=privacy.delta,
        unit=privacy.unit,
        max_records_per_unit=privacy.max_records_per_unit,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=privacy.expected_batch_size,
        steps_per_round=federation.local_steps,
        rounds=federation.rounds,
        units=units,
        clipping=privacy.clipping,
        noise=privacy.noise,
        least_honest=privacy.least_honest,
        release=federation.release,
        randomness=terms.randomness,
    )


def require_adapter(terms: RunTerms, adapted: AdaptedModel, site: str) -> None:
    """Return if the model here is the run's, with the run's adapter of this site's rank on it.

    Raises:
        ProtocolError: it is another one.
    """
    if adapted.spec.base_model != terms.base_model:
        raise ProtocolError(
            f"the run trains the model {terms.base_model}; {adapted.name} is {adapted.spec.base_model}: ask for the "
            "folder or the revision that the run uses"
        )
    spec = with_rank(adapted.shared_spec(terms.adapter.aggregation), terms.adapter.r)
    if (spec.digest, spec.dimension) != (terms.spec_digest, terms.dimension):
        raise ProtocolError(
            f"the run's adapter has {terms.dimension} values and the digest {terms.spec_digest}; here they give "
            f"{spec.dimension} and {spec.digest}: both sides need the same versions of this program and its libraries"
        )
    if rank_in(adapted.spec) != terms.adapter.rank_of(site):
        raise ProtocolError(
            f"the run gives site {site} the rank {terms.adapter.rank_of(site)}; here it is {rank_in(adapted.spec)}"
        )


def require_same_caps(terms: RunTerms, guard: SiteGuard, ledger: Ledger) -> None:
    """Return if the run is new here, or its plan was committed under the caps that hold today.

    Raises:
        PolicyRefused: the caps were changed since; a run that is begun anew is committed under the new ones.
    """
    if terms.privacy is None:
        return
    for entry in ledger.entries():
        if entry["kind"] == "PLAN" and entry["run_id"] == terms.run_id:
            if set(caps_of(entry)) != set(guard.caps(_asked(terms))):
                raise PolicyRefused(
                    "data_sets.caps",
                    f"the caps are not those that run {terms.run_id} was committed under; it does not go on. A run "
                    "that is begun anew is committed under the new ones",
                )
            return


def commit(terms: RunTerms, guard: SiteGuard, ledger: Ledger, plan: DpPlan) -> None:
    """Charge the run's plan to the data set; a run that goes on finds its plan there and is charged nothing again.

    Raises:
        BudgetExceeded: a cap would be crossed; nothing is written.
        LedgerError: the run has another plan here, or was given up.
    """
    ledger.commit_plan(
        run_id=terms.run_id,
        data_set=guard.rule.name,
        plan=plan,
        caps=guard.caps(_asked(terms)),
        policy=guard.policy.digest,
    )


def open_site(
    terms: RunTerms,
    side: SiteSide,
    *,
    adapted: AdaptedModel,
    tokens: TokenDataset,
    plan: DpPlan | None,
    ledger: Ledger | None,
) -> OpenSite:
    """The site, ready for the run's rounds.

    Args:
        terms: of the run.
        side: the site's own.
        adapted: the model with the run's adapter.
        tokens: its training records.
        plan: committed to ``ledger``; None without DP or rounds.
        ledger: of the site; None without a plan.

    Raises:
        ConfigError: the run is seeded, and the site has no seed.
        ProtocolError: another model or adapter, or the roster names another key.
        LedgerError: the journal cannot be used.
    """
    require_adapter(terms, adapted, side.key.name)
    federation, demands = terms.federation, side.guard.policy.opening
    budget: PrivateBudget | NonPrivate = NonPrivate(
        steps=federation.local_steps,
        batch_size=federation.batch_size,
        seed=_seed_of(terms.seed, side.key.name),
    )
    if plan is not None and ledger is not None:
        budget = PrivateBudget(
            plan=plan,
            ledger=ledger,
            observable=side.observable,
            test_seed=test_seed_of(terms, side.test_seed),
            persons_known=side.persons_known,
        )
    contributor = Contributor(
        key=side.key,
        roster=side.roster,
        policy=SumPolicy(  # the stricter of policy and terms holds
            min_contributors=max(federation.min_contributors, demands.min_contributors, terms.max_colluding + 2),
            max_colluding=max(terms.max_colluding, demands.max_colluding),
        ),
        journal=RoundJournal(side.journal),
    )
    site = Site(
        key=side.key,
        contributor=contributor,
        guard=replace(side.guard, promised=plan),
        run_id=terms.run_id,
        adapted=adapted,
        tokens=tokens,
        aggregation=terms.adapter.aggregation,
        run_rank=terms.adapter.r,
        budget=budget,
        how=LocalTraining(learning_rate=federation.learning_rate, batch_tokens=federation.batch_tokens),
        progress=side.progress,
    )
    return OpenSite(site=site, contributor=contributor)


def _asked(terms: RunTerms) -> Cap:
    if terms.privacy is None:
        raise ProtocolError("a run without differential privacy has no caps and commits to no plan")
    return Cap(epsilon=terms.privacy.cap_epsilon, delta=terms.privacy.cap_delta)


def test_seed_of(terms: RunTerms, own: int | None) -> int | None:
    """What seeds sampling and noise: nothing, unless the run says so of itself.

    Raises:
        ConfigError: it does, and the site has no seed.
    """
    if terms.randomness == "operating_system":
        return None
    if own is None:
        raise ConfigError("insecure_test_seed", None, "a number, because this run is a test that says it is seeded")
    return own


def _seed_of(seed: int, site: str) -> int:
    return int(np.random.SeedSequence([seed, *site.encode()]).generate_state(1)[0])
