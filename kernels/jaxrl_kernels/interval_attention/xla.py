"""Interval attention in plain JAX: for every platform, with memory linear in T in both directions.

One block of scores exists at a time. A block of queries visits the blocks of keys that its plan lists and no others,
with an online softmax (Milakov and Gimelshein, 2018); the backward pass visits the same blocks and computes each again
from the saved log-sum-exp (Dao et al. 2022, algorithm 4).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_kernels.interval_attention.plan import KeyBlocks, block_of, blocks_of
from jaxrl_kernels.products import product
from jaxrl_kernels.softmax import MASKED, round_up, soft_capped

Places = tuple[jax.Array, jax.Array]
"""Positions of the blocks of queries [n, B, C] and of keys [m, B, S]."""


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
    plan: KeyBlocks,
) -> tuple[jax.Array, jax.Array]:
    """As the contract says: what is attended to, and the log-sum-exp of the scores."""
    mask = _blocks_of_mask(k.shape[1], q.shape[1], end, window, first, places, plan)
    attended, log_total = _attend(soft_cap, *_blocks(q, k, v, scale), *mask)
    return _of_queries(attended, q.shape[1]), _of_queries(log_total, q.shape[1])[..., 0]


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    window: jax.Array,
    first: int | jax.Array,
    scale: float,
    soft_cap: float,
    places: tuple[jax.Array, jax.Array] | None,
    plan: KeyBlocks,
    results: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of q, k and v, from what ``interval_attention`` gave for them and the gradient of what is attended to."""
    blocks, pull = jax.vjp(functools.partial(_blocks, scale=scale), q, k, v)
    mask = _blocks_of_mask(k.shape[1], q.shape[1], end, window, first, places, plan)
    attended, log_total, gradient = (
        _query_blocks(x, k.shape[2], block_of(k.shape[1])) for x in (results[0], results[1][..., None], gradient)
    )
    saved = (*blocks, *mask, attended, log_total)
    return pull(_backward(soft_cap, saved, (gradient, jnp.zeros_like(log_total)))[:3])


