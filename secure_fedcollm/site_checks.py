"""What only a site has: policy, settings, records, model, ledger and budget. Each is looked at as a run would use it.

Nothing is changed, and nothing of a record is shown, not even how many there are.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from fedcollm_privacy.errors import ConfigError, DataError, FedCollmError, KitError, PolicyRefused
from fedcollm_privacy.ledger_file import LedgerFile
from fedcollm_privacy.policy_file import load_policy
from fedcollm_privacy.roster import Roster
from fedcollm_privacy.site_policy import SitePolicy
from secure_fedcollm.finding import Finding, found
from secure_fedcollm.kit import Kit
from secure_fedcollm.records import HUB, SUFFIXES, BadRow, row_text
from secure_fedcollm.report import epsilon
from secure_fedcollm.site_budgets import budgets_of
from secure_fedcollm.site_settings import SiteSettings, read_settings

__all__ = ["check_site_only"]

_SOON_DAYS = 30
_ROWS = 20
_LONGEST_ROW = 2**24
_ADMINISTRATOR = "the site's administrator corrects {0}; `fedcollm policy check {0}` says what it allows"


def check_site_only(kit: Kit, roster: Roster | None, now: float) -> list[Finding]:
    """All that a site has and a server has not.

    Args:
        kit: the site's.
        roster: the verified roster; None where it does not hold, which is said elsewhere.
        now: Unix time in seconds.
    """
    policy_path, settings_path = kit.folder / "policy.yaml", kit.folder / "site.yaml"
    policy: list[SitePolicy] = []
    settings: list[SiteSettings] = []

    def look_at_policy() -> Finding | str:
        read = load_policy(policy_path, kit.name)
        finding = _policy(read, kit, roster, now)
        policy.append(read)
        return finding

    def look_at_settings() -> str:
        settings.append(read_settings(settings_path, kit.name))
        return f"{settings_path} is in order; runs are {_APPROVAL[settings[0].approval]}"

    findings = [
        found("policy", _ADMINISTRATOR.format(policy_path), look_at_policy),
        found("settings", f"correct {settings_path}", look_at_settings),
    ]
    if settings:
        where = f"correct data in {settings_path}, or put the records where it says"
        findings.append(found("data", where, lambda: _data(settings[0])))
        if policy:
            findings.append(
                found("data in policy", _ADMINISTRATOR.format(policy_path), lambda: _rule(settings[0], policy[0]))
            )
            findings.append(
                found("model", f"correct model in {settings_path}", lambda: _model(settings[0], policy[0], policy_path))
            )
    findings.extend(_ledger(kit, policy[0] if policy else None, now))
    return findings


_APPROVAL = {
    "auto": "joined as far as the policy allows, without asking",
    "ask": "joined after `fedcollm site approve`",
}


def _policy(policy: SitePolicy, kit: Kit, roster: Roster | None, now: float) -> Finding | str:
    today = datetime.fromtimestamp(now, UTC).date()
    policy.require_valid(today)
    if roster is not None and roster.server not in policy.servers:
        server = roster.server
        raise PolicyRefused(
            "servers", f"it does not list the server {server.name} with the roster's key ({server.fingerprint})"
        )
    for name in ("min_contributors", "max_colluding"):
        demanded, agreed = getattr(policy.opening, name), getattr(kit.party, name)
        if demanded > agreed:
            raise PolicyRefused(f"opening.{name}", f"it demands {demanded}; the federation agreed on {agreed}")
    left = (policy.valid_until - today).days
    said = f"valid until {policy.valid_until}, digest {policy.digest[:16]}"
    if policy.exceptions:
        said += f"; NOTE: its exceptions {', '.join(policy.exceptions)} allow runs that protect nobody"
    if left < _SOON_DAYS:
        return Finding(name="policy", ok=None, detail=f"{said}: {left} days left", remedy="renew valid_until in time")
    return Finding(name="policy", ok=None, detail=said, remedy="remove them") if policy.exceptions else said


def _rule(settings: SiteSettings, policy: SitePolicy) -> Finding | str:
    location = "embedded" if settings.data.path is None else settings.data.path
    rule = policy.data_set(location)
    if rule.unit == "person" and settings.data.unit_field is None and settings.data.path is not None:
        raise ConfigError(
            "data.unit_field", None, "the column that names a record's person: the policy protects persons"
        )
    return f"the policy lists it as {rule.name}, and counts each {rule.unit}"


def _data(settings: SiteSettings) -> Finding | str:
    data = settings.data
    if data.path is None:
        return "the embedded synthetic notes"
    if data.path.startswith(HUB):
        detail = f"{data.path} is a hub data set: it is fetched when a run begins, and was not looked at"
        return Finding(name="data", ok=None, detail=detail, remedy="better give a file on this machine")
    place = Path(data.path)
    inside = [p for p in place.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()] if place.is_dir() else []
    files = sorted(inside) or [place]
    if not files[0].is_file() or files[0].suffix.lower() not in SUFFIXES:
        if place.is_dir() and data.task not in ("text", "chat"):
            return f"{place} is there; a task of a published format reads it when a run begins"
        raise ConfigError("data.path", data.path, "an existing .jsonl or .csv file, or a folder with such files")
    wanted = [name for name in (data.prompt_field, data.target_field) if name] if data.task == "text" else []
    seen = False
    for number, values in _first_rows(files[0]):
        seen = True
        for name in wanted:
            try:
                row_text(values, name)
            except BadRow as bad:
                raise DataError(f"{files[0].name}:{number}: {bad}") from None
        if data.unit_field and data.unit_field not in values:
            raise DataError(f"{files[0].name}:{number}: field {data.unit_field!r} is missing")
    if not seen:
        raise DataError(f"{files[0].name} holds no row")
    mode = files[0].stat().st_mode & 0o077
    if mode & 0o007 and data.declared == "private":
        detail = f"its first rows can be read; but every user of this machine may open {files[0]}"
        return Finding(name="data", ok=None, detail=detail, remedy=f"chmod o-rwx {files[0]}")
    return f"{place}: its first rows can be read"


def _first_rows(file: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    if file.suffix.lower() == ".csv":
        with file.open(encoding="utf-8-sig", newline="") as lines:
            try:
                yield from (
                    (n, row) for n, row in enumerate(islice(csv.DictReader(lines, strict=True), _ROWS), start=2)
                )
            except (csv.Error, UnicodeDecodeError):
                raise DataError(f"{file.name}: broken CSV among its first rows") from None
        return
    with file.open("rb") as raw:
        for number in range(1, _ROWS + 1):
            line = raw.readline(_LONGEST_ROW)
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError):
                values = None
            if not isinstance(values, dict):
                raise DataError(f"{file.name}:{number}: not a JSON object in UTF-8")
            yield number, values


def _model(settings: SiteSettings, policy: SitePolicy, path: Path) -> Finding | str:
    # Here, because torch takes seconds and the checks before need none of it.
    from secure_fedcollm.models import base_digest_of

    digests = {}
    for dtype in ("float32", "bfloat16"):
        digests[dtype] = base_digest_of(settings.model, dtype)
        if digests[dtype] in policy.base_models:
            return f"{settings.model}, {digests[dtype][:16]} in {dtype}, is in the policy"
    raise PolicyRefused(
        "base_models",
        f"{settings.model} has the digest {digests['float32']} (float32) or {digests['bfloat16']} (bfloat16); {path} "
        "lists neither. If this is the model that was agreed on, its digest has to be added there",
    )


def _ledger(kit: Kit, policy: SitePolicy | None, now: float) -> list[Finding]:
    path = kit.state / "ledger.sqlite"
    if not path.exists():
        detail = "none yet; the first run makes it. If this site has trained before, its ledger is missing"
        return [Finding(name="ledger", ok=True, detail=detail)]

    def look() -> str:
        file = LedgerFile(path)
        if file.identity != kit.public:
            raise KitError(f"{path} is the ledger of another site or key")
        last = file.entries()
        if last and datetime.fromisoformat(last[-1]["time"]).timestamp() > now + 60:
            raise FedCollmError(
                f"its last entry is of {last[-1]['time']}, and this machine's clock is not there yet: it was set back"
            )
        return f"chain, signatures and {len(file.heads())} counter-signed heads hold"

    restore = (
        f"stop; restore {path} from its newest backup (`fedcollm ledger import`), and tell whoever audits this site"
    )
    findings = [found("ledger", restore, look)]
    if findings[0].ok and policy is not None:
        for row in budgets_of(kit.folder / "policy.yaml", kit.name, path, now):
            findings.append(_budget(row, policy.plans.max_epsilon))
    return findings


def _budget(row: Mapping[str, Any], asked: float) -> Finding:
    spent, cap, days = row["epsilon"], row["cap_epsilon"], row["days"]
    window = "for ever" if days is None else f"in any {days} days"
    charged = f"epsilon {epsilon(spent)} of {cap:g}, delta {row['delta']:.2g} of {row['cap_delta']:.2g}"
    name, detail = f"budget of {row['data_set']}", f"{row['data_set']} {window}: {charged} is charged"
    if spent >= cap or row["delta"] >= row["cap_delta"]:
        wait = "raise the cap in the policy" if days is None else "wait until older runs leave the window, or raise it"
        return Finding(name=name, ok=False, detail=f"{detail}: nothing is left", remedy=f"{wait}; its owner decides")
    if cap - spent < asked:
        detail += f": less is left than one run may ask for ({asked:g})"
        return Finding(
            name=name, ok=None, detail=detail, remedy="a run that asks for more than is left will be refused"
        )
    return Finding(name=name, ok=True, detail=detail)
