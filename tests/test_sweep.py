"""Sweeps: grids by Hydra's grammar, no private records, and real tiny runs that fail, are killed and go on."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from fedcollm_privacy.errors import ConfigError, InvalidValue
from secure_fedcollm import sweep as sweep_module
from secure_fedcollm import sweep_cli
from secure_fedcollm.cli import compose_config
from secure_fedcollm.sweep import fitting_jobs, run_cells, sweep_lock
from secure_fedcollm.sweep_cells import Axis, Cell, Outcome, kept_cells, new_cells
from secure_fedcollm.sweep_cli import parse_grid, parse_search, sweep
from secure_fedcollm.sweep_cluster import run_cell, run_on_cluster
from secure_fedcollm.sweep_search import Interval, Options, draw

from .test_run import SMALL, write_notes

PUBLIC = ["data.path=notes.jsonl", "data.declared=public", "model.slm=small", "model.llm=large"]


def axes(**lists: Sequence[str]) -> list[Axis]:
    return [Axis(field=field.replace("__", "."), values=tuple(values)) for field, values in lists.items()]


# ---------------------------------------------------------------------------------------------- grids


def test_lists_are_the_grid_by_hydras_own_grammar() -> None:
    words = ["method=fedavg,fedcollm", "seed=range(0,3)", "data.site_names=[a,b],[c]", "name='a,b'", "~privacy"]
    grid, fixed = parse_grid([*words, "model.slm=choice(x,y)", "data.path=/a folder/notes.jsonl"])
    assert [(axis.field, axis.values) for axis in grid] == [
        ("method", ("fedavg", "fedcollm")),
        ("seed", ("0", "1", "2")),
        ("data.site_names", ("[a,b]", "[c]")),
        ("model.slm", ("x", "y")),
    ]
    assert fixed == ["name='a,b'", "~privacy", "data.path=/a folder/notes.jsonl"]


def test_quoted_values_come_through_as_they_were_meant(tmp_path: Path) -> None:
    grid, _ = parse_grid(["name=\"it's, a\",'b = c',d"])
    cells = new_cells(tmp_path, grid, PUBLIC, compose_config)
    assert [cell.config and cell.config["name"] for cell in cells] == ["it's, a", "b = c", "d"]


@pytest.mark.parametrize("word", ["seed=interval(0,3)", "method=glob(fed*)", "seed=1,", "seed=1,1", "a=[1,2"])
def test_what_cannot_be_listed_is_refused_by_its_word(word: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(word.partition("=")[0])):
        parse_grid([word])


# ---------------------------------------------------------------------------------------------- random search

SEARCH = ["privacy.max_grad_norm=tag(log,interval(0.1,10))", "adapter.r=choice(4,8,16)", "federation.rounds=range(2,9)"]


def test_functions_are_drawn_and_lists_and_seeds_are_crossed() -> None:
    words = [*SEARCH, "adapter.lora_alpha=int(interval(1,64))", "method=fedavg,fedcollm", "seed=range(0,3)", "name=x"]
    drawn, others = parse_search(words)
    assert drawn == [
        Interval(field="privacy.max_grad_norm", low=0.1, high=10.0, logarithmic=True),
        Options(field="adapter.r", values=("4", "8", "16")),
        Options(field="federation.rounds", values=tuple("2345678")),
        Interval(field="adapter.lora_alpha", low=1, high=64, whole=True),
    ]
    grid, fixed = parse_grid(others)
    assert [(axis.field, axis.values) for axis in grid] == [
        ("method", ("fedavg", "fedcollm")),
        ("seed", ("0", "1", "2")),
    ]
    assert fixed == ["name=x"]


@pytest.mark.parametrize(
    "word",
    [
        "a=tag(log,choice(1,2))", "a=tag(normal,interval(1,2))", "a=tag(log,interval(0,1))", "a=interval(1,inf)",
        "a=interval(nan,1)", "a=interval(2,1)", "a=interval(1,1)", "a=choice(1,1)", "a=range(3,3)", "a=interval(1",
    ],
)  # fmt: skip
def test_ranges_without_a_meaning_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"a |overrides"):
        parse_search([word])


@pytest.mark.parametrize(
    ("one", "law"),
    [
        (Interval(field="a", low=0.1, high=10, logarithmic=True), stats.loguniform(0.1, 10)),
        (Interval(field="b.c", low=-3, high=7), stats.uniform(-3, 10)),
        (Interval(field="a", low=1e-6, high=1e6, logarithmic=True), stats.loguniform(1e-6, 1e6)),
    ],
)
def test_draws_follow_scipys_laws(one: Interval, law: Any) -> None:
    values = [float(setting[one.field]) for setting in draw([one], trials=4000, seed=11)]
    assert min(values) >= one.low
    assert max(values) < one.high
    assert stats.kstest(values, law.cdf).pvalue > 1e-3
    other = stats.uniform(one.low, one.high - one.low) if one.logarithmic else stats.loguniform(0.1, 10)
    assert stats.kstest(values, other.cdf).pvalue < 1e-9  # the test can tell one law from another


def test_whole_draws_and_options_have_the_chances_that_scipy_gives() -> None:
    count = 3000
    one = Interval(field="adapter.r", low=1, high=9, whole=True, logarithmic=True)
    fields = [Options(field="method", values=("x", "y", "z")), one, Interval(field="unique", low=0, high=1)]
    settings = draw(fields, trials=count, seed=5)
    assert len(settings) == count
    seen = [int(setting["adapter.r"]) for setting in settings]
    law = stats.loguniform(1, 9)
    expected = [count * (law.cdf(k + 1) - law.cdf(k)) for k in range(1, 9)]
    assert stats.chisquare([seen.count(k) for k in range(1, 9)], expected).pvalue > 1e-3
    methods = [setting["method"] for setting in settings]
    assert stats.chisquare([methods.count(m) for m in "xyz"]).pvalue > 1e-3
    pairs = [[sum(m == x and r <= 3 for m, r in zip(methods, seen, strict=True)) for x in "xyz"]]
    pairs.append([methods.count(x) - low for x, low in zip("xyz", pairs[0], strict=True)])
    assert stats.chi2_contingency(pairs).pvalue > 1e-3  # fields are drawn independently


@given(seed=st.integers(0, 2**40), trials=st.integers(1, 30), more=st.integers(0, 30))
def test_more_trials_and_more_fields_keep_the_draws_there_were(seed: int, trials: int, more: int) -> None:
    one, other = Interval(field="a", low=1, high=2), Options(field="b", values=("1", "2"))
    first = draw([one], trials=trials, seed=seed)
    assert draw([one, other], trials=trials + more, seed=seed)[:trials] == [
        {**a, **b} for a, b in zip(first, (draw_all(other, trials, seed)), strict=True)
    ]
    assert draw([one], trials=trials, seed=seed + 1) != first


def draw_all(one: Options, trials: int, seed: int) -> list[dict[str, str]]:
    """The draws of a field by itself; beside a number that never comes twice, no draw is left out."""
    beside = Interval(field="beside", low=0, high=1)
    return [{one.field: setting[one.field]} for setting in draw([one, beside], trials=trials, seed=seed)]


def test_the_same_words_draw_the_same_settings_for_ever() -> None:
    drawn, _ = parse_search(SEARCH)
    assert draw(drawn, trials=3, seed=7) == [
        {"privacy.max_grad_norm": "0.379915", "adapter.r": "8", "federation.rounds": "5"},
        {"privacy.max_grad_norm": "3.1531", "adapter.r": "4", "federation.rounds": "5"},
        {"privacy.max_grad_norm": "3.91691", "adapter.r": "8", "federation.rounds": "4"},
    ]


def test_a_setting_that_comes_up_again_is_one_setting() -> None:
    few = [Options(field="adapter.r", values=("4", "8"))]
    assert sorted(s["adapter.r"] for s in draw(few, trials=50, seed=0)) == ["4", "8"]
    with pytest.raises(ConfigError, match="fields to draw"):
        draw([], trials=3, seed=0)
    with pytest.raises(InvalidValue, match="trials"):
        draw(few, trials=0, seed=0)


def test_drawn_settings_are_crossed_with_methods_and_seeds(tmp_path: Path) -> None:
    drawn, others = parse_search([*SEARCH[1:], "method=fedavg,standalone", "seed=range(0,2)", *PUBLIC])
    grid, fixed = parse_grid(others)
    found = draw(drawn, trials=4, seed=1)
    cells = new_cells(tmp_path, grid, fixed, compose_config, found)
    fields = ("adapter.r", "federation.rounds", "method", "seed")
    assert [tuple(cell.values[f] for f in fields) for cell in cells] == [
        (*setting.values(), method, seed) for setting in found for method in ("fedavg", "standalone") for seed in "01"
    ]
    for cell in cells:
        assert cell.config is not None
        assert str(cell.config["federation"]["rounds"]) == cell.values["federation.rounds"]
    again = new_cells(tmp_path, grid, fixed, compose_config, draw(drawn, trials=6, seed=1))
    assert again[: len(cells)] == cells
    with pytest.raises(ConfigError, match="given twice"):
        new_cells(tmp_path, grid, ["adapter.r=3", *fixed], compose_config, found)


def test_an_interval_without_trials_is_refused_and_trials_without_an_interval_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="with --trials"):
        sweep([*PUBLIC, "privacy.max_grad_norm=interval(1,2)", f"sweep_dir={tmp_path / 'a'}"], quiet=True)
    with pytest.raises(ConfigError, match="fields to draw"):
        sweep([*PUBLIC, "seed=0,1", f"sweep_dir={tmp_path / 'a'}"], trials=3, quiet=True)
    with pytest.raises(ConfigError, match=r"seed=interval"):
        sweep([*PUBLIC, "adapter.r=choice(1,2)", "seed=interval(0,9)"], trials=3, quiet=True)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=15)
@given(
    lists=st.dictionaries(
        st.sampled_from(["seed", "adapter.r", "federation.rounds", "distillation.top_k"]),
        st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True),
        min_size=1,
        max_size=3,
    )
)
def test_cells_are_every_combination_once_with_names_that_are_files(
    lists: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    grid = [Axis(field=field, values=tuple(map(str, values))) for field, values in lists.items()]

    def compose(words: list[str]) -> dict[str, Any]:
        content = json.loads(json.dumps(BASE))
        for word in words:
            *path, last = word.partition("=")[0].split(".")
            inner = content
            for key in path:
                inner = inner[key]
            inner[last] = int(word.partition("=")[2])
        return content

    cells = new_cells(folder, grid, [], compose)
    expected = {tuple(zip(lists, map(str, chosen), strict=True)) for chosen in itertools.product(*lists.values())}
    assert {tuple(cell.values.items()) for cell in cells} == expected
    assert len({cell.name for cell in cells}) == len(cells) == len(expected)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", cell.name) for cell in cells)
    assert sorted(kept_cells(folder), key=lambda c: c.name) == sorted(cells, key=lambda c: c.name)
    for cell in cells:
        assert cell.config is not None
        assert all(str(cell.config.get(f, 0) or cell.config) for f in lists)


BASE = compose_config([*PUBLIC, "method=fedcollm"])


def test_null_for_epsilon_is_a_run_without_dp_and_drops_what_only_dp_needs(tmp_path: Path) -> None:
    fixed = [*PUBLIC, "privacy.expected_batch_size=8", "privacy=strict"]
    plain, private = new_cells(tmp_path, axes(privacy__epsilon=["null", "2"]), fixed, compose_config)
    assert plain.config is not None
    assert private.config is not None
    assert (plain.config["private"], plain.config["privacy"]) == (False, None)
    assert private.config["private"] is True
    assert (private.config["privacy"]["epsilon"], private.config["privacy"]["expected_batch_size"]) == (2, 8)
    same = {"privacy": None, "private": None, "output_dir": None}
    assert {**plain.config, **same} == {**private.config, **same}
    (embedded,) = new_cells(
        tmp_path, [], ["privacy.epsilon=null"], compose_config
    )  # its experiment sets privacy fields
    assert embedded.config is not None
    assert embedded.config["privacy"] is None


@pytest.mark.parametrize("declared", [["data.declared=private"], []])  # own data is private unless told otherwise
def test_private_records_are_never_swept(tmp_path: Path, declared: list[str]) -> None:
    fixed = [w for w in PUBLIC if "declared" not in w] + ["data.partition=column", "data.site_field=site", *declared]
    with pytest.raises(ConfigError, match="only when the best trial alone is ever seen"):
        new_cells(tmp_path, axes(seed=["0", "1"]), fixed, compose_config)
    assert list(tmp_path.iterdir()) == []


def test_one_private_cell_stops_the_whole_sweep_before_anything_runs(tmp_path: Path) -> None:
    fixed = [w for w in PUBLIC if "declared" not in w] + ["data.partition=column", "data.site_field=site"]
    with pytest.raises(ConfigError, match=r"data\.declared"):
        new_cells(tmp_path, axes(data__declared=["public", "synthetic", "private"]), fixed, compose_config)
    assert list(tmp_path.iterdir()) == []
    # A cell whose file was changed to private afterwards is not run either.
    (cell, *_) = new_cells(tmp_path, axes(data__declared=["public", "synthetic"]), fixed, compose_config)
    content = json.loads((cell.folder / "cell.json").read_text())
    content["config"]["data"]["declared"] = "private"
    (cell.folder / "cell.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"data\.declared"):
        kept_cells(tmp_path)


def test_a_field_is_given_once_and_folders_are_the_sweeps(tmp_path: Path) -> None:
    for fixed in (["seed=1"], ["output_dir=x"], ["resume=x"]):
        with pytest.raises(ConfigError, match=fixed[0].partition("=")[0]):
            new_cells(tmp_path, axes(seed=["0", "1"]), [*PUBLIC, *fixed], compose_config)


def test_settings_that_do_not_go_together_are_one_failed_cell_and_all_of_them_an_error(tmp_path: Path) -> None:
    cells = new_cells(tmp_path, axes(adapter__r=["2", "0"]), PUBLIC, compose_config)
    assert [cell.outcome.status for cell in cells] == ["waiting", "failed"]
    assert "adapter.r" in cells[1].outcome.reason
    with pytest.raises(ConfigError, match=r"adapter\.r"):
        new_cells(tmp_path / "other", axes(adapter__r=["-1", "0"]), PUBLIC, compose_config)


def test_a_cell_that_means_something_else_now_is_refused(tmp_path: Path) -> None:
    new_cells(tmp_path, axes(seed=["0"]), PUBLIC, compose_config)
    new_cells(tmp_path, axes(seed=["0"]), PUBLIC, compose_config)

    def changed(words: list[str]) -> dict[str, Any]:
        return {**compose_config(words), "name": "another default"}

    with pytest.raises(ConfigError, match="have changed"):
        new_cells(tmp_path, axes(seed=["0"]), PUBLIC, changed)


def test_a_damaged_cell_is_named(tmp_path: Path) -> None:
    (cell,) = new_cells(tmp_path, axes(seed=["0"]), PUBLIC, compose_config)
    (cell.folder / "cell.json").write_text("{")
    with pytest.raises(ConfigError, match="delete that cell"):
        kept_cells(tmp_path)


# ---------------------------------------------------------------------------------------------- scheduling


def bare(folder: Path, device: str = "cpu", slm: str | None = None) -> Cell:
    folder.mkdir(parents=True)
    return Cell(folder=folder, axes=(), values={}, config={"device": device, "model": {"slm": slm, "llm": slm}})


def test_the_runs_files_outrank_what_was_noted(tmp_path: Path) -> None:
    cell = bare(tmp_path / "a")
    assert cell.outcome.status == "waiting"
    cell.note(Outcome(status="running", attempts=1))
    cell.run.mkdir()
    (cell.run / "summary.json").write_text("{}")
    assert cell.outcome.status == "running"
    (cell.run / "report.html").write_text("")
    assert (cell.outcome.status, cell.outcome.seconds) == ("finished", None)  # nobody saw it end


def test_two_sweeps_never_work_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "_LOCK_WAIT_S", 0.0)
    with sweep_lock(tmp_path), pytest.raises(ConfigError, match="no other sweep"), sweep_lock(tmp_path):
        pass
    with sweep_lock(tmp_path):
        pass


class Machine:
    """Stands for cells' processes that take a moment and for the machine's memory; records how many ran at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, available: int) -> None:
        self.most, self.now, self.started = 0, 0, list[str]()
        monkeypatch.setattr(sweep_module, "_PAUSE_S", 0.001)
        monkeypatch.setattr(sweep_module, "_start", self.start)
        monkeypatch.setattr(sweep_module, "_end", self.end)
        monkeypatch.setattr(sweep_module, "_held", lambda pid: 1000)
        monkeypatch.setattr(sweep_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    def start(self, cell: Cell, jobs: int, lock: int) -> Any:
        self.now += 1
        self.most = max(self.most, self.now)
        self.started.append(cell.name)
        polls = iter([None] * 4 + [0] * 99)
        process = SimpleNamespace(poll=lambda: next(polls), pid=1, stdin=None, wait=lambda: 0)
        return SimpleNamespace(cell=cell, process=process, peak_bytes=0)

    def end(self, job: Any) -> Outcome:
        self.now -= 1
        return Outcome(status="finished")


@pytest.mark.parametrize(("jobs", "available", "most"), [(1, 10**9, 1), (3, 10**9, 3), (9, 10**9, 5)])
def test_no_more_run_than_are_allowed_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, available: int, most: int
) -> None:
    machine = Machine(monkeypatch, available)
    cells = [bare(tmp_path / str(i)) for i in range(5)]
    run_cells(cells, jobs=jobs, lock=0, tell=lambda cell, outcome: None)
    assert machine.started == [cell.name for cell in cells]
    assert machine.most == most


