"""``site-policy.yaml`` on disk: reading it strictly, and writing a new one that explains itself.

A slip of the pen must refuse and never widen: every field is required, none is guessed, a key stands once, and only
the part of YAML is accepted that every reader understands alike: no tags, anchors or aliases, and numbers in the one
spelling on which YAML 1.1 and 1.2 agree (1.1 reads ``010`` as eight and ``1e-5`` as text).

Whatever is wrong with a file is a `PolicyRefused` whose ``rule`` is the path of the field, or ``file``.
"""

from __future__ import annotations

import datetime
import difflib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fedcollm_privacy.contributor import SumPolicy
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import InvalidValue, PolicyRefused
from fedcollm_privacy.identity import PublicIdentity
from fedcollm_privacy.site_policy import DataSetRule, PlanRules, SitePolicy, require_line

__all__ = ["FORMAT", "MAX_BYTES", "load_policy", "policy_text", "read_policy"]

FORMAT = "fedcollm-site-policy-v1"
MAX_BYTES = 2**20
"""No policy is longer."""

_MAX_DEPTH, _MAX_TEXT = 8, 4096
_NUMBER = "a plain decimal number, such as 8, 8.0 or 1.0e-5 (with the point, and the sign after e)"
# The spellings that YAML 1.1 and 1.2 read alike.
_SPELLINGS = {
    "int": (re.compile(r"-?(0|[1-9][0-9]{0,14})"), _NUMBER),
    "float": (re.compile(r"-?(0|[1-9][0-9]{0,17})\.[0-9]{1,30}(e[-+][0-9]{1,3})?"), _NUMBER),
    "timestamp": (re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}"), "a day, such as 2027-12-31"),
    "null": (re.compile("null"), "a value; where nothing is meant, the word null"),
    "str": (re.compile(".*", re.DOTALL), ""),
}

T = TypeVar("T")


def load_policy(path: Path, site: str) -> SitePolicy:
    """The policy of ``site`` in a file. Whether it has expired is asked by the checks, every time.

    Raises:
        PolicyRefused: as `read_policy`, or it is another site's policy.
    """
    policy = read_policy(path)
    if policy.site != site:
        raise PolicyRefused("site", f"{path} is the policy of {policy.site}; the policy of {site!r:.80} is needed")
    return policy


def read_policy(path: Path) -> SitePolicy:
    """The policy in a file, whosesoever it is.

    Raises:
        PolicyRefused: the file is missing, unreadable, a link, not regular, too long or writable by others; it is not
            YAML of the accepted kind; or a field is unknown, missing, given twice, of a wrong type or out of range.
    """
    try:
        data = _read(path)
        return _policy(_yaml(data), hashlib.sha256(data).hexdigest())
    except InvalidValue as error:
        raise PolicyRefused(error.field, f"{path}: {error}") from error


def policy_text(
    *,
    site: str,
    valid_until: datetime.date,
    servers: tuple[PublicIdentity, ...],
    base_models: tuple[str, ...],
    data_sets: tuple[DataSetRule, ...],
    plans: PlanRules,
    opening: SumPolicy,
    exceptions: tuple[str, ...] = (),
    comment: str | None = None,
) -> str:
    """The text of a policy file with a comment for each field; `load_policy` reads it back.

    Args:
        comment: one line of printable characters, written first.

    Raises:
        InvalidValue: there is no such policy, or the comment is more than a line.
    """
    if comment is not None:
        require_line(comment=comment)
    SitePolicy(
        site=site,
        valid_until=valid_until,
        servers=servers,
        base_models=base_models,
        data_sets=data_sets,
        plans=plans,
        opening=opening,
        exceptions=exceptions,
        digest="0" * 64,
    )
    listed_servers = "".join(
        f"\n  - {{name: {_quoted(s.name)}, public_key: {_quoted(s.public_key.hex())}}}" for s in servers
    )
    listed_sets = "".join(
        f"\n  - name: {_quoted(rule.name)}\n    location: {_quoted(rule.location)}\n    unit: {rule.unit}\n    caps:"
        + "".join(
            f"\n      - {{epsilon: {_spelled(cap.epsilon)}, delta: {_spelled(cap.delta)}, "
            f"days: {'null' if cap.days is None else cap.days}}}"
            for cap in rule.caps
        )
        for rule in data_sets
    )
    return f"""{"" if comment is None else f"# {comment}"}
# What this site never exceeds, whatever a server asks for. Only the site's administrator changes this file.
# Whatever is missing, misspelt or out of date here refuses everything. After every change: fedcollm policy check FILE
# Larger epsilon or delta means less protection; `record` protects less than `person`.
format: {FORMAT}

# The site's public name, as it stands in the signed roster.
site: {_quoted(site)}

# The last day on which this policy allows anything (UTC).
valid_until: {valid_until.isoformat()}

# Whose plans are followed: name and public key of each server, as in its .pub file.
servers:{listed_servers}

# Which base models may be trained: their digests. `fedcollm policy model NAME` prints one.
base_models:{"".join(f"{chr(10)}  - {_quoted(model)}" for model in base_models)}

# The only data that may be used.
#   name      as the ledger knows it; it never leaves the site in clear. NEVER CHANGE IT: under a new name the data set
#             would start with nothing spent.
#   location  path of the file or folder from the root (/...), a hub:<id>, or `embedded` (the built-in synthetic text).
#   unit      what must be protected, and what the caps count: `record` (each text) or `person` (all of a person's).
#   caps      what ALL runs together may spend: in any so many `days`; `days: null` means for ever.
data_sets:{listed_sets}

plans:
  # The most that ONE run may spend.
  max_epsilon: {_spelled(plans.max_epsilon)}
  max_delta: {_spelled(plans.max_delta)}
  # Whose noise may carry the protection: `local` (this site's own, safe against everybody), `distributed` (the sum of
  # several sites' noise, safe only while the other sites add theirs), or both.
  noise: [{", ".join(plans.noise)}]

opening:
  # No sum of fewer sites is opened.
  min_contributors: {opening.min_contributors}
  # At least so many other sites may work together with the server and still not see this site's contribution.
  max_colluding: {opening.max_colluding}

# What is allowed although it protects nobody: non_private (runs without any protection), insecure_test_seed (noise that
# can be repeated). For real data leave this empty: []
exceptions: [{", ".join(exceptions)}]
""".lstrip("\n")


