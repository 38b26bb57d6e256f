"""Which pairs of blocks an interval mask needs, as tables: a list for every block, which the program of a grid that
computes this block walks along."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels.interval_attention.pairs import Blocks, relations

FULL = 1
"""Flag of an entry: every key of the pair is visible to every query. The partner stands above it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """The needed pairs in both orders. The first two axes are split on a mesh as rows and tokens are.

    Attributes:
        by_query: [B, I, J] int32; the partners of each block of queries, ascending, and their flags.
        by_key: [B, J, I] int32; the same pairs by their block of keys.
        query_counts: [B, I] int32, how many entries each block of queries has.
        key_counts: [B, J] int32, how many each block of keys has.
        blocks: sizes of the blocks.
    """

    by_query: jax.Array
    by_key: jax.Array
    query_counts: jax.Array
    key_counts: jax.Array
    blocks: Blocks = dataclasses.field(metadata={"static": True})


def make_tables(end: jax.Array, *, queries: int, first: int | jax.Array, blocks: Blocks) -> Tables:
    """The pairs that an interval mask needs without a window, which only takes pairs away.

    Args:
        end: [B, T] int32, as ``interval_attention`` takes it.
        queries: how many queries there are.
        first: index of the first query.
        blocks: sizes of the blocks.
    """
    needed, full = relations(end, queries=queries, first=first, blocks=blocks)
    by_query, query_counts = _listed(needed, full)
    by_key, key_counts = _listed(needed.swapaxes(1, 2), full.swapaxes(1, 2))
    return Tables(by_query, by_key, query_counts, key_counts, blocks)


def _listed(needed: jax.Array, full: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of [B, blocks, partners] the needed partners in front, and how many they are."""
    order = jnp.argsort(~needed, axis=2, stable=True).astype(jnp.int32)
    entries = (order << 1) | jnp.take_along_axis(full, order, axis=2)
    return entries, needed.sum(axis=2, dtype=jnp.int32)


class Reach(NamedTuple):
    """Least and largest position of each block, [B, blocks], by which a window counts."""

    least: jax.Array
    most: jax.Array

    @classmethod
    def of(cls, positions: jax.Array, block: int) -> "Reach":
        """Of [B, blocks * block] positions."""
        blocks = positions.reshape(positions.shape[0], -1, block)
        return cls(blocks.min(axis=2), blocks.max(axis=2))


def in_window(
    entries: jax.Array, counts: jax.Array, window: jax.Array, queries: Reach, keys: Reach, *, along_queries: bool
) -> tuple[jax.Array, jax.Array]:
    """A table under a window: entries of which none is full that the window cuts, and the span of each list that it
    leaves, [B, blocks, 2]: the first entry and the one behind the last.

    Args:
        entries: [B, blocks, partners] of one order of ``Tables``.
        counts: [B, blocks] of the same.
        window: as ``interval_attention`` takes it.
        queries, keys: positions of the blocks of queries and of keys.
        along_queries: the table is that of the blocks of queries.
    """

    def partners(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values[:, None, :], entries >> 1, axis=2)

    if along_queries:
        nearest = queries.least[:, :, None] - partners(keys.most)
        farthest = queries.most[:, :, None] - partners(keys.least)
    else:
        nearest = partners(queries.least) - keys.most[:, :, None]
        farthest = partners(queries.most) - keys.least[:, :, None]
    place = jnp.arange(entries.shape[2], dtype=jnp.int32)
    wanted = (place < counts[:, :, None]) & ((window == 0) | (nearest < window))
    begin = jnp.where(wanted, place, counts[:, :, None]).min(axis=2)
    stop = jnp.where(wanted, place + 1, 0).max(axis=2)
    cut = (window > 0) & (farthest >= window)
    return jnp.where(cut, entries & ~FULL, entries), jnp.stack([begin, jnp.maximum(begin, stop)], axis=2)
