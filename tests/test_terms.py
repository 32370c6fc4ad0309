"""A run's terms: one spelling, nothing unknown in them, and nothing that is a site's own."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import pytest

from fedcollm_privacy.errors import FedCollmError, InvalidValue, ProtocolError
from fedcollm_privacy.identity import SigningKey
from fedcollm_privacy.messages import AdapterSpec, canonical_json
from fedcollm_privacy.roster import Roster
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config
from secure_fedcollm.strict_build import build
from secure_fedcollm.terms import MAX_BYTES, RunTerms, require_offerable, terms_of

ROSTER = Roster(
    federation="notes",
    server=SigningKey.generate("server").public,
    sites=tuple(SigningKey.generate(name).public for name in ("a", "b", "c")),
    valid_until=7_000_000_000,
)
SPEC = AdapterSpec(names=("lora_B",), shapes=((4, 2),), base_model="ab" * 32)


@cache
def terms(*overrides: str) -> RunTerms:
    config = build(Config, compose_config(list(overrides)))
    return terms_of(config, run_id="run", roster=ROSTER, spec=SPEC, append_eos=True)


@pytest.mark.parametrize("overrides", [[], ["privacy=strict"], ["experiment=embedded_non_private"]])
def test_terms_come_back_as_they_were(overrides: list[str]) -> None:
    made = terms(*overrides)
    again = RunTerms.from_bytes(made.to_bytes())
    assert again == made
    assert (again.digest, again.to_bytes()) == (made.digest, made.to_bytes())
    require_offerable(again)


def test_what_is_a_sites_own_is_in_no_terms_and_a_seeded_run_says_so() -> None:
    made = terms("privacy.insecure_test_seed=5", "privacy.ledger_dir=/somewhere")
    assert made.privacy is not None
    assert (made.privacy.insecure_test_seed, made.privacy.ledger_dir) == (None, None)
    assert (made.randomness, terms().randomness) == ("insecure_test_seed", "operating_system")
    for field, value in (("insecure_test_seed", 5), ("ledger_dir", "/somewhere")):
        with pytest.raises(InvalidValue, match=field):
            dataclasses.replace(made, privacy=dataclasses.replace(made.privacy, **{field: value}))


def altered(path: str, value: Any) -> bytes:
    fields = json.loads(terms().to_bytes())
    inner = fields
    *sections, name = path.split(".")
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return canonical_json(fields)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "fedcollm-run-terms-v2"),
        ("run_id", "../run"),
        ("server", ""),
        ("roster_digest", "AB" * 32),
        ("base_model", "ab"),
        ("spec_digest", None),
        ("dimension", 0),
        ("dimension", 1.5),
        ("dtype", "float16"),
        ("seed", -1),
        ("seed", True),
        ("randomness", "dice"),
        ("max_length", 2),
        ("max_length", 2**40),
        ("max_colluding", -1),
        ("append_eos", 1),
        ("code", "import os"),
        ("privacy.epsilon", 0),
        ("privacy.epsilon", "8"),
        ("privacy.epsilon", -1),
        ("privacy.insecure_test_seed", 3),
        ("privacy.noise", "none"),
        ("privacy.more", 1),
        ("federation.rounds", -1),
        ("federation.min_contributors", 2),
        ("adapter.r", 0),
        ("adapter.target_modules", "all"),
        ("adapter.lora_alpha", None),
    ],
)
def test_terms_with_another_field_are_no_terms(path: str, value: Any) -> None:
    with pytest.raises(FedCollmError) as refusal:
        RunTerms.from_bytes(altered(path, value))
    assert isinstance(refusal.value, InvalidValue)
    assert path.rsplit(".", 1)[-1] in str(refusal.value)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 60_000, b'{"a":1,"a":1}'])
def test_other_bytes_are_no_terms(data: bytes) -> None:
    with pytest.raises(FedCollmError):
        RunTerms.from_bytes(data)


def test_one_spelling_only_and_of_bounded_length() -> None:
    sound = terms().to_bytes()
    for data in (b" " + sound, sound.replace(b'"epsilon":8', b'"epsilon":8.0'), json.dumps(json.loads(sound)).encode()):
        with pytest.raises(ProtocolError, match="malformed"):
            RunTerms.from_bytes(data)
    with pytest.raises(ProtocolError, match="long"):
        RunTerms.from_bytes(b" " * (MAX_BYTES + 1))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("federation", "release", "gradient"),
        ("federation", "exchange", "none"),
        ("federation", "rounds", 0),
        ("federation", "rounds", 10**9),
        ("federation", "local_steps", 10**9),
        ("federation", "batch_tokens", 10**12),
        ("adapter", "r", 10**6),
        ("privacy", "expected_batch_size", 10**9),
    ],
)
def test_what_only_one_process_tree_can_do_or_nobody_should_is_not_offered(
    section: str, field: str, value: Any
) -> None:
    made = terms()
    other = dataclasses.replace(made, **{section: dataclasses.replace(getattr(made, section), **{field: value})})
    with pytest.raises(InvalidValue, match=field):
        require_offerable(other)
    with pytest.raises(InvalidValue, match="min_contributors"):
        require_offerable(dataclasses.replace(made, max_colluding=2))
