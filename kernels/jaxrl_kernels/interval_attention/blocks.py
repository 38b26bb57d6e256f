"""Block sizes of the kernels, by device and head width."""

import warnings

from jaxrl_kernels.interval_attention.pairs import Blocks

LANES = 128
"""Blocks are multiples of a vector register's length."""

TABLE: dict[tuple[str, int], tuple[int, int]] = {
    ("TPU v5 lite", 64): (1024, 512),
    ("TPU v5 lite", 128): (1024, 512),
    ("TPU v5 lite", 256): (512, 512),
    ("TPU v5", 64): (1024, 512),
    ("TPU v5", 128): (1024, 512),
    ("TPU v5", 256): (512, 512),
    ("TPU v6 lite", 64): (1024, 512),
    ("TPU v6 lite", 128): (1024, 512),
    ("TPU v6 lite", 256): (512, 512),
    ("TPU7x", 64): (1024, 512),
    ("TPU7x", 128): (1024, 512),
    ("TPU7x", 256): (512, 512),
}
"""(device kind as jax says it, head width) -> (rows of a block of scores, keys). The rows are the queries of all heads
that share a KV head."""

FALLBACK = (512, 256)
"""For every other device and head width up to 256."""

HOPPER = Blocks(128, 128)
"""Of the kernels for Hopper GPUs. A warpgroup computes half of one: 64 rows, which is what its products take and what
its registers hold."""
HOPPER_WIDTHS = (64, 128)
"""Head widths that these kernels take; the sums of a wider head do not fit into registers."""


def blocks_for(kind: str, head_width: int, groups: int, queries: int, tokens: int) -> Blocks:
    """Sizes for a device and a shape; says once where the table has none.

    Args:
        kind: of the device, as jax says it.
        head_width: H.
        groups: query heads that share a KV head.
        queries: of a row.
        tokens: of a row, which are its keys.
    """
    if (kind, head_width) not in TABLE:
        warnings.warn(
            f"interval attention has no block sizes for head width {head_width} on {kind!r}; takes {FALLBACK} "
            "(rows of scores, keys); `jaxrl bench kernels --tune` measures some for interval_attention/blocks.py",
            stacklevel=2,
        )
    return fitting(*TABLE.get((kind, head_width), FALLBACK), groups, queries, tokens)


def fitting(rows: int, keys: int, groups: int, queries: int, tokens: int) -> Blocks:
    """The largest sizes for a shape of at most so many rows of scores and keys.

    Args:
        rows, keys: as in the table.
        groups: query heads that share a KV head.
        queries: of a row.
        tokens: of a row, which are its keys.
    """
    # A power of two, so that the query of a row of scores is found with a mask of bits.
    share = _power_within(max(LANES, rows // groups))
    keys = max(LANES, min(keys, _power_within(max(1, rows * keys // (share * groups)))))
    return Blocks(min(share, _covering(queries)), min(keys, _covering(tokens)))


def _power_within(count: int) -> int:
    """The largest power of two that is not above it."""
    return 1 << (count.bit_length() - 1)


def _covering(tokens: int) -> int:
    """The smallest power of two of at least a register's length that holds so many."""
    return max(LANES, 1 << (tokens - 1).bit_length())
