"""Interval attention for Hopper GPUs, in Mosaic GPU: one program a block of queries, or of keys, in both passes.

A program walks along the list that ``tables`` has for its block, so that a pair which is not needed costs nothing, and
one in which all is visible takes no mask. One warpgroup copies the partners into shared memory ahead of the two that
compute, each on half of the block. Online softmax: Milakov and Gimelshein 2018; backward pass: Dao et al. 2022,
algorithm 4, once along the queries for their gradient and once along the keys for theirs; warpgroups that copy while
others compute: Shah et al. 2024.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxrl_kernels.interval_attention.pairs import Blocks
from jaxrl_kernels.interval_attention.plan import blocks_of
from jaxrl_kernels.interval_attention.tables import FULL, Reach, Tables, in_window
from jaxrl_kernels.softmax import MASKED

COMPUTING = 2
"""Warpgroups that compute; one more copies."""
STAGES = 2
"""How many partners are in shared memory at once."""
LOG2_E = math.log2(math.e)

Table = tuple[jax.Array, jax.Array]
"""Entries and spans of one order of a plan, as ``in_window`` gives them."""
Tile = tuple[tuple[int, ...], jnp.dtype]
"""Shape and type."""
Add = Callable[[jax.Array, Sequence, Any], Any]
"""``(step, tiles of the partner, sums)`` -> the sums with it."""
Walk = Callable[[Add, Any], Any]
"""``(add, sums of nothing)`` -> those of all steps."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a kernel is compiled for.

    Attributes:
        blocks: sizes, which are equal; those of ``blocks.HOPPER``, or smaller ones where they are interpreted.
        groups: query heads that share a KV head.
        width: H.
        soft_cap: of the scores; 0 = none.
        interpret: products in registers are taken without wgmma, which no interpreter has.
    """

    blocks: Blocks
    groups: int
    width: int
    soft_cap: float
    interpret: bool

    @property
    def tile(self) -> int:
        """Queries, or keys, of a computing warpgroup; also the partners of a step in the backward pass."""
        return self.blocks.queries // COMPUTING


class Place(NamedTuple):
    """What a warpgroup works at: head, block and row of its program, and where in the row its own tile begins."""

    head: jax.Array
    block: jax.Array
    row: jax.Array
    warpgroup: jax.Array
    begin: jax.Array

    @classmethod
    def here(cls, settings: Settings) -> "Place":
        head, block, row, warpgroup = (jax.lax.axis_index(name) for name in ("head", "block", "row", "warpgroup"))
        return cls(head, block, row, warpgroup, (block * COMPUTING + warpgroup) * settings.tile)


class Barriers(NamedTuple):
    """``own`` tiles of a computing warpgroup have come; a partner is ``here``; its tiles are ``free`` for the next."""

    own: Any
    here: Any
    free: Any


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
    tables: Tables,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As the contract says: what is attended to, and the log-sum-exp of the scores."""
    queries, tokens, blocks = q.shape[1], k.shape[1], tables.blocks
    more_queries = blocks_of(queries, blocks.queries) * blocks.queries - queries
    more_keys = blocks_of(tokens, blocks.keys) * blocks.keys - tokens
    settings = Settings(blocks, q.shape[2] // k.shape[2], q.shape[3], soft_cap, interpret)
    q = jnp.pad((q * scale).astype(q.dtype), ((0, 0), (0, more_queries), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, more_keys), (0, 0), (0, 0))) for x in (k, v))
    if places is None:
        index = jnp.arange(tokens, dtype=jnp.int32)
        places = tuple(jnp.broadcast_to(x, (len(q), len(x))) for x in (first + index[:queries], index))
    asked, held = places
    # Behind the last token its position stands again, which widens the reach of no block.
    held, asked = jnp.pad(held, ((0, 0), (0, more_keys)), "edge"), jnp.pad(asked, ((0, 0), (0, more_queries)), "edge")
    of_queries, of_keys = Reach.of(asked, blocks.queries), Reach.of(held, blocks.keys)
    by_query = in_window(tables.by_query, tables.query_counts, window, of_queries, of_keys, along_queries=True)
    by_key = in_window(tables.by_key, tables.key_counts, window, of_queries, of_keys, along_queries=False)
    masks = jnp.stack([jnp.pad(end, ((0, 0), (0, more_keys))), held], axis=1)
    scalars = jnp.stack([jnp.asarray(first, jnp.int32), window])
    attended, log_total = _attend(settings, q, k, v, masks, asked, scalars, by_query, by_key)
    return attended[:, :queries], log_total[:, :, :queries].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    masks: jax.Array,
    asked: jax.Array,
    scalars: jax.Array,
    by_query: Table,
    by_key: Table,
) -> tuple[jax.Array, jax.Array]:
    """Scaled queries [B, Q, N, H] at positions ``asked`` [B, Q] over keys and values [B, T, K, H] with masks [B, 2, T],
    their ends and positions, and scalars (first query, window), giving [B, Q, N, H] and the log-sum-exp [B, N, Q]; Q
    and T are whole blocks."""
    return _forward(settings, q, k, v, masks, asked, scalars, by_query, by_key)[0]