def _blocks(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> tuple[jax.Array, ...]:
    """Queries, scaled, [n, B, K, G, C, H] and keys and values [m, B, K, S, H]."""
    block = block_of(k.shape[1])
    return _query_blocks((q * scale).astype(q.dtype), k.shape[2], block), *(_key_blocks(x, block) for x in (k, v))


def _query_blocks(x: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """[B, Q, N, x] as [n, B, K, G, C, x]; zeros behind the last query."""
    batch, queries, heads, width = x.shape
    count = blocks_of(queries, block)
    x = jnp.pad(x, ((0, 0), (0, count * block - queries), (0, 0), (0, 0)))
    return jnp.einsum("bnckgh->nbkgch", x.reshape(batch, count, block, kv_heads, heads // kv_heads, width))


def _key_blocks(x: jax.Array, block: int) -> jax.Array:
    """[B, T, K, H] as [m, B, K, S, H]; zeros behind the last key."""
    batch, tokens, kv_heads, width = x.shape
    count = blocks_of(tokens, block)
    x = jnp.pad(x, ((0, 0), (0, count * block - tokens), (0, 0), (0, 0)))
    return jnp.einsum("bnskh->nbksh", x.reshape(batch, count, block, kv_heads, width))


def _of_queries(blocks: jax.Array, queries: int) -> jax.Array:
    """[n, B, K, G, C, x] as [B, Q, N, x]."""
    count, batch, kv_heads, groups, block, width = blocks.shape
    rows = jnp.einsum("nbkgch->bnckgh", blocks).reshape(batch, count * block, kv_heads * groups, width)
    return rows[:, :queries]


def _blocks_of_mask(
    tokens: int,
    queries: int,
    end: jax.Array,
    window: jax.Array,
    first: int | jax.Array,
    places: tuple[jax.Array, jax.Array] | None,
    plan: KeyBlocks,
) -> tuple:
    """What ``_attend`` takes of the mask."""
    block = block_of(tokens)
    query_blocks, key_blocks = blocks_of(queries, block), blocks_of(tokens, block)
    ends = jnp.pad(end, ((0, 0), (0, key_blocks * block - tokens))).reshape(-1, key_blocks, block)
    if places is not None:
        asked, held = places
        places = _blocks_of_places(asked, query_blocks, block), _blocks_of_places(held, key_blocks, block)
    return jnp.einsum("bns->nbs", ends), window, jnp.asarray(first, jnp.int32), places, plan


def _blocks_of_places(positions: jax.Array, count: int, block: int) -> jax.Array:
    """[B, T] positions as [count, B, block]; behind them the last again, which hides no block from its queries."""
    fill = ((0, 0), (0, count * block - positions.shape[1]))
    return jnp.einsum("bns->nbs", jnp.pad(positions, fill, mode="edge").reshape(-1, count, block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    soft_cap: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ends: jax.Array,
    window: jax.Array,
    first: jax.Array,
    places: Places | None,
    plan: KeyBlocks,
) -> tuple[jax.Array, jax.Array]:
    """Blocks of scaled queries [n, B, K, G, C, H] over blocks of keys and values [m, B, K, S, H], ends [m, B, S],
    giving [n, B, K, G, C, H] and the log-sum-exp [n, B, K, G, C, 1], minus infinity for a query that sees nothing."""
    return _forward(soft_cap, q, k, v, ends, window, first, places, plan)[0]


def _forward(
    soft_cap: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ends: jax.Array,
    window: jax.Array,
    first: jax.Array,
    places: Places | None,
    plan: KeyBlocks,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    def attend_block(nothing: tuple, block: tuple[jax.Array, ...]) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        query, start, listed, visits, asked = block

        def visit(index: int | jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            keys, values = _at(k, index), _at(v, index)
            visible = _visible(start, index, query, ends, window, asked, places)
            scores = jnp.where(visible, soft_capped(_over_heads("bkmh,bksh->bkms", query, keys), soft_cap), MASKED)
            return _added(state, scores, values)

        count = query.shape[:4]
        empty = jnp.zeros(query.shape, jnp.float32), jnp.full((*count, 1), MASKED), jnp.zeros((*count, 1))
        output, top, total = _visited(visit, empty, listed, visits)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        return nothing, ((output / total).astype(query.dtype), jnp.where(seen, top + jnp.log(total), -jnp.inf))

    pieces = (q, *_visits(q, k, window, first, places, plan))
    _, (output, log_total) = _scanned(attend_block, (), pieces)
    return (output, log_total), (q, k, v, ends, window, first, places, plan, output, log_total)


def _added(state: tuple[jax.Array, ...], scores: jax.Array, values: jax.Array) -> tuple[jax.Array, ...]:
    """The online softmax with one more block: sums of weighted values and of weights, over exp(top)."""
    output, top, total = state
    new_top = jnp.maximum(top, round_up(scores.max(axis=-1, keepdims=True)))
    over = jnp.where(new_top > MASKED / 2, new_top, 0.0)  # nothing seen yet: every weight becomes exp(MASKED) = 0
    weights, shrink = jnp.exp(scores - over), jnp.exp(top - over)
    attended = _over_heads("bkms,bksh->bkmh", weights.astype(values.dtype), values)
    return shrink * output + attended, new_top, shrink * total + weights.sum(axis=-1, keepdims=True)


def _backward(soft_cap: float, saved: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array | None, ...]:
    q, k, v, ends, window, first, places, plan, output, log_total = saved
    gradient, log_gradient = gradients
    seen = log_total > -jnp.inf
    log_total = jnp.where(seen, log_total, 0.0)
    delta = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1, keepdims=True)
    delta -= jnp.where(seen, log_gradient, 0.0)

    def differentiate_block(
        sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        query, log_total, delta, gradient, start, listed, visits, asked = block

        def visit(index: int | jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            keys, values = _at(k, index), _at(v, index)
            visible = _visible(start, index, query, ends, window, asked, places)
            scores = soft_capped(_over_heads("bkmh,bksh->bkms", query, keys), soft_cap)
            weights = jnp.exp(jnp.where(visible, scores, MASKED) - log_total)
            score_gradient = weights * (_over_heads("bkmh,bksh->bkms", gradient, values) - delta)
            if soft_cap:
                score_gradient *= 1 - (scores / soft_cap) ** 2
            score_gradient = score_gradient.astype(query.dtype)
            query_sum, key_sum, value_sum = state
            return (
                query_sum + _over_heads("bkms,bksh->bkmh", score_gradient, keys),
                _add_at(key_sum, index, _over_queries(score_gradient, query)),
                _add_at(value_sum, index, _over_queries(weights.astype(gradient.dtype), gradient)),
            )

        empty = jnp.zeros(query.shape, jnp.float32)
        query_sum, *sums = _visited(visit, (empty, *sums), listed, visits)
        return tuple(sums), query_sum.astype(query.dtype)

    pieces = (q, log_total, delta, gradient, *_visits(q, k, window, first, places, plan))
    nothing = jnp.zeros(k.shape, jnp.float32)
    (key_sum, value_sum), query_gradient = _scanned(differentiate_block, (nothing, nothing), pieces)
    return query_gradient, key_sum.astype(k.dtype), value_sum.astype(v.dtype), None, None, None, None, None


_attend.defvjp(_forward, _backward)


def _visits(
    q: jax.Array, k: jax.Array, window: jax.Array, first: jax.Array, places: Places | None, plan: KeyBlocks
) -> tuple[jax.Array | None, ...]:
    """Of each block of queries: its first index, its list of key blocks, the span [2] of the list to be visited, and
    the positions of the queries if they have any."""
    (keys,), (counts,) = plan
    block = k.shape[3]
    start = first + jnp.arange(q.shape[0], dtype=jnp.int32) * block
    listed = jnp.arange(keys.shape[1]) < counts[:, None]
    asked, last = start[:, None], (keys + 1) * block - 1  # least position of the queries, largest of each key block
    if places is not None:
        asked, last = places[0].min(axis=(1, 2))[:, None], places[1].max(axis=(1, 2))[keys]
    too_early = listed & (window > 0) & (asked - last >= window)
    skipped = jnp.cumprod(too_early, axis=1).sum(axis=1, dtype=jnp.int32)  # the list is visited from somewhere on
    return start, keys, jnp.stack([skipped, counts], axis=1), None if places is None else places[0]


def _visited(visit: Callable, state: tuple, listed: jax.Array, visits: jax.Array) -> tuple[jax.Array, ...]:
    """What ``visit`` makes of the state with every listed block of keys; short rows have one, and need no loop."""
    if listed.shape[0] == 1:
        return visit(0, state)
    return jax.lax.fori_loop(visits[0], visits[1], lambda position, state: visit(listed[position], state), state)


def _scanned(step: Callable, state: tuple, blocks: tuple[jax.Array, ...]) -> tuple:
    """``jax.lax.scan`` over the blocks of queries; short rows have one, and need no loop."""
    if blocks[0].shape[0] > 1:
        return jax.lax.scan(step, state, blocks)
    state, result = step(state, jax.tree.map(lambda block: block[0], blocks))
    return state, jax.tree.map(lambda x: x[None], result)


def _at(blocks: jax.Array, index: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(blocks, index, keepdims=False)


def _add_at(blocks: jax.Array, index: int | jax.Array, more: jax.Array) -> jax.Array:
    if blocks.shape[0] == 1:
        return blocks + more
    return jax.lax.dynamic_update_index_in_dim(blocks, _at(blocks, index) + more, index, 0)


def _visible(
    start: jax.Array,
    index: int | jax.Array,
    query: jax.Array,
    ends: jax.Array,
    window: jax.Array,
    asked: jax.Array | None,
    places: Places | None,
) -> jax.Array:
    """[B, 1, 1, C, S]: which keys of block ``index`` the queries from ``start`` on see, at positions ``asked``."""
    queries = start + jnp.arange(query.shape[3], dtype=jnp.int32)[:, None]
    keys = index * ends.shape[2] + jnp.arange(ends.shape[2], dtype=jnp.int32)[None, :]
    distance = queries - keys
    if places is not None:
        distance = asked[:, :, None] - _at(places[1], index)[:, None, :]
    in_window = (window == 0) | (distance < window)
    return ((keys <= queries) & in_window & (queries < _at(ends, index)[:, None, :]))[:, None, None]


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
