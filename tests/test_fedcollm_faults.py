"""The faults of the one published implementation of FedCoLLM, each with the test that would find it here.

FATE-LLM at commit 0c63377, read line by line, cannot run, and where it could, distillation would change nothing. The
tests are numbered as its faults; most run a whole round over real encryption with three sites of different size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.decryptor import Decryptor
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.ledger import Ledger
from fedcollm_privacy.messages import TrainRequest
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.secure_sum import MaskedSum
from fedcollm_privacy.wire import decode
from secure_fedcollm import distillation, losses
from secure_fedcollm.config import (
    AdapterConfig,
    Config,
    DataConfig,
    DistillationConfig,
    EvaluationConfig,
    FederationConfig,
    ModelConfig,
    SecureSumConfig,
)
from secure_fedcollm.evaluation import evaluate
from secure_fedcollm.folder import Checkpoint, RunFolder
from secure_fedcollm.models import AdaptedModel, merged_delta
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.records import Record
from secure_fedcollm.rounds import Federation, State, run_round
from secure_fedcollm.server import Server
from secure_fedcollm.server_optimizer import AdamState
from secure_fedcollm.site import NonPrivate, PrivateBudget, Site
from secure_fedcollm.tokenization import Batch, TokenDataset, tokenize
from secure_fedcollm.training import LocalTraining, train_non_private
from secure_fedcollm.transcript import Transcript
from secure_fedcollm.transport import InProcessTransport

from .secure_sums import NOW, Parties
from .site_policies import guard

LoadTiny = Callable[..., AdaptedModel]
Vector = np.ndarray[Any, np.dtype[np.float32]]

RATE, BITS, LOCAL_STEPS = 1e-2, 13, 2
HOW = LocalTraining(learning_rate=RATE, batch_tokens=256)
SIZES = {"small": 1, "medium": 2, "large": 5}
PUBLIC = (
    Record(prompt="What is a fever?", target=" A sign.", site=None, unit="a"),
    Record(prompt="Where does the patient rest in the morning?", target=" In bed, of course.", site=None, unit="b"),
    Record(prompt="", target="The evening is for rest.", site=None, unit="c"),
    Record(prompt="Is it better?", target=" It is better now, and it was worse then.", site=None, unit="d"),
)


def settings(aggregation: Any = "rebase", **distil: Any) -> Config:
    return Config(
        name="faults",
        method="fedcollm",
        private=False,
        seed=3,
        output_dir=None,
        device="cpu",
        data=DataConfig(
            task="text",
            declared="public",
            path=None,
            policy_dir=None,
            public_path=None,
            public_fraction=0.0,
            split="train",
            prompt_field=None,
            target_field=None,
            prompt_template=None,
            site_field=None,
            unit_field=None,
            partition="column",
            dirichlet_alpha=1.0,
            dirichlet_field=None,
            site_names=(),
            max_records_per_site=None,
            held_out_fraction=0.2,
            max_length=64,
        ),
        model=ModelConfig(slm=None, llm=None, dtype="float32", activation_checkpointing=False, llm_device_map=None),
        adapter=AdapterConfig(
            r=4, lora_alpha=8, lora_dropout=0.0, target_modules=None, site_ranks=None, aggregation=aggregation
        ),
        privacy=None,
        federation=FederationConfig(
            round_time_limit_s=3600,
            rounds=2,
            local_steps=LOCAL_STEPS,
            release="update",
            sites=3,
            min_contributors=3,
            exchange="secure_sum",
            pool=False,
            site_model="slm",
            learning_rate=RATE,
            batch_tokens=256,
            batch_size=4,
        ),
        distillation=DistillationConfig(
            **{
                "steps": 3,
                "warm_start_steps": 0,
                "batch_size": 4,
                "kd_weight": 1.0,
                "temperature": 1.0,
                "direction": "forward",
                "top_k": None,
                "alignment": "same",
                "train_slm": True,
                "train_llm": True,
                "slm_learning_rate": RATE,
                "llm_learning_rate": RATE,
            }
            | distil
        ),
        secure_sum=SecureSumConfig(value_bits=BITS, clip=None, threshold=None, max_colluding=1, max_mean_norm=None),
        evaluation=EvaluationConfig(every=1, max_records=8, generations=0, max_new_tokens=4),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Laboratory:
    """A federation whose parts can be looked at; every party has models of its own, as on machines of their own."""

    config: Config
    federation: Federation
    server: Server
    slm: AdaptedModel
    llm: AdaptedModel
    start: State
    public: TokenDataset
    parts: dict[str, TokenDataset]
    requests: list[tuple[str, TrainRequest]]

    def round(self, state: State, server_round: int = 1) -> State:
        outcome = run_round(self.federation, state, server_round, 1, BITS)
        assert outcome.outcome == "opened", outcome.reason
        assert sorted(outcome.cohort) == sorted(SIZES)
        return outcome.state


@pytest.fixture(scope="module")
def aggregator() -> Iterator[Aggregator]:
    with Aggregator() as process:
        yield process


@pytest.fixture
def laboratory(
    load_tiny: LoadTiny,
    tiny_tokens: TokenDataset,
    tiny_tokenizer: PreTrainedTokenizerFast,
    aggregator: Aggregator,
    tmp_path: Path,
) -> Callable[..., Laboratory]:
    made = 0

    parties = Parties.named(*SIZES)

    def build(config: Config | None = None, budget: Callable[[str], PrivateBudget] | None = None) -> Laboratory:
        nonlocal made
        made += 1
        config = config or settings()
        slm, llm = load_tiny("llama"), load_tiny("llama", width=48, seed=1)
        public = tokenize(PUBLIC, tiny_tokenizer, max_length=64, append_eos=True)
        progress = RunProgress(quiet=True)
        parts, first, sites = {}, 0, []
        for number, (name, size) in enumerate(SIZES.items()):
            parts[name] = dataclasses.replace(tiny_tokens, examples=tiny_tokens.examples[first : first + size])
            first += size
            sites.append(
                Site(
                    key=parties.sites[name],
                    guard=guard(name, parties.server.public, tmp_path / str(made), slm.spec.base_model),
                    contributor=parties.contributor(name, tmp_path / str(made)),
                    run_id="run",
                    adapted=load_tiny("llama"),
                    tokens=parts[name],
                    aggregation=config.adapter.aggregation,
                    run_rank=config.adapter.r,
                    budget=budget(name) if budget else NonPrivate(steps=LOCAL_STEPS, batch_size=4, seed=number),
                    how=HOW,
                    progress=progress,
                )
            )
        server = Server(
            config=config,
            run_id="run",
            slm=slm,
            llm=llm,
            public_tokens=public,
            sites=3,
            roster_digest=parties.roster.digest,
            terms=None if budget is None else budget("small").plan.terms,
            clock=lambda: NOW,
            progress=progress,
        )
        requests: list[tuple[str, TrainRequest]] = []

        def noted(site: Site) -> Callable[[str, bytes], bytes]:
            def handle(operation: str, body: bytes) -> bytes:
                if operation == "train":
                    requests.append((site.name, decode(body, TrainRequest)))
                return site.handle(operation, body)

            return handle

        transport = InProcessTransport({site.name: noted(site) for site in sites})
        transcript = Transcript(tmp_path / f"transcript{made}.jsonl")
        federation = Federation(
            server=server,
            transport=transport,
            secure_sum=MaskedSum(
                aggregator=aggregator,
                decryptor=Decryptor(parties.roster),
                key=parties.server,
                roster=parties.roster,
                channel=transport,
                witness=transcript.record,
            ),
            transcript=transcript,
            keep=lambda opened: None,
            heads=None,
            sites=tuple(sites),
        )
        return Laboratory(
            config=config,
            federation=federation,
            server=server,
            slm=slm,
            llm=llm,
            start=State(slm=slm.read(), llm=llm.read()),
            public=public,
            parts=parts,
            requests=requests,
        )

    return build


def updates(lab: Laboratory, load_tiny: LoadTiny, broadcast: Vector, server_round: int) -> dict[str, Vector]:
    """What each site's update must be, trained here from the broadcast without any federation."""
    clip, found = RATE * LOCAL_STEPS, {}
    for number, name in enumerate(SIZES):
        adapted = load_tiny("llama")
        adapted.write(broadcast)
        update = train_non_private(
            adapted=adapted,
            spec=adapted.shared_spec(lab.config.adapter.aggregation),
            tokens=lab.parts[name],
            steps=LOCAL_STEPS,
            batch_size=4,
            seed=number + 1_000_003 * server_round,
            how=HOW,
            on_step=lambda: None,
        )
        # Adam moves a few coordinates by a little more than a learning rate a step; they saturate on the grid.
        found[name] = np.clip(update.vector, -clip, clip)
    return found


