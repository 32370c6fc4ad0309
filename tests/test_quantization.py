"""The grid: nearest point, saturation, refusals, and the mean back from the sum."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcollm_privacy.ckks_parameters import parameters_for
from fedcollm_privacy.errors import FedCollmError, InvalidValue
from fedcollm_privacy.messages import NoisySum, OpenedSum, PrivateUpdate, QuantizedUpdate, RoundPlan
from fedcollm_privacy.quantization import clipped_fraction, dequantize_mean, on_grid, quantize

from .secure_sums import digest, round_plan

SPEC = digest("spec")


def plan(**changes: Any) -> RoundPlan:
    return round_plan(
        **({"spec_digest": SPEC, "dimension": 4, "clip": 0.5, "value_bits": 8, "max_contributors": 16} | changes)
    )


def update(*values: float, spec: str = SPEC) -> PrivateUpdate:
    return PrivateUpdate(vector=np.array(values, dtype=np.float32), spec_digest=spec, reservation="non-private")


@given(
    st.floats(-2, 2, width=32),
    st.floats(1e-3, 1e3),
    st.integers(4, 16),
)
def test_each_coordinate_goes_to_the_nearest_grid_point(value: float, clip: float, bits: int) -> None:
    chosen = plan(dimension=1, clip=clip, value_bits=bits)
    grid = int(quantize(update(value), chosen).grid[0])
    assert abs(grid) <= chosen.levels
    exact, step = Fraction(float(np.float32(value))), Fraction(chosen.clip) / chosen.levels
    inside = min(max(exact, -Fraction(clip)), Fraction(clip))
    # Exact rational arithmetic; the tolerance is float64's own in value / step.
    assert abs(inside - grid * step) <= step / 2 * (1 + Fraction(1, 2**30))


def test_beyond_the_clip_saturates_at_the_last_level() -> None:
    grid = quantize(update(0.5, -0.5, 1e30, -1e30), plan()).grid
    assert grid.tolist() == [127, -127, 127, -127]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_diverged_site_is_told_so(bad: float) -> None:
    with pytest.raises(FedCollmError, match="diverged"):
        quantize(update(0, 0, bad, 0), plan())


def test_non_finite_values_are_found_beyond_the_first_block() -> None:
    long = np.zeros(2**19, dtype=np.float32)
    long[-1] = np.nan
    with pytest.raises(FedCollmError, match="diverged"):
        quantize(update(*long), plan(dimension=2**19))


def test_blocks_do_not_show_in_the_result() -> None:
    values = np.random.default_rng(0).normal(0, 0.3, 2**18 + 7).astype(np.float32)
    chosen = plan(dimension=len(values))
    expected = np.rint(np.clip(values.astype(np.float64), -0.5, 0.5) / (0.5 / 127))
    assert (quantize(update(*values), chosen).grid == expected).all()


def test_an_update_of_another_adapter_or_length_is_refused() -> None:
    for wrong in (update(0, 0, 0, 0, spec=digest("other")), update(0, 0, 0)):
        with pytest.raises(InvalidValue, match=r"as planned|adapter"):
            quantize(wrong, plan())
        with pytest.raises(InvalidValue):
            clipped_fraction(wrong, plan())


def test_a_plan_whose_sum_could_overflow_is_refused() -> None:
    narrow = plan(value_bits=18, max_contributors=16, ckks=parameters_for(16, 8))
    with pytest.raises(InvalidValue, match="value_bits"):
        quantize(update(0, 0, 0, 0), narrow)
    with pytest.raises(InvalidValue, match="value_bits"):
        on_grid(NoisySum(grid=np.zeros(4, dtype=np.int64), grid_step=narrow.grid_step), narrow)
    assert not quantize(update(0, 0, 0, 0), plan(value_bits=18, max_contributors=16)).grid.any()


def test_the_grid_is_of_32_bits_and_so_is_what_is_taken_for_one() -> None:
    widest = plan(value_bits=18)
    grid = quantize(update(0.5, -0.5, 0.25, 0), widest).grid
    assert grid.dtype == np.int32
    assert grid.tolist() == [131071, -131071, 65536, 0]
    gradient = plan(value_bits=18, release="gradient", min_contributors=5, least_honest=4)
    noisy = NoisySum(grid=grid.astype(np.int64), grid_step=gradient.grid_step)
    assert on_grid(noisy, gradient).grid.dtype == np.int32
    assert (on_grid(noisy, gradient).grid == grid).all()
    beyond = NoisySum(grid=np.array([2**32, 0, 0, 0]), grid_step=gradient.grid_step)
    with pytest.raises(InvalidValue, match="beyond the grid"):
        on_grid(beyond, gradient)
    for wrong in (grid.astype(np.int64), grid.astype(np.float32), grid.reshape(2, 2)):
        with pytest.raises(InvalidValue, match="int32"):
            QuantizedUpdate(plan=widest, grid=wrong)


def test_clipped_fraction_counts_what_saturated() -> None:
    assert clipped_fraction(update(0.5, -0.5, 0.51, -9), plan()) == 0.5
    assert clipped_fraction(update(0, 0, 0, float("nan")), plan()) == 0.25


@given(st.lists(st.integers(-(127 * 5), 127 * 5), min_size=4, max_size=4))
def test_the_mean_is_the_exact_mean_in_float32(total: list[int]) -> None:
    opened = OpenedSum(plan=plan(), cohort=("a", "b", "c", "d", "e"), total=np.array(total, dtype=np.int64))
    mean = dequantize_mean(opened)
    assert mean.dtype == np.float32
    for value, grid in zip(mean.tolist(), total, strict=True):
        exact = Fraction(grid) * Fraction(1, 2) / 127 / 5
        assert abs(Fraction(value) - exact) <= abs(exact) * Fraction(1, 2**23)


def test_the_mean_of_nobody_is_refused() -> None:
    with pytest.raises(InvalidValue, match="cohort"):
        dequantize_mean(OpenedSum(plan=plan(), cohort=(), total=np.zeros(4, dtype=np.int64)))


def test_quantised_mean_lies_within_half_a_step_of_the_plain_mean() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.uniform(-0.5, 0.5, (3, 4)).astype(np.float32)
    grids = [quantize(update(*vector), plan()).grid for vector in vectors]
    opened = OpenedSum(plan=plan(), cohort=("a", "b", "c"), total=np.sum(grids, axis=0, dtype=np.int64))
    assert np.abs(dequantize_mean(opened) - vectors.mean(0)).max() <= plan().grid_step / 2 + 1e-7
