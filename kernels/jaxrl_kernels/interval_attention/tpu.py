"""Interval attention for TPUs, in Mosaic: one grid step a needed pair of blocks, in both passes.

The grid walks along the lists of ``pairs``, so that a pair that is not needed costs nothing, and one in which all is
visible takes no mask. A block of scores is transposed: keys on sublanes, and on lanes the queries of all heads that
share the KV head. What belongs to a query (largest score, sum of weights) is then one row of lanes, and every product
but two takes its operands as they lie. Online softmax: Milakov and Gimelshein 2018; backward pass: Dao et al. 2022,
algorithm 4, once along the queries for their gradient and once along the keys for theirs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels.interval_attention.blocks import LANES
from jaxrl_kernels.interval_attention.pairs import EMPTY, FIRST, FULL, LAST, Blocks, Code, Pairs
from jaxrl_kernels.interval_attention.plan import blocks_of
from jaxrl_kernels.products import precision_of
from jaxrl_kernels.softmax import MASKED, round_up, soft_capped


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a kernel is compiled for: shapes, and what is known of the scores.

    Attributes:
        blocks: sizes.
        batch, kv_heads, groups, width: B, K, G and H.
        query_blocks, key_blocks: how many there are in a row of the batch.
        soft_cap: of the scores; 0 = none.
        by_position: a window counts by position, not by index.
        interpret: run without a TPU, slowly.
    """

    blocks: Blocks
    batch: int
    kv_heads: int
    groups: int
    width: int
    query_blocks: int
    key_blocks: int
    soft_cap: float
    by_position: bool
    interpret: bool

    @property
    def rows(self) -> int:
        """Queries of a block of scores, those of all heads that share a KV head."""
        return self.groups * self.blocks.queries

    def code(self, along_queries: bool) -> Code:
        """Of the entries of one of the two lists."""
        blocks, partners = (self.query_blocks, self.key_blocks)[:: 1 if along_queries else -1]
        return Code.of(self.batch, blocks, partners)


