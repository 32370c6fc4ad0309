"""The aggregator's own process: adds encrypted updates, blind. It never holds a key and never loads SEAL.

Started by `fedcollm_privacy.aggregator` with a socket as standard input and nothing else; it ends when that socket
closes. Every byte of an upload is checked against the site's signature before it is looked at any further: first the
signed manifest, then each chunk's number, length and digest, then its words.

Frames in, each answered by one frame with a word of `CODES`::

    {"op": "begin", "plan_digest", "dimension", "max_contributors", "parameters": {...}, "signers": {site: key hex}}
    {"op": "add"}  then the upload's manifest as a wire message
        answered; if "accepted", its chunks follow, one frame each: number u32, big-endian, then the words. An empty
        frame breaks the upload off. Answered again at its end: it is in the sum whole or not at all.
    {"op": "finish"}
        answered; then the sum's chunks, one frame each
"""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import socket
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any, Protocol

from fedcollm_privacy.ciphertext_sum import CiphertextSum, words_of
from fedcollm_privacy.ckks_parameters import CkksParameters
from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.framing import receive_frame, send_frame
from fedcollm_privacy.identity import PublicIdentity
from fedcollm_privacy.secure_sum_messages import DIGEST_BYTES, UploadManifest, verify
from fedcollm_privacy.wire import decode

__all__ = ["ACCEPTED", "CODES", "MAX_HEADER", "Accumulation", "chunk_frame", "main", "serve"]

ACCEPTED = "accepted"
CODES = (
    ACCEPTED,
    "malformed_manifest",
    "unknown_site",
    "wrong_signature",
    "already_in_sum",
    "cohort_full",
    "wrong_chunk_count",
    "broken_off",
    "wrong_chunk",
    "malformed_ciphertext",
)
MAX_HEADER = 2**24
_NUMBER = struct.Struct(">I")
_HEADROOM_BYTES = 2**28


def chunk_frame(number: int, chunk: bytes) -> bytes:
    """A chunk as it travels to the process."""
    return _NUMBER.pack(number) + chunk


class Chunks(Protocol):
    """Where an upload's chunk frames come from, one a call."""

    def __call__(self) -> bytes:
        """The next frame."""


class Accumulation:
    """One round's sum so far, and whose updates are in it.

    Args:
        plan_digest: uploads of other plans are refused.
        dimension: d.
        max_contributors: n.
        parameters: of the encryption.
        signers: by site, whose signatures count.
    """

    def __init__(
        self,
        *,
        plan_digest: str,
        dimension: int,
        max_contributors: int,
        parameters: CkksParameters,
        signers: dict[str, PublicIdentity],
    ) -> None:
        self._plan_digest, self._max_contributors, self._signers = plan_digest, max_contributors, signers
        self._parameters = parameters
        self.chunk_count = parameters.chunk_count(dimension)
        self.total = CiphertextSum(parameters, dimension)
        self._cohort: set[str] = set()

    def check(self, raw_manifest: bytes) -> tuple[str, UploadManifest | None]:
        """`ACCEPTED` with the manifest, or the code of why this upload stays out, before a chunk of it is read."""
        try:
            manifest = decode(raw_manifest, UploadManifest)
        except ProtocolError:
            return "malformed_manifest", None
        signer = self._signers.get(manifest.site)
        if signer is None:
            return "unknown_site", None
        try:
            verify(manifest, signer, self._plan_digest)
        except ProtocolError:
            return "wrong_signature", None
        if manifest.site in self._cohort:
            return "already_in_sum", None
        if len(self._cohort) >= self._max_contributors:
            return "cohort_full", None
        if len(manifest.chunk_digests) != self.chunk_count * DIGEST_BYTES:
            return "wrong_chunk_count", None
        return ACCEPTED, manifest

    def add(self, manifest: UploadManifest, frames: Chunks) -> str:
        """Add an upload that passed `check`, whole or not at all; all its frames are used up either way.

        What was added of an upload that turns out broken is taken back exactly, from a file without a name: the memory
        stays that of the sum.
        """
        with tempfile.TemporaryFile() as added:
            code, number = ACCEPTED, 0
            for number in range(self.chunk_count):
                frame = frames()
                if not frame:
                    code = "broken_off"
                    break
                if code == ACCEPTED:
                    code = self._add_chunk(manifest, number, frame)
                if code == ACCEPTED:
                    added.write(frame[_NUMBER.size :])
            if code != ACCEPTED:
                self._take_back(added)
                return code
        self._cohort.add(manifest.site)
        return ACCEPTED

    def _add_chunk(self, manifest: UploadManifest, number: int, frame: bytes) -> str:
        chunk = frame[_NUMBER.size :]
        numbered = frame[: _NUMBER.size] == _NUMBER.pack(number)
        if not numbered or hashlib.sha256(chunk).digest() != manifest.chunk_digest(number):
            return "wrong_chunk"
        try:
            self.total.add(number, words_of(chunk, self._parameters))
        except ProtocolError:
            return "malformed_ciphertext"
        return ACCEPTED

    def _take_back(self, added: Any) -> None:
        added.seek(0)
        number = 0
        while chunk := added.read(self._parameters.ciphertext_bytes):
            self.total.take_back(number, words_of(chunk, self._parameters))
            number += 1


