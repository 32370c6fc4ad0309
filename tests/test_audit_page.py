"""The auditor's page: verdict first and in words, every finding, hostile texts as texts, a picture to read aloud."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcollm_audits.audit import CHECKS, Audit, run_checks
from fedcollm_audits.controls import CONTROLS, NO_SOFTWARE_ANSWERS
from fedcollm_audits.evidence import Envelope, Evidence
from fedcollm_audits.page import GROUPS, render
from fedcollm_audits.picture import Bound, bounds_chart, bounds_of, numbers
from fedcollm_audits.verdict import Check, Finding, failed, not_shown, passed

from .test_statement_page import EVIL, Structure, a_statement, poisoned

BOUNDS = [
    {"name": "One run (Steinke et al. 2023)", "lower": 2.3189, "confidence": 0.95, "claim": 7.991},
    {"name": "A step without its noise", "lower": 9.3, "confidence": 0.99, "claim": 7.991},
]
MEMBERSHIP = {
    "slm loss": {"p_value": 0.31, "auc": {"estimate": 0.5123, "low": 0.46, "high": 0.56}, "dp": {"beyond": False}},
    "claim": {"epsilon": 7.99, "delta": 1e-5},
}
SECRETS = {"slm": {"bits": 1.31, "secrets": [{"site": "riverside", "candidates": 1000, "rank": 402}]}}


def check(name: str, group: str, finding: Finding) -> Check:
    return Check(name=name, group=group, question=f"Is {name} so?", why=f"Because of {name}.", run=lambda _: finding)


def checks(**changed: Finding) -> list[Check]:
    answers: dict[str, tuple[str, Finding]] = {
        "ledger-chain": ("ledger", passed("Four chains hold.", "All signed.")),
        "epsilon-recomputed": ("plan", passed("Recomputed.")),
        "openings": ("transcript", passed("Five sums were opened.")),
        "no-single-update": ("artefacts", passed("None lies here.")),
        "statement-signed": ("statement", passed("By all.")),
        "one-run-audit": ("empirical", passed("At least 2.31.", claim=7.991, bounds=BOUNDS[:1])),
        "planted-secrets": ("leakage", passed("None known.", **SECRETS)),
        "membership": ("leakage", passed("Not told apart.", **MEMBERSHIP)),
    }
    return [check(name, group, changed.get(name, finding)) for name, (group, finding) in answers.items()]


def an_audit(folder: Path, asked: list[Check], statement: Any = None, **options: Any) -> Audit:
    envelope = None
    if statement is not None:
        envelope = Envelope(payload_type="x", payload=b"", statement={"predicate": statement}, signatures=())
    broken = options.pop("broken", {})
    evidence = Evidence(
        run_dir=folder, config={}, summary={}, transcript=(), ledgers={}, rosters={}, envelope=envelope, broken=broken
    )
    return run_checks(evidence, asked, lambda *_: None, **options)


def page(audit: Audit) -> Structure:
    html = render(audit)
    assert not re.search(r"https?:|//[a-z]|@import|javascript:|url\(", html)
    whole = Structure(html)
    whole.check()
    return whole


@pytest.mark.parametrize(
    ("changed", "headline"),
    [({}, "✓ YES"), ({"openings": failed("Twice!")}, "✗ NO"), ({"openings": not_shown("Who knows.")}, "? NOT SHOWN")],
)
def test_the_verdict_comes_first_and_in_words(changed: dict[str, Finding], headline: str, tmp_path: Path) -> None:
    audit = an_audit(tmp_path, checks(**changed), a_statement())
    whole = page(audit)
    body = whole.flat[whole.flat.index("Audit of run") :]
    assert body.startswith(f"Audit of run run-7f3a {headline} {audit.sentence}")
    assert sum(word in whole.text for word in ("✓ YES", "✗ NO", "? NOT SHOWN")) == 1
    assert whole.flat.strip().startswith({"✓": "Yes", "✗": "No", "?": "Not shown"}[headline[0]])


def test_a_yes_to_some_checks_is_called_a_yes_in_part(tmp_path: Path) -> None:
    audit = an_audit(tmp_path, checks(), a_statement(), selected={"ledger-chain"})
    assert "✓ YES, AS FAR AS ASKED Yes: the only check made passed. 7 checks were not made" in page(audit).flat
    assert "AS FAR AS ASKED" not in page(an_audit(tmp_path, checks(), a_statement())).flat


def test_every_check_stands_there_with_question_reason_answer_and_evidence(tmp_path: Path) -> None:
    asked = checks(openings=failed("Twice!", "In round 3."), membership=not_shown("Too few."))
    audit = an_audit(tmp_path, asked, a_statement(), selected={c.name for c in asked} - {"statement-signed"})
    text = page(audit).flat
    labels = {"pass": "✓ pass", "fail": "✗ FAIL", "not shown": "? not shown", "not selected": "– not asked"}
    for answer in audit.answers:
        evidence = [answer.reason] if answer.finding is None else list(answer.finding.evidence)
        words = [answer.check.name, labels[answer.status], answer.check.question, answer.check.why, *evidence]
        assert re.search(r"\s*".join(re.escape(word) for word in words), text), answer.check.name
    for title in GROUPS.values():
        assert title in text


def test_claims_bounds_leakage_controls_and_repetition_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    audit = an_audit(
        tmp_path, checks(), a_statement(), command="fedcollm-audit run --html", broken={"a.json": "cut off"}
    )
    text = page(audit).flat
    for words in (
        "riverside 8.00 1.1e-5 one record", "One run (Steinke et al. 2023) 2.31 95 % 8.00 within the claim",
        "slm loss 0.31 0.512 (0.46 to 0.56) beyond no", "riverside 1000 402", "fedcollm-audit run --html", "cut off",
        "python", audit.files["config.yaml"], "coordinator", *NO_SOFTWARE_ANSWERS,
        *(control.cannot_answer for control in CONTROLS), *(control.reference for control in CONTROLS),
    ):  # fmt: skip
        assert re.search(re.escape(words).replace(r"\ ", r"\s*"), text), words


def test_parts_without_numbers_are_left_out(tmp_path: Path) -> None:
    whole = page(an_audit(tmp_path, checks()[:2]))
    assert "Claimed and found" not in whole.text
    assert "Leakage of the released models" not in whole.text
    assert "Law and standards" in whole.text


@pytest.mark.parametrize("private", [False, None])
def test_passing_checks_do_not_make_a_run_private(private: bool | None, tmp_path: Path) -> None:
    whole = page(an_audit(tmp_path, checks(), a_statement() | {"private": private}))
    assert "NOT PRIVATE" in whole.flat[: whole.flat.index("Audited")]
    assert "NOT PRIVATE" not in page(an_audit(tmp_path, checks(), a_statement())).text


def test_nothing_on_the_page_claims_compliance(tmp_path: Path) -> None:
    text = page(an_audit(tmp_path, checks(), a_statement())).flat
    assert re.findall(r"\S+ \S*complian\S*", text) == ["no compliance:"]


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    (tmp_path / "a<b>&.txt").write_text("x")
    rows = {EVIL: {EVIL: EVIL, "list": [{EVIL: EVIL}]}, "bounds": [dict(BOUNDS[0], name=EVIL)]}
    asked = [
        Check(name=EVIL, group=group, question=EVIL, why=EVIL, run=lambda _: failed(EVIL, EVIL + "\u202e", **rows))
        for group in ("leakage", EVIL)
    ]
    statement = poisoned(a_statement()) | {"private": True, "sites": {EVIL: {"epsilon": EVIL, "delta": 1e999}}}
    audit = an_audit(tmp_path, asked, statement, command=EVIL, broken={EVIL: EVIL})
    whole = page(audit)
    assert whole.text.count(EVIL) > 20
    assert "\u202e" not in whole.text
    assert "none stated" in whole.text


@pytest.mark.parametrize("junk", [None, 3, "x", [], {}, [1], [None], {"a": 1}, {"a": {}}, [[1]], [{}], math.nan])
def test_details_of_any_shape_give_a_page(junk: Any, tmp_path: Path) -> None:
    for key in ("bounds", "claim", "other"):
        page(an_audit(tmp_path, [check("membership", "leakage", passed("Yes.", **{key: junk}))]))
    page(an_audit(tmp_path, [check("membership", "leakage", Finding(status="pass", evidence=()))]))


def test_every_real_check_has_a_group_that_the_page_names() -> None:
    assert {c.group for c in CHECKS} == set(GROUPS)


# ---------------------------------------------------------------------------------------------- the picture


def test_the_picture_says_all_its_numbers_in_words() -> None:
    chart = bounds_chart(bounds_of({"bounds": BOUNDS}))
    whole = Structure(chart)
    assert whole.open == []
    assert re.search('role="img" aria-labelledby="bounds-title bounds-desc"', chart)
    described = chart[chart.index("<desc") : chart.index("</desc>")]
    assert "at least ε 2.31, 95 % sure; claim at most ε 8.00; within the claim" in described
    assert "at least ε 9.30, 99 % sure; claim at most ε 8.00; more than the claim" in described
    for words in ("bar: at least ε 2.31", "line: claim at most ε 8.00 · within", "line: claim at most ε 8.00 · more"):
        assert words in whole.text


def test_bars_and_lines_are_drawn_to_one_scale_from_zero() -> None:
    bounds = [
        Bound(name="a", claim=8.0, lower=2.0, confidence=None),
        Bound(name="b", claim=4.0, lower=6.0, confidence=0.9),
    ]
    chart = bounds_chart(bounds)
    bars = [float(w) for w in re.findall(r'<rect x="1" [^>]*width="([\d.]+)"', chart)]
    lines = [float(x) - 1 for x in re.findall(r'<path d="M([\d.]+) \d+V', chart)]
    assert bars[1] / bars[0] == pytest.approx(3, rel=0.01)
    assert lines[0] / lines[1] == pytest.approx(2, rel=0.01)
    assert lines[0] / bars[0] == pytest.approx(4, rel=0.01)
    assert max(*bars, *lines) <= 390
    assert re.findall(r'<rect[^>]*fill="([^"]*)"', chart) == ["var(--slm)", "var(--bad)"]


@given(st.lists(st.tuples(st.text(max_size=200), st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=4))
@settings(max_examples=40)
def test_any_bounds_give_a_picture_inside_its_frame(found: list[tuple[str, float, float]]) -> None:
    chart = bounds_chart([Bound(name=n, claim=c, lower=b, confidence=None) for n, c, b in found])
    height = float(re.search(r'viewBox="0 0 400 (\d+)"', chart)[1])  # type: ignore[index]
    assert all(float(y) < height for y in re.findall(r' y="(\d+)"', chart))
    assert all(float(w) <= 390 for w in re.findall(r' width="([\d.]+)"', chart))


@given(st.floats(0, 1e6), st.floats(0, 1e6))
@settings(max_examples=200)
def test_at_least_is_rounded_down_at_most_is_rounded_up_and_an_excess_stays_one(lower: float, claim: float) -> None:
    bound = Bound(name="x", claim=claim, lower=lower, confidence=None)
    low, high = (Decimal(text) for text in numbers(bound))
    assert low <= Decimal(repr(lower))
    assert high >= Decimal(repr(claim))
    assert (low > high) == bound.exceeds


@pytest.mark.parametrize(
    ("details", "count"),
    [({}, 0), ({"bounds": None}, 0), ({"bounds": "x"}, 0), ({"bounds": [1, None]}, 0), ({"bounds": [{}]}, 0),
     ({"bounds": [{"lower": 1.0}]}, 0), ({"bounds": [{"lower": 1.0}], "claim": 2}, 1),
     ({"bounds": [{"lower": math.nan, "claim": 1.0}]}, 0), ({"bounds": [{"lower": 1.0, "claim": math.inf}]}, 0),
     ({"bounds": [{"lower": True, "claim": 1.0}]}, 0), ({"bounds": BOUNDS}, 2)],
)  # fmt: skip
def test_only_whole_bounds_are_drawn(details: dict[str, Any], count: int) -> None:
    assert len(bounds_of(details)) == count
