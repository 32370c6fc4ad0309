"""Who signs: Ed25519 identities of sites, server and governance, signatures bound to one purpose, and key files.

A signature covers ``"fedcollm/v1/" purpose NUL message``. Purposes are a closed list of words without NUL, so no byte
string can be read as two purposes and a signature made for one never holds for another. Ed25519 as in RFC 8032, by
the library ``cryptography``. The one other thing a key signs is a DSSE envelope's ``DSSEv1 ...``
(`SigningKey.sign_pae`), which can be no message of this domain: its first byte is another.

A signature says which *key* signed. Which party a key belongs to is said by the roster alone, and whether a message is
fresh by what is signed (round, plan digest), not here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue, KeyFileError, SignatureInvalid
from fedcollm_privacy.messages import canonical_json

__all__ = [
    "PURPOSES",
    "PublicIdentity",
    "SigningKey",
    "is_encrypted",
    "load_key",
    "load_public",
    "save_key",
    "save_public",
]

PURPOSES = (
    *("roster", "plan", "advertisement", "sealed_share", "upload", "agreement", "unmask"),
    *("ledger_entry", "tree_head", "witnessed_head"),
    *("request", "run_offer", "enrolment"),
)
"""What may be signed. A word is never given another meaning."""

_DOMAIN = b"fedcollm/v1/"
_KEY_FILE_DOMAIN = _DOMAIN + b"key-file\x00"  # not one of PURPOSES, so that `SigningKey.sign` cannot be asked for it
_MAX_PASSPHRASE = 1023  # what the library can encrypt with
_MAX_FILE = 2**14
_FIELD_PRIME = 2**255 - 19
_ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
# The y coordinates of the eight points of small order: with such a key, signatures hold for messages nobody signed.
_SMALL_ORDER = frozenset({0, 1, _FIELD_PRIME - 1, _ORDER_8, _FIELD_PRIME - _ORDER_8})

_KEY_FILE = re.compile(
    rb"fedcollm-private-key-v1 (?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,63}) (?P<proof>[0-9a-f]{128})\n"
    rb"(?P<pem>-----BEGIN (?P<encrypted>ENCRYPTED )?PRIVATE KEY-----\n"
    rb"(?:[A-Za-z0-9+/]{1,64}={0,2}\n)+-----END (?(encrypted)ENCRYPTED )PRIVATE KEY-----\n)"
)


def _signed_bytes(purpose: str, message: bytes) -> bytes:
    _validate.one_of(PURPOSES, purpose=purpose)
    return _DOMAIN + purpose.encode() + b"\x00" + message


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicIdentity:
    """A party's public name and its Ed25519 key: who may be believed to have signed.

    Attributes:
        name: 1-64 letters, digits, ``_``, ``-``, ``.``.
        public_key: the 32 raw bytes of RFC 8032; a point's one canonical encoding, and no point of small order.

    Raises:
        InvalidValue: name or key is not of this form.
    """

    name: str
    public_key: bytes

    def __post_init__(self) -> None:
        _validate.public_name(name=self.name)
        if type(self.public_key) is not bytes or len(self.public_key) != 32:
            raise InvalidValue("public_key", type(self.public_key).__name__, "the 32 raw bytes of an Ed25519 key")
        y = int.from_bytes(self.public_key, "little") % 2**255
        if y >= _FIELD_PRIME or y in _SMALL_ORDER:
            raise InvalidValue("public_key", self.public_key.hex(), "an Ed25519 public key that `keys new` made")

    def verify(self, purpose: str, message: bytes, signature: bytes) -> None:
        """Return if this party's key signed ``message`` for ``purpose``.

        Raises:
            InvalidValue: the purpose is not in `PURPOSES`.
            SignatureInvalid: another message, purpose or key, or no signature at all. One text for all of these.
        """
        signed = _signed_bytes(purpose, message)
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, signed)
        except (InvalidSignature, TypeError, ValueError):
            raise SignatureInvalid(
                f"the signature of {self.name} for the purpose {purpose} does not hold; nothing of it was used. "
                f"Ask {self.name} to sign again, and compare fingerprints ({self.fingerprint})"
            ) from None

    def verify_pae(self, pae: bytes, signature: bytes) -> None:
        """Return if this party's key signed these bytes, which `fedcollm_privacy.dsse.pae` made.

        Raises:
            InvalidValue: the bytes do not begin with ``DSSEv1`` and a space.
            SignatureInvalid: other bytes or another key, or no signature at all. One text for all of these.
        """
        _require_pae(pae)
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, pae)
        except (InvalidSignature, TypeError, ValueError):
            raise SignatureInvalid(
                f"the DSSE signature of {self.name} does not hold; nothing of it was used. "
                f"Ask {self.name} to sign again, and compare fingerprints ({self.fingerprint})"
            ) from None

    @property
    def fingerprint(self) -> str:
        """First 16 bytes of the key's SHA-256, in groups of four hex digits, to be read aloud and compared."""
        digits = hashlib.sha256(self.public_key).hexdigest()[:32]
        return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))

    def as_fields(self) -> dict[str, str]:
        """Name and key in hex, as they stand in JSON."""
        return {"name": self.name, "public_key": self.public_key.hex()}

    @staticmethod
    def from_fields(fields: object) -> PublicIdentity:
        """The identity in parsed JSON; InvalidValue unless it has exactly the fields of `as_fields`, each allowed."""
        if not isinstance(fields, dict) or set(fields) != {"name", "public_key"}:
            raise InvalidValue("identity", type(fields).__name__, 'exactly {"name": ..., "public_key": ...}')
        digits = fields["public_key"]
        if not isinstance(digits, str) or not re.fullmatch("[0-9a-f]{64}", digits):
            raise InvalidValue("public_key", type(digits).__name__, "64 lower-case hex digits")
        return PublicIdentity(name=fields["name"], public_key=bytes.fromhex(digits))


