"""Which sizes of blocks cost least on the devices at hand: what ``block_sizes`` has in its table is measured here."""

import dataclasses
import datetime
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels import bench
from jaxrl_kernels.bars.rows import seconds
from jaxrl_kernels.block_sizes import Key, Sizes, write
from jaxrl_kernels.choice import device_kind
from jaxrl_kernels.interval_attention import Plan, interval_attention
from jaxrl_kernels.interval_attention import blocks as of_rows
from jaxrl_kernels.interval_attention.pairs import make_pairs
from jaxrl_kernels.paged_attention import PagedPlan, paged_attention
from jaxrl_kernels.paged_attention import blocks as of_pages
from jaxrl_kernels.paged_attention.steps import make_lists


@dataclasses.dataclass(frozen=True)
class Tried:
    """Sizes for a key, and what they cost.

    Attributes:
        key: in the table.
        rows, keys: as in the table.
        seconds: of each thing that was run; empty where the compiler refused.
        refused: why.
    """

    key: Key
    rows: int
    keys: int
    seconds: tuple[float, ...] = ()
    refused: str = ""


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much is run.

    Attributes:
        tokens: of a row; in pages that of every row.
        rounds: runs of each, after one that is not counted.
        query_heads: N.
        kv_heads: K; all is also run with one, which is what a device has where a mesh splits them.
        slots: rows that decode.
        chunks: rows of a prefill.
        chunk: tokens of each.
    """

    tokens: int
    rounds: int
    query_heads: int = 32
    kv_heads: int = 8
    slots: int = 64
    chunks: int = 4
    chunk: int = 512

    @property
    def heads(self) -> list[tuple[int, int]]:
        """N and K of what is run."""
        return list(dict.fromkeys([(self.query_heads, self.kv_heads), (self.query_heads // self.kv_heads, 1)]))


def packed_rows(
    extent: Extent,
    *,
    backend: str = "tpu",
    widths: Sequence[int] = (64, 128, 256),
    candidates: Iterable[tuple[int, int]] = tuple(itertools.product((512, 1024, 2048), (256, 512, 1024))),
) -> Iterator[Tried]:
    """Interval attention, forward and backward over a causal row, with every candidate's sizes.

    Args:
        extent: how much.
        backend: one that walks along pairs of blocks.
        widths: of the heads.
        candidates: rows of a block of scores, and keys.
    """
    tokens, groups = extent.tokens, extent.query_heads // extent.kv_heads
    end = jnp.full((1, tokens), tokens, jnp.int32)
    for width in widths:
        lengths = [[(1, tokens, count, width) for count in (heads, kv, kv)] for heads, kv in extent.heads]
        rows_of_heads = [(*_normal(*each), end) for each in lengths]
        for blocks, sizes in _distinct(candidates, lambda sizes: of_rows.fitting(sizes, groups, tokens, tokens)):
            plan = Plan(make_pairs(end, queries=tokens, first=0, blocks=blocks), backend)
            both = bench.forward_and_backward(functools.partial(interval_attention, plan=plan))
            runs = [(both, row) for row in rows_of_heads]
            yield _run(Key("interval_attention", device_kind(), width), sizes, runs, extent.rounds)


def pages(
    extent: Extent,
    *,
    backend: str = "tpu",
    widths: Sequence[int] = (128, 256),
    page_sizes: Sequence[int] = (16, 32, 64, 128),
    candidates: Iterable[tuple[int, int]] = tuple(itertools.product((128, 256, 512), (256, 512, 1024, 2048))),
) -> Iterator[Tried]:
    """Paged attention, decoding and prefill, with every candidate's sizes. Arguments as ``packed_rows``, and:

    Args:
        page_sizes: tokens of a page.
    """
    for width, page in itertools.product(widths, page_sizes):
        queries = (extent.slots, 1), (extent.chunks, extent.chunk)
        calls = [_call(extent.tokens, heads, width, page, *rows) for heads in extent.heads for rows in queries]
        fitting = functools.partial(_fitting, [shape for shape, _ in calls])
        for blocks, sizes in _distinct(candidates, fitting):
            runs = []
            for (shape, arrays), each in zip(calls, blocks, strict=True):
                plan = PagedPlan(make_lists(arrays[-1], (0,), shape, each), shape, backend)
                runs.append((jax.jit(functools.partial(paged_attention, plan=plan)), arrays))
            yield _run(Key("paged_attention", device_kind(), width, page), sizes, runs, extent.rounds)


def _fitting(shapes: Sequence[of_pages.Shape], sizes: Sizes) -> tuple[of_pages.Blocks, ...]:
    return tuple(of_pages.fitting(shape, sizes) for shape in shapes)


def _distinct(candidates: Iterable[tuple[int, int]], fitting: Callable[[Sizes], Any]) -> list[tuple[Any, Sizes]]:
    """Blocks of what is run, and of the candidates that are cut to them the largest: smaller ones would cut what has
    more tokens, or less in memory, for no reason that was measured."""
    found: dict[Any, Sizes] = {}
    for sizes in sorted((Sizes(*pair) for pair in candidates), key=lambda sizes: (sizes.rows * sizes.keys, sizes.rows)):
        found[fitting(sizes)] = sizes
    return list(found.items())


def written(results: Iterable[Tried], path: pathlib.Path, note: str) -> Iterator[Tried]:
    """Results as they come; once all of a key are there, the fastest is in a table.

    Args:
        results: one key after the other.
        path: of the table.
        note: as ``fastest`` takes it.
    """
    for _, group in itertools.groupby(results, lambda result: result.key):
        before: list[Tried] = []
        for result in group:
            before.append(result)
            yield result
        write(fastest(before, note), path)


def fastest(results: Iterable[Tried], note: str) -> dict[Key, Sizes]:
    """Rows of the table: of each key the sizes with the smallest sum of times, each as a multiple of the least one. A
    key of which the compiler refused all sizes has none.

    Args:
        results: of any keys.
        note: what they were run on, for whoever reads the table.
    """
    measured = f"{datetime.datetime.now(tz=datetime.UTC).date()}, jax {jax.__version__}, {note}"
    found = {}
    by_key = sorted((result for result in results if not result.refused), key=lambda result: result.key)
    for key, group in itertools.groupby(by_key, lambda result: result.key):
        ran = list(group)
        least = np.min([result.seconds for result in ran], axis=0)
        best = min(ran, key=lambda result: np.sum(result.seconds / least))
        found[key] = Sizes(best.rows, best.keys, measured)
    return found


def _normal(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def _call(
    tokens: int, heads: tuple[int, int], width: int, page: int, rows: int, count: int
) -> tuple[of_pages.Shape, tuple[jax.Array, ...]]:
    """Arguments of paged attention for the last ``count`` tokens of full rows, whose pages lie in no order."""
    table = -(-tokens // page)
    pool = (rows * table, heads[1], page, width)
    q, *pools = _normal((rows, count, heads[0], width), pool, pool)
    page_table = np.random.default_rng(1).permutation(rows * table).reshape(rows, table)
    positions = np.broadcast_to(tokens - count + np.arange(count), (rows, count))
    arrays = (q, *pools, *(jnp.asarray(x, jnp.int32) for x in (page_table, positions)))
    return of_pages.shape_of(q, pools[0], arrays[3]), arrays


def _run(key: Key, sizes: Sizes, runs: Sequence[tuple[Any, tuple[jax.Array, ...]]], rounds: int) -> Tried:
    """What compiled functions cost on their arguments."""
    named = {str(index): functools.partial(*run) for index, run in enumerate((call, *row) for call, row in runs)}
    try:
        cost = seconds(named, rounds)
    except jax.errors.JaxRuntimeError as error:  # they do not fit into the memory of the chip
        return Tried(key, sizes.rows, sizes.keys, refused=str(error).splitlines()[0])
    return Tried(key, sizes.rows, sizes.keys, tuple(cost.values()))
