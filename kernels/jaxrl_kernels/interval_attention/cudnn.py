"""Attention within packed segments by cuDNN, through jax; every other mask as the ``xla`` backend computes it.

cuDNN knows no interval mask. It does know sequences that lie in one buffer, each of which is attended to causally by
itself, told by where they begin and how long they are. Whether a mask is one of such segments is found out once, with
its plan, and a conditional in the program takes cuDNN or the other way: a batch of trees is as right as one of
segments.

What is used of jax is private (``_jax_entry``): its public function takes no packed sequences, and the one behind that
asks the devices of this process what they can do, which a program for devices that are not there has none of, and in
jax 0.10 counts the offsets of keys in heads of queries. How cuDNN reads its arguments stands in
jax/_src/cudnn/fused_attention_stablehlo.py and in XLA's stream_executor/cuda/cuda_dnn.cc.
"""

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels.interval_attention import xla
from jaxrl_kernels.interval_attention.plan import KeyBlocks, key_blocks

TOKENS = 1 << 19
FEWEST, MOST = 8, 32
"""Room for segments: so many for each row of a device, at least and at most; between them, as many as times the tokens
of all rows are TOKENS. For every segment that there is room for, cuDNN starts as many programs as for a whole row, of
which those ahead of its last token end at once, and may reserve the float32 gradients of a row's queries."""

JAX_VERSIONS = ((0, 10), (0, 11))
"""Those whose private entry is known to be as it is used here."""

TYPES = ("bfloat16", "float16")

OFFSETS = 1 << 31
"""Elements of the queries of a device; cuDNN counts them in int32."""


class Segments(NamedTuple):
    """The segments of all rows of a device. The first axis is 1 and split on a mesh as rows are.

    Attributes:
        starts: [1, S] int32; the first token of each, counted through all rows; B * T behind the last segment.
        lengths: [1, S] int32; 0 behind the last.
        longest: [1, 1] int32.
        alone: [1, 1] bool; the mask is one of segments (and padding), and there is room for all of them.
    """

    starts: jax.Array
    lengths: jax.Array
    longest: jax.Array
    alone: jax.Array


class Plan(NamedTuple):
    """Attributes:
    blocks: for masks that cuDNN does not know.
    segments: for those that it does.
    """

    blocks: KeyBlocks
    segments: Segments


def unfit(head_width: int, dtype: str, widest: int) -> str:
    """Why cuDNN cannot take such heads; empty if it can."""
    if jax.__version_info__[:2] not in JAX_VERSIONS:
        known = " and ".join(".".join(map(str, version)) for version in JAX_VERSIONS)
        return f"its entry is private to jax and known of {known}, not of {jax.__version__}"
    if dtype not in TYPES or head_width % 8 or head_width > widest:
        types = " or ".join(TYPES)
        return f"heads of a multiple of 8, at most {widest}, in {types} are needed, not {head_width} in {dtype}"
    return ""


