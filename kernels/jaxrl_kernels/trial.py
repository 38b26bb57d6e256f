"""Kernels tried on the devices at hand, on a few short rows, before a run relies on them.

That a kernel compiles says nothing of what a chip, a driver or a library then computes. Here its results and gradients
must lie at most four times as far from float32 as those of plain JAX in the same type do.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels.group_decode import group_decode, make_group_plan, make_groups
from jaxrl_kernels.interval_attention import interval_attention, interval_attention_with_lse
from jaxrl_kernels.interval_attention.backends import Shape as RowShape
from jaxrl_kernels.paged_attention import make_paged_plan, paged_attention
from jaxrl_kernels.paged_attention.blocks import Shape as PagedShape
from jaxrl_kernels.paged_attention.blocks import shape_of
from jaxrl_kernels.paged_attention.quantized import Pages, floats, is_narrow, quantized

TOKENS = 1024
"""Of a row that kernels are tried on."""
QUERIES = 24
"""Of a row of pages, at most."""
MEMBERS = 16
"""Of a party, at most."""

Results = Callable[..., tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the layers of a model do with scores.

    Attributes:
        scale: as kernels take it.
        soft_cap: likewise.
        windows: of the layers, 0 = none. Rows are short here: a third of one is tried where a window is longer.
    """

    scale: float | None = None
    soft_cap: float = 0.0
    windows: Sequence[int] = (0,)

    def options(self, backend: str) -> dict[str, Any]:
        """What kernels are told."""
        return {"scale": self.scale, "soft_cap": self.soft_cap, "implementation": backend}

    def within(self, tokens: int) -> list[int]:
        """Windows for rows of so many tokens."""
        return sorted({min(window, tokens // 3) for window in self.windows})


PLAIN_SCORES = Scores()


def try_interval_attention(
    backend: str,
    shape: RowShape,
    scores: Scores = PLAIN_SCORES,
    *,
    by_position: bool = False,
    tokens: int = TOKENS,
) -> str:
    """What is wrong with both passes over packed segments, and over a prompt that three responses share.

    Args:
        backend: name of it.
        shape: whose heads and type are tried. With ``behind`` rows are two parts long, as on a ring of two devices:
            what both queries see of the first one's keys is tried, and the log-sum-exp by which parts are joined.
        scores: of the model.
        by_position: windows count by positions.
        tokens: of a row, or of a part.

    Returns:
        Empty if nothing is.
    """
    kv_heads, width = 2, shape.head_width
    draw = np.random.default_rng(0)
    heads = (shape.groups * kv_heads, kv_heads, kv_heads, shape.groups * kv_heads)
    given = [jnp.asarray(draw.normal(size=(2, tokens, count, width)), shape.dtype) for count in heads]
    log_cotangent = jnp.asarray(draw.normal(size=(2, tokens, heads[0])), jnp.float32)

    def results(backend: str) -> Results:
        def both(q, k, v, cotangent, window, end, first, places) -> tuple[jax.Array, ...]:
            options = {"window": window, **scores.options(backend)}
            if by_position:
                options |= {"query_positions": places[0], "positions": places[1]}

            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
                if shape.behind:
                    return interval_attention_with_lse(q, k, v, end, first=first, **options)
                return (interval_attention(q, k, v, end, **options),)

            outputs, pull = jax.vjp(attend, q, k, v)
            return *outputs, *pull((cotangent, log_cotangent)[: len(outputs)])

        return jax.jit(both)

    parts = list(_parts(tokens, 2 if shape.behind else 1))
    masks = ((jnp.int32(window), *part) for window in scores.within(tokens) for part in parts)
    gradients = [f"gradient of {what}" for what in ("queries", "keys", "values")]
    names = ["output", *["log-sum-exp"] * shape.behind, *gradients]
    return _compared(results, backend, given, [x.astype(jnp.float32) for x in given], masks, names)


def try_paged_attention(backend: str, shape: PagedShape, scores: Scores = PLAIN_SCORES) -> str:
    """The same of rows of pages of unequal lengths, one of them empty, in the types of a shape."""
    table = _table(shape)
    longest, count = table * shape.page, min(shape.count, QUERIES)
    last = np.minimum([QUERIES, longest // 3, longest - 1, -1], longest - 1)[:, None]
    positions = jnp.asarray(np.where(last < 0, -1, last - np.arange(count)[::-1]), jnp.int32)
    page_table = jnp.asarray(np.random.default_rng(1).permutation(4 * table).reshape(4, table), jnp.int32)
    windows = scores.within(longest)

    def results(backend: str) -> Results:
        def run(q: jax.Array, keys: Pages, values: Pages, window: jax.Array) -> tuple[jax.Array]:
            options = {"windows": windows, "implementation": backend}
            plan = make_paged_plan(positions, shape_of(q, keys, page_table), **options)
            options = {"window": window, "plan": plan, **scores.options(backend)}
            return (paged_attention(q, keys, values, page_table, positions, **options),)

        return jax.jit(run)

    return _compared_in_pages(results, backend, shape, positions, page_table, windows)


def try_group_decode(backend: str, shape: PagedShape, width: int, scores: Scores = PLAIN_SCORES) -> str:
    """The same of rows that decode together: a large party, one of two, one by itself, a row that shares nothing and an
    empty one.

    Args:
        shape: of the decoding rows.
        width: the most rows of a party.
    """
    table = _table(shape)
    longest, many = table * shape.page, min(width, MEMBERS)
    leader = np.array([*[0] * many, many, many, many + 2, many + 3, 0])
    shared = np.minimum([*[table // 2] * many, table // 4, table // 4, 1, 0, table // 2], table - 1)
    rows = len(leader)
    page_table = np.random.default_rng(1).permutation(rows * table).reshape(rows, table)
    page_table = np.where(np.arange(table) < shared[:, None], page_table[leader], page_table)
    last = shared * shape.page + 37 * np.arange(rows) % (longest - shared * shape.page)
    last[-1] = -1
    page_table, positions, shared = (jnp.asarray(x, jnp.int32) for x in (page_table, last[:, None], shared))
    windows = scores.within(longest)

    def results(backend: str) -> Results:
        def run(q: jax.Array, keys: Pages, values: Pages, window: jax.Array) -> tuple[jax.Array]:
            arrays, options = (q, keys, values, page_table, positions), {"window": window, **scores.options(backend)}
            if backend == "reference":
                return (paged_attention(*arrays, **options),)
            groups, own = make_groups(page_table, shared, width), shape_of(q, keys, page_table)
            several = [window for window in windows if window]
            plan = make_group_plan(positions, groups, own, windows=several, implementation=backend)
            return (group_decode(*arrays, groups, plan=plan, **options),)

        return jax.jit(run)

    return _compared_in_pages(results, backend, shape, positions, page_table, windows)


def _parts(tokens: int, parts: int) -> Iterator[tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]]:
    """Of two rows of four segments and padding, and of two of a prompt and three responses that share it: ``end`` of
    the first part's keys, and for the queries of every part the index of the first one, and the positions of queries
    and keys."""
    edges = np.array([0, 3, 7, 11, 15]) * tokens * parts // 16
    segments, shared, index = (np.zeros(tokens * parts, np.int32) for _ in range(3))
    for left, right in itertools.pairwise(edges):
        segments[left:right] = shared[left:right] = right
        index[left:right] = np.arange(right - left)
    shared[: edges[1]] = edges[-1]
    branch = np.where(np.arange(tokens * parts) < edges[1], index, index + edges[1])
    for end, position in ((segments, index), (shared, branch)):
        end, position = (jnp.asarray(np.stack([x, x]), jnp.int32) for x in (end, position))
        for first in range(0, tokens * parts, tokens):
            places = position[:, first : first + tokens], position[:, :tokens]
            yield end[:, :tokens], jnp.int32(first), places


def _table(shape: PagedShape) -> int:
    """Pages of a row that kernels are tried on."""
    return min(shape.table, -(-TOKENS // shape.page))


def _compared_in_pages(
    results: Callable[[str], Results],
    backend: str,
    shape: PagedShape,
    positions: jax.Array,
    page_table: jax.Array,
    windows: Sequence[int],
) -> str:
    draw = np.random.default_rng(0)
    q = draw.normal(size=(*positions.shape, shape.query_heads, shape.head_width))
    lengths = page_table.size, shape.kv_heads, shape.page, shape.head_width
    pages = [_pages(jnp.asarray(draw.normal(size=lengths), jnp.float32), shape.page_dtype) for _ in range(2)]
    given = [jnp.asarray(q, shape.query_dtype), *pages]
    exact = [floats(x).astype(jnp.float32) for x in given]
    return _compared(results, backend, given, exact, ((jnp.int32(window),) for window in windows), ("output",))


def _pages(numbers: jax.Array, dtype: str) -> Pages:
    return quantized(numbers, dtype) if is_narrow(dtype) else numbers.astype(dtype)


def _compared(
    results: Callable[[str], Results],
    backend: str,
    given: Sequence[Pages],
    exact: Sequence[jax.Array],
    masks: Iterator[tuple[Any, ...]],
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
            largest = np.abs(np.asarray(wanted)[np.isfinite(wanted)]).max(initial=0)
            error, allowed = _distance(ours, wanted), 4 * _distance(rough, wanted) + 1e-4 * largest
            if not error <= allowed:
                return f"its {name} is off by {error:.2g} where {allowed:.2g} is allowed"
    return ""


def _distance(x: jax.Array, wanted: jax.Array) -> float:
    """The largest difference, none where both are the same infinity."""
    x, wanted = (np.asarray(array, np.float32) for array in (x, wanted))
    with np.errstate(invalid="ignore"):
        return float(np.where(x == wanted, 0, np.abs(x - wanted)).max())