def test_scarce_memory_holds_cells_back_but_never_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, available=999)
    cells = [bare(tmp_path / str(i)) for i in range(4)]
    cells[0].note(Outcome(status="waiting", peak_bytes=1000))
    run_cells(cells, jobs=4, lock=0, tell=lambda cell, outcome: None)
    assert (machine.most, len(machine.started)) == (1, 4)
    with pytest.raises(InvalidValue, match="jobs"):
        run_cells(cells, jobs=0, lock=0, tell=lambda cell, outcome: None)


def test_an_interrupted_sweep_lets_go_of_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, available=10**9)
    let_go = []

    def start(cell: Cell, jobs: int, lock: int) -> Any:
        job = machine.start(cell, jobs, lock)
        job.process.stdin = SimpleNamespace(close=lambda: let_go.append(cell.name))
        return job

    def tell(cell: Cell, outcome: Outcome) -> None:
        if cell.name == "1":
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module, "_start", start)
    with pytest.raises(KeyboardInterrupt):
        run_cells([bare(tmp_path / str(i)) for i in range(4)], jobs=3, lock=0, tell=tell)
    assert let_go == ["0", "1"]


def test_a_terminal_sees_what_is_under_way_and_what_failed(tmp_path: Path) -> None:
    cells = [bare(tmp_path / name) for name in ("done", "broken", "busy")]
    cells[2].run.mkdir()
    (cells[2].run / "metrics.jsonl").write_text('{"server_round": 3, "outcome": "opened"}\n{"server_r')

    def stub(cells: Sequence[Cell], *, jobs: int, lock: int, tell: Callable[[Cell, Outcome], None]) -> None:
        tell(cells[0], Outcome(status="finished", seconds=4.0, attempts=1))
        tell(cells[1], Outcome(status="failed", reason="no such [red]file", seconds=1.0, attempts=1))
        tell(cells[2], Outcome(status="running", attempts=1))

    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        sweep_cli._run(cells, 1, 0, console, stub)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        text = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).split())
        assert "broken: failed after 1 s: no such [red]file" in text
        if terminal:
            assert "1 finished · 1 running · 0 waiting · 1 failed" in text
            assert re.search(r"broken.*no such \[red\]file", text.partition("1 finished")[2])
            assert "round 3: opened" in text
        else:
            assert "done: finished after 4 s" in text


