"""A site: what it refuses before anything is spent, what it spends, and that exactly its private update is uploaded."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.ckks import PublicContext, parameters_for
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import FedCollmError, ModelError, SiteFailed
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.independence import Independence
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.messages import PrivateUpdate, Receipt, RoundPlan, Settlement, TrainRequest, vector_digest
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.quantization import quantize
from fedcollm_privacy.secure_sum import MaskedSum
from fedcollm_privacy.secure_sum_messages import UploadManifest, sign_plan
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.models import AdaptedModel
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.site import NonPrivate, PrivateBudget, Site
from secure_fedcollm.tokenization import Batch, TokenDataset
from secure_fedcollm.training import LocalTraining, Paid
from secure_fedcollm.transport import InProcessTransport

from .secure_sums import NOW, Parties, round_plan
from .site_policies import guard

PARTIES = Parties.named("north", "south", "west")
DP_PLAN = DpPlan(
    unit="record",
    max_records_per_unit=1,
    max_grad_norm=1.0,
    noise_multiplier=1.5,
    sample_rate=Fraction(7, 8),
    expected_batch_size=4,
    steps_per_round=2,
    rounds=2,
    delta=1e-3,
)


@pytest.fixture
def context() -> PublicContext:
    """A round's public key; nobody here opens anything with it."""
    return Decryptor(PARTIES.roster).new_round_key(parameters_for(3, 13))


@pytest.fixture
def adapted(load_tiny: Callable[..., AdaptedModel]) -> AdaptedModel:
    return load_tiny("llama", width=16, trained=True)


@pytest.fixture
def forwards(adapted: AdaptedModel) -> list[int]:
    """Grows by one at every forward pass of the model."""
    calls: list[int] = []
    adapted.model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture
def make(adapted: AdaptedModel, tiny_tokens: TokenDataset, tmp_path: Path) -> Callable[..., Site]:
    def site(
        name: str = "north", *, cap: float = 1e3, learning_rate: float = 1e-2, floor: int = 3, **changes: Any
    ) -> Site:
        ledger = ledger_of(tmp_path, name)
        ledger.commit_plan(run_id="run", data_set="notes", plan=DP_PLAN, caps=(Cap(epsilon=cap, delta=0.1),))
        fields: dict[str, Any] = {
            "run_id": "run",
            "adapted": adapted,
            "tokens": tiny_tokens,
            "aggregation": "rebase",
            "run_rank": 4,
            "budget": PrivateBudget(plan=DP_PLAN, ledger=ledger),
            "how": LocalTraining(learning_rate=learning_rate, batch_tokens=64),
            "progress": RunProgress(quiet=True),
        }
        fields["key"] = PARTIES.sites[name]
        fields["contributor"] = PARTIES.contributor(name, tmp_path, min_contributors=floor)
        fields["guard"] = guard(name, PARTIES.server.public, tmp_path, adapted.spec.base_model)
        return Site(**(fields | changes))

    return site


def ledger_of(folder: Path, name: str = "north") -> Ledger:
    return Ledger(folder / f"{name}.sqlite", PARTIES.sites[name])


def kinds(folder: Path, name: str = "north") -> list[str]:
    return [entry["kind"] for entry in ledger_of(folder, name).entries()]


def plan_for(adapted: AdaptedModel, context: PublicContext, **changes: Any) -> RoundPlan:
    spec = adapted.shared_spec("rebase")
    fields: dict[str, Any] = {
        "run_id": "run",
        "spec_digest": spec.digest,
        "adapter_digest": vector_digest(adapted.read()),
        "dimension": spec.dimension,
        "clip": 0.05,
        "max_contributors": 3,
        "roster_digest": PARTIES.roster.digest,
        "ckks": context.parameters,
        "key_digest": context.digest,
        "dp": DP_PLAN.terms,
    }
    return round_plan(**(fields | changes))


def train(
    site: Site,
    adapted: AdaptedModel,
    context: PublicContext,
    broadcast: np.ndarray[Any, Any] | None = None,
    **changes: Any,
) -> bytes:
    """Lead a site through a round until it has uploaded, its peers played by stand-ins; gives its answer."""
    adapter = adapted.read() if broadcast is None else broadcast
    plan = plan_for(adapted, context, **({"adapter_digest": vector_digest(adapter)} | changes))
    request = TrainRequest(plan_digest=plan.digest, adapter=adapter, public_key=context.to_bytes())
    PARTIES.bring_to_training(plan, {site.name: site.handle})
    return site.handle("train", encode(request))


