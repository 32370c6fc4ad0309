"""What a run and its sites left behind, read by the auditor's own code: nothing here trusts the trainer's parsers."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from fedcollm_audits import signatures, strict_json
from fedcollm_privacy.errors import InvalidValue

__all__ = ["Envelope", "Evidence", "LedgerExport", "Party", "Roster", "read"]

_SMALL: Final = 2**22
_DOCUMENT: Final = 2**26
_LINES: Final = 2**29
_NAME: Final = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ROSTER_FIELDS: Final = {"federation", "format", "server", "sites", "valid_until"}
_UNREADABLE = (InvalidValue, OSError, RecursionError, ValueError, binascii.Error, yaml.YAMLError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """A name and its Ed25519 key, in hex."""

    name: str
    public_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """Who takes part.

    Attributes:
        digest: SHA-256 of the roster's canonical JSON.
        file_digest: of the file; the same where it is not signed.
        governed: whether the governance's key, as the auditor was given it, signed it.
    """

    digest: str
    file_digest: str
    server: Party
    sites: Mapping[str, Party]
    governed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerExport:
    """One exported ledger.

    Attributes:
        path: where it was read.
        opening: the ``LEDGER`` line; empty in an export of schema 1.
        entries: the entries' lines in order, ``digest`` and ``signature`` included.
        heads: the ``HEAD`` lines in order.
    """

    path: Path
    opening: Mapping[str, Any]
    entries: tuple[Mapping[str, Any], ...]
    heads: tuple[Mapping[str, Any], ...]

    def of_run(self, run_id: str) -> Iterator[Mapping[str, Any]]:
        """The run's entries, in order."""
        return (entry for entry in self.entries if entry.get("run_id") == run_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """The statement as it lies in ``statement.json``: the payload's raw bytes, its parsed form, all signatures."""

    payload_type: str
    payload: bytes
    statement: Mapping[str, Any]
    signatures: tuple[tuple[str, bytes], ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the payload: how ledgers, transcript and model cards name it."""
        return hashlib.sha256(self.payload).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that the auditor was given.

    Attributes:
        run_dir: the run's folder.
        config: ``config.yaml``.
        summary: ``summary.json``.
        transcript: lines of ``transcript.jsonl``.
        ledgers: by site.
        rosters: by digest.
        envelope: the statement, or None where there is none.
        broken: files that could not be read as what they are, with the reason; checks that need them fail.
        governance: the governance's public key in hex, as the auditor was given it; empty where he was given none.
    """

    run_dir: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    transcript: tuple[Mapping[str, Any], ...]
    ledgers: Mapping[str, LedgerExport]
    rosters: Mapping[str, Roster]
    envelope: Envelope | None
    broken: Mapping[str, str]
    governance: str = field(default="")

    @property
    def predicate(self) -> Mapping[str, Any]:
        """The statement proper; empty where there is none."""
        found = {} if self.envelope is None else self.envelope.statement.get("predicate", {})
        return found if isinstance(found, Mapping) else {}

    @property
    def run_id(self) -> str:
        """The run's name as the transcript begins; else as statement or summary say; empty where nothing does."""
        for source in (self.transcript[0] if self.transcript else {}, self.predicate, self.summary):
            if isinstance(source.get("run_id"), str):
                return str(source["run_id"])
        return ""

    @property
    def private(self) -> bool | None:
        """Whether the run claims to be private: by its statement, else by its summary; None where neither says."""
        for source in (self.predicate, self.summary):
            if isinstance(source.get("private"), bool):
                return bool(source["private"])
        return None

    def events(self, *names: str) -> tuple[Mapping[str, Any], ...]:
        """The transcript's events of these names, in order."""
        return tuple(line for line in self.transcript if line.get("event") in names)

    @property
    def believed(self) -> tuple[Roster, ...]:
        """The rosters whose keys count: those that the governance signed, where the auditor was given its key."""
        return tuple(roster for roster in self.rosters.values() if roster.governed or not self.governance)

    def site_keys(self, site: str) -> frozenset[str]:
        """The keys that the rosters give a site: one, unless a roster was replaced during the run."""
        return frozenset(roster.sites[site].public_key for roster in self.believed if site in roster.sites)

    @property
    def server_keys(self) -> frozenset[str]:
        """The keys that the rosters give the server."""
        return frozenset(roster.server.public_key for roster in self.believed)


def read(
    run_dir: Path,
    *,
    ledgers: Sequence[Path] = (),
    governance: str | Path | None = None,
    rosters: Sequence[Path] = (),
) -> Evidence:
    """Read a run's folder, and what the auditor got elsewhere.

    No file makes this fail: what cannot be read, or is missing where every run has it, stands in ``broken``.

    Args:
        run_dir: the run's folder.
        ledgers: exports that sites gave the auditor. One of these goes before the folder's copy for the same site; the
            copy must then be its beginning.
        governance: the governance's public key: 64 hex digits, or the file of its public identity.
        rosters: rosters that the auditor got elsewhere, beside those in the folder.

    Raises:
        InvalidValue: ``governance`` is no key.
    """
    broken: dict[str, str] = {}
    key = _governance(governance)
    config = _one(run_dir, "config.yaml", broken, _yaml)
    summary = _one(
        run_dir, "summary.json", broken, lambda path: strict_json.parse(strict_json.read_bytes(path, _DOCUMENT))
    )
    transcript = _one(run_dir, "transcript.jsonl", broken, lambda path: tuple(strict_json.read_lines(path, _LINES)))
    envelope = None
    if _lies(run_dir / "statement.json"):
        envelope = _one(run_dir, "statement.json", broken, _envelope)
    return Evidence(
        run_dir=run_dir,
        config=config or {},
        summary=summary if isinstance(summary, dict) else {},
        transcript=transcript or (),
        ledgers=_ledgers(run_dir, ledgers, broken),
        rosters=_rosters(run_dir, rosters, key, broken),
        envelope=envelope or None,
        broken=broken,
        governance=key,
    )


def _lies(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _one(run_dir: Path, name: str, broken: dict[str, str], parse: Any) -> Any:
    path = run_dir / name
    try:
        if not _lies(path):
            raise ValueError("is missing")
        # A folder on the way may be a link, too.
        if not path.is_symlink() and not path.resolve().is_relative_to(run_dir.resolve()):
            raise ValueError("leads out of the run's folder")
        value = parse(path)
        if isinstance(value, dict | tuple | Envelope | Roster | LedgerExport):
            return value
        raise ValueError("is no JSON object")
    except _UNREADABLE as error:
        broken[name] = f"{error!s:.300}" or type(error).__name__
        return None


def _yaml(path: Path) -> dict[str, Any]:
    text = strict_json.read_bytes(path, _SMALL).decode("utf-8")
    depth = 0
    # Event by event and given up at once, because the library takes minutes for a deep nest.
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > strict_json.MAX_DEPTH:
            raise ValueError(f"holds YAML aliases, or is nested deeper than {strict_json.MAX_DEPTH} levels")
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise ValueError("is no mapping")
    return value


def _envelope(path: Path) -> Envelope:
    outer = strict_json.parse(strict_json.read_bytes(path, _DOCUMENT))
    if not isinstance(outer, dict) or set(outer) != {"payload", "payloadType", "signatures"}:
        raise ValueError("is no DSSE envelope: its fields are not payload, payloadType and signatures")
    rows = outer["signatures"]
    if not isinstance(rows, list) or not all(isinstance(r, dict) and set(r) == {"keyid", "sig"} for r in rows):
        raise ValueError("is no DSSE envelope: a signature is not exactly keyid and sig")
    texts = [outer["payload"], outer["payloadType"], *(value for row in rows for value in row.values())]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("is no DSSE envelope: a field is no string")
    payload = base64.b64decode(outer["payload"], validate=True)
    statement = strict_json.parse(payload)
    if not isinstance(statement, dict):
        raise ValueError("holds a payload that is no JSON object")
    return Envelope(
        payload_type=outer["payloadType"],
        payload=payload,
        statement=statement,
        signatures=tuple((row["keyid"], base64.b64decode(row["sig"], validate=True)) for row in rows),
    )


def _export(path: Path) -> LedgerExport:
    lines = list(strict_json.read_lines(path, _LINES))
    opening = lines.pop(0) if lines and lines[0].get("kind") == "LEDGER" else {}
    heads = next((i for i, line in enumerate(lines) if line.get("kind") == "HEAD"), len(lines))
    if any(line.get("kind") != "HEAD" for line in lines[heads:]) or any(x.get("kind") == "LEDGER" for x in lines):
        raise ValueError("is no ledger export: its lines are not LEDGER, then entries, then heads")
    site = (opening or (lines[0] if lines else {})).get("site")
    if not isinstance(site, str) or not _NAME.fullmatch(site):
        raise ValueError("is no ledger export: it names no site")
    return LedgerExport(path=path, opening=opening, entries=tuple(lines[:heads]), heads=tuple(lines[heads:]))


def _ledgers(run_dir: Path, given: Sequence[Path], broken: dict[str, str]) -> dict[str, LedgerExport]:
    found: dict[str, LedgerExport] = {}
    for path in given:
        try:
            export = _export(path)
            site = _site_of(export)
            if site in found:
                raise ValueError(f"is the second export given for the site {site}")
            found[site] = export
        except _UNREADABLE as error:
            broken[str(path)] = f"{error!s:.300}"
    for path in sorted((run_dir / "ledgers").glob("*.jsonl")):
        name = f"ledgers/{path.name}"
        if path.name.endswith(".refusals.jsonl"):
            continue
        export = _one(run_dir, name, broken, _export)
        if export is None:
            continue
        site = _site_of(export)
        if path.name != f"{site}.jsonl":
            broken[name] = f"is the ledger of the site {site}"
        elif site not in found:
            found[site] = export
        elif found[site].entries[: len(export.entries)] != export.entries:
            broken[name] = f"contradicts the export that was given for the site {site}"
    return found


def _site_of(export: LedgerExport) -> str:
    return str((export.opening or export.entries[0])["site"])


def _governance(given: str | Path | None) -> str:
    key: object = given
    if given is not None and not signatures.is_key(given):
        path = Path(given)
        try:
            fields = strict_json.parse(strict_json.read_bytes(path, _SMALL))
            key = fields["public_key"]
        except (InvalidValue, OSError, ValueError, LookupError, TypeError):
            key = None
        if not signatures.is_key(key):
            raise InvalidValue("governance", str(given), "64 hex digits of an Ed25519 key, or the file of a public key")
    return str(key or "")


def _rosters(run_dir: Path, given: Sequence[Path], governance: str, broken: dict[str, str]) -> dict[str, Roster]:
    found: dict[str, Roster] = {}
    for path in given:
        try:
            roster = _roster(path, governance)
            found[roster.digest] = roster
        except _UNREADABLE as error:
            broken[str(path)] = f"{error!s:.300}"
    for path in sorted((run_dir / "rosters").glob("*")):
        name = f"rosters/{path.name}"
        roster = _one(run_dir, name, broken, lambda path: _roster(path, governance))
        if roster is None:
            continue
        if path.name not in (f"{roster.file_digest[:16]}.json", f"{roster.digest[:16]}.json"):
            broken[name] = "is named after another digest than its own"
        elif roster.governed or roster.digest not in found:
            found[roster.digest] = roster
    return found


def _roster(path: Path, governance: str) -> Roster:
    data = strict_json.read_bytes(path, _SMALL)
    fields, governed = strict_json.parse(data), False
    if not isinstance(fields, dict) or strict_json.canonical(fields) != data:
        raise ValueError("is no roster in canonical JSON")
    if fields.get("format") == "fedcollm-signed-roster-v1":
        if set(fields) != {"format", "roster", "signature"} or not isinstance(fields["roster"], dict):
            raise ValueError("is no signed roster")
        signature, fields = bytes.fromhex(str(fields["signature"])), fields["roster"]
        if governance:
            governed = signatures.holds(governance, strict_json.canonical(fields), signature, purpose="roster")
    if (
        set(fields) != _ROSTER_FIELDS
        or fields["format"] != "fedcollm-roster-v1"
        or not isinstance(fields["sites"], list)
    ):
        raise ValueError("is no roster")
    server, *sites = [_party(each) for each in (fields["server"], *fields["sites"])]
    if len({p.name for p in (server, *sites)}) <= len(sites) or len({p.public_key for p in (server, *sites)}) <= len(
        sites
    ):
        raise ValueError("gives two parties one name or one key")
    return Roster(
        digest=strict_json.digest(fields),
        file_digest=hashlib.sha256(data).hexdigest(),
        server=server,
        sites={site.name: site for site in sites},
        governed=governed,
    )


def _party(fields: object) -> Party:
    if not isinstance(fields, dict) or set(fields) != {"name", "public_key"}:
        raise ValueError("names a party that is not exactly name and public_key")
    name, key = fields["name"], fields["public_key"]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not signatures.is_key(key):
        raise ValueError("names a party without a sound name or Ed25519 key")
    return Party(name=name, public_key=key)
