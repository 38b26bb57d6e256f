"""Interval attention in plain JAX: for every platform, with memory linear in T.

Queries are taken in chunks, each rematerialised in the backward pass, so no more than one [chunk, T] block of scores
exists at a time. Chunks are grouped in a few spans, and a chunk multiplies only with the keys up to the end of its
span: with 8 spans 44 % of the products of the full square, which causality makes useless, are never done.
"""

import functools

import jax
import jax.numpy as jnp

from jaxrl_kernels.softmax import MASKED, round_up

CHUNK = 128
"""Queries whose scores exist at once."""
SPANS = 8
"""Spans of a row with a key range of their own (each is compiled once more)."""


def interval_attention(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, window: jax.Array) -> jax.Array:
    """As the contract says. The gradient of a row that sees nothing is exactly zero."""
    batch, tokens, heads, width = q.shape
    kv_heads = k.shape[2]
    q = (q * width**-0.5).astype(q.dtype).reshape(batch, tokens, kv_heads, heads // kv_heads, width)
    if tokens <= CHUNK:
        return _attend(q, k, v, end, window, jnp.int32(0)).reshape(batch, tokens, heads, width)
    chunks = -(-tokens // CHUNK)
    spans = min(SPANS, chunks)
    q = jnp.pad(q, ((0, 0), (0, chunks * CHUNK - tokens), (0, 0), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(batch, chunks, CHUNK, kv_heads, heads // kv_heads, width), 1, 0)
    outputs = []
    for span in range(spans):
        first, last = span * chunks // spans, (span + 1) * chunks // spans
        reach = min(last * CHUNK, tokens)
        attend = jax.checkpoint(functools.partial(_attend, k=k[:, :reach], v=v[:, :reach], end=end[:, :reach], window=window))
        starts = jnp.arange(first, last, dtype=jnp.int32) * CHUNK
        outputs.append(jax.lax.map(lambda chunk, attend=attend: attend(chunk[0], start=chunk[1]), (q[first:last], starts)))
    output = jnp.moveaxis(jnp.concatenate(outputs), 0, 1)
    return output.reshape(batch, chunks * CHUNK, heads, width)[:, :tokens]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, window: jax.Array, start: jax.Array) -> jax.Array:
    """Scaled queries [B, C, K, G, H], of which the first has index ``start``, over keys [B, S, K, H] from index 0."""
    query = start + jnp.arange(q.shape[1], dtype=jnp.int32)[:, None]
    key = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
    visible = (key <= query) & ((window == 0) | (query - key < window)) & (query < end[:, None, :])  # [B, C, S]
    visible = visible[:, None, None]
    scores = jnp.einsum("bckgh,bskh->bkgcs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores, MASKED)
    top = jax.lax.stop_gradient(round_up(scores.max(axis=-1, keepdims=True)))
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
    total = jnp.einsum("bkgcs->bckg", weights)[..., None]
    output = jnp.einsum("bkgcs,bskh->bckgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (output / jnp.where(total > 0, total, 1.0)).astype(q.dtype)
