"""Messages as bytes, and back: one closed table of types, every length checked, no pickle.

Layout (numbers little-endian)::

    magic "FCLM" | version u16 | kind u16 | total length u64
    header length u32 | header: canonical JSON of the scalar fields
    one part per binary field, in the type's field order:
        bytes            length u64 | bytes
        vector           length u64 | raw float32 or int64, little-endian
        tuple of bytes   count u32  | (length u64 | bytes) times count
    SHA-256 of everything before it, 32 bytes

What never leaves a site (`PrivateUpdate`, `QuantizedUpdate`) or the server (`SealedSum`, `OpenedSum`) is not in the
table and cannot be encoded. The digest finds accidents, not attackers: whoever may alter the bytes may also recompute
it; signatures are inside the messages.

Stability: within a version kinds are never removed and never change meaning; a changed field set needs a new version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.ckks_parameters import CkksParameters
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.messages import (
    AdapterSpec,
    DpTerms,
    Receipt,
    RoundPlan,
    Settlement,
    TrainRequest,
    canonical_json,
    parse_json,
)
from fedcollm_privacy.run_messages import ClaimsRequest, RunAnswer, RunOffer, SiteClaims
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

__all__ = ["MAX_BYTES", "decode", "encode"]

M = TypeVar("M")

KINDS: dict[int, type[Any]] = {
    2: TrainRequest,
    6: Receipt,
    7: Settlement,
    8: AdapterSpec,
    9: SignedPlan,
    10: Advertisement,
    11: PeerKeys,
    12: SealedShare,
    13: SealedShares,
    14: UploadManifest,
    15: PartRequest,
    16: UploadPart,
    17: SurvivorSet,
    18: Agreement,
    19: UnmaskRequest,
    20: UnmaskShares,
    21: PeerShares,
    22: Ready,
    23: HeadRequest,
    24: SignedHead,
    25: WitnessedHead,
    26: StatementOffer,
    27: Endorsement,
    28: ClaimsRequest,
    29: SiteClaims,
    30: RunOffer,
    31: RunAnswer,
}
_NESTED = (RoundPlan, CkksParameters, DpTerms)
MAX_BYTES = 2**31
"""No message is longer; uploads come in parts of 3 MiB, the largest message is the broadcast of a long adapter."""

_HINTS: dict[type[Any], dict[str, Any]] = {
    kind: {field.name: get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
    for kind in (*KINDS.values(), *_NESTED)
}
_BINARY: dict[type[Any], dict[str, Any]] = {
    kind: {
        name: hint
        for name, hint in hints.items()
        if hint in (bytes, tuple[bytes, ...]) or get_origin(hint) is np.ndarray
    }
    for kind, hints in _HINTS.items()
}

_MAGIC, _VERSION = b"FCLM", 4
_PREFIX = struct.Struct("<4sHHQ")
_LENGTH, _COUNT = struct.Struct("<Q"), struct.Struct("<I")
_DIGEST_BYTES = 32
_MAX_HEADER, _MAX_PARTS = 2**24, 2**20


def encode(message: object) -> bytes:
    """The message's bytes; equal messages have equal bytes.

    Raises:
        ProtocolError: the type may not travel, a text is not valid Unicode, a number is NaN or infinite, or the
            message is longer than `MAX_BYTES`.
    """
    kind = next((number for number, known in KINDS.items() if type(message) is known), None)
    if kind is None:
        raise ProtocolError(f"a {type(message).__name__} may not travel; allowed: {_names()}")
    try:
        header = canonical_json(_scalars(message))
    except ValueError as error:
        raise ProtocolError(f"this {type(message).__name__} has no wire form: {error}") from error
    parts: list[bytes | memoryview] = [_COUNT.pack(len(header)), header]
    for name, hint in _BINARY[type(message)].items():
        value = getattr(message, name)
        if hint == tuple[bytes, ...]:
            parts.append(_COUNT.pack(len(value)))
            for item in value:
                parts += [_LENGTH.pack(len(item)), item]
        elif hint is bytes:
            parts += [_LENGTH.pack(len(value)), value]
        else:
            raw = np.ascontiguousarray(value, dtype=_little_endian(hint)).view(np.uint8).data
            parts += [_LENGTH.pack(len(raw)), raw]
    total = _PREFIX.size + sum(len(part) for part in parts) + _DIGEST_BYTES
    if total > MAX_BYTES:
        raise ProtocolError(f"this {type(message).__name__} is {total} bytes long; allowed: at most {MAX_BYTES}")
    parts.insert(0, _PREFIX.pack(_MAGIC, _VERSION, kind, total))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return b"".join([*parts, digest.digest()])


def decode(data: bytes, expected: type[M]) -> M:
    """The message in ``data``, which must be exactly one message of the expected type.

    Vectors are read-only views into ``data``; nothing is copied for them.

    Raises:
        ProtocolError: whatever else ``data`` is. The text never repeats content.
    """
    if len(data) < _PREFIX.size + _DIGEST_BYTES:
        raise ProtocolError(f"{len(data)} bytes are too few for a message")
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"{len(data)} bytes are too many for a message; allowed: at most {MAX_BYTES}")
    magic, version, kind, total = _PREFIX.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise ProtocolError(f"this is no message of format version {_VERSION}; bring both sides to one release")
    if total != len(data):
        raise ProtocolError(f"the message says {total} bytes and is {len(data)} bytes long")
    if KINDS.get(kind) is not expected:
        raise ProtocolError(f"a message of kind {kind} came where a {expected.__name__} was expected")
    body = memoryview(data)[:-_DIGEST_BYTES]
    if hashlib.sha256(body).digest() != data[-_DIGEST_BYTES:]:
        raise ProtocolError("the message's digest does not fit its content")
    reader = _Reader(body[_PREFIX.size :])
    header = _parse_header(bytes(reader.take(reader.number(_COUNT), _MAX_HEADER)))
    binary = {name: _read_part(reader, hint) for name, hint in _BINARY[expected].items()}
    if reader.left:
        raise ProtocolError(f"{reader.left} bytes follow the message's last field")
    return _build(expected, header, binary)


@dataclasses.dataclass(slots=True)
class _Reader:
    rest: memoryview

    @property
    def left(self) -> int:
        return len(self.rest)

    def take(self, length: int, largest: int = MAX_BYTES) -> memoryview:
        if length > min(largest, self.left):
            raise ProtocolError(f"a field says {length} bytes where {self.left} are left (allowed: {largest})")
        taken, self.rest = self.rest[:length], self.rest[length:]
        return taken

    def number(self, form: struct.Struct) -> int:
        return int(form.unpack(self.take(form.size))[0])


def _read_part(reader: _Reader, hint: Any) -> Any:
    if hint == tuple[bytes, ...]:
        count = reader.number(_COUNT)
        if count > min(_MAX_PARTS, reader.left // _LENGTH.size):
            raise ProtocolError(f"a field says {count} parts where {reader.left} bytes are left")
        return tuple(bytes(reader.take(reader.number(_LENGTH))) for _ in range(count))
    raw = reader.take(reader.number(_LENGTH))
    if hint is bytes:
        return bytes(raw)
    dtype = _little_endian(hint)
    if len(raw) % dtype.itemsize:
        raise ProtocolError(f"{len(raw)} bytes are no whole number of {dtype.name} values")
    return np.frombuffer(raw, dtype=dtype).astype(dtype.newbyteorder("="), copy=False)


def _parse_header(raw: bytes) -> dict[str, Any]:
    try:
        header = parse_json(raw)
        # Only the canonical form: no NaN, no infinity, no repeated key, one spelling per number.
        canonical = canonical_json(header) == raw
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the message's header is not canonical JSON") from error
    if not canonical or not isinstance(header, dict):
        raise ProtocolError("the message's header is not canonical JSON")
    return header


def _build(target: type[M], header: dict[str, Any], binary: dict[str, Any]) -> M:
    hints = _HINTS[target]
    if set(header) != set(hints) - set(binary):
        raise ProtocolError(f"the header of a {target.__name__} must hold exactly its fields")
    values = {name: _scalar(hints[name], value) for name, value in header.items()}
    try:
        return target(**values, **binary)
    except InvalidValue as error:
        raise ProtocolError(f"a {target.__name__} with a value that is not allowed: {error.field}") from error
    except OverflowError as error:
        raise ProtocolError(f"a {target.__name__} with a number out of range") from error


def _scalar(hint: Any, value: Any) -> Any:
    if hint in _NESTED and isinstance(value, dict):
        return _build(hint, value, {})
    if get_origin(hint) is UnionType:
        inner, nothing = get_args(hint)
        return None if value is None and nothing is NoneType else _scalar(inner, value)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_scalar(get_args(hint)[0], item) for item in value)
    # A float that is whole is spelled like an integer and is read as one; digests do not tell the two apart.
    allowed: tuple[type, ...] = (int, float) if hint is float else (hint,) if hint in (str, int, bool) else ()
    if type(value) not in allowed:
        raise ProtocolError("a header field has a value of the wrong type")
    return value


def _scalars(message: Any) -> dict[str, Any]:
    scalars = {name: getattr(message, name) for name in _HINTS[type(message)] if name not in _BINARY[type(message)]}
    return {name: dataclasses.asdict(value) if isinstance(value, _NESTED) else value for name, value in scalars.items()}


def _little_endian(hint: Any) -> np.dtype[Any]:
    scalar: type[np.generic] = np.float32 if hint == NDArray[np.float32] else np.int64
    return np.dtype(scalar).newbyteorder("<")


def _names() -> str:
    return ", ".join(kind.__name__ for kind in KINDS.values())