def serve(connection: socket.socket, time_limit_s: int) -> None:
    """Answer requests until the other side closes.

    Args:
        connection: the stream socket to the parent.
        time_limit_s: handling one frame may take so long; then the operating system ends this process, so that a hang
            cannot outlive a parent that was killed. Waiting for a frame takes as long as it takes.
    """
    accumulation: Accumulation | None = None
    while True:
        try:
            request = _receive_header(connection)
        except EOFError:
            return
        signal.alarm(time_limit_s)
        if request["op"] == "begin":
            accumulation = _begin(request)
            _reply(connection, ACCEPTED)
        elif accumulation is None:
            raise ProtocolError("the parent asked for a sum before it began one")
        elif request["op"] == "add":
            _add(connection, accumulation, time_limit_s)
        else:
            _reply(connection, ACCEPTED)
            for chunk in accumulation.total.chunks():
                signal.alarm(time_limit_s)
                send_frame(connection, chunk)
            accumulation = None
        signal.alarm(0)


def _begin(request: dict[str, Any]) -> Accumulation:
    fields = request["parameters"]
    parameters = CkksParameters(**(fields | {"coeff_mod_bit_sizes": tuple(fields["coeff_mod_bit_sizes"])}))
    keys = request["signers"].items()
    accumulation = Accumulation(
        plan_digest=request["plan_digest"],
        dimension=request["dimension"],
        max_contributors=request["max_contributors"],
        parameters=parameters,
        signers={site: PublicIdentity(name=site, public_key=bytes.fromhex(key)) for site, key in keys},
    )
    _limit_memory(accumulation.chunk_count * parameters.ciphertext_bytes)
    return accumulation


def _limit_memory(sum_bytes: int) -> None:
    """No more address space than what is mapped now, the sum (already among it on most systems) and some room."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + sum_bytes + _HEADROOM_BYTES, hard))


def _add(connection: socket.socket, accumulation: Accumulation, time_limit_s: int) -> None:
    code, manifest = accumulation.check(receive_frame(connection, largest=MAX_HEADER))
    _reply(connection, code)
    if manifest is None:
        return

    def frames() -> bytes:
        signal.alarm(0)
        frame = receive_frame(connection, largest=MAX_HEADER)
        signal.alarm(time_limit_s)
        return frame

    _reply(connection, accumulation.add(manifest, frames))


def _receive_header(connection: socket.socket) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(receive_frame(connection, largest=MAX_HEADER))
    return header


def _reply(connection: socket.socket, code: str) -> None:
    send_frame(connection, code.encode())


def main() -> None:
    """Entry point of the process: standard input is the socket, the argument the time limit in seconds."""
    serve(socket.socket(fileno=sys.stdin.fileno()), int(sys.argv[1]))


if __name__ == "__main__":
    main()
