from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedcollm_privacy.errors import ConfigError
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config, SecureSumConfig
from secure_fedcollm.strict_build import build

CONFIGS = Path(__file__).parents[1] / "configs"
PATHS = ["data.path=notes.jsonl", "model.slm=small", "model.llm=large"]


def leaves(mapping: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in mapping.items():
        found += leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]
    return found


def changed(mapping: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(mapping)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


DEFAULT = compose_config([])


def test_the_default_builds() -> None:
    config = build(Config, DEFAULT)
    assert config.private
    assert config.privacy is not None


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml")))
def test_every_experiment_composes_and_builds(name: str) -> None:
    paths = [] if name.startswith("embedded") else PATHS
    config = build(Config, compose_config([f"experiment={name}", *paths]))
    # The paper's own setting knows no DP.
    assert config.private is not ("non_private" in name or name.startswith("paper_"))


@pytest.mark.parametrize("group", ["data", "method", "privacy", "model"])
def test_every_choice_of_every_group_composes_and_builds(group: str) -> None:
    choices = sorted(p.stem for p in (CONFIGS / group).glob("*.yaml"))
    assert choices
    for choice in choices:
        extra = PATHS[:1] if group == "data" and choice != "embedded" else []
        if choice == "at_sites":  # the records are elsewhere
            extra = ["data.public_path=public.jsonl"]
        if choice == "file":  # private unless told otherwise, and private records are not dealt out
            extra = [*extra, "data.partition=column", "data.site_field=ward"]
        build(Config, compose_config([f"{group}={choice}", *extra]))


@pytest.mark.parametrize("path", leaves(DEFAULT), ids=".".join)
def test_each_missing_field_is_named(path: tuple[str, ...]) -> None:
    broken = copy.deepcopy(DEFAULT)
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(ConfigError, match=path[-1]):
        build(Config, broken)


@pytest.mark.parametrize("path", leaves(DEFAULT), ids=".".join)
def test_each_ill_typed_field_is_named(path: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=path[-1]):
        build(Config, changed(DEFAULT, path, {"not": "this"}))


@given(
    path=st.sampled_from(leaves(DEFAULT)),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_nan_and_infinity_are_refused_everywhere(path: tuple[str, ...], value: float) -> None:
    with pytest.raises(ConfigError, match=path[-1]):
        build(Config, changed(DEFAULT, path, value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("privacy.epsilon", 0.0),
        ("privacy.epsilon", -1.0),
        ("privacy.delta", 1.0),
        ("privacy.delta", 0.0),
        ("privacy.max_grad_norm", 0.0),
        ("privacy.expected_batch_size", 0),
        ("privacy.unit", "hospital"),
        ("privacy.unit", "record"),  # with the three records a unit of the embedded default
        ("federation.min_contributors", 2),
        ("federation.local_steps", 0),
        ("federation.rounds", -1),
        ("federation.learning_rate", -0.1),
        ("secure_sum.value_bits", 32),
        ("secure_sum.clip", -1.0),
        ("secure_sum.max_colluding", -1),
        ("secure_sum.max_colluding", 2),  # with the least contributors of the default, 3
        ("secure_sum.max_mean_norm", 0.0),
        ("federation.round_time_limit_s", 0),
        ("distillation.direction", "sideways"),
        ("distillation.temperature", 0.0),
        ("distillation.kd_weight", -1.0),
        ("adapter.r", 0),
        ("adapter.aggregation", "mean"),
        ("adapter.lora_dropout", 1.0),
        ("model.slm", "only-one"),
        ("data.held_out_fraction", 0.0),
        ("data.max_length", 4),
    ],
)
def test_out_of_range_values_name_field_value_and_what_is_allowed(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        build(Config, changed(DEFAULT, tuple(field.split(".")), value))
    message = str(refusal.value)
    assert field in message or field.split(".")[0] in message
    assert "allowed" in message


def test_private_records_cannot_become_public_by_a_setting() -> None:
    plain = compose_config(["data=file", *PATHS])
    with pytest.raises(ConfigError, match="public_fraction"):
        build(Config, changed(plain, ("data", "public_fraction"), 0.2))


@given(sites=st.integers(3, 200), colluding=st.integers(0, 60))
def test_the_threshold_is_the_least_that_no_two_survivor_sets_can_share(sites: int, colluding: int) -> None:
    chosen = SecureSumConfig(value_bits=13, clip=None, threshold=None, max_colluding=colluding, max_mean_norm=None)
    if 2 * sites <= sites + colluding:
        with pytest.raises(ConfigError, match="cannot be withstood"):
            chosen.threshold_of(sites)
        return
    threshold = chosen.threshold_of(sites)
    # Two sets of t signers out of n share at least 2t - n sites: more than c, so an honest one, who signs one set only.
    assert 2 * threshold - sites > colluding
    assert 2 * (threshold - 1) - sites <= colluding
    for wrong in (threshold - 1, sites + 1):
        with pytest.raises(ConfigError, match=rf"\[{threshold}, {sites}\]"):
            dataclasses.replace(chosen, threshold=wrong).threshold_of(sites)


def test_distributed_noise_counts_on_no_colluder() -> None:
    plain = compose_config(["experiment=embedded_distributed"])
    build(Config, plain)
    with pytest.raises(ConfigError, match="least_honest"):
        build(Config, changed(plain, ("privacy", "least_honest"), 3))


def test_a_typo_gets_the_nearest_field() -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        build(Config, changed({**DEFAULT}, ("privacy", "epsilonn"), 3.0))
    with pytest.raises(ConfigError, match="epsilonn"):
        compose_config(["privacy.epsilonn=3"])


def test_a_data_path_alone_means_a_file_of_ones_own() -> None:
    with pytest.raises(ConfigError, match=r"data\.site_field=<column"):
        build(Config, compose_config(PATHS))
    config = build(Config, compose_config([*PATHS, "data.partition=column", "data.site_field=ward"]))
    assert config.data.task == "text"
    assert config.data.declared == "private"


def test_no_privacy_group_is_an_off_switch() -> None:
    for path in (CONFIGS / "privacy").glob("*.yaml"):
        config = build(Config, compose_config([f"privacy={path.stem}"]))
        assert config.privacy is not None
        assert config.privacy.epsilon <= 10
    assert not any("off" in p.stem or "none" in p.stem for p in (CONFIGS / "privacy").glob("*.yaml"))


def test_yaml_files_hold_plain_data_only() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        assert "_target_" not in path.read_text(), path
        yaml.safe_load(path.read_text())
