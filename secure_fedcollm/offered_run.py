"""An offered run at the site: whose it is, what its terms are, and how they read to an administrator."""

from __future__ import annotations

from typing import Any

from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.run_messages import RunOffer
from secure_fedcollm.terms import RunTerms, require_offerable

__all__ = ["check_offer", "facts_of", "summary_of"]


def check_offer(offer: RunOffer, roster: Roster, now: float) -> RunTerms:
    """The terms of an offer, if the pinned server signed it for the federation of the pinned roster.

    Args:
        offer: as it came; nothing in it is believed before its signature holds.
        roster: pinned here.
        now: Unix time in seconds.

    Raises:
        SignatureInvalid: another key, or other terms.
        ProtocolError: the terms are malformed, of another run or roster, or the roster has expired.
        InvalidValue: the terms are no terms, or cannot be had by a site on a machine of its own.
    """
    roster.server.verify("run_offer", offer.terms, offer.signature)
    roster.require_valid(now)
    terms = RunTerms.from_bytes(offer.terms)
    if (terms.run_id, terms.server) != (offer.run_id, roster.server.name):
        raise ProtocolError(f"the offer of run {offer.run_id} holds the terms of {terms.run_id} of {terms.server}")
    if terms.roster_digest != roster.digest:
        raise ProtocolError(
            f"the run is of another roster ({terms.roster_digest[:16]}) than the one pinned here "
            f"({roster.digest[:16]}): ask the coordinator which of the two is in force"
        )
    require_offerable(terms)
    return terms


def summary_of(terms: RunTerms) -> str:
    """What a run asks for, in one line."""
    federation, privacy = terms.federation, terms.privacy
    loop = f"{federation.rounds} rounds of {federation.local_steps} steps"
    if privacy is None:
        return f"{loop}, WITHOUT DIFFERENTIAL PRIVACY"
    seeded = ", SEEDED FOR A TEST: NOT PRIVATE" if terms.randomness != "operating_system" else ""
    return f"epsilon {privacy.epsilon:g}, delta {privacy.delta:g} for each {privacy.unit}, {loop}{seeded}"


def facts_of(terms: RunTerms, data_set: str, plan: DpPlan | None) -> dict[str, Any]:
    """The same at length, for the file that an administrator reads before saying yes."""
    federation, privacy = terms.federation, terms.privacy
    facts: dict[str, Any] = {
        "server": terms.server,
        "data_set": data_set,
        "base_model": terms.base_model,
        "rounds": federation.rounds,
        "steps_per_round": federation.local_steps,
        "values_sent_per_round": terms.dimension,
        "fewest_sites_in_a_sum": federation.min_contributors,
        "withstands_colluding_sites": terms.max_colluding,
        "epsilon": None,
        "delta": None,
    }
    if privacy is not None and plan is not None:
        facts |= {
            "epsilon": privacy.epsilon,
            "delta": privacy.delta,
            "unit": privacy.unit,
            "epsilon_charged_here": plan.epsilon(plan.steps),
            "noise_multiplier_here": plan.noise_multiplier,
            "randomness": terms.randomness,
            "cap_asked_for": {"epsilon": privacy.cap_epsilon, "delta": privacy.cap_delta},
        }
    return facts