def test_jobs_fit_cores_memory_and_accelerators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def room(gigabytes: float) -> None:
        free = SimpleNamespace(available=int(gigabytes * 1e9))
        monkeypatch.setattr(sweep_module.psutil, "virtual_memory", lambda: free)

    monkeypatch.setattr(sweep_module, "cores", lambda: 8)
    cells = [bare(tmp_path / str(i)) for i in range(20)]
    room(100)
    assert fitting_jobs(cells) == 8
    assert fitting_jobs(cells[:3]) == 3
    room(2.5)
    assert fitting_jobs(cells) == 2
    room(0.1)
    assert fitting_jobs(cells) == 1
    room(100)
    assert fitting_jobs([bare(tmp_path / "gpu", device="cuda"), *cells]) == 1
    model = tmp_path / "model"
    model.mkdir()
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(3_000_000_000)
    assert fitting_jobs([bare(tmp_path / "large", slm=str(model)), *cells]) == 4  # 1 + 4 * (3 + 3) GB each
    assert fitting_jobs([bare(tmp_path / "hub", slm="some/model"), *cells]) == 8  # 9 GB each


# ---------------------------------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> list[str]:
    notes = write_notes(tmp_path_factory.mktemp("notes") / "notes.jsonl", 3, 40)
    small = [word for word in SMALL if not word.startswith(("federation.rounds", "evaluation.generations"))]
    return [
        f"data.path={notes}",
        "data.partition=column",
        "data.site_field=site",
        "data.declared=public",
        "data.public_fraction=0.2",
        f"model.llm={tiny_checkpoint('llama', width=64)}",
        "federation.rounds=2",
        "evaluation.generations=0",
        *small,
    ]


