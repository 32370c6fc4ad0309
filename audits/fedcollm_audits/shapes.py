"""Exactly which fields a ledger line or a transcript event has, each bounded, so that nothing else can hide in one.

A shape answers with what is wrong, in words, or with an empty text. The tables follow ``docs/formats.md``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["EVENTS", "HEAD", "OPENING", "TERMS", "Shape", "entry_problem", "event_problem"]

Shape = Callable[[Any], str]

_NAME: Final = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_TENSOR: Final = re.compile("[A-Za-z0-9_.-]{1,256}")


def _pattern(pattern: str, what: str) -> Shape:
    compiled = re.compile(pattern)
    return lambda value: "" if isinstance(value, str) and compiled.fullmatch(value) else f"is not {what}"


def _number(low: float) -> Shape:
    def problem(value: Any) -> str:
        sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return "" if sound and value >= low else f"is not a number of at least {low:g}"

    return problem


def _integer(low: int) -> Shape:
    # 3.0 and 3 have the same canonical spelling, but a count is parsed as an integer.
    return lambda value: "" if type(value) is int and value >= low else f"is not an integer of at least {low}"


def _word(*allowed: Any) -> Shape:
    def problem(value: Any) -> str:
        known = any(type(value) is type(each) and value == each for each in allowed)
        return "" if known else f"is not {' or '.join(map(repr, allowed))}"

    return problem


def _text(longest: int) -> Shape:
    return lambda value: "" if isinstance(value, str) and len(value) <= longest else f"is not a text of up to {longest}"


def _list(inner: Shape, most: int = 10_000) -> Shape:
    def problem(value: Any) -> str:
        if not isinstance(value, list) or len(value) > most:
            return f"is not a list of up to {most}"
        return next((f"[{i}] {wrong}" for i, each in enumerate(value) if (wrong := inner(each))), "")

    return problem


def _map(key: re.Pattern[str], inner: Shape, most: int = 10_000) -> Shape:
    def problem(value: Any) -> str:
        if not isinstance(value, Mapping) or len(value) > most or not all(key.fullmatch(name) for name in value):
            return "is not an object by name"
        return next((f".{name} {wrong}" for name, each in value.items() if (wrong := inner(each))), "")

    return problem


def _object(fields: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None) -> Shape:
    known = {**fields, **(optional or {})}

    def problem(value: Any) -> str:
        if not isinstance(value, Mapping):
            return "is not an object"
        if missing := sorted(set(fields) - set(value)):
            return f"lacks {', '.join(missing)}"
        if foreign := sorted(set(value) - set(known)):
            return f"has the unknown field {foreign[0][:64]}"
        return next((f".{name} {wrong}" for name, each in value.items() if (wrong := known[name](each))), "")

    return problem


def _nullable(inner: Shape) -> Shape:
    return lambda value: "" if value is None else inner(value)


HEX = _pattern("[0-9a-f]{64}", "64 lower-case hex digits")
SIGNATURE = _pattern("[0-9a-f]{128}", "128 lower-case hex digits")
NAME = _pattern(_NAME.pattern, "a public name")
TIME = _pattern(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "a UTC time like 2026-01-31T12:00:00+00:00")
RATE = _pattern("[1-9][0-9]{0,14}/[1-9][0-9]{0,14}", 'a rate like "p/q"')
CHARGE, COUNT, ROUND = _number(0), _integer(1), _integer(0)
_CODE = _pattern("[A-Za-z0-9][A-Za-z0-9 _.,:;'()-]{0,199}", "a short code")

_DP_PLAN = {
    "unit": _word("record", "person"), "max_records_per_unit": COUNT, "max_grad_norm": CHARGE,
    "noise_multiplier": CHARGE, "sample_rate": RATE, "expected_batch_size": COUNT, "steps_per_round": COUNT,
    "rounds": COUNT, "delta": CHARGE, "clipping": _word("flat", "automatic"), "noise": _word("local", "distributed"),
    "least_honest": COUNT, "release": _word("update", "gradient"),
    "randomness": _word("operating_system", "insecure_test_seed"), "neighboring_relation": _word("add_or_remove_one"),
}  # fmt: skip
_ADAPTIVE_PLAN = {
    "order": _number(1), "target_epsilon": CHARGE, "delta": CHARGE, "unit": _word("record", "person"),
    "neighboring_relation": _word("add_or_remove_one"),
}  # fmt: skip
_RAN = {
    "steps": COUNT, "noise_multiplier": CHARGE, "max_grad_norm": CHARGE, "sample_rate": RATE, "sampling": _text(64),
    "clipping": _text(64), "randomness": _text(64), "code": HEX,
}  # fmt: skip


def _plan(value: Any) -> str:
    adaptive = isinstance(value, Mapping) and "target_epsilon" in value
    return _object(_ADAPTIVE_PLAN if adaptive else _DP_PLAN)(value)


_COMMON = {
    "kind": _text(16), "schema": _word(1, 2), "seq": COUNT, "previous": HEX, "site": NAME, "time": TIME,
    "run_id": NAME, "data_set": HEX, "digest": HEX,
}  # fmt: skip
_CAP = _object({"epsilon": CHARGE, "delta": CHARGE, "days": _nullable(COUNT)})
_CAPS = {"caps": _list(_CAP, 64), "policy": _pattern("([0-9a-f]{64})?", "a digest, or empty")}
_CAPS_1 = {"cap_epsilon": CHARGE, "cap_delta": CHARGE}
_CHECK = _object({"prv": _nullable(CHARGE), "rdp": _nullable(CHARGE)}, {"prv_missing": _text(500)})
_PLANNED = {
    "ledger": HEX,
    "plan": _plan,
    "plan_digest": HEX,
    "epsilon": CHARGE,
    "delta": CHARGE,
    "accountant": _text(200),
}
_RESERVED = {
    "plan_digest": HEX, "server_round": COUNT, "steps": COUNT, "steps_so_far": COUNT,
    "epsilon": CHARGE, "delta": CHARGE,
}  # fmt: skip
_ADAPTED = {"round_plan_digest": HEX, "noise_multiplier": CHARGE, "sample_rate": RATE, "order": _number(1)}
_SETTLED = {"reservation": HEX, "outcome": _word("included", "left_out", "lost", "failed")}
# By kind: fields of every schema, of schema 2 only, of schema 1 only, and those that may be missing.
_ENTRIES: Final[dict[str, tuple[dict[str, Shape], ...]]] = {
    "PLAN": (_PLANNED, _CAPS, _CAPS_1, {"steps": COUNT, "cross_check": _CHECK}),
    "RESERVE": (_RESERVED, {}, {}, _ADAPTED),
    "SETTLE": (_SETTLED, {"ran": _nullable(_object(_RAN))}, {}, {}),
    "ABORT": ({"epsilon": CHARGE, "delta": CHARGE}, {}, {}, {}),
    "STATEMENT": ({"statement": HEX, "epsilon": CHARGE, "delta": CHARGE}, {}, {}, {}),
}


def _entry_shapes() -> dict[tuple[str, int], Shape]:
    found = {}
    for kind, (always, second, first, optional) in _ENTRIES.items():
        found[kind, 1] = _object({**_COMMON, **always, **first}, optional)
        found[kind, 2] = _object({**_COMMON, **always, **second, "signature": SIGNATURE}, optional)
    return found


_ENTRY_SHAPES: Final = _entry_shapes()


def entry_problem(entry: Mapping[str, Any]) -> str:
    """What is wrong with a ledger entry's fields, in words; empty when they are exactly those of its kind."""
    schema = entry.get("schema")
    shape = _ENTRY_SHAPES.get((str(entry.get("kind")), schema if type(schema) is int else 0))
    if shape is None:
        return f"is of an unknown kind or schema ({entry.get('kind')!r:.40}, {schema!r:.40})"
    problem = shape(entry)
    if not problem and entry["kind"] == "RESERVE" and 0 < len(set(entry) & set(_ADAPTED)) < len(_ADAPTED):
        return "has some fields of an adaptive plan's reservation and lacks others"
    if not problem and entry["kind"] == "PLAN" and "target_epsilon" not in entry["plan"] and "steps" not in entry:
        return "" if schema == 1 else "lacks steps"
    return problem


