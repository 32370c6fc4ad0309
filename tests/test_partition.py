"""Dealing: whole units, nothing lost, the named distribution."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcollm_privacy.errors import ConfigError, DataError
from secure_fedcollm.partition import (
    LEAST_UNITS,
    cap_records,
    deal_dirichlet,
    deal_iid,
    generator,
    group_label,
    group_records,
    hold_out,
)
from secure_fedcollm.records import Record

PAIRS = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["x", "X ", "y", "z"])), max_size=14)


def records(pairs):
    return [Record(prompt="", target=text, site=None, unit=unit) for unit, text in pairs]


@given(PAIRS)
def test_groups_by_unit_are_the_units(pairs):
    groups = group_records(records(pairs))
    assert sorted(i for group in groups for i in group) == list(range(len(pairs)))
    assert [{pairs[i][0] for i in group} for group in groups] == [{u} for u in dict.fromkeys(u for u, _ in pairs)]


@given(PAIRS)
def test_groups_by_unit_and_text_are_the_connected_components(pairs):
    # Outside truth: transitive closure by repeated merging of sets.
    components: list[set[int]] = [{i} for i in range(len(pairs))]
    for i, (unit, text) in enumerate(pairs):
        for j, (other_unit, other_text) in enumerate(pairs):
            if unit == other_unit or text.strip().lower() == other_text.strip().lower():
                one = next(c for c in components if i in c)
                two = next(c for c in components if j in c)
                if one is not two:
                    components.remove(two)
                    one |= two
    groups = group_records(records(pairs), same_text=True)
    assert sorted(map(sorted, groups)) == sorted(map(sorted, components))


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 2**32))
def test_iid_deals_each_group_once_and_evenly(count, sites, seed):
    dealt = deal_iid(count, sites, np.random.default_rng(seed))
    assert sorted(i for site in dealt for i in site) == list(range(count))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_iid_shows_no_order():
    first = [deal_iid(100, 2, np.random.default_rng(seed))[0] for seed in range(200)]
    # Each index lands at site 0 in about half of the deals: binomial(200, 1/2), five standard deviations.
    counts = Counter(i for site in first for i in site)
    assert all(abs(counts[i] - 100) < 5 * 200**0.5 / 2 for i in range(100))


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=40, max_size=80), st.integers(1, 4), st.integers(0, 99))
def test_dirichlet_deals_each_group_once(labels, sites, seed):
    dealt = deal_dirichlet(labels, sites, 1000.0, np.random.default_rng(seed))
    assert sorted(i for site in dealt for i in site) == list(range(len(labels)))


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_dirichlet_proportions_have_the_variance_of_the_beta_distribution(alpha):
    classes, sites, size = 400, 4, 200
    labels = [str(i) for i in range(classes) for _ in range(size)]
    dealt = deal_dirichlet(labels, sites, alpha, np.random.default_rng(7))
    shares = np.zeros((sites, classes))
    for site, members in enumerate(dealt):
        for i in members:
            shares[site, int(labels[i])] += 1 / size
    np.testing.assert_allclose(shares.sum(0), 1)
    # A component of Dirichlet(alpha x 4) is Beta(alpha, 3 alpha): mean 1/4, variance (3/16) / (4 alpha + 1).
    expected = 3 / 16 / (4 * alpha + 1)
    assert abs(shares.mean() - 1 / 4) < 1e-9
    np.testing.assert_allclose(shares.var(axis=1), expected, rtol=0.25)


def test_dirichlet_is_even_for_a_large_alpha_and_refuses_starved_sites():
    labels = ["a", "b"] * 100
    sizes = [len(site) for site in deal_dirichlet(labels, 4, 1e6, np.random.default_rng(0))]
    assert all(abs(size - 50) <= 2 for size in sizes)
    with pytest.raises(ConfigError, match=r"data\.dirichlet_alpha = 0\.001.*larger"):
        deal_dirichlet(labels, 4, 0.001, np.random.default_rng(0))


def test_a_units_label_is_its_most_frequent():
    assert group_label(["b", "a", "b"]) == "b"
    assert group_label(["b", "a"]) == "a"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.none() | st.integers(1, 30), st.integers(0, 9))
def test_cap_keeps_whole_groups_within_the_cap(sizes, most, seed):
    groups = [[number] * size for number, size in enumerate(sizes)]
    kept = cap_records(groups, most, np.random.default_rng(seed))
    assert all(group in groups for group in kept)
    total = sum(map(len, kept))
    if most is None or sum(sizes) <= most:
        assert kept == groups
    else:
        assert total <= most
        # Nothing that would still have fitted was left behind.
        assert all(total + len(group) > most for group in groups if group not in kept)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_hold_out_cuts_whole_groups_and_leaves_both_sides_some(sizes, fraction, seed):
    bounds = np.cumsum([0, *sizes])
    groups = [list(range(a, b)) for a, b in pairwise(bounds)]
    kept, held = hold_out(groups, fraction, np.random.default_rng(seed), what="x")
    assert sorted(kept + held) == list(range(bounds[-1]))
    assert kept
    assert held
    number = sum(set(group) <= set(held) for group in groups)
    assert all(set(group) <= set(held) or not set(group) & set(held) for group in groups)
    assert abs(number - fraction * len(groups)) <= 1


def test_hold_out_needs_two_groups():
    with pytest.raises(DataError, match="site x"):
        hold_out([[0, 1, 2]], 0.1, np.random.default_rng(0), what="site x")


def test_generators_of_different_purposes_are_unrelated_and_repeatable():
    draws = {purpose: generator(3, purpose).integers(2**62) for purpose in ("a", "b", "held out a")}
    assert len(set(draws.values())) == 3
    assert generator(3, "a").integers(2**62) == draws["a"]
    assert generator(4, "a").integers(2**62) != draws["a"]
    assert LEAST_UNITS >= 2
