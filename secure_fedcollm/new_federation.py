"""The first step of the ceremony: an authority, the governance's key, and a kit without keys for every party."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import yaml

from fedcollm_privacy.errors import KitError
from fedcollm_privacy.identity import SigningKey, load_public, save_key, save_public
from secure_fedcollm import flare_provisioning as flare
from secure_fedcollm.ceremony import Ceremony
from secure_fedcollm.federation_file import GOVERNANCE, FederationFile
from secure_fedcollm.kit import Party
from secure_fedcollm.kit_files import write_file
from secure_fedcollm.kit_texts import readme_text

__all__ = ["begin"]


def begin(source: Path, out: Path, passphrase: bytes | None) -> Ceremony:
    """Make the authority, the governance's key and a kit without keys for every party.

    Args:
        source: ``federation.yaml``.
        out: a folder that does not exist yet.
        passphrase: encrypts the governance's key.

    Raises:
        ConfigError: the file is not allowed.
        KitError: the folder exists, or NVIDIA FLARE refuses.
    """
    federation = FederationFile.read(source)
    if os.path.lexists(out):
        raise KitError(f"{out} exists and is never overwritten: choose another --out, or move it away")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        work = Path(temporary) / "made"
        place = work / "ceremony"
        for folder in (work, place, place / "admitted", place / "revoked", work / "kits"):
            folder.mkdir(mode=0o700)
        shutil.copyfile(source, work / "federation.yaml")
        flare.make_authority(place / "authority", federation.name, federation.server)
        governance = SigningKey.generate(GOVERNANCE)
        save_key(governance, place / "governance.key", passphrase)
        save_public(governance.public, place / "governance.pub")
        kits = {party: secrets.token_hex(16) for party in federation.parties}
        write_file(place / "parties.json", json.dumps(kits, indent=2).encode())
        for party in federation.parties:
            _write_kit(work / "kits" / party, Party.of(federation, party, kits[party]), place)
        os.rename(work, out)
    return Ceremony.open(out)


def _write_kit(folder: Path, party: Party, place: Path) -> None:
    folder.mkdir(mode=0o700)
    write_file(folder / "party.yaml", yaml.safe_dump(asdict(party), sort_keys=False, allow_unicode=True).encode())
    shutil.copyfile(place / "governance.pub", folder / "governance.pub")
    shutil.copyfile(place / "authority" / "rootCA.pem", folder / "ca.pem")
    write_file(folder / "README.md", readme_text(party, load_public(place / "governance.pub")).encode())
