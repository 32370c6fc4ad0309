"""The report says what the files say, loudly where it must, and is one safe page."""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcollm_privacy.dsse import PAYLOAD_TYPE, Envelope, Signature
from fedcollm_privacy.errors import FedCollmError, InvalidValue
from secure_fedcollm import figures, report

SITES = ("riverside", "hillcrest", "lakeview", "st-anna")
VOID = {"meta", "br", "link", "img", "hr", "input"}


def a_summary() -> dict[str, Any]:
    spent = (7.991, 7.86, 7.9, 7.42)
    return {
        "run_id": "2026-01-02T03-04-05-clinics-7f3a",
        "name": "four clinics",
        "method": "fedcollm",
        "private": True,
        "declared": "synthetic",
        "noise": "local",
        "note": "Embedded default.",
        "rounds": 6,
        "rounds_lost": 1,
        "aggregation": "rebase",
        "models": {
            "slm": {"name": "stories-sheared-3L", "parameters": 168_896, "adapter_parameters": 12_288,
                    "base_digest": "9c1f" * 16},
            "llm": {"name": "stories-grown-1.2M", "parameters": 1_149_440, "adapter_parameters": 49_152,
                    "base_digest": "03ab" * 16},
        },
        "slm": {
            "before": {"loss": 4.564, "perplexity": 95.97, "token_accuracy": 0.1312, "acc": 0.25},
            "after": {"loss": 2.541, "perplexity": 12.69, "token_accuracy": 0.4127, "acc": 0.31},
        },
        "llm": {
            "before": {"loss": 1.668, "perplexity": 5.3, "token_accuracy": 0.6021, "acc": 0.27},
            "after": {"loss": 1.629, "perplexity": 5.1, "token_accuracy": 0.6104, "acc": 0.26},
        },
        "sites": {
            site: {"epsilon": e, "delta": 1e-5, "unit": "person", "steps": 120 - 20 * (i == 3), "epsilon_budget": 8.0,
                   "epsilon_cap": 20.0, "spent_on_data_set": e + 3 * i, "epsilon_one_update": 2 * e}
            for i, (site, e) in enumerate(zip(SITES, spent, strict=True))
        },
        "bytes_per_parameter": 8.0,
        "bytes_up": 23 * 2 * 65_536,
        "uploaded_parameters": 16_384,
        "secure_sum": {
            "poly_modulus_degree": 4096,
            "coeff_mod_bit_sizes": [60, 49],
            "value_bits": 13,
            "sites": 4,
            "threshold": 3,
            "min_contributors": 3,
            "max_colluding": 1,
        },
        "claims": [
            {"claim": "Every opened sum held at least 3 sites", "holds": True, "detail": "5 openings, fewest 4 sites"},
            {"claim": "No round was opened twice", "holds": True, "detail": ""},
            {"claim": "A single update is unreadable even to the key holder", "holds": False,
             "detail": "needs masks, a later release"},
        ],
        "secrets": [
            {"site": SITES[0], "prompt": "The access code of the ward is ", "secret": "4718", "repetitions": 8,
             "candidates": 1000, "rank_before": 611, "rank_after": 402, "exposure_before": 0.71,
             "exposure_after": 1.31},
            {"site": SITES[2], "prompt": "Her locker opens with ", "secret": "9032", "repetitions": 1,
             "candidates": 1000, "rank_before": 300, "rank_after": 12, "exposure_before": 1.74,
             "exposure_after": 6.38},
        ],
        "samples": [
            {"model": "slm", "prompt": "What are the symptoms of asthma?",
             "target": " Wheezing, shortness of breath and a tight chest, often worse at night.",
             "before": "\n\nOnce upon a time there was a little girl named Lily. She liked to play",
             "after": " The symptoms of asthma are wheezing and shortness of breath, which are often"},
            {"model": "llm", "prompt": "What are the symptoms of asthma?",
             "target": " Wheezing, shortness of breath and a tight chest, often worse at night.",
             "before": " The signs of asthma include a cough",
             "after": " Wheezing, a tight chest and shortness of breath"},
        ],
        "seconds": {"load": 2.1, "local_training": 71.3, "encryption": 3.04, "aggregation": 0.61,
                    "distillation": 38.8, "evaluation": 9.7},
        "versions": {"secure-fedcollm": "0.1.0", "torch": "2.13.0", "tenseal": "0.3.18"},
    }  # fmt: skip


