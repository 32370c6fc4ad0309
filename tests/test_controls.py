"""The mapping to law and standards claims what checks show and no more."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedcollm_audits.audit import CHECKS, Audit, run_checks
from fedcollm_audits.controls import CONTROLS, NO_SOFTWARE_ANSWERS, Control, rows
from fedcollm_audits.evidence import Evidence
from fedcollm_audits.verdict import Check, Finding, failed, not_shown, passed

GROUP_OF = {check.name: check.group for check in CHECKS}


def an_audit(tmp_path: Path, *, private: bool | None = True, **changed: Finding | None) -> Audit:
    """Every real check's name with an answer: pass, but for those named; None is not selected."""

    def answering(check: Check) -> Check:
        return replace(check, run=lambda _: changed.get(check.name) or passed("It does."))

    evidence = Evidence(
        run_dir=tmp_path, config={}, summary={} if private is None else {"private": private}, transcript=(), ledgers={},
        rosters={}, envelope=None, broken={},
    )  # fmt: skip
    left_out = {name for name, finding in changed.items() if finding is None}
    selected = {check.name for check in CHECKS} - left_out
    return run_checks(evidence, [answering(c) for c in CHECKS], lambda *_: None, selected=selected)


def by_reference(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{row['source']} {row['reference']}": row for row in found}


def test_every_named_check_exists_and_every_check_is_evidence_for_something() -> None:
    named = {name for control in CONTROLS for name in control.checks}
    assert named == set(GROUP_OF)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda c: c.reference)
def test_every_control_says_what_no_software_can_answer_and_claims_no_compliance(control: Control) -> None:
    assert control.checks
    assert len(set(control.checks)) == len(control.checks)
    assert len(control.cannot_answer) > 30
    assert control.evidence.endswith(".")
    assert control.cannot_answer.endswith(".")
    said = f"{control.title} {control.evidence}"
    assert not re.search(
        r"compl(y|ies|iant|iance)|certif|fulfil|satisf|guarantee|conform|anonymous", said, re.IGNORECASE
    )


def test_the_controls_that_people_ask_for_are_there_once() -> None:
    references = [f"{control.source.split(',')[0]} {control.reference}" for control in CONTROLS]
    assert len(set(references)) == len(references)
    assert {
        "GDPR Art. 5(1)(c)", "GDPR Art. 5(1)(f)", "GDPR Art. 5(2)", "GDPR Art. 25", "GDPR Art. 32", "GDPR Art. 35",
        *(f"HIPAA § 164.312({letter})" for letter in "abcde"), "HIPAA § 164.514(a)", "HIPAA § 164.514(b)",
        *(f"ISO/IEC 27001:2022 A.{n}" for n in ("5.8", "5.33", "5.34", "8.11", "8.12", "8.15", "8.24")),
        "EU AI Act Art. 10", "EU AI Act Art. 12", "EU AI Act Art. 15",
    } <= set(references)  # fmt: skip


def test_the_hard_questions_are_left_to_people() -> None:
    text = " ".join([*NO_SOFTWARE_ANSWERS, *(control.cannot_answer for control in CONTROLS)])
    for words in ("lawful", "ε is low enough", "organisational measures", "The assessment itself", "advice", "expert"):
        assert words in text, words


def test_all_is_supported_only_where_all_passed(tmp_path: Path) -> None:
    found = rows(an_audit(tmp_path))
    assert all(row["supported"] and not row["open"] for row in found)
    assert [row["reference"] for row in found] == [control.reference for control in CONTROLS]


@pytest.mark.parametrize("finding", [failed("no"), not_shown("open"), None], ids=["fail", "not shown", "not selected"])
@pytest.mark.parametrize("name", sorted(GROUP_OF))
def test_a_check_that_did_not_pass_takes_its_controls_away(name: str, finding: Finding | None, tmp_path: Path) -> None:
    for control, row in zip(CONTROLS, rows(an_audit(tmp_path, **{name: finding})), strict=True):
        assert row["supported"] == (name not in control.checks)
        assert row["open"] == ([name] if name in control.checks else [])
        assert row["checks"].keys() == set(control.checks)


@pytest.mark.parametrize("private", [False, None])
def test_a_run_that_claims_no_privacy_supports_no_control_about_it(private: bool | None, tmp_path: Path) -> None:
    for control, row in zip(CONTROLS, rows(an_audit(tmp_path, private=private)), strict=True):
        about_privacy = any(GROUP_OF[name] in ("plan", "empirical", "leakage") for name in control.checks)
        assert row["supported"] == (not about_privacy)
        assert row["open"] == (["the run claims no privacy"] if about_privacy else [])
    supported = by_reference(rows(an_audit(tmp_path, private=private)))
    assert not supported["GDPR, Regulation (EU) 2016/679 Art. 25"]["supported"]


def test_a_check_that_the_audit_does_not_know_supports_nothing(tmp_path: Path) -> None:
    whole = an_audit(tmp_path)
    cut = replace(whole, answers=tuple(a for a in whole.answers if a.check.name != "openings"))
    for control, row in zip(CONTROLS, rows(cut), strict=True):
        assert row["supported"] == ("openings" not in control.checks)
        assert row["checks"].get("openings", "not known") == "not known"
