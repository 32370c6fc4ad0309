"""The auditor's own reading: one meaning for every file, signatures, trees and epsilons as others compute them."""

from __future__ import annotations

import ast
import json
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree
from securesystemslib.dsse import Envelope as PublishedEnvelope

from fedcollm_audits import evidence, second_accountant, signatures, strict_json
from fedcollm_audits.check_heads import prefix_roots
from fedcollm_privacy import accounting
from fedcollm_privacy.adaptive import AdaptivePlan, best_order
from fedcollm_privacy.errors import InvalidValue

from .run_folders import build
from .run_records import jcs, key_of, public, tree_root

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBER = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"a":1,"a":2}', "twice"),
        (b'{"a":{"b":1,"b":1}}', "twice"),
        (b"NaN", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[1e999]", "beyond every float"),
        (b"9007199254740992", "beyond 2\\^53"),
        (b"-" + b"9" * 5000, "beyond 2\\^53"),
        (b'"\\ud800"', "surrogates"),
        (b"\xff", "utf-8"),
        (b"[" * 33 + b"]" * 33, "nested"),
        (b"[" * 200_000, "nested"),
        (b"{} {}", "Extra data"),
        (b"", "Expecting value"),
    ],
)
def test_what_can_be_read_in_two_ways_or_not_at_all_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        strict_json.parse(text)


@settings(max_examples=150)
@given(JSON)
def test_canonical_form_is_that_of_the_library_that_signed(value: Any) -> None:
    assert strict_json.canonical(value) == rfc8785.dumps(value)
    assert strict_json.parse(json.dumps(value).encode()) == value


def test_canonical_form_is_the_published_example_of_rfc_8785() -> None:
    text = (
        rb'{"numbers":[333333333.33333329,1E30,4.50,2e-3,0.000000000000000000000000001],'
        rb'"string":"\u20ac$\u000F\u000aA\u0027\u0042\u0022\u005c\\\"\/","literals":[null,true,false]}'
    )
    said = (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    assert strict_json.canonical(strict_json.parse(text)) == said.encode()


@settings(max_examples=60)
@given(st.binary(max_size=80), st.integers(0, 511))
def test_a_signature_holds_for_its_message_purpose_and_key_only(message: bytes, bit: int) -> None:
    key = key_of("ash")
    signature = key.sign(b"fedcollm/v1/plan\x00" + message)
    assert signatures.holds(public(key), message, signature, purpose="plan")
    assert not signatures.holds(public(key), message, signature, purpose="roster")
    assert not signatures.holds(public(key), message, signature)
    assert not signatures.holds(public(key), message + b"x", signature, purpose="plan")
    assert not signatures.holds(public(key_of("elm")), message, signature, purpose="plan")
    flipped = bytearray(signature)
    flipped[bit // 8] ^= 1 << bit % 8
    assert not signatures.holds(public(key), message, bytes(flipped), purpose="plan")


def test_rfc_8032_test_2_holds_and_its_malleable_twin_does_not() -> None:
    key = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = bytes.fromhex(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aee"
        "b00d291612bb0c00"
    )
    assert signatures.holds(key, b"\x72", signature)
    order = 2**252 + 27742317777372353535851937790883648493
    twin = signature[:32] + (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    assert not signatures.holds(key, b"\x72", twin)


@pytest.mark.parametrize("y", [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18, 2**255 - 1])
def test_keys_under_which_anything_holds_are_none(y: int) -> None:
    key = y.to_bytes(32, "little").hex()
    assert not signatures.is_key(key)
    assert not signatures.holds(key, b"", bytes(64))


@pytest.mark.parametrize("key", ["", "0" * 63, "A" * 64, "02" + "00" * 31, None, 7])
def test_what_is_no_key_is_refused(key: object) -> None:
    assert not signatures.is_key(key)


def test_pae_is_that_of_the_published_library() -> None:
    payload = b"hello \xe2\x82\xac"
    published = PublishedEnvelope(payload=payload, payload_type=signatures.DSSE_TYPE, signatures={})
    assert signatures.pae(signatures.DSSE_TYPE, payload) == published.pae()


@settings(max_examples=30)
@given(st.lists(st.binary(min_size=32, max_size=32), max_size=40))
def test_every_prefix_has_the_root_of_rfc_6962(leaves: list[bytes]) -> None:
    roots = prefix_roots(leaves)
    assert roots == [tree_root(leaves[:size]) for size in range(len(leaves) + 1)]
    tree = InmemoryTree(algorithm="sha256")
    for leaf in leaves:
        tree.append_entry(leaf)
        assert roots[tree.get_size()] == tree.get_root().hex()


SCHEDULES = [
    (0.8, Fraction(1, 50), 200, 1e-5),
    (1.0, Fraction(64, 5000), 3000, 1e-5),
    (0.5, Fraction(1, 10), 50, 1e-6),
    (6.0, Fraction(1, 2), 100, 1e-5),
    (2.5, Fraction(1, 16), 3, 1e-5),
]


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), SCHEDULES)
def test_an_honest_charge_lies_between_the_bounds_and_a_hundredth_less_does_not(
    sigma: float, rate: Fraction, steps: int, delta: float
) -> None:
    found = second_accountant.bounds(sigma, rate, steps, delta)
    charged = accounting.epsilon(sigma, rate, steps, delta)
    assert found.lower is not None
    assert found.lower <= charged <= found.upper
    assert charged - 0.05 < found.lower, "or too small a charge would pass"
    profile = accounting.privacy_profile(
        [accounting.Steps(noise_multiplier=sigma, sample_rate=rate, steps=steps)], [charged / 2]
    )[0]
    least = second_accountant.lower_delta(sigma, rate, steps, delta, charged / 2)
    assert least is not None
    assert 0.5 * profile - delta / 500 <= least <= profile


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), SCHEDULES)
def test_the_renyi_bound_is_that_of_dp_accounting(sigma: float, rate: Fraction, steps: int, delta: float) -> None:
    block = [accounting.Steps(noise_multiplier=sigma, sample_rate=rate, steps=steps)]
    whole = accounting.renyi_divergences(block, [2.0, 7.0, 64.0])
    mine = [steps * second_accountant.divergence(sigma, float(rate), order) for order in (2, 7, 64)]
    np.testing.assert_allclose(mine, whole, rtol=1e-6)
    assert (
        second_accountant.rdp_epsilon(sigma, float(rate), steps, delta) >= accounting.rdp_epsilon(block, delta) - 1e-9
    )


