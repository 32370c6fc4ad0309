"""Sites of different LoRA ranks in one secure sum: exact means, nothing lost, and no site seen alone in any part."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcollm_privacy import contributor as contributor_module
from fedcollm_privacy import decryptor as decryptor_module
from fedcollm_privacy import secure_sum as secure_sum_module
from fedcollm_privacy.aggregator import Aggregator
from fedcollm_privacy.errors import ConfigError, InvalidValue, RoundLost
from fedcollm_privacy.messages import AdapterSpec
from fedcollm_privacy.ranks import exposed_sites
from secure_fedcollm.cli import compose_config
from secure_fedcollm.config import Config
from secure_fedcollm.models import AdaptedModel, merged_delta, rebase
from secure_fedcollm.ranks import narrowed, rank_in, reach, require_ranks, widened, with_rank
from secure_fedcollm.strict_build import build

from .audit_answers import failing, reasons
from .run_folders import build as build_folder
from .secure_sums import Round, round_plan

SPEC = AdapterSpec(
    names=("q.lora_A.default.weight", "q.lora_B.default.weight", "v.lora_B.default.weight"),
    shapes=((4, 6), (5, 4), (3, 4)),
    base_model="0" * 64,
)


@given(
    ranks=st.lists(st.sampled_from((None, 1, 2, 3)), min_size=0, max_size=7),
    least=st.integers(3, 5),
)
def test_who_must_stay_out_is_what_trying_every_set_of_sites_finds(ranks: list[int | None], least: int) -> None:
    sites = tuple(f"s{number}" for number in range(len(ranks)))
    narrow = {site: rank for site, rank in zip(sites, ranks, strict=True) if rank is not None}
    plan = round_plan(
        min_contributors=least,
        max_contributors=8,
        narrow_sites=tuple(sorted(narrow)),
        narrow_ranks=tuple(narrow[site] for site in sorted(narrow)),
    )

    def hides(chosen: tuple[str, ...]) -> bool:
        filled = [sum(narrow.get(site, 4) > component for site in chosen) for component in range(4)]
        return all(count == 0 or count >= least for count in filled)

    if not narrow:
        assert exposed_sites(plan, sites) == ()
        return
    subsets = [c for size in range(len(sites) + 1) for c in itertools.combinations(sites, size) if hides(c)]
    largest = max(subsets, key=len)
    assert set(sites) - set(exposed_sites(plan, sites)) == set(largest)
    assert sum(len(chosen) == len(largest) for chosen in subsets) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"narrow_sites": ("b", "a"), "narrow_ranks": (1, 1)},
        {"narrow_sites": ("a", "a"), "narrow_ranks": (1, 1)},
        {"narrow_sites": ("a",), "narrow_ranks": ()},
        {"narrow_sites": ("a",), "narrow_ranks": (0,)},
        {"narrow_sites": ("a/b",), "narrow_ranks": (1,)},
        {"narrow_sites": ("a",), "narrow_ranks": (1,), "release": "gradient"},
    ],
)
def test_a_plan_with_unclear_ranks_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="narrow_"):
        round_plan(**changes)


@given(seed=st.integers(0, 2**32 - 1), r=st.integers(1, 4))
def test_a_vector_of_lower_rank_fills_the_first_components_and_no_others(seed: int, r: int) -> None:
    vector = np.random.default_rng(seed).standard_normal(SPEC.dimension).astype(np.float32)
    own = with_rank(SPEC, r)
    first = narrowed(vector, SPEC, r)
    assert first.shape == (own.dimension,)
    assert rank_in(own) == r
    back = widened(first, own, 4)
    np.testing.assert_array_equal(narrowed(back, SPEC, r), first)
    filled = reach(SPEC, (r,)) == 1
    np.testing.assert_array_equal(back, np.where(filled, vector, 0.0))
    assert filled.sum() == own.dimension


@given(ranks=st.lists(st.integers(1, 4), max_size=6))
def test_reach_counts_the_sites_that_fill_a_coordinate(ranks: list[int]) -> None:
    ones = [widened(np.ones(with_rank(SPEC, r).dimension, np.float32), with_rank(SPEC, r), 4) for r in ranks]
    np.testing.assert_array_equal(reach(SPEC, ranks), np.sum(ones, axis=0) if ones else np.zeros(SPEC.dimension))


def test_what_a_site_of_lower_rank_gets_is_the_best_approximation_of_the_adapter(
    load_tiny: Callable[..., AdaptedModel],
) -> None:
    """Eckart and Young 1936, against numpy's SVD of every module's BA; the scaling is the same at both ranks."""
    whole, small = load_tiny("llama", trained=True, r=4, lora_alpha=8), load_tiny("llama", r=2, lora_alpha=4)
    rebase(whole)
    small.write(narrowed(whole.read(), whole.spec, 2))
    assert with_rank(small.spec, 4) == whole.spec
    for name, delta in merged_delta(whole).items():
        left, singular, right = np.linalg.svd(delta.numpy())
        best = (left[:, :2] * singular[:2]) @ right[:2]
        found = merged_delta(small)[name].numpy()
        assert np.abs(found - best).max() < 1e-6 * max(1.0, singular[0])
        assert np.abs(found - delta.numpy()).max() > 1e-3
    ids = torch.arange(6).unsqueeze(0)
    whole.write(widened(narrowed(whole.read(), whole.spec, 2), small.spec, 4))
    with torch.no_grad():
        assert torch.allclose(whole.model(input_ids=ids).logits, small.model(input_ids=ids).logits, atol=1e-5)


@pytest.fixture(scope="module")
def aggregator() -> Iterator[Aggregator]:
    with Aggregator(time_limit_s=60) as shared:
        yield shared


COLUMNS = np.tile([1, 1, 0, 0], 20)  # a tensor of rank 4; sites of rank 2 fill the first half of each row


def grids(*wide: bool) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    rng = np.random.default_rng(3)
    full = rng.integers(-4000, 4000, (len(wide), COLUMNS.size)).astype(np.int32)
    return [grid if is_wide else (grid * COLUMNS).astype(np.int32) for grid, is_wide in zip(full, wide, strict=True)]


def narrow_of(*wide: bool) -> dict[str, Any]:
    names = tuple(f"s{number:02d}" for number, is_wide in enumerate(wide) if not is_wide)
    return {"narrow_sites": names, "narrow_ranks": (2,) * len(names)}


def test_a_site_alone_in_its_rank_is_seen_where_the_plan_hides_the_ranks(
    tmp_path: Path, aggregator: Aggregator
) -> None:
    """The control: what the rule is for. One site of rank 4 among sites of rank 2 reads as plain text in the sum."""
    wide = (True, False, False, False)
    federation = Round.of(tmp_path, grids(*wide), aggregator=aggregator)
    opened = federation.run(max_colluding=0)
    seen = COLUMNS == 0
    np.testing.assert_array_equal(opened.total[seen], federation.participants["s00"].grid[seen])


def test_a_site_alone_in_its_rank_is_left_out_and_the_others_are_summed(tmp_path: Path, aggregator: Aggregator) -> None:
    wide = (True, False, False, False)
    federation = Round.of(tmp_path, grids(*wide), aggregator=aggregator)
    opened = federation.run(max_colluding=0, **narrow_of(*wide))
    assert opened.cohort == ("s01", "s02", "s03")
    assert federation.secure_sum.rejected == {"s00": "too few sites of its rank"}
    np.testing.assert_array_equal(
        opened.total, np.sum([federation.participants[s].grid for s in opened.cohort], axis=0)
    )
    assert not opened.total[COLUMNS == 0].any()


def test_enough_sites_of_every_rank_are_summed_exactly(tmp_path: Path, aggregator: Aggregator) -> None:
    wide = (True, True, False, True, False)
    federation = Round.of(tmp_path, grids(*wide), aggregator=aggregator)
    opened = federation.run(max_colluding=0, **narrow_of(*wide))
    assert len(opened.cohort) == 5
    np.testing.assert_array_equal(opened.total, np.sum(grids(*wide), axis=0))


def test_a_site_that_drops_out_takes_those_with_it_that_would_be_seen(tmp_path: Path, aggregator: Aggregator) -> None:
    wide = (True, True, True, False, False, False, False)
    federation = Round.of(tmp_path, grids(*wide), aggregator=aggregator)
    federation.channel.bend = lambda operation, site, body: None if (operation, site) == ("upload", "s00") else body
    opened = federation.run(max_colluding=0, **narrow_of(*wide))
    assert opened.cohort == ("s03", "s04", "s05", "s06")
    assert {"s01", "s02"} <= {s for s, why in federation.secure_sum.rejected.items() if "of its rank" in why}
    np.testing.assert_array_equal(opened.total, np.sum(grids(*wide)[3:], axis=0))


def test_a_round_is_lost_where_the_others_are_too_few_then(tmp_path: Path, aggregator: Aggregator) -> None:
    wide = (True, True, True, False, False, False)
    federation = Round.of(tmp_path, grids(*wide), aggregator=aggregator)
    federation.channel.bend = lambda operation, site, body: None if (operation, site) == ("upload", "s00") else body
    with pytest.raises(RoundLost, match="4 are needed"):
        federation.run(max_colluding=0, **narrow_of(*wide))


def test_sites_do_not_sign_a_set_in_which_one_is_alone_in_its_rank(
    tmp_path: Path, aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that leaves its own rule out gets no signature; with that rule gone too, the decryptor refuses."""
    wide = (True, False, False, False)
    monkeypatch.setattr(secure_sum_module, "exposed_sites", lambda plan, sites: ())
    federation = Round.of(tmp_path / "a", grids(*wide), aggregator=aggregator)
    with pytest.raises(RoundLost):
        federation.run(max_colluding=0, **narrow_of(*wide))
    for participant in federation.participants.values():
        assert any("too few survivors have ranks as high as site s00" in text for text in participant.refusals)

    monkeypatch.setattr(contributor_module, "exposed_sites", lambda plan, sites: ())
    federation = Round.of(tmp_path / "b", grids(*wide), aggregator=aggregator)
    with pytest.raises(RoundLost):
        federation.run(max_colluding=0, **narrow_of(*wide))

    monkeypatch.setattr(decryptor_module, "exposed_sites", lambda plan, sites: ())
    federation = Round.of(tmp_path / "c", grids(*wide), aggregator=aggregator)
    assert len(federation.run(max_colluding=0, **narrow_of(*wide)).cohort) == 4


