"""The public half of CKKS: the round's public key, encrypting an update's integers, ciphertexts as words and back.

SEAL through ``tenseal.sealapi``. Nothing here can decrypt; that is `fedcollm_privacy.ckks_secret`, which only the
decryptor imports. Why not TenSEAL's ``CKKSVector``: seven times the bytes here, and its parser reads foreign memory
or crashes on forged input.

SEAL authenticates nothing. Uploads are signed (`fedcollm_privacy.contributor`); much of what is wrong all the same, the
decryptor's checks of range and residual find at opening.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray
from tenseal import sealapi

from fedcollm_privacy.ckks_parameters import CkksParameters, parameters_for
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.messages import QuantizedUpdate, canonical_json

__all__ = [
    "CkksParameters",
    "PublicContext",
    "encrypt",
    "encrypt_grid",
    "load_object",
    "parameters_for",
    "save_object",
    "seal_context",
    "to_ciphertext",
    "to_words",
    "unpack",
]

Int64 = NDArray[np.int64]
Words = NDArray[np.uint64]

_HEADER_LENGTH = struct.Struct("<I")
_MAX_HEADER = 4096

# SEAL's stream: magic, header size, version, compression, reserved, length; then a ciphertext's parameter id, NTT flag,
# polynomials, N, primes, scale, correction factor; then its words behind a header of their own and their number.
_STREAM = struct.Struct("<HBBBBHQ")
_MAGIC, _VERSION = 0xA15E, (4, 3)
_CIPHERTEXT = struct.Struct("<4QBQQQdQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicContext:
    """What a site needs to seal: the parameters and the round's public key (SEAL's own stream, checked)."""

    parameters: CkksParameters
    public_key: bytes

    def __post_init__(self) -> None:
        _load_public_key(self.parameters, self.public_key)

    def to_bytes(self) -> bytes:
        """Header length u32, canonical JSON of the parameters, the key."""
        header = canonical_json(asdict(self.parameters))
        return _HEADER_LENGTH.pack(len(header)) + header + self.public_key

    @classmethod
    def from_bytes(cls, data: bytes) -> PublicContext:
        """The context in ``data``.

        Raises:
            ProtocolError: not such bytes, parameters below 128-bit security, or a malformed key.
        """
        if len(data) < _HEADER_LENGTH.size:
            raise ProtocolError("these bytes are no public context")
        (length,) = _HEADER_LENGTH.unpack_from(data)
        raw = data[_HEADER_LENGTH.size : _HEADER_LENGTH.size + min(length, _MAX_HEADER)]
        return cls(parameters=parameters_from_json(raw), public_key=data[_HEADER_LENGTH.size + len(raw) :])

    @property
    def digest(self) -> str:
        """SHA-256 of `to_bytes`, hex; a plan's ``key_digest``."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def parameters_from_json(raw: bytes) -> CkksParameters:
    """The parameters in their canonical JSON.

    Raises:
        ProtocolError: anything else, also parameters that `CkksParameters` refuses.
    """
    try:
        fields = json.loads(raw)
        if not isinstance(fields, dict) or canonical_json(fields) != raw:
            raise ProtocolError("CKKS parameters must come as canonical JSON")
        sizes = tuple(fields.pop("coeff_mod_bit_sizes"))
        return CkksParameters(coeff_mod_bit_sizes=sizes, **fields)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ProtocolError("these CKKS parameters are malformed or not allowed") from error