def some_rounds() -> list[dict[str, Any]]:
    slm, llm = [95.97, 40.1, 24.0, None, 16.2, 13.9, 12.69], [5.3, 5.22, 5.18, None, 5.14, 5.11, 5.1]
    lines = []
    for t, (s, g) in enumerate(zip(slm, llm, strict=True)):
        lost = s is None
        outcome = "before" if t == 0 else "lost" if lost else "opened"
        lines.append({
            "server_round": t, "attempt": 1, "outcome": outcome, "cohort": list(SITES) if outcome == "opened" else [],
            "left_out": {"st-anna": "diverged"} if lost else {},
            "slm": None if lost else {"perplexity": s, "acc": 0.25 + t / 100},
            "llm": None if lost else {"perplexity": g, "acc": 0.27 - t / 600},
            "sites": {}, "distillation": None,
            "epsilon": {site: 0.0 if t == 0 else 3.1 + 0.8 * t - 0.1 * i for i, site in enumerate(SITES)},
            "bytes_up": 0 if t == 0 else 4 * 2 * 65_536, "sum_norm": None if t == 0 else 0.81,
            "clipped_fraction": None if t == 0 else 0.013,
            "seconds": {"since_start": 4.0 + 17.8 * t},
        })  # fmt: skip
    return lines


def a_statement() -> dict[str, Any]:
    return {
        "run_id": "2026-01-02T03-04-05-clinics-7f3a",
        "private": True,
        "claim": "Whoever sees all updates of a site learns about any one unit at most what (epsilon, delta) allows.",
        "unit": "person",
        "neighboring_relation": "add or remove one unit",
        "views": {"one_update_seen": "the stated epsilon", "only_sums_and_models_seen": "the same epsilon"},
        "sites": {
            site: {
                "epsilon": 7.991,
                "delta": 1e-5,
                "plan": {"noise_multiplier": 0.83, "sample_rate": "16/400", "steps": 120},
                "ledger": {"head": "5d41" * 16, "tree_size": 7},
            }
            for site in SITES
        },
        "not_covered": ["labels that many records share", "that a site took part"],
    }