OPENING = _object({"kind": _word("LEDGER"), "format": _word(2), "ledger": HEX, "site": NAME, "public_key": HEX})
_HEAD_BODY = _object(
    {"ledger": HEX, "run_id": NAME, "server_round": ROUND, "site": NAME, "tree_root": HEX, "tree_size": ROUND}
)
_SIGNED = {"head": _HEAD_BODY, "signature": SIGNATURE, "witness": SIGNATURE}
HEAD = _object({"kind": _word("HEAD"), **_SIGNED, "server_key": HEX})

_SPEC = _object(
    {
        "names": _list(_pattern(_TENSOR.pattern, "a tensor's name"), 100_000),
        "shapes": _list(_list(COUNT, 8), 100_000),
        "base_model": HEX,
    }
)
_DP = _object(
    {
        name: _DP_PLAN[name]
        for name in (
            "unit", "max_records_per_unit", "max_grad_norm", "expected_batch_size", "steps_per_round", "clipping",
            "noise",
        )
    }
)  # fmt: skip
_CKKS = _object(
    {
        "poly_modulus_degree": COUNT, "coeff_mod_bit_sizes": _list(COUNT, 8), "lsb_bits": COUNT, "field_bits": COUNT,
        "fields": COUNT,
    }
)  # fmt: skip
TERMS = _object(
    {
        "run_id": NAME, "server_round": COUNT, "attempt": COUNT, "spec_digest": HEX, "adapter_digest": HEX,
        "dimension": COUNT, "clip": CHARGE, "value_bits": COUNT, "min_contributors": COUNT, "max_contributors": COUNT,
        "threshold": COUNT, "max_colluding": ROUND, "roster_digest": HEX, "ckks": _CKKS, "key_digest": HEX,
        "max_mean_norm": CHARGE, "nonce": _pattern("[0-9a-f]{8,128}", "hex digits"), "expires_at": COUNT,
        "dp": _nullable(_DP), "release": _word("update", "gradient"), "noise_multiplier": CHARGE, "least_honest": COUNT,
    },
    optional={"narrow_sites": _list(NAME), "narrow_ranks": _list(COUNT)},
)  # fmt: skip
_SITES = _list(NAME)
_SET = _object(
    {"plan_digest": HEX, "keys_digest": HEX, "sharers": _SITES, "survivors": _SITES, "upload_digests": _list(HEX)}
)
_CONCLUDED = {"server_round": COUNT, "plan": HEX, "cohort": _SITES, "slm": HEX, "llm": HEX}


