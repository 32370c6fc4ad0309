"""Distributed noise: each site adds a share, the opened sum carries all of it, also when sites drop out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedcollm_privacy import dp_sgd
from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.ckks import PublicContext, parameters_for
from fedcollm_privacy.clipping import ClippedSum
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import ConfigError, InvalidValue, SiteFailed
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.messages import NoisySum, RoundPlan, TrainRequest, vector_digest
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.quantization import on_grid
from fedcollm_privacy.secure_sum import MaskedSum
from fedcollm_privacy.secure_sum_messages import UploadManifest
from fedcollm_privacy.wire import decode, encode
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config
from secure_fedcollm.folder import Checkpoint, RunFolder
from secure_fedcollm.models import AdaptedModel, base_digest_of
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.rounds import State
from secure_fedcollm.run import run_embedded
from secure_fedcollm.server_optimizer import AdamState, adam_step
from secure_fedcollm.site import PrivateBudget, Site
from secure_fedcollm.strict_build import build
from secure_fedcollm.tokenization import TokenDataset
from secure_fedcollm.training import LocalTraining
from secure_fedcollm.transport import InProcessTransport

from .secure_sums import Parties, round_plan
from .site_policies import guard, write_policies
from .test_run import predicate_of

ALPHA = 1e-7
HONEST = 2
PLAN = DpPlan(
    unit="record",
    max_records_per_unit=1,
    max_grad_norm=0.5,
    noise_multiplier=1.5,
    sample_rate=Fraction(7, 8),
    expected_batch_size=4,
    steps_per_round=1,
    rounds=8,
    delta=1e-3,
    noise="distributed",
    least_honest=HONEST,
    release="gradient",
)


PARTIES = Parties.named("north", "south", "east", "west")
PARAMETERS = parameters_for(4, 18)


@pytest.fixture(scope="module")
def context() -> PublicContext:
    """A round's public key; nobody opens anything with it."""
    return Decryptor(PARTIES.roster).new_round_key(PARAMETERS)


@pytest.fixture
def adapted(load_tiny: Callable[..., AdaptedModel]) -> AdaptedModel:
    return load_tiny("llama", trained=True)


@pytest.fixture
def make(adapted: AdaptedModel, tiny_tokens: TokenDataset, tmp_path: Path) -> Callable[..., Site]:
    def site(name: str, plan: DpPlan = PLAN) -> Site:
        ledger = Ledger(tmp_path / f"{name}.sqlite", PARTIES.sites[name])
        ledger.commit_plan(run_id="run", data_set="notes", plan=plan, caps=(Cap(epsilon=1e3, delta=0.1),))
        return Site(
            key=PARTIES.sites[name],
            guard=guard(name, PARTIES.server.public, tmp_path, adapted.spec.base_model),
            contributor=PARTIES.contributor(name, tmp_path),
            run_id="run",
            adapted=adapted,
            tokens=tiny_tokens,
            aggregation="factor_average",
            run_rank=4,
            budget=PrivateBudget(plan=plan, ledger=ledger),
            how=LocalTraining(learning_rate=0.1, batch_tokens=64),
            progress=RunProgress(quiet=True),
        )

    return site


def plan_for(adapted: AdaptedModel, context: PublicContext, **changes: Any) -> RoundPlan:
    spec = adapted.shared_spec("factor_average")
    fields: dict[str, Any] = {
        "run_id": "run",
        "spec_digest": spec.digest,
        "adapter_digest": vector_digest(adapted.read()),
        "dimension": spec.dimension,
        "clip": PLAN.gradient_clip,
        "value_bits": 18,
        "roster_digest": PARTIES.roster.digest,
        "ckks": context.parameters,
        "key_digest": context.digest,
        "dp": PLAN.terms,
        "release": "gradient",
        "noise_multiplier": PLAN.noise_multiplier,
        "least_honest": HONEST,
    }
    return round_plan(**(fields | changes))