def encrypt(update: QuantizedUpdate, context: PublicContext) -> Iterator[Words]:
    """A site's integers as ciphertexts, one chunk at a time: uint64 [2, N] each; all is checked before the first.

    Not to be sent as they are: whoever holds the round's key could open them. `fedcollm_privacy.sealing` masks.

    Args:
        update: int32 [d] with the plan it belongs to.
        context: the round's public key; must be the one that the plan binds.

    Raises:
        ProtocolError: the key is not the plan's.
        InvalidValue: wrong length, a value beyond the plan's levels, or a sum of so many could overflow.
    """
    plan, parameters = update.plan, context.parameters
    if context.digest != plan.key_digest:
        raise ProtocolError("the public key is not the one that the round plan binds; nothing was encrypted")
    parameters.prove(plan.max_contributors, plan.value_bits)
    if update.grid.shape != (plan.dimension,):
        raise InvalidValue("update.grid", f"{update.grid.shape[0]} coordinates", f"{plan.dimension}, as planned")
    if int(update.grid.max()) > plan.levels or int(update.grid.min()) < -plan.levels:
        raise InvalidValue("update.grid", "a value off the grid", f"integers in [-{plan.levels}, {plan.levels}]")
    return encrypt_grid(update.grid, context)


def encrypt_grid(grid: NDArray[np.int32], context: PublicContext) -> Iterator[Words]:
    """The ciphertexts of integers that `encrypt` has checked, or of some of them; by themselves they prove nothing."""
    parameters = context.parameters
    seal_ctx = seal_context(parameters)
    encoder = sealapi.CKKSEncoder(seal_ctx)
    encryptor = sealapi.Encryptor(seal_ctx, _load_public_key(parameters, context.public_key))
    for start in range(0, len(grid), parameters.chunk_parameters):
        plaintext, ciphertext = sealapi.Plaintext(), sealapi.Ciphertext()
        slots = _pack(grid[start : start + parameters.chunk_parameters], parameters)
        encoder.encode(slots.tolist(), 2.0**parameters.lsb_bits, plaintext)
        encryptor.encrypt(plaintext, ciphertext)
        yield to_words(ciphertext, parameters)


def to_words(ciphertext: Any, parameters: CkksParameters) -> Words:
    """The words of SEAL's own ciphertext, uint64 [2, N].

    Raises:
        ProtocolError: it is not of the form that rounds use, or this SEAL writes another format.
    """
    stream = save_object(ciphertext)
    magic, header_bytes, major, minor, compression, _, length = _STREAM.unpack_from(stream)
    body = stream[_STREAM.size :]
    if compression == 2:
        body = zstandard.ZstdDecompressor().decompress(body, max_output_size=2 * parameters.ciphertext_bytes)
    known = (magic, header_bytes, (major, minor), length) == (_MAGIC, _STREAM.size, _VERSION, len(stream))
    prefix = _ciphertext_prefix(parameters)
    if not known or compression not in (0, 2) or body[: len(prefix)] != prefix:
        raise ProtocolError("a ciphertext that is not of the form that this round seals, or not of SEAL 4.3")
    words = np.frombuffer(body, dtype="<u8", offset=len(prefix)).astype(np.uint64, copy=False)
    return words.reshape(2, parameters.poly_modulus_degree)


def to_ciphertext(words_2N: Words, parameters: CkksParameters) -> Any:
    """SEAL's ciphertext with these words, at the plan's level and scale, in NTT form.

    Raises:
        ProtocolError: a word is not below q, or SEAL refuses.
    """
    body = _ciphertext_prefix(parameters) + words_2N.astype("<u8", copy=False).tobytes()
    ciphertext = load_object(sealapi.Ciphertext(), seal_context(parameters), _stream(body))
    if ciphertext.is_transparent():
        raise ProtocolError("a transparent ciphertext: it hides nothing")
    return ciphertext


@lru_cache(maxsize=8)
def _ciphertext_prefix(parameters: CkksParameters) -> bytes:
    degree = parameters.poly_modulus_degree
    fields = (*seal_context(parameters).first_parms_id(), 1, 2, degree, 1, 2.0**parameters.lsb_bits, 1)
    count = struct.pack("<Q", 2 * degree)
    inner = _STREAM.pack(_MAGIC, _STREAM.size, *_VERSION, 0, 0, _STREAM.size + len(count) + 16 * degree)
    return _CIPHERTEXT.pack(*fields) + inner + count


def _stream(body: bytes) -> bytes:
    return _STREAM.pack(_MAGIC, _STREAM.size, *_VERSION, 0, 0, _STREAM.size + len(body)) + body


