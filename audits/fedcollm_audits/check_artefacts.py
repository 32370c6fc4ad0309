"""What must not lie in the run's folder: keys, in whatever spelling, and anything of one site alone."""

from __future__ import annotations

import base64
import re
import stat
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Final

from fedcollm_audits.check_files import ALLOWED
from fedcollm_audits.evidence import Evidence
from fedcollm_audits.notes import Notes, asked
from fedcollm_audits.verdict import Check

__all__ = ["CHECKS", "keys_in"]

_CHUNK: Final = 2**24
_OVERLAP: Final = 2**9
# PKCS#8 of Ed25519 and of X25519, up to where the 32 secret bytes begin.
_DER = {
    "an Ed25519 private key (PKCS#8)": bytes.fromhex("302e020100300506032b657004220420"),
    "an X25519 private key (PKCS#8)": bytes.fromhex("302e020100300506032b656e04220420"),
}
# SEAL's stream: magic 0xA15E, 16 bytes of header, version, compression, two zeros. Key and ciphertext begin alike.
_STREAM: Final = "a SEAL key or ciphertext"
_SEAL_RAW = re.compile(rb"\x5e\xa1\x10[\x03\x04][\x00-\x09][\x00-\x02]\x00\x00")
_SEAL = [
    b"\x5e\xa1\x10" + bytes([*version, compression, 0, 0])
    for version, compression in product([(3, 5), (3, 6), (3, 7), (4, 0), (4, 1), (4, 2), (4, 3), (4, 4)], range(3))
]
_TEXTS = {
    "a private key file of this project": [b"fedcollm-private-key-v1"],
    "an OpenSSH private key": [b"openssh-key-v1\x00"],
    "a PuTTY private key": [b"PuTTY-User-Key-File"],
    "an age private key": [b"AGE-SECRET-KEY-1"],
    "a PEM private key": [b"PRIVATE KEY-----", b"PRIVATE KEY BLOCK-----"],
}


_RUN: Final = re.compile(rb"[A-Za-z0-9+/_-]{8,}")


def _hidden(marker: bytes) -> Iterator[bytes]:
    """The bytes in hex, and in base64 wherever they may stand in a longer text."""
    yield marker.hex().encode()
    for shift in range(3):
        encoded = base64.b64encode(b"\x00" * shift + marker)
        # Without the characters that also hold bits of what stands before or behind the marker.
        core = encoded[-(-8 * shift // 6) : (8 * (shift + len(marker))) // 6]
        yield from {core, core.replace(b"+", b"-").replace(b"/", b"_")}


_PLAIN: Final = (
    *((what, marker) for what, markers in _TEXTS.items() for marker in markers),
    *_DER.items(),
)
_HIDDEN: Final = tuple(
    (what, spelling) for what, marker in (*_PLAIN, *((_STREAM, each) for each in _SEAL)) for spelling in _hidden(marker)
)
_WORDS: Final = (b"secret", b"private", b"seed")
_VALUE = re.compile(
    rb"[A-Za-z0-9_.-]{0,40}[^A-Za-z0-9+/]{0,4}[:=>][^A-Za-z0-9+/]{0,4}"
    rb"(?:[0-9A-Fa-f]{64}|[A-Za-z0-9+/_-]{43}=)(?![0-9A-Za-z+/=])"
)


def _holds_named_secret(data: bytes) -> bool:
    lower = data.lower()
    for word in _WORDS:  # found one by one, because one pattern for all of it takes seconds for a model's file
        at = lower.find(word)
        while at >= 0:
            if _VALUE.match(data, at + len(word)):
                return True
            at = lower.find(word, at + 1)
    return False


def keys_in(path: Path) -> list[str]:
    """What in a file's bytes is, or looks like, secret key material; each kind once.

    Raises:
        OSError: the file cannot be read.
    """
    found: dict[str, None] = {}
    tail = b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            data = tail + chunk
            found |= {what: None for what, marker in _PLAIN if what not in found and marker in data}
            if _SEAL_RAW.search(data):
                found[_STREAM] = None
            # Hex and base64 stand in runs of their characters, which are few in a model's bytes.
            runs = b"\n".join(_RUN.findall(data))
            lower = runs.lower()
            for what, marker in _HIDDEN:
                if what not in found and (marker in runs or marker in lower):
                    found[what] = None
            # In a database no name stands beside its value, but a run's name may, and it may say "private".
            if path.suffix != ".sqlite" and _holds_named_secret(data):
                found["32 bytes in a field that is named a secret, a private key or a seed"] = None
            tail = data[-_OVERLAP:]
    return list(found)


def _no_key(evidence: Evidence, notes: Notes) -> None:
    count = size = 0
    for path in sorted(evidence.run_dir.rglob("*")):
        name, status = path.relative_to(evidence.run_dir).as_posix(), path.lstat()
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            notes.problem(f"{name} is no regular file, so what it leads to was not searched.")
            continue
        for what in keys_in(path):
            notes.problem(f"{name} holds {what}.")
        count, size = count + 1, size + status.st_size
    notes.saw(
        f"{count} files, {size} bytes, were searched for {len(_PLAIN) + len(_HIDDEN)} spellings of keys.", files=count
    )


CHECKS: tuple[Check, ...] = (
    Check(
        name="no-key-at-rest",
        group="artefacts",
        question="No file of the run holds a private key, a decryption key or a secret seed.",
        why="With the round's key, or a site's, whoever finds the folder could open or forge what was sealed.",
        run=asked(_no_key),
    ),
    ALLOWED,
)
