"""Messages as bytes: what goes in comes out, and nothing else comes out."""

from __future__ import annotations

import copy
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
from fedcollm_privacy.ckks import parameters_for
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.messages import (
    AdapterSpec,
    DpTerms,
    NoisySum,
    OpenedSum,
    PrivateUpdate,
    QuantizedUpdate,
    Receipt,
    RoundPlan,
    SealedSum,
    Settlement,
    TrainRequest,
    canonical_json,
)
from fedcollm_privacy.peer_shares import Held, View
from fedcollm_privacy.run_messages import STANDINGS, ClaimsRequest, RunAnswer, RunOffer, SiteClaims
from fedcollm_privacy.secure_sum_messages import (
    Advertisement,
    Agreement,
    PartRequest,
    PeerKeys,
    PeerShares,
    Ready,
    SealedShare,
    SealedShares,
    SignedPlan,
    SurvivorSet,
    UnmaskRequest,
    UnmaskShares,
    UploadManifest,
    UploadPart,
)
from fedcollm_privacy.statement_messages import Endorsement, StatementOffer
from fedcollm_privacy.tree_heads import HeadRequest, SignedHead, WitnessedHead

from .secure_sums import round_plan

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
NAME = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,20}", fullmatch=True)
NAMES = st.lists(NAME, max_size=4, unique=True).map(sorted).map(tuple)
DIGEST = st.binary(min_size=32, max_size=32).map(bytes.hex)
RAW = st.binary(min_size=32, max_size=32)
SIGNATURE = st.binary(max_size=64)
CHUNKS = st.lists(st.binary(max_size=40), max_size=4).map(tuple)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
TERMS = st.builds(
    DpTerms,
    unit=st.sampled_from(("record", "person")),
    max_records_per_unit=st.integers(1, 9),
    max_grad_norm=st.floats(1e-300, 1e300) | st.integers(1, 9),
    expected_batch_size=st.integers(1, 2**40),
    steps_per_round=st.integers(1, 9),
    clipping=st.sampled_from(("flat", "automatic")),
    noise=st.sampled_from(("local", "distributed")),
)


