"""Paged attention in plain JAX: blocks of pages with an online softmax (Milakov and Gimelshein 2018, algorithm 3).

Why a row's bits cannot depend on its neighbours:

* Every row is cut into the same blocks of ``BLOCK`` tokens from position 0, whatever the batch looks like, and its
  scores, sums and products are formed per row and per block; no sum runs over rows.
* The loop runs to the longest row's last block. For a row that ended earlier such a block is an exact no-op: its
  scores are MASKED, so the running maximum stays, the correction is exp(0) = 1, and what is added is exactly 0
  (values that no query of the row sees are replaced by 0 before the product, so stale NaN cannot get in).
* The compiled program is the same for every batch, since only the loop's length is dynamic.

Time is proportional to the longest row present, not to the width of the page table.
"""

import jax
import jax.numpy as jnp

from jaxrl_kernels.paged_attention.blocks import Options
from jaxrl_kernels.paged_attention.quantized import Pages, Scaled
from jaxrl_kernels.products import product
from jaxrl_kernels.softmax import MASKED, round_up, soft_capped

BLOCK = 128
"""Tokens of a row that are looked at together (rounded to whole pages)."""


def paged_attention(
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    page_table: jax.Array,
    positions: jax.Array,
    window: jax.Array,
    options: Options,
    lists: tuple[()],
) -> tuple[jax.Array, jax.Array | None]:
    """As the contract says."""
    rows, count, heads, width = q.shape
    kv_heads, page = key_pages.shape[1:3]
    pages = min(max(1, BLOCK // page), page_table.shape[1])
    block = pages * page
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))
    groups = heads // kv_heads
    q = (q * options.scale).astype(q.dtype).reshape(rows, count, kv_heads, groups, width)
    q = jnp.einsum("rckgh->rkgch", q).reshape(rows, kv_heads, groups * count, width)
    last, pools = positions.max(axis=1), (key_pages, value_pages)

    def look(index: jax.Array, running: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, output = running
        ids = jax.lax.dynamic_slice_in_dim(page_table, index * pages, pages, axis=1)
        key = index * block + jnp.arange(block, dtype=jnp.int32)
        held = (key <= last[:, None])[:, None, :, None]
        parts = jnp.clip(ids, 0, key_pages.shape[0] - 1)[:, None] * kv_heads + jnp.arange(kv_heads)[:, None]

        def gathered(array: jax.Array) -> jax.Array:
            heads = array.reshape(-1, *array.shape[2:]).at[parts].get(mode="promise_in_bounds")
            return heads.reshape(rows, kv_heads, block, *array.shape[3:])

        k, v = (jax.tree.map(gathered, pool) for pool in pools)
        k, key_scales = _apart(k, q.dtype)
        v, value_scales = _apart(v, q.dtype)
        v = jnp.where(held, v, 0)
        query = positions[:, None, None, :, None]
        visible = (key <= query) & ((window == 0) | (query - key < window))  # [R, 1, 1, C, S]
        scores = product("rkmh,rksh->rkms", q, k)
        if key_scales is not None:
            scores *= key_scales[:, :, None]
        scores = soft_capped(scores, options.soft_cap)
        scores = jnp.where(visible, scores.reshape(rows, kv_heads, groups, count, block), MASKED)
        new_top = jnp.maximum(top, round_up(scores.max(axis=-1)))
        weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
        correction = jnp.exp(top - new_top)
        merged = weights.reshape(rows, kv_heads, groups * count, block)
        if value_scales is not None:
            merged *= jnp.where(held[..., 0], value_scales, 0)[:, :, None]
        attended = product("rkms,rksh->rkmh", merged.astype(v.dtype), v).reshape(output.shape)
        return new_top, total * correction + weights.sum(axis=-1), output * correction[..., None] + attended

    shape = (rows, kv_heads, groups, count)
    start = (round_up(jnp.full(shape, MASKED)), jnp.zeros(shape), jnp.zeros((*shape, width)))
    blocks = (last.max() + block) // block
    top, total, output = jax.lax.fori_loop(0, blocks, look, start)
    divisor = jnp.where(total > 0, total, 1.0)
    output = jnp.einsum("rkgch->rckgh", output / divisor[..., None]).reshape(rows, count, heads, width)
    if not options.with_lse:
        return output.astype(q.dtype), None
    log_total = jnp.where(total > 0, top + jnp.log(divisor), -jnp.inf)
    return output, jnp.einsum("rkgc->rckg", log_total).reshape(rows, count, heads)


def _apart(pages: Pages, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Numbers to multiply, and what their products are to be multiplied by. ``dtype`` holds narrow numbers exactly."""
    return (pages.numbers.astype(dtype), pages.scales) if isinstance(pages, Scaled) else (pages, None)