def write_run(folder: Path, summary: Any, rounds: Any = None, statement: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    if rounds is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
    if statement is not None:
        signature = Signature(keyid="ab" * 32, signature=bytes(64))
        payload = json.dumps({"predicate": statement}).encode()
        envelope = Envelope(payload_type=PAYLOAD_TYPE, payload=payload, signatures=(signature,))
        (folder / "statement.json").write_bytes(envelope.to_bytes())
    return folder


class Page(HTMLParser):
    """Collects tags, ids and text; fails on a tag that closes what was not open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""

    def banners(self) -> list[str]:
        return [a["class"] or "" for _, a in self.tags if "banner" in (a.get("class") or "").split()]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_run(tmp_path_factory.mktemp("run"), a_summary(), some_rounds(), a_statement())
    return report.render(folder).read_text(encoding="utf-8")


def render(folder: Path, summary: Any, rounds: Any = None, statement: Any = None) -> Page:
    return Page(report.render(write_run(folder, summary, rounds, statement)).read_text(encoding="utf-8"))


def test_page_is_well_formed(full: str) -> None:
    page = Page(full)
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^)"]+)', full))
    assert referred
    assert referred <= set(ids)


def test_page_loads_nothing(full: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|data:|file:|javascript:", full)
    page = Page(full)
    assert not {"script", "link", "iframe", "img", "object", "embed", "form", "base"} & {tag for tag, _ in page.tags}
    loading = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "xlink:href", "srcset")]
    assert loading
    assert all(value and value.startswith("#") for value in loading)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", full))


def test_page_is_the_same_again(full: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, a_summary(), some_rounds(), a_statement())
    assert report.render(folder).read_text(encoding="utf-8") == full


def test_every_site_and_its_spend_are_printed(full: str) -> None:
    text = Page(full).text
    for site, spent in zip(SITES, ("8.00", "7.86", "7.90", "7.42"), strict=True):
        assert re.search(rf"{site}\s+{spent}\s+8\.00\s*[\d.]+\s*20\.00\s+1e-5\s*person\s*1[02]0", text), site


def test_plain_summary_is_computed(full: str) -> None:
    text = Page(full).text
    assert "SLM perplexity fell from 96.0 to 12.7 and LLM perplexity fell from 5.30 to 5.10." in text
    assert "LLM choice accuracy fell from 27.0\u202f% to 26.0\u202f%." in text
    assert "No site spent more than ε = 8.00 (δ = 1e-5) for any one person." in text


def test_verdict_knows_which_direction_is_better(full: str) -> None:
    text = Page(full).text
    assert re.search(r"Perplexity\s*96\.0\s*12\.7\s*−83\.3 \(−87\u202f%\)\s*▼ better", text)
    assert re.search(r"Choice accuracy\s*27\.0\u202f%\s*26\.0\u202f%\s*−1\.0 points\s*▼ worse", text)


def test_flow_has_the_numbers_of_the_run(full: str) -> None:
    text = re.sub(r"\s+", " ", Page(full).text)
    # 16,384 parameters of 8 bytes; 65,536 bytes a ciphertext: two polynomials of 4096 words of 8 bytes
    assert "encrypted131 kB each2 ciphertexts8.00 bytes per parameter" in text
    assert "Opened 5 sums of 4 sites; 1 round lost, nothing opened." in text
    assert "opens that sum and nothing smaller, as long as at most 1 of the 4 sites work with the server" in text
    assert "3 sites' shares take the masks of a sum away" in text
    assert "whoever runs that machine could read everything" in text
    assert re.search(r"✗ does not\s*A single update is unreadable even to the key holder", text)


def test_charts_describe_themselves_and_mark_lost_rounds(full: str) -> None:
    charts = re.findall(r"<svg[^>]*role=\"img\".*?</svg>", full, flags=re.DOTALL)
    assert len(charts) == 4
    assert "SLM perplexity: from 96.0 at round 0 to 12.7 at round 6." in charts[0]
    assert all(">lost</text>" in chart for chart in charts)
    assert all("#0102" not in chart and "var(--" in chart for chart in charts)


def test_exposure_of_guessing_is_the_mean_over_ranks(full: str) -> None:
    mean = sum(math.log2(1000 / rank) for rank in range(1, 1001)) / 1000
    assert f"9.97 would be certainty and {mean:.2f} is what guessing" in re.sub(r"\s+", " ", Page(full).text)


def test_private_synthetic_run_says_both(full: str) -> None:
    page = Page(full)
    assert page.banners() == ["banner private", "banner synthetic"]
    assert "NOT PRIVATE" not in page.text
    assert "SYNTHETIC DATA" in page.text


@pytest.mark.parametrize("stated", [{"private": False}, {}])
def test_run_that_is_not_private_says_so_loudly(stated: dict[str, Any], tmp_path: Path) -> None:
    summary = a_summary() | {"declared": "private"}
    del summary["private"]
    for row in summary["sites"].values():
        row["epsilon"] = row["delta"] = None
    page = render(tmp_path, summary | stated)
    assert "banner not-private" in page.banners()
    assert "banner private" not in page.banners()
    assert "SYNTHETIC" not in page.text
    assert "NOT PRIVATE" in page.text
    assert page.text.count("unbounded") == 4
    assert "No site spent more than" not in page.text


def test_private_run_without_an_epsilon_is_refused(tmp_path: Path) -> None:
    summary = a_summary()
    summary["sites"]["lakeview"]["epsilon"] = None
    with pytest.raises(InvalidValue, match=r"summary\.json: sites\.lakeview\.epsilon"):
        report.render(write_run(tmp_path, summary))


def test_text_from_data_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script><img src=x onerror=y>\"><svg onload=z>"

    def poison(value: Any) -> Any:
        if isinstance(value, str):
            return evil
        if isinstance(value, list):
            return [poison(v) for v in value]
        if isinstance(value, dict):
            return {k: poison(v) for k, v in value.items()}
        return value

    summary, rounds = poison(a_summary()), poison(some_rounds())
    for model in ("slm", "llm"):
        for when in ("before", "after"):
            summary[model][when][evil] = 1.0
    for key in ("sites", "seconds", "versions"):
        summary[key] = {f"{evil}{i}": v for i, v in enumerate(summary[key].values())}
    for line in rounds:
        line["outcome"], line["epsilon"] = "opened", {f"{evil}{i}": v for i, v in enumerate(line["epsilon"].values())}
        line["left_out"] = {evil: evil}
        line["sites"] = {evil: {"perplexity": 3.0 + line["server_round"]}}
    page = render(tmp_path, summary, rounds, {evil: [evil, {evil: evil}], "sites": {evil: evil}, "not_covered": [evil]})
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(evil) > 30


@pytest.mark.parametrize("key", [None, *a_summary()])
def test_missing_part_is_left_out(key: str | None, tmp_path: Path) -> None:
    summary = a_summary() if key else {}
    summary.pop(key or "", None)
    page = render(tmp_path, summary)
    assert page.open == []
    assert ("Planted secrets" in page.text) == (key not in (None, "secrets"))
    assert ("What was encrypted" in page.text) == (key not in (None, "secure_sum", "bytes_up"))


def every_path(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [p for key, inner in items for p in every_path(inner, (*path, key))]


@settings(max_examples=60, deadline=None)
@given(
    path=st.sampled_from(every_path(a_summary())[1:]),
    junk=st.sampled_from([None, True, -1, 0, 10**30, 1e308, -2.5, "", "x", [], [1], {}, {"x": 1}, {"x": None}]),
    in_rounds=st.booleans(),
)
def test_any_wrong_value_gives_a_page_or_a_clear_refusal(path: tuple[Any, ...], junk: Any, in_rounds: bool) -> None:
    summary, rounds = copy.deepcopy(a_summary()), copy.deepcopy(some_rounds()[:1])
    where: Any = summary
    if in_rounds:
        where, paths = rounds[0], every_path(rounds[0])[1:]
        path = paths[len(repr(path)) % len(paths)]
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = junk
    with tempfile.TemporaryDirectory() as folder:
        try:
            page = render(Path(folder), summary, rounds)
        except InvalidValue as error:
            refusal = str(error)
        else:
            refusal = ""
            assert page.open == []
    assert re.match(r"summary\.json|metrics\.jsonl line 1|$", refusal)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"slm": {"after": {"loss": NaN}}}', '{"bytes_per_parameter": 1e999}'])
def test_broken_summary_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(FedCollmError, match=r"summary\.json"):
        report.render(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "statement.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b'"x"'])
def test_unreadable_file_is_refused_by_name(name: str, content: bytes, tmp_path: Path) -> None:
    write_run(tmp_path, a_summary(), some_rounds()[:1], a_statement())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidValue, match=re.escape(name)):
        report.render(tmp_path)


def test_missing_summary_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"summary\.json"):
        report.render(tmp_path)


@pytest.mark.parametrize("line", ['{"server_round": 1', '{"outcome": "opened"}', '{"server_round": "1"}', "3"])
def test_broken_metrics_line_is_refused_by_number(line: str, tmp_path: Path) -> None:
    write_run(tmp_path, a_summary(), some_rounds()[:2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InvalidValue, match=r"metrics\.jsonl line 3"):
        report.render(tmp_path)


def test_standalone_run_draws_its_sites_and_no_flow(tmp_path: Path) -> None:
    summary, rounds = a_summary(), some_rounds()[:3]
    for key in ("secure_sum", "bytes_up", "bytes_per_parameter"):
        summary[key] = None
    for line in rounds:
        line |= {"outcome": "kept", "slm": None, "cohort": []}
        line["sites"] = {site: {"perplexity": 90.0 - 9 * i - line["server_round"]} for i, site in enumerate(SITES)}
    page = render(tmp_path, summary, rounds)
    assert "Perplexity, each site alone" in page.text
    assert "SLM perplexity:" not in page.text
    assert "What was encrypted" not in page.text
    assert "only sums" not in page.text


@pytest.mark.parametrize("values", [(5.0, 5.0), (0.0, 0.0), (-1.0, 1e-9), (1.0, 1e12), (1e12, 1e-300)])
def test_chart_of_odd_values_is_drawn(values: tuple[float, float]) -> None:
    points = tuple((float(t), value) for t, value in enumerate(values))
    chart = figures.line_chart("Odd", [figures.Line(points=points, colour="slm")], form=report.number)
    assert Page(chart).open == []
    assert "nan" not in chart
    assert "inf" not in chart


@given(st.floats(0, 1e6))
def test_shown_epsilon_is_never_below_the_spent_one(spent: float) -> None:
    shown = float(report.epsilon(spent))
    assert spent <= shown <= spent + 0.01 + 1e-9


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.345, "12.3"), (-0.0390, "−0.039"), (5.3, "5.30"), (1234567, "1\u202f234\u202f567"),
     (1234.5, "1\u202f234"), (2.5e-5, "2.5e−5"), (None, "–")],
)  # fmt: skip
def test_numbers_read_well(value: float | None, text: str) -> None:
    assert report.number(value) == text
