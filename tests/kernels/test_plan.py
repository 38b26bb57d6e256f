"""The plan of an interval mask against the mask itself, drawn by hypothesis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_kernels import block_sizes
from jaxrl_kernels.block_sizes import Key, Sizes
from jaxrl_kernels.interval_attention import Plan, interval_attention, pairs, plan, tables
from jaxrl_kernels.interval_attention.blocks import FALLBACK, LANES, blocks_for


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
        (keys,), (counts,) = plan.key_blocks(jnp.asarray(end), queries=tokens - first, first=first)
    query, key = np.arange(first, first + len(counts) * block)[:, None], np.arange(tokens)[None, :]
    visible = ((key <= query) & (query < end[:, None, :])).any(axis=0)
    for row, count in enumerate(counts):
        rows = visible[row * block : (row + 1) * block]
        wanted = [j for j in range(-(-tokens // block)) if rows[:, j * block : (j + 1) * block].any()]
        assert list(keys[row, :count]) == wanted


made_pairs = jax.jit(pairs.make_pairs, static_argnames=("queries", "blocks"))


@given(end=masks(), first=st.sampled_from([0, 1, 8, 35]))
@settings(max_examples=60, deadline=None)
def test_lists_of_pairs_hold_each_needed_pair_once_in_both_orders(end: np.ndarray, first: int) -> None:
    (rows, tokens), blocks = end.shape, pairs.Blocks(8, 4)
    made = made_pairs(jnp.asarray(end), queries=tokens - first, first=first, blocks=blocks)
    query_blocks, key_blocks = -(-(tokens - first) // 8), -(-tokens // 4)
    query, key = np.arange(first, first + query_blocks * 8)[:, None], np.arange(key_blocks * 4)[None, :]
    padded = np.pad(end, ((0, 0), (0, key_blocks * 4 - tokens)))
    visible = (key <= query) & (query < padded[:, None, :])
    visible = visible.reshape(rows, query_blocks, 8, key_blocks, 4).swapaxes(2, 3)  # [B, I, J, 8, 4]
    some, all_of_it = visible.any(axis=(3, 4)), visible.all(axis=(3, 4))
    for entries, count, turned in ((made.by_query, made.counts[0, 0], False), (made.by_key, made.counts[0, 1], True)):
        lengths = (key_blocks, query_blocks) if turned else (query_blocks, key_blocks)
        entries = np.asarray(entries[0, :count])
        row, block, partner = pairs.Code.of(rows, *lengths).unpack(entries)
        needed, full = (x.swapaxes(1, 2) if turned else x for x in (some, all_of_it))
        listed = np.zeros_like(needed, dtype=int)
        np.add.at(listed, (row, block, partner), 1)
        empty = entries & pairs.EMPTY != 0
        assert (listed[needed] == 1).all() and listed.sum() == needed.sum() + empty.sum()
        assert empty.sum() == (~needed.any(axis=2)).sum() and not needed[row, block, partner][empty].any()
        np.testing.assert_array_equal(entries & pairs.FULL != 0, full[row, block, partner])
        group = row * lengths[0] + block
        np.testing.assert_array_equal(entries & pairs.FIRST != 0, np.diff(group, prepend=-1) != 0)
        np.testing.assert_array_equal(entries & pairs.LAST != 0, np.diff(group, append=-1) != 0)
        assert (np.diff(row * lengths[0] * lengths[1] + block * lengths[1] + partner) > 0).all()


made_tables = jax.jit(tables.make_tables, static_argnames=("queries", "blocks"))
within = jax.jit(tables.in_window, static_argnames=("along_queries",))


@given(end=masks(), first=st.sampled_from([0, 1, 8, 35]), window=st.integers(0, 20), stretch=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_tables_hold_each_pair_that_a_window_leaves_once_in_both_orders(
    end: np.ndarray, first: int, window: int, stretch: int
) -> None:
    """Positions that grow more slowly than indices leave more in a window."""
    (rows, tokens), size, queries = end.shape, 4, end.shape[1] - first
    made = made_tables(jnp.asarray(end), queries=queries, first=first, blocks=pairs.Blocks(size, size))
    query_blocks, key_blocks = -(-queries // size), -(-tokens // size)
    query, key = np.arange(first, first + query_blocks * size), np.arange(key_blocks * size)
    places = np.minimum(key, tokens - 1) // stretch
    asked, held = (
        np.broadcast_to(places[np.minimum(query, tokens - 1)], (rows, len(query))),
        places[None].repeat(rows, 0),
    )
    seen = (key <= query[:, None]) & (query[:, None] < np.pad(end, ((0, 0), (0, len(key) - tokens)))[:, None, :])
    seen = seen.reshape(rows, query_blocks, size, key_blocks, size).swapaxes(2, 3)  # [B, I, J, size, size]
    near = (window == 0) | (asked[:, :, None] - held[:, None, :] < window)
    near = near.reshape(seen.shape[:2] + (size, key_blocks, size)).swapaxes(2, 3)
    left, all_of_it = (seen & near).any(axis=(3, 4)), (seen & near).all(axis=(3, 4))
    reaches = [tables.Reach.of(jnp.asarray(x), size) for x in (asked, held)]
    for table, counts, along in ((made.by_query, made.query_counts, True), (made.by_key, made.key_counts, False)):
        entries, spans = (np.asarray(x) for x in within(table, counts, window, *reaches, along_queries=along))
        listed, full = np.zeros(entries.shape, int), np.zeros(entries.shape, bool)
        for row, block in np.ndindex(entries.shape[:2]):
            chosen = entries[row, block, slice(*spans[row, block])]
            np.add.at(listed[row, block], chosen >> 1, 1)
            full[row, block][chosen >> 1] = chosen & tables.FULL
            assert (np.diff(chosen >> 1) > 0).all()
        if not along:
            listed, full = listed.swapaxes(1, 2), full.swapaxes(1, 2)
        assert (listed[left] == 1).all() and not listed[~seen.any(axis=(3, 4))].any()
        assert not full[~all_of_it].any()
        if stretch == 1:  # indices tell exactly what a window leaves
            cut = seen.any(axis=(3, 4)) & ~near.any(axis=(3, 4))
            np.testing.assert_array_equal(full, all_of_it)
            assert not listed[cut].any()


def test_pairs_beyond_31_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="take fewer rows or larger blocks"):
        pairs.Code.of(1 << 10, 1 << 9, 1 << 9)


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


@jax.jit
def attended_by_pairs(end: jax.Array, window: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    made = pairs.make_pairs(end, queries=end.shape[1], first=0, blocks=pairs.Blocks(8, 4))
    return interval_attention(q, k, v, end, window=window, plan=Plan(made, "tpu_interpreted"))


@given(end=masks(), window=st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_pairs_attend_as_the_reference_does(end: np.ndarray, window: int) -> None:
    generator = np.random.default_rng(1)
    q, k, v = (jnp.asarray(generator.normal(size=(*end.shape, 2, 4)), jnp.float32) for _ in range(3))
    got = attended_by_pairs(jnp.asarray(end), jnp.int32(window), q, k, v)
    wanted = interval_attention(q, k, v, jnp.asarray(end), window=window, implementation="reference")
    np.testing.assert_allclose(got, wanted, atol=2e-6)


def test_pairs_outside_of_the_lists_are_never_touched() -> None:
    """NaN in keys that queries of other segments do not see, of whole blocks, reaches none of those queries."""
    end = np.zeros((2, 36), np.int32)
    end[:, :8], end[:, 8:16], end[:, 16:] = 8, 16, 36
    generator = np.random.default_rng(0)
    q, k, v = (jnp.asarray(generator.normal(size=(2, 36, 2, 4)), jnp.float32) for _ in range(3))
    got = np.asarray(attended_by_pairs(jnp.asarray(end), jnp.int32(0), q, k.at[:, 8:16].set(jnp.nan), v))
    assert np.isnan(got[:, 8:16]).all()
    assert np.isfinite(got[:, :8]).all() and np.isfinite(got[:, 16:]).all()


@given(
    known=st.sampled_from(sorted(key for key in block_sizes.table() if key.kernel == "interval_attention")),
    groups=st.sampled_from([1, 2, 3, 5, 8, 12, 16, 64]),
    queries=st.integers(1, 1 << 17),
    more=st.integers(0, 1 << 17),
)
@settings(max_examples=100, deadline=None)
def test_block_sizes_suit_registers_and_are_no_larger_than_the_table_says(
    known: Key, groups: int, queries: int, more: int
) -> None:
    blocks, most = (
        blocks_for(known.device, known.head_width, groups, queries, queries + more),
        block_sizes.table()[known],
    )
    for size in (blocks.queries, blocks.keys):
        assert size % LANES == 0 and size & (size - 1) == 0
    smallest = LANES * LANES * groups  # of one register's length each way
    assert groups * blocks.queries * blocks.keys <= max(most.rows * most.keys, smallest)


def test_a_shape_outside_of_the_table_falls_back_and_says_so() -> None:
    with pytest.warns(UserWarning, match="no block sizes for head width 80 on 'TPU v5'"):
        blocks = blocks_for("TPU v5", 80, 1, 4096, 4096)
    assert Sizes(blocks.queries, blocks.keys) == FALLBACK
