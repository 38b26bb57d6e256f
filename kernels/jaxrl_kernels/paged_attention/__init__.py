"""Attention of new tokens over the KV pages of their row: decoding (C = 1) and chunked prefill (C > 1).

Token p of a row has its key and value at ``pages[page_table[row, p // page], :, p % page]``: a page holds one KV head
after the other, so that a head's part of it lies in one piece.
"""

import jax
import jax.numpy as jnp

from jaxrl_kernels.paged_attention.backends import BACKENDS, Implementation, chosen
from jaxrl_kernels.paged_attention.blocks import Options, shape_of


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
    pages beyond the last position of a row's queries, NaN included, has no influence; what lies between a query's
    position and that one, or before its window, has none as long as the values are finite.

    Args:
        q: [R, C, N, H] queries.
        key_pages: [P, K, page, H].
        value_pages: [P, K, page, H].
        page_table: [R, M] int32, the pages of each row in order; entries beyond the row's length may hold anything.
        positions: [R, C] int32, position of each query in its row; it sees the tokens at 0 ... position. Negative means
            there is no token: the result is zeros. Rows may have different numbers of tokens: decoding and prefill
            go together in one call.
        window: a query also needs ``position - key position < window``; 0 = no window. An int or a traced int32.
        scale: of the scores; ``H ** -0.5`` when None.
        soft_cap: scaled scores become ``soft_cap * tanh(score / soft_cap)``; 0 = they stay.
        implementation: "xla" is plain JAX, its time proportional to the longest row; "tpu" the kernel for TPUs, its
            time proportional to the tokens that are seen; "tpu_interpreted" that one without a TPU, slowly;
            "reference" gathers whole tables; "auto" picks by the devices (``docs/kernels.md``).

    Returns:
        [R, C, N, H] in q's type.

    Raises:
        ValueError: shapes do not fit together, or the implementation is unknown or cannot be had.
    """
    arrays = (q, key_pages, value_pages, page_table, positions)
    options = {"window": window, "scale": scale, "soft_cap": soft_cap, "implementation": implementation}
    return _attend(*arrays, **options, queries=None, with_lse=False)[0]


def paged_attention_with_lse(
    q: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    *,
    window: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    queries: int | None = None,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """``paged_attention``, and the log-sum-exp of each query's scores, by which parts of a row can be joined.

    ``queries`` is how many of R * C there are, at most, where positions leave most of them out: estimates of cost count
    them, and nothing else does.

    Returns:
        ([R, C, N, H], [R, C, N] and minus infinity where there is no token), both in float32: what is joined is rounded
        once, and not part by part.
    """
    arrays = (q, key_pages, value_pages, page_table, positions)
    options = {"window": window, "scale": scale, "soft_cap": soft_cap, "implementation": implementation}
    output, log_total = _attend(*arrays, **options, queries=queries, with_lse=True)
    assert log_total is not None
    return output, log_total


def _attend(
    q: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    *,
    window: int | jax.Array,
    scale: float | None,
    soft_cap: float,
    implementation: Implementation,
    queries: int | None,
    with_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    rows, count, heads, width = q.shape
    if key_pages.shape != value_pages.shape or key_pages.shape[3] != width or heads % key_pages.shape[1]:
        raise ValueError(
            f"q {q.shape} [R, C, N, H] needs key and value pages of one shape [P, K, page, H] with K dividing N; "
            f"got {key_pages.shape}, {value_pages.shape}"
        )
    if page_table.shape[0] != rows or positions.shape != (rows, count):
        raise ValueError(
            f"q {q.shape} needs a page table [{rows}, M] and positions [{rows}, {count}]; "
            f"got {page_table.shape}, {positions.shape}"
        )
    attend = BACKENDS[chosen(implementation, shape_of(q, key_pages, page_table))].attend
    scale, queries = width**-0.5 if scale is None else scale, rows * count if queries is None else queries
    window = jnp.asarray(window, jnp.int32)
    return attend(q, key_pages, value_pages, page_table, positions, window, Options(scale, soft_cap, with_lse, queries))
