"""Files that are replaced whole: after a crash, and for who reads meanwhile, the old content or the new, no part."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["sync_files", "sync_folder", "write_atomically"]


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace a file; on disk when this returns, and never readable under a wider ``mode``.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_files(folder: Path) -> None:
    """Have the files that a library wrote into a folder outlive a power cut."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
