"""Which pairs of blocks an interval mask needs, as the flat lists that a kernel's grid walks along.

A list is one int32 a pair, short enough for a chip's scalar memory: row of the batch, block, partner and flags side by
side. A block that needs no partner has one all the same, marked EMPTY, so that its result is written, as zeros.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_kernels.interval_attention.plan import blocks_of

FIRST, LAST, FULL, EMPTY = 1, 2, 4, 8
"""Flags of a pair: its block's first and its last one; every key is visible to every query; none is to any."""
FLAG_BITS = 4


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How many queries of a head, and how many keys, a block of scores has."""

    queries: int
    keys: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """The needed pairs in both orders. The first two axes are 1 and split on a mesh as rows and tokens are.

    Attributes:
        by_query: [1, L] int32; the partners of a block of queries stand together, ascending. The forward pass and the
            gradient of queries sum along it.
        by_key: [1, L] int32; the same pairs by their block of keys, for the gradients of keys and values.
        counts: [1, 2] int32, how many entries of both lists there are.
        blocks: sizes of the blocks.
    """

    by_query: jax.Array
    by_key: jax.Array
    counts: jax.Array
    blocks: Blocks = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Code:
    """Where the parts of an entry stand: row, block and partner above the flags."""

    block_bits: int
    partner_bits: int

    @classmethod
    def of(cls, rows: int, blocks: int, partners: int) -> "Code":
        """For so many of each.

        Raises:
            ValueError: they do not fit into 31 bits.
        """
        code = cls((blocks - 1).bit_length(), (partners - 1).bit_length())
        if (rows - 1).bit_length() + code.block_bits + code.partner_bits + FLAG_BITS > 31:
            raise ValueError(
                f"{rows} rows of {blocks} by {partners} blocks of scores cannot be numbered in 31 bits; "
                "take fewer rows or larger blocks"
            )
        return code

    def pack(self, row: jax.Array, block: jax.Array, partner: jax.Array, flags: jax.Array) -> jax.Array:
        number = (((row << self.block_bits) | block) << self.partner_bits) | partner
        return (number << FLAG_BITS) | flags

    def unpack(self, entry: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(row, block, partner) of an entry, whose flags are its lowest bits."""
        number = entry >> FLAG_BITS
        block = (number >> self.partner_bits) & ((1 << self.block_bits) - 1)
        return number >> (self.block_bits + self.partner_bits), block, number & ((1 << self.partner_bits) - 1)


def make_pairs(end: jax.Array, *, queries: int, first: int | jax.Array, blocks: Blocks, behind: bool = False) -> Pairs:
    """The pairs that an interval mask needs without a window, which only takes pairs away.

    Args:
        end: [B, T] int32, as ``interval_attention`` takes it.
        queries: how many queries there are.
        first: index of the first query.
        blocks: sizes of the blocks.
        behind: the queries may lie behind keys that are not theirs.
    """
    needed, full = relations(end, queries=queries, first=first, blocks=blocks)
    length = longest_list(end.shape[0], queries, end.shape[1], blocks, behind)
    by_query, queries_listed = _listed(needed, full, length)
    by_key, keys_listed = _listed(needed.swapaxes(1, 2), full.swapaxes(1, 2), length)
    return Pairs(by_query[None], by_key[None], jnp.stack([queries_listed, keys_listed])[None], blocks)


def relations(end: jax.Array, *, queries: int, first: int | jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Which pairs of blocks have a visible pair of tokens, and in which all are visible: two [B, I, J] of bools.

    Args:
        end: [B, T] int32, as ``interval_attention`` takes it.
        queries: how many queries there are.
        first: index of the first query.
        blocks: sizes of the blocks.
    """
    query_blocks, key_blocks = blocks_of(queries, blocks.queries), blocks_of(end.shape[1], blocks.keys)
    ends = jnp.pad(end, ((0, 0), (0, key_blocks * blocks.keys - end.shape[1])))
    ends = ends.reshape(-1, 1, key_blocks, blocks.keys)
    first_query = first + jnp.arange(query_blocks, dtype=jnp.int32)[:, None] * blocks.queries
    first_key = jnp.arange(key_blocks, dtype=jnp.int32)[None, :] * blocks.keys
    last_query, last_key = first_query + blocks.queries - 1, first_key + blocks.keys - 1
    needed = (first_key <= last_query) & (first_query < ends.max(axis=3))
    full = (last_key <= first_query) & (last_query < ends.min(axis=3))
    return needed, full & needed


def longest_list(rows: int, queries: int, tokens: int, blocks: Blocks, behind: bool = False) -> int:
    """Entries of the list of a plain causal mask, than which none is longer where no query lies ``behind`` all keys."""
    query_blocks, key_blocks = blocks_of(queries, blocks.queries), blocks_of(tokens, blocks.keys)
    if behind or queries < tokens:  # which of a row's queries there are is not known when the list is made room for
        return rows * query_blocks * key_blocks
    return rows * sum(min(key_blocks, blocks_of((i + 1) * blocks.queries, blocks.keys)) for i in range(query_blocks))


def _listed(needed: jax.Array, full: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The list [length] of what is needed of [B, blocks, partners], and how many entries it has."""
    rows, blocks, partners = needed.shape
    code = Code.of(rows, blocks, partners)
    row, block, partner = (jax.lax.broadcasted_iota(jnp.int32, needed.shape, axis) for axis in range(3))
    listed = needed | ((partner == 0) & ~needed.any(axis=2, keepdims=True))
    begins = jnp.cumsum(listed, axis=2) == 1
    ends = jnp.cumsum(listed[:, :, ::-1], axis=2)[:, :, ::-1] == 1
    flags = jnp.where(begins, FIRST, 0) | jnp.where(ends, LAST, 0)
    flags |= jnp.where(full, FULL, 0) | jnp.where(needed, 0, EMPTY)
    (places,) = jnp.nonzero(listed.reshape(-1), size=length, fill_value=0)
    return code.pack(row, block, partner, flags).reshape(-1)[places], listed.sum(dtype=jnp.int32)