class Pair(NamedTuple):
    """One entry of a list, unpacked."""

    row: jax.Array
    query_block: jax.Array
    key_block: jax.Array


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
    pairs: Pairs,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As the contract says: what is attended to, and the log-sum-exp of the scores."""
    batch, queries, heads, width = q.shape
    kv_heads, blocks = k.shape[2], pairs.blocks
    query_blocks, key_blocks = blocks_of(queries, blocks.queries), blocks_of(k.shape[1], blocks.keys)
    settings = Settings(
        blocks=blocks,
        batch=batch,
        kv_heads=kv_heads,
        groups=heads // kv_heads,
        width=width,
        query_blocks=query_blocks,
        key_blocks=key_blocks,
        soft_cap=soft_cap,
        by_position=places is not None,
        interpret=interpret,
    )
    fill = ((0, 0), (0, query_blocks * blocks.queries - queries), (0, 0), (0, 0))
    q = jnp.pad((q * scale).astype(q.dtype), fill)
    q = q.reshape(batch, query_blocks, blocks.queries, kv_heads, settings.groups, width)
    q = jnp.einsum("bnckgh->bkhngc", q).reshape(batch, kv_heads, width, -1)
    fill = ((0, 0), (0, key_blocks * blocks.keys - k.shape[1]))
    k, v = (jnp.einsum("btkh->bkth", jnp.pad(x, (*fill, (0, 0), (0, 0)))) for x in (k, v))
    if places is None:
        index = jnp.arange(end.shape[1], dtype=jnp.int32)
        places = tuple(jnp.broadcast_to(x, (batch, len(x))) for x in (first + index[:queries], index))
    asked, held = places
    asked = jnp.pad(asked, ((0, 0), (0, query_blocks * blocks.queries - queries)))
    asked = jnp.tile(asked.reshape(batch, query_blocks, 1, blocks.queries), (1, 1, settings.groups, 1))
    masks = jnp.stack([jnp.pad(end, fill), jnp.pad(held, fill)], axis=1)
    scalars = jnp.stack([jnp.asarray(first, jnp.int32), window])
    attended, log_total = _attend(settings, q, k, v, masks, asked.reshape(batch, 1, -1), scalars, pairs)

    def by_query(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, kv_heads, -1, query_blocks, settings.groups, blocks.queries)
        return jnp.einsum("bkhngc->bnckgh", x).reshape(batch, -1, heads, x.shape[2])[:, :queries]

    return by_query(attended), by_query(log_total)[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    masks: jax.Array,
    asked: jax.Array,
    scalars: jax.Array,
    pairs: Pairs,
) -> tuple[jax.Array, jax.Array]:
    """Scaled queries [B, K, H, X] at positions ``asked`` [B, 1, X] over keys and values [B, K, T, H] with masks
    [B, 2, T], their ends and positions, and scalars (first query, window), giving [B, K, H, X] and the log-sum-exp
    [B, K, 1, X]; X is blocks of queries, heads, queries of a block."""
    return _forward(settings, q, k, v, masks, asked, scalars, pairs)[0]


def _forward(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    masks: jax.Array,
    asked: jax.Array,
    scalars: jax.Array,
    pairs: Pairs,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    at = Places(settings, along_queries=True)
    wide, statistic = at.queries(settings.width), at.queries(1)
    attended, log_total = _call(
        _forward_kernel,
        settings,
        (pairs.by_query[0], scalars, pairs.counts[0, 0]),
        inputs=[
            (q, wide),
            (k, at.keys()),
            (v.swapaxes(2, 3), at.keys_last()),
            (masks, at.masks()),
            (asked, at.asked()),
        ],
        outputs=[
            (jax.ShapeDtypeStruct(q.shape, q.dtype), wide),
            (jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[3]), jnp.float32), statistic),
        ],
        sums=[(settings.width, settings.rows), (1, settings.rows), (1, settings.rows)],
        products=2,
    )
    return (attended, log_total), (q, k, v, masks, asked, scalars, pairs, attended, log_total)


def _backward(settings: Settings, saved: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    q, k, v, masks, asked, scalars, pairs, attended, log_total = saved
    gradient, log_gradient = gradients
    # The log-sum-exp of a query that sees nothing is minus infinity, whatever its keys are.
    log_gradient = jnp.where(log_total > -jnp.inf, log_gradient, 0.0)
    delta = jnp.sum(gradient.astype(jnp.float32) * attended.astype(jnp.float32), axis=2, keepdims=True) - log_gradient

    def inputs(at: Places) -> list[tuple[jax.Array, pl.BlockSpec]]:
        wide, statistic, keys = at.queries(settings.width), at.queries(1), at.keys()
        given = [(q, wide), (k, keys), (v, keys), (gradient, wide), (log_total, statistic), (delta, statistic)]
        return [*given, (masks, at.masks()), (asked, at.asked())]

    at = Places(settings, along_queries=True)
    (query_gradient,) = _call(
        _query_kernel,
        settings,
        (pairs.by_query[0], scalars, pairs.counts[0, 0]),
        inputs=[*inputs(at), (k.swapaxes(2, 3), at.keys_last())],
        outputs=[(jax.ShapeDtypeStruct(q.shape, q.dtype), at.queries(settings.width))],
        sums=[(settings.width, settings.rows)],
        products=3,
    )
    at = Places(settings, along_queries=False)
    key_gradient, value_gradient = _call(
        _key_kernel,
        settings,
        (pairs.by_key[0], scalars, pairs.counts[0, 1]),
        inputs=inputs(at),
        outputs=[(jax.ShapeDtypeStruct(x.shape, x.dtype), at.keys()) for x in (k, v)],
        sums=[(settings.blocks.keys, settings.width)] * 2,
        products=4,
    )
    return query_gradient, key_gradient, value_gradient, None, None, None, None


_attend.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a grid step (KV head, place in the list) finds its blocks."""

    settings: Settings
    along_queries: bool

    def pair(self, entry: jax.Array) -> Pair:
        row, block, partner = self.settings.code(self.along_queries).unpack(entry)
        return Pair(row, block, partner) if self.along_queries else Pair(row, partner, block)

    def queries(self, depth: int) -> pl.BlockSpec:
        """Of [B, K, depth, X]."""
        return self._spec((1, 1, depth, self.settings.rows), lambda head, pair: (pair.row, head, 0, pair.query_block))

    def keys(self) -> pl.BlockSpec:
        """Of [B, K, T, H]."""
        shape = (1, 1, self.settings.blocks.keys, self.settings.width)
        return self._spec(shape, lambda head, pair: (pair.row, head, pair.key_block, 0))

    def keys_last(self) -> pl.BlockSpec:
        """Of [B, K, H, T]."""
        shape = (1, 1, self.settings.width, self.settings.blocks.keys)
        return self._spec(shape, lambda head, pair: (pair.row, head, 0, pair.key_block))

    def masks(self) -> pl.BlockSpec:
        """Of [B, 2, T]."""
        return self._spec((1, 2, self.settings.blocks.keys), lambda head, pair: (pair.row, 0, pair.key_block))

    def asked(self) -> pl.BlockSpec:
        """Of [B, 1, X]."""
        return self._spec((1, 1, self.settings.rows), lambda head, pair: (pair.row, 0, pair.query_block))

    def _spec(self, shape: tuple[int, ...], index: Callable[[jax.Array, Pair], tuple]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda head, place, listed, scalars: index(head, self.pair(listed[place])))


