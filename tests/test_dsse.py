"""An envelope's signature is what DSSE says, outside tools verify it, and an envelope has one spelling."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import pytest
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib import dsse as peer
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from fedcollm_privacy import dsse
from fedcollm_privacy.dsse import (
    MAX_BYTES,
    MAX_SIGNATURES,
    PAYLOAD_TYPE,
    Envelope,
    Signature,
    pae,
    sign_payload,
    verify_payload,
)
from fedcollm_privacy.errors import InvalidValue, ProtocolError, SignatureInvalid
from fedcollm_privacy.identity import PURPOSES, SigningKey

# The two keys of the DSSE project's test vectors: RFC 8032, section 7.1, TEST 1 and TEST 2.
SEEDS = (
    "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
    "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
)
# Those vectors (secure-systems-lab/dsse, testvectors/vectors.json): type, payload, key, signature in base64.
STATEMENT = b'{"_type":"https://in-toto.io/Statement/v1"}'
VECTORS = (
    (
        "application/vnd.in-toto+json",
        STATEMENT,
        0,
        "2WAfaHm5jluo0w+0rk8uVkluELJYWjSmU9x7EUzx+AyteDGJ4/nqyJXfmAUVFIAoQafWm7AxBZNw5M9ixNHiCA==",
    ),
    (
        "application/vnd.in-toto+json",
        STATEMENT,
        1,
        "c1+67/aT0yqEpwx8PsVY3MLHsj9D0CZ014/Fv/QlG59P+9CobUZ7xECJ/V3USG0Ob9CiE5LjReEZUzNF2l7eBw==",
    ),
    (
        "application/vnd.in-toto+json",
        b"",
        0,
        "gSggCAaTLTYyRH6FIDBem6meyIynsYy8RTHVzwx9tnTb7Bg/1jMWnuVgI/gffqmbsC2VX5/jHfkkDqsj7CDbDg==",
    ),
    (
        "application/vnd.ex\u00e4mple+json",
        STATEMENT,
        0,
        "xmSk/ug66ysT7ayhkCIjhAq42zgZXSsEWuzUaNL7w2eGAdF/NU6/fRXPtmfN+5DNSAs5/i2lUnHjbbjPsu0tAw==",
    ),
    (
        "",
        STATEMENT,
        0,
        "iC3q/+3Rm0+lpAJRueDmDh15PnwCfxKmS0NAfKsbv+zgulXQC/WM9trc+j1XEqlwDIg/vf/uNfebeD6sxInrDg==",
    ),
)


def private(seed: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed))


KEYS = tuple(SigningKey(f"site-{number}", private(seed)) for number, seed in enumerate(SEEDS))
KEY = KEYS[0]
SIGNED = Envelope(
    payload_type=PAYLOAD_TYPE, payload=STATEMENT, signatures=tuple(sign_payload(key, STATEMENT) for key in KEYS)
)
KEYIDS = tuple(key.public.public_key.hex() for key in KEYS)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def peer_key(keyid: str) -> SSlibKey:
    return SSlibKey(keyid, "ed25519", "ed25519", {"public": keyid})


def fields() -> dict[str, Any]:
    parsed = json.loads(SIGNED.to_bytes())
    assert isinstance(parsed, dict)
    return parsed


def written(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def with_signature(**changed: Any) -> bytes:
    altered = fields()
    altered["signatures"][0] |= changed
    return written(altered)


def test_the_encoding_is_that_of_the_specification_s_example() -> None:
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == expected


@given(payload_type=st.text(max_size=20), payload=st.binary(max_size=120))
@settings(max_examples=200)
def test_the_encoding_is_that_of_a_second_library(payload_type: str, payload: bytes) -> None:
    assert pae(payload_type, payload) == peer.Envelope(payload, payload_type, {}).pae()


def test_the_type_s_length_is_counted_in_bytes() -> None:
    assert pae("\u00e9", b"") == b"DSSEv1 2 \xc3\xa9 0 "
    assert pae("\U0001f600", b"\x00") == b"DSSEv1 4 \xf0\x9f\x98\x80 1 \x00"
    with pytest.raises(InvalidValue, match="payload_type"):
        pae(chr(0xD800), b"")


@given(
    left=st.tuples(st.text(" 01a", max_size=6), st.text(" 01a", max_size=6)),
    right=st.tuples(st.text(" 01a", max_size=6), st.text(" 01a", max_size=6)),
)
@settings(max_examples=200)
def test_no_bytes_are_the_encoding_of_two_documents(left: tuple[str, str], right: tuple[str, str]) -> None:
    encodings = [pae(kind, payload.encode()) for kind, payload in (left, right)]
    assert (encodings[0] == encodings[1]) == (left == right)


@pytest.mark.parametrize(("payload_type", "payload", "signer", "signature"), VECTORS)
def test_signatures_are_those_of_the_dsse_project_s_vectors(
    payload_type: str, payload: bytes, signer: int, signature: str
) -> None:
    encoded, expected = pae(payload_type, payload), base64.b64decode(signature)
    # The vector is sound, says a third library, so that it is worth comparing with.
    eddsa.new(ECC.construct(curve="Ed25519", seed=bytes.fromhex(SEEDS[signer])), "rfc8032").verify(encoded, expected)
    assert KEYS[signer].sign_pae(encoded) == expected
    KEYS[signer].public.verify_pae(encoded, expected)
    if payload_type == PAYLOAD_TYPE:
        assert sign_payload(KEYS[signer], payload).signature == expected
        verify_payload(KEYS[signer].public, payload, expected)
    else:  # signed as another type, which is no statement
        with pytest.raises(SignatureInvalid):
            verify_payload(KEYS[signer].public, payload, expected)


def test_the_key_id_is_the_signer_s_public_key() -> None:
    assert [signature.keyid for signature in SIGNED.signatures] == list(KEYIDS)


@given(payload=st.binary(max_size=200))
@settings(max_examples=50)
def test_a_second_library_reads_and_verifies_what_we_signed(payload: bytes) -> None:
    ours = Envelope(
        payload_type=PAYLOAD_TYPE, payload=payload, signatures=tuple(sign_payload(key, payload) for key in KEYS)
    )
    theirs = peer.Envelope.from_dict(json.loads(ours.to_bytes()))
    assert theirs.payload == payload
    assert set(theirs.verify([peer_key(keyid) for keyid in KEYIDS], threshold=2)) == set(KEYIDS)
    # The control: it does look at the signatures.
    theirs.payload += b"!"
    with pytest.raises(VerificationError):
        theirs.verify([peer_key(keyid) for keyid in KEYIDS], threshold=1)


@given(payload=st.binary(max_size=200))
@settings(max_examples=50)
def test_we_read_and_verify_what_a_second_library_signed(payload: bytes) -> None:
    theirs = peer.Envelope(payload, PAYLOAD_TYPE, {})
    for seed, keyid in zip(SEEDS, KEYIDS, strict=True):
        theirs.sign(CryptoSigner(private(seed), peer_key(keyid)))
    envelope = Envelope.from_bytes(written(theirs.to_dict()))
    assert envelope.payload == payload
    for key, signature in zip(KEYS, envelope.signatures, strict=True):
        assert signature.keyid == key.public.public_key.hex()
        verify_payload(key.public, envelope.payload, signature.signature)


def test_every_bit_of_payload_and_signature_counts() -> None:
    signature = sign_payload(KEY, STATEMENT).signature
    verify_payload(KEY.public, STATEMENT, signature)
    for bit in range(8 * len(STATEMENT)):
        with pytest.raises(SignatureInvalid):
            verify_payload(KEY.public, flipped(STATEMENT, bit), signature)
    for bit in range(8 * len(signature)):
        with pytest.raises(SignatureInvalid):
            verify_payload(KEY.public, STATEMENT, flipped(signature, bit))


def test_another_key_s_signature_and_what_is_none_are_refused() -> None:
    ours, other = (sign_payload(key, STATEMENT).signature for key in KEYS)
    with pytest.raises(SignatureInvalid, match="site-0"):
        verify_payload(KEY.public, STATEMENT, other)
    malformed: tuple[Any, ...] = (b"", ours[:-1], ours + b"\x00", bytes(64), ours.hex(), None, 7)
    for signature in malformed:
        with pytest.raises(SignatureInvalid):
            verify_payload(KEY.public, STATEMENT, signature)


@given(place=st.integers(0, len(SIGNED.to_bytes()) - 1), bit=st.integers(0, 7))
@settings(max_examples=300)
def test_an_envelope_with_any_bit_flipped_is_refused_or_verifies_no_more_than_before(place: int, bit: int) -> None:
    try:
        envelope = Envelope.from_bytes(flipped(SIGNED.to_bytes(), 8 * place + bit))
    except ProtocolError:
        return
    keys = {key.public.public_key.hex(): key.public for key in KEYS}
    held = 0
    for signature in envelope.signatures:
        try:
            # A keyid that names nobody is a signature of nobody.
            verify_payload(keys[signature.keyid], envelope.payload, signature.signature)
        except (KeyError, SignatureInvalid):
            continue
        held += 1
    assert held < len(KEYS)


@given(message=st.binary(max_size=60))
@settings(max_examples=30)
def test_a_signature_for_a_purpose_is_never_one_of_an_envelope_nor_the_other_way_round(message: bytes) -> None:
    encoded = pae(PAYLOAD_TYPE, message)
    of_envelope = KEY.sign_pae(encoded)
    for purpose in PURPOSES:
        domain = b"fedcollm/v1/" + purpose.encode() + b"\x00"
        for signed in (message, encoded):
            for_purpose = KEY.sign(purpose, signed)
            for asked in (encoded, pae(purpose, message), pae(PAYLOAD_TYPE, domain + signed)):
                with pytest.raises(SignatureInvalid):
                    KEY.public.verify_pae(asked, for_purpose)
            with pytest.raises(SignatureInvalid):
                KEY.public.verify(purpose, signed, of_envelope)
            # What a purpose's signature does cover cannot even be asked for.
            with pytest.raises(InvalidValue):
                KEY.public.verify_pae(domain + signed, for_purpose)
            with pytest.raises(InvalidValue):
                KEY.sign_pae(domain + signed)


@pytest.mark.parametrize(
    "other",
    [
        b"",
        b"DSSEv1",
        b"DSSEv2 1 a 0 ",
        b"dssev1 1 a 0 ",
        b" DSSEv1 1 a 0 ",
        b"fedcollm/v1/plan\x00",
        "DSSEv1 1 a 0 ",
        None,
    ],
)
def test_only_what_begins_as_dsse_says_is_signed_or_verified_without_a_purpose(other: Any) -> None:
    with pytest.raises(InvalidValue, match="pae"):
        KEY.sign_pae(other)
    with pytest.raises(InvalidValue, match="pae"):
        KEY.public.verify_pae(other, bytes(64))


def test_bytes_that_could_change_while_they_are_signed_are_refused() -> None:
    with pytest.raises(InvalidValue, match="pae"):
        KEY.sign_pae(bytearray(pae(PAYLOAD_TYPE, STATEMENT)))  # type: ignore[arg-type]


def test_refusals_name_the_signer_and_quote_neither_document_nor_signature() -> None:
    signature = sign_payload(KEYS[1], STATEMENT).signature
    with pytest.raises(SignatureInvalid) as refusal:
        verify_payload(KEY.public, STATEMENT, signature)
    text = str(refusal.value)
    assert "site-0" in text
    assert KEY.public.fingerprint in text
    assert "in-toto" not in text
    assert signature.hex() not in text
    with pytest.raises(InvalidValue) as refused:
        KEY.sign_pae(b"a secret")
    assert "secret" not in str(refused.value)


@given(payload=st.binary(max_size=300), names=st.lists(st.binary(min_size=32, max_size=32), min_size=1, unique=True))
@settings(max_examples=100)
def test_an_envelope_comes_back_and_equal_envelopes_have_equal_bytes(payload: bytes, names: list[bytes]) -> None:
    signatures = tuple(Signature(keyid=name.hex(), signature=name + name) for name in names)
    envelope = Envelope(payload_type=PAYLOAD_TYPE, payload=payload, signatures=signatures)
    data = envelope.to_bytes()
    assert Envelope.from_bytes(data) == envelope
    assert data == written(json.loads(data))
    assert json.loads(data)["payload"] == base64.b64encode(payload).decode()


def test_the_largest_federation_s_envelope_comes_back_and_one_signature_more_is_refused() -> None:
    signatures = tuple(Signature(keyid=f"{n:064x}", signature=bytes(64)) for n in range(MAX_SIGNATURES))
    data = dataclasses.replace(SIGNED, signatures=signatures).to_bytes()
    assert len(Envelope.from_bytes(data).signatures) == MAX_SIGNATURES == 10_001
    more = json.loads(data)
    more["signatures"].append({"keyid": f"{MAX_SIGNATURES:064x}", "sig": base64.b64encode(bytes(64)).decode()})
    with pytest.raises(ProtocolError, match="10001"):
        Envelope.from_bytes(written(more))
    with pytest.raises(InvalidValue, match="signatures"):
        dataclasses.replace(SIGNED, signatures=(*signatures, Signature(keyid="f" * 64, signature=bytes(64))))


def test_no_longer_envelope_is_written_or_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_BYTES == 16 * 2**20
    data = SIGNED.to_bytes()
    monkeypatch.setattr(dsse, "MAX_BYTES", len(data))
    assert Envelope.from_bytes(data) == SIGNED
    assert SIGNED.to_bytes() == data
    monkeypatch.setattr(dsse, "MAX_BYTES", len(data) - 1)
    with pytest.raises(ProtocolError, match="at most"):
        Envelope.from_bytes(data)
    with pytest.raises(InvalidValue, match="at most"):
        SIGNED.to_bytes()


GOOD = SIGNED.to_bytes()
SIGNATURES = fields()["signatures"]
SIG = SIGNATURES[0]["sig"]
MALFORMED = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": GOOD.replace(b"payloadType", b"payload\xff"),
    "UTF-16": GOOD.decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "a list": b"[]",
    "a string": b'"payload"',
    "null": b"null",
    "NaN": written(fields() | {"payload": float("nan")}),
    "an endless nest": b"[" * 200_000,
    "an endless number": b"9" * 100_000,
    "no fields": b"{}",
    "a field more": written(fields() | {"note": ""}),
    "no payload": written({name: value for name, value in fields().items() if name != "payload"}),
    "no type": written({name: value for name, value in fields().items() if name != "payloadType"}),
    "no signatures": written({name: value for name, value in fields().items() if name != "signatures"}),
    "another type": written(fields() | {"payloadType": "application/json"}),
    "the type in capitals": written(fields() | {"payloadType": PAYLOAD_TYPE.upper()}),
    "an empty type": written(fields() | {"payloadType": ""}),
    "a type that is none": written(fields() | {"payloadType": None}),
    "a lone surrogate for a type": GOOD.replace(PAYLOAD_TYPE.encode(), b"\\ud800"),
    "a payload that is no string": written(fields() | {"payload": 7}),
    "a payload in URL-safe base64": written(fields() | {"payload": "-_-_Pj8="}),
    "a payload without its padding": written(fields() | {"payload": "QQ"}),
    "a payload with too much padding": written(fields() | {"payload": "QQ==="}),
    "a payload with stray bits": written(fields() | {"payload": "QR=="}),
    "a payload with a space": written(fields() | {"payload": "QQ= ="}),
    "a payload with a line end": written(fields() | {"payload": "QUFB\n"}),
    "a payload with other letters": written(fields() | {"payload": "\u00e4QQ="}),
    "a payload after its end": written(fields() | {"payload": "QQ==QQ=="}),
    "signatures that are no list": written(fields() | {"signatures": {"0": SIGNATURES[0]}}),
    "signatures that are null": written(fields() | {"signatures": None}),
    "no signature at all": written(fields() | {"signatures": []}),
    "a signature that is none": written(fields() | {"signatures": [None]}),
    "a signature that is a list": written(fields() | {"signatures": [["keyid", "sig"]]}),
    "one key twice": written(fields() | {"signatures": [SIGNATURES[0], SIGNATURES[0]]}),
    "one key twice with other signatures": written(
        fields() | {"signatures": [SIGNATURES[0], SIGNATURES[1] | {"keyid": KEYIDS[0]}]}
    ),
    "no keyid": written(fields() | {"signatures": [{"sig": SIG}]}),
    "no sig": written(fields() | {"signatures": [{"keyid": KEYIDS[0]}]}),
    "a field more in a signature": with_signature(cert=""),
    "a keyid in capitals": with_signature(keyid=KEYIDS[0].upper()),
    "a short keyid": with_signature(keyid=KEYIDS[0][:-1]),
    "a long keyid": with_signature(keyid=KEYIDS[0] + "0"),
    "a keyid with a line end": with_signature(keyid=KEYIDS[0] + "\n"),
    "a keyid that is no string": with_signature(keyid=1),
    "an empty keyid": with_signature(keyid=""),
    "an empty sig": with_signature(sig=""),
    "a short sig": with_signature(sig=base64.b64encode(bytes(63)).decode()),
    "a long sig": with_signature(sig=base64.b64encode(bytes(65)).decode()),
    "a sig in hex": with_signature(sig=base64.b64decode(SIG).hex()),
    "a sig with stray bits": with_signature(sig=SIG[:-3] + chr(ord(SIG[-3]) + 1) + "=="),
    "a sig without its padding": with_signature(sig=SIG[:-2]),
    "a sig that is null": with_signature(sig=None),
    "a line end after it": GOOD + b"\n",
    "a space before it": b" " + GOOD,
    "spaces inside": GOOD.replace(b",", b", "),
    "fields in another order": json.dumps(dict(reversed(fields().items())), separators=(",", ":")).encode(),
    "an escape that need not be": GOOD.replace(b"payloadType", b"payload\\u0054ype"),
    "an escaped slash": GOOD.replace(b"application/", b"application\\/"),
    "a field twice": GOOD.replace(b'{"payload":', b'{"payload":"QQ==","payload":', 1),
    "a keyid twice": GOOD.replace(b'{"keyid":', b'{"keyid":"","keyid":', 1),
    "something after it": GOOD + b"{}",
    "cut short": GOOD[:-1],
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_envelope_is_refused(what: str) -> None:
    assert Envelope.from_bytes(GOOD) == SIGNED
    assert MALFORMED[what] != GOOD
    with pytest.raises(ProtocolError, match="malformed"):
        Envelope.from_bytes(MALFORMED[what])


@pytest.mark.parametrize(
    "what", [what for what in MALFORMED if "base64" in what or "padding" in what or "stray" in what]
)
def test_base64_in_another_spelling_is_called_by_its_name(what: str) -> None:
    with pytest.raises(ProtocolError, match="standard base64"):
        Envelope.from_bytes(MALFORMED[what])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    path=st.sampled_from(["payload", "payloadType", "signatures", "0", "keyid", "sig"]),
    value=JSON,
)
@settings(max_examples=300)
def test_whatever_stands_in_a_field_is_read_exactly_or_refused(path: str, value: Any) -> None:
    altered = fields()
    if path == "0":
        altered["signatures"][0] = value
    elif path in ("keyid", "sig"):
        altered["signatures"][0][path] = value
    else:
        altered[path] = value
    data = written(altered)
    try:
        envelope = Envelope.from_bytes(data)
    except ProtocolError:
        return
    assert envelope.to_bytes() == data


@given(data=st.binary(max_size=100) | JSON.map(json.dumps).map(str.encode))
@settings(max_examples=300)
def test_bytes_from_anywhere_are_refused_as_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Envelope.from_bytes(data)


def test_an_envelope_that_could_not_be_written_is_never_made() -> None:
    signature = SIGNED.signatures[0]
    wrong: tuple[tuple[Any, dict[str, Any]], ...] = (
        (SIGNED, {"payload_type": "application/json"}),
        (SIGNED, {"payload": "text"}),
        (SIGNED, {"payload": bytearray(b"text")}),
        (SIGNED, {"signatures": ()}),
        (SIGNED, {"signatures": (signature, signature)}),
        (signature, {"keyid": "site-1"}),
        (signature, {"keyid": KEYIDS[0].upper()}),
        (signature, {"keyid": None}),
        (signature, {"signature": bytes(63)}),
        (signature, {"signature": bytearray(64)}),
        (signature, {"signature": "0" * 64}),
    )
    for whole, changed in wrong:
        with pytest.raises(InvalidValue):
            dataclasses.replace(whole, **changed)
