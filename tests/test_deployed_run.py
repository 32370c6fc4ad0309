"""Sites that have nothing but a signed offer and their own files do what they do in one process tree, and go on after
a restart."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from fedcollm_privacy.entries import Cap, verify_chain
from fedcollm_privacy.errors import ConfigError
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.site_policy import PlanRules
from secure_fedcollm import run as run_module
from secure_fedcollm import site as site_module
from secure_fedcollm.assembly import Assembly, assemble
from secure_fedcollm.config import Config
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.models import AdaptedModel, base_digest_of
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.rounds import adapter_digests
from secure_fedcollm.site_assembly import plan_of
from secure_fedcollm.standing import Standing
from secure_fedcollm.strict_build import build
from secure_fedcollm.terms import dp_terms, terms_of

from .site_hosts import SITES, Federation, Machines, play


@pytest.fixture(scope="module")
def base_model(tiny_checkpoint: Callable[..., Path]) -> str:
    return base_digest_of(str(tiny_checkpoint("llama")), "float32")


@pytest.fixture
def federation(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], base_model: str, monkeypatch: pytest.MonkeyPatch
) -> Federation:
    monkeypatch.setenv("FEDCOLLM_HOME", str(tmp_path / "home"))
    return Federation(tmp_path, tiny_checkpoint("llama"), tiny_checkpoint("llama", width=64), base_model)


@pytest.fixture
def machines(federation: Federation) -> Iterator[Machines]:
    made = Machines({name: federation.host(name) for name in SITES})
    yield made
    for host in made.hosts.values():
        host.close()


@pytest.fixture
def served(federation: Federation, machines: Machines) -> Iterator[Assembly]:
    parts = federation.serve(machines)
    yield parts
    parts.federation.secure_sum.close()


def test_a_deployed_run_gives_the_embedded_runs_adapters_digest_for_digest(
    federation: Federation, served: Assembly
) -> None:
    plain = federation.plain_embedded()
    config = build(Config, plain)
    folder = RunFolder.create(str(federation.root / "embedded"), config.name, plain)
    embedded = assemble(config, folder, RunProgress(quiet=True))
    try:
        found = []
        for parts in (embedded, served):
            state, digests = parts.start, [adapter_digests(parts.start)]
            for server_round in (1, 2):
                result = play(parts, state, server_round)
                assert (result.outcome, result.cohort, result.distrusted) == ("opened", SITES, {})
                state = result.state
                digests.append(adapter_digests(state))
            found.append(digests)
    finally:
        embedded.federation.secure_sum.close()
    assert found[0] == found[1]
    assert len({digests["slm"] for digests in found[0]}) == 3
    # What each site promised and spent is the same too.
    for name in SITES:
        own = LedgerFile(federation.state(name) / "ledger.sqlite").entries()
        theirs = LedgerFile(embedded.ledgers[name].file.path).entries()
        assert [e["kind"] for e in own] == [e["kind"] for e in theirs] == ["PLAN", *["RESERVE", "SETTLE"] * 2]
        assert own[0]["plan"] == theirs[0]["plan"]
        assert [e.get("epsilon") for e in own] == [e.get("epsilon") for e in theirs]
    assert (served.deployed, served.ledgers, served.plans, served.federation.sites) == (True, {}, {}, ())


def test_sites_of_a_lower_rank_load_it_from_the_offer_and_do_what_they_do_in_one_process(
    federation: Federation, machines: Machines
) -> None:
    ranks = "adapter.site_ranks={s00: 1, s01: 1, s02: 1}"
    plain = federation.plain_embedded(ranks)
    config = build(Config, plain)
    folder = RunFolder.create(str(federation.root / "embedded"), config.name, plain)
    pair = (assemble(config, folder, RunProgress(quiet=True)), federation.serve(machines, ranks))
    try:
        results = [play(parts, parts.start, 1) for parts in pair]
    finally:
        for parts in pair:
            parts.federation.secure_sum.close()
    assert [result.cohort for result in results] == [SITES, SITES]
    assert adapter_digests(results[0].state) == adapter_digests(results[1].state)
    assert {host._model[1].spec.shapes[0][0] for host in machines.hosts.values() if host._model} == {1}


def test_a_restarted_site_takes_part_in_the_next_round_and_is_charged_once(
    federation: Federation, machines: Machines, served: Assembly
) -> None:
    first = play(served, served.start, 1)
    charged = LedgerFile(federation.state("s01") / "ledger.sqlite").entries()[0]["epsilon"]
    machines.hosts["s01"].close()
    machines.hosts["s01"] = federation.host("s01")
    second = play(served, first.state, 2)
    assert second.cohort == SITES
    assert federation.kinds("s01") == ["PLAN", "RESERVE", "SETTLE", "RESERVE", "SETTLE"]
    (row,) = machines.hosts["s01"].status()["budgets"]
    assert row["epsilon"] == charged


def test_a_site_that_dies_between_training_and_the_end_has_spent_and_is_in_the_next_round(
    federation: Federation, machines: Machines, served: Assembly
) -> None:
    alive = Machines.ask

    def dying(self: Machines, operation: str, bodies: dict[str, bytes]):  # type: ignore[no-untyped-def]
        if operation == "agree":
            self.hosts["s02"] = federation.host("s02")  # the old object is gone, with all it knew of the round
        return alive(self, operation, bodies)

    Machines.ask = dying  # type: ignore[method-assign, assignment]
    try:
        lost = play(served, served.start, 1)
    finally:
        Machines.ask = alive  # type: ignore[method-assign]
    assert lost.outcome == "lost"
    assert federation.kinds("s02") == ["PLAN", "RESERVE", "SETTLE"]
    entries = LedgerFile(federation.state("s02") / "ledger.sqlite").entries()
    assert entries[-1]["outcome"] == "lost"
    again = play(served, lost.state, 2)
    assert again.cohort == SITES
    (told,) = [s for s in again.settlements if s.site == "s02"]
    assert told.steps == 2


def test_a_site_whose_disk_is_full_declines_before_it_trains_and_nothing_is_spent_in_silence(
    federation: Federation, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = federation.serve(machines, "privacy.cap_epsilon=1000.0", "privacy.cap_delta=0.3")
    served.federation.offers.enlist(machines)  # type: ignore[union-attr]
    real, train, trained = sqlite3.connect, site_module.train_private, Counter[str]()

    def full(path: Path, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = real(path, **options)
        if Path(path) == federation.state("s01") / "ledger.sqlite":
            connection.execute("PRAGMA max_page_count = 1")  # SQLite never goes below what is in use
        return connection

    def counted(**how: Any) -> Any:
        trained["steps"] += 1
        return train(**how)

    monkeypatch.setattr(site_module, "train_private", counted)
    state, ledger = served.start, LedgerFile(federation.state("s01") / "ledger.sqlite")
    with monkeypatch.context() as patch:
        patch.setattr("fedcollm_privacy.durable.sqlite3.connect", full)
        for server_round in range(1, 40):
            before = trained.total()
            result = play(served, state, server_round)
            state = result.state
            if result.outcome == "lost":
                break
    assert "ledger" in federation.refusals("s01")
    # Two of three trained in that round, or it failed before anybody did; what the third reserved is what it trained.
    assert trained.total() - before <= 2
    found = ledger.entries()
    verify_chain(found, served.roster.site("s01"))
    reserved = [entry for entry in found if entry["kind"] == "RESERVE"]
    assert len(reserved) in (server_round - 1, server_round)
    assert play(served, state, server_round + 1).cohort == SITES  # there is room again
    served.federation.secure_sum.close()


def test_a_site_that_waits_holds_nobody_up_and_joins_once_it_is_approved(
    federation: Federation, machines: Machines, served: Assembly
) -> None:
    machines.hosts["s00"] = federation.host("s00", settings={"approval": "ask"})
    waiting = play(served, served.start, 1)
    assert waiting.outcome == "lost"  # three are needed
    offers = served.federation.offers
    assert dict(offers.standings) == {"s00": "waiting", "s01": "joined", "s02": "joined"}  # type: ignore[union-attr]
    (offer,) = Standing(federation.state("s00")).offers()
    assert "epsilon 8" in offer.summary
    Standing(federation.state("s00")).approve(offer.digest[:8])
    assert play(served, waiting.state, 2).cohort == SITES


def test_a_run_waits_for_the_sites_it_needs_and_loses_no_round_over_it(
    federation: Federation, machines: Machines, served: Assembly, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module.time, "sleep", lambda seconds: None)
    machines.hosts["s00"] = federation.host("s00", settings={"approval": "ask"})
    folder, _ = RunFolder.resume(str(federation.root / "served"))
    looks = 0

    def stop() -> bool:  # asked while the run waits: the administrator comes back from lunch
        nonlocal looks
        looks += 1
        standing = Standing(federation.state("s00"))
        if looks == 25:
            standing.approve(standing.offers()[0].digest[:8])
        return False

    run_module.run(served, folder, RunProgress(quiet=True), stop=stop)
    rows = [row for row in folder.metrics() if row["server_round"]]
    assert looks >= 25
    assert [(row["outcome"], row["cohort"]) for row in rows] == [("opened", list(SITES))] * 2


def test_a_run_that_waits_for_sites_can_be_stopped(
    federation: Federation, machines: Machines, served: Assembly
) -> None:
    machines.hosts["s00"] = federation.host("s00", settings={"approval": "ask"})
    folder, _ = RunFolder.resume(str(federation.root / "served"))
    assert run_module.run(served, folder, RunProgress(quiet=True), stop=lambda: True) is None
    assert [row["server_round"] for row in folder.metrics()] == [0]


def test_an_administrators_no_between_two_rounds_holds_from_the_next_one_until_it_is_taken_back(
    federation: Federation, machines: Machines, served: Assembly
) -> None:
    policy, standing = federation.root / "s01" / "policy.yaml", Standing(federation.state("s01"))
    tight = PlanRules(max_epsilon=0.5, max_delta=0.4, noise=("local",))
    other_caps = (federation.rule("s01", caps=(Cap(epsilon=9e3, delta=0.4),)),)
    noes: dict[str, Callable[[], object]] = {
        "valid_until": lambda: federation.policy("s01", valid_until=date(2020, 1, 1)),
        "plans.max_epsilon": lambda: federation.policy("s01", plans=tight),
        "base_models": lambda: federation.policy("s01", base_models=("ab" * 32,)),
        "file": policy.unlink,
        "file ": lambda: policy.chmod(0o666),
        "data_sets.caps": lambda: federation.policy("s01", data_sets=other_caps),
        "paused": standing.pause,
        "declined": lambda: standing.decline(standing.offers()[0].digest),
        "left": standing.leave,
    }
    state = served.start
    served.federation.offers.enlist(machines)  # type: ignore[union-attr]
    for server_round, (rule, no) in enumerate(noes.items(), start=1):
        no()
        result = play(served, state, server_round)
        assert result.outcome == "lost", rule
        assert federation.refusals("s01")[server_round - 1 :] == [rule.strip()]
        # What this site had begun is still accounted for.
        assert {s.site for s in result.settlements} == set(SITES)
        assert result.distrusted == {}
        if rule in ("paused", "left"):
            assert machines.hosts["s01"].status()["paused"] is True
            (standing.resume if rule == "paused" else (federation.state("s01") / "left").unlink)()
        elif rule == "declined":
            assert machines.hosts["s01"].status()["standing"] == "declined"
            standing.approve(standing.offers()[0].digest)
        else:
            policy.unlink(missing_ok=True)
            federation.policy("s01")
    assert federation.kinds("s01") == ["PLAN"]
    assert play(served, state, len(noes) + 1).cohort == SITES


def test_a_server_refuses_a_run_that_only_one_process_tree_can_do(federation: Federation) -> None:
    sites = Machines(dict.fromkeys(SITES))  # type: ignore[arg-type]  # nobody is asked anything
    sound = federation.config()
    for number, (named, changes) in enumerate(
        {
            "federation.exchange": {"federation": {"exchange": "none"}},
            "federation.rounds": {"federation": {"rounds": 0}},
            "data.public_path": {"data": {"public_path": None}},
            "data.path": {"data": {"path": "/tmp/notes.jsonl"}},
            "federation.min_contributors": {"federation": {"min_contributors": 4}},
            "secure_sum.threshold": {"secure_sum": {"threshold": 9}},
            "data.public_fraction": {"data": {"public_fraction": 0.5}},
        }.items()
    ):
        sections = {name: replace(getattr(sound, name), **fields) for name, fields in changes.items()}
        with pytest.raises(ConfigError, match=named):
            federation.serve_as(replace(sound, **sections), sites, f"out{number}")
    gradient = federation.config("privacy=distributed", "adapter.aggregation=factor_average")
    with pytest.raises(ConfigError, match=r"federation\.release"):
        federation.serve_as(gradient, sites, "gradient")
    with pytest.raises(ConfigError, match="server = "):
        federation.serve_as(sound, sites, "foreign", SigningKey.generate("server"))
    with pytest.raises(ConfigError, match="sites = "):
        federation.serve_as(sound, Machines(dict.fromkeys(SITES[:2])), "few")  # type: ignore[arg-type]


def test_the_rounds_terms_are_those_of_every_plan(
    federation: Federation, load_tiny: Callable[..., AdaptedModel]
) -> None:
    spec = load_tiny("llama").shared_spec("rebase")
    for overrides in ([], ["privacy.clipping=automatic"]):
        config = federation.config(*overrides)
        plan = plan_of(terms_of(config, run_id="run", roster=federation.roster, spec=spec, append_eos=True), 32)
        assert plan is not None
        assert plan.terms == dp_terms(config.privacy, config.federation)
    assert dp_terms(None, config.federation) is None
