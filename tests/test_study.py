"""The study's page: intervals as scipy has them, compared seed by seed, and nothing called better that is not shown."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas
import pytest
from scipy import stats

from secure_fedcollm.sweep_results import Row, Setting

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", ROOT / "benchmarks" / "study.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("benchmarks/study.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as here:
        here.setitem(sys.modules, "study", module)  # where dataclasses look for its names
        spec.loader.exec_module(module)
    return module


def setting(method: str, level: str, gains: list[float], **changed: str) -> Setting:
    values = {"method": method, "privacy.epsilon": level, "distillation.direction": "forward", **changed}
    numbers = [
        {"slm_gain": gain, "llm_gain": gain / 10, "worst_site_gain": gain / 2, "seconds": 60.0} for gain in gains
    ]
    rows = [
        Row(cell=f"{method}{seed}", values={**values, "seed": str(seed)}, status="finished", reason="", numbers=of)
        for seed, of in enumerate(numbers)
    ]
    return Setting(values=values, rows=tuple(rows))


def test_differences_are_taken_seed_by_seed_with_scipys_interval(study: ModuleType) -> None:
    generator = np.random.default_rng(1)
    one = generator.normal(2, 1, 5)
    other = one - generator.normal(0.1, 0.02, 5)  # seeds differ much more than methods
    found = study.paired(setting("a", "8", one.tolist()), setting("b", "8", other.tolist()), "slm_gain")
    low, high = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert study.shown(found) == "helps"
    assert (
        study.shown(study.paired(setting("b", "8", other.tolist()), setting("a", "8", one.tolist()), "slm_gain"))
        == "hurts"
    )
    unpaired = stats.ttest_ind(one, other).confidence_interval(0.95)
    assert unpaired.low < 0  # which could not have shown it


def test_one_seed_and_intervals_around_zero_show_nothing(study: ModuleType) -> None:
    once = study.paired(setting("a", "8", [2.0]), setting("b", "8", [1.0]), "slm_gain")
    assert study.shown(once) == "not shown"
    assert (
        study.shown(study.paired(setting("a", "8", [1.0, 2.0]), setting("b", "8", [2.0, 1.0]), "slm_gain"))
        == "not shown"
    )
    assert study.paired(None, setting("b", "8", [1.0]), "slm_gain") is None


def test_what_a_budget_leaves_is_a_share_of_the_same_seeds_gain(study: ModuleType) -> None:
    left = study.kept(setting("a", "3", [1.0, 3.0]), setting("a", "null", [2.0, 4.0]))
    assert left.mean == pytest.approx((0.5 + 0.75) / 2)


def test_the_page_has_every_finished_setting_and_finds_changes_beside_their_base(
    study: ModuleType, tmp_path: Path
) -> None:
    settings = [
        setting("fedcollm", "null", [2.0, 2.2, 2.1]),
        setting("fedcollm", "null", [1.5, 1.7, 1.6], **{"distillation.direction": "reverse"}),
        setting("fedcollm", "3", [1.8, 2.0, 1.9]),
        setting("fedavg_public", "null", [1.0, 1.2, 1.1]),
        setting("zero_shot", "null", [0.0, 0.0, 0.0]),
    ]
    arguments = argparse.Namespace(jobs=2, subject="medquad", slm=tmp_path / "small", llm=tmp_path / "large")
    page = study.page(study.Study(settings), arguments)
    assert "| fedcollm | +2.100 ± 0.248 | +1.900 ± 0.248 |" in page
    assert "fedcollm − fedavg_public | +1.000 ± 0.000 helps | - |" in page
    assert "| distillation.direction=reverse | −0.500 ± 0.000" in page
    assert "| zero_shot | +0.000 ± 0.000 | - |" in page
    assert "from 15 runs, 3 seeds" in page
    assert "(fedcollm − fedavg_public), SLM: helps at no DP." in page
    assert "ε = 3 keeps (aim: 75 %): fedcollm 90% ± 1." in page
    assert "What lifts" not in page  # nothing of it was run
    assert "| standalone |" not in page


def test_the_quick_form_is_eight_runs_and_the_whole_one_every_method_and_budget(study: ModuleType) -> None:
    (quick,) = study.grids("seed=0,1", quick=True, settings=True)
    assert [len(word.partition("=")[2].split(",")) for word in quick[:3]] == [2, 2, 2]
    words = " ".join(word for grid in study.grids("seed=0", quick=False, settings=True) for word in grid)
    assert len(study.grids("seed=0", quick=False, settings=False)) == 5
    for name in (*study.FEDERATED, *study.UNFEDERATED, *study.LEVELS):
        assert name in words


def test_places_of_the_e2e_set_are_public_or_private_with_all_their_descriptions(
    study: ModuleType, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    paths = [Path(word.partition("=")[2]) for word in study.e2e_files(shared_data("e2e_nlg"), tmp_path / "data")]
    private, public = ([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    tables = [pandas.read_csv(shared_data("e2e_nlg") / name) for name in ("devset.csv", "testset_w_refs.csv")]
    given = sorted(zip(*(pandas.concat(tables)[name] for name in ("mr", "ref")), strict=True))
    assert sorted((row["mr"], row["ref"]) for row in private + public) == given
    assert not {row["mr"] for row in private} & {row["mr"] for row in public}
    assert {row["type"] for row in private} == {"pub", "restaurant", "coffee_shop", "unnamed"}
    for row in private + public:
        assert f"eatType[{row['type'].replace('_', ' ')}]" in row["mr"] or "eatType" not in row["mr"]


@pytest.mark.parametrize(("missing", "code", "words"), [(True, 2, "--slm"), (False, 1, "no run in")])
def test_without_models_or_finished_runs_no_page_is_written(
    study: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: bool,
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr(study, "DOCS", tmp_path)
    slm = tmp_path / "nowhere" if missing else tmp_path
    given = ["study.py", "--report-only", "--data", tmp_path, "--slm", slm, "--llm", tmp_path, "--work", tmp_path / "w"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in given])
    with pytest.raises(SystemExit) as end:
        study.main()
    assert end.value.code == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "results.md").exists()


@pytest.mark.slow
def test_the_quick_study_runs_on_the_real_data_and_goes_on_where_it_was_cut(
    study: ModuleType,
    shared_data: Callable[[str], Path],
    shared_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = shared_model("stories-sheared-3L"), shared_model("stories-grown-1.2M")
    data = shared_data("medquad") / "medquad.jsonl"
    words = ["study.py", "--quick", "--data", data, "--slm", models[0], "--llm", models[1], "--work", tmp_path / "work"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    study.main()
    page = (tmp_path / "work" / "results.md").read_text()
    assert "from 8 runs, 2 seeds" in page
    assert "distillation, both ways, against fine-tuning on the same public text: fedcollm − fedavg_public" in page
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("cells/*/run/summary.json")}
    assert len(finished) == 8
    study.main()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert (tmp_path / "work" / "results.md").read_text() == page