def test_the_auditor_finds_a_sum_in_which_one_site_was_alone_in_its_rank(tmp_path: Path) -> None:
    build_folder(tmp_path / "sound", terms_changes={"narrow_sites": [], "narrow_ranks": []})
    assert failing(tmp_path / "sound") == set()
    build_folder(tmp_path / "alone", terms_changes={"narrow_sites": ["ash", "beech"], "narrow_ranks": [2, 2]})
    assert failing(tmp_path / "alone") == {"openings"}
    assert "only 1 sites, of the highest rank" in reasons(tmp_path / "alone", "openings")
    build_folder(tmp_path / "unequal", terms_changes={"narrow_sites": ["ash"], "narrow_ranks": []})
    assert "one rank for each site" in reasons(tmp_path / "unequal", "openings")


def test_ranks_that_would_show_a_site_are_refused_before_anything_is_loaded() -> None:
    def compose(*overrides: str) -> Config:
        return build(Config, compose_config([*overrides]))

    with pytest.raises(ConfigError, match=r"adapter.site_ranks.s00.*from 1 to adapter.r - 1 = 7"):
        compose("adapter.site_ranks={s00: 8}")
    with pytest.raises(ConfigError, match=r"rebase with adapter\.site_ranks"):
        compose("adapter.site_ranks={s00: 4}", "adapter.aggregation=freeze_a")
    with pytest.raises(ConfigError, match=r"adapter.site_ranks.*nothing is summed"):
        compose("adapter.site_ranks={s00: 4}", "method=standalone")
    with pytest.raises(ConfigError, match=r"adapter.site_ranks"):
        compose("adapter.site_ranks={s00: many}")
    config = compose("adapter.site_ranks={s00: 4, s01: 4}")
    assert [config.adapter.rank_of(site) for site in ("s00", "s01", "s02")] == [4, 4, 8]
    with pytest.raises(ConfigError, match="names of sites: a, b"):
        require_ranks(config, ("a", "b"))
    with pytest.raises(ConfigError, match=r"at least .* = 3 sites with the highest rank, here 2"):
        require_ranks(config, ("s00", "s01", "s02", "s03"))
    require_ranks(config, ("s00", "s01", "s02", "s03", "s04"))