def _forward(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    masks: jax.Array,
    asked: jax.Array,
    scalars: jax.Array,
    by_query: Table,
    by_key: Table,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    (batch, queries, heads, width), keys, tile = q.shape, settings.blocks.keys, settings.tile
    attended, log_total = _call(
        _forward_kernel,
        settings,
        grid=(heads, queries // settings.blocks.queries, batch),
        outputs=[q, jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)],
        own=[((tile, width), q.dtype), ((tile,), jnp.int32), ((tile,), jnp.float32)],
        loaded=2,
        partners=[((keys, width), k.dtype), ((keys, width), v.dtype), ((2, keys), jnp.int32)],
    )(q, k, v, masks, asked, scalars, *by_query)
    return (attended, log_total), (q, k, v, masks, asked, scalars, by_query, by_key, attended, log_total)


def _backward(settings: Settings, saved: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    q, k, v, masks, asked, scalars, by_query, by_key, attended, log_total = saved
    gradient, log_gradient = gradients
    (batch, queries, heads, width), (_, tokens, kv_heads, _) = q.shape, k.shape
    # The log-sum-exp of a query that sees nothing is minus infinity, whatever its keys are.
    log_gradient = jnp.where(log_total > -jnp.inf, log_gradient, 0.0)
    delta = jnp.einsum("bqnh,bqnh->bnq", gradient, attended, preferred_element_type=jnp.float32) - log_gradient
    statistics = jnp.stack([log_total * LOG2_E, delta], axis=2)
    inputs = (q, k, v, gradient, statistics, masks, asked, scalars)
    tile = settings.tile
    wide, statistic, mask, asked_tile = (
        ((tile, width), q.dtype),
        ((2, tile), jnp.float32),
        ((2, tile), jnp.int32),
        ((tile,), jnp.int32),
    )
    (query_gradient,) = _call(
        _query_kernel,
        settings,
        grid=(heads, queries // settings.blocks.queries, batch),
        outputs=[q],
        own=[wide, wide, statistic, asked_tile],
        loaded=4,
        partners=[wide, wide, mask],
    )(*inputs, *by_query)
    key_gradient, value_gradient = _call(
        _key_kernel,
        settings,
        grid=(kv_heads, tokens // settings.blocks.keys, batch),
        outputs=[k, v],
        own=[wide, wide, mask],
        loaded=3,
        partners=[wide, wide, statistic, asked_tile],
    )(*inputs, *by_key)
    return query_gradient, key_gradient, value_gradient, None, None, None, None, None


_attend.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    settings: Settings,
    *,
    grid: tuple[int, int, int],
    outputs: Sequence[jax.Array | jax.ShapeDtypeStruct],
    own: Sequence[Tile],
    loaded: int,
    partners: Sequence[Tile],
) -> Callable[..., Sequence[jax.Array]]:
    """``kernel`` for every (head, block, row) of the grid.

    Args:
        own: tiles in shared memory that each computing warpgroup has for itself.
        loaded: how many of them are copied from memory.
        partners: tiles of a partner, of which several are held at once.
    """
    return plgpu.kernel(
        functools.partial(kernel, settings),
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        scratch_types=(
            [plgpu.SMEM((COMPUTING, *shape), dtype) for shape, dtype in own],
            [plgpu.SMEM((STAGES, *shape), dtype) for shape, dtype in partners],
            Barriers(
                own=plgpu.Barrier(num_arrivals=loaded, num_barriers=COMPUTING),
                here=plgpu.Barrier(num_arrivals=len(partners), num_barriers=STAGES),
                free=plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=STAGES),
            ),
        ),
        grid=grid,
        grid_names=("head", "block", "row"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        interpret=interpreter() if settings.interpret else None,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name=kernel.__name__.removeprefix("_") + "_of_interval_attention",
    )


def interpreter() -> Any:
    """What has a kernel run without a GPU."""
    from jax._src.pallas.mosaic_gpu.interpret import params  # public only from jax 0.11 on

    return params.InterpretGPUParams()


def _forward_kernel(
    settings: Settings, q, k, v, masks, asked, scalars, listed, spans, attended, log_total, own, partners, barriers
) -> None:
    """A block of queries of a head."""
    at = Place.here(settings)
    q_tile, asked_tile, log_tile = (tiles.at[at.warpgroup] for tiles in own)
    mine, keys = pl.ds(at.begin, settings.tile), settings.blocks.keys

    def sources(step: jax.Array) -> tuple:
        block = pl.ds((listed[at.row, at.block, step] >> 1) * keys, keys)
        kv_head = jax.lax.div(at.head, settings.groups)
        return k.at[at.row, block, kv_head], v.at[at.row, block, kv_head], masks.at[at.row, :, block]

    def compute(walk: Walk) -> None:
        _load(
            barriers.own.at[at.warpgroup], (q.at[at.row, mine, at.head], q_tile), (asked.at[at.row, mine], asked_tile)
        )

        def add(step: jax.Array, tiles: Sequence, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            (k_tile, v_tile, mask), (weighted, top, total) = tiles, sums
            entry = listed[at.row, at.block, step]
            scores = _product(settings, q_tile, k_tile, turned=True)
            scores = _capped(settings, scores) * LOG2_E

            def masked(scores: jax.Array) -> jax.Array:
                places = at.begin, (entry >> 1) * keys
                return _masked(scores, MASKED, 0, places, scalars, mask, asked_tile)

            scores = _unless_full(entry, masked, scores)
            # Rounded, so that weights differ from those of a plain softmax by a power of two, as ``round_up`` says.
            new_top = jnp.maximum(top, jnp.round(scores.max(axis=1)))
            over = jnp.where(new_top > MASKED / 2, new_top, 0.0)  # nothing seen yet: all weights become 0
            weights, shrink = jnp.exp2(scores - _along(over, 0, scores.shape)), jnp.exp2(top - over)
            weighted = weighted * _along(shrink, 0, weighted.shape)
            weighted = _product(settings, weights.astype(v_tile.dtype), v_tile, weighted)
            return weighted, new_top, total * shrink + weights.sum(axis=1)

        nothing = (
            jnp.zeros((settings.tile, settings.width)),
            jnp.full((settings.tile,), MASKED),
            jnp.zeros((settings.tile,)),
        )
        weighted, top, total = walk(add, nothing)
        seen = total > 0
        divisor = jnp.where(seen, total, 1.0)
        q_tile[...] = (weighted / _along(divisor, 0, weighted.shape)).astype(q_tile.dtype)
        log_tile[...] = jnp.where(seen, top / LOG2_E + jnp.log(divisor), -jnp.inf)
        _store((q_tile, attended.at[at.row, mine, at.head]), (log_tile, log_total.at[at.row, at.head, mine]))

    _in_turns(spans.at[at.row, at.block], 1, partners, barriers, sources, compute)


def _query_kernel(
    settings: Settings,
    q,
    k,
    v,
    gradient,
    statistics,
    masks,
    asked,
    scalars,
    listed,
    spans,
    query_gradient,
    own,
    partners,
    barriers,
) -> None:
    """The gradient of a block of queries of a head."""
    at = Place.here(settings)
    q_tile, gradient_tile, statistic, asked_tile = (tiles.at[at.warpgroup] for tiles in own)
    mine = pl.ds(at.begin, settings.tile)

    def partner(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Its entry and first key."""
        entry = listed[at.row, at.block, jax.lax.div(step, COMPUTING)]
        return entry, (entry >> 1) * settings.blocks.keys + jax.lax.rem(step, COMPUTING) * settings.tile

    def sources(step: jax.Array) -> tuple:
        part, kv_head = pl.ds(partner(step)[1], settings.tile), jax.lax.div(at.head, settings.groups)
        return k.at[at.row, part, kv_head], v.at[at.row, part, kv_head], masks.at[at.row, :, part]

    def compute(walk: Walk) -> None:
        _load(
            barriers.own.at[at.warpgroup],
            (q.at[at.row, mine, at.head], q_tile),
            (gradient.at[at.row, mine, at.head], gradient_tile),
            (statistics.at[at.row, at.head, :, mine], statistic),
            (asked.at[at.row, mine], asked_tile),
        )

        def add(step: jax.Array, tiles: Sequence, query_sum: jax.Array) -> jax.Array:
            k_tile, v_tile, mask = tiles
            entry, first = partner(step)

            def masked(weights: jax.Array) -> jax.Array:
                return _masked(weights, 0.0, 0, (at.begin, first), scalars, mask, asked_tile)

            scores = _capped(settings, _product(settings, q_tile, k_tile, turned=True))
            weights = jnp.exp2(scores * LOG2_E - _along(statistic[0], 0, scores.shape))
            slopes = _slopes(settings, scores, _unless_full(entry, masked, weights))
            of_weights = _product(settings, gradient_tile, v_tile, turned=True)
            of_scores = slopes * (of_weights - _along(statistic[1], 0, scores.shape))
            return _product(settings, of_scores.astype(k_tile.dtype), k_tile, query_sum)

        q_tile[...] = walk(add, jnp.zeros((settings.tile, settings.width))).astype(q_tile.dtype)
        _store((q_tile, query_gradient.at[at.row, mine, at.head]))

    _in_turns(spans.at[at.row, at.block], COMPUTING, partners, barriers, sources, compute)


def _key_kernel(
    settings: Settings,
    q,
    k,
    v,
    gradient,
    statistics,
    masks,
    asked,
    scalars,
    listed,
    spans,
    key_gradient,
    value_gradient,
    own,
    partners,
    barriers,
) -> None:
    """The gradients of a block of keys and values of a KV head, summed over the query heads that share it."""
    at = Place.here(settings)
    k_tile, v_tile, mask = (tiles.at[at.warpgroup] for tiles in own)
    mine, steps = pl.ds(at.begin, settings.tile), settings.groups * COMPUTING

    def partner(step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Its entry, query head and first query."""
        entry, place = listed[at.row, at.block, jax.lax.div(step, steps)], jax.lax.rem(step, steps)
        head = at.head * settings.groups + jax.lax.div(place, COMPUTING)
        return entry, head, (entry >> 1) * settings.blocks.queries + jax.lax.rem(place, COMPUTING) * settings.tile

    def sources(step: jax.Array) -> tuple:
        _, head, first = partner(step)
        part = pl.ds(first, settings.tile)
        wide = q.at[at.row, part, head], gradient.at[at.row, part, head]
        return *wide, statistics.at[at.row, head, :, part], asked.at[at.row, part]

    def compute(walk: Walk) -> None:
        _load(
            barriers.own.at[at.warpgroup],
            (k.at[at.row, mine, at.head], k_tile),
            (v.at[at.row, mine, at.head], v_tile),
            (masks.at[at.row, :, mine], mask),
        )

        def add(step: jax.Array, tiles: Sequence, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            (q_tile, gradient_tile, statistic, asked_tile), (key_sum, value_sum) = tiles, sums
            entry, _, first = partner(step)

            def masked(weights: jax.Array) -> jax.Array:
                return _masked(weights, 0.0, 1, (first, at.begin), scalars, mask, asked_tile)

            scores = _capped(settings, _product(settings, k_tile, q_tile, turned=True))
            weights = jnp.exp2(scores * LOG2_E - _along(statistic[0], 1, scores.shape))
            weights = _unless_full(entry, masked, weights)
            slopes = _slopes(settings, scores, weights)
            value_sum = _product(settings, weights.astype(gradient_tile.dtype), gradient_tile, value_sum)
            of_weights = _product(settings, v_tile, gradient_tile, turned=True)
            of_scores = slopes * (of_weights - _along(statistic[1], 1, scores.shape))
            return _product(settings, of_scores.astype(q_tile.dtype), q_tile, key_sum), value_sum

        nothing = jnp.zeros((settings.tile, settings.width)), jnp.zeros((settings.tile, settings.width))
        key_sum, value_sum = walk(add, nothing)
        k_tile[...], v_tile[...] = key_sum.astype(k_tile.dtype), value_sum.astype(v_tile.dtype)
        _store((k_tile, key_gradient.at[at.row, mine, at.head]), (v_tile, value_gradient.at[at.row, mine, at.head]))

    _in_turns(spans.at[at.row, at.block], steps, partners, barriers, sources, compute)


def _in_turns(
    span,
    steps: int,
    partners: Sequence,
    barriers: Barriers,
    sources: Callable[[jax.Array], tuple],
    compute: Callable[[Walk], None],
) -> None:
    """One warpgroup copies what ``sources`` says of each step into the tiles of ``partners``, the others ``compute``.

    Args:
        span: the first entry of the list and the one behind the last.
        steps: of an entry.
        compute: is given what walks along the steps.
    """
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == COMPUTING)
    def _copy() -> None:
        plgpu.set_max_registers(24, action="decrease")
        begin, stop = span[0] * steps, span[1] * steps

        @pl.loop(begin, stop)
        def _step(step: jax.Array) -> None:
            slot = jax.lax.rem(step - begin, STAGES)

            @pl.when(step - begin >= STAGES)
            def _reuse() -> None:
                plgpu.barrier_wait(barriers.free.at[slot])

            for source, tiles in zip(sources(step), partners, strict=True):
                plgpu.copy_gmem_to_smem(source, tiles.at[slot], barriers.here.at[slot])

        @pl.loop(jnp.maximum(begin, stop - STAGES), stop)
        def _drain(step: jax.Array) -> None:
            plgpu.barrier_wait(barriers.free.at[jax.lax.rem(step - begin, STAGES)])

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(240, action="increase")
        begin, stop = span[0] * steps, span[1] * steps

        def walk(add: Add, nothing: Any) -> Any:
            def visit(step: jax.Array, sums: Any) -> Any:
                slot = jax.lax.rem(step - begin, STAGES)
                plgpu.barrier_wait(barriers.here.at[slot])
                sums = add(step, [tiles.at[slot] for tiles in partners], sums)
                plgpu.commit_smem()  # copies go another way than loads and stores; this keeps the two in order
                plgpu.barrier_arrive(barriers.free.at[slot])
                return sums

            return jax.lax.fori_loop(begin, stop, visit, nothing)

        compute(walk)


def _load(barrier, *copies: tuple) -> None:
    """Copy from memory into tiles, and wait for it."""
    for source, tile in copies:
        plgpu.copy_gmem_to_smem(source, tile, barrier)
    plgpu.barrier_wait(barrier)


def _store(*copies: tuple) -> None:
    """Copy tiles into memory, and wait for it."""
    plgpu.commit_smem()
    for tile, target in copies:
        plgpu.copy_smem_to_gmem(tile, target)
    plgpu.wait_smem_to_gmem(0)


def _product(settings: Settings, left, right, total: jax.Array | None = None, *, turned: bool = False) -> jax.Array:
    """``left @ right`` in float32, plus ``total``: ``left`` in registers or shared memory, ``right`` in shared memory.

    Args:
        turned: ``right`` is multiplied along its last axis.
    """
    if settings.interpret:
        axes = (((1,), (1 if turned else 0,)), ((), ()))
        result = jax.lax.dot_general(left[...], right[...], axes, preferred_element_type=jnp.float32)
        return result if total is None else total + result
    right = plgpu.transpose_ref(right, (1, 0)) if turned else right
    if total is not None:
        return pl.run_state(lambda sums: plgpu.wgmma(sums, left, right))(plgpu.ACC.init(total))

    def multiply(sums: jax.Array) -> jax.Array:
        plgpu.wgmma(sums, left, right)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))


def _capped(settings: Settings, scores: jax.Array) -> jax.Array:
    """As ``soft_capped``, by an exponential: of its own tanh a GPU has 11 bits, which decoding would not agree with."""
    cap = settings.soft_cap
    return cap - 2 * cap / (1 + jnp.exp2(scores * (2 * LOG2_E / cap))) if cap else scores


def _slopes(settings: Settings, scores: jax.Array, weights: jax.Array) -> jax.Array:
    """What the gradient of the softmax is multiplied by; made of scores before the next product, to free registers."""
    return weights * (1 - (scores / settings.soft_cap) ** 2) if settings.soft_cap else weights


def _unless_full(entry: jax.Array, masked: Callable[[jax.Array], jax.Array], values: jax.Array) -> jax.Array:
    return jax.lax.cond(entry & FULL != 0, lambda values: values, masked, values)


def _masked(
    values: jax.Array,
    invisible: float,
    query_axis: int,
    places: tuple[jax.Array, jax.Array],
    scalars,
    mask,
    asked_tile,
) -> jax.Array:
    """A block of scores or weights with ``invisible`` where its queries do not see its keys.

    Args:
        query_axis: the one of the queries.
        places: where the queries and the keys begin.
        scalars: first query of all, and window.
        mask: ends and positions [2, S] of the keys, in shared memory.
        asked_tile: positions of the queries, in shared memory.
    """
    shape, key_axis, (first_query, first_key) = values.shape, 1 - query_axis, places
    query = scalars[0] + first_query + jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    key = first_key + jax.lax.broadcasted_iota(jnp.int32, shape, key_axis)
    visible = (key <= query) & (query < _along(mask[0], key_axis, shape))
    values = jnp.where(visible, values, invisible)

    def near(values: jax.Array) -> jax.Array:
        distance = _along(asked_tile[...], query_axis, shape) - _along(mask[1], key_axis, shape)
        return jnp.where(distance < scalars[1], values, invisible)

    # A step of its own, so that ends and positions do not take registers at once.
    return jax.lax.cond(scalars[1] > 0, near, lambda values: values, values)


def _along(values: jax.Array, axis: int, shape: tuple[int, int]) -> jax.Array:
    """Values of one axis of a block."""
    return jax.lax.broadcast_in_dim(values, shape, (axis,))
