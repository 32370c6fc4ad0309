"""A site's masked upload, made once, chunk by chunk, and handed over in parts as often as asked.

The chunks lie in a temporary file of the site (in memory while small). They are ciphertexts under masks, as they will
be on the network, so the disk learns nothing; the file has no name and goes with the object.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Iterable
from typing import IO, Self

from fedcollm_privacy.ciphertext_sum import Words
from fedcollm_privacy.errors import ProtocolError
from fedcollm_privacy.secure_sum_messages import DIGEST_BYTES, PartRequest

__all__ = ["Upload"]

_IN_MEMORY = 2**24


class Upload:
    """The chunks of one upload.

    Args:
        file: holds the chunks one after the other; closed with the object.
        chunk_bytes: length of each.
        digests: SHA-256 of each, one after the other.
    """

    def __init__(self, file: IO[bytes], chunk_bytes: int, digests: bytes) -> None:
        self._file, self._chunk_bytes, self.digests = file, chunk_bytes, digests
        weakref.finalize(self, file.close)

    @classmethod
    def of(cls, chunks: Iterable[Words], chunk_bytes: int) -> Self:
        """An upload of these chunks, taken one at a time."""
        file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 (lives with the object)
        upload, digests = cls(file, chunk_bytes, b""), []
        for chunk in chunks:
            data = chunk.astype("<u8", copy=False).tobytes()
            digests.append(hashlib.sha256(data).digest())
            file.write(data)
        upload.digests = b"".join(digests)
        return upload

    @property
    def count(self) -> int:
        """Number of chunks."""
        return len(self.digests) // DIGEST_BYTES

    def part(self, request: PartRequest) -> tuple[bytes, ...]:
        """The chunks asked for.

        Raises:
            ProtocolError: there are not so many.
        """
        if request.first + request.count > self.count:
            raise ProtocolError(f"chunks {request.first} to {request.first + request.count - 1} of {self.count}")
        self._file.seek(request.first * self._chunk_bytes)
        return tuple(self._file.read(self._chunk_bytes) for _ in range(request.count))

    def close(self) -> None:
        """Delete the chunks."""
        self._file.close()