@pytest.fixture(scope="module")
def grid(fixed: list[str], tiny_checkpoint: Callable[..., Path]) -> list[str]:
    slm = f"model.slm={tiny_checkpoint('llama')}"
    return [*fixed, slm, "privacy.epsilon=null", "seed=0,1", "method=fedavg,standalone"]


@pytest.fixture(scope="module")
def whole(grid: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """A 2 x 2 sweep that nothing interrupted, and its table."""
    folder = tmp_path_factory.mktemp("whole")
    sweep([*grid, f"sweep_dir={folder}"], jobs=2, quiet=True)
    return folder, table(folder)


def table(folder: Path) -> dict[str, dict[str, str]]:
    """results.csv by cell, without what no second sweep could repeat."""
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["cell"]: {k: v for k, v in row.items() if k != "seconds"} for row in rows}


def test_a_sweep_is_ordinary_runs_and_their_table(whole: tuple[Path, dict[str, dict[str, str]]]) -> None:
    folder, rows = whole
    assert len(rows) == 4
    assert {(row["method"], row["seed"]) for row in rows.values()} == {
        (method, seed) for method in ("fedavg", "standalone") for seed in "01"
    }
    for name, row in rows.items():
        run = folder / "cells" / name / "run"
        summary = json.loads((run / "summary.json").read_text())
        assert row["status"] == "finished"
        assert float(row["slm_loss_after"]) == summary["slm"]["after"]["loss"]
        assert float(row["slm_gain"]) == summary["slm"]["before"]["loss"] - summary["slm"]["after"]["loss"] != 0
        assert int(row["bytes_up"]) == summary["bytes_up"]
        gains = {site: ends["before"]["loss"] - ends["after"]["loss"] for site, ends in summary["per_site"].items()}
        assert len(gains) == 3  # every method has a worst site, not only one that leaves sites their own models
        assert (row["worst_site"], float(row["worst_site_gain"])) == min(gains.items(), key=lambda item: item[1])
        for left in ("statement.json", "slm_adapter", "transcript.jsonl", "metrics.jsonl", "config.yaml"):
            assert (run / left).exists()
    assert "4 of 4 runs finished" in (folder / "sweep.html").read_text()
    outcomes = [cell.outcome for cell in kept_cells(folder)]
    assert all(o.attempts == 1 and (o.seconds or 0) > 0 and o.peak_bytes > 10**8 for o in outcomes)


