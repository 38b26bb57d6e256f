"""The rows of interval attention (K1)."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_kernels import choice
from jaxrl_kernels.bars import rivals, rows
from jaxrl_kernels.bars.rows import Sizes
from jaxrl_kernels.interval_attention import backends, interval_attention, make_plan
from jaxrl_kernels.interval_attention.pairs import Pairs
from jaxrl_kernels.interval_attention.tables import Tables


def _heads(sizes: Sizes) -> dict[str, Any]:
    groups = sizes.query_heads // sizes.kv_heads
    return {"groups": groups, "head_width": sizes.width, "dtype": sizes.dtype}


def row_of(sizes: Sizes, end: jax.Array) -> tuple[jax.Array, ...]:
    """q, k, v and ``end`` of one row."""
    counts, tokens = (sizes.query_heads, sizes.kv_heads, sizes.kv_heads), end.shape[1]
    arrays = (rows.random(number, sizes.dtype, 1, tokens, count, sizes.width) for number, count in enumerate(counts))
    return *arrays, end


def ends_of(segments: int, tokens: int) -> jax.Array:
    """``end`` of a row of equal segments."""
    length = -(-tokens // segments)
    return jnp.minimum((jnp.arange(tokens, dtype=jnp.int32) // length + 1) * length, tokens)[None]


def _by(backend: str, sizes: Sizes) -> rivals.Attention:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> jax.Array:
        plan = make_plan(end, **_heads(sizes), implementation=backend)
        return interval_attention(q, k, v, end, plan=plan)

    return attend


def _results(attend: rivals.Attention) -> Callable[..., tuple[jax.Array, ...]]:
    """Compiled: the output, and the gradients of half the sum of its squares."""

    @jax.jit
    def results(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> tuple[jax.Array, ...]:
        output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, end), q, k, v)
        return output, *pull(output)

    return results


def _passes(attend: rivals.Attention, arguments: tuple[jax.Array, ...], sizes: Sizes) -> tuple[float, float]:
    """Seconds of the forward pass, in which the plan is made too, and of the backward pass."""

    @jax.jit
    def saved(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> tuple[jax.Array, Callable]:
        return jax.vjp(lambda q, k, v: attend(q, k, v, end), q, k, v)

    output, pull = saved(*arguments)
    back = jax.jit(lambda pull, gradient: pull(gradient))
    return rows.seconds_of(jax.jit(attend), arguments, sizes), rows.seconds_of(back, (pull, output), sizes)


def measured(sizes: Sizes, backend: str, rate: float) -> Iterator[dict]:
    """K1 of one backend."""
    longest = sizes.lengths[-1]
    shape = backends.Shape(1, longest, longest, **_heads(sizes))
    if reason := choice.refusal(backends.BACKENDS[backend], [shape]):
        yield rows.row("K1", f"{backend}: everything", None, "ratio", note=f"{backend} {reason}")
        return

    yield from _agreement(sizes, backend)
    whole = (0.0, 0.0)
    for tokens in sizes.lengths:
        whole = yield from _against_plain(sizes, backend, tokens, rate)
    yield from _packed(sizes, backend, sum(whole))
    if backend != "cudnn":  # which computes a group as "xla" does
        yield from _group(sizes, backend)


def _agreement(sizes: Sizes, backend: str) -> Iterator[dict]:
    """Before a time is believed: outputs and gradients are those of "xla"."""
    if backend == "xla":
        return
    given = row_of(sizes, ends_of(sizes.segments, sizes.lengths[0]))
    pairs = zip(*(_results(_by(name, sizes))(*given) for name in (backend, "xla")), strict=True)
    wide = [[x.astype(jnp.float32) for x in pair] for pair in pairs]
    shares = [jnp.abs(ours - theirs).max() / jnp.abs(theirs).max() for ours, theirs in wide]
    off = float(jnp.stack(shares).max())  # which NaN passes through, as it does not through Python's
    what = f"{backend}, {sizes.lengths[0]} tokens in {sizes.segments} segments: furthest from xla, of its largest"
    yield rows.row("K1", what, off, "share", "<= 0.05", "", "output and gradients")


def _against_plain(sizes: Sizes, backend: str, tokens: int, rate: float) -> Iterator[dict]:
    """Forward and backward over a row of one segment; returns the seconds of both."""
    given = row_of(sizes, jnp.full((1, tokens), tokens, jnp.int32))
    name, rival = rivals.causal()
    own = _passes(_by(backend, sizes), given, sizes)
    others = (None, None) if rival is None else _passes(rival, given, sizes)
    once = 2 * tokens**2 * sizes.query_heads * sizes.width  # of two products, half of all pairs
    demands = ("fwd", ">= 0.6", ">= 0.9", once), ("bwd", ">= 0.5", ">= 0.8", 2.5 * once)
    for (what, demand, good, work), time, other in zip(demands, own, others, strict=True):
        used = f"{1000 * time:.3g} ms, {work / time / 1e12:.3g} TFLOP/s, {work / time / rate:.2g} of the run's rate"
        ratio = None if other is None else other / time
        note = used if ratio else f"{used}; no {name} here"
        demand, good = ("", "") if backend == "xla" else (demand, good)  # which is for where there is nothing better
        text = f"{backend} {what}, one segment of {tokens}: {name} over ours"
        yield rows.row("K1", text, ratio, "ratio", demand, good, note)
    return own


def _packed(sizes: Sizes, backend: str, whole: float) -> Iterator[dict]:
    """A row of segments against itself as one segment, and against the rival."""
    tokens = sizes.lengths[-1]
    given = row_of(sizes, ends_of(sizes.segments, tokens))
    time = sum(_passes(_by(backend, sizes), given, sizes))
    what, note = f"{backend} fwd+bwd, {tokens} tokens in {sizes.segments} segments", f"{1000 * time:.3g} ms"
    yield rows.row("K1", f"{what}: as one segment over this", whole / time, "ratio", ">= 3", ">= 6", note)
    if backend == "cudnn":  # the rival itself
        return
    name, rival = rivals.packed(backends.Shape(1, tokens, tokens, **_heads(sizes)))
    ratio = None if rival is None else sum(_passes(rival, given, sizes)) / time
    demand, good = ("", "") if backend == "xla" else (">= 0.6", ">= 0.9")
    yield rows.row("K1", f"{what}: {name} over ours", ratio, "ratio", demand, good, "" if ratio else f"no {name} here")


def _group(sizes: Sizes, backend: str) -> Iterator[dict]:
    """A shared prompt, against what as many blocks cost in a row of one segment."""
    tokens = sizes.prompt + sizes.group * sizes.response
    index = jnp.arange(tokens, dtype=jnp.int32)
    own_end = sizes.prompt + ((index - sizes.prompt) // sizes.response + 1) * sizes.response
    ends = jnp.where(index < sizes.prompt, tokens, own_end)[None], jnp.full((1, tokens), tokens, jnp.int32)
    plans = [make_plan(end, **_heads(sizes), implementation=backend).lists for end in ends]
    group, whole = (sum(_passes(_by(backend, sizes), row_of(sizes, end), sizes)) for end in ends)
    predicted = whole * _visited(plans[0]) / _visited(plans[1])
    what = f"{backend} fwd+bwd, {sizes.group} responses of {sizes.response} to {sizes.prompt} tokens"
    note = f"{1000 * group:.3g} ms"
    yield rows.row("K1", f"{what}: over what its blocks cost", group / predicted, "ratio", "<= 1.25", "<= 1.1", note)


def _visited(lists: Any) -> int:
    """Pairs of blocks of a plan."""
    if isinstance(lists, Tables):
        return int(lists.query_counts.sum())
    return int(lists.counts[0, 0] if isinstance(lists, Pairs) else lists.counts.sum())