def test_the_closed_formula_and_the_integral_agree_also_without_sampling() -> None:
    for sigma, rate in ((0.5, 0.1), (1.0, 0.01), (3.0, 0.5), (2.0, 1.0)):
        closed = second_accountant._divergences(sigma, rate)
        orders = second_accountant._ORDERS[:20]
        integral = [second_accountant.divergence(sigma, rate, order) for order in orders]
        np.testing.assert_allclose(integral, closed[:20], rtol=1e-6, atol=1e-9)
    assert second_accountant.divergence(2.0, 1.0, 3.0) == 3 / 8


def test_the_full_batch_bound_is_the_gaussian_mechanisms() -> None:
    found = second_accountant.bounds(4.0, Fraction(1), 1, 1e-5)
    assert found.lower is not None
    # Balle and Wang 2018: delta(e) = Phi(1/(2s) - e s) - exp(e) Phi(-1/(2s) - e s)
    low, high = 0.0, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        upper, lower = 0.125 - 4 * middle, -0.125 - 4 * middle
        delta = math.erfc(-upper / math.sqrt(2)) / 2 - math.exp(middle) * math.erfc(-lower / math.sqrt(2)) / 2
        low, high = (middle, high) if delta > 1e-5 else (low, middle)
    assert found.lower <= high <= found.upper
    assert high - found.lower < 0.03


def test_a_grid_too_large_gives_no_bound_from_below_and_says_so() -> None:
    found = second_accountant.bounds(0.3, Fraction(1, 2), 1_000_000, 1e-5)
    assert found.lower is None
    assert "cells" in found.missing


def test_the_filters_budget_is_the_trainers() -> None:
    steps = accounting.Steps(noise_multiplier=1.0, sample_rate=Fraction(1, 50), steps=1)
    plan = AdaptivePlan(order=best_order(4.0, 1e-5, steps), target_epsilon=4.0, delta=1e-5, unit="record")
    assert second_accountant.rdp_budget(plan.order, 4.0, 1e-5) == pytest.approx(plan.rdp_budget, rel=1e-12)


@pytest.mark.parametrize("bad", [(math.nan, Fraction(1, 2), 1, 1e-5), (1.0, Fraction(0), 1, 1e-5),
                                 (1.0, Fraction(1, 2), 0, 1e-5), (1.0, Fraction(1, 2), 1, 0.7)])  # fmt: skip