@st.composite
def plans(draw: st.DrawFn) -> RoundPlan:
    """Any plan that can be made: n sites, c of them colluding, a threshold above half of both."""
    sites = draw(st.integers(3, 100))
    colluding = draw(st.integers(0, sites - 2))
    least = draw(st.integers(max(3, colluding + 2), sites))
    release = draw(st.sampled_from(("update", "gradient")))
    narrow = draw(NAMES) if release == "update" else ()
    return RoundPlan(
        run_id=draw(NAME),
        server_round=draw(st.integers(1, 2**40)),
        attempt=draw(st.integers(1, 9)),
        spec_digest=draw(DIGEST),
        adapter_digest=draw(DIGEST),
        dimension=draw(st.integers(1, 2**40)),
        clip=draw(st.floats(1e-300, 1e300) | st.integers(1, 9)),
        value_bits=draw(st.integers(4, 18)),
        min_contributors=least,
        max_contributors=sites,
        threshold=draw(st.integers((sites + colluding) // 2 + 1, sites)),
        max_colluding=colluding,
        roster_digest=draw(DIGEST),
        ckks=parameters_for(draw(st.integers(1, 200)), draw(st.integers(2, 18))),
        key_digest=draw(DIGEST),
        max_mean_norm=draw(st.floats(0, 1e300) | st.integers(0, 9)),
        nonce=draw(TEXT),
        expires_at=draw(st.integers(1, 2**40)),
        dp=draw(st.none() | TERMS),
        release=release,
        noise_multiplier=draw(st.floats(0, 99)),
        least_honest=draw(st.integers(1, least - colluding)),
        narrow_sites=narrow,
        narrow_ranks=tuple(draw(st.integers(1, 2**40)) for _ in narrow),
    )


@st.composite
def survivor_sets(draw: st.DrawFn) -> SurvivorSet:
    sharers = draw(NAMES)
    survivors = tuple(name for name in sharers if draw(st.booleans()))
    digests = tuple(draw(DIGEST) for _ in survivors)
    return SurvivorSet(
        plan_digest=draw(DIGEST),
        keys_digest=draw(DIGEST),
        sharers=sharers,
        survivors=survivors,
        upload_digests=digests,
    )


@st.composite
def unmask_shares(draw: st.DrawFn) -> UnmaskShares:
    names = draw(NAMES)
    chosen = [draw(st.booleans()) for _ in names]
    self_of, mask_of = (tuple(n for n, c in zip(names, chosen, strict=True) if c is which) for which in (True, False))
    return UnmaskShares(
        plan_digest=draw(DIGEST),
        site=draw(NAME),
        survivors_digest=draw(DIGEST),
        self_of=self_of,
        self_shares=tuple(draw(RAW) for _ in self_of),
        mask_of=mask_of,
        mask_shares=tuple(draw(RAW) for _ in mask_of),
        signature=draw(SIGNATURE),
    )


FLOATS = hnp.arrays(np.float32, st.integers(0, 9), elements=st.floats(width=32))
OF_KIND: dict[type, st.SearchStrategy[Any]] = {
    TrainRequest: st.builds(TrainRequest, plan_digest=DIGEST, adapter=FLOATS, public_key=st.binary(max_size=99)),
    Receipt: st.builds(
        Receipt,
        plan_digest=TEXT,
        server_round=st.integers(-(2**53) + 1, 2**53 - 1),
        outcome=st.sampled_from(("included", "lost")),
    ),
    Settlement: st.builds(
        Settlement,
        site=NAME,
        private=st.booleans(),
        epsilon=st.floats(-1, 1e9),
        charged=st.floats(-1, 1e9),
        delta=st.floats(0, 1),
        unit=st.sampled_from(("record", "person", "none")),
        steps=st.integers(0, 2**53 - 1),
        clipped_fraction=st.floats(0, 1),
    ),
    AdapterSpec: st.builds(
        AdapterSpec,
        names=st.lists(TEXT, max_size=3).map(tuple),
        shapes=st.lists(st.lists(st.integers(1, 99), max_size=3).map(tuple), max_size=3).map(tuple),
        base_model=TEXT,
    ),
    SignedPlan: st.builds(SignedPlan, plan=plans(), signature=SIGNATURE),
    Advertisement: st.builds(
        Advertisement, plan_digest=DIGEST, site=NAME, share_key=RAW, mask_key=RAW, signature=SIGNATURE
    ),
    PeerKeys: st.builds(PeerKeys, plan_digest=DIGEST, advertisements=CHUNKS),
    SealedShare: st.builds(
        SealedShare,
        plan_digest=DIGEST,
        keys_digest=DIGEST,
        site=NAME,
        receiver=NAME,
        box=st.binary(min_size=80, max_size=80),
        self_commitment=RAW,
        mask_commitment=RAW,
        seed_commitment=RAW,
        signature=SIGNATURE,
    ),
    SealedShares: st.builds(SealedShares, plan_digest=DIGEST, site=NAME, shares=CHUNKS),
    PeerShares: st.builds(PeerShares, plan_digest=DIGEST, shares=CHUNKS),
    Ready: st.builds(Ready, plan_digest=DIGEST, site=NAME),
    UploadManifest: st.builds(
        UploadManifest,
        plan_digest=DIGEST,
        keys_digest=DIGEST,
        site=NAME,
        peers=NAMES,
        chunk_digests=st.lists(RAW, max_size=3).map(b"".join),
        signature=SIGNATURE,
    ),
    PartRequest: st.builds(PartRequest, plan_digest=DIGEST, first=st.integers(0, 2**40), count=st.integers(1, 48)),
    UploadPart: st.builds(UploadPart, plan_digest=DIGEST, site=NAME, first=st.integers(0, 2**40), chunks=CHUNKS),
    SurvivorSet: survivor_sets(),
    Agreement: st.builds(Agreement, plan_digest=DIGEST, site=NAME, survivors_digest=DIGEST, signature=SIGNATURE),
    UnmaskRequest: st.builds(UnmaskRequest, plan_digest=DIGEST, survivors_digest=DIGEST, agreements=CHUNKS),
    UnmaskShares: unmask_shares(),
}
HEAD: dict[str, Any] = {
    "ledger": DIGEST,
    "site": NAME,
    "run_id": NAME,
    "server_round": st.integers(0, 2**40),
    "tree_size": st.integers(0, 2**40),
    "tree_root": DIGEST,
    "signature": SIGNATURE,
}
OF_KIND |= {
    HeadRequest: st.builds(
        HeadRequest, run_id=NAME, server_round=st.integers(0, 2**40), tree_size=st.integers(0, 2**40)
    ),
    SignedHead: st.builds(SignedHead, **HEAD, consistency=CHUNKS),
    WitnessedHead: st.builds(WitnessedHead, **HEAD, witness=SIGNATURE),
    StatementOffer: st.builds(StatementOffer, run_id=NAME, payload=st.binary(max_size=99)),
    Endorsement: st.builds(Endorsement, site=NAME, statement=DIGEST, signature=SIGNATURE),
    ClaimsRequest: st.builds(ClaimsRequest, run_id=NAME),
    SiteClaims: st.builds(SiteClaims, site=NAME, run_id=NAME, claims=st.binary(max_size=99)),
    RunOffer: st.builds(
        RunOffer, run_id=NAME, terms=st.binary(max_size=99), signature=st.binary(min_size=64, max_size=64)
    ),
    RunAnswer: st.builds(RunAnswer, site=NAME, run_id=NAME, terms_digest=DIGEST, standing=st.sampled_from(STANDINGS)),
}
MESSAGE = st.one_of(*OF_KIND.values())


def test_every_kind_of_message_is_drawn_here() -> None:
    assert set(OF_KIND) == set(wire.KINDS.values())
    assert len(set(wire.KINDS.values())) == len(wire.KINDS)


TERMS_OF_A_RUN: dict[str, Any] = {
    "unit": "record",
    "max_records_per_unit": 1,
    "max_grad_norm": 0.5,
    "expected_batch_size": 8,
    "steps_per_round": 1,
    "clipping": "flat",
    "noise": "local",
}


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


def with_header(header: bytes, kind: int = 6, rest: bytes = b"") -> bytes:
    prefix = struct.pack("<4sHHQ", b"FCLM", 4, kind, 0)
    return signed(prefix + struct.pack("<I", len(header)) + header + rest + bytes(32))


def part() -> UploadPart:
    return UploadPart(plan_digest="ab" * 32, site="north", first=7, chunks=(b"\x00\x01", b"", b"xyz"))


@given(MESSAGE)
def test_every_message_survives_the_wire(message: Any) -> None:
    again = wire.decode(wire.encode(message), type(message))
    assert type(again) is type(message)
    assert plain(again) == plain(message)
    if isinstance(message, SignedPlan):
        assert again.plan.digest == message.plan.digest
    if isinstance(message, SurvivorSet | UploadManifest):
        assert again.digest == message.digest


def test_layout_is_the_documented_one() -> None:
    header = b'{"first":7,"plan_digest":"' + b"ab" * 32 + b'","site":"north"}'
    content = struct.pack("<I", len(header)) + header + struct.pack("<I", 3)
    for chunk in part().chunks:
        content += struct.pack("<Q", len(chunk)) + chunk
    body = b"FCLM" + struct.pack("<HHQ", 4, 16, 16 + len(content) + 32) + content
    assert wire.encode(part()) == body + hashlib.sha256(body).digest()


def test_a_plan_travels_with_its_parts_in_the_header_and_its_signature_behind() -> None:
    plan = round_plan(dp=DpTerms(**TERMS_OF_A_RUN))
    header = canonical_json({"plan": dataclasses.asdict(plan)})
    raw = with_header(header, 9, struct.pack("<Q", 64) + bytes(range(64)))
    assert wire.encode(SignedPlan(plan=plan, signature=bytes(range(64)))) == raw


def test_kinds_keep_their_numbers() -> None:
    """What an older release sends is refused by version or kind, never read as something else."""
    numbers = {kind.__name__: number for number, kind in wire.KINDS.items()}
    assert numbers == {
        "TrainRequest": 2,
        "Receipt": 6,
        "Settlement": 7,
        "AdapterSpec": 8,
        "SignedPlan": 9,
        "Advertisement": 10,
        "PeerKeys": 11,
        "SealedShare": 12,
        "SealedShares": 13,
        "UploadManifest": 14,
        "PartRequest": 15,
        "UploadPart": 16,
        "SurvivorSet": 17,
        "Agreement": 18,
        "UnmaskRequest": 19,
        "UnmaskShares": 20,
        "PeerShares": 21,
        "Ready": 22,
        "HeadRequest": 23,
        "SignedHead": 24,
        "WitnessedHead": 25,
        "StatementOffer": 26,
        "Endorsement": 27,
        "ClaimsRequest": 28,
        "SiteClaims": 29,
        "RunOffer": 30,
        "RunAnswer": 31,
    }


def test_vectors_are_read_only() -> None:
    request = TrainRequest(plan_digest="", adapter=np.arange(3, dtype=np.float32), public_key=b"")
    again = wire.decode(wire.encode(request), TrainRequest)
    with pytest.raises(ValueError, match="read-only"):
        again.adapter[0] = 1


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
    raw = bytearray(wire.encode(part()))
    with pytest.raises(ProtocolError, match="UploadManifest was expected"):
        wire.decode(bytes(raw), UploadManifest)
    # 1, 3, 4 and 5 were kinds once.
    for kind in (0, 1, 3, 4, 5, 23, 99, 2**16 - 1):
        struct.pack_into("<H", raw, 6, kind)
        with pytest.raises(ProtocolError, match=f"kind {kind} "):
            wire.decode(signed(bytes(raw)), UploadPart)


def test_messages_of_equal_form_are_told_apart_by_their_kind() -> None:
    """`PeerKeys` and `PeerShares` differ in a field's name, `PeerShares` and `SealedShares` in a field."""
    made = {PeerKeys: PeerKeys(plan_digest="", advertisements=()), PeerShares: PeerShares(plan_digest="", shares=())}
    for kind, message in made.items():
        for other in (PeerKeys, PeerShares, SealedShares):
            if other is not kind:
                with pytest.raises(ProtocolError, match=f"a {other.__name__} was expected"):
                    wire.decode(wire.encode(message), other)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 5, 2**16 - 1])
