"""Only what the governance signed is a roster, only until it expires, and only in one spelling."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

import pytest
from Crypto.Signature import eddsa
from hypothesis import given
from hypothesis import strategies as st

from fedcollm_privacy import roster as roster_module
from fedcollm_privacy.errors import InvalidValue, ProtocolError, SignatureInvalid
from fedcollm_privacy.identity import PURPOSES, PublicIdentity, SigningKey
from fedcollm_privacy.roster import MAX_BYTES, MAX_SITES, Roster, SignedRoster, sign_roster

GOVERNANCE = SigningKey.generate("governance")
PARTIES = {name: SigningKey.generate(name).public for name in ("server", "Ward", "site-1", "site-10", "site-2")}
SITES = tuple(PARTIES[name] for name in ("Ward", "site-1", "site-10", "site-2"))
UNTIL = 1_900_000_000
ROSTER = Roster(federation="clinics", server=PARTIES["server"], sites=SITES, valid_until=UNTIL)
SIGNED = sign_roster(ROSTER, GOVERNANCE)


def changed(**fields: Any) -> Roster:
    return dataclasses.replace(ROSTER, **fields)


def resigned(data: bytes) -> SignedRoster:
    return SignedRoster(roster_bytes=data, signature=GOVERNANCE.sign("roster", data))


def rewritten(**fields: Any) -> bytes:
    return json.dumps({**json.loads(ROSTER.to_bytes()), **fields}, sort_keys=True, separators=(",", ":")).encode()


def test_a_signed_roster_comes_back_for_its_governance() -> None:
    received = SignedRoster.from_bytes(SIGNED.to_bytes())
    assert received == SIGNED
    assert received.verified_by(GOVERNANCE.public, UNTIL - 1) == ROSTER


def test_a_second_library_verifies_the_signature_and_a_second_hash_the_digest() -> None:
    fields = json.loads(SIGNED.to_bytes())
    message = json.dumps(fields["roster"], sort_keys=True, separators=(",", ":")).encode()
    verifier = eddsa.new(eddsa.import_public_key(GOVERNANCE.public.public_key), "rfc8032")
    verifier.verify(b"fedcollm/v1/roster\x00" + message, bytes.fromhex(fields["signature"]))
    assert ROSTER.digest == hashlib.sha256(message).hexdigest()


@given(st.data())
def test_a_changed_byte_of_a_signed_roster_never_verifies(data: st.DataObject) -> None:
    sound = SIGNED.to_bytes()
    place, value = data.draw(st.integers(0, len(sound) - 1)), data.draw(st.integers(0, 255))
    mutated = sound[:place] + bytes([value]) + sound[place + 1 :]
    if mutated == sound:
        return
    with pytest.raises(ProtocolError):
        SignedRoster.from_bytes(mutated).verified_by(GOVERNANCE.public, UNTIL - 1)


@given(st.data())
def test_bytes_cut_out_put_in_or_twice_never_verify(data: st.DataObject) -> None:
    sound = SIGNED.to_bytes()
    start = data.draw(st.integers(0, len(sound)))
    end = data.draw(st.integers(start, len(sound)))
    mutated = sound[:start] + data.draw(st.binary(max_size=9)) + sound[end:]
    if mutated == sound:
        return
    with pytest.raises(ProtocolError):
        SignedRoster.from_bytes(mutated).verified_by(GOVERNANCE.public, UNTIL - 1)


@given(st.integers(min_value=0))
def test_any_flipped_bit_of_the_roster_under_its_signature_is_refused(bit: int) -> None:
    changed_bytes = bytearray(SIGNED.roster_bytes)
    place = bit % (8 * len(changed_bytes))
    changed_bytes[place // 8] ^= 1 << place % 8
    with pytest.raises(SignatureInvalid):
        dataclasses.replace(SIGNED, roster_bytes=bytes(changed_bytes)).verified_by(GOVERNANCE.public, 0)


def test_another_key_with_the_governances_name_is_refused() -> None:
    impostor = SigningKey.generate("governance")
    with pytest.raises(SignatureInvalid, match="governance"):
        sign_roster(ROSTER, impostor).verified_by(GOVERNANCE.public, 0)


def test_a_signature_of_the_same_bytes_for_another_purpose_is_refused() -> None:
    for purpose in set(PURPOSES) - {"roster"}:
        other = dataclasses.replace(SIGNED, signature=GOVERNANCE.sign(purpose, SIGNED.roster_bytes))
        with pytest.raises(SignatureInvalid):
            other.verified_by(GOVERNANCE.public, 0)


def test_a_signature_is_not_carried_over_to_another_roster() -> None:
    for other in (
        changed(valid_until=UNTIL + 1),
        changed(federation="banks"),
        changed(sites=SITES[:3]),
        changed(server=SigningKey.generate("server").public),
    ):
        assert other.digest != ROSTER.digest
        with pytest.raises(SignatureInvalid):
            dataclasses.replace(SIGNED, roster_bytes=other.to_bytes()).verified_by(GOVERNANCE.public, 0)


def test_bytes_are_not_read_as_a_roster_before_their_signature_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(data: bytes) -> Roster:
        raise RuntimeError("read")

    monkeypatch.setattr(roster_module.Roster, "from_bytes", staticmethod(parsed))
    with pytest.raises(SignatureInvalid):
        dataclasses.replace(SIGNED, signature=bytes(64)).verified_by(GOVERNANCE.public, 0)
    with pytest.raises(RuntimeError, match="read"):
        SIGNED.verified_by(GOVERNANCE.public, 0)


@pytest.mark.parametrize("now", [UNTIL, UNTIL + 0.5, UNTIL + 1, math.nan, math.inf, -math.inf])
def test_an_expired_roster_or_a_clock_without_time_is_refused(now: float) -> None:
    with pytest.raises(ProtocolError, match="not valid any more"):
        ROSTER.require_valid(now)
    with pytest.raises(ProtocolError, match=r"governance .*clock"):
        SIGNED.verified_by(GOVERNANCE.public, now)
    ROSTER.require_valid(UNTIL - 0.5)


def test_a_site_is_found_by_its_name_and_nobody_else_is() -> None:
    assert ROSTER.site("site-10") == PARTIES["site-10"]
    assert ROSTER.site_names == ("Ward", "site-1", "site-10", "site-2")
    for name in ("server", "governance", "ward", "", "x" * 10_000):
        with pytest.raises(ProtocolError, match="no site") as refusal:
            ROSTER.site(name)
        assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sites": SITES[:2]}, "fewer sites"),
        ({"sites": ()}, "fewer sites"),
        ({"sites": SITES[::-1]}, "sorted by name"),
        ({"sites": (*SITES[:3], SITES[2])}, "no other site"),
        (
            {"sites": (SITES[0], PublicIdentity(name="server", public_key=SITES[1].public_key), SITES[2])},
            "no other site",
        ),
        ({"sites": (*SITES[:3], PublicIdentity(name="z", public_key=SITES[0].public_key))}, "a key of its own"),
        ({"sites": (*SITES[:3], PublicIdentity(name="z", public_key=PARTIES["server"].public_key))}, "server and z"),
        ({"federation": "../x"}, "federation"),
        ({"valid_until": 0}, "valid_until"),
        ({"valid_until": True}, "valid_until"),
        ({"valid_until": 1.9e9}, "valid_until"),
        ({"valid_until": math.nan}, "valid_until"),
        ({"valid_until": 10**12}, "9999"),
    ],
)
def test_a_roster_that_would_not_protect_cannot_be_made_nor_read(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        changed(**fields)
    plain = {
        key: [site.as_fields() for site in value] if key == "sites" else value
        for key, value in fields.items()
        if not isinstance(value, float)  # of a whole float and an integer JSON has one spelling
    }
    if plain:
        data = rewritten(**plain)
        with pytest.raises(ProtocolError, match=words):
            Roster.from_bytes(data)
        with pytest.raises(ProtocolError, match=words):  # not even with the governance's signature
            resigned(data).verified_by(GOVERNANCE.public, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"NaN",
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 10_000,
        ROSTER.to_bytes() + b"\n",
        b" " + ROSTER.to_bytes(),
        ROSTER.to_bytes().decode().encode("utf-16"),
        json.dumps(json.loads(ROSTER.to_bytes())).encode(),
        ROSTER.to_bytes()[:-1] + b',"valid_until":1900000000}',
        rewritten(extra=1),
        rewritten(format="fedcollm-roster-v2"),
        rewritten(format=None),
        rewritten(sites="site-1"),
        rewritten(sites={"0": SITES[0].as_fields()}),
        rewritten(sites=[1, 2, 3]),
        rewritten(server=None),
        rewritten(server={**SITES[0].as_fields(), "role": "server"}),
        rewritten(server={"name": "server", "public_key": PARTIES["server"].public_key.hex().upper()}),
        rewritten(server={"name": "server", "public_key": "00" * 32}),
        rewritten(federation=7),
        rewritten(federation="\ud800"),
        rewritten(valid_until="1900000000"),
        SIGNED.to_bytes(),
    ],
    ids=range(27),
)
def test_anything_but_the_canonical_bytes_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Roster.from_bytes(data)
    with pytest.raises(ProtocolError):
        resigned(data).verified_by(GOVERNANCE.public, 0)


def test_every_missing_field_is_refused() -> None:
    fields = json.loads(ROSTER.to_bytes())
    for name in fields:
        rest = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(ProtocolError):
            Roster.from_bytes(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize("signature", [None, 7, "", "0" * 127, "0" * 129, "A" * 128, "é" * 128])
def test_a_signature_that_is_not_128_lower_case_digits_is_refused(signature: object) -> None:
    fields = {**json.loads(SIGNED.to_bytes()), "signature": signature}
    data = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    with pytest.raises(ProtocolError, match="signature"):
        SignedRoster.from_bytes(data)


def test_a_roster_of_more_than_four_mebibytes_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(data: bytes) -> None:
        raise RuntimeError("parsed")

    monkeypatch.setattr("fedcollm_privacy.roster.json.loads", loads)
    for read in (Roster.from_bytes, SignedRoster.from_bytes):
        with pytest.raises(ProtocolError, match=str(MAX_BYTES)):
            read(b" " * (MAX_BYTES + 1))


def test_every_roster_that_can_be_made_can_be_read() -> None:
    """The largest: the limit on bytes never hits a roster that the limit on sites allows."""
    sites, keys = [], 2
    while len(sites) < MAX_SITES + 1:
        keys += 1
        sites.append(PublicIdentity(name=f"{len(sites):064}", public_key=keys.to_bytes(32, "little")))
    largest = changed(sites=tuple(sites[:MAX_SITES]))
    signed = sign_roster(largest, GOVERNANCE).to_bytes()
    assert len(signed) < MAX_BYTES
    assert SignedRoster.from_bytes(signed).verified_by(GOVERNANCE.public, 0) == largest
    with pytest.raises(InvalidValue, match=str(MAX_SITES)):
        changed(sites=tuple(sites))


def test_a_refusal_does_not_repeat_a_long_foreign_text() -> None:
    with pytest.raises(ProtocolError) as refusal:
        Roster.from_bytes(rewritten(federation="x" * 1_000_000))
    assert len(str(refusal.value)) < 300