def room(rows: int, tokens: int) -> int:
    """Segments that there is room for in so many rows of a device, of so many tokens."""
    return rows * min(MOST, max(FEWEST, TOKENS // (rows * tokens)))


def make_plan(end: jax.Array) -> Plan:
    """Of a mask [B, T] whose queries are those of the keys, one for one."""
    return Plan(key_blocks(end), segments_of(end))


def segments_of(end: jax.Array) -> Segments:
    """The segments of a mask [B, T], of which no more are listed than there is room for.

    A token that others before it see belongs to their segment if it is seen as long as they are. If all such tokens do,
    the mask is one of segments.
    """
    rows, tokens = end.shape
    index = jnp.arange(tokens, dtype=jnp.int32)
    end = jnp.minimum(end, tokens)
    before = jnp.pad(end, ((0, 0), (1, 0)))[:, :-1]
    inside = before > index
    begins = ~inside & (end > index)
    count = begins.sum(dtype=jnp.int32)
    places = room(rows, tokens)
    (starts,) = jnp.nonzero(begins.reshape(-1), size=places, fill_value=rows * tokens)
    lengths = jnp.append((end - index).reshape(-1), 0)[starts]
    alone = ((end == before) | ~inside).all() & (count > 0) & (count <= places)
    starts, lengths = starts.astype(jnp.int32)[None], lengths.astype(jnp.int32)[None]
    return Segments(starts, lengths, lengths.max(keepdims=True), alone[None, None])


def interval_attention_with_lse(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    """As the contract says. cuDNN has no gradient of the log-sum-exp, so this is the other way alone."""
    *others, plan = arguments
    return xla.interval_attention(*others, plan.blocks)


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
    plan: Plan,
) -> jax.Array:
    """As the contract says, without the log-sum-exp."""
    if soft_cap or q.size >= OFFSETS:
        reason = (
            f"a soft cap of {soft_cap}" if soft_cap else f"{q.size} numbers in queries, of which it counts {OFFSETS}"
        )
        warnings.warn(f"interval attention: 'xla' computes what was planned for 'cudnn': {reason}", stacklevel=2)
        return xla.interval_attention(q, k, v, end, window, first, scale, soft_cap, places, plan.blocks)[0]
    whole = window == 0
    if places is None:  # a window that is longer than all segments hides nothing
        whole |= window >= plan.segments.longest[0, 0]
    return _attend(
        scale, q, k, v, plan.segments, whole & plan.segments.alone[0, 0], (end, window, first, places, plan.blocks)
    )


Other = tuple[jax.Array, jax.Array, int | jax.Array, tuple[jax.Array, jax.Array] | None, KeyBlocks]
"""What the other way takes of the mask: end, window, first, places and blocks."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    scale: float, q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, alone: jax.Array, other: Other
) -> jax.Array:
    def by_cudnn() -> jax.Array:
        return forward(q, k, v, segments, scale, training=False)[0]

    return jax.lax.cond(alone, by_cudnn, lambda: _otherwise(scale, q, k, v, other)[0])


def _forward(
    scale: float, q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, alone: jax.Array, other: Other
) -> tuple[jax.Array, tuple]:
    def by_cudnn() -> tuple[jax.Array, jax.Array]:
        return forward(q, k, v, segments, scale, training=True)

    def otherwise() -> tuple[jax.Array, jax.Array]:
        attended, log_total = _otherwise(scale, q, k, v, other)
        fill = segments.starts.size - len(q)  # cuDNN's have a row for every segment
        return attended, jnp.pad(log_total.swapaxes(1, 2), ((0, fill), (0, 0), (0, 0)))

    attended, totals = jax.lax.cond(alone, by_cudnn, otherwise)
    return attended, (q, k, v, segments, alone, other, attended, totals)


def _backward(scale: float, saved: tuple, gradient: jax.Array) -> tuple:
    q, k, v, segments, alone, other, attended, totals = saved

    def by_cudnn() -> tuple[jax.Array, ...]:
        return backward(q, k, v, segments, scale, (attended, totals), gradient)

    def otherwise() -> tuple[jax.Array, ...]:
        end, window, first, places, blocks = other
        results = attended, totals[: len(q)].swapaxes(1, 2)
        return xla.gradients(q, k, v, end, window, first, scale, 0.0, places, blocks, results, gradient)

    return *jax.lax.cond(alone, by_cudnn, otherwise), None, None, None


_attend.defvjp(_forward, _backward)


def _otherwise(scale: float, q: jax.Array, k: jax.Array, v: jax.Array, other: Other) -> tuple[jax.Array, jax.Array]:
    end, window, first, places, blocks = other
    return xla.interval_attention(q, k, v, end, window, first, scale, 0.0, places, blocks)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, scale: float, *, training: bool
) -> tuple[jax.Array, ...]:
    """What is attended to, and for ``training`` the log-sum-exps of each segment [S, N, T]. Neither is defined outside
    of the segments."""
    entry = _jax_entry()
    call, options = entry._dot_product_attention_fwd_p.bind, _options(entry, scale)
    bound = functools.partial(call, **options, is_training=training)
    return _called(bound, q, k, v, *_arrays(q, k, segments))


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    scale: float,
    results: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, ...]:
    """The gradients of q, k and v, from the results of ``forward``. Outside of the segments they are not defined. Their
    last bits are the same in every run only with the flag --xla_gpu_deterministic_ops=true in XLA_FLAGS."""
    entry, (attended, totals) = _jax_entry(), results
    bound = functools.partial(entry._dot_product_attention_bwd_p.bind, **_options(entry, scale))
    return _called(bound, q, k, v, *_arrays(q, k, segments), totals, attended, gradient)


def _called(bound: Callable[..., list[jax.Array]], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """A call of cuDNN, one after the other under ``jax.vmap``: jax has no rule to batch it."""
    return jax.custom_batching.sequential_vmap(lambda *arrays: tuple(bound(*arrays)))(*arrays)


def _jax_entry() -> types.ModuleType:
    """Private; ``unfit`` asks for the versions in which it is known."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _arrays(q: jax.Array, k: jax.Array, segments: Segments) -> tuple[jax.Array, ...]:
    """No bias; lengths of the queries and of the keys of each segment, offsets of both; no page tables.

    Lengths are [B, M] and offsets [B, M + 1], but are read as one list: all segments there are, then empty ones. The
    offsets are counted in elements, of which a token has as many as all of its heads.
    """
    rows, tokens, heads, width = q.shape
    lengths = segments.lengths.reshape(rows, -1)
    starts = jnp.pad(segments.starts[0], (0, rows), constant_values=rows * tokens).reshape(rows, -1)
    nothing = jnp.zeros(0, q.dtype)
    offsets = starts * (heads * width), starts * (k.shape[2] * width)
    return nothing, lengths, lengths, *offsets, nothing, nothing


def _options(entry: types.ModuleType, scale: float) -> dict[str, Any]:
    return {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, and so no gradient of it
        "mask_type": entry.MaskType.PADDING_CAUSAL,
        "layout": entry.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