def _quoted(text: str) -> str:
    # JSON's strings are YAML's as long as nothing needs \u for a pair of surrogates, and printable text needs none.
    return json.dumps(text, ensure_ascii=False)


def _spelled(number: float) -> str:
    mantissa, _, exponent = repr(float(number)).partition("e")
    pointed = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{pointed}e{int(exponent):+d}" if exponent else pointed


def _read(path: Path) -> bytes:
    try:
        # Not blocking and not through a link; all is asked of the open file, so that nobody can exchange it meanwhile.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK | os.O_NOFOLLOW)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PolicyRefused("file", f"{path} is not a regular file: give the policy itself")
            if status.st_mode & 0o022:
                mode = stat.S_IMODE(status.st_mode)
                reason = (
                    f"{path} can be changed by other users (mode {mode:04o}): read it again, then chmod go-w {path}"
                )
                raise PolicyRefused("file", reason)
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        reason = f"{path} does not exist: correct the path, or make a policy with `fedcollm policy new`"
        raise PolicyRefused("file", reason) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise PolicyRefused("file", f"{path} is a symbolic link: give the file that it points to") from None
        cause = error.strerror if isinstance(error, OSError) else error
        raise PolicyRefused("file", f"{path} cannot be read ({cause}): give a file that you may read") from error
    if len(data) > MAX_BYTES:
        raise PolicyRefused("file", f"{path} is longer than {MAX_BYTES} bytes: a policy is a page of text")
    return data


def _yaml(data: bytes) -> object:
    """The plain values in ``data``; InvalidValue for every YAML that is not plain."""
    try:
        text = data.decode("utf-8")
        depth = 0
        # Before anything is built: a bomb is small as events and huge as a tree.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = _line(event.start_mark)
            if depth > _MAX_DEPTH:
                raise InvalidValue("file", line, f"lists and mappings of at most {_MAX_DEPTH} levels")
            if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
                raise InvalidValue("file", line, "no anchors (&) and aliases (*): write the value out")
            if getattr(event, "tag", None) is not None:
                raise InvalidValue("file", line, "no tags (!): write the plain value")
        return _value(yaml.compose(text, Loader=yaml.SafeLoader), "")
    except UnicodeDecodeError:
        raise InvalidValue("file", "bytes", "text in UTF-8: save it so in the editor") from None
    except yaml.YAMLError as error:
        # Without the lines around it, which the library would quote: the file may be another one, with a secret.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "unreadable characters"
        raise InvalidValue(
            "file", _line(mark), f"YAML ({problem!s:.100}); compare with `fedcollm policy new`"
        ) from None
    except (ValueError, OverflowError) as error:  # an escape that stands for no character
        if isinstance(error, InvalidValue):
            raise
        raise InvalidValue("file", "an escape in quotes", "characters that exist") from None


def _line(mark: Any) -> str:
    return "the file" if mark is None else f"line {mark.line + 1}"


def _value(node: Any, path: str) -> object:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, f"{path}[{number}]") for number, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, object] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
                raise InvalidValue(path or "file", f"the key in {_line(key.start_mark)}", "a field's name")
            field = f"{path}.{key.value}" if path else key.value
            if key.value in mapping:
                allowed = f"one value; it stands again in {_line(key.start_mark)}"
                raise InvalidValue(f"{field:.200}", "twice", allowed)
            mapping[key.value] = _value(value, field)
        return mapping
    return None if node is None else _scalar(node, path)


