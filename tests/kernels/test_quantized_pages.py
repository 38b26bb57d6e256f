"""What 8 bits a number keep of keys and values, and what a row of them depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_kernels.paged_attention.quantized import LARGEST, SMALLEST_SCALE, floats, quantized

WIDTH = 8
ROUNDED = jax.jit(quantized, static_argnums=1)
NUMBERS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1e-33, -1.5, 3e-5])


@pytest.mark.parametrize("dtype", LARGEST)
@given(row=st.lists(NUMBERS, min_size=WIDTH, max_size=WIDTH))
@settings(deadline=None, max_examples=200)
def test_what_is_kept_is_within_its_bounds(dtype: str, row: list[float]) -> None:
    x = np.array([row], np.float32)
    kept = ROUNDED(x, dtype)
    scale, error = float(kept.scales[0]), np.abs(np.asarray(floats(kept), np.float64) - x)
    bound = scale / 2 if dtype == "int8" else np.maximum(np.abs(x) / 16, scale / 1024)
    assert (error <= bound * (1 + 1e-4)).all()
    assert (np.asarray(floats(kept))[x == 0] == 0).all()
    assert scale == pytest.approx(max(np.abs(x).max() / LARGEST[dtype], SMALLEST_SCALE), rel=1e-6)


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_largest_magnitude_is_the_largest_number(dtype: str) -> None:
    """Of both signs, whatever the division by the scale rounds to."""
    x = np.random.default_rng(0).lognormal(sigma=9, size=(4096, 1)).astype(np.float32) * [1, -1]
    numbers = np.asarray(ROUNDED(x, dtype).numbers, np.float32)
    np.testing.assert_array_equal(numbers, np.broadcast_to([LARGEST[dtype], -LARGEST[dtype]], x.shape))


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_nan_and_no_other_one_is(dtype: str, wrong: float) -> None:
    x = np.ones((3, WIDTH), np.float32)
    x[1, 2] = wrong
    kept = ROUNDED(x, dtype)
    assert np.isnan(floats(kept)).all(axis=1).tolist() == [False, True, False]
    assert (np.asarray(kept.numbers, np.float32)[1] == 0).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_a_row_is_kept_as_it_is_in_any_company(dtype: str) -> None:
    generator = np.random.default_rng(1)
    own = generator.normal(size=(2, 24))
    kept = []
    for rows, place, size in ((1, 0, 1.0), (5, 3, 1e3), (64, 40, 1e-3)):
        x = generator.normal(size=(rows, 2, 24)) * size
        x[place] = own
        rounded = ROUNDED(jnp.asarray(x, jnp.bfloat16), dtype)
        kept.append([np.asarray(leaf[place], np.float32) for leaf in jax.tree.leaves(rounded)])
    for numbers, scales in kept[1:]:
        np.testing.assert_array_equal(numbers, kept[0][0])
        np.testing.assert_array_equal(scales, kept[0][1])
