"""Validators refuse everything but what they name, NaN first of all, and say which field it was."""

from __future__ import annotations

import hashlib
import math
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import FedCollmError, InvalidValue

NO_NUMBERS = [math.nan, math.inf, -math.inf, True, False, "1", b"1", None, [1], 1j]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda v: repr(v)[:12])
def test_what_is_no_finite_number_is_refused_everywhere(value: object) -> None:
    for check in (
        _validate.positive,
        lambda **fields: _validate.at_least(0, **fields),
        lambda **fields: _validate.in_range(0, 1, **fields),
        lambda **fields: _validate.integer_at_least(0, **fields),
    ):
        with pytest.raises(InvalidValue, match="sigma") as refusal:
            check(sigma=value)
        assert refusal.value.field == "sigma"
        assert len(str(refusal.value)) < 200


def test_an_integer_beyond_every_float_is_refused_in_few_words() -> None:
    with pytest.raises(InvalidValue, match="sigma") as refusal:
        _validate.positive(sigma=10**400)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("value", [2.0, 1e3, -1, 0])
def test_counts_are_integers_not_round_floats(value: object) -> None:
    with pytest.raises(InvalidValue, match=r"rounds = .* an integer >= 1"):
        _validate.integer_at_least(1, steps=3, rounds=value)


@settings(deadline=None)
@given(st.floats(allow_nan=True) | st.integers())
def test_bounds_are_those_of_plain_comparison(value: float) -> None:
    finite = math.isfinite(value)
    cases = [
        (finite and value > 0, lambda: _validate.positive(x=value)),
        (finite and value >= -3, lambda: _validate.at_least(-3, x=value)),
        (finite and -3 <= value <= 7.5, lambda: _validate.in_range(-3, 7.5, x=value)),
    ]
    for allowed, check in cases:
        if allowed:
            check()
        else:
            with pytest.raises(InvalidValue, match=r"^x = .* allowed: "):
                check()


def test_every_field_is_checked_not_only_the_first() -> None:
    with pytest.raises(InvalidValue, match=r"^delta"):
        _validate.positive(epsilon=1.0, delta=0.0)


def test_only_listed_words_pass() -> None:
    _validate.one_of(("record", "person"), unit="person")
    for word in ("", "Person", "record ", None, 1):
        with pytest.raises(InvalidValue, match=r"^unit = .*record \| person"):
            _validate.one_of(("record", "person"), unit=word)


@settings(deadline=None)
@given(st.text(st.sampled_from("aB9._-/ \n\\é:"), max_size=70))
def test_a_public_name_is_a_plain_file_name_in_its_own_folder(name: str) -> None:
    try:
        _validate.public_name(site=name)
    except InvalidValue:
        return
    folder = PurePosixPath("/ledgers")
    assert (folder / name).parent == folder
    assert name not in {".", ".."}
    assert name.isascii()
    assert name.isprintable()
    assert not set(name) & set("/\\:*?\"<>|$`'; \t\n")
    assert len(name) <= 64


@pytest.mark.parametrize("name", ["a", "st-anselm", "site_1.b", "9", "x" * 64])
def test_usual_names_pass(name: str) -> None:
    _validate.public_name(site=name)


@pytest.mark.parametrize("name", ["", "x" * 65, ".hidden", "-rf", "../up", "a/b", "a b", "é", "a\n", "٣", None, 7])
def test_names_that_could_leave_their_folder_or_line_do_not(name: object) -> None:
    with pytest.raises(InvalidValue, match="site"):
        _validate.public_name(site=name)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_a_digest_is_what_hashlib_writes(data: bytes) -> None:
    digest = hashlib.sha256(data).hexdigest()
    _validate.hex_digest(plan_digest=digest, key_digest=digest)
    assert bytes.fromhex(digest).hex() == digest


@pytest.mark.parametrize(
    "value",
    [
        "",
        "0" * 63,
        "0" * 65,
        "0" * 62 + "0g",
        "A" * 64,
        "0x" + "0" * 62,
        " " + "0" * 63,
        "0" * 63 + "\n",
        "٣" * 64,
        "_" * 64,
        b"0" * 64,
        ["0"] * 64,
        0,
        None,
    ],
    ids=repr,
)
def test_what_is_no_digest_is_refused(value: object) -> None:
    with pytest.raises(InvalidValue, match=r"^plan_digest = .*64 lower-case hex digits"):
        _validate.hex_digest(key_digest="0" * 64, plan_digest=value)


def test_a_refusal_is_both_the_projects_error_and_a_value_error() -> None:
    assert issubclass(InvalidValue, FedCollmError)
    assert issubclass(InvalidValue, ValueError)
