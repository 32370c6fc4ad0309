"""A site that is asked to join a run: whose offers it takes, what it refuses before anything is charged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import ProtocolError, SiteFailed
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.messages import canonical_json
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.run_messages import ClaimsRequest, RunAnswer
from fedcollm_privacy.site_policy import PlanRules
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.models import AdaptedModel, base_digest_of
from secure_fedcollm.site_host import SiteHost
from secure_fedcollm.snapshot import OwnStatus
from secure_fedcollm.standing import Standing
from secure_fedcollm.terms import RunTerms, terms_of

from .site_hosts import SITES, VALID_UNTIL, Federation, answer, offered

SITE = "s00"


@pytest.fixture(scope="module")
def base_model(tiny_checkpoint: Callable[..., Path]) -> str:
    return base_digest_of(str(tiny_checkpoint("llama")), "float32")


@pytest.fixture(scope="module")
def adapted(load_tiny: Callable[..., AdaptedModel]) -> AdaptedModel:
    return load_tiny("llama", r=2, lora_alpha=16)


@pytest.fixture
def federation(tmp_path: Path, tiny_checkpoint: Callable[..., Path], base_model: str) -> Federation:
    return Federation(tmp_path, tiny_checkpoint("llama"), tiny_checkpoint("llama", width=64), base_model)


@pytest.fixture
def terms(federation: Federation, adapted: AdaptedModel) -> RunTerms:
    return terms_of(
        federation.config("privacy.cap_epsilon=100"),
        run_id="run",
        roster=federation.roster,
        spec=adapted.shared_spec("rebase"),
        append_eos=True,
    )


def changed(terms: RunTerms, **fields: Any) -> RunTerms:
    """The terms with these fields; ``privacy__epsilon`` names one of a section."""
    sections = {}
    for name in [name for name in fields if "__" in name]:
        section, field = name.split("__")
        sections.setdefault(section, {})[field] = fields.pop(name)
    for section, inner in sections.items():
        fields[section] = dataclasses.replace(getattr(terms, section), **inner)
    return dataclasses.replace(terms, **fields)


def test_a_site_joins_a_run_that_its_policy_allows_and_says_so_again_when_asked_again(
    federation: Federation, terms: RunTerms
) -> None:
    host, body = federation.host(SITE), offered(terms, federation.server_key)
    told = [decode(host.handle("offer", body), RunAnswer) for _ in range(2)]
    assert told[0] == told[1] == RunAnswer(site=SITE, run_id="run", terms_digest=terms.digest, standing="joined")
    assert federation.kinds(SITE) == ["PLAN"]
    assert federation.refusals(SITE) == []
    status = host.status()
    assert (status["run"], status["standing"], status["trouble"]) == ("run", "joined", "")
    (row,) = status["budgets"]
    assert 0 < row["epsilon"] <= 8.0 < row["cap_epsilon"]
    # The status page reads it as it is.
    assert OwnStatus.of(status).trouble == ""
    assert OwnStatus.of(status).budgets[0].data_set == "notes"


def test_offers_that_are_not_the_pinned_servers_or_not_of_the_pinned_roster_are_declined(
    federation: Federation, terms: RunTerms
) -> None:
    host, key = federation.host(SITE), federation.server_key
    other = Roster(
        federation="other", server=key.public, sites=federation.roster.sites, valid_until=federation.roster.valid_until
    )
    sound = terms.to_bytes()
    cases = {
        "another key": offered(terms, SigningKey.generate("server")),
        "a site's key": offered(terms, federation.keys["s01"]),
        "another roster": offered(changed(terms, roster_digest=other.digest), key),
        "another server": offered(changed(terms, server="other"), key),
        "another run": offered(sound, key, run_id="another"),
        "junk": offered(b"\xff\x00junk", key),
        "no object": offered(b"[]", key),
        "another spelling": offered(sound + b" ", key),
        "unknown field": offered(canonical_json({**json.loads(sound), "code": "import os"}), key),
        "missing field": offered(canonical_json({k: v for k, v in json.loads(sound).items() if k != "seed"}), key),
        "NaN": offered(sound.replace(b'"epsilon":8', b'"epsilon":NaN'), key),
        "too long": offered(sound + b" " * 2**17, key),
        "deep": offered(b"[" * 60_000, key),
        "a seed of the noise": offered(sound.replace(b'"insecure_test_seed":null', b'"insecure_test_seed":1'), key),
        "a place for the ledger": offered(sound.replace(b'"ledger_dir":null', b'"ledger_dir":"/tmp"'), key),
        "no offer": b"\x00" * 40,
        "empty": b"",
    }
    assert sound.count(b'"insecure_test_seed":null') == sound.count(b'"ledger_dir":null') == 1
    for name, body in cases.items():
        assert answer(host, body) == "declined", name
    assert len(federation.refusals(SITE)) == len(cases)
    assert (federation.kinds(SITE), Standing(federation.state(SITE)).offers()) == ([], ())
    # A signature for another purpose, over the same bytes, is no offer.
    body = offered(terms, key)
    signature, wrong = key.sign("run_offer", sound), key.sign("plan", sound)
    assert body.count(signature) == 1
    assert answer(host, body.replace(signature, wrong)) == "declined"
    assert answer(host, body) == "joined"


def test_a_run_that_the_policy_or_the_model_does_not_allow_is_declined_and_nothing_is_charged(
    federation: Federation, terms: RunTerms, tiny_checkpoint: Callable[..., Path]
) -> None:
    small = PlanRules(max_epsilon=1.0, max_delta=0.1, noise=("local",))
    noes: dict[str, dict[str, Any]] = {
        "valid_until": {"valid_until": date(2020, 1, 1)},
        "servers": {"servers": (SigningKey.generate("server").public,)},
        "base_models": {"base_models": ("ab" * 32,)},
        "data_sets": {"location": "/elsewhere/notes.jsonl"},
        "data_sets[0].unit": {"unit": "person"},
        "plans.max_epsilon": {"plans": small},
        "plans.max_delta": {"plans": PlanRules(max_epsilon=99.0, max_delta=1e-9, noise=("local",))},
        "plans.noise": {"plans": PlanRules(max_epsilon=99.0, max_delta=0.1, noise=("distributed",))},
        "exceptions": {"exceptions": ()},
        "data_sets.caps": {"data_sets": (federation.rule(SITE, caps=(Cap(epsilon=0.5, delta=0.4),)),)},
    }
    host, body = federation.host(SITE), offered(terms, federation.server_key)
    for number, (rule, changes) in enumerate(noes.items()):
        federation.policy(SITE, **changes)
        assert answer(host, body) == "declined", rule
        assert federation.refusals(SITE)[number:] == [rule]
        assert Standing(federation.state(SITE)).joined() is None
    assert federation.kinds(SITE) == []
    shutil.copy(federation.root / "s01" / "policy.yaml", federation.root / SITE / "policy.yaml")
    assert answer(host, body) == "declined"
    assert federation.refusals(SITE)[-1] == "site"
    federation.policy(SITE)
    asked: dict[str, RunTerms] = {
        "base_models": changed(terms, base_model="cd" * 32),
        "protocol": changed(terms, spec_digest="cd" * 32),
        "protocol ": changed(terms, dimension=7),
        "protocol  ": changed(terms, adapter__r=4),
        "message": changed(terms, federation__release="gradient"),
        "message ": changed(terms, federation__exchange="none"),
        "message  ": changed(terms, federation__rounds=10**9),
        "message   ": changed(terms, adapter__r=10**6),
        "message    ": changed(terms, max_colluding=2),
    }
    before = len(federation.refusals(SITE))
    for number, (rule, other) in enumerate(asked.items()):
        assert answer(host, offered(other, federation.server_key)) == "declined", rule
        assert federation.refusals(SITE)[before + number :] == [rule.strip()]
    # A policy that lists a model does not make another one that model.
    wide = federation.host(SITE, settings={"model": str(tiny_checkpoint("llama", width=64))})
    assert answer(wide, body) == "declined"
    assert federation.refusals(SITE)[-1] == "protocol"
    assert federation.kinds(SITE) == []
    assert answer(host, body) == "joined"


def test_a_seeded_run_needs_the_sites_own_seed_and_any_other_run_ignores_it(
    federation: Federation, terms: RunTerms
) -> None:
    host = federation.host(SITE, settings={"insecure_test_seed": None})
    assert terms.randomness == "insecure_test_seed"
    assert answer(host, offered(terms, federation.server_key)) == "declined"
    assert federation.kinds(SITE) == []
    real = changed(terms, randomness="operating_system")
    seeded = federation.host(SITE)
    assert answer(seeded, offered(real, federation.server_key)) == "joined"
    site = seeded._open[1].site  # type: ignore[index]  # what the run trains with
    assert site._budget.test_seed is None  # type: ignore[union-attr]
    assert site._budget.plan.randomness == "operating_system"  # type: ignore[union-attr]


def test_a_run_waits_for_the_administrator_who_may_say_yes_to_these_terms_only(
    federation: Federation, terms: RunTerms
) -> None:
    host, standing = federation.host(SITE, settings={"approval": "ask"}), Standing(federation.state(SITE))
    body = offered(terms, federation.server_key)
    assert [answer(host, body) for _ in range(2)] == ["waiting", "waiting"]
    assert (federation.kinds(SITE), host.status()["standing"]) == ([], "waiting")
    (offer,) = standing.offers()
    assert (offer.digest, offer.run_id, offer.standing) == (terms.digest, "run", "waiting")
    told = json.loads((federation.state(SITE) / "offers" / f"{terms.digest}.json").read_text())
    assert (told["server"], told["rounds"], told["epsilon"], told["base_model"]) == (
        "server",
        2,
        8.0,
        federation.base_model,
    )
    standing.approve(offer.digest[:10])
    more = changed(terms, privacy__epsilon=9.0)
    assert answer(host, offered(more, federation.server_key)) == "waiting"
    standing.decline(more.digest[:10])
    assert answer(host, offered(more, federation.server_key)) == "declined"
    assert federation.refusals(SITE) == ["declined"]
    assert answer(host, body) == "joined"
    assert {o.digest: o.standing for o in standing.offers()} == {terms.digest: "joined", more.digest: "declined"}


def test_a_paused_or_left_site_joins_nothing(federation: Federation, terms: RunTerms) -> None:
    host, standing = federation.host(SITE), Standing(federation.state(SITE))
    body = offered(terms, federation.server_key)
    standing.pause()
    assert answer(host, body) == "declined"
    standing.resume()
    standing.leave()
    assert answer(host, body) == "declined"
    assert federation.refusals(SITE) == ["paused", "left"]
    assert (federation.kinds(SITE), host.status()["paused"], host.status()["standing"]) == ([], True, "left")


def test_a_restarted_site_answers_for_its_run_without_a_new_offer(federation: Federation, terms: RunTerms) -> None:
    assert answer(federation.host(SITE), offered(terms, federation.server_key)) == "joined"
    again = federation.host(SITE)
    assert again.status()["run"] == "run"
    assert again.handle("claims", encode(ClaimsRequest(run_id="run")))
    assert federation.kinds(SITE) == ["PLAN"]
    # What is kept on disk is believed no more than what comes in.
    kept = federation.state(SITE) / "joined.json"
    kept.write_text(kept.read_text().replace("insecure_test_seed", "operating_system"))
    with pytest.raises(SiteFailed, match="declined"):
        federation.host(SITE).handle("claims", encode(ClaimsRequest(run_id="run")))
    assert federation.refusals(SITE) == ["protocol"]


def test_caps_that_change_while_a_site_is_down_end_the_run_there(federation: Federation, terms: RunTerms) -> None:
    assert answer(federation.host(SITE), offered(terms, federation.server_key)) == "joined"
    federation.policy(SITE, data_sets=(federation.rule(SITE, caps=(Cap(epsilon=9e3, delta=0.4),)),))
    assert answer(federation.host(SITE), offered(terms, federation.server_key)) == "declined"
    assert federation.refusals(SITE) == ["data_sets.caps"]
    anew = changed(terms, run_id="anew")
    assert answer(federation.host(SITE), offered(anew, federation.server_key)) == "joined"
    assert federation.kinds(SITE) == ["PLAN", "PLAN"]


def test_a_new_run_takes_the_old_ones_place_only_once_it_is_joined(federation: Federation, terms: RunTerms) -> None:
    host, key = federation.host(SITE), federation.server_key
    assert answer(host, offered(terms, key)) == "joined"
    refused = changed(terms, run_id="dear", privacy__epsilon=2e4, privacy__cap_epsilon=4e4)
    assert answer(host, offered(refused, key)) == "declined"
    # One that only the ledger refuses: it was on disk for a moment, and the old one is there again.
    over = changed(terms, run_id="over", privacy__cap_epsilon=1.0)
    assert answer(host, offered(over, key)) == "declined"
    assert federation.refusals(SITE) == ["message", "data_sets.caps"]
    assert host.status()["run"] == "run"
    assert host.handle("claims", encode(ClaimsRequest(run_id="run")))
    assert answer(host, offered(changed(terms, run_id="next"), key)) == "joined"
    assert host.status()["run"] == "next"
    assert federation.kinds(SITE) == ["PLAN", "PLAN"]
    with pytest.raises(SiteFailed):
        host.handle("claims", encode(ClaimsRequest(run_id="run")))


def test_a_failure_on_the_sites_own_side_leaves_as_one_word(
    federation: Federation, terms: RunTerms, caplog: pytest.LogCaptureFixture
) -> None:
    host = federation.host(SITE)
    federation.notes(SITE).write_text('{"text": "door code 4711"\n')
    with pytest.raises(SiteFailed) as failure:
        host.handle("offer", offered(terms, federation.server_key))
    assert (str(failure.value), failure.value.code) == (f"site {SITE}: failed", "failed")
    assert "notes.jsonl" in caplog.text
    for operation in ("advertise", "train", "settle", "head", "", "nonsense"):
        with pytest.raises(SiteFailed, match="declined"):
            host.handle(operation, b"")


def test_a_site_starts_with_its_own_key_only_and_no_longer_than_its_roster_holds(
    federation: Federation, terms: RunTerms
) -> None:
    with pytest.raises(ProtocolError, match="another key"):
        federation.host(SITE, key=SigningKey.generate(SITE))
    with pytest.raises(ProtocolError, match="another key"):
        federation.host(SITE, key=federation.keys["s01"])
    late: SiteHost = federation.host(SITE, clock=lambda: float(VALID_UNTIL))
    assert answer(late, offered(terms, federation.server_key)) == "declined"
    assert set(SITES) == set(federation.roster.site_names)