def _scalar(node: Any, path: str) -> object:
    kind, text = node.tag.rpartition(":")[2], node.value
    spelling, allowed = _SPELLINGS.get(kind, (None, "a number or text; put words such as no, yes and on in quotes"))
    if spelling is None or not spelling.fullmatch(text):
        raise InvalidValue(path or "file", f"{text:.80}", allowed)
    if kind == "timestamp":
        try:
            return datetime.date.fromisoformat(text)
        except ValueError:
            raise InvalidValue(path, text, "a day of the calendar, such as 2027-12-31") from None
    if kind == "null":
        return None
    return {"int": int, "float": float}.get(kind, str)(text)


def _policy(tree: object, digest: str) -> SitePolicy:
    names = ("site", "valid_until", "servers", "base_models", "data_sets", "plans", "opening", "exceptions")
    fields = _fields(tree, "", ("format", *names))
    if fields["format"] != FORMAT:
        raise InvalidValue("format", _shown(fields["format"]), FORMAT)
    plans = _fields(fields["plans"], "plans", ("max_epsilon", "max_delta", "noise"))
    opening = _fields(fields["opening"], "opening", ("min_contributors", "max_colluding"))
    return _built(
        SitePolicy,
        "",
        site=_text(fields["site"], "site"),
        valid_until=_day(fields["valid_until"], "valid_until"),
        servers=_each(fields["servers"], "servers", _server),
        base_models=_each(fields["base_models"], "base_models", _text),
        data_sets=_each(fields["data_sets"], "data_sets", _data_set),
        plans=_built(
            PlanRules,
            "plans",
            max_epsilon=_number(plans["max_epsilon"], "plans.max_epsilon"),
            max_delta=_number(plans["max_delta"], "plans.max_delta"),
            noise=_each(plans["noise"], "plans.noise", _text),
        ),
        opening=_built(SumPolicy, "opening", **{n: _integer(v, f"opening.{n}") for n, v in opening.items()}),
        exceptions=_each(fields["exceptions"], "exceptions", _text),
        digest=digest,
    )


def _server(value: object, path: str) -> PublicIdentity:
    fields = _fields(value, path, ("name", "public_key"))
    texts = {name: _text(text, f"{path}.{name}") for name, text in fields.items()}
    return _named(path, lambda: PublicIdentity.from_fields(texts))


def _data_set(value: object, path: str) -> DataSetRule:
    fields = _fields(value, path, ("name", "location", "unit", "caps"))
    texts = {name: _text(fields[name], f"{path}.{name}") for name in ("name", "location", "unit")}
    return _built(DataSetRule, path, **texts, caps=_each(fields["caps"], f"{path}.caps", _cap))


def _cap(value: object, path: str) -> Cap:
    fields = _fields(value, path, ("epsilon", "delta", "days"))
    return _built(
        Cap,
        path,
        epsilon=_number(fields["epsilon"], f"{path}.epsilon"),
        delta=_number(fields["delta"], f"{path}.delta"),
        days=None if fields["days"] is None else _integer(fields["days"], f"{path}.days"),
    )


def _built(kind: Callable[..., T], path: str, **fields: object) -> T:
    return _named(path, lambda: kind(**fields))


def _named(path: str, make: Callable[[], T]) -> T:
    """What ``make`` makes; its InvalidValue then names the field by its whole path."""
    try:
        return make()
    except InvalidValue as error:
        error.field = f"{path}.{error.field}" if path else error.field
        raise


def _fields(value: object, path: str, names: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(value, dict):
        # Not shown when it is the whole file: that may be another one, with a secret.
        shown = _shown(value) if path else "something else"
        raise InvalidValue(path or "file", shown, f"the fields {', '.join(names)}")
    prefix = f"{path}." if path else ""
    for name in value:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InvalidValue(f"{prefix}{name:.80}", "an unknown field", f"{hint}fields here: {', '.join(names)}")
    for name in names:
        if name not in value:
            raise InvalidValue(f"{prefix}{name}", "nothing", "a value: every field is required")
    return value


def _each(value: object, path: str, read: Callable[[object, str], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise InvalidValue(path, _shown(value), "a list: [..., ...], or lines that begin with -")
    return tuple(read(item, f"{path}[{number}]") for number, item in enumerate(value))


def _text(value: object, path: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise InvalidValue(path, _shown(value), f'text of at most {_MAX_TEXT} characters; put it in quotes: "..."')
    return value


def _number(value: object, path: str) -> float:
    if not isinstance(value, int | float):
        raise InvalidValue(path, _shown(value), _NUMBER)
    return float(value)


def _integer(value: object, path: str) -> int:
    if type(value) is not int:
        raise InvalidValue(path, _shown(value), "a whole number")
    return value


def _day(value: object, path: str) -> datetime.date:
    if type(value) is not datetime.date:
        raise InvalidValue(path, _shown(value), "a day, such as 2027-12-31, without quotes")
    return value


def _shown(value: object) -> str:
    kind = {dict: "several fields", list: "a list", type(None): "nothing"}.get(type(value))
    return kind or f"{value!s:.80}"
