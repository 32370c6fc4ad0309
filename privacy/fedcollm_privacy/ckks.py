"""The public half of CKKS: parameters, the round's public key, sealing updates, adding sealed updates.

SEAL through ``tenseal.sealapi``. Nothing here can decrypt; that is `fedcollm_privacy.ckks_secret`, which only the
decryptor imports. Why not TenSEAL's ``CKKSVector``: seven times the bytes here, and its parser reads foreign memory
or crashes on forged input.

SEAL authenticates nothing. A damaged ciphertext may pass the checks below; the decryptor's residual check finds it at
opening. A whole ciphertext in place of another of the same key is valid: to find that takes signatures.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

from fedcollm_privacy.ckks_parameters import CkksParameters, parameters_for
from fedcollm_privacy.errors import InvalidValue, ProtocolError
from fedcollm_privacy.messages import QuantizedUpdate, SealedUpdate, canonical_json

__all__ = [
    "CiphertextSum",
    "CkksParameters",
    "PublicContext",
    "load_ciphertext",
    "load_object",
    "parameters_for",
    "save_object",
    "seal",
    "seal_chunks",
    "seal_context",
    "unpack",
]

Int64 = NDArray[np.int64]

_HEADER_LENGTH = struct.Struct("<I")
_MAX_HEADER = 4096
_SEAL_HEADER_BYTES = 16


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


def seal(update: QuantizedUpdate, context: PublicContext, site: str) -> SealedUpdate:
    """Encrypt a site's grid, one ciphertext a chunk.

    Args:
        update: int64 [d] with the plan it belongs to.
        context: the round's public key; must be the one that the plan binds.
        site: the site's public name.

    Raises:
        ProtocolError: the key is not the plan's.
        InvalidValue: wrong length, a value beyond the plan's levels, or a sum of so many could overflow.
    """
    return SealedUpdate(plan_digest=update.plan.digest, site=site, chunks=tuple(seal_chunks(update, context)))


def seal_chunks(update: QuantizedUpdate, context: PublicContext) -> Iterator[bytes]:
    """The ciphertexts of `seal`, one at a time; everything is checked before the first."""
    plan, parameters = update.plan, context.parameters
    if context.digest != plan.key_digest:
        raise ProtocolError("the public key is not the one that the round plan binds; nothing was encrypted")
    parameters.prove(plan.max_contributors, plan.value_bits)
    if update.grid.shape != (plan.dimension,):
        raise InvalidValue("update.grid", f"{update.grid.shape[0]} coordinates", f"{plan.dimension}, as planned")
    if int(update.grid.max()) > plan.levels or int(update.grid.min()) < -plan.levels:
        raise InvalidValue("update.grid", "a value off the grid", f"integers in [-{plan.levels}, {plan.levels}]")
    return _encrypt(update.grid, context)


def _encrypt(grid: Int64, context: PublicContext) -> Iterator[bytes]:
    parameters = context.parameters
    seal_ctx = seal_context(parameters)
    encoder = sealapi.CKKSEncoder(seal_ctx)
    encryptor = sealapi.Encryptor(seal_ctx, _load_public_key(parameters, context.public_key))
    for start in range(0, len(grid), parameters.chunk_parameters):
        plaintext, ciphertext = sealapi.Plaintext(), sealapi.Ciphertext()
        slots = _pack(grid[start : start + parameters.chunk_parameters], parameters)
        encoder.encode(slots.tolist(), 2.0**parameters.lsb_bits, plaintext)
        encryptor.encrypt(plaintext, ciphertext)
        yield save_object(ciphertext)


class CiphertextSum:
    """A running sum of sealed updates; needs the parameters and never a key.

    Memory: one ciphertext a chunk for the sum, and the same for the upload that is being checked.
    """

    def __init__(self, parameters: CkksParameters, dimension: int) -> None:
        self._parameters = parameters
        self._chunk_count = parameters.chunk_count(dimension)
        self._evaluator = sealapi.Evaluator(seal_context(parameters))
        self._total: list[Any] = []

    def add(self, chunks: Iterable[bytes]) -> None:
        """Add one upload, whole or not at all.

        Raises:
            ProtocolError: a chunk is malformed or their number is wrong; the sum is as before.
        """
        upload = [load_ciphertext(chunk, self._parameters) for chunk in chunks]
        if len(upload) != self._chunk_count:
            raise ProtocolError(f"an upload of {len(upload)} ciphertexts where {self._chunk_count} are planned")
        if not self._total:
            self._total = upload
            return
        for total, addend in zip(self._total, upload, strict=True):
            self._evaluator.add_inplace(total, addend)

    def chunks(self) -> Iterator[bytes]:
        """The sum's ciphertexts; none before the first `add`."""
        return map(save_object, self._total)


def load_ciphertext(data: bytes, parameters: CkksParameters) -> Any:
    """One fresh-looking ciphertext from untrusted bytes.

    Checked: length, stream length, SEAL's own validity, two polynomials, first level, one data prime, NTT form, not
    transparent, exact scale. A ciphertext of another key passes: only the decryptor can tell.

    Raises:
        ProtocolError: any of these fails.
    """
    if len(data) > parameters.max_ciphertext_bytes:
        raise ProtocolError(f"a ciphertext of {len(data)} bytes; allowed: {parameters.max_ciphertext_bytes}")
    seal_ctx = seal_context(parameters)
    ciphertext = load_object(sealapi.Ciphertext(), seal_ctx, data)
    sound = (
        ciphertext.size() == 2
        and ciphertext.poly_modulus_degree() == parameters.poly_modulus_degree
        and ciphertext.coeff_modulus_size() == 1
        and ciphertext.parms_id() == seal_ctx.first_parms_id()
        and ciphertext.is_ntt_form()
        and not ciphertext.is_transparent()
        and ciphertext.scale == 2.0**parameters.lsb_bits
    )
    if not sound:
        raise ProtocolError("a ciphertext that is not of the form that this round seals")
    return ciphertext


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
    # The proof against wrapping modulo q rests on a data prime close to its power of two.
    if not seal_ctx.parameters_set() or math.log2(primes[0].value()) < sizes[0] - 0.25:
        reason = seal_ctx.parameters_error_name()
        raise InvalidValue("coeff_mod_bit_sizes", parameters.coeff_mod_bit_sizes, f"what SEAL accepts ({reason})")
    return seal_ctx


def _pack(grid: Int64, parameters: CkksParameters) -> NDArray[np.complex128]:
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
    if len(data) < _SEAL_HEADER_BYTES or int.from_bytes(data[8:16], "little") != len(data):
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
