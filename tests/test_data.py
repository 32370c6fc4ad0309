"""What every division of the data keeps apart, on written files and on the published ones."""

import csv
import dataclasses
import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedcollm_privacy.errors import ConfigError, DataError, InvalidValue
from secure_fedcollm.config import DataConfig
from secure_fedcollm.data import load
from secure_fedcollm.strict_build import build

CONFIGS = Path(__file__).parents[1] / "configs" / "data"


def config_of(name, **changes):
    fields = OmegaConf.load(CONFIGS / f"{name}.yaml")
    for field, value in changes.items():
        fields[field] = str(value) if isinstance(value, Path) else value
    return build(DataConfig, OmegaConf.to_container(fields, resolve=True, throw_on_missing=True), "data.")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def visits(persons=40, notes=3, sites=4):
    return [
        {"text": f"note {n} of {p}", "hospital": f"h{p % sites}", "patient": p, "ward": "AB"[p % 2]}
        for p in range(persons)
        for n in range(notes)
    ]


def parts(data):
    """Every named pile of records."""
    piles = {"public_train": data.public_train, "public_test": data.public_test}
    for site in data.sites:
        piles[f"{site.name} train"], piles[f"{site.name} held out"] = site.train, site.held_out
    return piles


def texts(data):
    return Counter(r.prompt + r.target for pile in parts(data).values() for r in pile)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_names_every_field_and_builds(file):
    fields = OmegaConf.to_container(OmegaConf.load(file))
    assert list(fields) == [field.name for field in dataclasses.fields(DataConfig)]
    where = {"embedded": {}, "at_sites": {"public_path": "elsewhere"}}.get(file.stem, {"path": "somewhere"})
    made = config_of(file.stem, **where)
    assert made.path == where.get("path")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    partition=st.sampled_from(["column", "iid", "dirichlet"]),
    public=st.sampled_from([0.1, 0.3]),
    held=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_no_record_is_lost_and_no_person_is_in_two_places(tmp_path, partition, public, held, seed):
    rows = visits(persons=120)  # so many that no division leaves a site with fewer units than it needs
    config = config_of(
        "file",
        path=write(tmp_path / "a.jsonl", rows),
        declared="public",
        partition=partition,
        site_field="hospital",
        unit_field="patient",
        dirichlet_field="ward",
        dirichlet_alpha=20.0,
        public_fraction=public,
        held_out_fraction=held,
    )
    data = load(config, sites=3, seed=seed, unit="person")
    assert texts(data) == Counter(row["text"] for row in rows)
    homes = [{r.unit for r in pile} for pile in parts(data).values()]
    assert sum(map(len, homes)) == len(set().union(*homes)) == 120
    for site in data.sites:
        assert {r.site for r in (*site.train, *site.held_out)} == {site.name}
        assert site.train
        assert site.held_out
        if partition == "column":
            persons = {row["text"]: row["hospital"] for row in rows}
            assert {persons[r.target] for r in site.train} == {site.name}
    assert {r.site for r in data.public_train} == {None}
    assert data == load(config, sites=3, seed=seed, unit="person")


def test_another_seed_divides_otherwise(tmp_path):
    path = write(tmp_path / "a.jsonl", visits())
    config = config_of("file", path=path, declared="public", public_fraction=0.2)
    one, two = (load(config, sites=3, seed=seed, unit="record") for seed in (0, 1))
    assert one != two
    assert texts(one) == texts(two)


def test_record_units_are_unique_even_where_persons_are_named(tmp_path):
    config = config_of(
        "file",
        path=write(tmp_path / "a.jsonl", visits()),
        declared="public",
        public_fraction=0.2,
        unit_field="patient",
    )
    data = load(config, sites=3, seed=0, unit="record")
    units = [r.unit for pile in parts(data).values() for r in pile]
    assert len(set(units)) == len(units) == 120
    # Still no person on both sides of a division.
    persons = {name: {r.target.split(" of ")[1] for r in pile} for name, pile in parts(data).items()}
    assert sum(map(len, persons.values())) == 40


