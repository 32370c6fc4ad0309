"""Files of a kit or a ceremony: read with a bound, written whole or not at all. Loads in no time, as commands must."""

from __future__ import annotations

from pathlib import Path

from fedcollm_privacy.errors import KitError
from secure_fedcollm.atomic_file import write_atomically

__all__ = ["read_bytes", "write_file"]

_LONGEST_FILE = 2**23


def read_bytes(path: Path) -> bytes:
    """A file's content; KitError if it cannot be read or is longer than 8 MiB, as no request, grant or kit file is."""
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST_FILE + 1)
    except OSError as error:
        raise KitError(f"{path} cannot be read ({error.strerror}): correct its path, owner or mode") from error
    if len(data) > _LONGEST_FILE:
        raise KitError(f"{path} is longer than {_LONGEST_FILE} bytes; no request, no grant and no file of a kit is")
    return data


def write_file(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace a file so that a crash leaves the old or the new content; nobody reads it under a wider ``mode``.

    Raises:
        KitError: it cannot be written.
    """
    try:
        write_atomically(path, content, mode=mode)
    except OSError as error:
        raise KitError(f"{path} cannot be written ({error.strerror}): correct its folder, owner or mode") from error