def refused_training(site: Site, *arguments: Any, **changes: Any) -> SiteFailed:
    with pytest.raises(SiteFailed) as failure:
        train(site, *arguments, **changes)
    return failure.value


def receipt(outcome: str) -> bytes:
    return encode(Receipt(plan_digest="0" * 64, server_round=1, outcome=outcome))


def refused(site: Site, body: bytes, operation: str = "train") -> SiteFailed:
    with pytest.raises(SiteFailed) as failure:
        site.handle(operation, body)
    return failure.value


# ---------------------------------------------------------------- refusals before anything is spent


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "another-run"},
        {"spec_digest": "0" * 64},
        {"dimension": 7},
        {"value_bits": 18, "max_contributors": 100},
        {"roster_digest": "0" * 64},
        {"max_colluding": 0},
        {"expires_at": NOW},
        {"dp": None},
        {"dp": dataclasses.replace(DP_PLAN.terms, max_grad_norm=2.0)},
        {"narrow_sites": ("north",), "narrow_ranks": (2,)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_plan_that_is_foreign_weak_or_cannot_be_sealed_costs_nothing(
    make: Callable[..., Site],
    adapted: AdaptedModel,
    context: PublicContext,
    tmp_path: Path,
    forwards: list[int],
    changes: dict[str, Any],
) -> None:
    site, plan = make(), plan_for(adapted, context, **changes)
    assert refused(site, encode(sign_plan(plan, PARTIES.server)), "advertise").code == "declined"
    assert kinds(tmp_path) == ["PLAN"]
    assert not forwards
    train(site, adapted, context)


def test_a_plan_that_another_signed_costs_nothing(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext
) -> None:
    plan = plan_for(adapted, context)
    for forger in (SigningKey.generate("server"), PARTIES.sites["south"]):
        assert refused(make(), encode(sign_plan(plan, forger)), "advertise").code == "declined"


@pytest.mark.parametrize("field", ["key_digest", "adapter_digest"])
def test_another_key_or_adapter_than_the_plans_costs_nothing(
    make: Callable[..., Site],
    adapted: AdaptedModel,
    context: PublicContext,
    tmp_path: Path,
    forwards: list[int],
    field: str,
) -> None:
    """An adapter of its own for one site would single its update out (Pasquini et al. 2022)."""
    assert refused_training(make(), adapted, context, **{field: "0" * 64}).code == "declined"
    assert kinds(tmp_path) == ["PLAN"]
    assert not forwards


def test_training_is_asked_for_in_its_turn_only(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, tmp_path: Path
) -> None:
    site, plan = make(), plan_for(adapted, context)
    body = encode(TrainRequest(plan_digest=plan.digest, adapter=adapted.read(), public_key=context.to_bytes()))
    assert refused(site, body).code == "declined"
    PARTIES.bring_to_training(plan, {site.name: site.handle})
    site.handle("train", body)
    assert refused(site, body).code == "declined"
    assert kinds(tmp_path) == ["PLAN", "RESERVE"]


def test_the_sites_own_floor_of_contributors_holds(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, tmp_path: Path
) -> None:
    site, wide = make(floor=4), parameters_for(4, 13)
    weak, sound = (
        plan_for(adapted, context, min_contributors=k, max_contributors=4, server_round=k, ckks=wide) for k in (3, 4)
    )
    assert refused(site, encode(sign_plan(weak, PARTIES.server)), "advertise").code == "declined"
    site.handle("advertise", encode(sign_plan(sound, PARTIES.server)))
    assert kinds(tmp_path) == ["PLAN"]


def test_a_replayed_plan_is_not_answered_twice(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, tmp_path: Path
) -> None:
    site = make()
    train(site, adapted, context)
    assert refused_training(site, adapted, context).code == "declined"
    assert kinds(tmp_path) == ["PLAN", "RESERVE"]
    # The same round under a fresh nonce is another attempt, and is paid for again.
    train(site, adapted, context, attempt=2, nonce="01")
    assert kinds(tmp_path) == ["PLAN", "RESERVE", "SETTLE", "RESERVE"]


@pytest.mark.parametrize("operation", ["evaluate", "", "__init__", "train_alone"])
def test_a_site_answers_its_eight_operations_only(make: Callable[..., Site], operation: str) -> None:
    assert refused(make(), b"", operation).code == "declined"


def test_malformed_requests_cost_nothing(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, tmp_path: Path
) -> None:
    site, plan = make(), plan_for(adapted, context)
    PARTIES.bring_to_training(plan, {site.name: site.handle})
    requests = [
        encode(TrainRequest(plan_digest=plan.digest, adapter=adapted.read(), public_key=key))
        for key in (context.to_bytes(), b"\xff" * 99)
    ]
    sound, no_key = requests
    for body in (b"", b"\x00" * 400, sound[:-1], sound[:100] + b"\x01" + sound[101:], receipt("lost"), no_key):
        assert refused(site, body).code == "declined"
    assert refused(site, sound, "settle").code == "declined"
    assert kinds(tmp_path) == ["PLAN"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broadcast_that_is_not_finite_costs_nothing(
    make: Callable[..., Site],
    adapted: AdaptedModel,
    context: PublicContext,
    tmp_path: Path,
    forwards: list[int],
    value: float,
) -> None:
    broadcast = adapted.read()
    broadcast[3] = value
    assert refused_training(make(), adapted, context, broadcast).code == "failed"
    assert kinds(tmp_path) == ["PLAN"]
    assert not forwards


def test_a_spent_budget_declines_before_any_gradient(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, tmp_path: Path, forwards: list[int]
) -> None:
    site = make(cap=DP_PLAN.epsilon(4))
    for number in (1, 2):
        train(site, adapted, context, server_round=number)
    assert forwards, "the counter must count"
    forwards.clear()
    before = ledger_of(tmp_path).entries()
    failure = refused_training(site, adapted, context, server_round=3)
    assert failure.code == "declined"
    assert not forwards
    assert ledger_of(tmp_path).entries() == before


# ---------------------------------------------------------------- a round


def test_a_reservation_is_on_disk_before_the_first_gradient(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, tmp_path: Path
) -> None:
    seen: list[list[str]] = []
    site = make()
    train(site, adapted, context)  # before the first round the model is tested on made-up records
    adapted.model.register_forward_pre_hook(lambda *_: seen.append(kinds(tmp_path)))
    train(site, adapted, context, server_round=2)
    tests_of_the_model = [i for i, entries in enumerate(seen) if entries == ["PLAN", "RESERVE"]]
    # Every round's adapter is tested on made-up records (7 passes) before the reservation, and nothing else is read.
    assert tests_of_the_model == list(range(7))
    assert len(seen) > 7
    assert all(entries == ["PLAN", "RESERVE", "SETTLE", "RESERVE"] for entries in seen[7:])


def test_the_model_is_tested_with_every_rounds_adapter(
    make: Callable[..., Site],
    adapted: AdaptedModel,
    context: PublicContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server chooses it: what passed in the first round may mix records in the second (8 C were measured)."""
    site = make()
    train(site, adapted, context)

    def mixing(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        return logits.square().mean((1, 2)) * logits.square().mean()

    monkeypatch.setattr("secure_fedcollm.training.per_record_loss", mixing)
    assert refused_training(site, adapted, context, server_round=2).code == "failed"
    assert kinds(tmp_path).count("RESERVE") == 1


def test_records_are_not_read_before_the_model_has_passed_its_test(
    make: Callable[..., Site],
    adapted: AdaptedModel,
    context: PublicContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forwards: list[int],
) -> None:
    def mixing(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        return logits.square().mean((1, 2)) * logits.square().mean()

    monkeypatch.setattr("secure_fedcollm.training.per_record_loss", mixing)
    assert refused_training(make(), adapted, context).code == "failed"
    assert kinds(tmp_path) == ["PLAN"]
    assert 0 < len(forwards) <= 7


def test_a_broadcast_under_which_the_model_is_nan_costs_nothing(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, tmp_path: Path
) -> None:
    edge = np.full_like(adapted.read(), 3.3e38)
    assert refused_training(make(), adapted, context, edge).code == "diverged"
    assert kinds(tmp_path) == ["PLAN"]


def test_the_sum_of_three_uploads_is_that_of_their_quantised_updates(
    make: Callable[..., Site],
    adapted: AdaptedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updates: list[PrivateUpdate] = []

    def noting(update: PrivateUpdate, plan: RoundPlan) -> Any:
        updates.append(update)
        return quantize(update, plan)

    monkeypatch.setattr("secure_fedcollm.site.quantize", noting)
    spec, broadcast = adapted.shared_spec("rebase"), adapted.read()
    start, names = adapted.read(spec), ("north", "south", "west")
    transport = InProcessTransport({name: make(name).handle for name in names})
    secure_sum = MaskedSum(
        aggregator=Aggregator(time_limit_s=60),
        decryptor=Decryptor(PARTIES.roster),
        key=PARTIES.server,
        roster=PARTIES.roster,
        channel=transport,
        witness=lambda event, **facts: None,
    )
    context = secure_sum.begin(contributors=3, value_bits=13)
    plan = plan_for(adapted, context)
    ready = secure_sum.enrol(plan)
    assert ready == names
    request = TrainRequest(plan_digest=plan.digest, adapter=broadcast, public_key=context.to_bytes())

    def uploads() -> Iterator[UploadManifest]:
        for reply in transport.ask("train", dict.fromkeys(ready, encode(request))):
            yield decode(reply.body or b"", UploadManifest)
            # What was sealed is what training changed in this model, and the frozen factor A is as broadcast.
            assert (updates[-1].vector == adapted.read(spec) - start).all()
            assert updates[-1].reservation == ledger_of(tmp_path, reply.site).entries()[-1]["digest"]

    opened = secure_sum.open(uploads())
    secure_sum.close()
    grids = [
        np.rint(np.clip(u.vector.astype(np.float64), -plan.clip, plan.clip) / plan.clip * 4095).astype(np.int64)
        for u in updates
    ]
    assert opened.cohort == ("north", "south", "west")
    assert (opened.total == np.sum(grids, axis=0)).all()
    assert opened.total.any()
    # Each site started from the broadcast, not from what the site before it left in the shared model.
    assert max(float(np.abs(u.vector).max()) for u in updates) < 2 * 2 * 1e-2
    adapted.write(broadcast)
    assert (adapted.read(spec) == start).all()
    # Nobody drew the noise that another one drew.
    assert (updates[0].vector == updates[1].vector).mean() < 0.1


def test_a_round_with_the_same_data_never_repeats_its_update(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = []

    def noting(update: PrivateUpdate, plan: RoundPlan) -> Any:
        vectors.append(update.vector)
        return quantize(update, plan)

    monkeypatch.setattr("secure_fedcollm.site.quantize", noting)
    broadcast, site = adapted.read(), make()
    for attempt in (1, 2):
        torch.manual_seed(0)
        train(site, adapted, context, broadcast, attempt=attempt, nonce=str(attempt))
    assert (vectors[0] == vectors[1]).mean() < 0.1


def test_a_seeded_site_repeats_no_stream_and_never_calls_itself_private(
    make: Callable[..., Site],
    adapted: AdaptedModel,
    context: PublicContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One seed for a whole run is not one noise: equal noise at two sites, rounds or attempts would cancel out."""
    paid: list[Paid] = []

    def noting(**arguments: Any) -> Any:
        paid.append(arguments["paid"])
        raise FedCollmError("far enough")

    monkeypatch.setattr("secure_fedcollm.site.train_private", noting)
    branded = dataclasses.replace(DP_PLAN, randomness="insecure_test_seed")
    told = []
    for name, server_round, attempt in (("north", 1, 1), ("south", 1, 1), ("north", 1, 2), ("north", 2, 1)):
        ledger = Ledger(tmp_path / f"{name}-seeded.sqlite", PARTIES.sites[name])
        ledger.commit_plan(run_id="run", data_set="notes", plan=branded, caps=(Cap(epsilon=1e3, delta=0.1),))
        site = make(name, budget=PrivateBudget(plan=branded, ledger=ledger, test_seed=0))
        refused_training(site, adapted, context, server_round=server_round, attempt=attempt)
        told.append(decode(site.handle("settle", receipt("lost")), Settlement))
    assert len({p.random.normals(1)[0] for p in paid}) == 4
    assert all(p.random.seeded for p in paid)
    assert {(s.private, s.epsilon, s.charged) for s in told} == {(False, -1.0, -1.0)}


def test_settling_closes_the_reservation_once_and_reports_the_ledger(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, tmp_path: Path
) -> None:
    site = make()
    train(site, adapted, context)
    told = decode(site.handle("settle", receipt("included")), Settlement)
    entries = ledger_of(tmp_path).entries()
    assert [entry["kind"] for entry in entries] == ["PLAN", "RESERVE", "SETTLE"]
    assert (entries[-1]["reservation"], entries[-1]["outcome"]) == (entries[1]["digest"], "included")
    expected = Settlement(
        site="north",
        private=True,
        epsilon=DP_PLAN.epsilon(2),
        charged=DP_PLAN.epsilon(4),
        delta=1e-3,
        unit="record",
        steps=2,
        clipped_fraction=told.clipped_fraction,
    )
    assert told == expected
    assert 0 <= told.clipped_fraction < 1
    assert decode(site.handle("settle", receipt("lost")), Settlement) == expected
    assert ledger_of(tmp_path).entries() == entries


def test_a_diverged_site_says_so_and_its_reservation_stays_spent(
    make: Callable[..., Site],
    adapted: AdaptedModel,
    context: PublicContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = adapted.read()
    # A learning rate that carries coordinates beyond float32 (their gradients are noise only: NaN counts as zero).
    edge = np.full_like(before, 3.3e38)
    # The self-test would refuse such a broadcast; here the divergence is to come in the training.
    monkeypatch.setattr(
        "secure_fedcollm.site.prove_records_independent", lambda tested, *_: Independence(model=tested.model)
    )
    site = make(learning_rate=3e37)
    failure = refused_training(site, adapted, context, edge)
    assert failure.code == "diverged"
    assert str(failure) == "site north: diverged"
    assert ledger_of(tmp_path).spent_in_run("run").steps == 2
    told = decode(site.handle("settle", receipt("left_out")), Settlement)
    assert (told.steps, told.epsilon, told.charged) == (2, DP_PLAN.epsilon(2), DP_PLAN.epsilon(4))
    assert kinds(tmp_path) == ["PLAN", "RESERVE", "SETTLE"]
    assert ledger_of(tmp_path).entries()[-1]["outcome"] == "failed"
    # The next broadcast repairs the shared model.
    train(make("south"), adapted, context, before)


@pytest.mark.parametrize("error", [FedCollmError, ModelError])
def test_only_a_code_leaves_the_site_and_the_detail_stays_in_its_log(
    make: Callable[..., Site],
    adapted: AdaptedModel,
    context: PublicContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[FedCollmError],
) -> None:
    def failing(**_: Any) -> None:
        raise error("patient Mary Long, door code 4711")

    monkeypatch.setattr("secure_fedcollm.site.train_private", failing)
    with caplog.at_level(logging.ERROR, logger="fedcollm"):
        failure = refused_training(make(), adapted, context)
    assert str(failure) == "site north: failed"
    assert failure.args == ("site north: failed",)
    assert vars(failure) == {"site": "north", "code": "failed"}
    assert "4711" in caplog.text


def test_what_leaves_a_site_holds_no_text_and_no_count(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, tiny_tokens: TokenDataset
) -> None:
    doubled = dataclasses.replace(
        tiny_tokens,
        examples=tuple(dataclasses.replace(e, unit=f"{e.unit}-{i}") for i in range(40) for e in tiny_tokens.examples),
    )
    sizes = set()
    for name, tokens in (("north", tiny_tokens), ("south", doubled)):
        site = make(name, tokens=tokens)
        upload = train(site, adapted, context)
        told = decode(site.handle("settle", receipt("included")), Settlement)
        sizes.add((len(upload), told.epsilon, told.charged, told.steps))
    assert len(sizes) == 1, "40 times the records must look the same"


# ---------------------------------------------------------------- without privacy, and without exchange


def test_a_declared_non_private_site_has_no_ledger_and_says_so(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, tmp_path: Path
) -> None:
    site = make(budget=NonPrivate(steps=2, batch_size=4, seed=0))
    assert refused_training(site, adapted, context).code == "declined", "a plan with privacy terms is another run's"
    decode(train(site, adapted, context, dp=None, attempt=2), UploadManifest)
    told = decode(site.handle("settle", receipt("included")), Settlement)
    assert (told.private, told.epsilon, told.unit, told.steps) == (False, -1.0, "none", 0)
    assert kinds(tmp_path) == ["PLAN"]


def test_training_alone_pays_and_settles_too(make: Callable[..., Site], adapted: AdaptedModel, tmp_path: Path) -> None:
    site, start = make(), adapted.read()
    moved = site.train_alone(start, 1)
    assert kinds(tmp_path) == ["PLAN", "RESERVE", "SETTLE"]
    assert (moved == adapted.read()).all()
    assert (moved != start).any()
    trained = [n for n, p in adapted.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_B" in name for name in trained)
