"""Random search: settings drawn from the ranges that were given, the same ones whenever the same words are given.

Every value comes from a hash of the seed, its field and the trial's number. So more trials begin with the same ones,
another field leaves the others' values alone, and a search that was cut goes on with what it would have drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import ConfigError

__all__ = ["Interval", "Options", "draw"]

_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A field whose values are drawn from low <= value < high, as Hydra's ``interval`` has it.

    Attributes:
        field: of the configuration.
        low: the least value; positive where the draw is logarithmic.
        high: the bound above; no value reaches it.
        whole: integers only: a draw is rounded down, so high itself is never drawn either.
        logarithmic: uniform in the logarithm, so that every factor is as likely as any other.
    """

    field: str
    low: float
    high: float
    whole: bool = False
    logarithmic: bool = False

    def __post_init__(self) -> None:
        bounds = f"interval({self.low:g},{self.high:g})"
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(self.field, bounds, "two finite numbers, the smaller one first")
        if self.logarithmic and not self.low > 0:
            raise ConfigError(self.field, f"tag(log, {bounds})", "a lower bound above 0, where logarithms begin")

    def text(self, share: float) -> str:
        """The value below which this share of the draws lies, as written on a command line; six digits at most."""
        if self.logarithmic:
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + share * (self.high - self.low)
        value = min(max(value, self.low), math.nextafter(self.high, self.low))
        if self.whole:
            return str(math.floor(value))
        short = f"{value:.{_DIGITS}g}"
        return short if self.low <= float(short) < self.high else repr(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A field whose values are drawn from a list, each as likely as any other.

    Attributes:
        field: of the configuration.
        values: as written on a command line.
    """

    field: str
    values: tuple[str, ...]

    def text(self, share: float) -> str:
        """The value below which this share of the draws lies."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]


def draw(fields: Sequence[Interval | Options], *, trials: int, seed: int) -> list[dict[str, str]]:
    """Draw settings, field to text; one that comes up again is left out, so that there may be fewer than trials.

    Args:
        fields: at least one, each field once.
        trials: how many draws.
        seed: of all of them.

    Raises:
        InvalidValue: ``trials`` is below 1 or ``seed`` below 0.
        ConfigError: there is nothing to draw.
    """
    _validate.integer_at_least(1, trials=trials)
    _validate.integer_at_least(0, seed=seed)
    if not fields:
        raise ConfigError(
            "--trials", trials, "fields to draw: 'field=interval(0.1,10)', 'field=choice(a,b)' or 'field=range(2,9)'"
        )
    drawn = [{one.field: one.text(_share(seed, one.field, trial)) for one in fields} for trial in range(trials)]
    return list({tuple(setting.items()): setting for setting in drawn}.values())


def _share(seed: int, field: str, trial: int) -> float:
    """A uniform number in [0, 1), a multiple of 2^-53."""
    digest = hashlib.sha256(f"{seed}\n{field}\n{trial}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53