def train(site: Site, adapted: AdaptedModel, context: PublicContext, plan: RoundPlan) -> bytes:
    """Lead a site through the round until it has uploaded, its peers played by stand-ins."""
    PARTIES.bring_to_training(plan, {site.name: site.handle})
    request = TrainRequest(plan_digest=plan.digest, adapter=adapted.read(), public_key=context.to_bytes())
    return site.handle("train", encode(request))


@pytest.mark.parametrize("survivors", [3, 4])
def test_the_opened_sum_holds_the_noise_of_all_survivors_and_no_upload_does(
    make: Callable[..., Site],
    adapted: AdaptedModel,
    monkeypatch: pytest.MonkeyPatch,
    survivors: int,
) -> None:
    clipped: list[ClippedSum] = []
    released: list[NoisySum] = []
    original = dp_sgd.clipped_sum

    def noting(**arguments: Any) -> ClippedSum:
        clipped.append(original(**arguments))
        return clipped[-1]

    def noting_release(noisy: NoisySum, plan: RoundPlan) -> Any:
        released.append(noisy)
        return on_grid(noisy, plan)

    monkeypatch.setattr(dp_sgd, "clipped_sum", noting)
    monkeypatch.setattr("secure_fedcollm.site.on_grid", noting_release)
    names = ["north", "south", "east", "west"]
    transport = InProcessTransport({name: make(name).handle for name in names})
    secure_sum = MaskedSum(
        aggregator=Aggregator(time_limit_s=60),
        decryptor=Decryptor(PARTIES.roster),
        key=PARTIES.server,
        roster=PARTIES.roster,
        channel=transport,
        witness=lambda event, **facts: None,
    )
    context = secure_sum.begin(contributors=4, value_bits=18)
    plan = plan_for(adapted, context)
    # All four agree on masks; what is lost is lost before it has trained.
    assert sorted(secure_sum.enrol(plan)) == sorted(names)
    names = names[:survivors]
    request = TrainRequest(plan_digest=plan.digest, adapter=adapted.read(), public_key=context.to_bytes())
    replies = transport.ask("train", dict.fromkeys(names, encode(request)))
    opened = secure_sum.open(decode(reply.body or b"", UploadManifest) for reply in replies)
    secure_sum.close()
    assert sorted(opened.cohort) == sorted(names)
    np.testing.assert_array_equal(opened.total, np.sum([noisy.grid for noisy in released], axis=0))
    # The model's order of tensors is not the adapter's; variances do not mind.
    deviation = PLAN.noise_multiplier * PLAN.max_grad_norm / plan.grid_step
    sums = np.sort(np.abs(opened.total)).astype(float)
    assert sums.max() <= survivors * plan.levels
    order = _order(adapted)
    noise = (opened.total - np.sum([c.grid for c in clipped], axis=0)[order]) / deviation
    low, high = stats.chi2.ppf([ALPHA, 1 - ALPHA], noise.size)
    assert low < (noise**2).sum() * HONEST / survivors < high
    assert (noise**2).mean() > 1  # at least the whole of sigma, for 3 as for 4 survivors
    assert stats.kstest(noise * math.sqrt(HONEST / survivors), stats.norm.cdf).pvalue > ALPHA
    alone = (released[0].grid - clipped[0].grid[order]) / deviation
    assert low < (alone**2).sum() * HONEST < high


def _order(adapted: AdaptedModel) -> np.ndarray[Any, Any]:
    """Positions of the adapter's coordinates in the model's own order."""
    spec = adapted.shared_spec("factor_average")
    sizes = {n: p.numel() for n, p in adapted.model.named_parameters() if n in spec.names}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    return np.concatenate([np.arange(starts[name], starts[name] + sizes[name]) for name in spec.names])


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": PLAN.noise_multiplier * 0.99},
        {"noise_multiplier": PLAN.noise_multiplier * 2},
        {"least_honest": 1},
        {"dp": replace(PLAN.terms, max_grad_norm=2.0)},
        {"dp": replace(PLAN.terms, noise="local")},
        {"dp": None},
        {"clip": PLAN.gradient_clip * 2},
        {"release": "update"},
    ],
    ids=lambda changes: "-".join(map(str, next(iter(changes.items())))),
)
def test_a_round_that_is_not_what_the_sites_plan_promises_is_declined_at_no_cost(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext, tmp_path: Path, changes: dict[str, Any]
) -> None:
    site = make("north")
    with pytest.raises(SiteFailed) as failure:
        train(site, adapted, context, plan_for(adapted, context, **changes))
    assert failure.value.code == "declined"
    assert [entry["kind"] for entry in Ledger(tmp_path / "north.sqlite", PARTIES.sites["north"]).entries()] == ["PLAN"]


