"""From a plain mapping to a frozen dataclass, or a refusal that names field, value and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fedcollm_privacy.errors import ConfigError

__all__ = ["build", "check"]

T = TypeVar("T")


def check(ok: bool, field: str, value: object, allowed: str) -> None:
    """Refuse a setting.

    Raises:
        ConfigError: ``ok`` is false.
    """
    if not ok:
        raise ConfigError(field, value, allowed)


def build(target: type[T], mapping: Mapping[str, Any], path: str = "") -> T:
    """Turn a plain mapping into a frozen dataclass, or refuse.

    Args:
        target: the dataclass.
        mapping: plain containers, as from ``OmegaConf.to_container(..., resolve=True)``.
        path: prefix of field names in errors.

    Raises:
        ConfigError: unknown or missing field, wrong type, NaN or infinity, value out of range.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(path or "config", mapping, "a mapping")
    hints = get_type_hints(target)
    known = [f.name for f in dataclasses.fields(target)]  # type: ignore[arg-type]
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"{path}{key}",
                mapping[key],
                f"no such field{f'; did you mean {path}{near[0]}?' if near else ''} (fields here: {', '.join(known)})",
            )
    missing = [name for name in known if name not in mapping]
    if missing:
        raise ConfigError(f"{path}{missing[0]}", None, "a value: this field is required and was not given")
    return target(**{name: _convert(hints[name], mapping[name], f"{path}{name}") for name in known})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{path}.")  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = next(a for a in args if a is not type(None))
        return _convert(inner, value, path)
    if origin is Literal:
        if value not in args:
            raise ConfigError(path, value, " | ".join(map(str, args)))
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(path, value, "a list")
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(path, value, "a mapping")
        return {
            _convert(args[0], key, f"{path} (a key)"): _convert(args[1], item, f"{path}.{key}")
            for key, item in value.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(path, value, f"a value of type {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(path, value, "a finite number")
    return value
