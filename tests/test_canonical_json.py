"""Canonical JSON is RFC 8785's: one spelling a value, and no value without one."""

from __future__ import annotations

import json
import math
import struct
from decimal import Decimal
from typing import Any

import jcs
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedcollm_privacy.messages import canonical_json

# RFC 8785, sections 3.2.2 (the JSON as it is read) and 3.2.4 (the bytes that it becomes).
SAMPLE = r"""{
  "numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
  "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
  "literals": [null, true, false]
}"""
SAMPLE_BYTES = """
    7b 22 6c 69 74 65 72 61 6c 73 22 3a 5b 6e 75 6c 6c 2c 74 72
    75 65 2c 66 61 6c 73 65 5d 2c 22 6e 75 6d 62 65 72 73 22 3a
    5b 33 33 33 33 33 33 33 33 33 2e 33 33 33 33 33 33 33 2c 31
    65 2b 33 30 2c 34 2e 35 2c 30 2e 30 30 32 2c 31 65 2d 32 37
    5d 2c 22 73 74 72 69 6e 67 22 3a 22 e2 82 ac 24 5c 75 30 30
    30 66 5c 6e 41 27 42 5c 22 5c 5c 5c 5c 5c 22 2f 22 7d
"""
# Section 3.2.3: keys, and the order in which their values must come.
SORTING = r"""{
  "\u20ac": "Euro Sign",
  "\r": "Carriage Return",
  "\ufb33": "Hebrew Letter Dalet With Dagesh",
  "1": "One",
  "\ud83d\ude00": "Emoji: Grinning Face",
  "\u0080": "Control",
  "\u00f6": "Latin Small Letter O With Diaeresis"
}"""
SORTED = (
    ('"\\r"', "Carriage Return"),
    ('"1"', "One"),
    ('"\x80"', "Control"),
    ('"\xf6"', "Latin Small Letter O With Diaeresis"),
    ('"\u20ac"', "Euro Sign"),
    ('"\U0001f600"', "Emoji: Grinning Face"),
    ('"\ufb33"', "Hebrew Letter Dalet With Dagesh"),
)
# Appendix B: the bits of a double, and its spelling.
NUMBERS = (
    ("0000000000000000", "0"),
    ("8000000000000000", "0"),
    ("0000000000000001", "5e-324"),
    ("8000000000000001", "-5e-324"),
    ("7fefffffffffffff", "1.7976931348623157e+308"),
    ("ffefffffffffffff", "-1.7976931348623157e+308"),
    ("4340000000000000", "9007199254740992"),
    ("c340000000000000", "-9007199254740992"),
    ("4430000000000000", "295147905179352830000"),
    ("44b52d02c7e14af5", "9.999999999999997e+22"),
    ("44b52d02c7e14af6", "1e+23"),
    ("44b52d02c7e14af7", "1.0000000000000001e+23"),
    ("444b1ae4d6e2ef4e", "999999999999999700000"),
    ("444b1ae4d6e2ef4f", "999999999999999900000"),
    ("444b1ae4d6e2ef50", "1e+21"),
    ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
    ("3eb0c6f7a0b5ed8d", "0.000001"),
    ("41b3de4355555553", "333333333.3333332"),
    ("41b3de4355555554", "333333333.33333325"),
    ("41b3de4355555555", "333333333.3333333"),
    ("41b3de4355555556", "333333333.3333334"),
    ("41b3de4355555557", "333333333.33333343"),
    ("becbf647612f3696", "-0.0000033333333333333333"),
    ("43143ff3c1cb0959", "1424953923781206.2"),
)
LARGEST = 2**53 - 1
INTEGERS = st.integers(-LARGEST, LARGEST)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=5),
    max_leaves=15,
)


def double(bits: str) -> float:
    return float(struct.unpack(">d", bytes.fromhex(bits))[0])


def ecmascript(number: float) -> str:
    """ECMA-262, Number::toString(10), from the shortest digits that read back as ``number``."""
    if number == 0:
        return "0"
    minus, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    s, k = "".join(map(str, digits)), len(digits)
    n = k + int(exponent)
    if k <= n <= 21:
        text = s + "0" * (n - k)
    elif 0 < n <= 21:
        text = s[:n] + "." + s[n:]
    elif -6 < n <= 0:
        text = "0." + "0" * -n + s
    else:
        fraction = "." + s[1:] if k > 1 else ""
        text = f"{s[0]}{fraction}e{n - 1:+d}"
    return "-" * minus + text


def test_the_rfc_s_sample_becomes_the_rfc_s_bytes() -> None:
    assert canonical_json(json.loads(SAMPLE)) == bytes.fromhex(SAMPLE_BYTES)


def test_keys_are_sorted_by_their_utf_16_units_as_in_the_rfc_s_example() -> None:
    expected = "{" + ",".join(f'{key}:"{value}"' for key, value in SORTED) + "}"
    assert canonical_json(json.loads(SORTING)) == expected.encode()
    # The yardstick is sharp: by code points, the emoji comes last.
    assert sorted(json.loads(SORTING))[-1] == "\U0001f600"


@pytest.mark.parametrize(("bits", "spelling"), NUMBERS)
def test_numbers_are_spelled_as_in_the_rfc_s_table(bits: str, spelling: str) -> None:
    assert canonical_json(double(bits)) == spelling.encode()
    assert canonical_json([double(bits)]) == f"[{spelling}]".encode()
    assert ecmascript(double(bits)) == spelling


@pytest.mark.parametrize("bits", ["7fffffffffffffff", "7ff0000000000000", "fff0000000000000", "7ff8000000000000"])
def test_what_the_rfc_s_table_calls_no_number_is_refused(bits: str) -> None:
    for value in (double(bits), [double(bits)], {"a": {"b": double(bits)}}):
        with pytest.raises(ValueError):
            canonical_json(value)