def test_a_site_that_sends_updates_declines_a_round_of_gradients(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext
) -> None:
    site = make("north", replace(PLAN, noise="local", release="update"))
    with pytest.raises(SiteFailed) as failure:
        train(site, adapted, context, plan_for(adapted, context))
    assert failure.value.code == "declined"


def test_a_grid_too_coarse_for_the_adapter_is_refused(
    make: Callable[..., Site], adapted: AdaptedModel, context: PublicContext
) -> None:
    with pytest.raises(SiteFailed):
        train(make("north"), adapted, context, plan_for(adapted, context, value_bits=6))


def test_no_round_counts_on_more_honest_sites_than_a_sum_must_hold(
    adapted: AdaptedModel, context: PublicContext
) -> None:
    with pytest.raises(InvalidValue, match="least_honest"):
        plan_for(adapted, context, least_honest=3)


def test_a_gradient_off_the_rounds_grid_is_refused(adapted: AdaptedModel, context: PublicContext) -> None:
    plan = plan_for(adapted, context)
    grid = np.zeros(plan.dimension, dtype=np.int64)
    on_grid(NoisySum(grid=grid, grid_step=plan.grid_step), plan)
    with pytest.raises(InvalidValue, match="grid_step"):
        on_grid(NoisySum(grid=grid, grid_step=2 * plan.grid_step), plan)
    with pytest.raises(InvalidValue, match="in a gradient round"):
        on_grid(NoisySum(grid=grid, grid_step=plan.grid_step), replace(plan, release="update"))
    with pytest.raises(InvalidValue, match="coordinates"):
        on_grid(NoisySum(grid=grid[1:], grid_step=plan.grid_step), plan)
    beyond = grid.copy()
    beyond[3] = -plan.levels - 1
    with pytest.raises(InvalidValue, match="beyond the grid"):
        on_grid(NoisySum(grid=beyond, grid_step=plan.grid_step), plan)


# ---------------------------------------------------------------- why rounding each share costs nothing


def rounded_gaussian(deviation: float, reach: int) -> np.ndarray[Any, Any]:
    edges = (np.arange(-reach, reach + 2) - 0.5) / deviation
    # From the nearer tail, or the far tails would be differences of ones.
    return np.where(edges[:-1] < 0, np.diff(stats.norm.cdf(edges)), -np.diff(stats.norm.sf(edges)))


