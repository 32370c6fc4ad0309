"""What a site claims of itself, and its signature under the privacy statement: only if that says no less of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from fedcollm_privacy import accounting
from fedcollm_privacy.dsse import sign_payload
from fedcollm_privacy.entries import leaves
from fedcollm_privacy.errors import InvalidValue, LedgerError, ProtocolError
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.messages import canonical_json, parse_json
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.statement_messages import Endorsement, StatementOffer
from fedcollm_privacy.tree import tree_root

__all__ = ["derived_claims", "endorse", "ledger_state", "site_claims"]

_PROFILE = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# What another machine's arithmetic may make of the same distribution; far below what a reader is shown.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-12


def ledger_state(ledger: Ledger) -> dict[str, Any]:
    """What a statement says of a ledger: which one, its last entry, size and root of its tree."""
    known = leaves(ledger.entries())
    return {
        "ledger": ledger.file.ledger,
        "head": ledger.head,
        "tree_size": len(known),
        "tree_root": tree_root(known).hex(),
    }


def derived_claims(plan: DpPlan, steps: int, *, persons_known: bool) -> dict[str, Any]:
    """What follows from a plan and a number of steps for other views, units and forms of the guarantee.

    Args:
        plan: of the site.
        steps: of it, at least those planned.
        persons_known: whether the data says which records are one person's; without, every record may be a person.
    """
    schedule = (plan.schedule(steps),)
    units: dict[str, float] = {}
    if plan.unit == "person":
        bound = accounting.epsilon_of(schedule, plan.delta, relation="replace_one")
        units = {"one record of a person (replace-one of the person)": bound}
    elif persons_known:  # these distributions take seconds
        units = {
            f"a person with {records} records": accounting.epsilon_of(schedule, plan.delta, max_records=records)
            for records in (2, 3)
        }
    try:
        mu = accounting.gdp_mu(schedule)
    except InvalidValue:  # an epsilon in the hundreds: no protection that a mu could describe
        mu = None
    deltas = accounting.privacy_profile(schedule, _PROFILE)
    return {
        "views": {
            "one_update_seen": plan.epsilon_one_update(steps),
            "only_sums_and_models_seen": plan.epsilon_sum_only(steps),
        },
        "other_units": units,
        "gdp_mu": mu,
        "privacy_profile": {f"{point:g}": delta for point, delta in zip(_PROFILE, deltas, strict=True)},
    }


def site_claims(ledger: Ledger, plan: DpPlan, run_id: str, *, persons_known: bool) -> dict[str, Any]:
    """All that the run's statement says of a site, by its own ledger and plan; `endorse` signs no less.

    Args:
        ledger: the site's own.
        plan: under which it trained.
        run_id: the run.
        persons_known: as in `derived_claims`.

    Raises:
        LedgerError: this plan was not committed to the run in this ledger.
    """
    planned, spent = _planned(ledger, plan, run_id), ledger.spent_in_run(run_id)
    return {
        "epsilon": spent.epsilon,
        "delta": spent.delta,
        "steps_reserved": spent.steps,
        **derived_claims(plan, max(spent.steps, plan.steps), persons_known=persons_known),
        "plan": planned["plan"],
        "plan_digest": planned["plan_digest"],
        "caps": planned["caps"],
        "policy": planned["policy"],
        "ledger": ledger_state(ledger),
    }


def _planned(ledger: Ledger, plan: DpPlan, run_id: str) -> Mapping[str, Any]:
    planned = next((e for e in ledger.entries() if e["kind"] == "PLAN" and e["run_id"] == run_id), None)
    if planned is None or planned["plan_digest"] != plan.digest:
        raise LedgerError(f"run {run_id} has not committed this plan; nothing is signed about it")
    return planned


def endorse(
    offer: StatementOffer, *, key: SigningKey, run_id: str, plan: DpPlan | None, ledger: Ledger | None
) -> Endorsement:
    """Check the statement against the site's own ledger and plan, note it there, sign it.

    A statement that is the run's last entry in the ledger was checked then, and is signed again: the server may have
    been cut before it kept the signature.

    Args:
        offer: what the server would publish.
        key: the site's.
        run_id: the run that the site took part in.
        plan: under which it trained; None without differential privacy.
        ledger: its own; None without differential privacy.

    Raises:
        ProtocolError: the statement is malformed, of another run, claims privacy that this site did not apply, says
            less than the ledger was charged or than follows from the plan, or another plan, caps, policy or ledger; or
            it says that this site, which is here, did not answer.
        LedgerError: the ledger cannot be written, or has no such run; nothing is signed.
    """
    predicate = _predicate(offer.payload)
    statement = hashlib.sha256(offer.payload).hexdigest()
    if offer.run_id != run_id or predicate.get("run_id") != run_id:
        raise ProtocolError("the statement is of another run")
    private = plan is not None and ledger is not None and plan.randomness == "operating_system"
    if predicate.get("private") is not private:
        raise ProtocolError(f"the statement says private = {predicate.get('private')!r}; at this site it is {private}")
    if private and plan is not None and ledger is not None and not _is_noted(ledger, run_id, statement):
        said = _of_site(predicate, key.name)
        _require_own(said, predicate.get("unit"), key.name, run_id, plan, ledger)
        ledger.record_statement(run_id=run_id, statement=statement, epsilon=said["epsilon"], delta=said["delta"])
    return Endorsement(site=key.name, statement=statement, signature=sign_payload(key, offer.payload).signature)


def _is_noted(ledger: Ledger, run_id: str, statement: str) -> bool:
    last = [entry for entry in ledger.entries() if entry["run_id"] == run_id][-1:]
    return [(entry["kind"], entry.get("statement")) for entry in last] == [("STATEMENT", statement)]


def _require_own(said: Mapping[str, Any], unit: object, site: str, run_id: str, plan: DpPlan, ledger: Ledger) -> None:
    spent = ledger.spent_in_run(run_id)
    planned = _planned(ledger, plan, run_id)
    own = {
        "unit": plan.unit,
        "plan": plan.as_dict(),
        "plan_digest": plan.digest,
        "steps_reserved": spent.steps,
        "caps": planned["caps"],
        "policy": planned["policy"],
        "ledger": ledger_state(ledger),
    }
    for name, value in own.items():
        # Compared as text: to Python, true is 1.
        if canonical_json(unit if name == "unit" else said.get(name)) != canonical_json(value):
            raise ProtocolError(f"the statement's {name} of site {site} is not what its ledger and plan say")
    for name, charged in (("epsilon", spent.epsilon), ("delta", spent.delta)):
        _require_no_less(said.get(name), charged, name, exact=True)
    derived = derived_claims(plan, max(spent.steps, plan.steps), persons_known=bool(said.get("other_units")))
    for name, value in derived.items():
        _require_no_less(said.get(name), value, name)


def _require_no_less(said: object, own: object, name: str, *, exact: bool = False) -> None:
    """A larger loss may be claimed, a smaller one may not; objects have the same fields, and null stays null."""
    if isinstance(own, dict):
        if not isinstance(said, dict) or set(said) != set(own):
            raise ProtocolError(f"the statement's {name} has not exactly the fields {', '.join(own) or 'of none'}")
        for field_name, value in own.items():
            _require_no_less(said[field_name], value, f"{name} {field_name!r}")
    elif isinstance(own, int | float):
        least = own if exact else own * (1 - _RELATIVE) - _ABSOLUTE
        if isinstance(said, bool) or not isinstance(said, int | float) or not least <= said < math.inf:
            raise ProtocolError(f"the statement's {name} is {said!r}; by this site's ledger and plan it is {own:.6g}")
    elif said is not None:
        raise ProtocolError(f"the statement's {name} is {said!r}; this site finds no bound")


def _predicate(payload: bytes) -> Mapping[str, Any]:
    try:
        statement = parse_json(payload)
        sound = canonical_json(statement) == payload and isinstance(statement["predicate"], dict)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ProtocolError("the statement is no in-toto statement in canonical JSON") from error
    if not sound:
        raise ProtocolError("the statement is no in-toto statement in canonical JSON")
    predicate: Mapping[str, Any] = statement["predicate"]
    return predicate


def _of_site(predicate: Mapping[str, Any], site: str) -> Mapping[str, Any]:
    unstated = predicate.get("unstated", [])
    if not isinstance(unstated, list) or site in unstated:
        raise ProtocolError(f"the statement says that site {site} did not tell what its ledger was charged; it can")
    sites = predicate.get("sites")
    said = sites.get(site) if isinstance(sites, dict) else None
    if not isinstance(said, dict):
        raise ProtocolError(f"the statement says nothing of site {site}")
    return said