def test_an_older_or_newer_format_version_is_refused(version: int) -> None:
    raw = bytearray(wire.encode(part()))
    struct.pack_into("<H", raw, 4, version)
    with pytest.raises(ProtocolError, match="version 4"):
        wire.decode(signed(bytes(raw)), UploadPart)


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


def forged_plan(**changes: Any) -> bytes:
    fields = dataclasses.asdict(round_plan(dp=DpTerms(**TERMS_OF_A_RUN))) | changes
    return with_header(canonical_json({"plan": fields}), 9, struct.pack("<Q", 0))


@pytest.mark.parametrize("field", ["clip", "max_mean_norm", "noise_multiplier"])
def test_numbers_beyond_any_float_are_refused(field: str) -> None:
    fields = dataclasses.asdict(round_plan(dp=DpTerms(**TERMS_OF_A_RUN))) | {field: 654321.5}
    header = canonical_json({"plan": fields})
    for number in (10**400, 10**22):  # the second is a float in another spelling than its own
        forged = header.replace(b"654321.5", str(number).encode())
        assert forged != header
        with pytest.raises(ProtocolError):
            wire.decode(with_header(forged, 9, struct.pack("<Q", 0)), SignedPlan)


@pytest.mark.parametrize("clip", [1.0, 2.0**53, 1e17, 1e21, 1e300])
def test_whole_floats_of_any_size_travel(clip: float) -> None:
    plan = round_plan(clip=clip)
    travelled = wire.decode(wire.encode(SignedPlan(plan=plan, signature=b"")), SignedPlan).plan
    assert travelled == plan
    assert travelled.digest == plan.digest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", 2),
        ("threshold", 2.0),
        ("min_contributors", 2),
        ("max_colluding", 2),
        ("max_contributors", 10**6),
        ("least_honest", 3),
        ("roster_digest", "AB" * 32),
        ("key_digest", ""),
        ("spec_digest", None),
        ("expires_at", 0),
        ("expires_at", 1.5),
        ("max_mean_norm", -1),
        ("release", "model"),
        ("ckks", None),
        ("ckks", {}),
        ("ckks", [4096]),
        ("dp", {}),
        ("dp", []),
        ("dp", "none"),
    ],
)
def test_a_plan_that_cannot_be_made_does_not_come_over_the_wire(field: str, value: Any) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(forged_plan(**{field: value}), SignedPlan)