def products(adapted: AdaptedModel, vector: Vector) -> Vector:
    """BA of all modules, which is what an adapter does, whatever its factors are."""
    adapted.write(vector)
    return torch.cat([delta.reshape(-1) for delta in merged_delta(adapted).values()]).float().numpy()


def test_01_a_whole_round_runs(laboratory: Callable[..., Laboratory]) -> None:
    """Fault 1: ``update_model`` used a name that was never imported; no round ever ran."""
    lab = laboratory()
    after = lab.round(lab.start)
    assert (after.slm != lab.start.slm).any()
    assert (after.llm != lab.start.llm).any()


@pytest.mark.parametrize("aggregation", ["rebase", "freeze_a", "factor_average"])
def test_02_the_aggregate_reaches_the_servers_slm(
    laboratory: Callable[..., Laboratory], load_tiny: LoadTiny, aggregation: str
) -> None:
    """Fault 2: the server called its context object, and the aggregation returned None; its SLM never moved."""
    lab = laboratory(settings(aggregation, steps=0))
    after = lab.round(lab.start)
    spec = lab.slm.shared_spec(lab.config.adapter.aggregation)
    lab.slm.write(lab.start.slm)
    mean = np.mean(list(updates(lab, load_tiny, lab.start.slm, 1).values()), axis=0)
    lab.slm.write(lab.slm.read(spec) + mean, spec)
    want = lab.slm.read()
    grid_step = RATE * LOCAL_STEPS / (2 ** (BITS - 1) - 1)
    if aggregation == "rebase":
        gap = np.abs(products(lab.slm, after.slm) - products(lab.slm, want)).max()
        assert gap < 4 * grid_step
        assert np.abs(products(lab.slm, want)).max() > 100 * gap
    else:
        assert np.abs(after.slm - want).max() <= 0.51 * grid_step
        assert np.abs(after.slm - lab.start.slm).max() > 100 * grid_step


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 4),
        ("batch_size", 2),
        ("kd_weight", 0.5),
        ("temperature", 2.0),
        ("direction", "reverse"),
        ("top_k", 2),
        ("train_slm", False),
        ("train_llm", False),
        ("slm_learning_rate", 0.5 * RATE),
        ("llm_learning_rate", 0.5 * RATE),
    ],
)
def test_03_and_04_every_setting_is_read_and_has_an_effect(
    laboratory: Callable[..., Laboratory], load_tiny: LoadTiny, field: str, value: Any
) -> None:
    """Faults 3 and 4: settings were read under names that did not exist (``metric_type`` and two epoch counts).

    Here the settings are frozen dataclasses without defaults and mypy checks each name; this shows that each is used.
    """
    assert {f.name for f in dataclasses.fields(DistillationConfig)} == {
        *("steps", "warm_start_steps", "batch_size", "kd_weight", "temperature", "direction", "top_k", "alignment"),
        *("train_slm", "train_llm", "slm_learning_rate", "llm_learning_rate"),
    }
    results = []
    for config in (settings("factor_average"), settings("factor_average", **{field: value})):
        lab = laboratory(config)
        slm = load_tiny("llama", trained=True).read()
        tuned = lab.server.co_tune(slm, lab.start.llm, 1)
        results.append(np.concatenate([tuned.slm, tuned.llm]))
    assert np.abs(results[0] - results[1]).max() > 0.05 * RATE


