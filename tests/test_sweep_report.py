"""What a sweep's report says, against scipy and pandas, on made-up cells; and that it says no more than seeds show."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats

from fedcollm_privacy.errors import InvalidValue
from secure_fedcollm.figures import scatter_files
from secure_fedcollm.sweep_advice import advice, kept, level_of
from secure_fedcollm.sweep_cells import Cell, Outcome, put
from secure_fedcollm.sweep_charts import charts
from secure_fedcollm.sweep_figures import DARK, LIGHT, Point, front_of, palette_css, scatter
from secure_fedcollm.sweep_report import selection_price, write_report
from secure_fedcollm.sweep_results import Row, Setting, csv_text, differ, estimate, fields_of, rows_of, settings_of

FINITE = st.floats(-100, 100).map(lambda value: round(value, 3))


def summary(gain: float, *, epsilon: float | None, sent: int = 1000) -> dict[str, Any]:
    row = {"epsilon": epsilon, "delta": 1e-5, "unit": "record", "steps": 4, "epsilon_budget": epsilon}
    models = {
        name: {
            "before": {"loss": 3.0, "perplexity": math.exp(3)},
            "after": {"loss": 3.0 - g, "perplexity": math.exp(3 - g)},
        }
        for name, g in (("slm", gain), ("llm", 0.0))
    }
    return {
        "run_id": "r", "name": "n", "method": "m", "private": epsilon is not None, "declared": "public",
        "sites": {"a": row, "b": {**row, "epsilon": None if epsilon is None else epsilon / 2}},
        "bytes_up": sent, "rounds_lost": 0, **models,
    }  # fmt: skip


def make_cell(
    folder: Path,
    values: Mapping[str, str],
    content: Mapping[str, Any] | None,
    *,
    reason: str = "",
    seconds: float = 2.0,
) -> Cell:
    name = re.sub(r"[^A-Za-z0-9]+", "_", "-".join(values.values()))
    config = {"data": {"declared": "public"}, "model": {}, "privacy": None}
    cell = Cell(folder=folder / "cells" / name, axes=tuple(values), values=values, config=config)
    cell.run.mkdir(parents=True)
    status = "finished"
    if content is None:
        status = "failed" if reason else "running"
    else:
        (cell.run / "summary.json").write_text(json.dumps(content))
        (cell.run / "report.html").write_text("")
    cell.note(Outcome(status=status, reason=reason, attempts=1, seconds=seconds))
    return cell


def make_sweep(folder: Path) -> list[Cell]:
    """Two methods, no DP and two budgets, three seeds; one cell failed, one cut."""
    cells = []
    gains = {"slow": 0.50, "fast": 0.30}
    for method, budget, seed in itertools.product(gains, ("null", "8", "1"), range(3)):
        share = {"null": 1.0, "8": 0.8, "1": 0.2}[budget]
        gain = round(share * gains[method] + 0.01 * ((seed * 7 + len(method)) % 3 - 1), 6)
        content = summary(
            gain, epsilon=None if budget == "null" else float(budget), sent=500 if method == "fast" else 900
        )
        cells.append(make_cell(folder, {"method": method, "privacy.epsilon": budget, "seed": str(seed)}, content))
    broken = {"method": "broken", "privacy.epsilon": "8", "seed": "0"}
    cells.append(make_cell(folder, broken, None, reason="<script>alert(1)</script> went wrong"))
    cells.append(make_cell(folder, {**broken, "seed": "1"}, None))
    return cells


def setting(name: str, gains: Sequence[float], **numbers: float) -> Setting:
    rows = tuple(
        Row(
            cell=f"{name}{seed}",
            values={"method": name, "seed": str(seed)},
            status="finished",
            reason="",
            numbers={
                "slm_gain": gain,
                "epsilon": 8.0,
                "epsilon_budget": 8.0,
                "bytes_up": 100.0,
                "seconds": 1.0,
                **numbers,
            },
        )
        for seed, gain in enumerate(gains)
    )
    return Setting(values={"method": name}, rows=rows)


# ---------------------------------------------------------------------------------------------- arithmetic


@settings(max_examples=60)
@given(values=st.lists(FINITE, min_size=2, max_size=8), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_intervals_are_scipys(values: list[float], confidence: float) -> None:
    ours = estimate(values, confidence)
    assert ours.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert ours.half is not None
    deviation = stats.sem(values)
    if deviation < 1e-9:
        assert ours.half == pytest.approx(0, abs=1e-6)
        return
    low, high = stats.t.interval(confidence, len(values) - 1, loc=np.mean(values), scale=deviation)
    assert (ours.mean - ours.half, ours.mean + ours.half) == (
        pytest.approx(low, abs=1e-6),
        pytest.approx(high, abs=1e-6),
    )
    normal = stats.norm.ppf((1 + confidence) / 2) * deviation
    assert ours.half > normal  # few seeds deserve more than the normal law says


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert estimate([3.0]).half is None
    assert estimate([3.0]).low == -math.inf
    with pytest.raises(InvalidValue, match="at least one"):
        estimate([])


@settings(max_examples=60)
@given(pairs=st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=6), comparisons=st.integers(1, 5))
def test_shared_seeds_are_judged_as_scipys_paired_test_does(pairs: list[tuple[float, float]], comparisons: int) -> None:
    one, other = (setting(name, gains) for name, gains in zip("ab", zip(*pairs, strict=True), strict=True))
    differences = np.array([a - b for a, b in pairs])
    if np.std(differences) < 1e-6:
        return
    value = stats.ttest_rel(*zip(*pairs, strict=True)).pvalue
    if abs(value - 0.05 / comparisons) > 1e-9:
        assert differ(one, other, "slm_gain", comparisons) is bool(value < 0.05 / comparisons)


def test_seeds_that_are_not_shared_need_intervals_that_do_not_overlap() -> None:
    def other_seeds(name: str, gains: Sequence[float]) -> Setting:
        made = setting(name, gains)
        rows = tuple(replace(row, values={"seed": f"9{i}"}) for i, row in enumerate(made.rows))
        return Setting(values=made.values, rows=rows)

    near, far = other_seeds("near", [1.0, 1.1, 0.9]), other_seeds("far", [5.0, 5.1, 4.9])
    assert differ(setting("a", [1.2, 1.1, 1.3]), far, "slm_gain", 1)
    assert not differ(setting("a", [1.2, 1.1, 1.3]), near, "slm_gain", 1)
    assert not differ(setting("a", [1.0]), setting("b", [9.0]), "slm_gain", 1)
    assert not differ(setting("a", [1.0]), other_seeds("b", [9.0, 9.1]), "slm_gain", 1)


def test_settings_are_what_pandas_groups(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path)
    rows = rows_of(cells)
    frame = pd.read_csv(io.StringIO(csv_text(rows)), dtype={"privacy.epsilon": str}, keep_default_na=False)
    assert len(frame) == len(cells) == 20
    done = frame[frame.status == "finished"].astype({"slm_gain": float})
    grouped = done.groupby(["method", "privacy.epsilon"])["slm_gain"]
    found = settings_of(rows)
    assert len(found) == grouped.ngroups == 6
    for one in found:
        values = grouped.get_group((one.values["method"], one.values["privacy.epsilon"]))
        gain = one.of("slm_gain")
        assert gain is not None
        assert (gain.mean, gain.count) == (pytest.approx(values.mean()), 3)
        assert gain.half == pytest.approx(stats.t.ppf(0.975, 2) * values.std(ddof=1) / math.sqrt(3))


def test_the_table_is_tidy_and_loses_nothing(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path)
    frame = pd.read_csv(io.StringIO(csv_text(rows_of(cells))), dtype=str, keep_default_na=False)
    assert fields_of(cells) == ["method", "privacy.epsilon", "seed"]
    assert list(frame.columns[:5]) == ["cell", "method", "privacy.epsilon", "seed", "status"]
    assert frame.status.value_counts().to_dict() == {"finished": 18, "failed": 1, "cut": 1}
    assert frame[frame.status == "failed"].reason.item() == "<script>alert(1)</script> went wrong"
    row = frame[(frame.method == "slow") & (frame["privacy.epsilon"] == "8") & (frame.seed == "1")].iloc[0]
    assert float(row.slm_loss_before) - float(row.slm_loss_after) == pytest.approx(float(row.slm_gain))
    assert float(row.epsilon) == 8.0  # the site that spent most
    assert (row.bytes_up, row.seconds) == ("900", "2.0")
    assert set(frame[frame["privacy.epsilon"] == "null"].epsilon) == {""}


def test_another_grid_in_the_same_folder_adds_its_columns(tmp_path: Path) -> None:
    first = make_cell(tmp_path, {"method": "a", "seed": "0"}, summary(0.1, epsilon=None))
    second = make_cell(tmp_path, {"method": "b", "adapter.r": "4"}, summary(0.1, epsilon=None))
    cells = [first, replace(second, axes=("method",), config={**(second.config or {}), "seed": 3})]
    assert fields_of(cells) == ["method", "adapter.r", "seed"]
    rows = {row.values["method"]: row.values for row in rows_of(cells)}
    assert rows["a"] == {"method": "a", "adapter.r": "", "seed": "0"}
    assert rows["b"] == {"method": "b", "adapter.r": "4", "seed": "3"}  # what was not said stands in the configuration


def test_an_unreadable_run_is_a_failure_and_not_a_row_of_numbers(tmp_path: Path) -> None:
    cell = make_cell(tmp_path, {"method": "a"}, {**summary(0.1, epsilon=1.0), "bytes_up": "many"})
    (row,) = rows_of([cell])
    assert (row.status, dict(row.numbers)) == ("failed", {})
    assert "bytes_up" in row.reason


def test_the_worst_site_is_the_one_that_gained_least(tmp_path: Path) -> None:
    cell = make_cell(tmp_path, {"method": "a"}, summary(0.1, epsilon=None))
    (row,) = rows_of([cell])
    assert (row.worst_site, row.numbers.get("worst_site_gain")) == ("", None)  # private, or from before it was measured
    losses = {"a": (3.0, 2.0), "b": (4.0, 3.5)}
    sites = {s: {"before": {"loss": b}, "after": {"loss": a}} for s, (b, a) in losses.items()}
    (cell.run / "summary.json").write_text(json.dumps({**summary(0.1, epsilon=None), "per_site": sites}))
    (row,) = rows_of([cell])
    assert row.worst_site == "b"
    assert (row.numbers["worst_site_gain"], row.numbers["worst_site_loss"]) == (0.5, 3.5)
    assert row.numbers["best_site_gain"] == 1.0
    page = write_report(tmp_path, [cell]).read_text()
    assert re.search(r"method=a</td><td class=\"n\">\+0.500 \(one seed\)", page)
    assert "worst site: what privacy costs" not in page  # a chart of what privacy costs needs runs with DP
    private = summary(0.1, epsilon=1.0)
    cells = [cell, make_cell(tmp_path, {"method": "b"}, {**private, "per_site": sites})]
    assert "worst site: what privacy costs" in write_report(tmp_path, cells).read_text()
    assert (tmp_path / "figures" / "worst_site_epsilon.pdf").exists()


def test_choices_are_counted_in_accuracy(tmp_path: Path) -> None:
    content = summary(0.1, epsilon=None)
    content["slm"] = {"before": {"loss": 1.0, "acc": 0.25}, "after": {"loss": 2.0, "acc": 0.75}}
    (row,) = rows_of([make_cell(tmp_path, {"method": "a"}, content)])
    assert row.numbers["slm_gain"] == 0.5


# ---------------------------------------------------------------------------------------------- advice


def test_a_setting_is_advised_when_its_seeds_show_it() -> None:
    texts = advice([setting("good", [1.0, 1.1, 0.9]), setting("poor", [0.1, 0.2, 0.0])], "slm", "nats")
    assert len(texts) == 1
    assert "ε ≤ 8.00" in texts[0]
    assert "Take method=good" in texts[0]


def test_one_seed_is_never_advice() -> None:
    (text,) = advice([setting("good", [1.0]), setting("poor", [0.1])], "slm", "nats")
    assert "method=good" in text
    assert "may be chance" in text
    assert "Take" not in text


def test_of_settings_alike_the_cheapest_is_advised() -> None:
    same = ([1.0, 1.2, 0.9], [1.05, 1.0, 1.06])
    (text,) = advice([setting("dear", same[0], bytes_up=900.0), setting("cheap", same[1])], "slm", "nats")
    assert "do not tell it apart" in text
    assert "method=cheap (100 bytes" in text.split("Take")[1]
    (text,) = advice([setting("dear", same[0]), setting("cheap", same[1], bytes_up=900.0)], "slm", "nats")
    assert "method=dear" in text.split("Take")[1]


def test_a_crowd_that_is_not_told_apart_is_counted_and_not_listed() -> None:
    crowd = [setting(f"s{i}", [1.0 - i / 100, 1.5 - i / 100, 0.6 + i / 100]) for i in range(9)]
    (text,) = advice(crowd, "slm", "nats")
    assert "and 5 more with lower means" in text
    assert sum(f"method=s{i} (+" in text.split("do not tell it apart")[1].split("Take")[0] for i in range(9)) == 3


def test_what_may_not_help_is_not_advised() -> None:
    (text,) = advice([setting("a", [1.0, -0.9, 0.4]), setting("b", [0.2, -0.8, 0.1])], "slm", "nats")
    assert "is not shown" in text
    assert "Take" not in text
    # A smaller gain that is sure comes before a larger one that is not.
    (text,) = advice([setting("wild", [4.0, -0.9, 1.4]), setting("sure", [1.0, 1.1, 1.05])], "slm", "nats")
    assert "Take method=sure" in text


def test_budgets_are_advised_on_one_by_one_and_no_dp_last(tmp_path: Path) -> None:
    found = settings_of(rows_of(make_sweep(tmp_path)))
    assert {level_of(s) for s in found} == {None, 1.0, 8.0}
    texts = advice(found, "slm", "nats")
    assert [text.split(":")[0] for text in texts] == ["SLM, ε ≤ 1.00", "SLM, ε ≤ 8.00", "SLM, without DP"]
    assert all("Take method=slow" in text for text in texts[1:])
    assert advice(found, "llm", "nats") == []  # nothing changed it


def test_the_share_kept_is_that_of_the_same_setting_without_dp(tmp_path: Path) -> None:
    found = settings_of(rows_of(make_sweep(tmp_path)))
    means = {tuple(s.values.values()): s.of("slm_gain").mean for s in found}  # type: ignore[union-attr]
    for one in found:
        method, budget = one.values.values()
        share = "" if budget == "null" else 100 * means[method, budget] / means[method, "null"]
        said = kept(one, found, "slm")
        assert said == "" if share == "" else float(said.removesuffix(" %")) == pytest.approx(share, abs=0.06)


# ---------------------------------------------------------------------------------------------- price of choosing


def test_the_price_of_choosing_is_the_references(tmp_path: Path) -> None:
    plan = {"noise_multiplier": 1.0, "sample_rate": "1/20", "rounds": 20, "steps_per_round": 10, "delta": 1e-5}
    cells = [make_cell(tmp_path, {"seed": str(seed)}, summary(0.1, epsilon=5.0)) for seed in range(10)]
    assert selection_price(cells) is None
    for cell in cells:
        (cell.run / "ledgers").mkdir()
        lines = [{"kind": "LEDGER"}, {"kind": "PLAN", "plan": plan}, {"kind": "PLAN", "plan": {**plan, "rounds": 1}}]
        (cell.run / "ledgers" / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    price = selection_price(cells)
    assert price is not None
    assert (price.trials, price.delta) == (10, 1e-5)
    assert price.one == pytest.approx(5.37, abs=0.005)
    assert price.every == pytest.approx(17.92, abs=0.005)
    assert price.selected == pytest.approx(9.25, abs=0.005)


# ---------------------------------------------------------------------------------------------- page and pictures


@settings(max_examples=60)
@given(points=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_a_sweep_over_sorted_costs_finds(points: list[tuple[int, int]]) -> None:
    expected, best = set(), -math.inf
    for cost in sorted({x for x, _ in points}):
        top = max(y for x, y in points if x == cost)
        if top > best:
            expected.add((cost, top))
            best = top
    assert {p for p, on in zip(points, front_of(points), strict=True) if on} == expected


NAMES = ["one", "two {c0}", *"345678"]


def some_points(label: str = "a") -> list[Point]:
    return [
        Point(x=1.0, y=0.5, half=0.1, series=0, label=label, front=True),
        Point(x=8.0, y=0.9, half=None, series=1, label="{ink} & <b>", front=True),
        Point(x=None, y=1.0, half=0.0, series=7, label="none"),
    ]


def test_pictures_are_whole_xml_with_title_and_description() -> None:
    points = some_points(label="</title><script>alert(1)</script>")
    svg = scatter("n", "T <t>", points, NAMES, x_label="x", y_label="y", x_form=str)
    root = ET.fromstring(svg)
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert tags[:3] == ["svg", "title", "desc"]
    assert "script" not in tags
    texts = [element.text or "" for element in root.iter()]
    assert "T <t>" in texts
    assert any("{ink} & <b>" in text for text in texts)
    assert "two {c0}" in texts
    assert "var(--c1)" in svg


def test_a_point_lies_where_its_numbers_say() -> None:
    def heights(svg: str) -> list[float]:
        return [float(y) for y in re.findall(r"<g>.*?translate\([\d.]+ ([\d.]+)\)", svg)]

    def place(svg: str) -> list[float]:
        return [float(x) for x in re.findall(r"<g>.*?translate\(([\d.]+) ", svg)]

    values = [0.0, 0.25, 0.5, 1.0]
    points = [Point(x=10.0**i, y=y, half=0.0, series=0, label=str(i)) for i, y in enumerate(values)]
    svg = scatter("n", "t", points, ["s"], x_label="x", y_label="y", x_form=str)
    ys, xs = heights(svg), place(svg)
    assert ys[0] > ys[-1]  # more is higher, and SVG counts downwards
    assert np.allclose(np.diff(ys) / -np.diff(values), (ys[0] - ys[-1]), atol=0.5)
    assert np.allclose(np.diff(xs), np.diff(xs)[0], atol=0.2)  # equal factors, equal distances


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def linear(code: str) -> Any:
    channels = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: Any) -> Any:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colours: Sequence[str], matrix: Any) -> float:
    seen = [lab(matrix @ linear(code)) for code in colours]
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("name", BLINDNESS)
@pytest.mark.parametrize(("colours", "paper"), [(LIGHT, "#fcfbf8"), (DARK, "#171614")], ids=["light", "dark"])
def test_colours_keep_apart_for_colour_blind_readers(name: str, colours: Sequence[str], paper: str) -> None:
    assert closest(colours, BLINDNESS[name]) > 20  # some ten just noticeable steps
    for code in colours:
        low, high = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(c)) for c in (code, paper))
        assert (high + 0.05) / (low + 0.05) >= 3  # WCAG 2.2, 1.4.11
    okabe_ito = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
    assert closest(colours, BLINDNESS[name]) > closest(okabe_ito, BLINDNESS[name])  # the usual palette for such readers
    # red and green of the same lightness would be told apart by most and not by these readers
    if name == "deuteranopia":
        assert closest(["#c44e00", "#7a6a00"], BLINDNESS["protanopia"]) < 10


def test_the_page_is_whole_loads_nothing_and_escapes_what_runs_say(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path)
    page = write_report(tmp_path, cells).read_text()
    assert not re.search(r"(src|href)=\"(?!#)|https?://|@import|url\((?!#)", page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; went wrong" in page
    assert page.count("<svg") == page.count("</svg>") == 3  # the LLM never changed: no pictures of it
    assert "Take method=slow" in page
    assert "18 of 20 runs finished" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert palette_css().split("{")[1].strip().startswith("--c0: ")
    assert (tmp_path / "results.csv").read_text() == csv_text(rows_of(cells)).replace("\r\n", "\n")
    names = ("slm_epsilon", "slm_bytes_up", "slm_seconds")
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf")}


def streams(pdf: bytes) -> bytes:
    """Everything a PDF holds, its compressed streams opened."""
    found = [pdf]
    for match in re.finditer(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            found.append(zlib.decompress(match[1]))
        except zlib.error:
            continue
    return b"\n".join(found)


def test_figures_for_a_paper_stand_alone_and_embed_truetype_fonts(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        scatter_files(folder, "f", some_points("$x$"), NAMES, x_label="ε & <b>", y_label="y", x_form=str)
    for kind in ("svg", "pdf"):
        assert (tmp_path / "one" / f"f.{kind}").read_bytes() == (tmp_path / "two" / f"f.{kind}").read_bytes()
    pdf = (tmp_path / "one" / "f.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-1.")
    assert pdf.rstrip().endswith(b"%%EOF")
    inside = streams(pdf)
    fonts = re.findall(rb"/BaseFont /(\S+)", inside)
    assert fonts
    assert b"/FontFile2" in inside  # the TrueType programs are in the file
    assert b"/Type3" not in inside
    assert b"/FontFile2" not in streams(type_3(tmp_path))  # matplotlib's default, which publishers refuse
    svg = ET.parse(tmp_path / "one" / "f.svg").getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert {e.tag.rpartition("}")[2] for e in svg.iter()} & {"text", "image", "script"} == set()  # outlines only
    assert not re.search(r'href="(?!#)', (tmp_path / "one" / "f.svg").read_text())


def type_3(folder: Path) -> bytes:
    figure = Figure()
    figure.add_subplot().set_xlabel("ε")
    figure.savefig(folder / "type3.pdf")
    return (folder / "type3.pdf").read_bytes()


def test_parquet_is_the_csv_as_pandas_reads_it(tmp_path: Path) -> None:
    cells = make_sweep(tmp_path)
    odd = {"method": 'a, "b"\nc', "privacy.epsilon": "0.5", "seed": "7"}
    cells.append(make_cell(tmp_path, odd, summary(0.1, epsilon=0.5)))
    write_report(tmp_path, cells)
    table = pd.read_parquet(tmp_path / "results.parquet")
    text = pd.read_csv(tmp_path / "results.csv")
    assert len(table) == len(cells)
    pd.testing.assert_frame_equal(table, text, check_dtype=False, check_exact=True)
    assert table["seed"].dtype == "int64"
    assert table["privacy.epsilon"].dtype == table["bytes_up"].dtype == "float64"
    assert table["privacy.epsilon"].isna().sum() == 6  # null is no number: these are the runs without DP


def test_a_drawn_field_has_a_chart_of_its_own(tmp_path: Path) -> None:
    values = ["0.1", "0.35", "1.2", "4", "9e0"]
    cells = [
        make_cell(tmp_path, {"a.b": v, "method": m, "seed": "0"}, summary(i / 10, epsilon=None))
        for i, v in enumerate(values)
        for m in "xy"
    ]
    settings = settings_of(rows_of(cells))
    (chart,) = [chart for chart in charts(settings, ["slm"], "nats") if chart.name == "slm_a_b"]
    assert sorted({point.x for point in chart.points if point.x is not None}) == [float(v) for v in values]
    assert chart.series == ("method=x", "method=y")
    assert not any(point.front for point in chart.points)
    assert [c.name for c in charts(settings, ["slm"], "nats")] == ["slm_bytes_up", "slm_seconds", "slm_a_b"]
    assert "slm_a_b" not in [c.name for c in charts(settings_of(rows_of(cells[:8])), ["slm"], "nats")]


def test_a_sweep_without_a_finished_run_still_has_a_page(tmp_path: Path) -> None:
    cell = make_cell(tmp_path, {"method": "a"}, None, reason="it broke")
    page = write_report(tmp_path, [cell]).read_text()
    assert "nothing to choose from" in page
    assert "it broke" in page


def test_differing_data_is_called_no_comparison(tmp_path: Path) -> None:
    cells = [make_cell(tmp_path, {"data.path": p, "seed": s}, summary(0.2, epsilon=None)) for p in "ab" for s in "01"]
    assert "no comparison of methods" in write_report(tmp_path, cells).read_text()


def test_a_crash_leaves_the_old_or_the_new_note(tmp_path: Path) -> None:
    put(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        put(tmp_path / "x.json", {"a": math.nan})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