def test_files_csv_and_jsonl_give_the_same_federation(tmp_path):
    rows = [{"text": f"t{i}", "hospital": f"h{i % 3}"} for i in range(60)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "hospital"])
        writer.writeheader()
        writer.writerows(rows)
    paths = write(tmp_path / "a.jsonl", rows), tmp_path / "a.csv"
    configs = [
        config_of("file", path=p, declared="public", partition="column", site_field="hospital", public_fraction=0.1)
        for p in paths
    ]
    one, two = (load(config, sites=1, seed=5, unit="record") for config in configs)
    assert one == two
    assert [site.name for site in one.sites] == ["h0", "h1", "h2"]


def test_site_names_choose_and_order_and_unknown_ones_are_listed(tmp_path):
    path = write(tmp_path / "a.jsonl", visits())
    fields = {"path": path, "declared": "public", "partition": "column", "site_field": "hospital"}
    fields |= {"public_fraction": 0.2}
    data = load(config_of("file", **fields, site_names=["h2", "h0"]), sites=1, seed=0, unit="record")
    assert [site.name for site in data.sites] == ["h2", "h0"]
    assert sum(texts(data).values()) == 60
    with pytest.raises(ConfigError, match=r"data\.site_names.*h0, h1, h2, h3"):
        load(config_of("file", **fields, site_names=["h9"]), sites=1, seed=0, unit="record")
    with pytest.raises(ConfigError, match=r"data\.site_names"):
        load(config_of("file", **fields | {"partition": "iid"}, site_names=["h0"]), sites=3, seed=0, unit="record")


def test_cap_takes_whole_persons(tmp_path):
    path = write(tmp_path / "a.jsonl", visits(persons=60, notes=3, sites=3))
    config = config_of(
        "file", path=path, unit_field="patient", declared="public", public_fraction=0.1, max_records_per_site=20
    )
    for site in load(config, sites=3, seed=0, unit="person").sites:
        counts = Counter(r.unit for r in (*site.train, *site.held_out))
        assert set(counts.values()) == {3}
        assert len(counts) == 6


def test_person_at_two_sites_is_refused_by_count_not_by_name(tmp_path, caplog):
    rows = [{"text": f"t{i}", "hospital": f"h{i % 2}", "patient": f"NAME{i % 10}"} for i in range(59)]
    rows.append({"text": "t60", "hospital": "h1", "patient": "NAME0"})
    fields = {"path": write(tmp_path / "a.jsonl", rows), "partition": "column", "site_field": "hospital"}
    config = config_of("file", **fields, unit_field="patient")
    with pytest.raises(DataError, match="1 of 10 persons") as caught:
        load(config, sites=1, seed=0, unit="person")
    assert "NAME" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        load(config, sites=1, seed=0, unit="record")
    assert "1 of 10 persons" in caplog.text


def test_public_path_is_the_public_set_and_needs_no_site_or_person(tmp_path):
    public = write(tmp_path / "public.jsonl", [{"text": f"public {i}"} for i in range(30)])
    config = config_of(
        "file",
        path=write(tmp_path / "a.jsonl", visits()),
        public_path=public,
        partition="column",
        site_field="hospital",
        unit_field="patient",
    )
    data = load(config, sites=1, seed=0, unit="person")
    found = {r.target for r in (*data.public_train, *data.public_test)}
    assert found == {f"public {i}" for i in range(30)}
    assert len(data.public_test) == 3
    assert data.append_eos


@pytest.mark.parametrize(
    ("row", "count"),
    [({"text": " Note 0  of\n7"}, "1 of 120 site records have a text"), ({"text": "new", "patient": 7}, "3 belong to")],
)
def test_public_set_that_overlaps_a_site_is_refused_with_the_count(tmp_path, row, count):
    public = write(tmp_path / "public.jsonl", [*({"text": f"public {i}"} for i in range(30)), row])
    path = write(tmp_path / "a.jsonl", visits())
    config = config_of("file", path=path, public_path=public, unit_field="patient")
    for unit in ("person", "record"):
        with pytest.raises(DataError, match=count):
            load(config, sites=3, seed=0, unit=unit)


