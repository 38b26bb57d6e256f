"""Which blocks of pages the blocks of queries need: a list that a kernel walks along, one grid step an entry."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl_kernels.interval_attention.plan import blocks_of
from jaxrl_kernels.paged_attention.blocks import Blocks, Shape

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lists:
    """What a kernel is told of where queries are; no layer differs in it but by its window.

    Attributes:
        asked: [U, rows of a block, 1] int32, position of the query of each row of scores; -1 = none.
        windows: () int32 each; a window that is none of them takes the first one's list, which must then be 0's.
        steps: of each window.
        blocks: sizes.
    """

    asked: jax.Array
    windows: tuple[jax.Array, ...]
    steps: tuple[Steps, ...]
    blocks: Blocks = dataclasses.field(metadata={"static": True})

    def steps_of(self, window: jax.Array) -> Steps:
        """The list for a layer's window."""
        chosen = self.steps[0]
        for one, steps in zip(self.windows[1:], self.steps[1:], strict=True):
            chosen = jax.tree.map(lambda own, other, one=one: jnp.where(window == one, own, other), steps, chosen)
        return chosen


def make_lists(positions: jax.Array, windows: Sequence[int | jax.Array], shape: Shape, blocks: Blocks) -> Lists:
    """Cut the queries of every row into blocks, and list the steps of each window.

    Args:
        positions: [R, C] int32, as ``paged_attention`` takes them.
        windows: as in ``Lists``.
        shape: of the call.
        blocks: sizes.
    """
    query_blocks, groups = blocks_of(shape.count, blocks.queries), shape.query_heads // shape.kv_heads
    fill = query_blocks * blocks.queries - shape.count
    asked = jnp.pad(positions, ((0, 0), (0, fill)), constant_values=-1)
    asked = asked.reshape(shape.rows * query_blocks, blocks.queries)
    keys, key_blocks = blocks.pages * shape.page, blocks_of(shape.table, blocks.pages)
    windows = tuple(jnp.asarray(window, jnp.int32) for window in windows)
    steps = tuple(make_steps(asked, window, block=keys, key_blocks=key_blocks) for window in windows)
    unused = blocks.rows - blocks.queries * groups
    asked = jnp.pad(asked.repeat(groups, axis=1), ((0, 0), (0, unused)), constant_values=-1)[..., None]
    return Lists(asked, windows, steps, blocks)


def unpack(entry: jax.Array, key_blocks: int) -> tuple[jax.Array, jax.Array]:
    """The block of queries and the block of keys of an entry."""
    pair = entry >> FLAGS
    unit = pair // key_blocks
    return unit, pair - unit * key_blocks
