"""``site.yaml``: what a site brings to a run, as its administrator writes it. What it allows stands in its policy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import ConfigError
from secure_fedcollm.config import DataConfig, Task
from secure_fedcollm.federation_file import parse_yaml
from secure_fedcollm.strict_build import build, check

__all__ = ["SiteDataSettings", "SiteSettings", "read_settings", "settings_text"]

Declared = Literal["private", "public", "synthetic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteDataSettings:
    """The site's records; fields as in `DataConfig`, of which a site needs these.

    Attributes:
        max_records: at most so many records are used, whole units, chosen by the run's seed; null uses all.
    """

    declared: Declared
    task: Task
    path: str | None
    split: str
    prompt_field: str | None
    target_field: str | None
    prompt_template: str | None
    unit_field: str | None
    held_out_fraction: float
    max_records: int | None

    def __post_init__(self) -> None:
        self.config(8)
        check(
            (self.task == "embedded") == (self.path is None),
            "data.path",
            self.path,
            "null with data.task=embedded, and else where the records lie",
        )
        check(
            self.path is None or self.path.startswith("hub:") or Path(self.path).is_absolute(),
            "data.path",
            self.path,
            "a path from the root (/...), because a service starts in no folder of its own, or hub:<data set id>",
        )
        check(
            self.max_records is None or self.max_records >= 1,
            "data.max_records",
            self.max_records,
            "null or an integer >= 1",
        )

    def config(self, max_length: int) -> DataConfig:
        """The same for the reader of data, with what does not apply at a site set to nothing."""
        return DataConfig(
            task=self.task,
            declared=self.declared,
            path=self.path,
            policy_dir=None,
            public_path=None,
            public_fraction=0.0,
            split=self.split,
            prompt_field=self.prompt_field,
            target_field=self.target_field,
            prompt_template=self.prompt_template,
            site_field=None,
            unit_field=self.unit_field,
            partition="iid",
            dirichlet_alpha=1.0,
            dirichlet_field=None,
            site_names=(),
            max_records_per_site=self.max_records,
            held_out_fraction=self.held_out_fraction,
            max_length=max_length,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSettings:
    """A site's own side of every run.

    Attributes:
        site: its public name, as in the roster.
        data: its records.
        model: folder or hub id of the model to train; its digest must be the run's and in the policy.
        device: ``cpu``, ``cuda``, ``cuda:1``.
        activation_checkpointing: less memory, a third more time.
        approval: ``ask``: a run waits until the administrator approves it; ``auto``: the policy alone decides.
        insecure_test_seed: null; a number seeds the noise of runs that say so themselves, which protects nobody.
            Refused with private data.
    """

    site: str
    data: SiteDataSettings
    model: str
    device: str
    activation_checkpointing: bool
    approval: Literal["auto", "ask"]
    insecure_test_seed: int | None

    def __post_init__(self) -> None:
        _validate.public_name(site=self.site)
        check(bool(self.model.strip()), "model", self.model, "a folder with the model, or a hub id")
        check(bool(self.device.strip()), "device", self.device, "cpu, cuda, cuda:1, ...")
        check(
            self.insecure_test_seed is None or self.data.declared != "private",
            "insecure_test_seed",
            self.insecure_test_seed,
            "null on data declared private: a seeded run protects nobody",
        )


def read_settings(path: Path, site: str) -> SiteSettings:
    """The settings in a file.

    Args:
        path: of ``site.yaml``.
        site: whose they must be.

    Raises:
        ConfigError: the file cannot be read, is no such YAML, a field is unknown, missing or not allowed, or it is
            another site's.
    """
    fields = parse_yaml(path)
    settings = build(SiteSettings, fields)
    check(settings.site == site, "site", settings.site, f"{site}, whose kit this is")
    return settings


def settings_text(
    *,
    site: str,
    path: str = "/path/to/records.jsonl",
    target_field: str | None = "text",
    prompt_field: str | None = None,
    unit_field: str | None = None,
    model: str = "/path/to/model",
) -> str:
    """The text of a new ``site.yaml``, which explains itself; `read_settings` reads it back.

    Raises:
        InvalidValue: a text that a file cannot hold on one line, or no public name.
    """

    def quoted(value: str | None) -> str:
        return "null" if value is None else json.dumps(value, ensure_ascii=False)

    _validate.public_name(site=site)
    text = f"""\
# What this site brings to a run; what it allows stands in policy.yaml beside it. Restart the site after a change here.
site: {quoted(site)}

data:
  # What the records are: private, public or synthetic. Only if they really are: private is never measured on.
  declared: private
  # text: one column is learnt. chat: {{"messages": [{{"role": ..., "content": ...}}]}}, the last answer is learnt.
  task: text
  # A .jsonl or .csv file, a folder of those, or hub:<data set id>. The whole of it is this site's.
  path: {quoted(path)}
  # The column to learn, and the column that comes before it: a question, a history. Or null.
  target_field: {quoted(target_field)}
  prompt_field: {quoted(prompt_field)}
  # Instead of prompt_field: text with columns in braces, such as "Age {{age}}, {{ward}}: ".
  prompt_template: null
  # The column that says whose record it is. Needed for runs that protect persons.
  unit_field: {quoted(unit_field)}
  # Share of the persons, or records, that is never trained on.
  held_out_fraction: 0.1
  # Use at most so many records; null uses all.
  max_records: null
  # Which part of a hub data set.
  split: train

# The model to train: a folder, or a hub id. `fedcollm policy model NAME` prints the digest that the policy must list.
model: {quoted(model)}
# cpu, cuda, or cuda:1 for the second.
device: cpu
# Less memory, a third more time.
activation_checkpointing: false

# ask: a run waits until you say `fedcollm site approve`. auto: the policy alone decides.
approval: ask

# Only for trials on records that are nobody's: a number makes the noise repeatable, which protects nobody.
insecure_test_seed: null
"""
    for name, value in {"site": site, "path": path, "model": model}.items():
        if not value.isprintable() or "${" in value:
            raise ConfigError(name, f"{value!r:.80}", "one printable line without ${")
    return text
