"""Paged attention for TPUs, in Mosaic: one grid step a block of queries and a block of pages that it needs.

The pages stay in the chip's main memory. While one block of them is multiplied, those of the next step are copied,
page by page as the page table says, into the other one of two buffers: also where the next step belongs to another row,
so that short rows wait for no copy of their own. A step has all KV heads, since a page has them. Online softmax:
Milakov and Gimelshein 2018.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels.choice import device_kind
from jaxrl_kernels.interval_attention.plan import blocks_of
from jaxrl_kernels.paged_attention.blocks import Blocks, Options, Shape, blocks_for, shape_of
from jaxrl_kernels.paged_attention.quantized import Pages, is_narrow
from jaxrl_kernels.paged_attention.steps import FIRST, LAST, Lists, make_lists, unpack
from jaxrl_kernels.products import precision_of
from jaxrl_kernels.softmax import MASKED, round_up, soft_capped

COUNT, WINDOW = range(2)
"""Places of the scalars that a kernel is given beside its lists."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the kernel is compiled for.

    Attributes:
        shape: of the call.
        blocks: sizes.
        options: of the scores and the results.
    """

    shape: Shape
    blocks: Blocks
    options: Options

    @property
    def keys(self) -> int:
        """Tokens of a block of pages."""
        return self.blocks.pages * self.shape.page

    @property
    def query_blocks(self) -> int:
        """Blocks of the queries of a row."""
        return blocks_of(self.shape.count, self.blocks.queries)

    @property
    def key_blocks(self) -> int:
        """Blocks of a row's page table."""
        return blocks_of(self.shape.table, self.blocks.pages)


def longest_list(shape: Shape) -> int:
    """Entries of the list of steps for which the kernel for this shape has to have room."""
    blocks = blocks_for(device_kind(), shape)
    return shape.rows * blocks_of(shape.count, blocks.queries) * blocks_of(shape.table, blocks.pages)


def lists_for(positions: jax.Array, windows: Sequence[int | jax.Array], shape: Shape) -> Lists:
    """The lists of a call, in blocks that its shape gets."""
    return make_lists(positions, windows, shape, blocks_for(device_kind(), shape))


def paged_attention(
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    page_table: jax.Array,
    positions: jax.Array,
    window: jax.Array,
    options: Options,
    lists: Lists,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """As the contract says."""
    rows, count, heads, width = q.shape
    shape, kv_heads = shape_of(q, key_pages, page_table), key_pages.shape[1]
    settings, steps = Settings(shape, lists.blocks, options), lists.steps_of(window)
    blocks, groups = settings.blocks, heads // kv_heads
    fill = settings.query_blocks * blocks.queries - count
    units, used = rows * settings.query_blocks, blocks.queries * groups
    q = jnp.pad((q * options.scale).astype(q.dtype), ((0, 0), (0, fill), (0, 0), (0, 0)))
    q = jnp.einsum("uckgh->ukcgh", q.reshape(units, blocks.queries, kv_heads, groups, width))
    q = q.reshape(units, kv_heads, used, width)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, blocks.rows - used), (0, 0)))
    scalars = jnp.stack([steps.count, window])
    results = _call(
        settings, interpret, steps.entries, scalars, steps.reach, page_table, q, lists.asked, key_pages, value_pages
    )

    def by_query(x: jax.Array) -> jax.Array:
        x = x[:, :, :used].reshape(rows, settings.query_blocks, kv_heads, blocks.queries, groups, x.shape[3])
        return jnp.einsum("rnkcgh->rnckgh", x).reshape(rows, -1, heads, x.shape[5])[:, :count]

    there = (positions >= 0)[:, :, None]
    attended = jnp.where(there[..., None], by_query(results[0]), 0)
    return attended, jnp.where(there, by_query(results[1])[..., 0], -jnp.inf) if options.with_lse else None


def _call(
    settings: Settings,
    interpret: bool,
    entries: jax.Array,
    scalars: jax.Array,
    reach: jax.Array,
    page_table: jax.Array,
    q: jax.Array,
    asked: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
) -> list[jax.Array]:
    """Run the kernel on queries [U, K, M, H] at positions [U, M, 1], giving [U, K, M, H] and, if it is asked for, the
    log-sum-exp [U, K, M, 1]; blocks of queries that have no step are not written."""
    units, kv_heads, rows, width = q.shape
    held, pools = settings.keys, jax.tree.leaves((key_pages, value_pages))

    def of_unit(*lengths: int) -> pl.BlockSpec:
        def index(step: jax.Array, entries: jax.Array, *_: jax.Array) -> tuple:
            return (unpack(entries[step], settings.key_blocks)[0], *[0] * len(lengths))

        return pl.BlockSpec((1, *lengths), index)

    out_shapes = [jax.ShapeDtypeStruct(q.shape, jnp.float32 if settings.options.with_lse else q.dtype)]
    out_specs = [of_unit(kv_heads, rows, width)]
    if settings.options.with_lse:
        out_shapes.append(jax.ShapeDtypeStruct((units, kv_heads, rows, 1), jnp.float32))
        out_specs.append(of_unit(kv_heads, rows, 1))
    # As if every query saw half of a table, and its row had no other one.
    seen = settings.options.queries * settings.key_blocks * held // 2
    scores, read = seen * settings.shape.query_heads, seen * settings.shape.token_bytes
    return pl.pallas_call(
        functools.partial(_kernel, settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(scalars[COUNT],),
            in_specs=[
                of_unit(kv_heads, rows, width),
                of_unit(rows, 1),
                *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(pools),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                *(pltpu.VMEM((2, kv_heads, held, *pool.shape[3:]), pool.dtype) for pool in pools),
                pltpu.SemaphoreType.DMA((2, len(pools))),
                pltpu.VMEM((kv_heads, rows, width), jnp.float32),
                pltpu.VMEM((kv_heads, rows, 1), jnp.float32),
                pltpu.VMEM((kv_heads, rows, 1), jnp.float32),
            ],
        ),
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(flops=4 * scores * width, transcendentals=scores, bytes_accessed=read),
        interpret=interpret,
        name="paged_attention",
    )(entries, scalars, reach, page_table.reshape(-1), q, asked, *pools)


