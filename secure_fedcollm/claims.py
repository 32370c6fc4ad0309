"""What the sites say of themselves for the run's statement, asked through the transport, and checked before it is used.

A site that does not answer at the end may have spent its data's budget all the same. Whoever left a trace in the run
and said nothing usable is *unstated*: the statement names it and claims nothing for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Final

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import FedCollmError, InvalidValue, ProtocolError
from fedcollm_privacy.messages import canonical_json, parse_json
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.run_messages import ClaimsRequest, SiteClaims
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.assembly import Assembly
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.privacy_config import PrivacyConfig
from secure_fedcollm.transport import Transport

__all__ = ["Claims", "gather", "parse_claims", "traces"]

_TRIES: Final = 3
_RATE: Final = re.compile(r"[1-9][0-9]{0,14}/[1-9][0-9]{0,14}")
_FIELDS: Final = frozenset(
    {"epsilon", "delta", "steps_reserved", "views", "other_units", "gdp_mu", "privacy_profile"}
    | {"plan", "plan_digest", "caps", "policy", "ledger"}
)
_PROFILE: Final = frozenset({"0.1", "0.5", "1", "2", "4", "8", "16"})
# Beyond any plan that can be calibrated; a larger number would only serve to break what shows it.
_MOST: Final = 1e9
# What another machine's arithmetic may make of the same distribution.
_RELATIVE: Final = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What is known at a run's end.

    Attributes:
        stated: for every site that told, what the statement says of it, in the order of the transport's sites.
        unstated: sites that took part and told nothing usable, sorted.
    """

    stated: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unstated: tuple[str, ...] = ()


def gather(parts: Assembly, folder: RunFolder) -> Claims:
    """Ask every site what the statement may say of it; those that took part are asked up to three times.

    Nothing is asked in a run that promises nothing: without differential privacy, seeded for a test, without rounds.

    Raises:
        FedCollmError: no site at all tells. Nothing is written then, and the run can be resumed when sites are back.
    """
    config, transport = parts.config, parts.federation.transport
    if config.privacy is None or not config.guaranteed or config.federation.rounds == 0:
        return Claims()
    spent = _spent(folder.metrics())
    took_part = traces(_events(folder), folder.run_id) | {site for site, epsilon in spent.items() if epsilon > 0}
    stated: dict[str, Mapping[str, Any]] = {}
    missing: Sequence[str] = transport.sites
    for _ in range(_TRIES):
        stated |= _ask(transport, missing, folder.run_id, config.privacy, spent)
        missing = [site for site in transport.sites if site in took_part and site not in stated]
        if not missing:
            break
    if not stated:
        raise FedCollmError(
            "no site says what its ledger was charged, so there is nothing to state. The checkpoint has both models: "
            "resume the run when the sites are back, and statement and adapters are written then"
        )
    in_order = {site: stated[site] for site in transport.sites if site in stated}
    return Claims(stated=in_order, unstated=tuple(sorted(took_part - set(stated))))


def traces(events: Iterable[Mapping[str, Any]], run_id: str) -> frozenset[str]:
    """Sites that the transcript shows in the run: they enrolled, uploaded, are in a sum, or showed their ledger's head.

    >>> sorted(traces([{"event": "upload", "site": "north"}, {"event": "start"}], "run-1"))
    ['north']
    """
    seen: set[str] = set()
    for event in events:
        kind = event["event"]
        if kind == "upload":
            seen.add(event["site"])
        elif kind == "enrolled":
            seen.update(event["sites"])
        elif kind in ("summed", "opened", "lost"):
            seen.update(event["cohort"])
        elif kind == "tree_heads" and event["run_id"] == run_id:
            seen.update(event["heads"])
    return frozenset(seen)


