"""``site.yaml``: the template reads back, and a slip of the pen names its field."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcollm_privacy.errors import ConfigError, InvalidValue
from secure_fedcollm.site_settings import read_settings, settings_text

TEXT = settings_text(
    site="ward-a", path="/data/notes «1».jsonl", prompt_field="question", unit_field="patient", model="/models/small"
)


def read(folder: Path, text: str, site: str = "ward-a"):  # type: ignore[no-untyped-def]
    path = folder / "site.yaml"
    path.write_text(text)
    return read_settings(path, site)


def test_the_template_reads_back_and_is_careful(tmp_path: Path) -> None:
    settings = read(tmp_path, TEXT)
    assert (settings.site, settings.model, settings.device) == ("ward-a", "/models/small", "cpu")
    assert (settings.approval, settings.insecure_test_seed, settings.data.declared) == ("ask", None, "private")
    config = settings.data.config(64)
    assert (config.path, config.prompt_field, config.target_field, config.unit_field, config.max_length) == (
        "/data/notes «1».jsonl",
        "question",
        "text",
        "patient",
        64,
    )
    assert (config.site_field, config.public_path, config.public_fraction, config.site_names) == (None, None, 0.0, ())
    assert len(TEXT.splitlines()) < 50


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("approval: ask", "approval: yes", "approval"),
        ("approval: ask\n", "", "approval"),
        ("device: cpu", 'device: ""', "device"),
        ("device: cpu", "device: cpu\ndevise: cpu", "devise"),
        ("device: cpu", "device: cpu\ndevice: cuda", "device"),
        ("declared: private", "declared: secret", "data.declared"),
        ("held_out_fraction: 0.1", "held_out_fraction: .nan", "held_out_fraction"),
        ("held_out_fraction: 0.1", "held_out_fraction: 1.5", "held_out_fraction"),
        ("max_records: null", "max_records: 0", "data.max_records"),
        ('path: "/data', 'path: "data', "data.path"),
        ("task: text", "task: embedded", "data.path"),
        ("insecure_test_seed: null", "insecure_test_seed: 4", "insecure_test_seed"),
        ("  split: train", "  split: train\n  site_field: ward", "site_field"),
        ("approval: ask", "approval: ${oc.env:HOME}", "file"),
        ("approval: ask", "approval: [", "file"),
        ("approval: ask", "approval: !!python/object/apply:os.getcwd []", "file"),
    ],
)
def test_a_slip_of_the_pen_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(ConfigError, match=named):
        read(tmp_path, TEXT.replace(old, new))


def test_another_sites_file_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ward-b"):
        read(tmp_path, TEXT, "ward-b")
    with pytest.raises(ConfigError, match="nowhere"):
        read_settings(tmp_path / "nowhere.yaml", "ward-a")
    with pytest.raises(ConfigError, match="file"):
        read(tmp_path, "# " + "x" * 2**19)


@pytest.mark.parametrize("field", ["path", "model"])
def test_the_template_takes_one_line_only(field: str) -> None:
    for text in ("/a\napproval: auto", "/a${oc.env:HOME}"):
        with pytest.raises(ConfigError, match=field):
            settings_text(site="ward-a", **{field: text})
    with pytest.raises(InvalidValue):
        settings_text(site="../a")
