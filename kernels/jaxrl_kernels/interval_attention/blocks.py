"""Block sizes of the kernels, by device and head width."""

from jaxrl_kernels.block_sizes import Key, Sizes, sizes_for
from jaxrl_kernels.interval_attention.pairs import Blocks

LANES = 128
"""Blocks are multiples of a vector register's length."""

FALLBACK = Sizes(512, 256)
"""For every device and head width up to 256 that the table does not have."""

HOPPER = Blocks(128, 128)
"""Of the kernels for Hopper GPUs. A warpgroup computes half of one: 64 rows, which is what its products take and what
its registers hold."""
HOPPER_WIDTHS = (64, 128)
"""Head widths that these kernels take; the sums of a wider head do not fit into registers."""


def blocks_for(kind: str, head_width: int, groups: int, queries: int, tokens: int) -> Blocks:
    """Sizes for a device and a shape, from the table where it has some.

    Args:
        kind: of the device, as jax says it.
        head_width: H.
        groups: query heads that share a KV head.
        queries: of a row.
        tokens: of a row, which are its keys.
    """
    sizes = sizes_for(Key("interval_attention", kind, head_width), FALLBACK)
    return fitting(sizes, groups, queries, tokens)


def fitting(most: Sizes, groups: int, queries: int, tokens: int) -> Blocks:
    """The largest sizes for a shape of at most so many rows of scores and keys.

    Args:
        most: as in the table.
        groups: query heads that share a KV head.
        queries: of a row.
        tokens: of a row, which are its keys.
    """
    # A power of two, so that the query of a row of scores is found with a mask of bits.
    share = _power_within(max(LANES, most.rows // groups))
    keys = max(LANES, min(most.keys, _power_within(max(1, most.rows * most.keys // (share * groups)))))
    return Blocks(min(share, _covering(queries)), min(keys, _covering(tokens)))


def _power_within(count: int) -> int:
    """The largest power of two that is not above it."""
    return 1 << (count.bit_length() - 1)


def _covering(tokens: int) -> int:
    """The smallest power of two of at least a register's length that holds so many."""
    return max(LANES, 1 << (tokens - 1).bit_length())