def _call(
    kernel: Callable[..., None],
    settings: Settings,
    listed: tuple[jax.Array, jax.Array, jax.Array],
    *,
    inputs: Sequence[tuple[jax.Array, pl.BlockSpec]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    sums: Sequence[tuple[int, ...]],
    products: int,
) -> Sequence[jax.Array]:
    """Run ``kernel`` for every KV head along a list (its entries, the scalars, its length).

    Args:
        sums: shapes of the float32 sums that stay from one grid step to the next.
        products: matrix products of a block of scores, for the estimate of cost: half of all blocks.
    """
    entries, scalars, count = listed
    scores = settings.batch * settings.kv_heads * settings.query_blocks * settings.rows
    scores = scores * settings.key_blocks * settings.blocks.keys // 2
    moved = sum(x.size * x.dtype.itemsize for x, _ in (*inputs, *outputs))
    return pl.pallas_call(
        functools.partial(kernel, settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(settings.kv_heads, count),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
        ),
        out_shape=[shape for shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * settings.width, transcendentals=scores, bytes_accessed=moved
        ),
        interpret=settings.interpret,
        name=kernel.__name__.removeprefix("_") + "_of_interval_attention",
    )(entries, scalars, *(x for x, _ in inputs))


def _forward_kernel(
    settings: Settings, listed, scalars, q, k, values, masks, asked, attended, log_total, *sums
) -> None:
    """One pair: refs of q [H, M], k [S, H], values [H, S], masks [2, S], asked [1, M], results
    [H, M] and [1, M], and the running sums."""
    weighted, top, total = sums
    entry = listed[pl.program_id(1)]

    @pl.when(entry & FIRST != 0)
    def _begin() -> None:
        weighted[...] = jnp.zeros_like(weighted)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    def add(visible: Callable[[], jax.Array] | None) -> None:
        scores = soft_capped(_product(k[0, 0], q[0, 0], 1, 0), settings.soft_cap)
        if visible is not None:
            scores = jnp.where(visible(), scores, MASKED)
        new_top = jnp.maximum(top[...], round_up(scores.max(axis=0, keepdims=True)))
        over = jnp.where(new_top > MASKED / 2, new_top, 0.0)  # nothing seen yet: all weights become exp(MASKED) = 0
        weights, shrink = jnp.exp(scores - over), jnp.exp(top[...] - over)
        total[...] = shrink * total[...] + weights.sum(axis=0, keepdims=True)
        weighted[...] = shrink * weighted[...] + _product(values[0, 0], weights.astype(values.dtype), 1, 0)
        top[...] = new_top

    _if_needed(settings, Places(settings, along_queries=True), entry, scalars, masks, asked, add)

    @pl.when(entry & LAST != 0)
    def _finish() -> None:
        seen = total[...] > 0
        divisor = jnp.where(seen, total[...], 1.0)
        attended[0, 0] = (weighted[...] / divisor).astype(attended.dtype)
        log_total[0, 0] = jnp.where(seen, top[...] + jnp.log(divisor), -jnp.inf)


def _query_kernel(
    settings: Settings,
    listed,
    scalars,
    q,
    k,
    v,
    gradient,
    log_total,
    delta,
    masks,
    asked,
    keys_last,
    query_gradient,
    query_sum,
) -> None:
    """One pair: refs of q and gradient [H, M], k and v [S, H], log_total and delta [1, M], keys_last [H, S]."""
    entry = listed[pl.program_id(1)]

    @pl.when(entry & FIRST != 0)
    def _begin() -> None:
        query_sum[...] = jnp.zeros_like(query_sum)

    def add(visible: Callable[[], jax.Array] | None) -> None:
        _, score_gradient = _differentiated(settings, q, k, v, gradient, log_total, delta, visible)
        query_sum[...] += _product(keys_last[0, 0], score_gradient.astype(keys_last.dtype), 1, 0)

    _if_needed(settings, Places(settings, along_queries=True), entry, scalars, masks, asked, add)

    @pl.when(entry & LAST != 0)
    def _finish() -> None:
        query_gradient[0, 0] = query_sum[...].astype(query_gradient.dtype)


def _key_kernel(
    settings: Settings,
    listed,
    scalars,
    q,
    k,
    v,
    gradient,
    log_total,
    delta,
    masks,
    asked,
    key_gradient,
    value_gradient,
    *sums,
) -> None:
    """One pair: refs as those of the query kernel; the results are [S, H]."""
    key_sum, value_sum = sums
    entry = listed[pl.program_id(1)]

    @pl.when(entry & FIRST != 0)
    def _begin() -> None:
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)

    def add(visible: Callable[[], jax.Array] | None) -> None:
        weights, score_gradient = _differentiated(settings, q, k, v, gradient, log_total, delta, visible)
        value_sum[...] += _product(weights.astype(gradient.dtype), gradient[0, 0], 1, 1)
        key_sum[...] += _product(score_gradient.astype(q.dtype), q[0, 0], 1, 1)

    _if_needed(settings, Places(settings, along_queries=False), entry, scalars, masks, asked, add)

    @pl.when(entry & LAST != 0)
    def _finish() -> None:
        key_gradient[0, 0] = key_sum[...].astype(key_gradient.dtype)
        value_gradient[0, 0] = value_sum[...].astype(value_gradient.dtype)