def _load_public_key(parameters: CkksParameters, data: bytes) -> Any:
    if len(data) > parameters.max_public_key_bytes:
        raise ProtocolError(f"a public key of {len(data)} bytes; allowed: {parameters.max_public_key_bytes}")
    return load_object(sealapi.PublicKey(), seal_context(parameters), data)


@lru_cache(maxsize=8)
def seal_context(parameters: CkksParameters) -> Any:
    """SEAL's context for these parameters, refused unless SEAL too finds 128-bit security.

    Raises:
        InvalidValue: SEAL refuses the parameters.
    """
    chosen = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    chosen.set_poly_modulus_degree(parameters.poly_modulus_degree)
    sizes = list(parameters.coeff_mod_bit_sizes)
    primes = sealapi.CoeffModulus.Create(parameters.poly_modulus_degree, sizes)
    chosen.set_coeff_modulus(primes)
    seal_ctx = sealapi.SEALContext(chosen, True, sealapi.SEC_LEVEL_TYPE.TC128)
    if not seal_ctx.parameters_set() or primes[0].value() != parameters.modulus:
        reason = seal_ctx.parameters_error_name()
        raise InvalidValue("coeff_mod_bit_sizes", parameters.coeff_mod_bit_sizes, f"what SEAL accepts ({reason})")
    return seal_ctx


def _pack(grid: NDArray[np.int32], parameters: CkksParameters) -> NDArray[np.complex128]:
    fields_F2S = np.zeros((parameters.fields, 2, parameters.slots))
    fields_F2S.reshape(-1)[: len(grid)] = grid
    weights_F = 2.0 ** (parameters.field_bits * np.arange(parameters.fields))
    packed_2S = np.tensordot(weights_F, fields_F2S, axes=1)
    return np.asarray(packed_2S[0] + 1j * packed_2S[1], dtype=np.complex128)


def unpack(packed_2S: Int64, parameters: CkksParameters) -> Int64:
    """The coordinates of one chunk, int64 [chunk_parameters], from real and imaginary parts, int64 [2, slots].

    Right whenever every field lies in ``[-2**(field_bits-1), 2**(field_bits-1))``, which `CkksParameters.prove` shows.
    """
    half, fields_F2S, rest_2S = 1 << (parameters.field_bits - 1), [], packed_2S
    for _ in range(parameters.fields - 1):
        low_2S = ((rest_2S + half) & (2 * half - 1)) - half
        fields_F2S.append(low_2S)
        rest_2S = (rest_2S - low_2S) >> parameters.field_bits
    return np.stack([*fields_F2S, rest_2S]).reshape(-1)


def save_object(seal_object: Any) -> bytes:
    """The stream that SEAL writes for a ciphertext or public key."""
    with _file_for_seal() as (descriptor, path):
        seal_object.save(path)
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, size, 0)


def load_object(seal_object: Any, seal_ctx: Any, data: bytes) -> Any:
    """Fill ``seal_object`` from untrusted bytes, by SEAL's validating loader; gives it back.

    Raises:
        ProtocolError: the bytes are not exactly one valid stream for these parameters.
    """
    # SEAL ignores what follows its stream; we do not.
    if len(data) < _STREAM.size or _STREAM.unpack_from(data)[-1] != len(data):
        raise ProtocolError("bytes that are not one SEAL stream")
    with _file_for_seal() as (descriptor, path):
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        try:
            seal_object.load(seal_ctx, path)
        except (RuntimeError, ValueError, IndexError, OverflowError, MemoryError) as error:
            raise ProtocolError("bytes that SEAL refuses for these parameters") from error
    return seal_object


@contextmanager
def _file_for_seal() -> Iterator[tuple[int, str]]:
    """A file without content that SEAL can open by path (its Python binding knows no buffers): in memory on Linux."""
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        descriptor = os.memfd_create("seal")
        try:
            yield descriptor, f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory(prefix="seal-") as folder:
            path = Path(folder, "object")
            with path.open("w+b", buffering=0) as file:
                yield file.fileno(), str(path)
