"""Messages as bytes: what goes in comes out, and nothing else comes out."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedcollm_privacy import wire
from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.messages import (
    AdapterSpec,
    OpenedSum,
    PrivateUpdate,
    QuantizedUpdate,
    Receipt,
    RoundPlan,
    SealedSum,
    SealedUpdate,
    Settlement,
    TrainRequest,
    canonical_json,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
NAME = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,20}", fullmatch=True)
CHUNKS = st.lists(st.binary(max_size=40), max_size=4).map(tuple)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
PLAN = st.builds(
    RoundPlan,
    run_id=NAME,
    server_round=st.integers(1, 2**40),
    attempt=st.integers(1, 9),
    spec_digest=TEXT,
    dimension=st.integers(1, 2**40),
    clip=st.floats(1e-300, 1e300) | st.integers(1, 9),
    value_bits=st.integers(4, 18),
    min_contributors=st.just(3),
    max_contributors=st.integers(3, 100),
    key_digest=TEXT,
    nonce=TEXT,
)
FLOATS = hnp.arrays(np.float32, st.integers(0, 9), elements=st.floats(width=32))
INTEGERS = hnp.arrays(np.int64, st.integers(0, 9))
MESSAGE = st.one_of(
    PLAN,
    st.builds(TrainRequest, plan=PLAN, adapter=FLOATS, public_key=st.binary(max_size=99)),
    st.builds(SealedUpdate, plan_digest=TEXT, site=NAME, chunks=CHUNKS),
    st.builds(SealedSum, plan_digest=TEXT, cohort=st.lists(NAME, max_size=4).map(tuple), chunks=CHUNKS),
    st.builds(OpenedSum, plan=PLAN, cohort=st.lists(NAME, max_size=4).map(tuple), total=INTEGERS),
    st.builds(Receipt, plan_digest=TEXT, server_round=st.integers(), outcome=st.sampled_from(("included", "lost"))),
    st.builds(
        Settlement,
        site=NAME,
        private=st.booleans(),
        epsilon=FINITE,
        charged=FINITE,
        delta=FINITE,
        unit=TEXT,
        steps=st.integers(),
        clipped_fraction=FINITE,
        ledger_head=TEXT,
    ),
    st.builds(
        AdapterSpec,
        names=st.lists(TEXT, max_size=3).map(tuple),
        shapes=st.lists(st.lists(st.integers(1, 99), max_size=3).map(tuple), max_size=3).map(tuple),
        base_model=TEXT,
    ),
)


def plain(message: Any) -> dict[str, Any]:
    """Field by field, with vectors as bytes, so that NaN equals NaN and -0.0 differs from 0.0."""
    return {
        field.name: value.tobytes() if isinstance(value, np.ndarray) else value
        for field in dataclasses.fields(message)
        for value in (getattr(message, field.name),)
    }


def signed(data: bytes) -> bytes:
    """Forged content with the right total length and digest: only the content can betray it."""
    body = bytearray(data[:-32])
    struct.pack_into("<Q", body, 8, len(body) + 32)
    return bytes(body) + hashlib.sha256(body).digest()


def with_header(header: bytes, kind: int = 6) -> bytes:
    return signed(struct.pack("<4sHHQ", b"FCLM", 1, kind, 0) + struct.pack("<I", len(header)) + header + bytes(32))


def sealed() -> SealedUpdate:
    return SealedUpdate(plan_digest="ab" * 32, site="north", chunks=(b"\x00\x01", b"", b"xyz"))


@given(MESSAGE)
def test_every_message_survives_the_wire(message: Any) -> None:
    again = wire.decode(wire.encode(message), type(message))
    assert type(again) is type(message)
    assert plain(again) == plain(message)
    if isinstance(message, RoundPlan):
        assert again.digest == message.digest


def test_layout_is_the_documented_one() -> None:
    header = b'{"plan_digest":"' + b"ab" * 32 + b'","site":"north"}'
    content = struct.pack("<I", len(header)) + header + struct.pack("<I", 3)
    for chunk in sealed().chunks:
        content += struct.pack("<Q", len(chunk)) + chunk
    body = b"FCLM" + struct.pack("<HHQ", 1, 3, 16 + len(content) + 32) + content
    assert wire.encode(sealed()) == body + hashlib.sha256(body).digest()


def test_vectors_are_read_only() -> None:
    opened = OpenedSum(plan=example_plan(), cohort=("a",), total=np.arange(3))
    again = wire.decode(wire.encode(opened), OpenedSum)
    with pytest.raises(ValueError, match="read-only"):
        again.total[0] = 1


@settings(max_examples=300)
@given(MESSAGE, st.data())
def test_any_single_changed_byte_is_refused(message: Any, data: st.DataObject) -> None:
    raw = bytearray(wire.encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        wire.decode(bytes(raw), type(message))


@given(MESSAGE, st.data())
def test_a_forged_byte_gives_a_valid_message_or_a_refusal(message: Any, data: st.DataObject) -> None:
    raw = bytearray(wire.encode(message))
    raw[data.draw(st.integers(16, len(raw) - 33))] ^= data.draw(st.integers(1, 255))
    try:
        again = wire.decode(signed(bytes(raw)), type(message))
    except ProtocolError:
        return
    assert wire.encode(again) == signed(bytes(raw))


@given(MESSAGE, st.binary(min_size=1, max_size=40))
def test_missing_and_trailing_bytes_are_refused(message: Any, extra: bytes) -> None:
    raw = wire.encode(message)
    for bad in (raw[:-1], raw[: len(raw) // 2], b"", raw + extra, signed(raw[:-32] + extra + raw[-32:])):
        with pytest.raises(ProtocolError):
            wire.decode(bad, type(message))


def test_another_type_or_an_unknown_kind_is_refused() -> None:
    raw = bytearray(wire.encode(sealed()))
    with pytest.raises(ProtocolError, match="SealedSum was expected"):
        wire.decode(bytes(raw), SealedSum)
    raw[6] = 99
    with pytest.raises(ProtocolError, match="kind 99"):
        wire.decode(signed(bytes(raw)), SealedUpdate)


def test_an_older_or_newer_format_version_is_refused() -> None:
    raw = bytearray(wire.encode(sealed()))
    raw[4] = 2
    with pytest.raises(ProtocolError, match="version"):
        wire.decode(signed(bytes(raw)), SealedUpdate)


@pytest.mark.parametrize(
    "header",
    [
        b'{"outcome":"lost","plan_digest":"","server_round":NaN}',
        b'{"outcome":"lost","plan_digest":"","server_round":1e999}',
        b'{"outcome":"lost","plan_digest":"","server_round":1.0}',
        b'{"outcome":"lost","plan_digest":"","server_round":true}',
        b'{"outcome":"lost","plan_digest":"","server_round":"1"}',
        b'{"outcome":"lost","plan_digest":null,"server_round":1}',
        b'{"outcome":["lost"],"plan_digest":"","server_round":1}',
        b'{"outcome":"won","plan_digest":"","server_round":1}',
        b'{"outcome":"lost","plan_digest":""}',
        b'{"extra":1,"outcome":"lost","plan_digest":"","server_round":1}',
        b'{"outcome":"lost","outcome":"lost","plan_digest":"","server_round":1}',
        b'{"outcome": "lost","plan_digest":"","server_round":1}',
        b'{"plan_digest":"","outcome":"lost","server_round":1}',
        b'{"outcome":"lost","plan_digest":"\\ud800","server_round":1}',
        b'{"outcome":"lost","plan_digest":"","server_round":' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"[]",
        b"",
        b"\xff",
    ],
)
def test_a_header_that_is_not_canonical_or_ill_typed_is_refused(header: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(with_header(header), Receipt)


def test_numbers_beyond_any_float_are_refused() -> None:
    fields = dataclasses.asdict(example_plan()) | {"server_round": 10**400}
    with pytest.raises(ProtocolError):
        wire.decode(with_header(canonical_json(fields), kind=1), RoundPlan)


def test_the_header_builder_of_these_tests_makes_valid_messages() -> None:
    header = canonical_json({"outcome": "lost", "plan_digest": "", "server_round": 1})
    assert wire.decode(with_header(header), Receipt) == Receipt(plan_digest="", server_round=1, outcome="lost")


@pytest.mark.parametrize("claim", [4, 2**20, 2**31, 2**32 - 1])
def test_a_count_beyond_the_data_is_refused(claim: int) -> None:
    raw = bytearray(wire.encode(sealed()))
    (header,) = struct.unpack_from("<I", raw, 16)
    struct.pack_into("<I", raw, 20 + header, claim)
    with pytest.raises(ProtocolError):
        wire.decode(signed(bytes(raw)), SealedUpdate)


@pytest.mark.parametrize("claim", [3, 2**31, 2**63, 2**64 - 1])
def test_a_length_beyond_the_data_is_refused(claim: int) -> None:
    raw = bytearray(wire.encode(sealed()))
    (header,) = struct.unpack_from("<I", raw, 16)
    struct.pack_into("<Q", raw, 24 + header, claim)
    with pytest.raises(ProtocolError):
        wire.decode(signed(bytes(raw)), SealedUpdate)


def test_what_never_leaves_a_site_cannot_be_encoded() -> None:
    vector = np.zeros(2, dtype=np.float32)
    stays = [
        PrivateUpdate(vector=vector, spec_digest="", reservation=""),
        QuantizedUpdate(plan=example_plan(), grid=np.zeros(2, dtype=np.int64)),
        {"site": "a"},
        "text",
    ]
    for value in stays:
        with pytest.raises(ProtocolError, match="may not travel"):
            wire.encode(value)


def test_values_without_a_wire_form_are_refused_by_the_sender() -> None:
    for change in ({"epsilon": float("nan")}, {"epsilon": float("inf")}, {"unit": "\ud800"}):
        fields = {"site": "a", "private": True, "epsilon": 1.0, "delta": 1e-6, "unit": "record", "steps": 1}
        fields |= {"charged": 1.0, "clipped_fraction": 0.0}
        with pytest.raises(ProtocolError, match="no wire form"):
            wire.encode(Settlement(**(fields | change), ledger_head=""))


def example_plan() -> RoundPlan:
    return RoundPlan(
        run_id="r",
        server_round=1,
        attempt=1,
        spec_digest="",
        dimension=2,
        clip=1.0,
        value_bits=8,
        min_contributors=3,
        max_contributors=5,
        key_digest="",
        nonce="",
    )
