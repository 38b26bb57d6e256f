"""Which blocks of pages the blocks of queries need: a list that a kernel walks along, one grid step an entry."""

import dataclasses

import jax
import jax.numpy as jnp

FIRST, LAST = 1, 2
"""Flags of an entry: it begins a block of queries, it ends one."""
FLAGS = 2
"""Bits of an entry below its other parts."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """Blocks of queries and the blocks of keys that each needs, one query block after the other.

    Attributes:
        entries: [X] int32, see ``unpack``.
        count: () int32, how many of them there are.
        reach: [U] int32, the last position that a query block sees; -1 where it has no query.
        key_blocks: of a whole page table.
    """

    entries: jax.Array
    count: jax.Array
    reach: jax.Array
    key_blocks: int = dataclasses.field(metadata={"static": True})


def make_steps(positions: jax.Array, window: jax.Array, *, block: int, key_blocks: int) -> Steps:
    """List the needed pairs; a query block without queries has none.

    Args:
        positions: [U, C] int32, of the queries of each block; negative = no query.
        window: () int32; 0 = none.
        block: tokens of a block of keys.
        key_blocks: of a whole page table.
    """
    reach = positions.max(axis=1)
    earliest = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions).min(axis=1)
    first = jnp.where(window > 0, jnp.maximum(earliest - window + 1, 0) // block, 0)
    needed = jnp.where(reach < 0, 0, reach // block + 1 - first)
    ends = jnp.cumsum(needed)
    place = jnp.arange(len(reach) * key_blocks, dtype=jnp.int32)
    unit = jnp.searchsorted(ends, place, side="right", method="compare_all").astype(jnp.int32)
    unit = jnp.minimum(unit, len(reach) - 1)
    within = place - (ends - needed)[unit]
    flags = jnp.where(within == 0, FIRST, 0) | jnp.where(within == needed[unit] - 1, LAST, 0)
    entries = ((unit * key_blocks + first[unit] + within) << FLAGS) | flags
    return Steps(entries, ends[-1], reach, key_blocks)


def unpack(entry: jax.Array, key_blocks: int) -> tuple[jax.Array, jax.Array]:
    """The block of queries and the block of keys of an entry."""
    pair = entry >> FLAGS
    unit = pair // key_blocks
    return unit, pair - unit * key_blocks