class SigningKey:
    """A party's private Ed25519 key: cannot be shown, pickled, copied or compared; `save_key` alone writes it.

    Python cannot promise that memory is wiped; OpenSSL overwrites its own copy when the last reference goes.
    """

    __slots__ = ("_private", "_public")

    def __init__(self, name: str, private: Ed25519PrivateKey) -> None:
        self._public = PublicIdentity(name=name, public_key=private.public_key().public_bytes_raw())
        self._private = private

    @classmethod
    def generate(cls, name: str) -> SigningKey:
        """A fresh key from the operating system's randomness; InvalidValue if the name is not a public name."""
        _validate.public_name(name=name)
        return cls(name, Ed25519PrivateKey.generate())

    @property
    def name(self) -> str:
        """The party's public name."""
        return self._public.name

    @property
    def public(self) -> PublicIdentity:
        """What others need to verify this key's signatures."""
        return self._public

    def sign(self, purpose: str, message: bytes) -> bytes:
        """The signature of ``message``, 64 bytes; InvalidValue if the purpose is not in `PURPOSES`."""
        return self._private.sign(_signed_bytes(purpose, message))

    def sign_pae(self, pae: bytes) -> bytes:
        """The plain signature of what `fedcollm_privacy.dsse.pae` made, 64 bytes; InvalidValue for other bytes."""
        _require_pae(pae)
        return self._private.sign(pae)

    def __repr__(self) -> str:
        return f"SigningKey({self.name}, <hidden>)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a SigningKey is not serialisable; save_key writes it to a file")

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("a SigningKey is not comparable; compare the public identities")

    __hash__ = None  # type: ignore[assignment]


def save_key(key: SigningKey, path: Path, passphrase: bytes | None) -> None:
    """Write a private key to a new file of mode 0600: a line with its name, then PKCS8 PEM.

    That line ends with a signature of the name by the key itself: encrypted PEM carries no checksum of its own, and
    without it a damaged or renamed file could be taken for a sound one.

    Args:
        key: the key.
        path: a file that does not exist yet.
        passphrase: encrypts the key; ``None`` leaves the file's mode as its only protection. The library spends only
            2048 rounds of PBKDF2 on it, so a stolen file protects the key as far as the passphrase is long.

    Raises:
        InvalidValue: the passphrase is empty or longer than 1023 bytes.
        KeyFileError: the file exists (it is left as it is) or cannot be written.
    """
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        _require_passphrase(passphrase)
        encryption = serialization.BestAvailableEncryption(passphrase)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    pem = key._private.private_bytes(*form, encryption)
    proof = key._private.sign(_KEY_FILE_DOMAIN + key.name.encode()).hex()
    _write_new(path, f"fedcollm-private-key-v1 {key.name} {proof}\n".encode() + pem, mode=0o600)