def randomly_rounded_gaussian(deviation: float, reach: int) -> np.ndarray[Any, Any]:
    """Of round(S + U), S of twice the variance, U uniform on [-1/2, 1/2]: a function of one Gaussian of the sum."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    steps = np.arange(-reach, reach + 1)[:, None] - nodes / 2
    sigma = deviation * math.sqrt(2)
    upper, lower = (steps + 0.5) / sigma, (steps - 0.5) / sigma
    mass = np.where(
        upper < 0, stats.norm.cdf(upper) - stats.norm.cdf(lower), stats.norm.sf(lower) - stats.norm.sf(upper)
    )
    return np.asarray(mass @ (weights / 2))


@pytest.mark.parametrize(("deviation", "equal"), [(16.0, True), (3.0, True), (0.3, False)])
def test_a_sum_of_rounded_noises_is_one_gaussian_randomly_rounded(deviation: float, equal: bool) -> None:
    """So what is opened is post-processing of the Gaussian mechanism; with noise finer than the grid it is not."""
    reach = math.ceil(14 * deviation) + 2
    share = rounded_gaussian(deviation, reach)
    ours = np.convolve(share, share)
    ideal = randomly_rounded_gaussian(deviation, 2 * reach)
    assert bool(np.abs(ours - ideal).sum() < 1e-13) is equal


# ---------------------------------------------------------------- the server's optimizer


def test_the_servers_adam_is_torchs_with_its_state_handed_over() -> None:
    rng = np.random.default_rng(0)
    vector, gradients = rng.standard_normal(50).astype(np.float32), rng.standard_normal((6, 50)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(vector.copy()))
    optimizer = torch.optim.Adam([parameter], lr=0.05)
    state = AdamState()
    for gradient in gradients:
        vector, state = adam_step(vector, gradient, state, learning_rate=0.05)
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        np.testing.assert_array_equal(vector, parameter.detach().numpy())
    assert state.steps == 6


def test_the_servers_optimizer_outlives_a_crash(tmp_path: Path) -> None:
    folder = RunFolder.create(str(tmp_path / "run"), "notes", {"seed": 1})
    vector = np.ones(5, dtype=np.float32)
    adam = AdamState(steps=3, first=vector * 0.1, second=vector * 0.2)
    folder.save_checkpoint(Checkpoint(server_round=3, state=State(slm=vector, llm=vector, adam=adam)), "spec")
    back = folder.load_checkpoint("spec")
    assert back is not None
    assert back.state.adam.steps == 3
    np.testing.assert_array_equal(back.state.adam.first, adam.first)
    np.testing.assert_array_equal(back.state.adam.second, adam.second)


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def launch(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    monkeypatch.setenv("FEDCOLLM_HOME", str(tmp_path / "home"))
    notes = tmp_path / "notes.jsonl"
    words = ["the", "ward", "noted", "calm", "breath", "fever", "rest", "water"]
    rng = np.random.default_rng(0)

    digest = base_digest_of(str(tiny_checkpoint("llama")), "float32")

    def start(*overrides: str, declared: str = "private", unequal: bool = False) -> dict[str, Any]:
        # Sites that differ in size differ in their own calibrations, and each of those takes seconds.
        rows = [
            {"text": " ".join(rng.choice(words, 6)) + f" {s}{i}.", "site": f"s{s}"}
            for s in range(4)
            for i in range(40 + 9 * s * unequal)
        ]
        if not notes.exists():
            notes.write_text("".join(json.dumps(row) + "\n" for row in rows))
            write_policies(tmp_path / "home", [f"s{site}" for site in range(4)], notes, digest)
        plain = compose_config(
            [
                f"data.path={notes}",
                f"data.declared={declared}",
                "data.partition=column",
                "data.site_field=site",
                "data.max_length=32",
                f"model.slm={tiny_checkpoint('llama')}",
                f"model.llm={tiny_checkpoint('llama', width=64)}",
                f"output_dir={tmp_path / 'out'}",
                "federation.rounds=3",
                "distillation.steps=1",
                "distillation.batch_size=4",
                "privacy.expected_batch_size=8",
                "evaluation.max_records=8",
                "evaluation.generations=0",
                "adapter.r=2",
                *overrides,
            ]
        )
        config = build(Config, plain)
        return run_embedded(config, RunFolder.create(config.output_dir, config.name, plain), RunProgress(quiet=True))

    return start


def test_every_output_of_a_run_states_what_distributed_noise_needs(
    launch: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    summary = launch("privacy=distributed", unequal=True)
    out = tmp_path / "out"
    statement = predicate_of(out)
    assert "at least 2 honest sites" in summary["note"]
    assert "at least 2 honest sites" in statement["trust_model"]
    assert "opened sums" in statement["claim"]
    each_update = next(claim for claim in summary["claims"] if claim["claim"].startswith("Each site's update"))
    assert each_update["holds"] is False
    assert "at least 2 honest sites" in (out / "slm_adapter" / "README.md").read_text()
    report = (out / "report.html").read_text()
    assert "PRIVATE IN SUMS" in report
    assert "ε of one update" in report
    assert "a share of the noise" in report
    assert "towards whoever sees sums only" in report
    plans = [site["plan"] for site in statement["sites"].values()]
    assert {(p["noise"], p["least_honest"], p["release"]) for p in plans} == {("distributed", 2, "gradient")}
    # Unequal sites, equal noise: each relies on the shares of the others.
    assert len({p["noise_multiplier"] for p in plans}) == 1
    assert len({p["sample_rate"] for p in plans}) > 1
    for site, row in summary["sites"].items():
        views = statement["sites"][site]["views"]
        assert row["epsilon"] <= 8.0 < row["epsilon_one_update"]
        assert views == {"one_update_seen": row["epsilon_one_update"], "only_sums_and_models_seen": row["epsilon"]}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["before", "opened", "opened", "opened"]
    assert all(row["observed"] == {} for row in rows), "clipping and signal of private records must not be told"


def test_clipping_and_signal_are_told_where_records_are_public(
    launch: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    launch("privacy=distributed", declared="public")
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(set(row["observed"]) == {"s0", "s1", "s2", "s3"} for row in rows[1:])
    assert all(site["signal_to_noise"] > 0 for row in rows[1:] for site in row["observed"].values())


def test_local_noise_may_release_gradients_too(launch: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = launch("privacy=distributed", "privacy.noise=local")
    statement = predicate_of(tmp_path / "out")
    for site, row in summary["sites"].items():
        views = statement["sites"][site]["views"]
        assert views["one_update_seen"] == row["epsilon"] <= 8.0
        assert views["only_sums_and_models_seen"] < row["epsilon"]
    assert "single upload" not in summary["note"]
    assert summary["claims"][0]["holds"] is True


def test_a_seeded_run_repeats_itself_and_says_not_private_everywhere(
    launch: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    seeded = ("privacy.insecure_test_seed=5", "federation.local_steps=2", "federation.rounds=1")
    one = launch(*seeded, declared="synthetic")
    out = tmp_path / "out"
    assert one["private"] is False
    assert "NOT PRIVATE" in one["note"]
    assert all(row["epsilon"] is None for row in one["sites"].values())
    assert "NOT PRIVATE" in predicate_of(out)["claim"]
    assert "NOT PRIVATE" in (out / "report.html").read_text()
    assert "NOT PRIVATE" in (out / "llm_adapter" / "README.md").read_text()
    entries = [json.loads(line) for line in (out / "ledgers" / "s0.jsonl").read_text().splitlines()]
    assert entries[1]["plan"]["randomness"] == "insecure_test_seed"
    out.rename(tmp_path / "first")
    two = launch(*seeded, declared="synthetic")
    assert (one["slm"], one["llm"]) == (two["slm"], two["llm"])
    (tmp_path / "out").rename(tmp_path / "second")
    other = launch("privacy.insecure_test_seed=6", *seeded[1:], declared="synthetic")
    assert other["slm"] != one["slm"]


def test_private_records_are_never_trained_with_a_seed(launch: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="insecure_test_seed"):
        launch("privacy.insecure_test_seed=5")


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("privacy.noise=distributed",), "privacy.noise"),
        (("privacy=distributed", "federation.local_steps=3"), "federation.local_steps"),
        (("privacy=distributed", "adapter.aggregation=rebase"), "adapter.aggregation"),
        (("privacy=distributed", "privacy.least_honest=4"), "privacy.least_honest"),
        (("privacy=distributed", "method=standalone", "distillation.steps=0"), "federation.release"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(
    launch: Callable[..., dict[str, Any]], overrides: tuple[str, ...], field: str
) -> None:
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        launch(*overrides)


def test_automatic_clipping_runs_end_to_end(launch: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    launch("privacy.clipping=automatic", "federation.local_steps=2")
    statement = predicate_of(tmp_path / "out")
    assert {site["plan"]["clipping"] for site in statement["sites"].values()} == {"automatic"}
