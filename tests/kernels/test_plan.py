"""The plan of an interval mask against the mask itself, drawn by hypothesis."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_kernels.interval_attention import interval_attention, make_plan, plan


def tree_ends(draw: st.DrawFn, left: int, right: int, end: np.ndarray) -> None:
    """A trajectory tree in depth-first order: a run of tokens that everything below it sees, then its subtrees."""
    while left < right:
        stop = draw(st.integers(left + 1, right))
        run = draw(st.integers(left + 1, stop))
        end[left:run] = stop
        tree_ends(draw, run, stop, end)
        left = stop


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """[B, T] of two rows of trees and padding; one shape, which is compiled once."""
    end = np.zeros((2, 36), np.int32)
    for row in end:
        tree_ends(draw, 0, draw(st.integers(0, 36)), row)
    return end


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(plan, "BLOCK", 8)
    return 8


@given(end=masks(), first=st.sampled_from([0, 1, 8, 35]))
@settings(max_examples=60, deadline=None)
def test_a_plan_lists_the_blocks_with_a_visible_pair_and_no_others(end: np.ndarray, first: int) -> None:
    block, tokens = 8, end.shape[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BLOCK", block)
        (keys,), (counts,) = make_plan(jnp.asarray(end), queries=tokens - first, first=first)
    query, key = np.arange(first, first + len(counts) * block)[:, None], np.arange(tokens)[None, :]
    visible = ((key <= query) & (query < end[:, None, :])).any(axis=0)
    for row, count in enumerate(counts):
        rows = visible[row * block : (row + 1) * block]
        wanted = [j for j in range(-(-tokens // block)) if rows[:, j * block : (j + 1) * block].any()]
        assert list(keys[row, :count]) == wanted


def test_blocks_outside_of_the_plan_are_never_touched(small_blocks: int) -> None:
    """NaN in keys that no query sees, of whole blocks, reaches nothing; in a visible one it would."""
    end = np.zeros((1, 32), np.int32)
    end[:, :8], end[:, 8:16], end[:, 16:] = 8, 16, 32
    generator = np.random.default_rng(0)
    q, k, v = (jnp.asarray(generator.normal(size=(1, 32, 2, 4)), jnp.float32) for _ in range(3))
    spoilt = k.at[:, 8:16].set(jnp.nan)
    got = np.asarray(interval_attention(q, spoilt, v, jnp.asarray(end)))
    assert np.isnan(got[:, 8:16]).all()
    assert np.isfinite(got[:, :8]).all() and np.isfinite(got[:, 16:]).all()


@given(end=masks(), window=st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_small_blocks_attend_as_the_reference_does(end: np.ndarray, window: int) -> None:
    generator = np.random.default_rng(1)
    q, k, v = (jnp.asarray(generator.normal(size=(*end.shape, 2, 4)), jnp.float32) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BLOCK", 8)
        got = interval_attention(q, k, v, jnp.asarray(end), window=window)
    wanted = interval_attention(q, k, v, jnp.asarray(end), window=window, implementation="reference")
    np.testing.assert_allclose(got, wanted, atol=2e-6)