def parse_claims(raw: bytes, privacy: PrivacyConfig, spent: float = 0.0) -> dict[str, Any]:
    """A site's claims, if they have the statement's fields, each possible, and fit the run and each other.

    What only the site knows, its number of units and its ledger, is taken as it says; it signs for it, and an auditor
    compares it.

    Args:
        raw: canonical JSON as `endorsement.site_claims` makes it.
        privacy: the run's.
        spent: the largest epsilon that the site told after a round; it cannot have fallen.

    Raises:
        ProtocolError: anything else. The text repeats nothing of it.
    """
    try:
        claims = parse_json(raw)
        if canonical_json(claims) != raw or not isinstance(claims, dict):
            raise InvalidValue("claims", "another spelling", "an object in canonical JSON")
        _require(claims, privacy, spent)
    except InvalidValue as error:
        raise ProtocolError(f"a site's claims are not those of a site of this run: {error.field}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ProtocolError("a site's claims are not those of a site of this run: a value of the wrong kind") from error
    return claims


def _ask(
    transport: Transport, sites: Iterable[str], run_id: str, privacy: PrivacyConfig, spent: Mapping[str, float]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    request = encode(ClaimsRequest(run_id=run_id))
    for reply in transport.ask("claims", dict.fromkeys(sites, request)):
        try:
            told = decode(reply.body or b"", SiteClaims)
            if (told.site, told.run_id) == (reply.site, run_id):
                yield reply.site, parse_claims(told.claims, privacy, spent.get(reply.site, 0.0))
        except ProtocolError:  # malformed claims are none
            continue


def _spent(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    spent: dict[str, float] = {}
    for row in rows:
        for site, epsilon in row["epsilon"].items():
            spent[site] = max(epsilon, spent.get(site, 0.0))
    return spent


def _events(folder: RunFolder) -> Iterator[Mapping[str, Any]]:
    with (folder.path / "transcript.jsonl").open("rb") as lines:
        for line in lines:
            yield json.loads(line)


def _require(claims: Mapping[str, Any], privacy: PrivacyConfig, spent: float) -> None:
    _exactly("claims", claims, _FIELDS)
    plan = _plan(claims["plan"])
    if canonical_json(plan.as_dict()) != canonical_json(claims["plan"]) or plan.digest != claims["plan_digest"]:
        raise InvalidValue("plan_digest", "another", "the digest of the plan")
    due = {"unit": privacy.unit, "noise": privacy.noise, "delta": privacy.delta, "randomness": "operating_system"}
    for name, value in due.items():
        if getattr(plan, name) != value:
            raise InvalidValue(f"plan.{name}", getattr(plan, name), f"the run's {value}")
    _validate.integer_at_least(0, steps_reserved=claims["steps_reserved"])
    began = claims["steps_reserved"] > 0  # a run that was given up before its first step costs nothing
    _validate.in_range(plan.delta if began else 0, 1, delta=claims["delta"])
    least = plan.epsilon(claims["steps_reserved"]) if began else 0.0
    _validate.in_range(max(least, spent) * (1 - _RELATIVE), _MOST, epsilon=claims["epsilon"])
    _exactly("views", claims["views"], {"one_update_seen", "only_sums_and_models_seen"})
    _validate.in_range(0, _MOST, **claims["views"])
    units = claims["other_units"]
    named = isinstance(units, dict) and all(len(name) < 100 and name.isprintable() for name in units)
    if not named or len(units) > 8:
        raise InvalidValue("other_units", type(units).__name__, "up to 8 names with a number each")
    for value in units.values():
        _validate.in_range(0, _MOST, other_units=value)
    if claims["gdp_mu"] is not None:
        _validate.in_range(0, _MOST, gdp_mu=claims["gdp_mu"])
    _exactly("privacy_profile", claims["privacy_profile"], _PROFILE)
    for value in claims["privacy_profile"].values():
        _validate.in_range(0, 1, privacy_profile=value)
    _ledger(claims)


def _ledger(claims: Mapping[str, Any]) -> None:
    if claims["policy"] != "":  # written before there were policies
        _validate.hex_digest(policy=claims["policy"])
    if not isinstance(claims["caps"], list) or len(claims["caps"]) > 64:
        raise InvalidValue("caps", type(claims["caps"]).__name__, "a list of up to 64")
    for cap in claims["caps"]:
        _exactly("caps", cap, {"epsilon", "delta", "days"})
        _validate.at_least(0, epsilon=cap["epsilon"], delta=cap["delta"])
        if cap["days"] is not None:
            _validate.integer_at_least(1, days=cap["days"])
    state = claims["ledger"]
    _exactly("ledger", state, {"ledger", "head", "tree_size", "tree_root"})
    _validate.hex_digest(ledger=state["ledger"], head=state["head"], tree_root=state["tree_root"])
    _validate.integer_at_least(1, tree_size=state["tree_size"])


def _plan(told: object) -> DpPlan:
    known = {f.name for f in fields(DpPlan)}
    _exactly("plan", told, known)
    values: dict[str, Any] = dict(told) if isinstance(told, dict) else {}
    if not isinstance(values["sample_rate"], str) or not _RATE.fullmatch(values["sample_rate"]):
        raise InvalidValue("plan.sample_rate", type(values["sample_rate"]).__name__, 'a rate like "p/q"')
    return DpPlan(**values | {"sample_rate": Fraction(values["sample_rate"])})


def _exactly(name: str, value: object, names: Iterable[str]) -> None:
    if not isinstance(value, dict) or set(value) != set(names):
        raise InvalidValue(name, type(value).__name__, f"an object with exactly the fields {', '.join(sorted(names))}")