BEGUN = "cells/*fedavg*/run/metrics.jsonl"


def inside(folder: Path) -> list[psutil.Process]:
    """Processes that were told to work in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_gives_the_same_table(
    grid: list[str], whole: tuple[Path, dict[str, dict[str, str]]], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    # The two quick runs are done, as if they had been the first; the two of the secure sum are killed half way.
    for done in whole[0].glob("cells/*standalone*"):
        shutil.copytree(done, folder / "cells" / done.name)
    finished = list(folder.glob("cells/*/run/summary.json"))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished}
    assert len(finished) == 2
    code = "import sys; from secure_fedcollm.sweep_cli import sweep; sweep(sys.argv[1:], jobs=2, quiet=True)"
    process = subprocess.Popen([sys.executable, "-c", code, *grid, f"sweep_dir={folder}"], env=dict(os.environ))
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not list(folder.glob(BEGUN)):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the sweep ended before it could be killed"
    begun = list(folder.glob(BEGUN))
    assert begun
    assert not (folder / "results.csv").exists()
    # Its cells end with it: nobody trains in a folder that the next sweep takes over.
    while time.monotonic() < deadline and inside(folder):
        time.sleep(0.05)
    assert inside(folder) == []
    run_id = (begun[0].parent / "run.json").read_text()

    sweep([f"sweep_dir={folder}"], jobs=2, quiet=True)

    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished} == before  # not run again
    assert (begun[0].parent / "run.json").read_text() == run_id  # resumed, and not begun anew
    attempts = {cell.name: cell.outcome.attempts for cell in kept_cells(folder)}
    assert attempts[begun[0].parent.parent.name] == 2
    assert table(folder) == whole[1]


@pytest.mark.slow
def test_a_killed_random_search_goes_on_with_the_same_draws_and_gives_the_same_table(
    fixed: list[str], tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    words = [word for word in fixed if not word.startswith("federation.rounds")]
    words += [f"model.slm={tiny_checkpoint('llama')}", "privacy.epsilon=null", "method=zero_shot"]
    words += ["data.held_out_fraction=tag(log,interval(0.1,0.4))"]
    sweep([*words, f"sweep_dir={tmp_path / 'whole'}"], trials=2, trials_seed=3, quiet=True)
    assert len({row["slm_loss_after"] for row in table(tmp_path / "whole").values()}) == 2

    folder = tmp_path / "killed"
    code = "import sys; from secure_fedcollm.sweep_cli import sweep as search; "
    code += "search(sys.argv[1:], trials=2, trials_seed=3, jobs=1)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, f"sweep_dir={folder}"], env=dict(os.environ), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not list(folder.glob("cells/*/run/run.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the search ended before it could be killed"
    assert not (folder / "results.csv").exists()

    sweep([*words, f"sweep_dir={folder}"], trials=2, trials_seed=3, quiet=True)
    assert table(folder) == table(tmp_path / "whole")
    (said,) = json.loads((folder / "commands.json").read_text())["commands"]
    assert said.startswith("fedcollm sweep --trials=2 --trials-seed=3 ")
    assert "interval(0.1,0.4)" in said


@pytest.mark.slow
def test_a_failing_cell_is_told_and_the_rest_goes_on(
    fixed: list[str], tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tmp_path / "failing"
    good, missing = tiny_checkpoint("llama"), tmp_path / "no_such_model"
    words = [*fixed, "method=standalone", "federation.rounds=1", "privacy.epsilon=3", f"model.slm={good},{missing}"]
    words = [word for word in words if word != "federation.rounds=2" and not word.startswith("adapter.r=")]
    with pytest.raises(typer.Exit):
        sweep([*words, "adapter.r=2,0", f"sweep_dir={folder}"], jobs=2, quiet=True)
    rows = table(folder).values()
    found = {(row["model.slm"], row["adapter.r"]): row for row in rows}
    assert {key: row["status"] for key, row in found.items()} == {
        (str(good), "2"): "finished",
        (str(missing), "2"): "failed",
        (str(good), "0"): "failed",
        (str(missing), "0"): "failed",
    }
    assert "no_such_model" in found[str(missing), "2"]["reason"]
    assert "adapter.r" in found[str(good), "0"]["reason"]
    assert 0 < float(found[str(good), "2"]["epsilon"]) <= 3
    page = (folder / "sweep.html").read_text()
    assert "3 runs are missing" in page
    assert "What is missing" in page
    assert "looking at all 1 runs would cost" in page  # the price comes from the plan in the run's ledgers


def test_a_cell_ends_when_its_sweep_lets_go(tmp_path: Path) -> None:
    code = (
        "import threading, time; from secure_fedcollm.sweep_child import _end_with_the_sweep as end; "
        "threading.Thread(target=end, daemon=True).start(); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    time.sleep(0.5)
    assert process.poll() is None
    if process.stdin is not None:
        threading.Timer(0.1, process.stdin.close).start()
    assert process.wait(timeout=30) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("code", "log", "reason"),
    [
        (2, b"warning\nfedcollm: adapter.r = 0 is not allowed\n\n", "adapter.r = 0 is not allowed"),
        (1, b"Traceback\n  File\nValueError: odd\n", "ValueError: odd"),
        (-9, b"anything", "ended by SIGKILL; most often memory ran out"),
        (-11, b"", "ended by SIGSEGV"),
        (3, b"", "code 3 and said nothing"),
        (0, b"\xff\xfe", "\ufffd"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(code: int, log: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(log)
    with path.open("rb") as file:
        told = sweep_module._reason(code, file)
    assert reason in told
    assert "\n" not in told


def test_nothing_to_sweep_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lists of values"):
        sweep([f"sweep_dir={tmp_path / 'none'}"], quiet=True)
    with pytest.raises(ConfigError, match="one folder"):
        sweep(["sweep_dir=a", "sweep_dir=b"], quiet=True)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- clusters

SLURM = {
    # Stands for Slurm's commands: a job is a process of this machine, its state a file.
    "sbatch": """
        id=$((1000 + $(ls "$FAKE_SLURM" | wc -l))); touch "$FAKE_SLURM/$id.state"
        file=${@: -1}
        (
            echo RUNNING > "$FAKE_SLURM/$id.state"
            SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 \\
                SLURM_JOB_NODELIST=here bash "$file" > "$FAKE_SLURM/../$id.log" 2>&1 \\
                && echo COMPLETED > "$FAKE_SLURM/$id.state" || echo FAILED > "$FAKE_SLURM/$id.state"
        ) > /dev/null 2>&1 &
        echo "Submitted batch job $id"
    """,
    "srun": """
        while [ "${1#-}" != "$1" ]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
        exec "$@"
    """,
    "sacct": """
        echo "JobID|State|NodeList"
        for file in "$FAKE_SLURM"/*.state; do echo "$(basename "$file" .state)|$(cat "$file")|here"; done
    """,
    "scancel": """
        echo CANCELLED > "$FAKE_SLURM/$1.state"
    """,
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands named as Slurm's; the folder holds one state file a job."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "states").mkdir()
    for name, body in SLURM.items():
        script = tmp_path / "bin" / name
        script.write_text(f"#!/bin/bash\n{body}")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "states"))
    return tmp_path / "states"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm"])
def test_jobs_give_the_table_that_processes_of_this_machine_give(
    launcher: str,
    grid: list[str],
    whole: tuple[Path, dict[str, dict[str, str]]],
    slurm: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "sweep"
    left_out = f"seed_{int(launcher == 'submitit_slurm')}-method_standalone-"
    for done in whole[0].glob("cells/*"):  # one of the four is left for a job
        if not done.name.startswith(left_out):
            shutil.copytree(done, folder / "cells" / done.name)
    assert len(list(folder.glob("cells/*"))) == 3
    sweep([*grid, f"sweep_dir={folder}"], launcher=launcher, resource=["timeout_min=30"], quiet=True)
    assert table(folder) == whole[1]
    (noted,) = folder.glob("cells/*/job.json")
    assert json.loads(noted.read_text())["launcher"] == launcher
    assert (len(list(slurm.iterdir())) == 1) is (launcher == "submitit_slurm")
    assert (folder / "jobs").stat().st_mode & 0o077 == 0  # pickles: nobody else may write there
    assert kept_cells(folder)[0].outcome.peak_bytes > 10**8


