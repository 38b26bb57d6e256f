"""The TPU kernels in the interpreter that has a TPU's memories: races, bounds, and memory that was never written.

That the interpreter sees such faults is tested with faults made on purpose.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import Plan, interval_attention, paged_attention_with_lse
from jaxrl_kernels.interval_attention import pairs, tpu
from jaxrl_kernels.interval_attention.pairs import Blocks, Pairs, make_pairs
from jaxrl_kernels.paged_attention import blocks, steps
from jaxrl_kernels.paged_attention import tpu as paged
from jaxrl_kernels.paged_attention.quantized import LARGEST, Pages
from tests.kernels.pages import pages_of

TOKENS = 24
FAITHFUL = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
"""Scratch memory and results begin as NaN, and copies happen as late as they may."""
EAGER = dataclasses.replace(FAITHFUL, dma_execution_mode="eager")
"""Copies happen at once."""


def padded_segments() -> jax.Array:
    """[1, T]: two segments and padding, in blocks that are full, cut and empty."""
    end = np.zeros((1, TOKENS), np.int32)
    end[:, :10], end[:, 10:14] = 10, 14
    return jnp.asarray(end)


def attended(listed: Pairs) -> tuple[jax.Array, ...]:
    """Output and gradients on the interpreter, with these lists."""
    generator = np.random.default_rng(2)
    q, k, v = (jnp.asarray(generator.normal(size=(1, TOKENS, heads, 8)), jnp.float32) for heads in (4, 2, 2))

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scalars = jnp.int32(0), jnp.int32(0)
        return tpu.interval_attention(q, k, v, padded_segments(), *scalars, 0.3, 0.0, None, listed)[0]

    interpreter.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(FAITHFUL):
        output, pull = jax.vjp(run, q, k, v)
        return jax.block_until_ready((output, *pull(jnp.cos(q))))


def listed_pairs() -> Pairs:
    return make_pairs(padded_segments(), queries=TOKENS, first=0, blocks=Blocks(8, 8))


@pytest.mark.slow
def test_no_race_and_no_unwritten_memory() -> None:
    got = attended(listed_pairs())
    assert not interpreter.races.races_found
    generator = np.random.default_rng(2)
    q, k, v = (jnp.asarray(generator.normal(size=(1, TOKENS, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    options = {"plan": Plan((), "reference"), "scale": 0.3}
    output, pull = jax.vjp(lambda q, k, v: interval_attention(q, k, v, padded_segments(), **options), q, k, v)
    for ours, wanted in zip(got, (output, *pull(jnp.cos(q))), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize("flag", [pairs.FIRST, pairs.LAST])
def test_lists_without_a_flag_leave_memory_unwritten(flag: int) -> None:
    """Sums that nobody set to zero, or results that nobody wrote."""
    whole = listed_pairs()
    spoilt = dataclasses.replace(whole, by_query=whole.by_query & ~flag, by_key=whole.by_key & ~flag)
    for array in attended(spoilt):
        assert np.isnan(np.asarray(array)).any()


def rows_in_pages(dtype: str = "float32") -> tuple[Pages, ...]:
    """Arguments of paged attention: rows of several blocks, of one and of none, and chunks of two blocks of queries.

    Pages are of this type. Tables are out of range beyond their row, and tokens beyond it are NaN.
    """
    generator = np.random.default_rng(4)
    reach, page, table = np.array([20, -1, 3]), 4, 6
    q = generator.normal(size=(3, 5, 4, 8))
    pages = generator.normal(size=(2, 3 * table, 2, page, 8))
    tables = generator.permutation(3 * table).reshape(3, table)
    for row, last in enumerate(reach):
        pages[:, tables[row, (last + 1) // page], :, (last + 1) % page :] = np.nan
        tables[row, last // page + 1 :] = 10_000
    positions = np.maximum(reach[:, None] - np.arange(5)[::-1], -1)
    positions[2, :3] = -1  # fewer tokens than the others
    pools = (pages_of(x, dtype) for x in pages)
    return jnp.asarray(q, jnp.float32), *pools, *(jnp.asarray(x) for x in (tables, positions))


def listed_steps() -> steps.Lists:
    """In blocks of 8 keys and 4 queries."""
    q, keys, _, page_table, positions = rows_in_pages()
    shape = blocks.shape_of(q, keys, page_table)
    return steps.make_lists(positions, (0, 11), shape, blocks.Blocks(queries=4, rows=8, pages=2))


def attended_in_pages(
    lists: steps.Lists, mode: pltpu.InterpretParams = FAITHFUL, dtype: str = "float32"
) -> tuple[jax.Array, ...]:
    """Output and log-sum-exp on the interpreter, with these lists and pages of this type."""
    interpreter.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(mode):
        options = blocks.Options(scale=0.4, soft_cap=2.0, with_lse=True, queries=15)
        return jax.block_until_ready(paged.paged_attention(*rows_in_pages(dtype), jnp.int32(11), options, lists))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", *LARGEST])
@pytest.mark.parametrize("mode", [FAITHFUL, EAGER], ids=["late", "eager"])
def test_pages_no_race_and_no_unwritten_memory(mode: pltpu.InterpretParams, dtype: str) -> None:
    got = attended_in_pages(listed_steps(), mode, dtype)
    assert not interpreter.races.races_found
    options = {"window": 11, "scale": 0.4, "soft_cap": 2.0, "implementation": "reference"}
    for ours, wanted in zip(got, paged_attention_with_lse(*rows_in_pages(dtype), **options), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_pages_that_are_not_waited_for_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that nobody waits for never happens in one mode; in the other it races with who reads it."""
    copies = paged._copies

    def only_started(*arguments: object) -> None:
        *others, act = arguments
        copies(*others, lambda copy: act(copy) if act.__code__.co_names == ("start",) else None)

    monkeypatch.setattr(paged, "_copies", only_started)
    assert np.isnan(np.asarray(attended_in_pages(listed_steps())[0])).any()
    attended_in_pages(listed_steps(), EAGER)
    assert interpreter.races.races_found


