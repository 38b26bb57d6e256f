"""Block sizes of the paged kernel: what fits into the vector memory that a TPU of any generation has for a kernel."""

import dataclasses

import jax
import jax.numpy as jnp

LANES = 128
"""Length of a vector register: scores of so many keys stand beside each other."""
TILE_BYTES = 32
"""A column of a tile, so that one of narrower numbers has more rows."""
MOST_KEYS = 512
"""Tokens of a row that are looked at together, at most."""
MOST_ROWS = 256
"""Rows of a block of scores, at most: queries, of all heads that share a KV head."""
BUFFER_BYTES = 1 << 20
"""Of one of the four buffers of keys and values, all KV heads together."""
MOST_SCORES = 1 << 19
"""Scores of a block, all KV heads together; a few arrays of so many 4-byte numbers exist at once."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a call is made for; the package's letters stand beside."""

    rows: int  # R
    count: int  # C
    query_heads: int  # N
    kv_heads: int  # K
    head_width: int  # H
    page: int
    table: int  # M
    query_dtype: str
    page_dtype: str


def shape_of(q: jax.Array, pages: jax.Array, page_table: jax.Array) -> Shape:
    """Of these arguments."""
    types = q.dtype.name, pages.dtype.name
    return Shape(*q.shape[:3], pages.shape[1], q.shape[3], pages.shape[2], page_table.shape[1], *types)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a backend is told beside arrays.

    Attributes:
        scale: of the scores.
        soft_cap: of the scaled scores; 0 = none.
        with_lse: the log-sum-exp is a result, and the other one in float32.
        queries: how many of R * C there are, at most: what an estimate of cost counts.
    """

    scale: float
    soft_cap: float
    with_lse: bool
    queries: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a block of scores of one KV head.

    Attributes:
        queries: of a row, looked at together.
        rows: of scores: the queries of all heads that share a KV head, rounded up to whole tiles.
        pages: of keys, looked at together.
    """

    queries: int
    rows: int
    pages: int


def tile_rows(dtype: str) -> int:
    """Rows of a tile of numbers of this type."""
    return TILE_BYTES // jnp.dtype(dtype).itemsize


def blocks_for(shape: Shape) -> Blocks:
    """Sizes for a shape."""
    groups, tile = shape.query_heads // shape.kv_heads, tile_rows(shape.query_dtype)
    queries = max(1, min(shape.count, MOST_ROWS // groups))
    rows = -(-queries * groups // tile) * tile
    bytes_of_token = shape.kv_heads * shape.head_width * jnp.dtype(shape.page_dtype).itemsize
    keys = MOST_KEYS
    while keys > LANES and (keys * bytes_of_token > BUFFER_BYTES or shape.kv_heads * rows * keys > MOST_SCORES):
        keys //= 2
    return Blocks(queries, rows, min(max(1, keys // shape.page), shape.table))
