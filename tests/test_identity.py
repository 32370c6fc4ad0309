"""Signatures hold for one key, one purpose and one message; key files open for their owner only."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from fedcollm_privacy.errors import FedCollmError, InvalidValue, KeyFileError, ProtocolError, SignatureInvalid
from fedcollm_privacy.identity import (
    PURPOSES,
    PublicIdentity,
    SigningKey,
    is_encrypted,
    load_key,
    load_public,
    save_key,
    save_public,
)

# RFC 8032, section 7.1, TEST 1 to 3: seed, public key, message, signature.
RFC_8032 = (
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
)
SEED = bytes.fromhex(RFC_8032[0][0])
PASSPHRASE = b"five random words or more"
P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P


def key_from(seed: bytes, name: str = "site-1") -> SigningKey:
    return SigningKey(name, Ed25519PrivateKey.from_private_bytes(seed))


KEY = key_from(SEED)
BITS = st.integers(min_value=0)


def flipped(data: bytes, bit: int) -> bytes:
    place = bit % (8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def second_library(seed: bytes, message: bytes) -> bytes:
    return eddsa.new(ECC.construct(curve="Ed25519", seed=seed), "rfc8032").sign(message)


@pytest.mark.parametrize(("seed", "public", "message", "signature"), RFC_8032)
def test_keys_are_those_of_rfc_8032_and_its_bare_signatures_hold_for_no_purpose(
    seed: str, public: str, message: str, signature: str
) -> None:
    key = key_from(bytes.fromhex(seed))
    assert key.public.public_key.hex() == public
    # The yardstick of the next test is right, and the vector is sound, so that its refusal means something.
    assert second_library(bytes.fromhex(seed), bytes.fromhex(message)).hex() == signature
    for purpose in PURPOSES:
        with pytest.raises(SignatureInvalid):
            key.public.verify(purpose, bytes.fromhex(message), bytes.fromhex(signature))


@given(seed=st.binary(min_size=32, max_size=32), purpose=st.sampled_from(PURPOSES), message=st.binary(max_size=300))
def test_what_is_signed_is_domain_purpose_nul_message_says_a_second_library(
    seed: bytes, purpose: str, message: bytes
) -> None:
    signature = key_from(seed).sign(purpose, message)
    assert signature == second_library(seed, b"fedcollm/v1/" + purpose.encode() + b"\x00" + message)
    key_from(seed).public.verify(purpose, message, signature)


@given(message=st.binary(min_size=1, max_size=99), bit=BITS, purpose=st.sampled_from(PURPOSES))
def test_any_flipped_bit_of_message_signature_or_key_is_refused(message: bytes, bit: int, purpose: str) -> None:
    signature = KEY.sign(purpose, message)
    with pytest.raises(SignatureInvalid):
        KEY.public.verify(purpose, flipped(message, bit), signature)
    with pytest.raises(SignatureInvalid):
        KEY.public.verify(purpose, message, flipped(signature, bit))
    with pytest.raises((SignatureInvalid, InvalidValue)):
        PublicIdentity(name="site-1", public_key=flipped(KEY.public.public_key, bit)).verify(
            purpose, message, signature
        )


def test_every_bit_of_a_signature_counts() -> None:
    signature = KEY.sign("plan", b"round 1")
    for bit in range(8 * 64):
        with pytest.raises(SignatureInvalid):
            KEY.public.verify("plan", b"round 1", flipped(signature, bit))


def test_a_signature_cannot_be_varied_by_adding_the_group_order() -> None:
    signature = KEY.sign("plan", b"round 1")
    order = 2**252 + 27742317777372353535851937790883648493
    twin = signature[:32] + (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    with pytest.raises(SignatureInvalid):
        KEY.public.verify("plan", b"round 1", twin)


@given(message=st.binary(max_size=99))
def test_a_signature_for_one_purpose_holds_for_no_other(message: bytes) -> None:
    for signed in PURPOSES:
        signature = KEY.sign(signed, message)
        for asked in PURPOSES:
            if asked == signed:
                KEY.public.verify(asked, message, signature)
            else:
                with pytest.raises(SignatureInvalid):
                    KEY.public.verify(asked, message, signature)


def test_no_two_purposes_and_messages_have_the_same_bytes() -> None:
    """A purpose is a prefix of none with its NUL, so a boundary cannot be moved from message into purpose."""
    assert all("\x00" not in purpose and purpose.isascii() for purpose in PURPOSES)
    assert len(set(PURPOSES)) == len(PURPOSES)


@pytest.mark.parametrize("purpose", ["", "Roster", "roster\x00", "key-file", "plan ", None])
def test_a_purpose_outside_the_list_is_refused_on_both_sides(purpose: str) -> None:
    with pytest.raises(InvalidValue, match="purpose"):
        KEY.sign(purpose, b"")
    with pytest.raises(InvalidValue, match="purpose"):
        KEY.public.verify(purpose, b"", bytes(64))


@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65), None, "00" * 64])
def test_what_is_no_signature_is_refused_like_a_wrong_one(signature: bytes) -> None:
    with pytest.raises(SignatureInvalid) as refusal:
        KEY.public.verify("upload", b"the message", signature)
    with pytest.raises(SignatureInvalid) as other:
        KEY.public.verify("upload", b"another message", KEY.sign("upload", b"the message"))
    assert str(refusal.value) == str(other.value)
    assert isinstance(refusal.value, ProtocolError)


def test_a_refusal_names_signer_and_purpose_and_no_content() -> None:
    with pytest.raises(SignatureInvalid, match=r"site-1.*upload") as refusal:
        KEY.public.verify("upload", b"diagnosis", bytes(64))
    assert "diagnosis" not in str(refusal.value)
    assert b"diagnosis".hex() not in str(refusal.value)


def on_curve(y: int) -> tuple[int, int] | None:
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    return None if (x * x - square) % P else (x, y)


def added(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    (a, b), (c, d) = one, other
    twist = D * a * b * c * d
    return (a * d + b * c) * pow(1 + twist, -1, P) % P, (b * d + a * c) * pow(1 - twist, -1, P) % P


def small_order_encodings() -> set[bytes]:
    """All points whose eightfold is neutral: by brute force from one of order 8, with all their encodings."""
    neutral, found = (0, 1), set()
    order = 2**252 + 27742317777372353535851937790883648493
    for y in range(2, 200):
        point = on_curve(y)
        if point is None:
            continue
        torsion, factor, power = neutral, order, point
        while factor:  # order * point has an order that divides 8
            torsion = added(torsion, power) if factor & 1 else torsion
            power, factor = added(power, power), factor >> 1
        found.add(torsion)
        if len(found) == 8:
            break
    encodings = set()
    for _, y in found:
        for spelling in (y, y + P):
            encodings |= {(spelling | sign << 255).to_bytes(32, "little") for sign in (0, 1) if spelling < 2**255}
    return encodings


def test_keys_with_which_nobody_need_sign_are_refused() -> None:
    # The attack: with the neutral point as key, these bytes are a signature of every message, says the library.
    neutral = (1).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(neutral).verify(neutral + bytes(32), b"never signed")
    encodings = small_order_encodings()
    assert neutral in encodings
    assert len(encodings) == 14  # 5 y and 2 beyond the field prime, each with either sign bit
    for encoding in encodings:
        with pytest.raises(InvalidValue, match="public_key"):
            PublicIdentity(name="site-1", public_key=encoding)


@given(excess=st.integers(0, 18), sign=st.sampled_from([0, 1]))
def test_a_second_spelling_of_a_key_is_refused(excess: int, sign: int) -> None:
    with pytest.raises(InvalidValue, match="public_key"):
        PublicIdentity(name="site-1", public_key=(P + excess | sign << 255).to_bytes(32, "little"))


@pytest.mark.parametrize("key", [b"", bytes(31), b"\x02" * 33, "d7" * 16, bytearray(b"\x02" * 32), None])
def test_a_key_of_another_length_or_type_is_refused(key: bytes) -> None:
    with pytest.raises(InvalidValue, match="public_key"):
        PublicIdentity(name="site-1", public_key=key)


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a b", "a/b", "é", "a\n", "x" * 65, None, 7])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidValue, match="name"):
        SigningKey.generate(name)
    with pytest.raises(InvalidValue, match="name"):
        PublicIdentity(name=name, public_key=KEY.public.public_key)


def test_the_fingerprint_is_the_beginning_of_the_keys_sha_256() -> None:
    # printf of the RFC's first public key, through sha256sum: 21fe31dfa154a261626bf854046fd227...
    assert KEY.public.fingerprint == "21fe 31df a154 a261 626b f854 046f d227"
    assert SigningKey.generate("site-1").public.fingerprint != KEY.public.fingerprint


def test_a_signing_key_cannot_be_shown_copied_pickled_or_compared() -> None:
    assert repr(KEY) == str(KEY) == f"{KEY}" == "SigningKey(site-1, <hidden>)"
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="serialisable"):
            copying(KEY)  # type: ignore[operator]
    with pytest.raises(TypeError, match="comparable"):
        _ = key_from(SEED) == KEY
    with pytest.raises(TypeError):
        hash(KEY)
    assert not hasattr(KEY, "__dict__")


def test_fresh_keys_differ() -> None:
    assert len({SigningKey.generate("site-1").public.public_key for _ in range(20)}) == 20


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE, b"\x00\xff" * 511, "Passwörter".encode()])
def test_a_saved_key_comes_back_with_its_name(tmp_path: Path, passphrase: bytes | None) -> None:
    path = tmp_path / "one.key"
    save_key(KEY, path, passphrase)
    back = load_key(path, passphrase)
    assert (back.name, back.public) == ("site-1", KEY.public)
    assert back.sign("plan", b"x") == KEY.sign("plan", b"x")
    assert is_encrypted(path) == (passphrase is not None)


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_key_file_is_the_owners_whatever_the_umask(tmp_path: Path, passphrase: bytes | None, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_key(KEY, tmp_path / "one.key", passphrase)
    finally:
        os.umask(before)
    assert (tmp_path / "one.key").stat().st_mode & 0o777 == 0o600


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "one.key").write_text("kept")
    (tmp_path / "link.key").symlink_to(tmp_path / "elsewhere")
    for name in ("one.key", "link.key"):
        with pytest.raises(KeyFileError, match="never overwritten"):
            save_key(KEY, tmp_path / name, None)
        with pytest.raises(KeyFileError, match="never overwritten"):
            save_public(KEY.public, tmp_path / name)
    assert (tmp_path / "one.key").read_text() == "kept"
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_that_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        save_key(KEY, tmp_path / "one.key", None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyFileError, match="folder"):
        save_key(KEY, tmp_path / "no" / "one.key", None)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o666, 0o777])
def test_a_bare_key_open_to_others_is_refused_and_an_encrypted_one_is_not(tmp_path: Path, mode: int) -> None:
    bare, locked = tmp_path / "bare.key", tmp_path / "locked.key"
    save_key(KEY, bare, None)
    save_key(KEY, locked, PASSPHRASE)
    bare.chmod(mode)
    locked.chmod(mode)
    with pytest.raises(KeyFileError, match=f"chmod 600 {bare}"):
        load_key(bare, None)
    assert load_key(locked, PASSPHRASE).public == KEY.public
    bare.chmod(0o400)
    assert load_key(bare, None).public == KEY.public


def test_a_symlink_is_followed_and_the_mode_is_that_of_its_target(tmp_path: Path) -> None:
    save_key(KEY, tmp_path / "one.key", None)
    (tmp_path / "link.key").symlink_to(tmp_path / "one.key")
    assert load_key(tmp_path / "link.key", None).public == KEY.public
    (tmp_path / "one.key").chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_key(tmp_path / "link.key", None)


@pytest.mark.parametrize("passphrase", [b"", b"x" * 1024, "a text"])
def test_an_empty_or_endless_passphrase_is_refused(tmp_path: Path, passphrase: bytes) -> None:
    with pytest.raises(InvalidValue, match="1 to 1023 bytes"):
        save_key(KEY, tmp_path / "one.key", passphrase)
    assert list(tmp_path.iterdir()) == []
    save_key(KEY, tmp_path / "one.key", PASSPHRASE)
    with pytest.raises(InvalidValue, match="1 to 1023 bytes"):
        load_key(tmp_path / "one.key", passphrase)


def test_only_the_right_passphrase_opens_and_none_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "one.key"
    save_key(KEY, path, PASSPHRASE)
    with pytest.raises(KeyFileError, match="give its passphrase"):
        load_key(path, None)
    for wrong in (b"hunter2", PASSPHRASE + b"\n", PASSPHRASE[:-1], PASSPHRASE.upper()):
        with pytest.raises(KeyFileError, match="passphrase is another one") as refusal:
            load_key(path, wrong)
        assert repr(wrong)[2:-1] not in str(refusal.value)
        assert refusal.value.__cause__ is None


def test_a_bare_file_put_in_the_place_of_an_encrypted_one_is_refused(tmp_path: Path) -> None:
    save_key(SigningKey.generate("site-1"), tmp_path / "one.key", None)
    with pytest.raises(KeyFileError, match="not encrypted, but a passphrase"):
        load_key(tmp_path / "one.key", PASSPHRASE)


def test_no_refusal_tells_the_key(tmp_path: Path) -> None:
    path = tmp_path / "one.key"
    save_key(KEY, path, None)
    secret = [line for line in path.read_text().splitlines() if not line.startswith(("-", "fedcollm"))]
    assert len(secret) == 1
    path.chmod(0o644)
    texts = []
    for attempt in (lambda: load_key(path, None), lambda: load_key(path, b"pw"), lambda: load_public(path)):
        with pytest.raises(FedCollmError) as refusal:
            attempt()
        texts.append(str(refusal.value))
    for hidden in (*secret, SEED.hex(), repr(SEED)):
        assert not any(hidden in text for text in texts)


def test_a_missing_file_a_folder_and_a_pipe_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").write_bytes(bytes(2**15))
    for name, words in (
        ("nobody.key", "does not exist"),
        ("", "directory"),
        ("pipe", "regular file"),
        ("huge", "regular file of at most"),
        ("nobody.key/x", "exist"),
    ):
        for load in (lambda path: load_key(path, None), load_public, is_encrypted):
            with pytest.raises(KeyFileError, match=words):
                load(tmp_path / name)


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
@pytest.mark.parametrize("other", [ec.generate_private_key(ec.SECP256R1()), ed448.Ed448PrivateKey.generate()])
def test_another_kind_of_key_is_refused(
    tmp_path: Path, passphrase: bytes | None, other: ec.EllipticCurvePrivateKey
) -> None:
    path = tmp_path / "one.key"
    save_key(KEY, path, None)
    header = path.read_bytes().split(b"\n")[0]
    encryption = (
        serialization.NoEncryption() if passphrase is None else serialization.BestAvailableEncryption(passphrase)
    )
    pem = other.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    path.write_bytes(header + b"\n" + pem)
    with pytest.raises(KeyFileError, match=r"not Ed25519.*keys new"):
        load_key(path, passphrase)
    path.write_bytes(pem)  # without the line that names the key's owner
    with pytest.raises(KeyFileError, match="no private key file"):
        load_key(path, passphrase)


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_a_key_file_with_any_flipped_bit_opens_as_the_same_key_or_not_at_all(
    tmp_path: Path, passphrase: bytes | None
) -> None:
    """Encrypted PEM has no checksum: without the signature in the first line, other keys and names come out."""
    path = tmp_path / "one.key"
    save_key(KEY, path, passphrase)
    sound, refused = path.read_bytes(), 0
    for bit in range(8 * len(sound)):
        path.write_bytes(flipped(sound, bit))
        try:
            opened = load_key(path, passphrase).public
        except KeyFileError:
            refused += 1
        else:
            assert opened == KEY.public
    assert refused > 7 * len(sound)


def test_a_renamed_key_or_an_exchanged_one_is_refused(tmp_path: Path) -> None:
    save_key(KEY, tmp_path / "one.key", None)
    save_key(SigningKey.generate("site-2"), tmp_path / "two.key", None)
    one, two = ((tmp_path / name).read_bytes().split(b"\n", 1) for name in ("one.key", "two.key"))
    for forged in (one[0].replace(b"site-1", b"site-2") + b"\n" + one[1], one[0] + b"\n" + two[1]):
        (tmp_path / "one.key").write_bytes(forged)
        with pytest.raises(KeyFileError, match="damaged or altered"):
            load_key(tmp_path / "one.key", None)


@pytest.mark.parametrize("change", ["cut", "empty", "twice", "comment", "crlf", "label"])
def test_a_key_file_of_another_layout_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "one.key"
    save_key(KEY, path, None)
    sound = path.read_bytes()
    path.write_bytes(
        {
            "cut": sound[:-1],
            "empty": b"",
            "twice": sound + sound,
            "comment": b"# mine\n" + sound,
            "crlf": sound.replace(b"\n", b"\r\n"),
            "label": sound.replace(b"BEGIN PRIVATE", b"BEGIN ENCRYPTED PRIVATE"),
        }[change]
    )
    with pytest.raises(KeyFileError, match="put back a copy"):
        load_key(path, None)


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_openssl_reads_the_key_file_and_verifies_its_signatures(tmp_path: Path, passphrase: bytes | None) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl command is not installed")
    path, public = tmp_path / "one.key", tmp_path / "one.pem"
    save_key(KEY, path, passphrase)
    unlock = [] if passphrase is None else ["-passin", f"pass:{passphrase.decode()}"]
    subprocess.run([openssl, "pkey", "-in", path, *unlock, "-pubout", "-out", public], check=True, capture_output=True)
    assert serialization.load_pem_public_key(public.read_bytes()).public_bytes_raw() == KEY.public.public_key  # type: ignore[union-attr]
    (tmp_path / "message").write_bytes(b"fedcollm/v1/unmask\x00round 1")
    (tmp_path / "signature").write_bytes(KEY.sign("unmask", b"round 1"))
    verify = [openssl, "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", public]
    files = ["-in", tmp_path / "message", "-sigfile", tmp_path / "signature"]
    answer = subprocess.run([*verify, *files], capture_output=True, text=True)
    if answer.returncode and "rawin" in answer.stderr + answer.stdout and "oneshot" in answer.stderr + answer.stdout:
        pytest.skip("this openssl does not verify Ed25519 on the command line")
    assert answer.returncode == 0, answer.stderr


def test_a_public_file_comes_back_and_is_canonical_json(tmp_path: Path) -> None:
    path = tmp_path / "one.pub"
    save_public(KEY.public, path)
    assert path.read_text() == f'{{"name":"site-1","public_key":"{RFC_8032[0][1]}"}}\n'
    assert load_public(path) == KEY.public
    path.write_text(path.read_text().rstrip("\n"))
    assert load_public(path) == KEY.public


HEX = RFC_8032[0][1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "{}",
        json.dumps({"name": "site-1", "public_key": HEX}),
        f'{{"name":"site-1","public_key":"{HEX.upper()}"}}',
        f'{{"name":"site-1","public_key":"{HEX[:-2]}"}}',
        f'{{"name":"site-1","public_key":"{HEX[:-1]}٣"}}',
        f'{{"name":"site-1","public_key":"{HEX}","x":1}}',
        f'{{"name":"site-1","name":"site-1","public_key":"{HEX}"}}',
        f'{{"name":7,"public_key":"{HEX}"}}',
        f'{{"name":"..","public_key":"{HEX}"}}',
        '{"name":"site-1","public_key":7}',
        '{"name":"site-1"}',
        f'{{"name":"site-1","public_key":"{"00" * 32}"}}',
        f'{{"name":"\\ud800","public_key":"{HEX}"}}',
        f'{{"name":"site-1","public_key":"{HEX}"}}\n\n',
        "[" * 16_000,
        "9" * 9_000,
        "NaN",
    ],
)
def test_a_public_file_with_anything_else_in_it_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "one.pub").write_text(content)
    with pytest.raises(KeyFileError, match=r"NAME\.pub"):
        load_public(tmp_path / "one.pub")
