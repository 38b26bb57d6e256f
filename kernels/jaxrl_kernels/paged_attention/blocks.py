"""Block sizes of the paged kernel: what fits into the vector memory that a TPU of any generation has for a kernel."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_kernels.block_sizes import Key, Sizes, sizes_for
from jaxrl_kernels.paged_attention.quantized import Pages, token_bytes

LANES = 128
"""Length of a vector register: scores of so many keys stand beside each other."""
TILE_BYTES = 32
"""A column of a tile, so that one of narrower numbers has more rows."""
FALLBACK = Sizes(256, 512)
"""For devices, head widths and pages that the table does not have."""
PAGE_BYTES = 4 << 20
"""Of the four buffers of keys and values, at most, where one page of each is no more than that."""
VECTOR_BYTES = 14 << 20
"""Of what a kernel holds, as ``vector_bytes`` counts it; a compiler gives it 16 MiB on the chip that has least."""


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

    @property
    def token_bytes(self) -> int:
        """Of the key and the value of a token."""
        return token_bytes(self.kv_heads, self.head_width, self.page_dtype)


def shape_of(q: jax.Array, pages: Pages, page_table: jax.Array) -> Shape:
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


def blocks_for(kind: str, shape: Shape) -> Blocks:
    """Sizes for a device of this kind and a shape, from the table where it has some, as far as they fit."""
    return fitting(shape, sizes_for(Key("paged_attention", kind, shape.head_width, shape.page), FALLBACK))


def fitting(shape: Shape, most: Sizes) -> Blocks:
    """The largest sizes for a shape of at most so many rows of scores and keys whose buffers fit into the vector
    memory, or the smallest ones if none do."""
    groups, tile = shape.query_heads // shape.kv_heads, tile_rows(shape.query_dtype)

    def sized(queries: int, keys: int) -> Blocks:
        rows = -(-queries * groups // tile) * tile
        return Blocks(queries, rows, min(max(1, keys // shape.page), shape.table))

    queries, keys = max(1, min(shape.count, most.rows // groups)), most.keys
    while keys > LANES and page_bytes(shape, sized(queries, keys)) > PAGE_BYTES:
        keys //= 2
    while vector_bytes(shape, sized(queries, keys)) > VECTOR_BYTES and (queries > 1 or keys > shape.page):
        # A register's length of keys costs no more time than fewer of them.
        if keys > LANES or queries == 1:
            keys //= 2
        else:
            queries = -(-queries // 2)
    return sized(queries, keys)


def page_bytes(shape: Shape, blocks: Blocks) -> int:
    """Of the buffers of pages, two of keys and two of values."""
    return 2 * blocks.pages * shape.page * shape.token_bytes


def vector_bytes(shape: Shape, blocks: Blocks) -> int:
    """Of all that the kernel holds in vector memory, with the log-sum-exp among its results: buffers of pages, two of
    queries, their positions and each result, the sums, and a block of scores. A column of numbers takes a register's
    length for each of them."""
    query, number = jnp.dtype(shape.query_dtype).itemsize, 4
    keys = -(-blocks.pages * shape.page // LANES) * LANES
    of_row = 2 * shape.head_width * (query + number) + 2 * LANES * number  # queries and results
    of_row += shape.head_width * number + 2 * LANES * number  # sums
    of_row += keys * number  # scores
    return page_bytes(shape, blocks) + blocks.rows * (shape.kv_heads * of_row + 2 * LANES * number)
