"""From a private update to its masked upload: encrypt, mask, chunk by chunk, on one core or several.

SEAL's calls hold Python's global lock, so more cores take more processes. They are children of the site's own process,
get the masks' keys through a pipe, write their chunks into the upload's file, and end with it.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedcollm_privacy.ciphertext_sum import Words
from fedcollm_privacy.ckks import PublicContext, encrypt, encrypt_grid
from fedcollm_privacy.masks import MaskSum, add_mod
from fedcollm_privacy.messages import QuantizedUpdate
from fedcollm_privacy.secure_sum_messages import PartRequest
from fedcollm_privacy.uploads import Upload

__all__ = ["seal"]

Terms = Sequence[tuple[bytes, int]]

_BLOCK_CHUNKS = 32
_PAYS_FROM_CHUNKS = 1024


def seal(update: QuantizedUpdate, context: PublicContext, terms: Terms, *, processes: int | None = None) -> Upload:
    """The upload: the update's ciphertexts with all masks on c0.

    Args:
        update: the site's integers under the round's plan.
        context: the round's public key.
        terms: keys and signs of the masks (`fedcollm_privacy.peer_shares.mask_terms`).
        processes: how many encrypt at once; None takes one, and one a core where the update is long enough to pay for
            their start (about eight million parameters).

    Raises:
        ProtocolError: the key is not the plan's.
        InvalidValue: as `fedcollm_privacy.ckks.encrypt`.
    """
    chunks, parameters = encrypt(update, context), context.parameters
    if processes is None:
        long = parameters.chunk_count(len(update.grid)) >= _PAYS_FROM_CHUNKS
        processes = (os.cpu_count() or 1) if long else 1
    if processes == 1:
        return Upload.of(_masked(chunks, terms, context, 0), parameters.ciphertext_bytes)
    size, digests = _BLOCK_CHUNKS * parameters.chunk_parameters, []
    with tempfile.NamedTemporaryFile(prefix="fedcollm-") as file:
        # Not forked: this process may hold threads, and other secrets.
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            raw, terms = context.to_bytes(), tuple(terms)
            blocks = [
                pool.submit(_write, file.name, raw, update.grid[start : start + size], terms, number * _BLOCK_CHUNKS)
                for number, start in enumerate(range(0, len(update.grid), size))
            ]
            digests = [block.result() for block in blocks]
        # The name goes when the block ends; what is open stays.
        return Upload(Path(file.name).open("rb"), parameters.ciphertext_bytes, b"".join(digests))


def _write(name: str, raw_context: bytes, grid: NDArray[np.int32], terms: Terms, first: int) -> bytes:
    """Seal some chunks into the file; gives their digests."""
    context = PublicContext.from_bytes(raw_context)
    size = context.parameters.ciphertext_bytes
    upload = Upload.of(_masked(encrypt_grid(grid, context), terms, context, first), size)
    with Path(name).open("r+b") as file:
        file.seek(first * size)
        file.writelines(upload.part(PartRequest(plan_digest="", first=0, count=upload.count)))
    return upload.digests


def _masked(chunks: Iterator[Words], terms: Terms, context: PublicContext, first: int) -> Iterator[Words]:
    modulus = context.parameters.modulus
    masks = MaskSum(terms, modulus)
    for index, words_2N in enumerate(chunks, start=first):
        masked_N = add_mod(words_2N[0], masks.chunk(index, words_2N.shape[1]), modulus)
        yield np.stack([masked_N, words_2N[1]])