@pytest.mark.parametrize("part_of", ["ckks", "dp"])
def test_what_is_nested_in_a_plan_is_checked_as_closely(part_of: str) -> None:
    true = dataclasses.asdict(round_plan(dp=DpTerms(**TERMS_OF_A_RUN)))[part_of]
    wire.decode(forged_plan(**{part_of: true}), SignedPlan)
    for name in true:
        for bad in (None, "", -1, [], True, {}):
            with pytest.raises(ProtocolError):
                wire.decode(forged_plan(**{part_of: true | {name: bad}}), SignedPlan)
        with pytest.raises(ProtocolError, match="exactly its fields"):
            wire.decode(forged_plan(**{part_of: {k: v for k, v in true.items() if k != name}}), SignedPlan)
    with pytest.raises(ProtocolError, match="exactly its fields"):
        wire.decode(forged_plan(**{part_of: true | {"extra": 1}}), SignedPlan)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (Advertisement, {"share_key": bytes(31)}),
        (Advertisement, {"site": "../up"}),
        (SealedShare, {"mask_commitment": b""}),
        (SealedShare, {"receiver": "a b"}),
        (UploadManifest, {"chunk_digests": bytes(33)}),
        (UploadManifest, {"peers": ("b", "a")}),
        (UploadManifest, {"peers": ("a", "a")}),
        (PartRequest, {"count": 0}),
        (PartRequest, {"count": 49}),
        (PartRequest, {"first": -1}),
        (SurvivorSet, {"survivors": ("zz",), "upload_digests": ("ab" * 32,)}),
        (SurvivorSet, {"upload_digests": ("ab" * 32,) * 9}),
        (SurvivorSet, {"sharers": ("b", "a"), "survivors": (), "upload_digests": ()}),
        (Agreement, {"survivors_digest": "ab"}),
        (UnmaskShares, {"self_of": ("a",), "mask_of": ("a",), "self_shares": (b"1",), "mask_shares": (b"2",)}),
        (UnmaskShares, {"self_of": ("a", "b"), "mask_of": (), "self_shares": (b"1",), "mask_shares": ()}),
        (UnmaskShares, {"self_of": ("a", "a"), "mask_of": (), "self_shares": (b"1",) * 2, "mask_shares": ()}),
        (ClaimsRequest, {"run_id": "../up"}),
        (SiteClaims, {"claims": bytes(2**20 + 1)}),
        (SiteClaims, {"site": "a b"}),
        (RunOffer, {"terms": bytes(2**20 + 1)}),
        (RunOffer, {"signature": bytes(63)}),
        (RunAnswer, {"terms_digest": "ab"}),
        (RunAnswer, {"standing": "left"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value),
)
@settings(max_examples=3)
@given(st.data())
def test_a_message_that_cannot_be_made_does_not_come_over_the_wire(
    message: type, changes: dict[str, Any], data: st.DataObject
) -> None:
    forged = copy.copy(data.draw(OF_KIND[message]))
    for name, value in changes.items():
        object.__setattr__(forged, name, value)
    with pytest.raises(ProtocolError):
        wire.decode(wire.encode(forged), message)


