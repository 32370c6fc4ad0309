"""Every file of a run's folder is of a known kind and holds nothing but what that kind holds: no site's update."""

from __future__ import annotations

import hashlib
import math
import re
import sqlite3
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from fedcollm_audits import shapes, strict_json
from fedcollm_audits.evidence import Evidence
from fedcollm_audits.notes import Notes, asked
from fedcollm_audits.verdict import Check
from fedcollm_privacy.errors import InvalidValue

__all__ = ["ALLOWED"]

_NAME: Final = "[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
_TEXT_SIZE: Final = 2**24
_LONGEST_LIST: Final = 64
_LONGEST_CELL: Final = 2**16
# Longer than any digest or signature in hex, shorter than any adapter.
_BLOB: Final = re.compile(rb"[A-Za-z0-9+/_-]{400}")
_TABLES: Final = {
    "rounds.sqlite": {"accepted", "signed", "unmasked"},
    "heads.sqlite": {"heads"},
    "sqlite": {"meta", "entries", "heads", "ran"},
}
_BASE_FILES: Final = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.json", "merges.txt",
)  # fmt: skip
Judge = Callable[[Evidence, Path], Iterator[str]]


def _text(evidence: Evidence, path: Path) -> Iterator[str]:
    data = strict_json.read_bytes(path, _TEXT_SIZE)
    if b"\x00" in data:
        yield "is no text"
    data.decode("utf-8")
    if blob := _BLOB.search(data):
        yield f"holds one word of 400 characters or more at byte {blob.start()}, where data could hide"


def _document(evidence: Evidence, path: Path) -> Iterator[str]:
    yield from _text(evidence, path)
    yield from _long_lists(strict_json.parse(strict_json.read_bytes(path, _TEXT_SIZE)))


def _lines(evidence: Evidence, path: Path) -> Iterator[str]:
    yield from _text(evidence, path)
    for number, line in enumerate(strict_json.read_lines(path, 2**28), start=1):
        for problem in _long_lists(line):
            yield f"line {number} {problem}"


