"""Which blocks of scores an interval mask needs, for each block of queries: what the XLA backend walks along.

Key block J is needed by query block I iff some pair of them is visible. One number of a key block tells: it is needed
iff it begins before the last query and its largest ``end`` lies behind the first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 256
"""Queries, and keys, of a block of scores."""


class KeyBlocks(NamedTuple):
    """For every block of queries the blocks of keys that some row of the batch needs.

    The first axis is 1; on a mesh it is split as the batch is, and every device has the plan of its own rows.

    Attributes:
        keys: [1, query blocks, key blocks] int32; the first ``counts`` entries are the needed blocks, ascending.
        counts: [1, query blocks] int32.
    """

    keys: jax.Array
    counts: jax.Array


def key_blocks(end: jax.Array, *, queries: int | None = None, first: int | jax.Array = 0) -> KeyBlocks:
    """The needed blocks of an interval mask without a window, which only takes blocks away.

    Args:
        end: [B, T] int32, as ``interval_attention`` takes it.
        queries: how many queries there are; T when None.
        first: index of the first query.
    """
    block = block_of(end.shape[1])
    lines = blocks_of(end.shape[1] if queries is None else queries, block)
    columns = blocks_of(end.shape[1], block)
    ends = jnp.pad(end, ((0, 0), (0, columns * block - end.shape[1]))).reshape(-1, columns, block)
    first_query = first + jnp.arange(lines, dtype=jnp.int32)[:, None] * block
    first_key = jnp.arange(columns, dtype=jnp.int32)[None, :] * block
    needed = (first_key < first_query + block) & (first_query < ends.max(axis=(0, 2)))
    order = jnp.argsort(~needed, axis=1, stable=True)
    return KeyBlocks(order.astype(jnp.int32)[None], needed.sum(axis=1, dtype=jnp.int32)[None])


def block_of(tokens: int) -> int:
    """Size of the blocks of rows of so many tokens: short rows are one block."""
    return min(BLOCK, tokens)


def blocks_of(count: int, block: int) -> int:
    """How many blocks hold ``count`` queries or keys."""
    return -(-count // block)