def test_the_header_builder_of_these_tests_makes_valid_messages() -> None:
    header = canonical_json({"outcome": "lost", "plan_digest": "", "server_round": 1})
    assert wire.decode(with_header(header), Receipt) == Receipt(plan_digest="", server_round=1, outcome="lost")


@pytest.mark.parametrize("claim", [4, 2**20, 2**31, 2**32 - 1])
def test_a_count_beyond_the_data_is_refused(claim: int) -> None:
    raw = bytearray(wire.encode(part()))
    (header,) = struct.unpack_from("<I", raw, 16)
    struct.pack_into("<I", raw, 20 + header, claim)
    with pytest.raises(ProtocolError):
        wire.decode(signed(bytes(raw)), UploadPart)


@pytest.mark.parametrize("claim", [3, 2**31, 2**63, 2**64 - 1])
def test_a_length_beyond_the_data_is_refused(claim: int) -> None:
    raw = bytearray(wire.encode(part()))
    (header,) = struct.unpack_from("<I", raw, 16)
    struct.pack_into("<Q", raw, 24 + header, claim)
    with pytest.raises(ProtocolError):
        wire.decode(signed(bytes(raw)), UploadPart)


def test_what_never_leaves_a_site_or_the_server_cannot_be_encoded() -> None:
    vector, grid = np.zeros(2, dtype=np.float32), np.zeros(2, dtype=np.int64)
    plan = round_plan(dimension=2)
    stays = [
        PrivateUpdate(vector=vector, spec_digest="", reservation=""),
        NoisySum(grid=grid, grid_step=1.0),
        QuantizedUpdate(plan=plan, grid=grid.astype(np.int32)),
        SealedSum(plan_digest="", cohort=(), survivors=b"", agreements=(), chunks=iter(())),
        OpenedSum(plan=plan, cohort=("a",), total=grid),
        View(keys={}, digest="", seed=bytes(32)),
        Held(self_share=bytes(32), mask_share=bytes(32)),
        plan,  # only under the server's signature
        {"site": "a"},
        "text",
    ]
    for value in stays:
        with pytest.raises(ProtocolError, match="may not travel"):
            wire.encode(value)
        assert type(value) not in wire.KINDS.values()


def test_values_without_a_wire_form_are_refused_by_the_sender() -> None:
    fields = {"site": "a", "private": True, "epsilon": 1.0, "delta": 1e-6, "unit": "record", "steps": 1}
    fields |= {"charged": 1.0, "clipped_fraction": 0.0}
    for message in (
        Receipt(plan_digest="\ud800", server_round=1, outcome="lost"),
        AdapterSpec(names=("\ud800",), shapes=((1,),), base_model=""),
    ):
        with pytest.raises(ProtocolError, match="no wire form"):
            wire.encode(message)
    # Numbers without one cannot even be made.
    for change in ({"epsilon": float("nan")}, {"charged": float("inf")}, {"delta": -0.1}, {"unit": "\ud800"}):
        with pytest.raises(InvalidValue):
            Settlement(**(fields | change))
