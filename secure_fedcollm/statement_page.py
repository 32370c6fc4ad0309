"""``statement.html``: a run's privacy statement for somebody who reads contracts and not code.

The page says what ``statement.json`` says and works out what it means for one person; it loads nothing from anywhere.
Its template holds the style sheet that the auditor's page shares. An epsilon, a delta or a probability is never shown
smaller than it is.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from functools import cache
from importlib import resources
from statistics import NormalDist
from typing import Any, Final, TypeGuard

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import InvalidValue
from secure_fedcollm.report import epsilon as _epsilon_text

__all__ = [
    "Meaning",
    "delta",
    "environment",
    "epsilon",
    "meaning",
    "render_statement",
    "share",
    "stylesheet",
    "visible",
    "words",
]

FALSE_ALARMS: Final = 0.01
_NORMAL = NormalDist()
_GDP_FLOOR: Final = 1e-9
"""Ten times the share of events that a stated mu does not cover (`fedcollm_privacy.accounting.GDP_FLOOR`)."""
# Canonical JSON sorts its keys; people read a pyramid from the top and a method from its setting.
_ORDER: Final = ("top", "middle", "base", "bottom", "setting", "definition", "accounting", "transparency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What (epsilon, delta) leaves to somebody who knows everything but whether one unit was in the data.

    Attributes:
        odds: factor by which any conclusion's odds move at most, delta apart; e^epsilon.
        guess: how often a guess that was right half the time without the release is right with it, at most.
        guess_whole: the same from all that the statement tells: its profile and mu.
        caught: share of units in the data that a test finds that wrongly accuses one in a hundred, at most; from all.
        tier: where Ponomareva et al. 2023 (section 5.2) put such an epsilon.
    """

    odds: float
    guess: float
    guess_whole: float
    caught: float
    tier: str


def meaning(
    epsilon: float, delta: float, *, profile: Mapping[float, float] | None = None, mu: float | None = None
) -> Meaning:
    """Work out the worst case of a guarantee (Kairouz, Oh, Viswanath 2015, theorem 2.1; Dong, Roth, Su 2022).

    Args:
        epsilon: of the claim.
        delta: of the claim.
        profile: further (epsilon: delta) that hold for the same release.
        mu: the release is mu-GDP but for events rarer than one in ten thousand million.

    Raises:
        InvalidValue: a number is none, negative, or a delta above 1.
    """
    points = {epsilon: delta, **(profile or {})}
    for bound, allowance in points.items():
        _validate.at_least(0, epsilon=bound)
        _validate.in_range(0, 1, delta=allowance)
    guesses = [_right_guess(*point) for point in points.items()]
    caught = [_caught(*point) for point in points.items()]
    if mu is not None:
        _validate.at_least(0, gdp_mu=mu)
        guesses.append(min(1.0, _NORMAL.cdf(mu / 2) + _GDP_FLOOR))
        caught.append(min(1.0, _NORMAL.cdf(_NORMAL.inv_cdf(FALSE_ALARMS) + mu) + _GDP_FLOOR))
    return Meaning(
        odds=math.exp(epsilon) if epsilon < 700 else math.inf,
        guess=_right_guess(epsilon, delta),
        guess_whole=min(guesses),
        caught=min(caught),
        tier="tier 1, strong formal protection"
        if epsilon <= 1
        else "tier 2, reasonable protection"
        if epsilon <= 10
        else "tier 3, weak or no formal protection",
    )


def _right_guess(epsilon: float, delta: float) -> float:
    return min(1.0, (1 + delta * math.exp(-epsilon)) / (1 + math.exp(-epsilon)))


def _caught(epsilon: float, delta: float) -> float:
    straight = math.exp(min(epsilon, 700)) * FALSE_ALARMS + delta
    return max(0.0, min(1.0, straight, 1 - math.exp(-epsilon) * (1 - FALSE_ALARMS - delta)))


def render_statement(statement: Mapping[str, Any], *, payload_sha256: str, signers: Sequence[str]) -> str:
    """Lay a privacy statement out as one page.

    Args:
        statement: the statement, or the in-toto statement around it, whose subjects are then listed too.
        payload_sha256: of the signed payload's bytes.
        signers: who signed it, by name or key; may be empty, which the page says.

    Returns:
        HTML. A statement without a private site's numbers gets a page that says NOT PRIVATE before all else.

    Raises:
        InvalidValue: a run calls itself private and a site's epsilon or delta is missing or no such number.
    """
    subjects = statement.get("subject") or []
    predicate = statement.get("predicate", statement)
    if not isinstance(predicate, Mapping):
        raise InvalidValue("predicate", type(predicate).__name__, "an object with the statement's fields")
    sites = predicate.get("sites") or {}
    if not isinstance(sites, Mapping) or not all(isinstance(row, Mapping) for row in sites.values()):
        raise InvalidValue("sites", type(sites).__name__, "an object of objects, one for each site")
    private = predicate.get("private") is True and bool(sites)
    meanings = {site: _meaning_of(site, row) for site, row in sites.items()} if private else {}
    return _template().render(
        s=predicate,
        private=private,
        sites=sites,
        unstated=_names(predicate.get("unstated")),
        meanings=meanings,
        worst=max(sites.items(), key=lambda item: item[1]["epsilon"]) if private else None,
        profile_points=_points(row.get("privacy_profile") for row in sites.values()),
        plans=_common(sites, "plan"),
        subjects=[_subject(item) for item in subjects if isinstance(item, Mapping)],
        payload_sha256=payload_sha256,
        signers=list(signers),
        ordered=_ordered,
        listed=_listed,
    )


