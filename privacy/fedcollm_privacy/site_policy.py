"""What a site never exceeds, whatever a server asks: ``site-policy.yaml``, written by the site's administrator.

`policy_file` reads and writes it. A policy is asked twice: `SitePolicy.check_privacy` before a privacy plan is
committed to the ledger, `SitePolicy.check_round` before a round is answered. Whatever it refuses is a `PolicyRefused`
whose ``rule`` is the path of the field that said no, such as ``plans.max_epsilon``. The caps are the ledger's to keep.
"""

from __future__ import annotations

import datetime
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NoReturn

from fedcollm_privacy import _validate
from fedcollm_privacy.contributor import SumPolicy
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import InvalidValue, PolicyRefused
from fedcollm_privacy.identity import PublicIdentity

if TYPE_CHECKING:
    from fedcollm_privacy.adaptive import AdaptivePlan
    from fedcollm_privacy.messages import RoundPlan
    from fedcollm_privacy.plan import DpPlan

__all__ = [
    "EMBEDDED",
    "EXCEPTIONS",
    "DataSetRule",
    "PlanRules",
    "SitePolicy",
    "require_line",
]

EMBEDDED, HUB = "embedded", "hub:"
EXCEPTIONS = ("non_private", "insecure_test_seed")
UNITS, NOISES = ("record", "person"), ("local", "distributed")

