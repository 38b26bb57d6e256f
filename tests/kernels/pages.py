"""Pages as cases of paged attention ask for them, and what attention over them is judged by."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels.paged_attention.quantized import LARGEST, Pages, Scaled, floats, quantized
from jaxrl_kernels.products import product
from jaxrl_kernels.softmax import soft_capped


def pages_of(x: np.ndarray, dtype: str) -> Pages:
    """Of this type, with scales if it is a narrow one. What is NaN is so in the numbers too, where they can be."""
    if dtype not in LARGEST:
        return jnp.asarray(x, dtype)
    kept = jax.jit(quantized, static_argnums=1)(x, dtype)
    if dtype == "int8":
        return kept
    return dataclasses.replace(kept, numbers=jnp.where(jnp.isnan(x), jnp.nan, kept.numbers).astype(dtype))


def exactly(x: Pages) -> Pages:
    """Floats in float32; what is scaled the reference dequantises by itself."""
    return x if isinstance(x, Scaled) else x.astype(jnp.float32)


def naive(
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    table: jax.Array,
    positions: jax.Array,
    *,
    window: int = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Attention as one writes it down, its operands and weights in the type of its inputs."""
    rows, _, heads, width = q.shape
    groups, dtype = heads // key_pages.shape[1], q.dtype
    k, v = (jnp.einsum("rmkph->rkmph", floats(pages).astype(dtype)[table]) for pages in (key_pages, value_pages))
    k, v = (x.reshape(rows, heads // groups, -1, width).repeat(groups, axis=1) for x in (k, v))
    held = (jnp.arange(k.shape[2]) <= positions.max(axis=1)[:, None])[:, None, :, None]
    k, v = jnp.where(held, k, 0), jnp.where(held, v, 0)  # what lies behind a row may be NaN
    distance = positions[..., None] - jnp.arange(k.shape[2])
    visible = ((distance >= 0) & (distance < (window or k.shape[2])))[:, None]
    q = (q * (scale or width**-0.5)).astype(dtype)
    scores = soft_capped(product("rcnh,rnsh->rncs", q, k), soft_cap).astype(dtype)
    log_total = jax.nn.logsumexp(jnp.where(visible, scores.astype(jnp.float32), -jnp.inf), axis=-1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(scores - log_total), 0).astype(dtype)
    return product("rncs,rnsh->rcnh", weights, v).astype(dtype), log_total[..., 0].swapaxes(1, 2)


def largest_difference(left: jax.Array, right: jax.Array) -> float:
    """Of numbers; infinities must be in the same places."""
    left, right = (np.asarray(x, np.float32) for x in (left, right))
    np.testing.assert_array_equal(np.isneginf(left), np.isneginf(right))
    return float(np.abs(np.where(np.isneginf(left), 0, left) - np.where(np.isneginf(right), 0, right)).max())
