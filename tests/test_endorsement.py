"""A site signs only a statement that says of it what its own ledger and plan say, or more."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import dp_accounting
import jcs
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from dp_accounting.pld import PLDAccountant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcollm_privacy import accounting
from fedcollm_privacy.dsse import verify_payload
from fedcollm_privacy.endorsement import derived_claims, endorse, ledger_state
from fedcollm_privacy.entries import leaves, verify_chain
from fedcollm_privacy.errors import FedCollmError, InvalidValue, LedgerError, ProtocolError
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.statement_messages import Endorsement, StatementOffer
from fedcollm_privacy.tree import tree_root

from .ledgers import PLAN, commit, filled, key_of, kinds, ledger_at, path_in, reserve, settle, upto

NORTH = key_of("north")
PERSON = dataclasses.replace(PLAN, unit="person", max_records_per_unit=3)


def ran(folder: Path, plan: DpPlan = PLAN) -> Ledger:
    """The ledger of a site after a run with one broken attempt: more steps than planned."""
    ledger = ledger_at(folder)
    commit(ledger, "run-1", plan, caps=upto(9.0) + upto(8.0, days=30), policy="ab" * 32)
    for number in (1, 2, 3, 3):
        settle(ledger, "run-1", reserve(ledger, "run-1", number, plan))
    return ledger


def of_site(ledger: Ledger, plan: DpPlan = PLAN) -> dict[str, Any]:
    """What docs/formats.md says that a statement says of a site."""
    steps = 8
    known = leaves(ledger.entries())
    return {
        "epsilon": plan.epsilon(steps),
        "delta": 1e-5,
        "steps_reserved": steps,
        "plan": plan.as_dict(),
        "plan_digest": hashlib.sha256(jcs.canonicalize(plan.as_dict())).hexdigest(),
        "caps": [
            {"epsilon": 9.0, "delta": 1e-3, "days": None},
            {"epsilon": 8.0, "delta": 1e-3, "days": 30},
        ],
        "policy": "ab" * 32,
        "ledger": {
            "ledger": ledger.file.ledger,
            "head": ledger.entries()[-1]["digest"],
            "tree_size": 9,
            "tree_root": tree_root(known).hex(),
        },
        **derived_claims(plan, steps, persons_known=False),
    }


def statement(ledger: Ledger, plan: DpPlan = PLAN, **changes: Any) -> dict[str, Any]:
    predicate = {"run_id": "run-1", "private": True, "unit": plan.unit, "sites": {"north": of_site(ledger, plan)}}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "config.yaml", "digest": {"sha256": "0" * 64}}],
        "predicateType": "urn:secure-fedcollm:privacy-statement:1",
        "predicate": predicate | changes,
    }


def asked(ledger: Ledger | None, payload: bytes, plan: DpPlan | None = PLAN, run_id: str = "run-1") -> Endorsement:
    offer = StatementOffer(run_id=run_id, payload=payload)
    return endorse(offer, key=NORTH, run_id="run-1", plan=plan, ledger=ledger)


def spelled(value: Any) -> bytes:
    payload: bytes = jcs.canonicalize(value)
    return payload


# ---------------------------------------------------------------- what is signed


def test_a_true_statement_is_signed_and_noted_in_the_ledger(tmp_path: Path) -> None:
    ledger = ran(tmp_path)
    payload = spelled(statement(ledger))
    endorsement = asked(ledger, payload)
    assert endorsement.site == "north"
    assert endorsement.statement == hashlib.sha256(payload).hexdigest()
    verify_payload(NORTH.public, payload, endorsement.signature)
    # The same with nothing of ours: DSSE's pre-authentication encoding.
    pae = b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload)
    Ed25519PublicKey.from_public_bytes(NORTH.public.public_key).verify(endorsement.signature, pae)
    entry = ledger.entries()[-1]
    assert (entry["kind"], entry["run_id"], entry["statement"]) == ("STATEMENT", "run-1", endorsement.statement)
    assert (entry["epsilon"], entry["delta"]) == (PLAN.epsilon(8), 1e-5)
    assert verify_chain(ledger.entries(), NORTH.public) == []


@pytest.mark.parametrize("persons", [False, True])
def test_derived_claims_are_those_of_the_accountant(persons: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if persons:  # distributions that take seconds, and are tested where they are computed
        monkeypatch.setattr(accounting, "epsilon_of", lambda _, delta, max_records: 10.0 * max_records + delta)
    claims = derived_claims(PLAN, 8, persons_known=persons)
    step = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(2.0))
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3).compose(step, 8)
    epsilon = accountant.get_epsilon(1e-5)
    assert claims["views"] == {"one_update_seen": epsilon, "only_sums_and_models_seen": epsilon}
    assert claims["privacy_profile"] == pytest.approx(
        {point: accountant.get_delta(float(point)) for point in ("0.1", "0.5", "1", "2", "4", "8", "16")}, abs=1e-14
    )
    assert claims["gdp_mu"] == accounting.gdp_mu((PLAN.schedule(8),))
    expected = {"a person with 2 records": 20.00001, "a person with 3 records": 30.00001} if persons else {}
    assert claims["other_units"] == expected


def test_of_a_person_the_record_is_the_other_unit_and_no_mu_is_told_where_there_is_none() -> None:
    claims = derived_claims(PERSON, 8, persons_known=False)
    (value,) = claims["other_units"].values()
    assert value == accounting.epsilon_of((PERSON.schedule(8),), 1e-5, relation="replace_one") > PERSON.epsilon(8)
    loud = dataclasses.replace(PLAN, noise_multiplier=0.2, sample_rate=PLAN.sample_rate * 10)
    assert derived_claims(loud, 40, persons_known=False)["gdp_mu"] is None


def test_distributed_noise_has_two_views() -> None:
    plan = dataclasses.replace(PLAN, noise="distributed", release="gradient", steps_per_round=1, least_honest=4)
    views = derived_claims(plan, 3, persons_known=False)["views"]
    assert views["one_update_seen"] > views["only_sums_and_models_seen"] == plan.epsilon(3)


def test_the_state_of_a_ledger_is_that_of_its_tree(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    assert ledger_state(ledger) == {
        "ledger": ledger.file.ledger,
        "head": ledger.head,
        "tree_size": 6,
        "tree_root": tree_root([bytes.fromhex(entry["digest"]) for entry in ledger.entries()]).hex(),
    }


# ---------------------------------------------------------------- what is not


@pytest.fixture(scope="module")
def north(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, dict[str, Any]]:
    ledger = ran(tmp_path_factory.mktemp("north"))
    return ledger, statement(ledger)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested JSON, containers too, the whole itself not."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for name, part in items for place in ((*path, name), *places(part, (*path, name)))]


LOSSES = ("epsilon", "delta", "views", "gdp_mu", "privacy_profile", "other_units")
"""Where a site may be said to have lost more than it did."""


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 9999), change=st.integers(0, 9), by=st.floats(1e-4, 0.9))
def test_no_altered_field_of_a_sites_section_is_signed_except_a_larger_loss(
    north: tuple[Ledger, dict[str, Any]], place: int, change: int, by: float
) -> None:
    ledger, whole = north
    altered = copy.deepcopy(whole)
    section = altered["predicate"]["sites"]["north"]
    everywhere = places(section)
    path = everywhere[place % len(everywhere)]
    holder: Any = section
    for step in path[:-1]:
        holder = holder[step]
    old = holder[path[-1]]
    if change == 0:
        del holder[path[-1]]
    elif change == 1:
        holder[path[-1]] = None if old is not None else 1
    elif change == 2:
        holder[path[-1]] = str(old) + "x"
    elif change == 3:
        holder[path[-1]] = [] if old != [] else {}
    elif change == 4 and isinstance(old, dict):
        holder[path[-1]] = {**old, "more": 1}
    elif isinstance(old, int | float):
        holder[path[-1]] = old * (1 - by) - 1e-6
        if change > 7 and path[0] not in LOSSES:
            holder[path[-1]] = old * (1 + by) + 1
        if change == 7:
            holder[path[-1]] = old != 1
    elif isinstance(old, str):
        holder[path[-1]] = old[:-1]
    else:
        del holder[path[-1]]
    before = ledger.entries()
    with pytest.raises(ProtocolError, match=r"of site north|statement's"):
        asked(ledger, spelled(altered))
    assert ledger.entries() == before, "nothing is noted either"


def test_every_field_that_a_statement_has_of_a_site_is_compared(north: tuple[Ledger, dict[str, Any]]) -> None:
    ledger, whole = north
    for name in whole["predicate"]["sites"]["north"]:
        altered = copy.deepcopy(whole)
        del altered["predicate"]["sites"]["north"][name]
        with pytest.raises(ProtocolError, match=name):
            asked(ledger, spelled(altered))


def test_true_is_not_one_and_no_field_is_added(north: tuple[Ledger, dict[str, Any]]) -> None:
    ledger, whole = north
    changes: tuple[tuple[str, str, Any], ...] = (
        ("plan", "max_records_per_unit", True),
        ("plan", "least_honest", True),
        ("plan", "more", 1),
        ("ledger", "more", 1),
        ("views", "nobody_looks", 0.0),
        ("privacy_profile", "32", 0.0),
        ("views", "one_update_seen", True),
    )
    for name, field, value in changes:
        altered = copy.deepcopy(whole)
        altered["predicate"]["sites"]["north"][name][field] = value
        with pytest.raises(ProtocolError, match=name):
            asked(ledger, spelled(altered))


@pytest.mark.parametrize("name", LOSSES)
def test_a_larger_loss_may_be_claimed(tmp_path: Path, name: str) -> None:
    plan = PERSON if name == "other_units" else PLAN
    ledger = ran(tmp_path, plan)
    whole = statement(ledger, plan)
    section = whole["predicate"]["sites"]["north"]
    if isinstance(section[name], dict):
        section[name] = {key: 1.5 * value + 1e-7 for key, value in section[name].items()}
    else:
        section[name] *= 1.5
    asked(ledger, spelled(whole), plan)
    entry = ledger.entries()[-1]
    assert (entry["epsilon"], entry["delta"]) == (section["epsilon"], section["delta"])
    assert ledger.spent_in_run("run-1").epsilon == plan.epsilon(8), "what is claimed is no charge"


def test_not_a_hair_less_than_the_charge_is_signed(tmp_path: Path) -> None:
    ledger = ran(tmp_path)
    for name in ("epsilon", "delta"):
        whole = statement(ledger)
        whole["predicate"]["sites"]["north"][name] *= 1 - 1e-15
        with pytest.raises(ProtocolError, match=name):
            asked(ledger, spelled(whole))
    # Of derived numbers, another machine's last digits are let pass, and no more.
    whole = statement(ledger)
    whole["predicate"]["sites"]["north"]["gdp_mu"] *= 1 - 1e-5
    with pytest.raises(ProtocolError, match="gdp_mu"):
        asked(ledger, spelled(whole))
    whole = statement(ledger)
    whole["predicate"]["sites"]["north"]["gdp_mu"] *= 1 - 1e-9
    asked(ledger, spelled(whole))


def test_the_record_of_a_person_is_compared_too(tmp_path: Path) -> None:
    ledger = ran(tmp_path, PERSON)
    for change in ({}, {"a record": 99.0}):
        whole = statement(ledger, PERSON)
        whole["predicate"]["sites"]["north"]["other_units"] = change
        with pytest.raises(ProtocolError, match="other_units"):
            asked(ledger, spelled(whole), PERSON)
    whole = statement(ledger, PERSON)
    section = whole["predicate"]["sites"]["north"]["other_units"]
    for name in section:
        section[name] *= 0.9
    with pytest.raises(ProtocolError, match="other_units"):
        asked(ledger, spelled(whole), PERSON)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run_id": "run-2"}, "another run"),
        ({"run_id": None}, "another run"),
        ({"private": False}, "private = False; at this site it is True"),
        ({"private": 1}, "private = 1"),
        ({"private": None}, "private = None"),
        ({"unit": "person"}, "unit"),
        ({"unit": None}, "unit"),
        ({"sites": {}}, "nothing of site north"),
        ({"sites": {"south": {}}}, "nothing of site north"),
        ({"sites": {"north": []}}, "nothing of site north"),
        ({"sites": ["north"]}, "nothing of site north"),
        ({"sites": None}, "nothing of site north"),
    ],
)
def test_a_statement_of_something_else_is_not_signed(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    ledger = ran(tmp_path)
    before = ledger.entries()
    with pytest.raises(ProtocolError, match=words):
        asked(ledger, spelled(statement(ledger, **changes)))
    assert ledger.entries() == before


def test_an_offer_that_names_another_run_than_its_statement_is_refused(tmp_path: Path) -> None:
    ledger = ran(tmp_path)
    with pytest.raises(ProtocolError, match="another run"):
        asked(ledger, spelled(statement(ledger)), run_id="run-2")


def test_what_a_statement_says_of_other_sites_is_theirs_to_judge(tmp_path: Path) -> None:
    ledger = ran(tmp_path)
    sites = {"north": of_site(ledger), "south": {"epsilon": 0.0}}
    asked(ledger, spelled(statement(ledger, sites=sites)))


MALFORMED = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b"\xff",
    "a number": b"5",
    "a list": b"[]",
    "no predicate": b"{}",
    "a predicate that is no object": b'{"predicate":[]}',
    "a nest without end": b"[" * 100_000,
    "NaN": b'{"predicate":{"x":NaN}}',
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_payload_that_is_no_statement_is_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(ProtocolError, match="canonical JSON"):
        asked(ledger_at(tmp_path), MALFORMED[what])


def test_another_spelling_of_a_true_statement_is_refused(tmp_path: Path) -> None:
    ledger = ran(tmp_path)
    whole = statement(ledger)
    payload = spelled(whole)
    assert b'"delta":0.00001' in payload
    for other in (
        json.dumps(whole).encode(),
        json.dumps(whole, sort_keys=True, separators=(",", ":")).encode(),
        payload + b"\n",
        payload.replace(b'"private":true', b'"private":false,"private":true'),
        payload.replace(b'"delta":0.00001', b'"delta":1e-5'),
    ):
        assert other != payload
        with pytest.raises(ProtocolError, match="canonical JSON"):
            asked(ledger, other)
    asked(ledger, payload)


# ---------------------------------------------------------------- with and without privacy


def test_a_site_without_privacy_signs_only_that_there_is_none(tmp_path: Path) -> None:
    ledger = ran(tmp_path)
    seeded = dataclasses.replace(PLAN, randomness="insecure_test_seed")
    honest = {"predicate": {"run_id": "run-1", "private": False, "claim": "none"}}
    before = ledger.entries()
    cases: tuple[tuple[DpPlan | None, Ledger | None], ...] = ((None, None), (seeded, ledger), (PLAN, None))
    for plan, own in cases:
        for said in (True, None, 0, "no"):
            with pytest.raises(ProtocolError, match="at this site it is False"):
                asked(own, spelled(statement(ledger, private=said)), plan)
        verify_payload(NORTH.public, spelled(honest), asked(own, spelled(honest), plan).signature)
    assert ledger.entries() == before, "there is nothing to note"


def test_a_run_or_plan_that_the_ledger_does_not_have_is_not_endorsed(tmp_path: Path) -> None:
    ledger = ran(tmp_path)
    payload = spelled(statement(ledger))
    with pytest.raises(LedgerError, match="has not committed this plan"):
        asked(ledger_at(tmp_path / "empty"), payload)
    with pytest.raises(LedgerError, match="has not committed this plan"):
        asked(ledger, payload, dataclasses.replace(PLAN, noise_multiplier=4.0))


def test_nothing_is_signed_when_the_ledger_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ran(tmp_path)
    payload = spelled(statement(ledger))
    signed: list[bytes] = []
    monkeypatch.setattr("fedcollm_privacy.endorsement.sign_payload", lambda _, payload: signed.append(payload))
    path_in(tmp_path).chmod(0o600)
    path_in(tmp_path).rename(tmp_path / "moved")
    path_in(tmp_path).write_bytes(b"this is no database" * 100)
    with pytest.raises(LedgerError):
        asked(ledger, payload)
    path_in(tmp_path).unlink()
    (tmp_path / "moved").rename(path_in(tmp_path))

    def full(*_: object, **__: object) -> None:
        raise LedgerError("the disk is full")

    monkeypatch.setattr(ledger, "record_statement", full)
    with pytest.raises(LedgerError, match="full"):
        asked(ledger, payload)
    assert signed == []
    assert "STATEMENT" not in kinds(ledger)


def test_a_run_given_up_gets_no_endorsement(tmp_path: Path) -> None:
    ledger = ran(tmp_path)
    ledger.abort("run-1")
    whole = statement(ledger)
    whole["predicate"]["sites"]["north"]["ledger"] = ledger_state(ledger)
    with pytest.raises(LedgerError, match="given up"):
        asked(ledger, spelled(whole))


def test_the_same_statement_is_signed_again_and_noted_once_until_the_run_goes_on(tmp_path: Path) -> None:
    ledger = ran(tmp_path)
    payload = spelled(statement(ledger))
    first = asked(ledger, payload)
    entries = ledger.entries()
    assert asked(ledger, payload) == first
    assert ledger.entries() == entries
    another = json.loads(payload)
    another["predicate"]["versions"] = {}
    with pytest.raises(ProtocolError, match="ledger"):  # the ledger went on by its note of the first one
        asked(ledger, spelled(another))
    ledger.reserve(run_id="run-1", plan=PLAN, server_round=9)
    with pytest.raises(ProtocolError, match=r"ledger|steps"):
        asked(ledger, payload)


# ---------------------------------------------------------------- messages


def test_messages_are_checked() -> None:
    with pytest.raises(InvalidValue, match="run_id"):
        StatementOffer(run_id="run 1", payload=b"")
    with pytest.raises(InvalidValue, match="payload"):
        StatementOffer(run_id="run-1", payload=b"x" * (2**24 + 1))
    with pytest.raises(InvalidValue, match="statement"):
        Endorsement(site="north", statement="x", signature=b"")
    with pytest.raises(InvalidValue, match="site"):
        Endorsement(site="../x", statement="0" * 64, signature=b"")
    assert "secret" not in repr(StatementOffer(run_id="run-1", payload=b"secret"))
    assert issubclass(InvalidValue, FedCollmError)
