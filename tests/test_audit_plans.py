"""Plans: what they cost, what ran, and their delta; every planted break is caught by the check that is there for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .audit_answers import at, failing, reasons
from .run_folders import build
from .run_records import Line


def _scaled(factor: float) -> Callable[[Line], Line]:
    def on_entry(entry: Line) -> Line:
        if entry["kind"] in ("PLAN", "RESERVE") and entry["site"] == "beech":
            entry["epsilon"] *= factor
        return entry

    return on_entry


@pytest.mark.parametrize(
    ("factor", "caught"), [(0.8, {"epsilon-recomputed", "statement-true"}), (1.9, {"epsilon-recomputed"})]
)
def test_a_charge_that_other_accountants_contradict_is_caught(tmp_path: Path, factor: float, caught: set[str]) -> None:
    build(tmp_path / "run", on_entry=_scaled(factor))
    assert failing(tmp_path / "run") == caught
    assert "beech" in reasons(tmp_path / "run", "epsilon-recomputed")


def test_a_plan_that_does_not_fit_its_digest_is_caught(tmp_path: Path) -> None:
    build(tmp_path / "run", on_entry=at("beech", "PLAN", lambda e: e["plan"].update(noise_multiplier=2.500001)))
    assert "epsilon-recomputed" in failing(tmp_path / "run")
    assert "does not fit its digest" in reasons(tmp_path / "run", "epsilon-recomputed")


def test_another_delta_than_the_plans_is_caught(tmp_path: Path) -> None:
    build(tmp_path / "run", on_entry=at("beech", "RESERVE", lambda entry: entry.update(delta=2e-5)))
    assert "epsilon-recomputed" in failing(tmp_path / "run")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_multiplier", 2.4999),
        ("noise_multiplier", 0.0),
        ("sampling", "shuffled"),
        ("randomness", "insecure_test_seed"),
        ("sample_rate", "1/16"),
        ("max_grad_norm", 1.5),
        ("clipping", "automatic"),
        ("steps", 2),
        ("code", "d" * 64),
    ],
)
def test_what_ran_otherwise_than_planned_is_caught_by_that_check_alone(tmp_path: Path, field: str, value: Any) -> None:
    build(tmp_path / "run", on_entry=at("beech", "SETTLE", lambda entry: entry["ran"].update({field: value})))
    assert failing(tmp_path / "run") == {"plan-is-what-ran"}


def test_a_share_of_the_noise_is_enough_only_where_the_plan_says_so(tmp_path: Path) -> None:
    build(tmp_path / "run", distributed=True,
          on_entry=at("beech", "SETTLE", lambda e: e["ran"].update(noise_multiplier=1.2)))  # fmt: skip
    assert failing(tmp_path / "run") == {"plan-is-what-ran"}


def test_an_update_that_was_used_needs_a_record_of_its_steps(tmp_path: Path) -> None:
    build(tmp_path / "run", on_entry=at("beech", "SETTLE", lambda entry: entry.update(ran=None)))
    assert failing(tmp_path / "run") == {"plan-is-what-ran"}


def test_a_seeded_run_may_not_call_itself_private(tmp_path: Path) -> None:
    build(tmp_path / "run", plan_changes={"randomness": "insecure_test_seed"})
    assert failing(tmp_path / "run") == {"plan-is-what-ran", "statement-true"}


def _terms(change: Callable[[Line], Any]) -> Callable[[Line], list[Line]]:
    """Round 2 under other terms, with everything that follows from its plan left as it is."""

    def on_event(event: Line) -> list[Line]:
        if event["event"] == "plan" and event["server_round"] == 2:
            change(event["terms"])
        return [event]

    return on_event


@pytest.mark.parametrize(
    "change",
    [
        lambda terms: terms.update(dp=None),
        lambda terms: terms["dp"].update(max_grad_norm=2),
        lambda terms: terms["dp"].update(noise="distributed"),
        lambda terms: terms.update(release="gradient"),
        lambda terms: terms.update(least_honest=2),
    ],
)
def test_round_terms_that_are_not_the_plans_are_caught(tmp_path: Path, change: Callable[[Line], Any]) -> None:
    build(tmp_path / "run", on_event=_terms(change))
    assert (
        {"plan-is-what-ran", "openings"}
        <= failing(tmp_path / "run")
        <= {"plan-is-what-ran", "openings", "statement-true"}
    )


@pytest.mark.parametrize(
    "changes", [{"delta": 2e-5}, {"expected_batch_size": 3200, "sample_rate": "1/16"}, {"expected_batch_size": 626}]
)
def test_a_delta_too_large_is_caught_by_that_check_alone(tmp_path: Path, changes: Line) -> None:
    build(tmp_path / "run", plan_changes=changes)
    assert failing(tmp_path / "run") == {"delta-rule"}