_MAX_TEXT, _MAX_DAYS = 4096, 36_500


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSetRule:
    """What may be done with one data set.

    Attributes:
        name: as the ledger knows it; under another name it would have another account.
        location: absolute path of a file or folder, ``hub:<id>``, or ``embedded``.
        unit: what a run must protect, and what the caps count. A run on the other unit is refused: its epsilon is of
            another kind (one record of a protected person costs more than the person's epsilon says).
        caps: what all runs together may spend; one at least, and one for each number of days (a century at most).

    Raises:
        InvalidValue: any of this does not hold.
    """

    name: str
    location: str
    unit: str
    caps: tuple[Cap, ...]

    def __post_init__(self) -> None:
        require_line(name=self.name, location=self.location)
        if unicodedata.normalize("NFC", self.name) != self.name or len(self.name) > 256:
            raise InvalidValue("name", self.name, "at most 256 characters, accented letters as one character (NFC)")
        hub = self.location.startswith(HUB) and self.location != HUB
        if not (hub or self.location == EMBEDDED or Path(self.location).is_absolute()):
            raise InvalidValue("location", self.location, f"a path from the root (/...), {HUB}<id>, or {EMBEDDED}")
        _validate.one_of(UNITS, unit=self.unit)
        for number, cap in enumerate(self.caps):
            if cap.days is not None and cap.days > _MAX_DAYS:
                raise InvalidValue(f"caps[{number}].days", cap.days, f"at most {_MAX_DAYS}, or null: for ever")
        _distinct("caps", (cap.days for cap in self.caps), "at least one cap, and one for each number of days")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRules:
    """What one run may promise.

    Attributes:
        max_epsilon: the largest epsilon of one run.
        max_delta: the largest delta of one run, at most 0.5.
        noise: whose noise may count: ``local``, ``distributed``, or both.

    Raises:
        InvalidValue: any of this does not hold.
    """

    max_epsilon: float
    max_delta: float
    noise: tuple[str, ...]

    def __post_init__(self) -> None:
        _validate.positive(max_epsilon=self.max_epsilon, max_delta=self.max_delta)
        _validate.in_range(0, 0.5, max_delta=self.max_delta)
        _words("noise", self.noise, NOISES)
        _distinct("noise", self.noise, "at least one of local, distributed; each once")


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePolicy:
    """A site's policy; from a file through `policy_file.load_policy`.

    Attributes:
        site: the site's public name.
        valid_until: the last day, UTC.
        servers: whose plans are followed; names and keys are unique.
        base_models: digests of the base models that may be trained.
        data_sets: names and places are unique, and none lies inside another: it would have two accounts.
        plans: what one run may promise.
        opening: what is demanded of every secure sum.
        exceptions: which of `EXCEPTIONS` are allowed.
        digest: SHA-256 of the file's bytes.

    Raises:
        InvalidValue: any of this does not hold.
    """

    site: str
    valid_until: datetime.date
    servers: tuple[PublicIdentity, ...]
    base_models: tuple[str, ...]
    data_sets: tuple[DataSetRule, ...]
    plans: PlanRules
    opening: SumPolicy
    exceptions: tuple[str, ...]
    digest: str

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)
        if type(self.valid_until) is not datetime.date:  # a datetime is one too, and does not compare
            raise InvalidValue("valid_until", self.valid_until, "a day, such as 2027-12-31, without quotes")
        _distinct("servers", (s.name for s in self.servers), "at least one server, each name once")
        _distinct("servers", (s.public_key.hex() for s in self.servers), "each public key once")
        for number, model in enumerate(self.base_models):
            _validate.hex_digest(**{f"base_models[{number}]": model})
        _distinct("base_models", self.base_models, "at least one digest, each once")
        _distinct("data_sets", (rule.name for rule in self.data_sets), "at least one data set, each name once")
        places = [_place(rule.location) for rule in self.data_sets]
        _distinct("data_sets", places, "each location once")
        for place in places:
            for other in places:
                if place != other and PurePath(place).is_relative_to(other):
                    raise InvalidValue("data_sets", f"{place} inside {other}", "places apart: one account for one text")
        _words("exceptions", self.exceptions, EXCEPTIONS)
        if len(set(self.exceptions)) != len(self.exceptions):
            raise InvalidValue("exceptions", self.exceptions, "each once")
        _validate.hex_digest(digest=self.digest)

    def require_valid(self, today: datetime.date) -> None:
        """Return if the policy still holds on ``today``, the date in UTC.

        Raises:
            PolicyRefused: its last day is over, or ``today`` is no plain date.
        """
        if type(today) is not datetime.date or today > self.valid_until:
            _refuse("valid_until", f"today is {today}, the policy held until {self.valid_until}: have it renewed")

    def data_set(self, location: str) -> DataSetRule:
        """The rule of the data set at ``location``; paths are compared with links followed.

        Raises:
            PolicyRefused: none is listed for this place.
        """
        place = _place(location)
        for rule in self.data_sets:
            if _place(rule.location) == place:
                return rule
        listed = ", ".join(rule.location for rule in self.data_sets)
        _refuse("data_sets", f"{place!r:.300} is asked for; listed: {listed}")

    def check_privacy(
        self, plan: DpPlan | AdaptivePlan | None, rule: DataSetRule, base_model: str, today: datetime.date
    ) -> None:
        """Return if a run on this data set may be committed to.

        Args:
            plan: the run's privacy plan; None when it has none. An adaptive plan is judged by what it may reach.
            rule: of the data set, from `data_set`.
            base_model: digest of the model that is trained.
            today: the date in UTC.

        Raises:
            PolicyRefused: any rule says no.
        """
        self.require_valid(today)
        if rule not in self.data_sets:
            _refuse("data_sets", f"{rule.name!r} is not a data set of this policy")
        if base_model not in self.base_models:
            listed = ", ".join(self.base_models)
            _refuse("base_models", f"the base model {base_model!r:.80} is asked for; listed: {listed}")
        if plan is None:
            self._require_exception("non_private", "a run without differential privacy")
            return
        # Here, because the accountant takes seconds to import, and looking at a policy needs none.
        from fedcollm_privacy.adaptive import AdaptivePlan

        self._require_unit(plan.unit, rule)
        if not isinstance(plan, AdaptivePlan):
            if plan.randomness != "operating_system":
                self._require_exception("insecure_test_seed", f"{plan.randomness} as source of the noise")
            self._require_noise(plan.noise)
        if not plan.delta <= self.plans.max_delta:
            _refuse("plans.max_delta", f"a run of delta {plan.delta} is asked for; allowed: {self.plans.max_delta}")
        epsilon = plan.target_epsilon if isinstance(plan, AdaptivePlan) else plan.epsilon(plan.steps)
        if not epsilon <= self.plans.max_epsilon:
            _refuse("plans.max_epsilon", f"a run of epsilon {epsilon} is asked for; allowed: {self.plans.max_epsilon}")

    def check_round(self, plan: RoundPlan, server: PublicIdentity, today: datetime.date, rule: DataSetRule) -> None:
        """Return if a round of this server may be taken part in.

        Args:
            plan: the round's plan; that ``server`` signed it is checked elsewhere.
            server: whose plan it is.
            today: the date in UTC.
            rule: of the data set that is trained on.

        Raises:
            PolicyRefused: any rule says no.
        """
        self.require_valid(today)
        if server not in self.servers:
            known = "; ".join(f"{s.name} with key {s.public_key.hex()}" for s in self.servers)
            asked = f"{server.name} with key {server.public_key.hex()}"
            _refuse("servers", f"the server {asked} asks; listed: {known}")
        for name in ("min_contributors", "max_colluding"):
            asked_for, demanded = getattr(plan, name), getattr(self.opening, name)
            if not asked_for >= demanded:
                _refuse(f"opening.{name}", f"a round with {asked_for} is asked for; allowed: {demanded} or more")
        if plan.dp is None:
            self._require_exception("non_private", "a round without differential privacy")
            return
        self._require_unit(plan.dp.unit, rule)
        self._require_noise(plan.dp.noise)

    def _require_unit(self, unit: str, rule: DataSetRule) -> None:
        if unit != rule.unit:
            number = self.data_sets.index(rule) if rule in self.data_sets else "?"
            _refuse(f"data_sets[{number}].unit", f"protection of each {unit} is asked for; allowed: {rule.unit}")

    def _require_noise(self, noise: str) -> None:
        if noise not in self.plans.noise:
            _refuse("plans.noise", f"{noise} noise is asked for; allowed: {', '.join(self.plans.noise)}")

    def _require_exception(self, word: str, what: str) -> None:
        if word not in self.exceptions:
            listed = ", ".join(self.exceptions) or "none"
            _refuse("exceptions", f"{what} is asked for; it needs the exception {word}, listed: {listed}")


