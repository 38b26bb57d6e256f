"""Interval attention in plain JAX: for every platform, with memory linear in T in both directions.

Queries are taken in chunks, so no more than one [chunk, T] block of scores exists at a time; the backward pass computes
each block again from the saved log-sum-exp (Dao et al. 2022, algorithm 4). Chunks are grouped in a few spans, and a
chunk multiplies only with the keys up to the end of its span: with 8 spans 44 % of the products of the full square,
which causality makes useless, are never done. Queries whose first index is traced have one span with all keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels.products import product
from jaxrl_kernels.softmax import MASKED, round_up, soft_capped

CHUNK = 256
"""Queries whose scores exist at once."""
SPANS = 8
"""Spans of a row with a key range of their own (each is compiled once more)."""


def interval_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    window: jax.Array,
    first: int | jax.Array,
    scale: float,
    soft_cap: float,
) -> jax.Array:
    """As the contract says. The gradient of a row that sees nothing is exactly zero."""
    batch, tokens, heads, width = q.shape
    split = not isinstance(first, int) or first > 0
    kv_heads, chunk = k.shape[2], min(CHUNK, tokens)
    chunks = -(-tokens // chunk)
    fill = ((0, 0), (0, chunks * chunk - tokens))
    q = (q * scale).astype(q.dtype).reshape(batch, tokens, kv_heads, heads // kv_heads, width)
    q = jnp.pad(q, (*fill, (0, 0), (0, 0), (0, 0)))
    q = jnp.einsum("bnckgh->nbkgch", q.reshape(batch, chunks, chunk, kv_heads, heads // kv_heads, width))
    fill = ((0, 0), (0, max(0, chunks * chunk - k.shape[1])))
    k = jnp.einsum("bskh->bksh", jnp.pad(k, (*fill, (0, 0), (0, 0))))
    v = jnp.einsum("bskh->bksh", jnp.pad(v, (*fill, (0, 0), (0, 0))))
    attended = _attend(soft_cap, split, q, k, v, jnp.pad(end, fill), window, jnp.asarray(first, jnp.int32))
    output = jnp.einsum("nbkgch->bnckgh", attended)
    return output.reshape(batch, chunks * chunk, heads, width)[:, :tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    soft_cap: float,
    split: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    window: jax.Array,
    first: jax.Array,
) -> jax.Array:
    """Chunks of scaled queries [n, B, K, G, C, H] over keys and values [B, K, S, H], giving [n, B, K, G, C, H].

    ``split``: the queries are not those of a whole row from its first token on.
    """
    return _forward(soft_cap, split, q, k, v, end, window, first)[0]


def _forward(
    soft_cap: float,
    split: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    window: jax.Array,
    first: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    pieces = []
    for chunks, reach in _spans(q, k, split):
        attend = functools.partial(_attend_chunk, soft_cap, k[:, :, :reach], v[:, :, :reach], end[:, :reach], window)
        pieces.append(jax.lax.map(attend, (first + chunks * q.shape[4], q[chunks])))
    output, log_total = jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)
    return output, (q, k, v, end, window, first, output, log_total)


def _attend_chunk(
    soft_cap: float,
    keys: jax.Array,
    values: jax.Array,
    end: jax.Array,
    window: jax.Array,
    chunk: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of one chunk, given its first index and its queries."""
    start, query = chunk
    visible = _visible(start, query.shape[3], end, window)
    scores = soft_capped(_over_heads("bkmh,bksh->bkms", query, keys), soft_cap)
    scores = jnp.where(visible, scores, MASKED)
    top = round_up(scores.max(axis=-1, keepdims=True))
    top = jnp.where(top > MASKED / 2, top, 0.0)  # a row that sees nothing: every weight becomes exp(MASKED) = 0
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    output = _over_heads("bkms,bksh->bkmh", weights.astype(values.dtype), values)
    total = jnp.where(total > 0, total, 1.0)
    return (output / total).astype(query.dtype), top + jnp.log(total)


