"""Interval attention with the whole [Q, T] mask, in float32. Slow and clear: what every backend is compared with."""

import jax
import jax.numpy as jnp

from jaxrl_kernels.products import product
from jaxrl_kernels.softmax import soft_capped


def interval_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    window: jax.Array,
    first: int | jax.Array,
    scale: float,
    soft_cap: float,
    places: tuple[jax.Array, jax.Array] | None,
    plan: tuple,
) -> tuple[jax.Array, jax.Array]:
    """As the contract says, one line per step; there is no plan."""
    groups = q.shape[2] // k.shape[2]
    k = jnp.repeat(k, groups, axis=2).astype(jnp.float32)
    v = jnp.repeat(v, groups, axis=2).astype(jnp.float32)
    query, key = first + jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None, :]
    distance = query - key
    if places is not None:
        asked, held = places
        distance = asked[:, :, None] - held[:, None, :]
    visible = (key <= query) & (query < end[:, None, :]) & ((window == 0) | (distance < window))  # [B, Q, T]
    visible = visible[:, None]
    scores = product("btnh,bsnh->bnts", q.astype(jnp.float32), k) * scale
    scores = jnp.where(visible, soft_capped(scores, soft_cap), -jnp.inf)
    anything = visible.any(axis=-1, keepdims=True)
    log_total = jax.nn.logsumexp(jnp.where(anything, scores, 0.0), axis=-1, keepdims=True)
    weights = jnp.where(anything, jnp.exp(scores - log_total), 0.0)
    log_total = jnp.where(anything, log_total, -jnp.inf)[..., 0]
    return product("bnts,bsnh->btnh", weights, v).astype(q.dtype), jnp.einsum("bnt->btn", log_total)