@pytest.mark.parametrize("flag", [steps.FIRST, steps.LAST])
def test_steps_without_a_flag_leave_memory_unwritten(flag: int) -> None:
    lists = listed_steps()
    spoilt = tuple(dataclasses.replace(one, entries=one.entries & ~flag) for one in lists.steps)
    assert np.isnan(np.asarray(attended_in_pages(dataclasses.replace(lists, steps=spoilt))[0])).any()


def test_pages_beyond_a_row_are_seen() -> None:
    lists = listed_steps()
    spoilt = tuple(dataclasses.replace(one, reach=one.reach + 4) for one in lists.steps)
    with pytest.raises(Exception, match="[Oo]ut-of-bounds|out of bounds"):
        attended_in_pages(dataclasses.replace(lists, steps=spoilt))
    interpreter.reset_tpu_interpret_mode_state()


def test_a_copy_that_is_not_waited_for_is_seen() -> None:
    def kernel(x, y, scratch, arrived) -> None:
        copy = pltpu.make_async_copy(x, scratch, arrived)
        copy.start()
        y[...] = scratch[...]
        copy.wait()

    x = jnp.ones((8, 128))
    interpreter.reset_tpu_interpret_mode_state()
    result = pl.pallas_call(
        kernel,
        out_shape=x,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=FAITHFUL,
    )(x)
    jax.block_until_ready(result)
    assert interpreter.races.races_found and np.isnan(np.asarray(result)).all()


def test_a_read_out_of_bounds_is_seen() -> None:
    def kernel(start, x, y) -> None:
        y[...] = x[pl.ds(start[0], 8), :]

    x = jnp.ones((16, 128))
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        in_specs=[pl.BlockSpec(x.shape, lambda start: (0, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda start: (0, 0)),
    )
    call = pl.pallas_call(kernel, grid_spec=grid_spec, out_shape=x[:8], interpret=FAITHFUL)
    interpreter.reset_tpu_interpret_mode_state()
    with pytest.raises(Exception, match="[Oo]ut-of-bounds|out of bounds"):
        jax.block_until_ready(call(jnp.asarray([12]), x))
    interpreter.reset_tpu_interpret_mode_state()
