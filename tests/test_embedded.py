"""The synthetic federation: reproducible, disjoint, several notes a patient, non-IID, secrets where they should be."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from fedcollm_privacy.errors import InvalidValue
from secure_fedcollm.data import FederationData
from secure_fedcollm.embedded import load_embedded, public_corpus
from secure_fedcollm.embedded_text import GENERAL_WARD, SPECIALITIES, article

CONDITIONS = [c for table in (*SPECIALITIES.values(), GENERAL_WARD) for c in table]
DOSES = {c.drug: c.dose for c in CONDITIONS}


@pytest.fixture(scope="module")
def federation() -> FederationData:
    return load_embedded(3, 0.2)


def texts(records):
    return {(r.prompt + r.target) for r in records}


def test_the_same_seed_gives_the_same_data_and_another_seed_another():
    assert load_embedded(3, 0.2) == load_embedded(3, 0.2)
    assert texts(load_embedded(3, 0.2).sites[0].train) != texts(load_embedded(4, 0.2).sites[0].train)


def test_moving_the_split_moves_patients_but_changes_no_note(federation):
    other = load_embedded(3, 0.4)
    for here, there in zip(federation.sites, other.sites, strict=True):
        assert texts([*here.train, *here.held_out]) == texts([*there.train, *there.held_out])
        assert len({r.unit for r in there.held_out}) == 2 * len({r.unit for r in here.held_out})


def test_no_public_text_occurs_at_a_site_and_no_text_occurs_at_two_places(federation):
    public = [*federation.public_train, *federation.public_test]
    secrets = {s.prompt + s.secret for s in federation.secrets}
    everything = Counter(r.prompt + r.target for r in public)
    for site in federation.sites:
        everything.update(r.prompt + r.target for r in (*site.train, *site.held_out))
    assert {text for text, count in everything.items() if count > 1} == secrets
    assert not texts(federation.public_train) & texts(federation.public_test)


def test_pretraining_text_is_neither_public_nor_at_a_site(federation):
    rng = np.random.Generator(np.random.PCG64(0))
    seen = {article(rng) for _ in range(8000)}
    for records in (public_corpus(3), *(s.train + s.held_out for s in federation.sites)):
        assert not seen & texts(records)


def test_persons_have_several_notes_and_stand_on_one_side_of_the_split(federation):
    owner = {}
    for site in federation.sites:
        planted = {s.prompt for s in federation.secrets}
        train, held_out = (
            Counter(r.unit for r in records if r.prompt not in planted) for records in (site.train, site.held_out)
        )
        assert not train.keys() & held_out.keys()
        assert all(2 <= count <= 6 for count in (train + held_out).values())
        assert np.mean(list(held_out.values())) > 2.5
        assert len(train) > 300
        for unit in train | held_out:
            assert owner.setdefault(unit, site.name) == site.name


def patients_per_drug(records):
    """One note of each patient, because notes of one patient agree and a chi-square test wants independence."""
    first = {r.unit: r.target.lower() for r in records}.values()
    return [sum(drug in text for text in first) for drug in sorted(DOSES)]


def chi_square_p(*groups):
    table = np.array([patients_per_drug(records) for records in groups])
    return chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue


def test_drugs_and_wording_differ_between_sites_far_beyond_chance(federation):
    assert chi_square_p(*(site.train for site in federation.sites)) < 1e-100
    records = federation.sites[0].train
    units = sorted({r.unit for r in records})
    even = set(units[::2])
    halves = [r for r in records if r.unit in even], [r for r in records if r.unit not in even]
    assert chi_square_p(*halves) > 1e-3  # the measure finds nothing where there is nothing
    assert sum("Impression" in r.target for r in federation.sites[0].train) > 100
    assert not any("Impression" in r.target for r in federation.sites[1].train)


def share_of_own_drug(records, condition):
    """Of the notes that name the illness, how many treat it with its own drug."""
    named = [r.target.lower() for r in records if condition.diagnosis.lower() in r.target.lower()]
    assert len(named) >= 3
    return sum(condition.drug in text for text in named) / len(named)


def test_only_the_hospitals_know_how_every_second_illness_is_treated(federation):
    public = [*federation.public_train, *federation.public_test]
    private = [r for site in federation.sites for r in site.train]
    unknown = []
    for table in SPECIALITIES.values():
        assert [share_of_own_drug(private, c) for c in table] == [1] * 6
        assert [share_of_own_drug(public, c) for c in table[::2]] == [1] * 3
        unknown += [share_of_own_drug(public, c) for c in table[1::2]]
    assert np.mean(unknown) < 0.2


def test_each_secret_stands_in_train_of_its_site_as_often_as_said_within_one_unit(federation):
    assert {s.site for s in federation.secrets} == {s.name for s in federation.sites}
    for secret in federation.secrets:
        holders = [
            (site.name, part, r.unit)
            for site in federation.sites
            for part, records in (("train", site.train), ("held_out", site.held_out))
            for r in records
            if secret.prompt in r.prompt + r.target
        ]
        assert len(holders) == secret.repetitions
        assert {(site, part) for site, part, _ in holders} == {(secret.site, "train")}
        assert len({unit for *_, unit in holders}) == 1
        assert len(set(secret.candidates)) == len(secret.candidates) == 1000
        assert secret.secret in secret.candidates
        assert all(re.fullmatch(r" \d{4}", candidate) for candidate in secret.candidates)


def test_dose_follows_drug_and_age_in_every_note(federation):
    checked = 0
    for site in federation.sites:
        for record in site.train:
            dosed = re.search(r"([A-Za-z]+) (\d+) mg", record.target)
            if dosed is None:
                continue
            age = int(re.search(r", (\d+),", record.prompt)[1])
            full = DOSES[dosed[1].lower()]
            assert int(dosed[2]) == (full // 2 if age >= 70 or age < 6 else full)
            checked += 1
    assert checked > 4000


@settings(max_examples=25, deadline=None)
@given(st.floats(allow_nan=True, allow_infinity=True).filter(lambda x: not 0.0005 < x < 0.9995))
def test_a_fraction_that_leaves_no_patient_on_one_side_is_refused(fraction):
    with pytest.raises(InvalidValue, match="held_out"):
        load_embedded(0, fraction)


def test_negative_seed_is_refused():
    with pytest.raises(InvalidValue, match="seed"):
        load_embedded(-1, 0.2)