def _refuse(rule: str, reason: str) -> NoReturn:
    raise PolicyRefused(rule, reason)


def _place(location: str) -> str:
    """What two spellings of one location have in common: the real path, or the location itself."""
    if location == EMBEDDED or location.startswith(HUB):
        return location
    try:
        return os.path.realpath(Path(location).expanduser())
    except (ValueError, RuntimeError):  # no such path can be: a NUL in it, or `~` of nobody
        raise PolicyRefused("data_sets", f"{location!r:.300} is no path: give a file, a folder or hub:<id>") from None


def require_line(**fields: object) -> None:
    """Each field is one line that a person sees as it is; nothing in it can end a line or hide.

    Raises:
        InvalidValue: a field is something else.
    """
    for name, value in fields.items():
        text = value if isinstance(value, str) else ""
        if not text or len(text) > _MAX_TEXT or not text.isprintable() or text != text.strip():
            allowed = f"a line of 1-{_MAX_TEXT} visible characters, no space at its ends"
            raise InvalidValue(name, f"{value!r:.80}", allowed)


def _words(field: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    for number, value in enumerate(values):
        _validate.one_of(allowed, **{f"{field}[{number}]": value})


def _distinct(field: str, values: Iterable[object], allowed: str) -> None:
    listed = list(values)
    if not listed or len(set(listed)) != len(listed):
        raise InvalidValue(field, listed[:10], allowed)