def test_a_job_that_slurm_still_has_is_waited_for_and_not_submitted_again(slurm: Path, tmp_path: Path) -> None:
    cell = bare(tmp_path / "cells" / "a")
    (slurm / "77.state").write_text("RUNNING")
    (cell.folder / "job.json").write_text(json.dumps({"launcher": "submitit_slurm", "job": "77"}))
    told = []

    def tell(cell: Cell, outcome: Outcome) -> None:
        told.append(outcome.status)
        if outcome.status == "running":
            cell.run.mkdir()
            for name in ("summary.json", "report.html"):
                (cell.run / name).write_text("{}")
            (slurm / "77.state").write_text("COMPLETED")

    run_on_cluster([cell], jobs=1, sweep_dir=tmp_path, launcher="submitit_slurm", resources={}, tell=tell)
    assert told == ["running", "finished"]
    assert [path.name for path in slurm.iterdir()] == ["77.state"]


def test_an_interrupted_sweep_cancels_its_jobs(slurm: Path, tmp_path: Path) -> None:
    cell = bare(tmp_path / "cells" / "a")
    (slurm / "78.state").write_text("PENDING")
    (cell.folder / "job.json").write_text(json.dumps({"launcher": "submitit_slurm", "job": "78"}))

    def interrupt(cell: Cell, outcome: Outcome) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on_cluster([cell], jobs=1, sweep_dir=tmp_path, launcher="submitit_slurm", resources={}, tell=interrupt)
    assert (slurm / "78.state").read_text().strip() == "CANCELLED"


