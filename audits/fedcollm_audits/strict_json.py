"""JSON as an auditor reads it: one meaning only, bounded in size and depth, and its RFC 8785 spelling by `jcs`.

Another parser than the trainer's and another canonical form than the one that signed (``rfc8785``), so that a mistake
in either shows as a digest that does not fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import jcs

from fedcollm_privacy.errors import InvalidValue

__all__ = [
    "MAX_DEPTH",
    "MAX_LINE",
    "canonical",
    "digest",
    "file_digest",
    "fits_old_digest",
    "parse",
    "read_bytes",
    "read_lines",
]

MAX_DEPTH: Final = 32
MAX_LINE: Final = 2**23
_LARGEST: Final = 2**53 - 1
_FLOATS: Final = frozenset(
    {"cap_delta", "cap_epsilon", "delta", "epsilon", "max_grad_norm", "noise_multiplier", "order", "prv", "rdp",
     "target_epsilon"}
)  # fmt: skip


def parse(data: bytes) -> Any:
    """The one value that ``data`` spells.

    Raises:
        ValueError: not UTF-8, not JSON, a key that stands twice in an object, NaN, infinity, an integer beyond
            2^53 - 1, a lone surrogate, or more than `MAX_DEPTH` levels.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_integer,
        )
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    _require_plain(value)
    return value


def canonical(value: Any) -> bytes:
    """The RFC 8785 bytes of a parsed value; ValueError where there are none."""
    try:
        return bytes(jcs.canonicalize(value))
    except (RecursionError, TypeError) as error:
        raise ValueError(f"no canonical form ({type(error).__name__})") from error


def digest(value: Any) -> str:
    """SHA-256 of `canonical`, as 64 hex digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def fits_old_digest(value: Any, expected: object) -> bool:
    """Whether a digest of schema 1 fits: over JSON with Python's spelling of floats, before there was a canonical form.

    A whole number in a field that holds floats is tried as the float, too: canonical exports write 1.0 as 1.
    """
    for tried in (value, _with_floats(value)):
        text = json.dumps(tried, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        if hashlib.sha256(text.encode()).hexdigest() == expected:
            return True
    return False


def _with_floats(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _with_floats(inner, key) for key, inner in value.items()}
    return float(value) if name in _FLOATS and type(value) is int else value


def read_bytes(path: Path, largest: int) -> bytes:
    """A regular file's bytes.

    Raises:
        InvalidValue: a link, no regular file, or longer than ``largest``.
        OSError: it cannot be read.
    """
    with _regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise InvalidValue(path.name, f"{size} bytes", f"at most {largest} bytes")
        return file.read(size)


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file of any size, in hex; refused as by `read_bytes`."""
    with _regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _regular(path: Path) -> BufferedReader:
    try:
        # Not following, so that a link in the folder leads nowhere; not blocking, so that a pipe is refused below.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise InvalidValue(path.name, "a symbolic link", "a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidValue(path.name, "no regular file", "a regular file")
    return open(descriptor, "rb")


def read_lines(path: Path, largest: int) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, one a line; the last line must end with a newline.

    Raises:
        InvalidValue: as `read_bytes`.
        OSError: as `read_bytes`.
        ValueError: a line is longer than `MAX_LINE`, empty, cut off, no object, or refused by `parse`; names the line.
    """
    data = read_bytes(path, largest)
    if data and not data.endswith(b"\n"):
        raise ValueError("the last line is cut off")
    # Not splitlines, which would also cut at characters that JSON strings may hold.
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number} is longer than {MAX_LINE} bytes")
        try:
            value = parse(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"line {number} is no JSON object")
        yield value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number beyond every float")
    return value


def _integer(text: str) -> int:
    if len(text) > 17 or abs(value := int(text)) > _LARGEST:
        raise ValueError("an integer beyond 2^53 - 1")
    return value


def _require_plain(value: Any) -> None:
    """Refuse depth and lone surrogates, without recursion."""
    level, depth = [value], 1
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        deeper: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                deeper += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                deeper += each
            elif isinstance(each, str):
                each.encode("utf-8")
        level, depth = deeper, depth + 1