def test_equal_texts_are_never_on_both_sides_of_the_public_border(tmp_path):
    rows = [{"text": f"t{i % 50}"} for i in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    for seed in range(5):
        config = config_of("file", path=path, declared="public", public_fraction=0.3)
        data = load(config, sites=3, seed=seed, unit="record")
        train, test = ({r.target for r in pile} for pile in (data.public_train, data.public_test))
        private = {r.target for site in data.sites for r in (*site.train, *site.held_out)}
        assert not train & private
        assert not test & private
        assert not train & test


def test_without_a_public_set_the_packaged_text_is_taken_and_said(tmp_path, caplog):
    config = config_of("file", path=write(tmp_path / "a.jsonl", visits()))
    with caplog.at_level(logging.WARNING):
        data = load(config, sites=3, seed=0, unit="record")
    assert "data.public_path" in caplog.text
    assert len(data.public_train) > len(data.public_test) > 0
    with caplog.at_level(logging.WARNING):
        assert load(config, sites=3, seed=0, unit="record") == data


def test_bad_rows_of_every_kind_are_one_error_without_content(tmp_path):
    rows = [*visits(), {"text": " ", "hospital": "h0"}, {"hospital": "h0"}, {"text": 3, "hospital": "h0"}]
    rows += [{"text": "SECRET", "hospital": "bad/name SECRET"}, {"text": "SECRET"}]
    path = write(tmp_path / "a.jsonl", rows)
    with path.open("a") as file:
        file.write("SECRET\n")
    config = config_of("file", path=path, partition="column", site_field="hospital")
    with pytest.raises(DataError) as caught:
        load(config, sites=1, seed=0, unit="record")
    told = str(caught.value)
    assert told.startswith("6 of 126 rows cannot be used")
    assert all(f"a.jsonl:{line}: " in told for line in range(121, 127))
    assert "SECRET" not in told


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("target_field", {"target_field": "absent"}),
        ("prompt_field", {"prompt_field": "absent"}),
        ("prompt_template", {"prompt_template": "x {absent}"}),
        ("site_field", {"site_field": "absent", "partition": "column"}),
        ("unit_field", {"unit_field": "absent"}),
        ("dirichlet_field", {"dirichlet_field": "absent", "partition": "dirichlet"}),
        ("dirichlet_field", {"partition": "dirichlet"}),
    ],
)
def test_absent_columns_are_named_with_those_present(tmp_path, field, changes):
    config = config_of("file", path=write(tmp_path / "a.jsonl", visits()), **changes)
    with pytest.raises(ConfigError, match=rf"data\.{field} = .*hospital, patient, text, ward"):
        load(config, sites=3, seed=0, unit="record")


def test_contradictions_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", visits())
    cases = [
        ("data.unit_field", config_of("file", path=path), 3, 0, "person"),
        ("data.path", config_of("file", path=None), 3, 0, "record"),
        ("data.path", config_of("embedded", path=path, partition="iid"), 3, 0, "record"),
        (
            "data.public_fraction",
            config_of("file", path=path, public_path=path, declared="public", public_fraction=0.1),
            3,
            0,
            "record",
        ),
        (
            "data.dirichlet_alpha",
            config_of("file", path=path, partition="dirichlet", dirichlet_field="ward", dirichlet_alpha=1e-3),
            9,
            0,
            "record",
        ),
        ("seed", config_of("file", path=path), 3, -1, "record"),
        ("sites", config_of("file", path=path), 0, 0, "record"),
    ]
    for field, config, sites, seed, unit in cases:
        with pytest.raises(InvalidValue) as caught:
            load(config, sites=sites, seed=seed, unit=unit)
        assert caught.value.field == field


def test_too_few_units_name_the_site_and_the_remedy(tmp_path):
    config = config_of("file", path=write(tmp_path / "a.jsonl", visits(persons=5, notes=1)))
    with pytest.raises(DataError, match=r"site-1: 2 units.*at least 4"):
        load(config, sites=3, seed=0, unit="record")
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        load(config_of("file", path=tmp_path / "b.jsonl"), sites=3, seed=0, unit="record")


