"""One audit: every check asked in turn, and what they say together.

An audit never crashes on what it reads and never calls a silence a yes: a check that cannot be carried out has failed,
and a run for which one question stays open is not shown to be sound.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

from fedcollm_audits import (
    check_artefacts,
    check_empirical,
    check_leakage,
    check_ledgers,
    check_plans,
    check_statement,
    check_transcript,
)
from fedcollm_audits.evidence import Evidence
from fedcollm_audits.verdict import Check, Finding, failed
from fedcollm_privacy.errors import FedCollmError, InvalidValue

__all__ = ["CHECKS", "FORMAT", "OUTPUTS", "Answer", "Audit", "Subject", "Verdict", "run_checks", "select"]

FORMAT: Final = "fedcollm-audit-v1"
OUTPUTS: Final = ("audit.json", "audit.html")
PACKAGES: Final = (
    "secure-fedcollm", "cryptography", "dp-accounting", "jcs", "jinja2", "numpy", "opacus", "peft", "pyyaml", "rfc8785",
    "safetensors", "scipy", "torch", "transformers",
)  # fmt: skip
# Whatever a forged file can make a check stumble over.
_STUMBLES = (
    ArithmeticError, AttributeError, FedCollmError, LookupError, OSError, RecursionError, TypeError, ValueError
)  # fmt: skip

CHECKS: Final[tuple[Check, ...]] = (
    *check_ledgers.CHECKS,
    *check_plans.CHECKS,
    *check_transcript.CHECKS,
    *check_artefacts.CHECKS,
    *check_statement.CHECKS,
    *check_empirical.CHECKS,
    *check_leakage.CHECKS,
)

Verdict = Literal["yes", "no", "not shown"]
Progress = Callable[[Check, Finding | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A check and what it found; None where the auditor did not select it."""

    check: Check
    finding: Finding | None

    @property
    def status(self) -> str:
        """``pass``, ``fail``, ``not shown`` or ``not selected``."""
        return "not selected" if self.finding is None else self.finding.status

    @property
    def reason(self) -> str:
        """The first sentence of the evidence."""
        if self.finding is None:
            return "The auditor did not ask this."
        return self.finding.evidence[0] if self.finding.evidence else "No reason was given."


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What the run says of itself; nothing here was checked.

    Attributes:
        private: None where neither statement nor summary says so or not.
        sites: the claimed ``epsilon`` and ``delta`` of each site; None where it claims none.
    """

    run_id: str
    private: bool | None
    claim: str
    unit: str
    server: str
    sites: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was asked, what was found, and with what.

    Attributes:
        subject: what was audited, in its own words.
        finished: UTC.
        command: how to ask the same again.
        versions: of Python and of the packages that the auditor's code uses.
        files: SHA-256 of every file that lay there, by path; or why it has none.
        broken: files that are not what they should be, with the reason.
        answers: every known check, in order.
    """

    subject: Subject
    finished: str
    command: str
    versions: Mapping[str, str]
    files: Mapping[str, str]
    broken: Mapping[str, str]
    answers: tuple[Answer, ...]

    @property
    def totals(self) -> dict[str, int]:
        """How many checks gave each answer."""
        said = [answer.status for answer in self.answers]
        return {status: said.count(status) for status in ("pass", "fail", "not shown", "not selected")}

    @property
    def verdict(self) -> Verdict:
        """``yes`` only where something was asked and everything that was asked passed."""
        asked = [answer.status for answer in self.answers if answer.finding is not None]
        if any(status not in ("pass", "not shown") for status in asked):
            return "no"
        return "yes" if asked and all(status == "pass" for status in asked) else "not shown"

    @property
    def exit_code(self) -> int:
        """0 for yes, 1 for no, 3 for not shown; 2 is for questions that could not be asked."""
        return {"yes": 0, "no": 1, "not shown": 3}[self.verdict]

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        totals, verdict = self.totals, self.verdict
        asked, left_out = len(self.answers) - totals["not selected"], totals["not selected"]
        if verdict == "yes":
            text = f"Yes: {'the only check made' if asked == 1 else f'all {asked} checks made'} passed."
        elif verdict == "no":
            text = f"No: {self._names('fail')} failed, of {_checks(asked)} made. Do not rely on this run's claims."
        else:
            text = f"Not shown: nothing failed, but of {_checks(asked)} made, what lies here does not answer "
            text += f"{self._names('not shown')}."
        if left_out:
            text += (
                f" {_checks(left_out)} {'was' if left_out == 1 else 'were'} not made; the verdict says nothing of them."
            )
        if self.subject.private is False:
            text += " The run itself says that it is NOT PRIVATE."
        elif self.subject.private is None:
            text += " The run says nowhere that it is private."
        return text

    def _names(self, status: str) -> str:
        names = [answer.check.name for answer in self.answers if answer.status == status]
        return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")

    def to_json(self, controls: Sequence[Mapping[str, Any]] = ()) -> str:
        """``audit.json``: sorted keys, checks in order, two spaces, so that two audits can be compared line by line.

        Args:
            controls: the mapping to controls, as `fedcollm_audits.controls.rows` gives it.
        """
        told = {
            "format": FORMAT,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "sentence": self.sentence,
            "totals": self.totals,
            "finished": self.finished,
            "command": self.command,
            "versions": self.versions,
            "files": self.files,
            "broken": self.broken,
            "subject": {
                "run_id": self.subject.run_id,
                "private": self.subject.private,
                "claim": self.subject.claim,
                "unit": self.subject.unit,
                "server": self.subject.server,
                "sites": self.subject.sites,
            },
            "checks": [
                {
                    "name": answer.check.name,
                    "group": answer.check.group,
                    "question": answer.check.question,
                    "why": answer.check.why,
                    "status": answer.status,
                    "evidence": [] if answer.finding is None else answer.finding.evidence,
                    "details": {} if answer.finding is None else answer.finding.details,
                }
                for answer in self.answers
            ],
            "controls": controls,
        }
        return json.dumps(_plain(told), sort_keys=True, indent=2) + "\n"