def _backward(
    soft_cap: float, split: bool, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array | None, ...]:
    q, k, v, end, window, first, output, log_total = saved
    delta = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1, keepdims=True)
    sums = (jnp.zeros((*k.shape[:2], 0, k.shape[3]), jnp.float32),) * 2
    query_gradients = []
    for chunks, reach in _spans(q, k, split):
        # Each span goes on with the sums of the shorter ones: a slice updated in place inside shard_map crashes the
        # compiler of jaxlib 0.11 for CPUs.
        sums = tuple(jnp.pad(x, ((0, 0), (0, 0), (0, reach - x.shape[2]), (0, 0))) for x in sums)
        differentiate = functools.partial(
            _differentiate_chunk, soft_cap, k[:, :, :reach], v[:, :, :reach], end[:, :reach], window
        )
        pieces = (first + chunks * q.shape[4], q[chunks], log_total[chunks], delta[chunks], gradient[chunks])
        sums, query_gradient = jax.lax.scan(differentiate, sums, pieces)
        query_gradients.append(query_gradient)
    return jnp.concatenate(query_gradients), sums[0].astype(k.dtype), sums[1].astype(v.dtype), None, None, None


def _differentiate_chunk(
    soft_cap: float,
    keys: jax.Array,
    values: jax.Array,
    end: jax.Array,
    window: jax.Array,
    sums: tuple[jax.Array, jax.Array],
    chunk: tuple[jax.Array, ...],
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Adds one chunk's share to the sums of key and value gradients; gives its query gradient."""
    start, query, log_total, delta, gradient = chunk
    visible = _visible(start, query.shape[3], end, window)
    scores = soft_capped(_over_heads("bkmh,bksh->bkms", query, keys), soft_cap)
    weights = jnp.exp(jnp.where(visible, scores, MASKED) - log_total)
    weight_gradient = _over_heads("bkmh,bksh->bkms", gradient, values)
    score_gradient = weights * (weight_gradient - delta)
    if soft_cap:
        score_gradient *= 1 - (scores / soft_cap) ** 2
    score_gradient = score_gradient.astype(query.dtype)
    key_sum = sums[0] + _over_queries(score_gradient, query)
    value_sum = sums[1] + _over_queries(weights.astype(gradient.dtype), gradient)
    return (key_sum, value_sum), _over_heads("bkms,bksh->bkmh", score_gradient, keys).astype(query.dtype)


_attend.defvjp(_forward, _backward)


def _spans(q: jax.Array, k: jax.Array, split: bool) -> list[tuple[np.ndarray, int]]:
    """Indices of the chunks of each span, and how many keys they reach over."""
    if split:
        return [(np.arange(q.shape[0], dtype=np.int32), k.shape[2])]
    groups = np.array_split(np.arange(q.shape[0], dtype=np.int32), min(SPANS, q.shape[0]))
    return [(group, (int(group[-1]) + 1) * q.shape[4]) for group in groups]


def _visible(start: jax.Array, count: int, end: jax.Array, window: jax.Array) -> jax.Array:
    """[B, 1, 1, C, S]: which keys the queries ``start ... start + count - 1`` see."""
    query = start + jnp.arange(count, dtype=jnp.int32)[:, None]
    key = jnp.arange(end.shape[1], dtype=jnp.int32)[None, :]
    visible = (key <= query) & ((window == 0) | (query - key < window)) & (query < end[:, None, :])
    return visible[:, None, None]


def _over_heads(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product of [B, K, G, C, x] with [B, K, S, H] in float32; G and C are one axis, which XLA multiplies faster."""
    batch, kv_heads, groups, count = left.shape[:4]
    merged = left.reshape(batch, kv_heads, groups * count, left.shape[4])
    result = product(equation, merged, right)
    return result.reshape(batch, kv_heads, groups, count, result.shape[3])


def _over_queries(left: jax.Array, right: jax.Array) -> jax.Array:
    """The sum over queries [B, K, S, H] of [B, K, G, C, S] times [B, K, G, C, H]."""
    batch, kv_heads, groups, count = left.shape[:4]
    merged = [x.reshape(batch, kv_heads, groups * count, x.shape[4]) for x in (left, right)]
    return product("bkms,bkmh->bksh", *merged)
