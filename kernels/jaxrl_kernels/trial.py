"""Kernels tried on the devices at hand, on a few short rows, before a run relies on them.

That a kernel compiles says nothing of what a chip, a driver or a library then computes. Here its results and gradients
must lie at most four times as far from float32 as those of plain JAX in the same type do.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels.interval_attention import interval_attention
from jaxrl_kernels.interval_attention.backends import Shape as RowShape
from jaxrl_kernels.paged_attention import paged_attention
from jaxrl_kernels.paged_attention.blocks import Shape as PagedShape
from jaxrl_kernels.paged_attention.quantized import Pages, floats, is_narrow, quantized

PLAIN = ("xla", "reference")
"""Backends in plain JAX, which are not tried: others are compared with them."""
TOKENS = 1024
"""Of a row that kernels are tried on."""
QUERIES = 24
"""Of a row of pages, at most."""


def try_interval_attention(
    backend: str, shape: RowShape, *, windows: Sequence[int] = (0,), tokens: int = TOKENS
) -> str:
    """What is wrong with both passes over packed segments, and over a prompt that three responses share.

    Args:
        backend: name of it.
        shape: whose heads, type and soft cap are tried.
        windows: of the layers.
        tokens: of a row.

    Returns:
        Empty if nothing is.
    """
    kv_heads, width = 2, shape.head_width
    draw = np.random.default_rng(0)
    heads = (shape.groups * kv_heads, kv_heads, kv_heads, shape.groups * kv_heads)
    given = [jnp.asarray(draw.normal(size=(2, tokens, count, width)), shape.dtype) for count in heads]

    def results(backend: str) -> Callable[..., tuple[jax.Array, ...]]:
        def both(q, k, v, cotangent, end, window) -> tuple[jax.Array, ...]:
            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                options = {"window": window, "soft_cap": shape.soft_cap, "implementation": backend}
                return interval_attention(q, k, v, end, **options)

            output, pull = jax.vjp(attend, q, k, v)
            return output, *pull(cotangent)

        return jax.jit(both)

    masks = ((end, jnp.int32(window)) for end in _ends(tokens) for window in windows)
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    return _compared(results, backend, given, [x.astype(jnp.float32) for x in given], masks, names)


def try_paged_attention(
    backend: str, shape: PagedShape, *, soft_cap: float = 0.0, windows: Sequence[int] = (0,)
) -> str:
    """The same of rows of pages of unequal lengths, one of them empty, in the types of a shape, with a soft cap."""
    rows, count, table = 4, min(shape.count, QUERIES), min(shape.table, -(-TOKENS // shape.page))
    draw = np.random.default_rng(0)
    last = np.minimum([QUERIES, table * shape.page // 3, table * shape.page - 1, -1], table * shape.page - 1)
    positions = np.where(last[:, None] < 0, -1, last[:, None] - np.arange(count)[::-1])
    page_table = jnp.asarray(draw.permutation(rows * table).reshape(rows, table), jnp.int32)
    q = jnp.asarray(draw.normal(size=(rows, count, shape.query_heads, shape.head_width)), shape.query_dtype)
    lengths = rows * table, shape.kv_heads, shape.page, shape.head_width
    pages = [_pages(jnp.asarray(draw.normal(size=lengths), jnp.float32), shape.page_dtype) for _ in range(2)]

    def results(backend: str) -> Callable[..., tuple[jax.Array]]:
        def run(q: jax.Array, keys: Pages, values: Pages, window: jax.Array) -> tuple[jax.Array]:
            arrays = (q, keys, values, page_table, jnp.asarray(positions, jnp.int32))
            options = {"window": window, "soft_cap": soft_cap, "implementation": backend}
            return (paged_attention(*arrays, **options),)

        return jax.jit(run)

    exact = [q.astype(jnp.float32), *(floats(x).astype(jnp.float32) for x in pages)]
    masks = ((jnp.int32(window),) for window in windows)
    return _compared(results, backend, [q, *pages], exact, masks, ("output",))


def _ends(tokens: int) -> Iterator[jax.Array]:
    """Two rows of four segments and padding; two of a prompt and three responses that share it."""
    edges = np.array([0, 3, 7, 11, 15]) * tokens // 16
    segments, shared = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    for left, right in itertools.pairwise(edges):
        segments[left:right] = shared[left:right] = right
    shared[: edges[1]] = edges[-1]
    for end in (segments, shared):
        yield jnp.asarray(np.stack([end, end]))


def _pages(numbers: jax.Array, dtype: str) -> Pages:
    return quantized(numbers, dtype) if is_narrow(dtype) else numbers.astype(dtype)


def _compared(
    results: Callable[[str], Callable[..., tuple[jax.Array, ...]]],
    backend: str,
    given: Sequence[Pages],
    exact: Sequence[jax.Array],
    masks: Iterator[tuple[jax.Array, ...]],
    names: Sequence[str],
) -> str:
    tried, plain, reference = results(backend), results("xla"), results("reference")
    for mask in masks:
        try:
            got = jax.block_until_ready(tried(*given, *mask))
        except Exception as error:  # whatever a compiler of kernels, a driver or a library says
            return f"it raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        found = zip(names, reference(*exact, *mask), plain(*given, *mask), got, strict=True)
        for name, wanted, rough, ours in found:
            wanted, rough, ours = (np.asarray(x, np.float32) for x in (wanted, rough, ours))
            error, allowed = np.abs(ours - wanted).max(), 4 * np.abs(rough - wanted).max() + 1e-4 * np.abs(wanted).max()
            if not error <= allowed:
                return f"its {name} is off by {error:.2g} where {allowed:.2g} is allowed"
    return ""