def test_chats_load(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes"}]} for i in range(40)
    ]
    config = config_of(
        "file", task="chat", path=write(tmp_path / "a.jsonl", rows), declared="public", public_fraction=0.2
    )
    data = load(config, sites=3, seed=0, unit="record")
    assert texts(data) == Counter(f"user: q{i}\nassistant: yes" for i in range(40))


@pytest.mark.parametrize("unit", ["record", "person"])
def test_embedded_data_keeps_the_same_promises(unit):
    data = load(config_of("embedded"), sites=4, seed=0, unit=unit)
    assert len(data.sites) == 4
    assert data.secrets
    piles = {name: {r.unit for r in pile} for name, pile in parts(data).items()}
    assert sum(map(len, piles.values())) == len(set().union(*piles.values()))
    if unit == "record":
        assert len(piles["public_train"]) == len(data.public_train)


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("commonsense_qa", 9741, 1221),
        ("openbookqa", 4957, 500),
        ("arc_easy", 2251, 2376),
        ("arc_challenge", 1119, 1172),
    ],
)
def test_published_choice_tasks_divide_in_five_and_keep_the_published_test(shared_data, name, train, test):
    data = load(config_of(name, path=shared_data(name)), sites=4, seed=0, unit="record")
    assert not data.append_eos
    assert len(data.public_test) == test
    sizes = [len(site.train) + len(site.held_out) for site in data.sites]
    assert len(data.public_train) + sum(sizes) == train
    assert all(abs(size - train / 5) < 0.02 * train for size in (*sizes, len(data.public_train)))
    assert all(r.target == r.choices[r.answer] for site in data.sites for r in site.train)


def test_published_test_records_that_are_also_training_records_are_counted_aloud(shared_data, caplog):
    with caplog.at_level(logging.WARNING):
        load(config_of("openbookqa", path=shared_data("openbookqa")), sites=4, seed=0, unit="record")
    # Recount without the loader: the same question stem and right answer in train.jsonl and test.jsonl.
    seen = []
    for name in ("train", "test"):
        rows = read_json_lines(shared_data("openbookqa") / f"{name}.jsonl")
        seen.append(
            [
                (" ".join(r["question"]["stem"].lower().split()), c["text"].lower().strip())
                for r in rows
                for c in r["question"]["choices"]
                if c["label"] == r["answerKey"]
            ]
        )
    count = sum(pair in set(seen[0]) for pair in seen[1])
    assert count > 0
    assert f"{count} of 500" in caplog.text


def test_medquad_gives_sites_the_private_half_only(shared_data):
    import hashlib

    path = shared_data("medquad") / "medquad.jsonl"
    data = load(config_of("medquad", path=path), sites=4, seed=0, unit="record")
    rows = read_json_lines(path)
    halves = {0: Counter(), 1: Counter()}
    bits = {}
    for row in rows:
        bit = int(hashlib.sha1(row["focus"].encode()).hexdigest(), 16) % 2
        halves[bit][row["source"]] += 1
        bits[f"Question: {row['question'].strip()}\nAnswer:", " " + row["answer"].strip()] = bit
    sites = {site.name: len(site.train) + len(site.held_out) for site in data.sites}
    assert list(sites.items()) == halves[1].most_common(4)
    assert len(data.public_train) + len(data.public_test) == sum(halves[0][name] for name in sites)
    for name, pile in parts(data).items():
        assert {bits[r.prompt, r.target] for r in pile} == {0 if name.startswith("public") else 1}
    with pytest.raises(ConfigError, match=r"data\.public_fraction"):
        load(config_of("medquad", path=path, public_fraction=0.2), sites=4, seed=0, unit="record")


def test_medquad_rows_published_without_an_answer_are_left_out_aloud(tmp_path, caplog):
    rows = [
        {"source": f"s{i % 2}", "focus": f"f{i}", "qtype": "t", "question": f"q{i}", "answer": "" if i < 7 else f"a{i}"}
        for i in range(107)
    ]
    config = config_of("medquad", path=write(tmp_path / "a.jsonl", rows), site_names=[])
    with caplog.at_level(logging.WARNING):
        data = load(config, sites=1, seed=0, unit="record")
    assert "7 of 107 rows left out" in caplog.text
    assert sum(texts(data).values()) == 100