def _long_lists(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _long_lists(inner)
    elif isinstance(value, list):
        numbers = [each for each in value if isinstance(each, int | float)]
        if len(numbers) > _LONGEST_LIST:
            yield f"holds a list of {len(numbers)} numbers"
        for inner in value:
            yield from _long_lists(inner)


def _run_name(evidence: Evidence, path: Path) -> Iterator[str]:
    fields = strict_json.parse(strict_json.read_bytes(path, _TEXT_SIZE))
    if not isinstance(fields, dict) or set(fields) != {"run_id"} or not re.fullmatch(_NAME, str(fields["run_id"])):
        yield "holds more than the run's name"
    elif evidence.run_id and fields["run_id"] != evidence.run_id:
        yield f"names the run {fields['run_id']}, not {evidence.run_id}"


def _transcript(evidence: Evidence, path: Path) -> Iterator[str]:
    for event in evidence.transcript:
        if wrong := shapes.event_problem(event):
            yield f"event {event.get('seq')!r:.20} {wrong}"
    if path.name in evidence.broken:
        yield evidence.broken[path.name]


def _line_problem(line: dict[str, Any]) -> str:
    kind = line.get("kind")
    return (
        shapes.OPENING(line)
        if kind == "LEDGER"
        else shapes.HEAD(line)
        if kind == "HEAD"
        else shapes.entry_problem(line)
    )


def _export(evidence: Evidence, path: Path) -> Iterator[str]:
    for number, line in enumerate(strict_json.read_lines(path, 2**28), start=1):
        if wrong := _line_problem(line):
            yield f"line {number} {wrong}"


def _roster(evidence: Evidence, path: Path) -> Iterator[str]:
    """The reading has compared all fields already."""
    name = path.relative_to(evidence.run_dir).as_posix()
    if name in evidence.broken:
        yield evidence.broken[name]


def _statement(evidence: Evidence, path: Path) -> Iterator[str]:
    if evidence.envelope is None:
        yield evidence.broken.get(path.name, "is no statement")
        return
    yield from _long_lists(evidence.envelope.statement)
    if _BLOB.search(evidence.envelope.payload):
        yield "holds one word of 400 characters or more, where data could hide"


def _policy(evidence: Evidence, path: Path) -> Iterator[str]:
    data = evidence.config.get("data", {})
    if data.get("declared") not in ("synthetic", "public"):
        yield "is a site's policy, which has no place in a run on private data"
    yield from _text(evidence, path)


def _base_model(evidence: Evidence, path: Path) -> Iterator[str]:
    model, data = evidence.config.get("model", {}), evidence.config.get("data", {})
    if model.get("slm") is not None or data.get("declared") == "private":
        yield "is a copy of a base model, which only embedded runs have"
    if path.suffix == ".safetensors":
        for name, _ in _tensors(path, frozenset({"format"})):
            if "lora" in name.lower():
                yield f"holds the adapter tensor {name[:100]}"


def _tensors(path: Path, metadata: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Names and values; ValueError for what is no safetensors file or carries other metadata."""
    try:
        with safe_open(path, framework="numpy") as file:
            for name, value in (file.metadata() or {}).items():
                if name not in metadata or (name != "cohort" and len(value) > 64):
                    raise ValueError(f"has the unknown metadata {name[:64]}")
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"is no safetensors file ({error!s:.100})") from error


def _dimensions(evidence: Evidence) -> dict[str, int]:
    start = next(iter(evidence.events("start")), {})
    found = {}
    for which, spec in start.get("spec", {}).items():
        found[which] = sum(math.prod(shape) for shape in spec["shapes"])
    return found


def _checkpoint(evidence: Evidence, path: Path) -> Iterator[str]:
    sizes, kept = _dimensions(evidence), bool(evidence.events("kept"))
    known = {event.get(which) for event in evidence.transcript for which in ("slm", "llm")}
    for name, tensor in _tensors(path, {"server_round", "spec_digest", "adam_steps"}):
        if tensor.dtype != np.float32 or tensor.ndim != 1:
            yield f"holds {name[:100]} as {tensor.dtype}{list(tensor.shape)}, not as a float32 vector"
        elif name in ("slm", "llm"):
            digest = hashlib.sha256(np.ascontiguousarray(tensor, dtype="<f4").data).hexdigest()
            if sizes and not kept and digest not in known:
                yield f"holds an {name} ({digest[:16]}) that the transcript does not know"
        elif name in ("adam.first", "adam.second"):
            if sizes and tensor.size != sizes.get("shared"):
                yield f"holds {tensor.size} values as {name}"
        elif not (kept and re.fullmatch(rf"alone\.{_NAME}", name)):
            yield f"holds the tensor {name[:100]}, which is none of the server's state"
        elif sizes and tensor.size not in (sizes.get("slm"), sizes.get("llm")):
            yield f"holds {tensor.size} values as {name[:100]}"


def _opened(evidence: Evidence, path: Path) -> Iterator[str]:
    if (evidence.run_dir / "summary.json").exists() or evidence.envelope is not None:
        yield "is an opened sum, which is dropped before a run is over"
    names = {name: tensor.dtype for name, tensor in _tensors(path, frozenset({"cohort"}))}
    if names != {"plan": np.uint8, "total": np.int64}:
        yield f"holds {sorted(names)}, not one opened sum and its plan"


def _adapter(evidence: Evidence, path: Path) -> Iterator[str]:
    start = next(iter(evidence.events("start")), {})
    spec = start.get("spec", {}).get(path.parent.name.removesuffix("_adapter"), {})
    known = {name.replace(".default.weight", ".weight") for name in spec.get("names", [])}
    for name, _ in _tensors(path, frozenset({"format"})):
        if known and name not in known:
            yield f"holds the tensor {name[:100]}, which is none of the adapter's"


def _database(evidence: Evidence, path: Path) -> Iterator[str]:
    allowed = next(tables for ending, tables in _TABLES.items() if path.name.endswith(f".{ending}"))
    if path.is_symlink():
        raise ValueError("is a symbolic link")
    try:
        # Immutable: nothing is written beside the file, and no journal is believed.
        db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            db.execute("PRAGMA trusted_schema = OFF")
            objects = db.execute("SELECT type, name, tbl_name FROM sqlite_master").fetchall()
            for kind, name, table in objects:
                if table not in allowed or kind not in ("table", "index"):
                    yield f"holds the {kind} {name[:64]}"
            if db.execute("PRAGMA freelist_count").fetchone()[0]:
                yield "holds free pages, in which deleted rows can still be read"
            for table in sorted(allowed & {name for kind, name, _ in objects if kind == "table"}):
                for row in db.execute(f"SELECT * FROM {table}"):  # noqa: S608 - a name of the list above
                    cells = [cell for cell in row if not isinstance(cell, int | None)]
                    if not all(isinstance(cell, str) and len(cell) <= _LONGEST_CELL for cell in cells):
                        yield f"holds something else than numbers and short texts in {table}"
                        break
                    if any(_BLOB.search(cell.encode()) for cell in cells):
                        yield f"holds one word of 400 characters or more in {table}, where data could hide"
                        break
        finally:
            db.close()
    except sqlite3.Error as error:
        raise ValueError(f"is no SQLite file ({error!s:.100})") from error


_KINDS: Final[tuple[tuple[str, Judge], ...]] = (
    ("config.yaml|report.html|statement.html|audit.html|(slm|llm)_adapter/README.md", _text),
    ("summary.json|audit.json|(slm|llm)_adapter/adapter_config.json", _document),
    ("run.json", _run_name),
    ("metrics.jsonl", _lines),
    ("checkpoint.safetensors", _checkpoint),
    ("opened.safetensors", _opened),
    ("transcript.jsonl", _transcript),
    ("rosters/[0-9a-f]{16}.json", _roster),
    ("statement.json", _statement),
    ("(slm|llm)_adapter/adapter_model.safetensors", _adapter),
    (f"ledgers/{_NAME}.refusals.jsonl", _lines),
    (f"ledgers/{_NAME}.jsonl", _export),
    (f"ledgers/{_NAME}.sqlite", _database),
    (f"policies/{_NAME}.yaml", _policy),
    (f"base_models/(slm|llm)/({'|'.join(_BASE_FILES)})", _base_model),
)


def _allowed(evidence: Evidence, notes: Notes) -> None:
    count = 0
    for path in sorted(evidence.run_dir.rglob("*")):
        name, mode = path.relative_to(evidence.run_dir).as_posix(), path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        count += 1
        if not stat.S_ISREG(mode):
            notes.problem(f"{name} is a link or no regular file.")
            continue
        judge = next((judge for pattern, judge in _KINDS if re.fullmatch(pattern.replace(".", r"\."), name)), None)
        if judge is None:
            notes.problem(f"{name} is of no kind that a run leaves behind; nothing says what it holds.")
            continue
        try:
            for sentence in judge(evidence, path):
                notes.problem(f"{name} {sentence}.")
        except (InvalidValue, OSError, ValueError, RecursionError) as error:
            notes.problem(f"{name} cannot be read as what it is named ({error!s:.200}).")
    notes.saw(f"{count} files were compared with the kinds that a run leaves behind.", files=count)


ALLOWED = Check(
    name="no-single-update",
    group="artefacts",
    question="The folder holds the files of a run and in them nothing of one site alone.",
    why="Only sums were meant to be seen; one update left in a file would undo what the encryption kept apart.",
    run=asked(_allowed),
)
