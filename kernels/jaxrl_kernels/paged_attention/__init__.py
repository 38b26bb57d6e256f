"""Attention of new tokens over the KV pages of their row: decoding (C = 1) and chunked prefill (C > 1).

Token p of a row has its key and value at ``pages[page_table[row, p // page], p % page]``.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_kernels.paged_attention import reference, xla

Implementation = Literal["auto", "xla", "reference"]


def paged_attention(
    q: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    *,
    window: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Attend, softmax in float32; the new tokens' own keys are already in the pages.

    A row's result depends, bit for bit, on that row's queries, positions and visible keys and values only: not on the
    other rows, on which slot it is in, on which pages hold its tokens, or on how far other rows reach. What lies in
    pages beyond a query's position, NaN included, has no influence.

    Args:
        q: [R, C, N, H] queries.
        key_pages: [P, page, K, H].
        value_pages: [P, page, K, H].
        page_table: [R, M] int32, the pages of each row in order; entries beyond the row's length may hold anything.
        positions: [R, C] int32, position of each query in its row; it sees the tokens at 0 ... position. Negative means
            there is no token: the result is zeros.
        window: a query also needs ``position - key position < window``; 0 = no window. An int or a traced int32.
        scale: of the scores; ``H ** -0.5`` when None.
        soft_cap: scaled scores become ``soft_cap * tanh(score / soft_cap)``; 0 = they stay.
        implementation: "xla" is plain JAX, its time proportional to the longest row; "reference" gathers whole tables.

    Returns:
        [R, C, N, H] in q's type.

    Raises:
        ValueError: shapes do not fit together, or the implementation is unknown.
    """
    rows, count, heads, width = q.shape
    if key_pages.shape != value_pages.shape or key_pages.shape[3] != width or heads % key_pages.shape[2]:
        raise ValueError(
            f"q {q.shape} [R, C, N, H] needs key and value pages of one shape [P, page, K, H] with K dividing N; "
            f"got {key_pages.shape}, {value_pages.shape}"
        )
    if page_table.shape[0] != rows or positions.shape != (rows, count):
        raise ValueError(
            f"q {q.shape} needs a page table [{rows}, M] and positions [{rows}, {count}]; "
            f"got {page_table.shape}, {positions.shape}"
        )
    window = jnp.asarray(window, jnp.int32)
    scale = width**-0.5 if scale is None else scale
    arrays = (q, key_pages, value_pages, page_table, positions, window)
    match implementation:
        case "auto" | "xla":
            return xla.paged_attention(*arrays, scale, soft_cap)
        case "reference":
            return reference.paged_attention(*arrays, scale, soft_cap)
    raise ValueError(f"implementation={implementation!r} is unknown; choose auto, xla or reference")