def test_05_one_data_set_serves_every_stage_and_rows_are_those_of_their_index(
    laboratory: Callable[..., Laboratory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 5: two data set types on one object, and ``indexes`` asked of rows that held ``idx``."""
    lab = laboratory(settings(steps=6, batch_size=3))
    seen: list[Batch] = []
    original = distillation.target_hidden_states

    def noted(trunk: Any, batch: Batch) -> Any:
        seen.append(batch)
        return original(trunk, batch)

    monkeypatch.setattr(distillation, "target_hidden_states", noted)
    lab.server.co_tune(lab.start.slm, lab.start.llm, 1)
    met = set()
    assert len(seen) == 12
    for for_slm, for_llm in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(for_slm.input_ids_BT, for_llm.input_ids_BT)
        for ids_T, mask_T, labels_T in zip(
            for_slm.input_ids_BT, for_slm.attention_mask_BT, for_slm.labels_BT, strict=True
        ):
            ids = tuple(ids_T[mask_T == 1].tolist())
            (index,) = (i for i, e in enumerate(lab.public.examples) if e.input_ids == ids)
            learnt = ids[lab.public.examples[index].target_start :]
            assert tuple(labels_T[labels_T != -100].tolist()) == learnt
            met.add(index)
    assert met == set(range(len(PUBLIC)))


def test_06_the_sites_get_the_distilled_slm(
    laboratory: Callable[..., Laboratory], load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 6: the distilled SLM was never sent; every client went on from the plain average."""
    lab = laboratory()
    aggregates: list[Vector] = []
    original = lab.server.apply

    def noted(adapter: Vector, adam: AdamState, opened: Any) -> tuple[Vector, AdamState]:
        applied = original(adapter, adam, opened)
        aggregates.append(applied[0])
        return applied

    monkeypatch.setattr(lab.server, "apply", noted)
    first = lab.round(lab.start, 1)
    lab.round(first, 2)
    plans = list(dict.fromkeys(r.plan_digest for _, r in lab.requests))
    broadcasts = {n: [r.adapter for _, r in lab.requests if r.plan_digest == plans[n - 1]] for n in (1, 2)}
    assert len(broadcasts[1]) == len(broadcasts[2]) == 3
    assert all(b.tobytes() == lab.start.slm.tobytes() for b in broadcasts[1])
    assert all(b.tobytes() == first.slm.tobytes() for b in broadcasts[2])
    # It is not the average, and it is the average after so many steps on the public text.
    distance = np.linalg.norm(products(lab.slm, first.slm) - products(lab.slm, aggregates[0]))
    assert distance > 0.1 * np.linalg.norm(products(lab.slm, aggregates[0]))
    lab.llm.write(lab.start.llm)
    lab.slm.write(aggregates[0])
    distillation.co_tune(
        slm=lab.slm,
        llm=lab.llm,
        tokens=lab.public,
        config=lab.config.distillation,
        train_slm_a=True,
        seed=lab.config.seed + 7_919,
        on_step=lambda: None,
    )
    assert np.allclose(products(lab.slm, lab.slm.read()), products(lab.slm, first.slm), atol=1e-6)
    # The sites train from it: the second aggregate is the broadcast and the mean of what is learnt from there.
    spec = lab.slm.shared_spec("rebase")
    lab.slm.write(first.slm)
    mean = np.mean(list(updates(lab, load_tiny, first.slm, 2).values()), axis=0)
    lab.slm.write(lab.slm.read(spec) + mean, spec)
    assert np.abs(lab.slm.read() - aggregates[1]).max() <= RATE * LOCAL_STEPS / (2 ** (BITS - 1) - 1)


def test_07_distillation_has_a_gradient_on_both_sides(laboratory: Callable[..., Laboratory]) -> None:
    """Fault 7: the student's logits were rebuilt as a detached copy; lambda had no effect."""
    results = []
    for kd_weight in (0.0, 1.0):
        lab = laboratory(settings("factor_average", kd_weight=kd_weight))
        tuned = lab.server.co_tune(lab.start.slm, lab.start.llm, 1)
        results.append((tuned.slm, tuned.llm))
    for without, with_kd in zip(*results, strict=True):
        assert np.abs(without - with_kd).max() > 0.1 * RATE


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_08_the_teacher_is_the_other_models_logits(
    load_tiny: LoadTiny, laboratory: Callable[..., Laboratory], top_k: int | None, direction: str
) -> None:
    """Fault 8: the indices of the top k were passed where their logits belong; equal models would have disagreed."""
    lab = laboratory()
    kls = {}
    for twin in (True, False):
        slm = load_tiny("llama", trained=True)
        llm = load_tiny("llama", trained=twin)
        report = distillation.co_tune(
            slm=slm,
            llm=llm,
            tokens=lab.public,
            config=dataclasses.replace(lab.config.distillation, steps=1, top_k=top_k, direction=direction),
            train_slm_a=True,
            seed=0,
            on_step=lambda: None,
        )
        kls[twin] = (report.slm_kl, report.llm_kl)
    assert kls[True] == pytest.approx((0.0, 0.0), abs=1e-6)
    assert min(kls[False]) > 1e-2


def reference_kl(
    slm: AdaptedModel, llm: AdaptedModel, tokens: TokenDataset, *, shifted: bool = True, softmax_first: bool = False
) -> torch.Tensor:
    """KL(LLM || SLM) of every target token by torch, record by record, with the faults as options."""
    values = []
    with torch.no_grad():
        for example in tokens.examples:
            ids = torch.tensor([example.input_ids])
            teacher, student = (m.model.eval()(input_ids=ids).logits[0] for m in (llm, slm))
            if softmax_first:
                student = torch.softmax(student, -1)
            kl_T = functional.kl_div(torch.log_softmax(student, -1), torch.softmax(teacher, -1), reduction="none").sum(
                -1
            )
            values.append(kl_T[example.target_start - 1 : -1] if shifted else kl_T[example.target_start :])
    return torch.cat(values)


def test_09_and_10_kl_is_the_mean_over_shifted_positions_of_one_softmax(
    load_tiny: LoadTiny, laboratory: Callable[..., Laboratory]
) -> None:
    """Fault 9: softmax twice. Fault 10: KL summed beside a mean of cross-entropy, and a mask that was not shifted."""
    lab = laboratory()

    def kl_of(tokens: TokenDataset) -> float:
        return distillation.co_tune(
            slm=load_tiny("llama", trained=True),
            llm=load_tiny("llama", width=48, trained=True),
            tokens=tokens,
            config=dataclasses.replace(lab.config.distillation, steps=1, batch_size=99),
            train_slm_a=True,
            seed=0,
            on_step=lambda: None,
        ).slm_kl

    slm, llm = load_tiny("llama", trained=True), load_tiny("llama", width=48, trained=True)
    ours, right = kl_of(lab.public), reference_kl(slm, llm, lab.public)
    assert ours == pytest.approx(float(right.mean()), rel=1e-5)
    for wrong in (
        reference_kl(slm, llm, lab.public, softmax_first=True).mean(),
        reference_kl(slm, llm, lab.public, shifted=False).mean(),
        right.sum(),
    ):
        assert abs(ours - float(wrong)) > 1e-3 * ours
    twice = dataclasses.replace(lab.public, examples=lab.public.examples * 2)
    assert kl_of(twice) == pytest.approx(ours, rel=1e-5)


def test_11_nothing_asks_for_a_gpu_and_no_step_holds_all_logits(
    laboratory: Callable[..., Laboratory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 11: ``.cuda()`` was written into the loop, with dense [B, S, V] arrays and a Python loop over tokens."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a GPU was asked for")

    for owner in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(owner, "cuda", refuse)
    monkeypatch.setattr(losses, "CHUNK_ROWS", 4)
    lab = laboratory(settings(steps=1))
    rows: list[int] = []
    for adapted in (lab.slm, lab.llm):
        head = adapted.model.get_base_model().get_output_embeddings()
        head.register_forward_hook(lambda _module, _inputs, output: rows.append(output.shape[:-1].numel()))
    lab.round(lab.start)
    targets = sum(len(e.input_ids) - e.target_start for e in lab.public.examples)
    assert sum(rows) >= 4 * targets > 100
    assert max(rows) <= 4


def test_12_both_models_step_together_and_as_often_as_distillation_says(
    laboratory: Callable[..., Laboratory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 12: all epochs of one model came before the other's, and their number was that of the clients' epochs.

    That a step is taken by both at the same (theta, omega) is shown against plain torch in ``test_distillation``
    (``test_every_step_is_that_of_the_equations``, ``test_neither_model_sees_the_others_new_step_first``).
    """
    lab = laboratory(settings("factor_average", steps=5))
    seen: list[tuple[Vector, Vector]] = []
    original, batches = distillation.collate, 0

    def noted(*arguments: Any) -> Batch:
        nonlocal batches
        if batches % 2 == 0:  # a step reads its records for both models before either moves
            seen.append((lab.slm.read(), lab.llm.read()))
        batches += 1
        return original(*arguments)

    monkeypatch.setattr(distillation, "collate", noted)
    lab.server.co_tune(lab.start.slm, lab.start.llm, 1)
    seen.append((lab.slm.read(), lab.llm.read()))
    assert (batches, len(seen)) == (2 * 5, 5 + 1)
    for (slm, llm), (next_slm, next_llm) in pairwise(seen):
        assert (slm != next_slm).any()
        assert (llm != next_llm).any()


def test_13_sites_start_equal_and_weigh_equal(laboratory: Callable[..., Laboratory], load_tiny: LoadTiny) -> None:
    """Fault 13: a mean weighted by private record counts, and clients that each drew an A of their own."""
    lab = laboratory(settings("freeze_a", steps=0))
    after = lab.round(lab.start)
    assert [name for name, _ in lab.requests] == sorted(SIZES)
    assert {r.adapter.tobytes() for _, r in lab.requests} == {lab.start.slm.tobytes()}
    assert load_tiny("llama").read().tobytes() == lab.start.slm.tobytes()
    found = updates(lab, load_tiny, lab.start.slm, 1)
    spec = lab.slm.shared_spec("freeze_a")
    lab.slm.write(lab.start.slm)
    before = lab.slm.read(spec)
    lab.slm.write(after.slm)
    moved = lab.slm.read(spec) - before
    grid_step = RATE * LOCAL_STEPS / (2 ** (BITS - 1) - 1)
    assert np.abs(moved - np.mean(list(found.values()), axis=0)).max() <= 0.51 * grid_step
    weighted = sum(SIZES[name] * vector for name, vector in found.items()) / sum(SIZES.values())
    assert np.abs(moved - weighted).max() > 100 * grid_step


def test_14_a_state_is_measured_kept_and_taken_up_again(
    laboratory: Callable[..., Laboratory], load_tiny: LoadTiny, tmp_path: Path
) -> None:
    """Fault 14: no evaluation, no saving, no checkpoint, no resume, no DP.

    Whole runs that are killed and resumed are in ``test_resume``, released adapters read by plain peft in
    ``test_models`` and ``test_run``; the private round is the next test.
    """
    lab = laboratory()
    first = lab.round(lab.start, 1)
    folder = RunFolder.create(str(tmp_path / "run"), "faults", {})
    folder.save_checkpoint(Checkpoint(server_round=1, state=first), lab.slm.spec.digest)
    uninterrupted = lab.round(first, 2)

    again = laboratory()
    kept = RunFolder.resume(str(tmp_path / "run"))[0].load_checkpoint(again.slm.spec.digest)
    assert kept is not None
    assert kept.server_round == 1
    resumed = again.round(kept.state, 2)
    assert resumed.slm.tobytes() == uninterrupted.slm.tobytes()
    assert resumed.llm.tobytes() == uninterrupted.llm.tobytes()

    for adapted, before, after in (
        (lab.slm, lab.start.slm, resumed.slm),
        (lab.llm, lab.start.llm, resumed.llm),
    ):
        losses_ = []
        for vector in (before, after):
            adapted.write(vector)
            metrics = evaluate(
                adapted.model, adapted.tokenizer, PUBLIC, max_length=64, append_eos=True, batch_tokens=256
            )
            losses_.append(metrics["loss"])
        assert losses_[1] < losses_[0]


def test_14_a_private_round_charges_every_ledger_and_moves_both_models(
    laboratory: Callable[..., Laboratory], tmp_path: Path
) -> None:
    plan = DpPlan(
        unit="record",
        max_records_per_unit=1,
        max_grad_norm=0.5,
        noise_multiplier=2.0,
        sample_rate=Fraction(1, 2),
        expected_batch_size=2,
        steps_per_round=LOCAL_STEPS,
        rounds=2,
        delta=1e-3,
    )
    ledgers = {name: Ledger(tmp_path / f"{name}.sqlite", SigningKey.generate(name)) for name in SIZES}
    for name, ledger in ledgers.items():
        ledger.commit_plan(run_id="run", data_set=name, plan=plan, caps=(Cap(epsilon=20.0, delta=0.1),))
    lab = laboratory(budget=lambda name: PrivateBudget(plan=plan, ledger=ledgers[name]))
    outcome = run_round(lab.federation, lab.start, 1, 1, BITS)
    assert outcome.outcome == "opened", outcome.reason
    assert (products(lab.slm, outcome.state.slm) != 0).mean() > 0.9
    assert (products(lab.llm, outcome.state.llm) != 0).mean() > 0.9
    assert {s.site: s.steps for s in outcome.settlements} == dict.fromkeys(SIZES, LOCAL_STEPS)
    assert all(s.private and 0 < s.epsilon <= plan.epsilon(plan.steps) for s in outcome.settlements)


@pytest.mark.parametrize(
    ("side", "steps"), [("slm_learning_rate", 1), ("slm_learning_rate", 4), ("llm_learning_rate", 4)]
)
def test_a_co_tuning_that_diverges_loses_the_round_and_nothing_else(
    laboratory: Callable[..., Laboratory], monkeypatch: pytest.MonkeyPatch, side: str, steps: int
) -> None:
    lab = laboratory(settings(steps=steps, **{side: 1e30}))
    outcome = run_round(lab.federation, lab.start, 1, 1, BITS)
    assert outcome.outcome == "lost"
    assert side in outcome.reason
    assert outcome.state is lab.start
    assert len(outcome.settlements) == 3
    # Nothing of it is left in the same parties' next round.
    monkeypatch.setattr(lab.server, "_config", settings())
    after = lab.round(lab.start, 2)
    fresh = laboratory().round(lab.start, 2)
    assert after.slm.tobytes() == fresh.slm.tobytes()
    assert after.llm.tobytes() == fresh.llm.tobytes()
