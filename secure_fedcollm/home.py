"""What this machine keeps for runs of one process tree, beside any run's folder: keys, policies, ledgers, models."""

from __future__ import annotations

import os
from pathlib import Path

from fedcollm_privacy.errors import KeyFileError
from fedcollm_privacy.identity import SigningKey, load_key, save_key, save_public

__all__ = ["home", "identity_of"]


def home() -> Path:
    """Where keys, ledgers and policies for private data, and the embedded models' cache live.

    ``$FEDCOLLM_HOME`` or ``~/.fedcollm``.
    """
    return Path(os.environ.get("FEDCOLLM_HOME", Path.home() / ".fedcollm"))


def identity_of(name: str) -> SigningKey:
    """A party's own key in ``<home>/keys``, made when absent; never in a run's folder.

    Raises:
        KeyFileError: the file is damaged, encrypted or open to others.
    """
    folder = home() / "keys"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path, public = folder / f"{name}.key", folder / f"{name}.pub"
    if not path.exists():
        public.unlink(missing_ok=True)  # of a key that is gone
        try:
            save_key(SigningKey.generate(name), path, None)
        except KeyFileError:
            if not path.exists():  # else another run made it a moment ago
                raise
    key = load_key(path, None)
    if not public.exists():
        try:
            save_public(key.public, public)
        except KeyFileError:
            if not public.exists():
                raise
    return key
