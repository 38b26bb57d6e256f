"""The rows of paged attention (K3) and of groups that decode together (K2)."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxrl_kernels.bars import rows
from jaxrl_kernels.bars.rows import Sizes
from jaxrl_kernels.group_decode import group_decode, make_groups
from jaxrl_kernels.paged_attention import paged_attention


def slots(sizes: Sizes, group: int, shared: int, own: int) -> tuple[jax.Array, ...]:
    """Arguments of ``group_decode`` but the groups, and how many pages each row shares."""
    first, rest = shared // sizes.page, -(-own // sizes.page)
    row_index = jnp.arange(sizes.slots, dtype=jnp.int32)[:, None]
    prompts = (row_index // group) * first + jnp.arange(first, dtype=jnp.int32)
    begin = -(-sizes.slots // group) * first
    tails = begin + row_index * rest + jnp.arange(rest, dtype=jnp.int32)
    pages = begin + sizes.slots * rest, sizes.kv_heads, sizes.page, sizes.width
    q = rows.random(0, sizes.dtype, sizes.slots, 1, sizes.query_heads, sizes.width)
    positions = jnp.full((sizes.slots, 1), shared + own - 1, jnp.int32)
    page_table = jnp.concatenate([prompts, tails], axis=1)
    keys, values = (rows.random(number, sizes.dtype, *pages) for number in (1, 2))
    return q, keys, values, page_table, positions, jnp.full(sizes.slots, first, jnp.int32)


def measured(sizes: Sizes, bandwidth: float) -> Iterator[dict]:
    """K3 by the bandwidth of the run, and K2 by K3."""

    @jax.jit
    def plain(*arguments: jax.Array) -> jax.Array:
        return paged_attention(*arguments[:5])

    @jax.jit
    def grouped(*arguments: jax.Array) -> jax.Array:
        return group_decode(*arguments[:5], make_groups(arguments[3], arguments[5], sizes.group))

    given = slots(sizes, 1, 0, sizes.context)
    read = 2 * sizes.slots * sizes.context * sizes.kv_heads * sizes.width * jnp.dtype(sizes.dtype).itemsize
    time = rows.seconds_of(plain, given, sizes)
    what = f"decode, {sizes.slots} rows of {sizes.context}: bytes of keys and values a second, of the copy's"
    yield rows.row("K3", what, read / time / bandwidth, "share", ">= 0.65", ">= 0.85", f"{1000 * time:.3g} ms")
    for group, shared in ((sizes.group, sizes.shared), (1, sizes.shared), (sizes.group, 0)):
        given = slots(sizes, group, shared, sizes.own)
        runs = {"K3": functools.partial(plain, *given), "K2": functools.partial(grouped, *given)}
        k3, k2 = rows.seconds(runs, sizes.rounds).values()
        what = f"groups of {group}, {shared} tokens shared and {sizes.own} own"
        if group > 1 and shared:
            yield rows.row("K2", f"{what}: K3 over K2", k3 / k2, "ratio", ">= 1.8", ">= 2.3", f"{1000 * k2:.3g} ms")
        else:
            yield rows.row("K2", f"{what}: K2 over K3", k2 / k3, "ratio", "<= 1.05", "", f"{1000 * k2:.3g} ms")
