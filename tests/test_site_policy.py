"""A site's policy: a slip in the file refuses, a plan passes exactly when every rule says so, and nothing widens."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import math
import os
import threading
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcollm_privacy.adaptive import AdaptivePlan
from fedcollm_privacy.contributor import SumPolicy
from fedcollm_privacy.entries import Cap
from fedcollm_privacy.errors import InvalidValue, LedgerError, PolicyRefused
from fedcollm_privacy.identity import PublicIdentity, SigningKey
from fedcollm_privacy.messages import RoundPlan, canonical_json
from fedcollm_privacy.plan import DpPlan
from fedcollm_privacy.policy_file import MAX_BYTES, load_policy, policy_text, read_policy
from fedcollm_privacy.refusals import RefusalLog, read_refusals
from fedcollm_privacy.site_policy import EXCEPTIONS, DataSetRule, PlanRules, SitePolicy

from .secure_sums import digest, round_plan

SERVER = SigningKey.generate("server").public
OTHERS = (
    *(SigningKey.generate(name).public for name in ("server", "standby", "stranger")),
    PublicIdentity(name="renamed", public_key=SERVER.public_key),
)
KEY, MODEL = SERVER.public_key.hex(), digest("model")
TODAY, LAST = datetime.date(2027, 6, 1), datetime.date(2027, 12, 31)
TEXT = f"""
format: fedcollm-site-policy-v1
site: st-anna
valid_until: 2027-12-31
servers:
  - {{name: server, public_key: {KEY}}}
base_models: [{MODEL}]
data_sets:
  - name: ward-notes
    location: /data/notes.jsonl
    unit: person
    caps:
      - {{epsilon: 10.0, delta: 1.0e-4, days: null}}
      - {{epsilon: 4.0, delta: 5.0e-5, days: 365}}
plans:
  max_epsilon: 8.0
  max_delta: 1.0e-5
  noise: [local]
opening:
  min_contributors: 3
  max_colluding: 1