def _meaning_of(site: str, row: Mapping[str, Any]) -> Meaning:
    # The claim must be whole; what only refines it is used where it can be, and left out where it is none.
    for key in ("epsilon", "delta"):
        if not _is_number(row.get(key)):
            raise InvalidValue(f"sites.{site}.{key}", row.get(key), "a finite number, because private is true")
    profile: dict[float, float] = {}
    told = row.get("privacy_profile")
    for point, allowance in told.items() if isinstance(told, Mapping) else ():
        if _is_number(allowance) and 0 <= allowance <= 1 and _parses(point) and float(point) >= 0:
            profile[float(point)] = float(allowance)
    mu = row.get("gdp_mu")
    return meaning(row["epsilon"], row["delta"], profile=profile, mu=float(mu) if _is_number(mu) and mu >= 0 else None)


# ---------------------------------------------------------------------------------------------- words


def epsilon(value: object) -> str:
    """Two decimals, rounded up; ``none stated`` where there is no number."""
    return _epsilon_text(float(value)) if _is_number(value) else "none stated"


def delta(value: object) -> str:
    """Two digits, rounded up, as in ``1.1e-5``; ``none stated`` where there is no number."""
    if not _is_number(value):
        return "none stated"
    exact = Decimal(repr(float(value)))
    if not exact:
        return "0"
    up = exact.quantize(Decimal(1).scaleb(exact.adjusted() - 1), rounding=ROUND_CEILING)
    digits = up.scaleb(-up.adjusted()).normalize()
    return f"{up.normalize():f}" if up.adjusted() >= -3 else f"{digits:f}e{up.adjusted()}"


def share(value: float) -> str:
    """A probability in per cent, rounded up to a tenth; ``over 99.9 %`` rather than a round hundred."""
    if value > 0.999:
        return "over 99.9\u202f%"
    return f"{Decimal(repr(100 * value)).quantize(Decimal('0.1'), rounding=ROUND_CEILING)}\u202f%"


def odds(value: float) -> str:
    """A factor, rounded up."""
    if value > 1e6:
        return "more than a million"
    return f"{math.ceil(value):,}".replace(",", "\u202f") if value >= 10 else _epsilon_text(value)


def visible(text: str) -> str:
    """The text with whatever could steer a terminal, turn its direction or hide in it as U+FFFD; line ends stay.

    >>> visible("pass" + chr(0x202E) + "ssap" + chr(27) + "[2J")
    'pass\ufffdssap\ufffd[2J'
    """
    hidden = ("Cc", "Cf", "Cs", "Co", "Cn")
    return "".join("\ufffd" if unicodedata.category(c) in hidden and c not in "\n\t" else c for c in text)


def words(key: object) -> str:
    """A field's name as people write it."""
    return str(key).replace("_", " ")


def environment() -> Environment:
    """What both pages are rendered with: everything is escaped, what is undefined is an error, nothing is invisible."""
    made = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    filters: tuple[Callable[..., Any], ...] = (epsilon, delta, share, odds, words)
    made.filters |= {f.__name__: f for f in filters}
    return made


def stylesheet() -> Markup:
    """The style sheet of this page, for the auditor's."""
    return Markup(_source().partition("<style>")[2].partition("</style>")[0])  # noqa: S704 - our own file


def _source() -> str:
    return resources.files("secure_fedcollm").joinpath("statement.html.j2").read_text(encoding="utf-8")


@cache
def _template() -> Template:
    return environment().from_string(_source())


# ---------------------------------------------------------------------------------------------- tables


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _parses(text: object) -> bool:
    try:
        return math.isfinite(float(str(text)))
    except ValueError:
        return False


def _points(profiles: Iterable[object]) -> list[str]:
    points = {str(point) for profile in profiles if isinstance(profile, Mapping) for point in profile}
    return sorted(points, key=lambda text: float(text) if _parses(text) else math.inf)


def _common(sites: Mapping[str, Mapping[str, Any]], field: str) -> list[tuple[str, list[tuple[str, Any]]]]:
    """For every key below a site's field: its value once where all sites agree (named ""), else by site."""
    tables = {site: row[field] for site, row in sites.items() if isinstance(row.get(field), Mapping)}
    rows: list[tuple[str, list[tuple[str, Any]]]] = []
    for key in dict.fromkeys(key for table in tables.values() for key in table):
        by_site = [(site, table.get(key)) for site, table in tables.items()]
        same = all(value == by_site[0][1] for _, value in by_site)
        rows.append((key, [("", by_site[0][1])] if same else by_site))
    return rows


def _names(value: object) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list | tuple) else []


def _subject(item: Mapping[str, Any]) -> tuple[str, str]:
    digest = item.get("digest")
    return str(item.get("name", "")), str(digest.get("sha256", "")) if isinstance(digest, Mapping) else ""


def _listed(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def _ordered(value: object) -> list[tuple[str, list[Any]]]:
    """Headings with their texts, in the order in which they are read; a bare text or list has no heading."""
    if not isinstance(value, Mapping):
        return [("", _listed(value))] if value else []

    def place(item: tuple[Any, Any]) -> int:
        named = str(item[0]).lower()
        return next((i for i, word in enumerate(_ORDER) if word in named), len(_ORDER))

    return [(words(key), _listed(inner)) for key, inner in sorted(value.items(), key=place)]