def test_impossible_schedules_are_refused(bad: tuple[float, Fraction, int, float]) -> None:
    with pytest.raises(InvalidValue):
        second_accountant.bounds(*bad)


def test_files_that_lead_elsewhere_are_not_followed(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    for name in ("summary.json", "transcript.jsonl", "statement.json"):
        (tmp_path / name).write_bytes((built.folder / name).read_bytes())
        (built.folder / name).unlink()
        (built.folder / name).symlink_to(tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    (built.folder / "ledgers").rename(tmp_path / "elsewhere" / "ledgers")
    (built.folder / "ledgers").symlink_to(tmp_path / "elsewhere" / "ledgers")
    found = evidence.read(built.folder)
    assert set(found.broken) == {"summary.json", "transcript.jsonl", "statement.json",
                                 *(f"ledgers/{site}.jsonl" for site in built.sites)}  # fmt: skip
    assert not found.ledgers
    assert found.envelope is None


@pytest.mark.parametrize(
    "name", ["config.yaml", "summary.json", "transcript.jsonl", "statement.json", "ledgers/ash.jsonl"]
)
@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"[1]", b"{}", b'{"a":1,"a":1}\n', b"- a\n", b"[" * 99_999, b"\xff\xfe", b"a: &x [*x]\n"]
)
def test_no_content_of_a_file_makes_reading_fail(tmp_path: Path, name: str, content: bytes) -> None:
    run = tmp_path / "run"
    (run / "ledgers").mkdir(parents=True)
    (run / name).write_bytes(content)
    found = evidence.read(run)
    assert isinstance(found, evidence.Evidence)
    if name != "config.yaml" and content not in (b"", b"{}"):
        assert name in found.broken


def test_pipes_and_oversized_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "summary.json")
    with (tmp_path / "config.yaml").open("wb") as file:
        file.truncate(2**23)
    found = evidence.read(tmp_path)
    assert "regular file" in found.broken["summary.json"]
    assert "at most" in found.broken["config.yaml"]


def test_a_roster_counts_under_the_governances_key_only(tmp_path: Path) -> None:
    build(tmp_path / "run", governed=True)
    governance = public(key_of("governance"))
    (tmp_path / "governance.pub").write_bytes(jcs({"name": "governance", "public_key": governance}))
    for given_key, governed in (
        (governance, True),
        (tmp_path / "governance.pub", True),
        (public(key_of("mallory")), False),
        (None, False),
    ):
        (roster,) = evidence.read(tmp_path / "run", governance=given_key).rosters.values()
        assert roster.governed is governed
    with pytest.raises(InvalidValue, match="governance"):
        evidence.read(tmp_path / "run", governance=tmp_path / "run" / "summary.json")


def test_a_folders_copy_of_a_ledger_must_be_the_beginning_of_the_export_given(tmp_path: Path) -> None:
    built = build(tmp_path / "run")
    export = tmp_path / "from-the-site.jsonl"
    export.write_bytes((built.folder / "ledgers" / "ash.jsonl").read_bytes())
    built.edit_ledger("ash", lambda entries: entries.pop())
    found = evidence.read(built.folder, ledgers=[export])
    assert not found.broken
    assert found.ledgers["ash"].path == export
    built.edit_ledger("ash", lambda entries: entries[0].update(epsilon=0.1))
    assert "contradicts" in evidence.read(built.folder, ledgers=[export]).broken["ledgers/ash.jsonl"]


def test_the_auditors_code_is_not_the_trainers() -> None:
    """Of ours it imports errors and validators only; else one mistake would be made twice and seen by nobody."""
    folder = Path(evidence.__file__).parent
    about = (
        "adapters",
        "artefacts",
        "budget",
        "claims",
        "files",
        "heads",
        "ledgers",
        "plans",
        "statement",
        "transcript",
    )
    names = [f"check_{name}" for name in about]
    names += ["strict_json", "notes", "signatures", "evidence", "shapes", "second_accountant", "ledger_exports"]
    names += ["statement_of", "verdict"]
    for name in names:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = {module for module in modules if module.startswith(("fedcollm_privacy", "secure_fedcollm"))}
            if ours == {"fedcollm_privacy"}:
                ours = {alias.name for alias in node.names}  # type: ignore[attr-defined]
            assert ours <= {"fedcollm_privacy.errors", "_validate"}, name