exceptions: []
"""
EXPECTED = SitePolicy(
    site="st-anna",
    valid_until=LAST,
    servers=(SERVER,),
    base_models=(MODEL,),
    data_sets=(
        DataSetRule(
            name="ward-notes",
            location="/data/notes.jsonl",
            unit="person",
            caps=(Cap(epsilon=10.0, delta=1e-4), Cap(epsilon=4.0, delta=5e-5, days=365)),
        ),
    ),
    plans=PlanRules(max_epsilon=8.0, max_delta=1e-5, noise=("local",)),
    opening=SumPolicy(min_contributors=3, max_colluding=1),
    exceptions=(),
    digest=hashlib.sha256(TEXT.encode()).hexdigest(),
)
RULE = EXPECTED.data_sets[0]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str | bytes], Path]:
    path = tmp_path / "site-policy.yaml"

    def write(text: str | bytes) -> Path:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)
        return path

    return write


def refused(do: Callable[[], object]) -> PolicyRefused:
    with pytest.raises(PolicyRefused) as caught:
        do()
    return caught.value


def changed(old: str, new: str) -> str:
    found = TEXT.count(old)
    if found != 1:
        raise ValueError(f"{old!r} stands {found} times in the policy")
    return TEXT.replace(old, new)


def test_the_documented_policy_is_read_as_it_stands(file: Any) -> None:
    assert load_policy(file(TEXT), "st-anna") == EXPECTED


BAD_NUMBERS = (
    *(".nan", ".NaN", ".inf", "-.inf", "-1.0", "0", "0.0", "-0.0", "true", "no", "null", "~", "", '"8.0"', "'8.0'"),
    *("8,0", "1e-5", "1e1", "1.0e5", "1_0.0", "0x10", "010", "0o10", "0b1", "1:30", "1:30.5", "+5", "5.", ".5"),
    *("1.0e+999", "9" * 400, "eight", "[8.0]", "{a: 8.0}", "2027-01-01", "8.0 # a\n  max_epsilon: 9.0"),
)
# (what stands in the file, what stands there instead, the rule that must refuse)
MUTATIONS = [
    ("format: fedcollm-site-policy-v1", "format: fedcollm-site-policy-v2", "format"),
    ("format: fedcollm-site-policy-v1", "format: 1", "format"),
    ("format: fedcollm-site-policy-v1\n", "", "format"),
    ("site: st-anna\n", "", "site"),
    ("site: st-anna\n", "site: st-anna\nsite: st-anna\n", "site"),
    ("site: st-anna", "site: 17", "site"),
    ("site: st-anna", "site: no", "site"),
    ("site: st-anna", "site:", "site"),
    ("site: st-anna", "site: ../st-anna", "site"),
    ("site: st-anna", "site: st-änna", "site"),
    ("site: st-anna", "site: st-bertha", "site"),
    ("site: st-anna", "site: [st-anna]", "site"),
    ("site: st-anna", "Site: st-anna", "Site"),
    ("2027-12-31", '"2027-12-31"', "valid_until"),
    ("2027-12-31", "2027-02-30", "valid_until"),
    ("2027-12-31", "2027-12-31T00:00:00", "valid_until"),
    ("2027-12-31", "2027-12-31 00:00:00", "valid_until"),
    ("2027-12-31", "20271231", "valid_until"),
    ("2027-12-31", "31.12.2027", "valid_until"),
    ("2027-12-31", "null", "valid_until"),
    ("2027-12-31", "0000-01-01", "valid_until"),
    (f"servers:\n  - {{name: server, public_key: {KEY}}}", "servers: []", "servers"),
    (f"servers:\n  - {{name: server, public_key: {KEY}}}", "servers: null", "servers"),
    (f"servers:\n  - {{name: server, public_key: {KEY}}}", f"servers: {{server: {KEY}}}", "servers"),
    ("{name: server, ", "{", "servers[0].name"),
    ("name: server", "name: a b", "servers[0].name"),
    ("name: server", "name: 5", "servers[0].name"),
    ("name: server", "port: 5, name: server", "servers[0].port"),
    ("name: server", "name: server, name: server", "servers[0].name"),
    (KEY, KEY[:-2], "servers[0].public_key"),
    (KEY, f"'{KEY.upper()}'" if KEY.upper() != KEY else "A" * 64, "servers[0].public_key"),
    (KEY, "'" + "00" * 32 + "'", "servers[0].public_key"),
    (KEY, "'01" + "00" * 31 + "'", "servers[0].public_key"),
    (f"{KEY}}}", f"{KEY}}}\n  - {{name: server, public_key: {OTHERS[0].public_key.hex()}}}", "servers"),
    (f"{KEY}}}", f"{KEY}}}\n  - {{name: standby, public_key: {KEY}}}", "servers"),
    (f"[{MODEL}]", "[]", "base_models"),
    (f"[{MODEL}]", MODEL, "base_models"),
    (f"[{MODEL}]", f"[{MODEL}, {MODEL}]", "base_models"),
    (f"[{MODEL}]", "[gpt2]", "base_models[0]"),
    (f"[{MODEL}]", f"[{MODEL}, {MODEL[1:]}]", "base_models[1]"),
    (f"[{MODEL}]", f"[{MODEL}, 5]", "base_models[1]"),
    ("name: ward-notes", "name: ''", "data_sets[0].name"),
    ("name: ward-notes", "name: 5", "data_sets[0].name"),
    ("name: ward-notes", 'name: "a\\nb"', "data_sets[0].name"),
    ("name: ward-notes", 'name: "a\\u202eb"', "data_sets[0].name"),
    ("name: ward-notes", 'name: " a"', "data_sets[0].name"),
    ("name: ward-notes", 'name: "Wa\\u0308rter"', "data_sets[0].name"),
    ("name: ward-notes", f"name: {'x' * 257}", "data_sets[0].name"),
    ("    location: /data/notes.jsonl\n", "", "data_sets[0].location"),
    ("/data/notes.jsonl", "data/notes.jsonl", "data_sets[0].location"),
    ("/data/notes.jsonl", "~/notes.jsonl", "data_sets[0].location"),
    ("/data/notes.jsonl", "'hub:'", "data_sets[0].location"),
    ("/data/notes.jsonl", "Embedded", "data_sets[0].location"),
    ("/data/notes.jsonl", "null", "data_sets[0].location"),
    ("unit: person", "unit: patient", "data_sets[0].unit"),
    ("unit: person", "unit: Person", "data_sets[0].unit"),
    ("unit: person", "unit: [person]", "data_sets[0].unit"),
    ("    unit: person\n", "", "data_sets[0].unit"),
    ("unit: person", "units: person", "data_sets[0].units"),
    ("    unit: person\n", "    unit: person\n    unit: record\n", "data_sets[0].unit"),
    ("days: null", "days: 365", "data_sets[0].caps"),
    ("days: 365", "days: null", "data_sets[0].caps"),
    (", days: 365", "", "data_sets[0].caps[1].days"),
    *[
        ("days: 365", f"days: {bad}", "data_sets[0].caps[1].days")
        for bad in ("0", "-1", "1.0", "true", "ever", "36501")
    ],
    *[("epsilon: 10.0", f"epsilon: {bad}", "data_sets[0].caps[0].epsilon") for bad in (".nan", ".inf", "-1.0", "true")],
    *[
        ("delta: 5.0e-5", f"delta: {bad}", "data_sets[0].caps[1].delta")
        for bad in (".nan", "0", "1.5", "5e-5", "'0.1'")
    ],
    *[("max_epsilon: 8.0", f"max_epsilon: {bad}", "plans.max_epsilon") for bad in BAD_NUMBERS],
    *[("max_delta: 1.0e-5", f"max_delta: {bad}", "plans.max_delta") for bad in (".nan", "0.6", "0.0", "1e-5", "true")],
    ("  max_delta: 1.0e-5\n", "", "plans.max_delta"),
    ("max_epsilon", "max_epsilom", "plans.max_epsilom"),
    ("noise: [local]", "noise: []", "plans.noise"),
    ("noise: [local]", "noise: local", "plans.noise"),
    ("noise: [local]", "noise: [local, local]", "plans.noise"),
    ("noise: [local]", "noise: [local, none]", "plans.noise[1]"),
    ("min_contributors: 3", "min_contributors: 2", "opening.min_contributors"),
    ("min_contributors: 3", "min_contributors: 3.0", "opening.min_contributors"),
    ("min_contributors: 3", "min_contributors: true", "opening.min_contributors"),
    ("max_colluding: 1", "max_colluding: -1", "opening.max_colluding"),
    ("max_colluding: 1", "max_colluding: 2", "opening.min_contributors"),
    ("  max_colluding: 1\n", "", "opening.max_colluding"),
    ("exceptions: []", "exceptions: [all]", "exceptions[0]"),
    ("exceptions: []", "exceptions: [non_private, non_private]", "exceptions"),
    ("exceptions: []", "exceptions: null", "exceptions"),
    ("exceptions: []", "exceptions: non_private", "exceptions"),
    ("exceptions: []\n", "", "exceptions"),
    ("exceptions: []", "exceptions: []\nexceptions: [non_private]", "exceptions"),
    ("exceptions: []", "exceptions: []\nextra: 1", "extra"),
    ("exceptions: []", "exceptions: []\n5: 1", "file"),
    ("exceptions: []", "exceptions: []\n? [a]\n: 1", "file"),
    ("exceptions: []", "exceptions: []\n<<: {site: x}", "file"),
    ("noise: [local]", "noise: !!python/name:os.system [local]", "file"),
    ("unit: person", "unit: !!str person", "file"),
    ("unit: person", "unit: ! person", "file"),
    ("unit: person", "unit: &a person", "file"),
    ("exceptions: []", "exceptions: &a [*a]", "file"),
    ("exceptions: []", "exceptions: *a", "file"),
    ("exceptions: []", "exceptions: []\n---\nsite: x", "file"),
    ("exceptions: []", "exceptions: [", "file"),
    ("exceptions: []", "exceptions:\t[]\n\tx: 1", "file"),
    ("exceptions: []", 'exceptions: ["\\UFFFFFFFF"]', "file"),
    ("exceptions: []", 'exceptions: ["\\U00110000"]', "file"),
    ("exceptions: []", "exceptions: [\x00]", "file"),
    ("exceptions: []", f"exceptions: {'[' * 50_000}", "file"),
    ("exceptions: []", f"exceptions: {'{a: ' * 50_000}", "file"),
]


@pytest.mark.parametrize(("old", "new", "rule"), MUTATIONS, ids=range(len(MUTATIONS)))
def test_a_single_wrong_field_is_refused_and_named(old: str, new: str, rule: str, file: Any) -> None:
    path = file(changed(old, new))
    error = refused(lambda: load_policy(path, "st-anna"))
    assert error.rule == rule
    assert str(path) in str(error)
    assert len(str(error)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "\n",
            "# nothing\n",
            "null",
            "5",
            "text",
            "[]",
            "{}",
            "---\n...\n",
            "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n",
        ),
        *("\ufeff\ufeff", b"\xff\xfe", TEXT.encode("utf-16"), TEXT.encode() + b"\xff", "\x00" * 100),
    ],
)
def test_a_file_that_is_no_policy_at_all_is_refused_without_quoting_it(text: str | bytes, file: Any) -> None:
    error = refused(lambda: read_policy(file(text)))
    assert error.rule in ("file", "format")
    assert "c2VjcmV0" not in str(error)


def test_a_yaml_bomb_is_refused_before_it_is_built(file: Any) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 60)]
    assert refused(lambda: read_policy(file("\n".join(lines)))).rule == "file"


def test_places_that_would_give_one_text_two_accounts_are_refused(file: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")

    def second(location: str, name: str = "second") -> str:
        first = str(tmp_path / "data")
        more = (
            f"  - {{name: {name}, location: '{location}', unit: person, caps: [{{epsilon: 1, delta: 0.1, days: 1}}]}}"
        )
        return changed("/data/notes.jsonl", first).replace("plans:\n", f"{more}\nplans:\n")

    for twice in ("data", "link", "data/../data", "data/inside.jsonl", "link/inside.jsonl", ""):
        assert refused(lambda twice=twice: read_policy(file(second(f"{tmp_path}/{twice}")))).rule == "data_sets"  # type: ignore[misc]
    assert refused(lambda: read_policy(file(second("embedded", "ward-notes")))).rule == "data_sets"
    for other in (f"{tmp_path}/data2", "embedded", "hub:squad"):
        assert len(read_policy(file(second(other))).data_sets) == 2


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o777, 0o664])
def test_a_policy_that_others_may_write_is_refused(mode: int, file: Any) -> None:
    path = file(TEXT)
    path.chmod(mode)
    error = refused(lambda: load_policy(path, "st-anna"))
    assert error.rule == "file"
    assert "chmod go-w" in str(error)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o644, 0o444, 0o755])
def test_a_policy_that_others_may_read_is_followed(mode: int, file: Any) -> None:
    path = file(TEXT)
    path.chmod(mode)
    assert load_policy(path, "st-anna") == EXPECTED


def test_only_a_regular_file_is_read(file: Any, tmp_path: Path) -> None:
    path = file(TEXT)
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for other in ("link", "loop", "pipe", "", "absent", "a\x00b", "site-policy.yaml/x"):
        assert refused(lambda other=other: read_policy(tmp_path / other)).rule == "file"  # type: ignore[misc]
    assert refused(lambda: read_policy(Path("/dev/zero"))).rule == "file"


def test_a_file_longer_than_the_limit_is_refused_and_one_at_the_limit_is_read(file: Any) -> None:
    at_limit = TEXT.encode() + b"#" * (MAX_BYTES - len(TEXT.encode()))
    assert read_policy(file(at_limit)).site == "st-anna"
    assert "longer" in str(refused(lambda: read_policy(file(at_limit + b"#"))))


def test_another_sites_policy_is_refused(file: Any) -> None:
    path = file(TEXT)
    assert refused(lambda: load_policy(path, "st-bertha")).rule == "site"
    assert read_policy(path) == EXPECTED


@settings(max_examples=300)
@given(st.data())
def test_a_slip_of_the_pen_is_refused_or_read_as_another_reader_does(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(TEXT)))
    end = min(len(TEXT), start + data.draw(st.integers(0, 3)))
    slip = data.draw(st.text("0189 .-+_:,#'\"[]{}&*!?|>%@`~\n\tnula\\\u00e4\u2028", max_size=3))
    text = TEXT[:start] + slip + TEXT[end:]
    path = tmp_path_factory.getbasetemp() / "slip.yaml"
    path.write_bytes(text.encode())
    path.chmod(0o600)
    try:
        policy = read_policy(path)
    except PolicyRefused:
        return
    assert plain(policy) == yaml.safe_load(text)


@settings(max_examples=200)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_no_bytes_raise_anything_but_a_refusal(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(data)
    path.chmod(0o600)
    refused(lambda: read_policy(path))


def plain(policy: SitePolicy) -> dict[str, Any]:
    """A policy as the plain values that a YAML reader gives for its file."""
    return {
        "format": "fedcollm-site-policy-v1",
        "site": policy.site,
        "valid_until": policy.valid_until,
        "servers": [{"name": s.name, "public_key": s.public_key.hex()} for s in policy.servers],
        "base_models": list(policy.base_models),
        "data_sets": [
            {
                "name": r.name,
                "location": r.location,
                "unit": r.unit,
                "caps": [{"epsilon": c.epsilon, "delta": c.delta, "days": c.days} for c in r.caps],
            }
            for r in policy.data_sets
        ],
        "plans": {
            "max_epsilon": policy.plans.max_epsilon,
            "max_delta": policy.plans.max_delta,
            "noise": list(policy.plans.noise),
        },
        "opening": {
            "min_contributors": policy.opening.min_contributors,
            "max_colluding": policy.opening.max_colluding,
        },
        "exceptions": list(policy.exceptions),
    }


def as_text(policy: SitePolicy, **more: Any) -> str:
    names = ("site", "valid_until", "servers", "base_models", "data_sets", "plans", "opening", "exceptions")
    return policy_text(**{name: getattr(policy, name) for name in names}, **more)


def line(most: int) -> st.SearchStrategy[str]:
    def is_line(text: str) -> bool:
        return bool(text) and text == text.strip() and text.isprintable() and unicodedata.is_normalized("NFC", text)

    return st.one_of(
        st.text(max_size=most).filter(is_line),
        st.sampled_from(
            ["no", "5", "null", "2027-01-01", "a: b", "a # b", "'", '"\\', "- x", "*a", "&a", "!x", "ß\U0001f600"]
        ),
    )


def distinct(values: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, min_size=1, max_size=most, unique=True).map(tuple)


EPSILONS = st.floats(min_value=1e-300, max_value=1e300) | st.integers(1, 100).map(float)
CAPS = st.lists(
    st.builds(
        Cap,
        epsilon=EPSILONS,
        delta=st.floats(min_value=1e-300, max_value=0.99),
        days=st.none() | st.integers(1, 36_500),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda cap: cap.days,
).map(tuple)
PLACES = ("embedded", "hub:a/b:c", "/data/ward.jsonl", "/data/lab notes.csv", "/dätä/x: 'y'")


@st.composite
def policies(draw: st.DrawFn) -> SitePolicy:
    names = draw(distinct(line(12), 3))
    places = draw(st.permutations(PLACES))
    colluding = draw(st.integers(0, 3))
    return SitePolicy(
        site=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)),
        valid_until=draw(st.dates()),
        servers=draw(st.sampled_from([(SERVER,), (SERVER, OTHERS[1]), (OTHERS[0],)])),
        base_models=draw(distinct(st.sampled_from([MODEL, digest("a"), digest("b")]), 3)),
        data_sets=tuple(
            DataSetRule(name=n, location=p, unit=draw(st.sampled_from(["record", "person"])), caps=draw(CAPS))
            for n, p in zip(names, places, strict=False)
        ),
        plans=PlanRules(
            max_epsilon=draw(EPSILONS),
            max_delta=draw(st.floats(min_value=1e-300, max_value=0.5)),
            noise=draw(distinct(st.sampled_from(["local", "distributed"]), 2)),
        ),
        opening=SumPolicy(
            min_contributors=draw(st.integers(max(3, colluding + 2), 50)),
            max_colluding=colluding,
        ),
        exceptions=tuple(draw(st.lists(st.sampled_from(EXCEPTIONS), unique=True))),
        digest="0" * 64,
    )


@settings(max_examples=150)
@given(policies(), st.none() | line(40))
def test_a_written_policy_reads_back_the_same_here_and_in_a_plain_reader(
    tmp_path_factory: pytest.TempPathFactory, policy: SitePolicy, comment: str | None
) -> None:
    text = as_text(policy, comment=comment)
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    assert load_policy(path, policy.site) == replace(policy, digest=hashlib.sha256(text.encode()).hexdigest())
    assert yaml.safe_load(text) == plain(policy)
    if comment is not None:
        assert text.startswith(f"# {comment}\n")


@pytest.mark.parametrize("comment", ["", "a\nexceptions: [non_private]", "a\rb", "a\u2028b", "a\x00"])
def test_a_comment_cannot_become_a_field(comment: str) -> None:
    with pytest.raises(InvalidValue, match="comment"):
        as_text(EXPECTED, comment=comment)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("site", "a\nexceptions: [non_private]"),
        ("exceptions", ("non_private]\nx: [",)),
        ("exceptions", ("non_private", "non_private")),
        ("servers", ()),
        ("data_sets", ()),
        ("base_models", ("x",)),
        ("valid_until", datetime.datetime(2027, 1, 1)),
    ],
)
def test_there_is_no_text_of_a_policy_that_cannot_be(name: str, value: Any) -> None:
    fields = {n: getattr(EXPECTED, n) for n in plain(EXPECTED) if n != "format"} | {name: value}
    with pytest.raises(InvalidValue, match=name):
        policy_text(**fields)


def test_a_data_set_is_found_by_the_real_place_of_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.jsonl").write_text("")
    (tmp_path / "link.jsonl").symlink_to("notes.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    here, hub = (replace(RULE, name=p, location=p) for p in (str(tmp_path / "notes.jsonl"), "hub:a/b"))
    policy = replace(EXPECTED, data_sets=(here, hub))
    for spelling in (here.location, "notes.jsonl", "./x/../notes.jsonl", "link.jsonl", "~/notes.jsonl"):
        assert policy.data_set(spelling) == here
    assert policy.data_set("hub:a/b") == hub
    others = ("embedded", "hub:a/c", "hub:a/b:c", "a/b", str(tmp_path), "", "notes.jsonl/x", "a\x00b", "~nobody-here/x")
    for other in others:
        assert refused(lambda other=other: policy.data_set(other)).rule == "data_sets"  # type: ignore[misc]


BASE_PLAN: dict[str, Any] = {
    "max_grad_norm": 1.0,
    "sample_rate": Fraction(1, 50),
    "expected_batch_size": 8,
    "steps_per_round": 1,
    "rounds": 100,
    "release": "gradient",
}


def dp_plan(**changes: Any) -> DpPlan:
    fields = {"unit": "person", "noise_multiplier": 1.0, "delta": 1e-5, "max_records_per_unit": 1} | changes
    return DpPlan(**(BASE_PLAN | fields))


PLANS = (
    None,
    *(
        dp_plan(unit=unit, noise_multiplier=sigma, delta=delta, noise=noise, randomness=randomness)
        for unit in ("record", "person")
        for sigma, delta in ((1.0, 1e-5), (2.0, 1e-6))
        for noise in ("local", "distributed")
        for randomness in ("operating_system", "insecure_test_seed")
    ),
    *(
        AdaptivePlan(order=12.0, target_epsilon=epsilon, delta=1e-5, unit=unit)  # type: ignore[arg-type]
        for unit in ("record", "person")
        for epsilon in (2.0, 3.0)
    ),
)
LIMITS = st.sampled_from(
    [
        v
        for s, d in ((1.0, 1e-5), (2.0, 1e-6))
        for e in [dp_plan(noise_multiplier=s, delta=d).epsilon(100)]
        for v in (e, math.nextafter(e, 0))
    ]
    + [2.0, 3.0, 8.0]
)


OPENINGS = [SumPolicy(min_contributors=k, max_colluding=c) for k, c in ((3, 0), (3, 1), (5, 1))]


@st.composite
def judging_policies(draw: st.DrawFn) -> SitePolicy:
    """Policies whose limits lie at and around what the plans and rounds here ask for."""

    def some(values: tuple[Any, ...], least: int = 1) -> tuple[Any, ...]:
        first = draw(st.integers(0, len(values) - least))
        return values[first : draw(st.integers(first + least, len(values)))]

    units = {place: draw(st.sampled_from(["record", "person"])) for place in some(PLACES)}

    def usually(often: st.SearchStrategy[Any], seldom: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        # Where most rules say yes, one that says no decides.
        return st.sampled_from([True, True, True, False]).flatmap(lambda yes: often if yes else seldom)

    return SitePolicy(
        site="st-anna",
        valid_until=draw(usually(st.just(LAST), st.sampled_from([TODAY, TODAY - datetime.timedelta(days=1)]))),
        servers=draw(usually(st.just((SERVER, OTHERS[1])), st.just((OTHERS[1],)))),
        base_models=draw(usually(st.just((digest("a"), MODEL)), st.just((digest("a"),)))),
        data_sets=tuple(replace(RULE, name=place, location=place, unit=unit) for place, unit in units.items()),
        plans=PlanRules(
            max_epsilon=draw(usually(st.just(8.0), LIMITS)),
            max_delta=draw(usually(st.just(1e-5), st.sampled_from([1e-7, 1e-6]))),
            noise=some(("local", "distributed")),
        ),
        opening=draw(usually(st.just(OPENINGS[0]), st.sampled_from(OPENINGS))),
        exceptions=some(EXCEPTIONS, 0),
        digest="0" * 64,
    )


def passes(check: Callable[..., None], *arguments: Any) -> bool:
    try:
        check(*arguments)
    except PolicyRefused:
        return False
    return True


def allowed_privacy(values: dict[str, Any], plan: Any, name: str, model: str, today: datetime.date) -> bool:
    """The rules said once more, over the plain values of the file."""
    (rule,) = (r for r in values["data_sets"] if r["name"] == name)
    verdicts = [today <= values["valid_until"], model in values["base_models"]]
    if plan is None:
        return all([*verdicts, "non_private" in values["exceptions"]])
    cost = plan.target_epsilon if isinstance(plan, AdaptivePlan) else plan.epsilon(plan.rounds * plan.steps_per_round)
    verdicts += [
        plan.delta <= values["plans"]["max_delta"],
        cost <= values["plans"]["max_epsilon"],
        rule["unit"] == plan.unit,
    ]
    if isinstance(plan, DpPlan):
        seeded = plan.randomness == "insecure_test_seed"
        verdicts += [plan.noise in values["plans"]["noise"], not seeded or "insecure_test_seed" in values["exceptions"]]
    return all(verdicts)


@settings(max_examples=400)
@given(judging_policies(), st.sampled_from(PLANS), st.data())
def test_a_plan_passes_exactly_when_every_rule_says_so(policy: SitePolicy, plan: Any, data: st.DataObject) -> None:
    rule = data.draw(st.sampled_from(policy.data_sets))
    model = data.draw(st.sampled_from([MODEL, MODEL, MODEL, digest("a"), digest("c"), ""]))
    expected = allowed_privacy(plain(policy), plan, rule.name, model, TODAY)
    assert passes(policy.check_privacy, plan, rule, model, TODAY) == expected


ASKING = st.sampled_from([SERVER, SERVER, SERVER, *OTHERS])
ROUNDS = [
    replace(
        round_plan(max_contributors=9, threshold=6, min_contributors=k, max_colluding=c),
        dp=None if unit is None else dp_plan(unit=unit, noise=noise).terms,
    )
    for k, c in ((3, 0), (3, 1), (4, 2), (5, 1), (6, 0))
    for unit, noise in ((None, ""), ("record", "local"), ("person", "local"), ("person", "distributed"))
]


def allowed_round(values: dict[str, Any], plan: RoundPlan, server: PublicIdentity, unit: str) -> bool:
    asking = {"name": server.name, "public_key": server.public_key.hex()}
    verdicts = [
        values["valid_until"] >= TODAY,
        asking in values["servers"],
        plan.min_contributors >= values["opening"]["min_contributors"],
        plan.max_colluding >= values["opening"]["max_colluding"],
    ]
    if plan.dp is None:
        return all([*verdicts, "non_private" in values["exceptions"]])
    return all([*verdicts, plan.dp.noise in values["plans"]["noise"], plan.dp.unit == unit])


@settings(max_examples=400)
@given(judging_policies(), st.sampled_from(ROUNDS), ASKING, st.data())
def test_a_round_passes_exactly_when_every_rule_says_so(
    policy: SitePolicy, plan: RoundPlan, server: PublicIdentity, data: st.DataObject
) -> None:
    rule = data.draw(st.sampled_from(policy.data_sets))
    expected = allowed_round(plain(policy), plan, server, rule.unit)
    assert passes(policy.check_round, plan, server, TODAY, rule) == expected


def tightenings(policy: SitePolicy) -> list[SitePolicy]:
    """Every policy that differs in one field, which allows less."""
    fewer = [
        replace(policy, **{name: kept[:i] + kept[i + 1 :]})
        for name, least in (("servers", 1), ("base_models", 1), ("exceptions", 0))
        for kept in [getattr(policy, name)]
        for i in range(len(kept))
        if len(kept) > least
    ]
    plans, opening = policy.plans, policy.opening
    rules = [replace(plans, max_epsilon=plans.max_epsilon * factor) for factor in (0.999, 0.1)]
    rules += [replace(plans, max_delta=plans.max_delta * 0.1)]
    rules += [replace(plans, noise=(kind,)) for kind in plans.noise]
    openings = [replace(opening, min_contributors=opening.min_contributors + more) for more in (1, 3)]
    if opening.min_contributors >= opening.max_colluding + 3:
        openings.append(replace(opening, max_colluding=opening.max_colluding + 1))
    sets = [policy.data_sets[:1]]
    return [
        *fewer,
        replace(policy, valid_until=policy.valid_until - datetime.timedelta(days=200)),
        *(replace(policy, plans=changed_plans) for changed_plans in rules),
        *(replace(policy, opening=changed_opening) for changed_opening in openings),
        *(replace(policy, data_sets=changed_sets) for changed_sets in sets),
    ]


@settings(max_examples=150)
@given(judging_policies(), st.sampled_from(PLANS), st.sampled_from(ROUNDS), ASKING)
def test_what_a_tightened_policy_allows_was_allowed_before(
    policy: SitePolicy, plan: Any, asked: RoundPlan, server: PublicIdentity
) -> None:
    for tight in tightenings(policy):
        for rule in tight.data_sets:
            (before,) = (r for r in policy.data_sets if r.name == rule.name)
            if passes(tight.check_privacy, plan, rule, MODEL, TODAY):
                assert passes(policy.check_privacy, plan, before, MODEL, TODAY)
            if passes(tight.check_round, asked, server, TODAY, rule):
                assert passes(policy.check_round, asked, server, TODAY, before)


def with_plans(**changes: Any) -> SitePolicy:
    return replace(EXPECTED, plans=replace(EXPECTED.plans, **changes))


PRIVACY_REFUSALS: list[tuple[SitePolicy, Any, str, datetime.date, str, list[str]]] = [
    (EXPECTED, dp_plan(), MODEL, datetime.date(2028, 1, 1), "valid_until", ["2028-01-01", "2027-12-31"]),
    (EXPECTED, dp_plan(), digest("c"), TODAY, "base_models", [digest("c"), MODEL]),
    (EXPECTED, None, MODEL, TODAY, "exceptions", ["without differential privacy", "non_private"]),
    (EXPECTED, dp_plan(randomness="insecure_test_seed"), MODEL, TODAY, "exceptions", ["insecure_test_seed"]),
    (EXPECTED, dp_plan(unit="record"), MODEL, TODAY, "data_sets[0].unit", ["record", "person"]),
    (EXPECTED, dp_plan(noise="distributed"), MODEL, TODAY, "plans.noise", ["distributed", "local"]),
    (EXPECTED, dp_plan(delta=1.1e-5), MODEL, TODAY, "plans.max_delta", ["1.1e-05", "1e-05"]),
    (with_plans(max_epsilon=0.5), dp_plan(), MODEL, TODAY, "plans.max_epsilon", ["0.5", f"{dp_plan().epsilon(100)}"]),
    (
        EXPECTED,
        AdaptivePlan(order=5.1, target_epsilon=8.5, delta=1e-5, unit="person"),
        MODEL,
        TODAY,
        "plans.max_epsilon",
        ["8.5", "8.0"],
    ),
]


@pytest.mark.parametrize(("policy", "plan", "model", "today", "rule", "words"), PRIVACY_REFUSALS)
def test_a_refused_plan_names_rule_what_was_asked_and_what_is_allowed(
    policy: SitePolicy, plan: Any, model: str, today: datetime.date, rule: str, words: list[str]
) -> None:
    EXPECTED.check_privacy(dp_plan(), RULE, MODEL, TODAY)
    error = refused(lambda: policy.check_privacy(plan, RULE, model, today))
    assert error.rule == rule
    for word in words:
        assert word in str(error)


def test_the_last_day_still_counts_and_a_moment_is_no_day() -> None:
    EXPECTED.require_valid(LAST)
    assert refused(lambda: EXPECTED.require_valid(LAST + datetime.timedelta(days=1))).rule == "valid_until"
    moment = datetime.datetime(2027, 1, 1, tzinfo=datetime.UTC)
    assert refused(lambda: EXPECTED.require_valid(moment)).rule == "valid_until"


def test_a_rule_of_another_policy_is_not_followed() -> None:
    for stranger in (replace(RULE, unit="record"), replace(RULE, name="x"), replace(RULE, caps=RULE.caps[:1])):
        error = refused(lambda stranger=stranger: EXPECTED.check_privacy(dp_plan(), stranger, MODEL, TODAY))  # type: ignore[misc]
        assert error.rule == "data_sets"


def test_a_round_protects_the_unit_of_the_data_set_that_it_trains_on_and_no_other() -> None:
    other = replace(RULE, name="lab", location="embedded", unit="record")
    policy = replace(EXPECTED, data_sets=(other, RULE))
    for unit, fits, fails in (("record", other, RULE), ("person", RULE, other)):
        asked = replace(round_plan(), dp=dp_plan(unit=unit).terms)
        policy.check_round(asked, SERVER, TODAY, fits)
        error = refused(lambda asked=asked, rule=fails: policy.check_round(asked, SERVER, TODAY, rule))  # type: ignore[misc]
        assert error.rule == f"data_sets[{policy.data_sets.index(fails)}].unit"


def test_a_round_refused_for_its_server_shows_both_keys() -> None:
    fine = replace(round_plan(), dp=dp_plan().terms)
    EXPECTED.check_round(fine, SERVER, TODAY, RULE)
    for other in OTHERS:
        error = refused(lambda other=other: EXPECTED.check_round(fine, other, TODAY, RULE))  # type: ignore[misc]
        assert error.rule == "servers"
        assert other.public_key.hex() in str(error)
        assert KEY in str(error)


@pytest.mark.parametrize(
    ("opening", "rule"),
    [((4, 1), "opening.min_contributors"), ((4, 2), "opening.min_contributors"), ((3, 1), None), ((3, 0), None)],
)
def test_a_round_must_offer_what_the_opening_demands(opening: tuple[int, int], rule: str | None) -> None:
    policy = replace(EXPECTED, opening=SumPolicy(min_contributors=opening[0], max_colluding=opening[1]))
    plan = replace(round_plan(), dp=dp_plan().terms)
    if rule is None:
        policy.check_round(plan, SERVER, TODAY, RULE)
    else:
        assert refused(lambda: policy.check_round(plan, SERVER, TODAY, RULE)).rule == rule
    weaker = replace(round_plan(min_contributors=4, max_colluding=0), dp=dp_plan().terms)
    withstanding = replace(EXPECTED, opening=SumPolicy(min_contributors=3, max_colluding=1))
    assert refused(lambda: withstanding.check_round(weaker, SERVER, TODAY, RULE)).rule == "opening.max_colluding"


REFUSAL: dict[str, Any] = {
    "rule": "plans.max_epsilon",
    "reason": "9 asked, 8 allowed",
    "run_id": "r",
    "server_round": 2,
}


def test_a_refusal_is_one_canonical_line_in_a_file_of_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "new" / "st-anna.refusals.jsonl"
    log = RefusalLog(path)
    log.record(**REFUSAL, clock=lambda: 1_769_860_800.9)
    log.record(**(REFUSAL | {"server_round": None}), clock=lambda: 1_769_860_801.0)
    first, second = path.read_bytes().splitlines()
    assert json.loads(first) == REFUSAL | {"time": "2026-01-31T12:00:00+00:00"}
    assert first == canonical_json(json.loads(first))
    assert json.loads(second)["server_round"] is None
    assert path.stat().st_mode & 0o777 == 0o600
    assert RefusalLog(path).entries() == read_refusals(path) == [json.loads(first), json.loads(second)]


@settings(max_examples=60)
@given(st.integers(1, 150), st.booleans())
def test_wherever_a_crash_tears_a_line_the_whole_ones_stay_and_the_log_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int, long: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "torn.jsonl"
    path.unlink(missing_ok=True)
    log = RefusalLog(path)
    for _ in range(40 if long else 2):
        log.record(**(REFUSAL | {"reason": "ä" * (2000 if long else 5)}))
    whole = path.read_bytes()
    size = len(whole.splitlines()[-1])
    torn = whole[: len(whole) - min(cut, size)]
    path.write_bytes(torn)
    before = read_refusals(path)
    assert len(before) == whole.count(b"\n") - 1
    log.record(**REFUSAL)
    assert read_refusals(path)[:-1] == before
    assert path.read_bytes().endswith(b"\n")
    assert path.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "\ud800", "x" * 10_000, "\u2028\x85\r", ""])
def test_whatever_a_server_wrote_a_refusal_is_one_short_line(text: str, tmp_path: Path) -> None:
    log = RefusalLog(tmp_path / "log")
    log.record(rule=text, reason=text, run_id=text, server_round=1)
    log.record(**REFUSAL)
    assert (tmp_path / "log").read_bytes().count(b"\n") == 2
    assert len(log.entries()) == 2
    assert all(len(str(value)) <= 2000 for value in log.entries()[0].values())


def test_the_longest_refusal_fits_into_what_is_read_back_for_a_torn_line(tmp_path: Path) -> None:
    log = RefusalLog(tmp_path / "log")
    for _ in range(3):
        log.record(rule="\x00" * 9000, reason="\x00" * 9000, run_id="\x00" * 9000, server_round=2**53 - 1)
    assert len(log.entries()) == 3
    (tmp_path / "log").write_bytes((tmp_path / "log").read_bytes()[:-1])
    log.record(**REFUSAL)
    assert [entry["run_id"][0] for entry in log.entries()] == ["\x00", "\x00", "r"]


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    log = RefusalLog(tmp_path / "log")
    (tmp_path / "log").unlink()
    (tmp_path / "log").mkdir()
    with pytest.raises(LedgerError, match="nothing is answered"):
        log.record(**REFUSAL)
    with pytest.raises(LedgerError, match="nothing is answered"):
        RefusalLog(tmp_path / "log")
    with pytest.raises(LedgerError, match="cannot be read"):
        read_refusals(tmp_path / "absent")


def test_what_did_not_reach_the_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RefusalLog(tmp_path / "log")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LedgerError, match="No space left"):
        log.record(**REFUSAL)


@pytest.mark.parametrize("bad", [b"{}\n", b"not json\n", b"[]\n", b"\xff\n", b"[" * 100_000 + b"\n"])
def test_an_altered_line_is_an_error_and_not_left_out(bad: bytes, tmp_path: Path) -> None:
    log = RefusalLog(tmp_path / "log")
    log.record(**REFUSAL)
    with (tmp_path / "log").open("ab") as file:
        file.write(bad)
    log.record(**REFUSAL)
    with pytest.raises(LedgerError, match="line 2"):
        log.entries()


def test_two_writers_lose_no_line(tmp_path: Path) -> None:
    logs = [RefusalLog(tmp_path / "log") for _ in range(4)]
    threads = [threading.Thread(target=lambda log=log: [log.record(**REFUSAL) for _ in range(10)]) for log in logs]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_refusals(tmp_path / "log")) == 40
