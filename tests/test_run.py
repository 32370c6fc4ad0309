"""Whole runs through the command line's own path, on small real architectures with random weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedcollm_privacy import secure_sum as secure_sum_module
from fedcollm_privacy.dsse import Envelope
from fedcollm_privacy.entries import verify_chain
from fedcollm_privacy.errors import BudgetExceeded, ConfigError, FedCollmError
from fedcollm_privacy.identity import PublicIdentity
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.messages import OpenedSum
from secure_fedcollm import server as server_module
from secure_fedcollm import site as site_module
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config
from secure_fedcollm.evaluation import evaluate
from secure_fedcollm.folder import RunFolder
from secure_fedcollm.models import base_digest_of
from secure_fedcollm.progress import RunProgress
from secure_fedcollm.run import run_embedded
from secure_fedcollm.strict_build import build

from .audit_answers import failing
from .site_policies import write_policies
from .tiny_deployment import WORDS

Launch = Callable[..., dict[str, Any]]


def predicate_of(out: Path) -> dict[str, Any]:
    """What a run's signed statement says."""
    predicate: dict[str, Any] = json.loads(Envelope.from_bytes((out / "statement.json").read_bytes()).payload)[
        "predicate"
    ]
    return predicate


def write_notes(path: Path, sites: int, rows_per_site: int, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    with path.open("w") as file:
        for site in range(sites):
            for row in range(rows_per_site):
                words = generator.choice(WORDS, size=int(generator.integers(3, 9)))
                record = {
                    "text": f"{' '.join(words)} {site}{row}.",
                    "site": f"s{site:02d}",
                    "person": f"p{site}-{row // 2}",
                }
                file.write(json.dumps(record) + "\n")
    return path


SMALL = (
    "federation.rounds=2",
    "federation.local_steps=2",
    "federation.batch_size=4",
    "distillation.batch_size=4",
    "privacy.expected_batch_size=8",
    "privacy.delta=1e-5",
    "evaluation.max_records=8",
    "evaluation.generations=1",
    "evaluation.max_new_tokens=4",
    "data.max_length=32",
    "adapter.r=2",
)


@pytest.fixture
def launch(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Compose, build and run, as `fedcollm run` does; gives the summary."""
    monkeypatch.setenv("FEDCOLLM_HOME", str(tmp_path / "home"))

    def start(*overrides: str, sites: int = 3, rows: int = 40, output: str = "out") -> dict[str, Any]:
        notes = write_notes(tmp_path / f"notes{sites}.jsonl", sites, rows)
        given = [
            f"data.path={notes}",
            "data.partition=column",
            "data.site_field=site",
            f"model.slm={tiny_checkpoint('llama')}",
            f"model.llm={tiny_checkpoint('llama', width=64)}",
            f"output_dir={tmp_path / output}",
            *SMALL,
            *([] if any(o.startswith("method=") for o in overrides) else ["distillation.steps=2"]),
            *overrides,
        ]
        if "private=false" in overrides:
            given = [o for o in given if not o.startswith("privacy.")] + ["~privacy"]
        plain = compose_config(given)
        config = build(Config, plain)
        digest = base_digest_of(str(config.model.slm), "float32")
        unit = "record" if config.privacy is None else config.privacy.unit
        write_policies(tmp_path / "home", [f"s{site:02d}" for site in range(sites)], notes, digest, unit)
        folder = RunFolder.create(config.output_dir, config.name, plain)
        return run_embedded(config, folder, RunProgress(quiet=True))

    return start


def test_own_text_runs_with_three_settings_and_leaves_every_output(launch: Launch, tmp_path: Path) -> None:
    summary = launch()
    out = tmp_path / "out"
    for name in ("summary.json", "metrics.jsonl", "statement.json", "transcript.jsonl", "config.yaml", "report.html"):
        assert (out / name).stat().st_size > 0, name
    assert summary["private"] is True
    assert summary["declared"] == "private"
    assert set(summary["sites"]) == {"s00", "s01", "s02"}
    for site, row in summary["sites"].items():
        assert 0 < row["epsilon"] <= 8.0
        assert row["steps"] == 4
        lines = [json.loads(line) for line in (out / "ledgers" / f"{site}.jsonl").read_text().splitlines()]
        kinds = ["LEDGER", "PLAN", *["RESERVE", "SETTLE"] * 2, "STATEMENT", *["HEAD"] * 4]
        assert [line["kind"] for line in lines] == kinds
        identity = PublicIdentity(name=site, public_key=bytes.fromhex(lines[0]["public_key"]))
        assert verify_chain(lines[1:7], identity) == []
        assert [line["head"]["tree_size"] for line in lines[7:]] == [1, 3, 5, 6]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["outcome"] for r in rows] == ["before", "opened", "opened"]
    assert rows[1]["slm"] != rows[0]["slm"]
    assert rows[1]["llm"] != rows[0]["llm"]


def test_private_data_is_never_measured(launch: Launch, tmp_path: Path) -> None:
    summary = launch()
    assert "public records that nothing was trained on" in summary["note"]
    text = (tmp_path / "out" / "report.html").read_text() + (tmp_path / "out" / "summary.json").read_text()
    notes = (tmp_path / "notes3.jsonl").read_text().splitlines()
    assert not any(json.loads(line)["text"] in text for line in notes)


@pytest.mark.parametrize("sites", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 16))])
def test_the_encrypted_sum_is_the_plain_integer_sum_in_every_round(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, sites: int
) -> None:
    grids: list[np.ndarray] = []
    opened: list[OpenedSum] = []
    quantize, open_sum = site_module.quantize, secure_sum_module.MaskedSum.open

    def recording_quantize(update: Any, plan: Any) -> Any:
        result = quantize(update, plan)
        grids.append(result.grid)
        return result

    def recording_open(self: Any, uploads: Any) -> OpenedSum:
        result = open_sum(self, uploads)
        opened.append(result)
        return result

    monkeypatch.setattr(site_module, "quantize", recording_quantize)
    monkeypatch.setattr(secure_sum_module.MaskedSum, "open", recording_open)
    launch(sites=sites)
    assert len(opened) == 2
    assert len(grids) == 2 * sites
    for server_round, result in enumerate(opened):
        plain = np.sum(grids[server_round * sites : (server_round + 1) * sites], axis=0)
        assert np.any(plain != 0)
        np.testing.assert_array_equal(result.total, plain)
        assert len(result.cohort) == sites


def test_sites_of_two_ranks_are_one_sum_and_every_component_has_the_mean_of_the_sites_that_fill_it(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against the mean of what the sites say their updates are, component by component."""
    grids: list[tuple[int, np.ndarray]] = []
    means: list[np.ndarray] = []
    steps: list[float] = []
    quantize, apply = site_module.quantize, server_module.Server.apply

    def recording_quantize(update: Any, plan: Any) -> Any:
        result = quantize(update, plan)
        grids.append((plan.server_round, result.grid))
        return result

    def recording_apply(self: Any, adapter: Any, adam: Any, opened: OpenedSum) -> Any:
        self._slm.write(adapter)
        before = self._slm.read(self._spec)
        result = apply(self, adapter, adam, opened)
        means.append(self._slm.read(self._spec) - before)
        steps.append(opened.plan.grid_step)
        return result

    monkeypatch.setattr(site_module, "quantize", recording_quantize)
    monkeypatch.setattr(server_module.Server, "apply", recording_apply)
    launch("adapter.r=3", "adapter.site_ranks={s01: 1, s04: 2}", sites=5)
    assert failing(tmp_path / "out") == set()
    events = [json.loads(line) for line in (tmp_path / "out" / "transcript.jsonl").read_text().splitlines()]
    terms = [event["terms"] for event in events if event["event"] == "plan"]
    assert [(t["narrow_sites"], t["narrow_ranks"]) for t in terms] == [(["s01", "s04"], [1, 2])] * 2
    assert len(means) == 2
    for number, (mean, step) in enumerate(zip(means, steps, strict=True), start=1):
        # All tensors that travel are B [out, 3]: a coordinate's component is its place modulo 3.
        sent = np.array([grid for server_round, grid in grids if server_round == number]).reshape(5, -1, 3) * step
        assert [[bool(site[:, c].any()) for c in range(3)] for site in sent] == [
            [True, True, True],
            [True, False, False],
            [True, True, True],
            [True, True, True],
            [True, True, False],
        ]
        want = sent.sum(0) / np.array([5, 4, 3])
        np.testing.assert_allclose(mean.reshape(-1, 3), want, atol=1e-7)


def test_a_sum_beyond_its_norm_changes_no_model_and_the_budget_stays_spent(launch: Launch, tmp_path: Path) -> None:
    with pytest.raises(FedCollmError, match="all 2 rounds were lost"):
        launch("secure_sum.max_mean_norm=1e-9")
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["before", "lost", "lost"]
    assert rows[0]["slm"] == rows[2]["slm"]
    assert rows[2]["epsilon"]["s00"] > rows[1]["epsilon"]["s00"] > 0
    outcomes = [e["outcome"] for e in LedgerFile(tmp_path / "home" / "ledgers" / "s00.sqlite").entries()[2::2]]
    assert outcomes == ["lost", "lost"]


def test_a_site_that_sends_a_million_times_its_update_is_held_at_the_range_or_loses_the_round(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize, norms, sent = site_module.quantize, [], []

    def poisoned(update: Any, plan: Any) -> Any:
        hostile = len(sent) % 3 == 0
        vector = update.vector * np.float32(1e6) if hostile else update.vector
        result = quantize(dataclasses.replace(update, vector=vector), plan)
        sent.append(result.grid)
        norms.append(plan.max_mean_norm)
        return result

    monkeypatch.setattr(site_module, "quantize", poisoned)
    rows = launch()
    assert rows["rounds_lost"] == 0
    levels = 2**12 - 1
    assert max(int(np.abs(grid).max()) for grid in sent) == levels
    assert all(np.abs(grid).mean() > 0.9 * levels for grid in sent[::3])
    # With a limit just below what that site alone makes of the mean, every round is lost.
    limit = 0.9 * norms[0] / 3
    sent.clear()
    with pytest.raises(FedCollmError, match="rounds were lost"):
        launch(f"secure_sum.max_mean_norm={limit}", "privacy.cap_epsilon=100", output="gated")


@pytest.mark.parametrize("aggregation", ["rebase", "freeze_a", "factor_average"])
def test_every_aggregation_kind_runs_and_sends_what_it_should(launch: Launch, aggregation: str) -> None:
    summary = launch(f"adapter.aggregation={aggregation}")
    whole = summary["models"]["slm"]["adapter_parameters"]
    if aggregation == "factor_average":
        assert summary["uploaded_parameters"] == whole
    else:
        assert summary["uploaded_parameters"] < whole


METHODS = {
    "zero_shot": (False, False),
    "standalone": (True, False),
    "fedavg": (True, False),
    "fedavg_public": (True, True),
    "llm_to_slm": (True, False),
    "fedcollm": (True, True),
    "centralised_slm": (True, False),
    "centralised_llm": (False, True),
}


@pytest.mark.parametrize(("method", "moves"), METHODS.items())
def test_every_method_is_a_setting_and_moves_only_what_it_should(
    launch: Launch, method: str, moves: tuple[bool, bool]
) -> None:
    rounds = "federation.rounds=0" if method == "zero_shot" else "federation.rounds=1"
    distils = method in ("fedcollm", "fedavg_public", "llm_to_slm")
    # Private records are not pooled: they would be charged to another ledger than their sites'.
    declared = "public" if method.startswith("centralised") else "private"
    settings = [f"data.declared={declared}", *(["distillation.steps=2"] if distils else [])]
    summary = launch(f"method={method}", rounds, *settings)
    for name, moved in zip(("slm", "llm"), moves, strict=True):
        assert (summary[name]["before"]["loss"] != summary[name]["after"]["loss"]) is moved, name


def test_released_adapters_load_with_plain_peft_and_reproduce_the_metric(
    launch: Launch, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    summary = launch("data.declared=public", "data.public_fraction=0.2")
    from secure_fedcollm.assembly import _test_records
    from secure_fedcollm.data import load

    config = build(Config, RunFolder.resume(str(tmp_path / "out"))[1])
    data = load(config.data, sites=config.federation.sites, seed=config.seed, unit="record")
    records, _ = _test_records(config, data)
    for name, width in (("slm", 32), ("llm", 64)):
        base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama", width=width), dtype=torch.float32)
        model = PeftModel.from_pretrained(base, tmp_path / "out" / f"{name}_adapter")
        tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama", width=width))
        again = evaluate(model, tokenizer, records, max_length=32, append_eos=True, batch_tokens=512)
        assert again["loss"] == pytest.approx(summary[name]["after"]["loss"], rel=1e-5)
        card = (tmp_path / "out" / f"{name}_adapter" / "README.md").read_text()
        assert "epsilon" in card
        assert "Not covered" in card


def test_a_non_private_run_says_so_in_every_output(launch: Launch, tmp_path: Path) -> None:
    summary = launch("private=false", "federation.rounds=1")
    out = tmp_path / "out"
    assert summary["private"] is False
    assert "NOT PRIVATE" in summary["note"]
    assert "NOT PRIVATE" in (out / "report.html").read_text().upper()
    assert "NOT PRIVATE" in (out / "slm_adapter" / "README.md").read_text()
    assert predicate_of(out)["private"] is False
    assert all(row["epsilon"] is None for row in summary["sites"].values())
    assert not (out / "ledgers").exists()


def test_privacy_cannot_be_switched_off_by_leaving_it_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="privacy"):
        build(Config, compose_config(["~privacy"]))
    with pytest.raises(ConfigError, match="private = True"):
        build(Config, compose_config(["~privacy", "~experiment"]))
    with pytest.raises(ConfigError, match="private = False"):
        build(Config, compose_config(["private=false"]))


def test_persons_are_the_unit_when_asked_for(launch: Launch) -> None:
    summary = launch(
        "privacy.unit=person",
        "privacy.max_records_per_unit=2",
        "data.unit_field=person",
        "privacy.expected_batch_size=4",
    )
    assert {row["unit"] for row in summary["sites"].values()} == {"person"}


def test_the_second_run_on_private_data_is_refused_when_the_cap_is_reached(launch: Launch, tmp_path: Path) -> None:
    launch(output="first")
    with pytest.raises(BudgetExceeded, match="Nothing was spent"):
        launch(output="second")
    ledger = LedgerFile(tmp_path / "home" / "ledgers" / "s00.sqlite")
    assert [e["kind"] for e in ledger.entries()].count("PLAN") == 1


def test_a_site_with_too_few_records_is_refused_before_training(launch: Launch) -> None:
    with pytest.raises(FedCollmError, match="expected_batch_size"):
        launch("privacy.expected_batch_size=64")
    with pytest.raises(FedCollmError, match="delta"):
        launch("privacy.delta=0.2", output="other")


def test_fewer_sites_than_contributors_is_refused(launch: Launch) -> None:
    with pytest.raises(ConfigError, match="min_contributors"):
        launch(sites=2)


def diverge(sites: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train = site_module.train_private

    def broken(**arguments: Any) -> Any:
        update = train(**arguments)
        if broken.site in sites:
            return type(update)(
                vector=np.full_like(update.vector, np.nan),
                spec_digest=update.spec_digest,
                reservation=update.reservation,
            )
        return update

    handle = site_module.Site.handle

    def watching(self: Any, operation: str, body: bytes) -> bytes:
        broken.site = self.name
        return handle(self, operation, body)

    broken.site = ""
    monkeypatch.setattr(site_module, "train_private", broken)
    monkeypatch.setattr(site_module.Site, "handle", watching)


def test_a_diverged_site_is_left_out_and_the_others_go_on(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverge(["s02"], monkeypatch)
    summary = launch(sites=4)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["outcome"] == "opened"
    assert rows[1]["left_out"] == {"s02": "diverged"}
    assert rows[1]["cohort"] == ["s00", "s01", "s03"]
    assert summary["rounds_lost"] == 0


def test_too_many_diverged_sites_lose_the_round_and_nothing_else(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverge(["s02"], monkeypatch)
    with pytest.raises(FedCollmError, match="rounds were lost"):
        launch(sites=3)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [r["outcome"] for r in rows] == ["before", "lost", "lost"]
    assert rows[1]["slm"] == rows[0]["slm"]
    entries = LedgerFile(tmp_path / "home" / "ledgers" / "s00.sqlite").entries()
    assert [e["outcome"] for e in entries if e["kind"] == "SETTLE"] == ["lost", "lost"]


def test_no_upload_and_no_key_lies_in_the_run_folder(launch: Launch, tmp_path: Path) -> None:
    launch()
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"FCLM" not in content, path  # no wire message was stored
            assert b"secret_key" not in content, path


def test_the_report_asks_nobody_for_anything(launch: Launch, tmp_path: Path) -> None:
    launch()
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_a_warm_start_moves_both_models_before_any_site_trains_and_every_site_gets_it(
    launch: Launch, tmp_path: Path
) -> None:
    warm = "distillation.warm_start_steps=3"
    summary = launch(warm, "federation.rounds=1", "data.declared=synthetic", "data.public_fraction=0.2")
    events = [json.loads(line) for line in (tmp_path / "out" / "transcript.jsonl").read_text().splitlines()]
    (begun,) = (event for event in events if event["event"] == "start")
    (plan,) = (event for event in events if event["event"] == "plan")
    assert plan["terms"]["adapter_digest"] == begun["slm"]  # what is broadcast first is the warm one
    cold = launch("federation.rounds=1", "data.declared=synthetic", "data.public_fraction=0.2", output="cold")
    others = [json.loads(line) for line in (tmp_path / "cold" / "transcript.jsonl").read_text().splitlines()]
    (other,) = (event for event in others if event["event"] == "start")
    assert begun["slm"] != other["slm"]
    assert begun["llm"] != other["llm"]
    assert summary["slm"]["before"] == cold["slm"]["before"]  # what is called before is before the warm start too
    for site, row in summary["sites"].items():
        assert row["epsilon"] == cold["sites"][site]["epsilon"]  # public text costs nothing


def test_sites_that_train_alone_get_no_warm_start(launch: Launch) -> None:
    with pytest.raises(ConfigError, match=r"distillation\.warm_start_steps.*method=standalone"):
        launch("method=standalone", "distillation.warm_start_steps=3")


@pytest.mark.parametrize(
    "family",
    ["gpt2", "opt", "gpt_neox", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "qwen2", "qwen3"))],
)
def test_every_architecture_runs_end_to_end(launch: Launch, tiny_checkpoint: Callable[..., Path], family: str) -> None:
    # Published heads have rows to spare, and transformers' Qwen2 tokenizer adds a token to any vocabulary.
    small, large = (tiny_checkpoint(family, width=width, vocab_size=320) for width in (32, 64))
    pair = [f"model.slm={small}", f"model.llm={large}"]
    summary = launch(*pair, "federation.rounds=1")
    assert summary["rounds_lost"] == 0
    for name in ("slm", "llm"):
        assert summary[name]["after"]["loss"] != summary[name]["before"]["loss"]
