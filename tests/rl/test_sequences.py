"""Arithmetic over the trajectories of packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.rl import sequences

TOKENS = 13  # no power of two
ROWS = st.lists(st.lists(st.integers(1, 6), max_size=6), min_size=2, max_size=2)

total, largest = jax.jit(sequences.total), jax.jit(sequences.largest)
mean = jax.jit(sequences.mean)
still_to_come = jax.jit(sequences.still_to_come)
pulled_back = jax.jit(jax.grad(lambda values, ids, weights: (weights * sequences.total(values, ids)).sum()))


def packed(rows: list[list[int]]) -> np.ndarray:
    """[2, 13] segment ids of rows with segments of these lengths, as far as they fit."""
    filled = np.zeros((len(rows), TOKENS), np.int32)
    for row, lengths in enumerate(rows):
        numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:TOKENS]
        filled[row, : len(numbers)] = numbers
    return filled


def over(values: np.ndarray, ids: np.ndarray, reduce: type[np.ufunc] | np.ufunc) -> np.ndarray:
    """The slow clear reference, in float64."""
    result = np.zeros(values.shape)
    for row in range(len(ids)):
        for number in np.unique(ids[row]):
            here = ids[row] == number
            result[row, here] = reduce.reduce(values[row, here].astype(np.float64))
    return result


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(0, 1000))
def test_sums_means_and_maxima_are_those_of_each_segment(rows: list[list[int]], seed: int) -> None:
    draw, ids = np.random.default_rng(seed), packed(rows)
    values, weights = draw.normal(size=(2, *ids.shape)).astype(np.float32)
    mask = draw.integers(0, 2, ids.shape).astype(np.float32)
    np.testing.assert_allclose(total(values, ids), over(values, ids, np.add), atol=1e-5)
    np.testing.assert_array_equal(largest(values, ids), over(values, ids, np.maximum).astype(np.float32))
    expected = over(values * mask, ids, np.add) / np.maximum(over(mask, ids, np.add), 1)
    np.testing.assert_allclose(mean(values, mask, ids), expected, atol=1e-5)
    # The sum is symmetric, so its transpose is the sum of the cotangents.
    np.testing.assert_allclose(pulled_back(values, ids, weights), over(weights, ids, np.add), atol=1e-5)


@given(ROWS)
@settings(deadline=None, max_examples=30)
def test_all_tokens_of_a_segment_get_the_same_bits(rows: list[list[int]]) -> None:
    ids = packed(rows)
    sums = np.asarray(total(np.random.default_rng(1).normal(size=ids.shape).astype(np.float32), ids))
    for row in range(len(ids)):
        for number in np.unique(ids[row]):
            assert len(np.unique(sums[row, ids[row] == number])) == 1


@settings(deadline=None, max_examples=30)
@given(ROWS, st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.0]))
def test_what_is_still_to_come_ends_with_its_segment(rows: list[list[int]], seed: int, discount: float) -> None:
    ids, draw = packed(rows), np.random.default_rng(seed)
    mask = draw.integers(0, 2, ids.shape).astype(np.float32) * (ids > 0)
    values = draw.normal(size=ids.shape).astype(np.float32) * mask
    wanted = np.zeros(ids.shape)
    for row in range(len(ids)):
        for t in range(TOKENS):
            later = [u for u in range(t, TOKENS) if ids[row, u] == ids[row, t] and mask[row, u]]
            wanted[row, t] = sum(discount**k * values[row, u] for k, u in enumerate(later))
    np.testing.assert_allclose(still_to_come(values, mask, ids, discount), wanted, rtol=1e-5, atol=1e-5)


def test_nothing_leaks_into_a_neighbour() -> None:
    ids = np.array([[1] * 3 + [2] * 5 + [0] * 5] * 2, np.int32)
    values = np.where(ids == 2, 1.0, 1e30).astype(np.float32)
    values[0, 0] = np.nan
    sums, slopes = total(values, ids), pulled_back(values, ids, values)
    for result in (sums, slopes):
        np.testing.assert_array_equal(np.asarray(result)[ids == 2], 5.0)
        assert np.isfinite(np.asarray(result)[1]).all()


def test_a_long_sum_keeps_its_precision() -> None:
    values = np.full((1, 4096), 0.1, np.float32)
    ids = np.ones(values.shape, np.int32)
    np.testing.assert_allclose(jax.jit(sequences.total)(values, ids), 409.6, rtol=2e-7)


def test_rows_of_one_token() -> None:
    np.testing.assert_array_equal(sequences.total(jnp.array([[2.0], [3.0]]), jnp.ones((2, 1), jnp.int32)), [[2], [3]])