def _differentiated(
    settings: Settings, q, k, v, gradient, log_total, delta, visible: Callable[[], jax.Array] | None
) -> tuple[jax.Array, jax.Array]:
    """Weights of a pair [S, M], from the saved log-sum-exp, and the gradient of its scores."""
    scores = soft_capped(_product(k[0, 0], q[0, 0], 1, 0), settings.soft_cap)
    weights = jnp.exp(scores - log_total[0, 0])
    if visible is not None:
        weights = jnp.where(visible(), weights, 0.0)
    score_gradient = weights * (_product(v[0, 0], gradient[0, 0], 1, 0) - delta[0, 0])
    if settings.soft_cap:
        score_gradient *= 1 - (scores / settings.soft_cap) ** 2
    return weights, score_gradient


def _if_needed(
    settings: Settings,
    places: Places,
    entry: jax.Array,
    scalars,
    masks,
    asked,
    add: Callable[[Callable[[], jax.Array] | None], None],
) -> None:
    """Run ``add`` on a pair in which something is visible: with None if all is, otherwise with what makes the mask."""
    pair, (first, window) = places.pair(entry), (scalars[0], scalars[1])
    first_query = first + pair.query_block * settings.blocks.queries
    first_key = pair.key_block * settings.blocks.keys
    last_query, last_key = first_query + settings.blocks.queries - 1, first_key + settings.blocks.keys - 1
    needed, full = entry & EMPTY == 0, entry & FULL != 0
    if settings.by_position:  # indices do not tell what lies in a window
        full &= window == 0
    else:
        needed &= (window == 0) | (first_query - last_key < window)
        full &= (window == 0) | (last_query - first_key < window)

    @pl.when(needed & full)
    def _unmasked() -> None:
        add(None)

    @pl.when(needed & ~full)
    def _masked() -> None:
        add(lambda: _visible(settings, first_query, first_key, window, masks[0], asked[0]))


def _visible(
    settings: Settings,
    first_query: jax.Array,
    first_key: jax.Array,
    window: jax.Array,
    masks: jax.Array,
    asked: jax.Array,
) -> jax.Array:
    """[S, M]: which keys the queries at positions ``asked`` [1, M] see, by masks [2, S]."""
    shape = (settings.blocks.keys, settings.rows)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    query = first_query + (lane & (settings.blocks.queries - 1))
    key = first_key + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    end, held = (_along_sublanes(settings, masks[row : row + 1]) for row in range(2))
    return (key <= query) & (query < end) & ((window == 0) | (asked - held < window))


def _along_sublanes(settings: Settings, row: jax.Array) -> jax.Array:
    """A row [1, S] of numbers of keys as [S, M]."""
    lanes = min(LANES, settings.rows)
    column = jnp.broadcast_to(row, (lanes, settings.blocks.keys)).T
    return jnp.tile(column, (1, settings.rows // lanes))


def _product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """A matrix product over these axes, in float32."""
    return jax.lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=precision_of(left.dtype),
        preferred_element_type=jnp.float32,
    )
