"""The files of a finished run, read and checked: what is missing is allowed, what is impossible is refused."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcollm_privacy.dsse import Envelope
from fedcollm_privacy.errors import InvalidValue, ProtocolError

__all__ = ["RunFiles", "read"]

# What readers rely on; every key may be missing. {"*": x} is any key, [x] a list, a tuple alternatives.
_NUMBER = (int, float)
_METRIC_VALUES = {"*": _NUMBER}
_MODEL_METRICS = {"before": _METRIC_VALUES, "after": _METRIC_VALUES}
_SUMMARY: Any = {
    "run_id": str, "name": str, "method": str, "private": bool, "deployed": bool, "declared": str, "note": str,
    "aggregation": str,
    "noise": (str, None),
    "rounds": int, "rounds_lost": int,
    "models": {"*": {"name": str, "parameters": int, "adapter_parameters": int, "base_digest": str}},
    "slm": _MODEL_METRICS, "llm": _MODEL_METRICS,
    "sites": {
        "*": {
            "epsilon": (*_NUMBER, None), "delta": (*_NUMBER, None), "unit": (str, None), "steps": (int, None),
            "epsilon_budget": (*_NUMBER, None), "epsilon_cap": (*_NUMBER, None),
            "spent_on_data_set": (*_NUMBER, None), "epsilon_one_update": (*_NUMBER, None),
        }
    },
    "bytes_per_parameter": (*_NUMBER, None), "bytes_up": (int, None), "uploaded_parameters": (int, None),
    "secure_sum": (
        {
            "poly_modulus_degree": int, "coeff_mod_bit_sizes": [int], "value_bits": int, "sites": int,
            "threshold": int, "min_contributors": int, "max_colluding": int,
        },
        None,
    ),
    "claims": [{"claim": str, "holds": bool, "detail": str}],
    "secrets": [
        {
            "site": str, "prompt": str, "secret": str, "repetitions": int, "candidates": int,
            "rank_before": int, "rank_after": int, "exposure_before": _NUMBER, "exposure_after": _NUMBER,
        }
    ],
    "per_site": {"*": _MODEL_METRICS},
    "samples": [{"model": str, "prompt": str, "target": str, "before": (str, None), "after": (str, None)}],
    "seconds": {"*": _NUMBER}, "versions": {"*": str},
}  # fmt: skip
_ROUND: Any = {
    "server_round": int, "attempt": int, "outcome": str, "cohort": [str], "left_out": {"*": str},
    "slm": (_METRIC_VALUES, None), "llm": (_METRIC_VALUES, None), "sites": {"*": (_METRIC_VALUES, None)},
    "epsilon": {"*": (*_NUMBER, None)}, "bytes_up": (int, None), "sum_norm": (*_NUMBER, None),
    "clipped_fraction": (*_NUMBER, None), "seconds": {"*": _NUMBER},
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What a finished run left.

    Attributes:
        summary: ``summary.json``.
        rounds: the lines of ``metrics.jsonl``; none when it is missing.
        statement: what ``statement.json`` says (its predicate; signatures are not checked here), or None.
        envelope: the same with its signatures.
    """

    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    statement: dict[str, Any] | None
    envelope: Envelope | None = None


def read(run_dir: Path) -> RunFiles:
    """Read a run folder.

    Args:
        run_dir: a folder with ``summary.json``; ``metrics.jsonl`` and ``statement.json`` may be missing.

    Raises:
        InvalidValue: a file is missing or no JSON, holds NaN, or has a field of the wrong kind (the text names
            file and field); or a run calls itself private and has a site without an epsilon.
    """
    summary = _parse(_read_text(run_dir / "summary.json"), "summary.json")
    _check(summary, _SUMMARY, "summary.json")
    for site, row in summary.get("sites", {}).items():
        if summary.get("private", False) and row.get("epsilon") is None:
            raise InvalidValue(f"summary.json: sites.{site}.epsilon", None, "a number, because private is true")
    rounds, statement, envelope = [], None, None
    if (run_dir / "metrics.jsonl").exists():
        rounds = _read_rounds(run_dir / "metrics.jsonl")
    if (run_dir / "statement.json").exists():
        try:
            envelope = Envelope.from_bytes((run_dir / "statement.json").read_bytes())
        except (OSError, ProtocolError) as error:
            raise InvalidValue("statement.json", str(error), "a signed statement as the run wrote it") from error
        statement = _parse(envelope.payload.decode(errors="replace"), "statement.json: payload")
        _check(statement, {"predicate": {"not_covered": [str]}}, "statement.json: payload")
        statement = statement.get("predicate")
    return RunFiles(summary=summary, rounds=rounds, statement=statement, envelope=envelope)


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _parse(text: str, field: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(field, str(error), "JSON with finite numbers") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(path.name, str(error), f"a readable UTF-8 file in {path.parent}") from error


def _read_rounds(path: Path) -> list[dict[str, Any]]:
    rounds = []
    # not splitlines: it would also cut at U+2028 and friends, which JSON strings may hold
    for line_number, line in enumerate(_read_text(path).rstrip("\n").split("\n"), start=1):
        field = f"{path.name} line {line_number}"
        rounds.append(_parse(line, field))
        _check(rounds[-1], _ROUND, field)
        if "server_round" not in rounds[-1]:
            raise InvalidValue(f"{field}: server_round", None, "an integer")
    return rounds


def _check(value: Any, shape: Any, field: str) -> None:
    """Refuse a value that is not of the shape; keys that the shape does not name pass unread."""
    alternatives = shape if isinstance(shape, tuple) else (shape,)
    for alternative in alternatives:
        if alternative is None and value is None:
            return
        if isinstance(alternative, dict) and isinstance(value, dict):
            for key, inner in value.items():
                if key in alternative or "*" in alternative:
                    _check(inner, alternative.get(key, alternative.get("*")), f"{field}: {key}")
            return
        if isinstance(alternative, list) and isinstance(value, list):
            for i, inner in enumerate(value):
                _check(inner, alternative[0], f"{field}[{i}]")
            return
        is_type = isinstance(alternative, type) and isinstance(value, alternative)
        # True is an int to Python, and 1e999 is JSON that Python reads as infinity
        if is_type and (alternative is bool or not isinstance(value, bool)) and value not in (math.inf, -math.inf):
            return
    allowed = " or ".join(
        "null" if a is None else a.__name__ if isinstance(a, type) else "object" if isinstance(a, dict) else "list"
        for a in alternatives
    )
    raise InvalidValue(field, value, allowed)