def _kernel(settings: Settings, entries, scalars, reach, table, q, asked, *pages_results_and_scratch) -> None:
    """One step: refs of the lists in scalar memory, q [1, K, M, H], asked [1, M, 1], all pages, the results, buffers of
    them and who has arrived there, and the running sums. There are keys and values, and behind each its scales if it is
    narrow; their buffers are [2, K, S, H] and [2, K, S]."""
    narrow, results = is_narrow(settings.shape.page_dtype), 2 if settings.options.with_lse else 1
    refs, pools = list(pages_results_and_scratch), 4 if narrow else 2
    pages, (attended, *log_total) = refs[:pools], refs[pools : pools + results]
    *held, arrived, weighted, top, total = refs[pools + results :]
    (keys, *key_scales), (values, *value_scales) = held[: pools // 2], held[pools // 2 :]
    step = pl.program_id(0)
    entry, buffer = entries[step], jax.lax.rem(step, 2)
    unit, block = unpack(entry, settings.key_blocks)
    copy = functools.partial(_copies, settings, entries, reach, table, pages, held, arrived)

    @pl.when(step == 0)
    def _start_own() -> None:
        copy(step, lambda one: one.start())

    @pl.when(step + 1 < scalars[COUNT])
    def _start_next() -> None:
        copy(step + 1, lambda one: one.start())

    @pl.when(entry & FIRST != 0)
    def _begin() -> None:
        weighted[...] = jnp.zeros_like(weighted)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    copy(step, lambda one: one.wait())
    first, last = block * settings.keys, reach[unit]

    @pl.when(first + settings.keys > last + 1)
    def _clear_tail() -> None:  # what was not copied may be anything, and 0 * NaN is no 0
        for one in value_scales if values.dtype == jnp.int8 else (values, *value_scales):  # no int8 is NaN
            place = first + jax.lax.broadcasted_iota(jnp.int32, one.shape[1:], 1)
            kept = jnp.where(place <= last, one[buffer].astype(jnp.float32), 0.0)
            one[buffer] = kept.astype(one.dtype)

    def numbers(pool) -> jax.Array:
        return pool[buffer].astype(q.dtype) if narrow else pool[buffer]

    scores = _product(q[0], numbers(keys), 2)
    for scales in key_scales:
        scores *= scales[buffer][:, None]
    scores = soft_capped(scores, settings.options.soft_cap)
    key = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    query, window = asked[...], scalars[WINDOW]  # [1, M, 1]
    scores = jnp.where((key <= query) & ((window == 0) | (query - key < window)), scores, MASKED)
    new_top = jnp.maximum(top[...], round_up(scores.max(axis=2, keepdims=True)))
    over = jnp.where(new_top > MASKED / 2, new_top, 0.0)  # nothing seen yet: all weights become exp(MASKED) = 0
    weights, shrink = jnp.exp(scores - over), jnp.exp(top[...] - over)
    total[...] = shrink * total[...] + weights.sum(axis=2, keepdims=True)
    for scales in value_scales:
        weights *= scales[buffer][:, None]
    attending = numbers(values)
    weighted[...] = shrink * weighted[...] + _product(weights.astype(attending.dtype), attending, 1)
    top[...] = new_top

    @pl.when(entry & LAST != 0)
    def _finish() -> None:
        seen = total[...] > 0
        divisor = jnp.where(seen, total[...], 1.0)
        attended[0] = (weighted[...] / divisor).astype(attended.dtype)
        for one in log_total:
            one[0] = jnp.where(seen, top[...] + jnp.log(divisor), -jnp.inf)


def _copies(
    settings: Settings, entries, reach, table, pages: list, held: list, arrived, step: jax.Array, act: Callable
) -> None:
    """Run ``act`` on the copies of a step's pages into their buffers, as far as the row has tokens in them."""
    unit, block = unpack(entries[step], settings.key_blocks)
    row, first = unit // settings.query_blocks, block * settings.blocks.pages
    page, buffer = settings.shape.page, jax.lax.rem(step, 2)

    def one(index: jax.Array, _: None) -> None:
        source = table[row * settings.shape.table + first + index]
        place = pl.ds(pl.multiple_of(index * page, page), page)
        for pool, (every, here) in enumerate(zip(pages, held, strict=True)):
            act(pltpu.make_async_copy(every.at[source], here.at[buffer, :, place], arrived.at[buffer, pool]))

    jax.lax.fori_loop(0, jnp.minimum(settings.blocks.pages, reach[unit] // page + 1 - first), one, None)


def _product(left: jax.Array, right: jax.Array, right_axis: int) -> jax.Array:
    """[K, M, X] with the last axis of ``left`` and this one of ``right`` summed over, in float32."""
    return jax.lax.dot_general(
        left,
        right,
        (((2,), (right_axis,)), ((0,), (0,))),
        precision=precision_of(left.dtype),
        preferred_element_type=jnp.float32,
    )
