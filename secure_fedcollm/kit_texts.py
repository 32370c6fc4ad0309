"""What a kit tells its administrator: a page to read, a unit for systemd, settings to fill in."""

from __future__ import annotations

import pwd
import sys
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from fedcollm_privacy.identity import PublicIdentity, is_encrypted
from secure_fedcollm.kit import Party
from secure_fedcollm.site_settings import settings_text

__all__ = ["readme_text", "settings_text", "unit_text"]

_WRITABLE = {"site": ("state", "engine"), "server": ("state", "engine", "engine-admin", "runs")}


def readme_text(party: Party, governance: PublicIdentity) -> str:
    """``README.md``: the commands, whom to call, what goes over the network."""
    return _rendered("kit_readme.md.j2", party=party, fingerprint=governance.fingerprint)


def unit_text(folder: Path, party: Party) -> str:
    """The unit that starts the party's service as the owner of its kit, with nothing writable but what it must write.

    Args:
        folder: the kit, absolute; it has the identity's key, whose encryption decides how the passphrase comes in.
        party: whose kit it is.
    """
    return _rendered(
        "kit_unit.service.j2",
        party=party,
        folder=str(folder),
        user=pwd.getpwuid(folder.stat().st_uid).pw_name,
        program=str(Path(sys.executable).with_name("fedcollm")),
        encrypted=is_encrypted(folder / "keys" / "identity.key"),
        writable=_WRITABLE[party.role],
        quoted=_quoted,
        unquoted=_unquoted,
    )


def _rendered(name: str, **values: object) -> str:
    source = resources.files("secure_fedcollm").joinpath(name).read_text(encoding="utf-8")
    # Nothing here is HTML: the values are names that were checked, paths that are quoted for systemd, and prose.
    environment = Environment(  # noqa: S701
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(source).render(**values)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _unquoted(text: str) -> str:
    return text.replace("%", "%%")
