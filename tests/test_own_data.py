"""Each role reads its own text and gets what it has in one process tree: a site its records, the server the public."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fedcollm_privacy.errors import ConfigError, DataError
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config, DataConfig
from secure_fedcollm.data import load, load_public, load_site
from secure_fedcollm.strict_build import build

from .test_run import write_notes


def data_config(*overrides: str) -> DataConfig:
    return build(Config, compose_config(list(overrides))).data


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return write_notes(tmp_path / "notes.jsonl", 3, 40)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    path = tmp_path / "public.jsonl"
    rows = write_notes(path, 1, 30, seed=9).read_text().splitlines()
    path.write_text("".join(json.dumps({"text": json.loads(row)["text"]}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("unit", ["record", "person"])
def test_own_files_give_the_records_that_one_file_with_a_site_column_gives(
    tmp_path: Path, notes: Path, public: Path, unit: Any
) -> None:
    common = ["data.unit_field=person", f"data.public_path={public}", "data.held_out_fraction=0.25"]
    whole = data_config(f"data.path={notes}", "data.partition=column", "data.site_field=site", *common)
    together = load(whole, sites=3, seed=4, unit=unit)
    for site in together.sites:
        own = tmp_path / f"{site.name}.jsonl"
        rows = notes.read_text().splitlines(keepends=True)
        own.write_text("".join(row for row in rows if json.loads(row)["site"] == site.name))
        # Settings of the division play no part, and no column has to name the site.
        alone = dataclasses.replace(whole, path=str(own), site_field="no such column")
        assert load_site(alone, site=site.name, seed=4, unit=unit) == site
        assert load_site(alone, site=site.name, seed=5, unit=unit) != site
    served = load_public(dataclasses.replace(whole, path=None), seed=4, unit=unit)
    assert (served.public_train, served.public_test) == (together.public_train, together.public_test)
    assert (served.append_eos, served.sites, served.secrets) == (together.append_eos, (), ())


def test_the_embedded_text_is_divided_as_in_one_process_tree() -> None:
    config, unit = data_config(), "record"
    together = load(config, sites=4, seed=3, unit=unit)
    assert load_site(config, site="larkhollow", seed=3, unit=unit) == together.sites[1]
    served = load_public(config, seed=3, unit=unit)
    assert (served.public_train, served.public_test) == (together.public_train, together.public_test)
    with pytest.raises(ConfigError, match="st-anselm"):
        load_site(config, site="elsewhere", seed=3, unit=unit)


def test_published_tasks_keep_their_public_rules(tmp_path: Path) -> None:
    rows = [{"focus": f"disease {n}", "question": f"What is {n}?", "answer": f"It is {n}."} for n in range(60)]
    (tmp_path / "medquad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = f"data.path={tmp_path / 'medquad.jsonl'}"
    config = data_config("data=medquad", path, "data.partition=iid", "data.declared=public")
    site = load_site(config, site="a", seed=0, unit="record")
    served = load_public(dataclasses.replace(config, path=None, public_path=config.path), seed=0, unit="record")
    private = {record.prompt for record in (*site.train, *site.held_out)}
    open_to_all = {record.prompt for record in (*served.public_train, *served.public_test)}
    assert private
    assert open_to_all
    assert not private & open_to_all
    assert len(private | open_to_all) == 60

    choices = [
        {"question": {"stem": f"Q{n}?", "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": f"y{n}"}]}}
        | {"answerKey": "B"}
        for n in range(20)
    ]
    for name, part in (("train.jsonl", choices[:12]), ("test.jsonl", choices[12:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "medquad.jsonl").unlink()
    task = data_config("data=openbookqa", f"data.path={tmp_path}")
    published = dataclasses.replace(task, path=None, public_path=str(tmp_path), public_fraction=0.0)
    served = load_public(published, seed=0, unit="record")
    assert len(served.public_train) == 12
    assert [record.prompt for record in served.public_test] == [f"Q{n}?" for n in range(12, 20)]
    assert served.append_eos is False


def test_what_is_missing_or_too_much_is_named(tmp_path: Path, notes: Path, public: Path) -> None:
    config = data_config(f"data.path={notes}", "data.partition=iid", "data.declared=public")
    with pytest.raises(ConfigError, match=r"data\.path"):
        load_public(dataclasses.replace(config, public_path=str(public)), seed=0, unit="record")
    with pytest.raises(ConfigError, match=r"data\.public_path"):
        load_public(dataclasses.replace(config, path=None), seed=0, unit="record")
    with pytest.raises(ConfigError, match=r"data\.path"):
        load_site(dataclasses.replace(config, path=None), site="a", seed=0, unit="record")
    with pytest.raises(ConfigError, match=r"data\.unit_field"):
        load_site(config, site="a", seed=0, unit="person")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(notes.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(DataError, match="site a: 3 units"):
        load_site(dataclasses.replace(config, path=str(few)), site="a", seed=0, unit="record")