def select(checks: Sequence[Check], only: Iterable[str], skip: Iterable[str]) -> frozenset[str]:
    """Names of the checks to make.

    Args:
        checks: all that there are.
        only: names or groups; all checks when empty.
        skip: names or groups, taken away from those.

    Raises:
        InvalidValue: a word is neither a check nor a group, or nothing is left to ask.
    """
    only, skip = tuple(only), tuple(skip)
    known = {check.name for check in checks} | {check.group for check in checks}
    for field, words in (("--only", only), ("--skip", skip)):
        for word in words:
            if word not in known:
                groups = " | ".join(dict.fromkeys(check.group for check in checks))
                names = " | ".join(check.name for check in checks)
                raise InvalidValue(field, word, f"a group ({groups}) or a check ({names})")

    def named(check: Check, words: tuple[str, ...]) -> bool:
        return check.name in words or check.group in words

    chosen = frozenset(c.name for c in checks if (not only or named(c, only)) and not named(c, skip))
    if not chosen:
        raise InvalidValue("--only, --skip", (only, skip), "a choice that leaves at least one check to make")
    return chosen


def run_checks(
    evidence: Evidence,
    checks: Sequence[Check],
    on_progress: Progress,
    *,
    selected: Collection[str] | None = None,
    also_read: Sequence[Path] = (),
    command: str = "fedcollm-audit RUN_DIR",
) -> Audit:
    """Ask every selected check.

    Args:
        evidence: what there is.
        checks: all known checks, in the order in which they are told.
        on_progress: called before each selected check with None, and after it with what it found.
        selected: names of the checks to make; all of them by default.
        also_read: files outside the run's folder that were read.
        command: how somebody else asks the same.

    Returns:
        The audit. A check that raised whatever a forged file can provoke has failed, with that as the reason.
    """
    files = _digests(evidence.run_dir, [*also_read, *(export.path for export in evidence.ledgers.values())])
    answers = []
    for check in checks:
        if selected is not None and check.name not in selected:
            answers.append(Answer(check=check, finding=None))
            continue
        on_progress(check, None)
        finding = _ask(check, evidence)
        on_progress(check, finding)
        answers.append(Answer(check=check, finding=finding))
    return Audit(
        subject=_subject(evidence),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions={"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        files=files,
        broken=dict(evidence.broken),
        answers=tuple(answers),
    )


def _ask(check: Check, evidence: Evidence) -> Finding:
    try:
        return check.run(evidence)
    except _STUMBLES as error:
        said = str(error)[:500] or "no text"
        return failed(
            f"The check could not be carried out on what lies here ({type(error).__name__}: {said}).",
            "A check that cannot be carried out counts as failed: look whether a file is missing, cut off or forged.",
        )


def _subject(evidence: Evidence) -> Subject:
    stated = evidence.predicate
    sites, server = stated.get("sites"), stated.get("server")
    return Subject(
        run_id=evidence.run_id or evidence.run_dir.resolve().name,
        private=evidence.private,
        claim=str(stated.get("claim", "")),
        unit=str(stated.get("unit", "")),
        server=str(server.get("name", "")) if isinstance(server, Mapping) else str(server or ""),
        sites={str(site): _claimed(row) for site, row in (sites.items() if isinstance(sites, Mapping) else ())},
    )


def _claimed(row: object) -> dict[str, float | None]:
    return {key: _number(row.get(key)) if isinstance(row, Mapping) else None for key in ("epsilon", "delta")}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def _digests(run_dir: Path, others: Iterable[Path]) -> dict[str, str]:
    """SHA-256 by path, relative to the run's folder where it lies there; an audit's own outputs are left out."""
    found: dict[str, str] = {}
    inside = sorted(Path(folder) / name for folder, _, names in os.walk(run_dir) for name in names)
    for path in [*inside, *others]:
        name = path.relative_to(run_dir).as_posix() if path.is_relative_to(run_dir) else str(path)
        if name not in OUTPUTS and name not in found:
            found[name] = _digest(path)
    return found


def _digest(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a link may lead anywhere, a pipe never ends
            return "not read: no plain file"
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"not read: {error.strerror}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _checks(count: int) -> str:
    return f"{count} check{'s' if count != 1 else ''}"


def _plain(value: Any) -> Any:
    """What JSON can say, whatever a check put into its details."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(str(inner) for inner in value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
