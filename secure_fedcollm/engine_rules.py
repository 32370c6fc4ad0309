"""A party's own rules for FLARE: which classes a job may name, that it brings no code, and that logs stay here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from fedcollm_privacy._validate import one_of
from fedcollm_privacy.errors import DataError

__all__ = ["SERVER_RELAY", "SITE_RELAY", "engine_rules"]

SERVER_RELAY = "secure_fedcollm.flare.ServerRelay"
SITE_RELAY = "secure_fedcollm.flare.SiteRelay"

_LOG_STREAMERS = ("site_log_streamer",)
# The lead submits jobs and ends its own; nobody else submits, and nobody's job may bring code or run commands.
_LEAD = {"submit_job": "any", "manage_job": "n:submitter", "view": "any", "byoc": "none"}
_OTHERS = {"submit_job": "none", "manage_job": "none", "view": "o:site", "byoc": "none"}
_FORBIDDEN = {"operate": "none", "shell_commands": "none"}
_ROLES = ("project_admin", "org_admin", "lead", "member")


def engine_rules(local: Path, side: Literal["server", "site"]) -> None:
    """Write ``resources.json`` and ``authorization.json`` into a start-up kit's ``local`` folder.

    They are made of FLARE's defaults beside them, and replace what is there. The server's jobs are stored in the kit.

    Args:
        local: the folder, with ``resources.json.default`` and ``authorization.json.default``.
        side: whose kit it is.

    Raises:
        InvalidValue: another side.
        DataError: a default is missing or not as FLARE 2.9 writes it.
    """
    one_of(("server", "site"), side=side)
    resources, rules = _default(local, "resources.json"), _default(local, "authorization.json")
    resources["class_allow_list"] = [SERVER_RELAY if side == "server" else SITE_RELAY]
    # By default a site sends its error log to the server: texts that data may have written.
    resources["allow_log_streaming"] = False
    storage = local.absolute().parent / "storage"
    try:
        resources["components"] = [c for c in resources["components"] if c["id"] not in _LOG_STREAMERS]
        if side == "server":
            resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(storage / "snapshots")
            managers = [c for c in resources["components"] if c["id"] == "job_manager"]
            managers[0]["args"]["uri_root"] = str(storage / "jobs")
        rules["permissions"] = {role: (_LEAD if role == "lead" else _OTHERS) | _FORBIDDEN for role in _ROLES}
    except (KeyError, IndexError, TypeError):
        raise DataError(
            f"{local} is not as FLARE 2.9 makes it; install the pinned version and make the kit again"
        ) from None
    for name, content in (("resources.json", resources), ("authorization.json", rules)):
        temporary = local / f".{name}.part"
        temporary.write_text(json.dumps(content, indent=2))
        os.replace(temporary, local / name)


def _default(local: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((local / f"{name}.default").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{local}/{name}.default cannot be read ({type(error).__name__}); make the kit again") from None
    if not isinstance(found, dict):
        raise DataError(f"{local}/{name}.default holds no object; make the kit again")
    return found