def load_key(path: Path, passphrase: bytes | None) -> SigningKey:
    """The private key in a file that `save_key` wrote; every refusal says what to do next.

    Raises:
        InvalidValue: the passphrase is empty or longer than 1023 bytes.
        KeyFileError: the file is missing, damaged, altered, of another kind, not encrypted and open to other users, or
            does not open with this passphrase. A passphrase for a file that is not encrypted is refused too: somebody
            may have put the file there.
    """
    if passphrase is not None:
        _require_passphrase(passphrase)
    parts, mode = _read_key_file(path)
    encrypted = parts["encrypted"] is not None
    if not encrypted and mode & 0o077:
        raise KeyFileError(
            f"{path} is not encrypted and open to other users (mode {mode:04o}): chmod 600 {path}, "
            "and if somebody may have read it, make a new key and have it put into the roster"
        )
    if encrypted and passphrase is None:
        raise KeyFileError(f"{path} is encrypted: give its passphrase")
    if not encrypted and passphrase is not None:
        raise KeyFileError(f"{path} is not encrypted, but a passphrase was given: give none, or the right file")
    try:
        private = serialization.load_pem_private_key(parts["pem"], passphrase)
    except (TypeError, ValueError, UnsupportedAlgorithm, InternalError):  # all of them happen with damaged files
        cause = "the passphrase is another one, or the file is damaged" if encrypted else "the file is damaged"
        raise KeyFileError(f"{path} does not open, {cause}: try again, or put back a copy of the file") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise KeyFileError(f"{path} holds another kind of key, not Ed25519: make a key with `fedcollm keys new`")
    name, proof = parts["name"], bytes.fromhex(parts["proof"].decode())
    try:
        private.public_key().verify(proof, _KEY_FILE_DOMAIN + name)
    except InvalidSignature:
        raise KeyFileError(f"{path} was damaged or altered after it was written: put back a copy of the file") from None
    return SigningKey(name.decode(), private)


def is_encrypted(path: Path) -> bool:
    """Whether a private key's file asks for a passphrase; KeyFileError as `load_key` for one that is none."""
    return _read_key_file(path)[0]["encrypted"] is not None


def save_public(identity: PublicIdentity, path: Path) -> None:
    """Write a public identity to a new file, one line of canonical JSON; KeyFileError as `save_key`."""
    _write_new(path, canonical_json(identity.as_fields()) + b"\n", mode=0o644)


def load_public(path: Path) -> PublicIdentity:
    """The public identity in a file that `save_public` wrote; KeyFileError if it is missing or anything else."""
    data, _ = _read(path)
    try:
        fields = json.loads(data)
        if canonical_json(fields) != data.removesuffix(b"\n"):
            raise InvalidValue("identity", "another spelling", "canonical JSON")
        return PublicIdentity.from_fields(fields)
    except (ValueError, RecursionError):  # an InvalidValue too; its text could quote a private key given by mistake
        raise KeyFileError(
            f"{path} is not a public key file of `fedcollm keys new`: ask its owner for NAME.pub"
        ) from None


def _require_pae(pae: bytes) -> None:
    # Signed without our domain, so that outside tools verify it; the prefix keeps it apart from every message of ours.
    if type(pae) is not bytes or not pae.startswith(b"DSSEv1 "):
        raise InvalidValue("pae", type(pae).__name__, 'bytes that begin with "DSSEv1 ", as dsse.pae makes them')


def _require_passphrase(passphrase: bytes) -> None:
    if not isinstance(passphrase, bytes) or not 0 < len(passphrase) <= _MAX_PASSPHRASE:
        raise InvalidValue("passphrase", "<hidden>", f"1 to {_MAX_PASSPHRASE} bytes")


def _read_key_file(path: Path) -> tuple[dict[str, bytes], int]:
    data, mode = _read(path)
    match = _KEY_FILE.fullmatch(data)
    if match is None:
        raise KeyFileError(f"{path} is damaged or no private key file of `fedcollm keys new`: put back a copy of it")
    return match.groupdict(), mode


def _read(path: Path) -> tuple[bytes, int]:
    try:
        # Not blocking, so that a named pipe is refused below and not waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            # Of the open file, so that nobody can exchange it between the check and the reading.
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE:
                raise KeyFileError(f"{path} is not a key file: give a regular file of at most {_MAX_FILE} bytes")
            return file.read(_MAX_FILE + 1), stat.S_IMODE(status.st_mode)
    except FileNotFoundError:
        raise KeyFileError(f"{path} does not exist: correct the path, or make a key with `fedcollm keys new`") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read ({error.strerror}): correct its path, owner or mode") from error


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise KeyFileError(f"{path} exists and is never overwritten: choose another place, or move it away") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be created ({error.strerror}): choose a folder you may write to") from error
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)  # half a key is none, and would block the next try
        raise KeyFileError(f"{path} cannot be written ({error.strerror}): make room and try again") from error