@given(value=VALUES)
@settings(max_examples=400)
def test_any_value_is_spelled_as_a_second_library_spells_it(value: Any) -> None:
    assert canonical_json(value) == jcs.canonicalize(value)


@given(bits=st.integers(0, 2**64 - 1))
@example(bits=0x3FF0000000000000)  # 1.0
@example(bits=0x0010000000000000)  # the smallest normal number
@settings(max_examples=1000)
def test_any_double_is_spelled_as_ecmascript_spells_it_and_reads_back_bit_for_bit(bits: int) -> None:
    number = double(f"{bits:016x}")
    if not math.isfinite(number):
        return
    spelling = canonical_json(number).decode()
    assert spelling == ecmascript(number)
    if number != 0:
        assert struct.pack(">d", float(spelling)) == struct.pack(">d", number)


@given(exponent=st.integers(-12, 25), digits=st.integers(1, 10**17))
@settings(max_examples=300)
def test_doubles_around_the_borders_of_the_exponent_form_are_spelled_as_ecmascript_spells_them(
    exponent: int, digits: int
) -> None:
    for number in (float(f"{digits}e{exponent - 17}"), float(f"1e{exponent}"), -float(f"{digits}e{exponent}")):
        assert canonical_json(number).decode() == ecmascript(number)


@given(value=VALUES)
@settings(max_examples=200)
def test_the_text_says_the_value_and_nothing_else(value: Any) -> None:
    # Numbers as doubles, as RFC 8785 has them read.
    assert json.loads(canonical_json(value), parse_int=float) == value


@given(fields=st.dictionaries(st.text(max_size=6), INTEGERS, max_size=8), data=st.data())
@settings(max_examples=100)
def test_the_order_in_which_fields_were_set_leaves_no_trace(fields: dict[str, int], data: st.DataObject) -> None:
    shuffled = dict(data.draw(st.permutations(list(fields.items()))))
    assert canonical_json(shuffled) == canonical_json(fields)


@given(left=VALUES, right=VALUES)
@example(left=[1, 23], right=[12, 3])
@example(left="1", right=1)
@example(left=[], right={})
@example(left={"a": None}, right={})
@settings(max_examples=200)
def test_different_values_have_different_bytes(left: Any, right: Any) -> None:
    if left != right:
        assert canonical_json(left) != canonical_json(right)


def test_one_number_has_one_spelling_whatever_its_type() -> None:
    assert canonical_json(8.0) == canonical_json(8) == canonical_json(np.float64(8)) == b"8"
    assert canonical_json(-0.0) == canonical_json(0) == b"0"
    assert canonical_json(True) == b"true"
    assert canonical_json((1, 2)) == canonical_json([1, 2]) == b"[1,2]"


def test_text_is_not_normalised_and_only_what_must_be_is_escaped() -> None:
    composed, combined = "\u00c5", "A\u030a"
    assert canonical_json(composed) == f'"{composed}"'.encode()
    assert canonical_json(combined) == f'"{combined}"'.encode()
    short = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 0x22: '\\"', 0x5C: "\\\\"}
    for code in [*range(0xD800), *range(0xE000, 0x10000), 0x10000, 0x10FFFF]:
        expected = short.get(code, f"\\u{code:04x}" if code < 0x20 else chr(code))
        assert canonical_json(chr(code)) == f'"{expected}"'.encode(), hex(code)


@pytest.mark.parametrize("beyond", [LARGEST + 1, -LARGEST - 1, 2**64, 10**400])
def test_integers_that_a_double_cannot_tell_apart_are_refused(beyond: int) -> None:
    for value in (beyond, [beyond], {"a": beyond}):
        with pytest.raises(ValueError):
            canonical_json(value)


@pytest.mark.parametrize("edge", [LARGEST, -LARGEST])
def test_the_largest_integers_are_written_digit_by_digit(edge: int) -> None:
    assert canonical_json({"n": edge}) == f'{{"n":{edge}}}'.encode()
    assert canonical_json(float(edge)) == str(edge).encode()


def test_a_float_beyond_the_integers_is_written_but_not_read_back_as_an_integer() -> None:
    # Python reads its digits as an integer, which is refused: whoever compares texts has to write no such number.
    text = canonical_json(2.0**53)
    assert text == b"9007199254740992"
    with pytest.raises(ValueError):
        canonical_json(json.loads(text))
    assert canonical_json(json.loads(text, parse_int=float)) == text


@pytest.mark.parametrize("key", [1, 1.5, True, None, b"a", ("a",)])
def test_keys_that_are_no_strings_are_refused(key: Any) -> None:
    for value in ({key: 1}, {"a": 1, key: 2}, [{"a": {key: 1}}]):
        with pytest.raises(ValueError):
            canonical_json(value)


@pytest.mark.parametrize("units", [[0xD800], [0xDFFF], [0x61, 0xD83D], [0xDE00, 0xD83D], [0xDEAD, 0x62]])
def test_lone_surrogates_are_refused(units: list[int]) -> None:
    text = "".join(map(chr, units))
    for value in (text, [text], {text: 1}, {"a": text}, {"a": 1, text: 2}):
        with pytest.raises(ValueError):
            canonical_json(value)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, 1j, object(), np.int64(1), np.zeros(2), Decimal("1.5")])
def test_what_json_has_no_form_for_is_refused(value: Any) -> None:
    for nested in (value, [value], {"a": value}):
        with pytest.raises(ValueError):
            canonical_json(nested)