def _faults(value: Any) -> str:
    return _SITES(value) if isinstance(value, list) else _map(_NAME, _CODE)(value)


EVENTS: Final[Mapping[str, Mapping[str, Shape]]] = {
    "start": {
        "run_id": NAME, "roster": HEX, "slm": HEX, "llm": HEX,
        "spec": _object({"slm": _SPEC, "llm": _SPEC, "shared": _SPEC}),
    },
    "plan": {"server_round": COUNT, "attempt": COUNT, "plan": HEX, "terms": TERMS},
    "signed_plan": {"plan": HEX, "signature": SIGNATURE},
    "enrolled": {"plan": HEX, "keys": HEX, "sites": _SITES},
    "upload": {"server_round": COUNT, "site": NAME, "manifest": HEX},
    "agreed": {"plan": HEX, "survivors": HEX, "set": _SET, "signatures": _map(_NAME, SIGNATURE)},
    "faults": {"plan": HEX, "sites": _faults},
    "summed": {"plan": HEX, "cohort": _SITES, "total": HEX},
    "opened": _CONCLUDED,
    "lost": _CONCLUDED,
    "rolled_back": {"server_round": COUNT, "slm": HEX, "llm": HEX},
    "kept": {"server_round": COUNT},
    "tree_heads": {
        "run_id": NAME, "server_round": ROUND, "heads": _map(_NAME, _object(_SIGNED)), "refused": _map(_NAME, _CODE),
    },
    "statement": {"statement": HEX},
}  # fmt: skip
_EVENT_SHAPES: Final = {
    name: _object({"seq": COUNT, "previous": HEX, "event": _word(name), "digest": HEX, **fields})
    for name, fields in EVENTS.items()
}


def event_problem(event: Mapping[str, Any]) -> str:
    """What is wrong with a transcript event's fields, in words; empty when they are exactly those of its name."""
    shape = _EVENT_SHAPES.get(str(event.get("event")))
    return f"is of the unknown kind {event.get('event')!r:.60}" if shape is None else shape(event)