def test_a_job_that_ended_before_its_cell_is_a_failure_with_its_last_words(slurm: Path, tmp_path: Path) -> None:
    cell = bare(tmp_path / "cells" / "a")  # no cell.json: the job cannot read what it is
    told: list[Outcome] = []
    run_on_cluster(
        [cell], jobs=1, sweep_dir=tmp_path, launcher="submitit_local", resources={"timeout_min": 5},
        tell=lambda cell, outcome: told.append(outcome),
    )  # fmt: skip
    assert [outcome.status for outcome in told] == ["running", "failed"]
    assert "ended as" in told[1].reason
    assert "delete that cell's folder" in told[1].reason


def test_launchers_that_cannot_be_had_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*PUBLIC, "seed=0,1", f"sweep_dir={tmp_path / 'a'}"]
    with pytest.raises(ConfigError, match="one of local, submitit_slurm"):
        sweep(words, launcher="ray", quiet=True)
    with pytest.raises(ConfigError, match="name=value"):
        sweep(words, launcher="submitit_local", resource=["mem_gb"], quiet=True)
    with pytest.raises(ConfigError, match="--jobs"):
        sweep(words, resource=["mem_gb=4"], quiet=True)
    assert list(tmp_path.iterdir()) == []
    cell = bare(tmp_path / "cells" / "a")

    def run(launcher: str, **resources: int) -> None:
        run_on_cluster(
            [cell], jobs=1, sweep_dir=tmp_path, launcher=launcher, resources=resources, tell=lambda c, o: None
        )

    with pytest.raises(ConfigError, match="memory_please"):
        run("submitit_local", memory_please=3)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="srun"):
        run("submitit_slurm")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"secure-fedcollm\[cluster\]"):
        run("submitit_local")


def test_a_cell_has_one_job_at_a_time(tmp_path: Path) -> None:
    with sweep_lock(tmp_path, wait_s=0):
        waiting = threading.Thread(target=run_cell, args=[str(tmp_path)], daemon=True)
        waiting.start()
        waiting.join(timeout=1)
        assert waiting.is_alive()
        (tmp_path / "cell.json").write_text(json.dumps({"axes": [], "values": {}, "config": None, "refusal": "no"}))
    waiting.join(timeout=30)
    assert not waiting.is_alive()
