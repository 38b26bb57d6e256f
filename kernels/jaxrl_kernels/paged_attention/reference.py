"""Paged attention by gathering every row's whole table, in float32. Slow and clear."""

import jax
import jax.numpy as jnp

from jaxrl_kernels.paged_attention.blocks import Options
from jaxrl_kernels.paged_attention.quantized import Pages, floats
from jaxrl_kernels.products import product
from jaxrl_kernels.softmax import soft_capped


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
    """As the contract says, one line per step."""
    rows, width = q.shape[0], q.shape[3]
    kv_heads, page = key_pages.shape[1:3]
    groups = q.shape[2] // kv_heads
    reach = page_table.shape[1] * page
    k, v = (jnp.einsum("rmkph->rmpkh", floats(pages)[page_table]) for pages in (key_pages, value_pages))
    k, v = (x.reshape(rows, reach, kv_heads, width).repeat(groups, axis=2).astype(jnp.float32) for x in (k, v))
    query, key = positions[:, :, None], jnp.arange(reach)[None, None, :]
    visible = (key <= query) & ((window == 0) | (query - key < window))  # [R, C, S]
    seen = visible.any(axis=1)[:, :, None, None]
    k, v = jnp.where(seen, k, 0.0), jnp.where(seen, v, 0.0)
    scores = product("rcnh,rsnh->rncs", q.astype(jnp.float32), k) * options.scale
    scores = jnp.where(visible[:, None], soft_capped(scores, options.soft_cap), -jnp.inf)
    anything = visible.any(axis=-1)[:, None, :, None]
    weights = jnp.where(anything, jax.nn.softmax(jnp.where(anything, scores, 0.0), axis=-1), 0.0)
    output = product("rncs,rsnh->rcnh", weights, v)
    if not options.with_lse:
        return output.astype(q.dtype), None
    return output, jnp.einsum("rnc->rcn", jax.nn.logsumexp(scores, axis=-1))
