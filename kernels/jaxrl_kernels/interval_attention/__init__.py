"""Causal attention under an interval mask: packed segments, shared prompts and trees from one integer per token.

Key j is visible to query i of the same row iff ``j <= i < end[j]``.

* packed segments: ``end[j]`` is the end of j's segment (``segment_ends``);
* padding: ``end[j] = 0``, visible to nobody;
* a group that shares its prompt: the prompt's tokens get the end of the whole group, a response its own end;
* any trajectory tree in depth-first order: ``end[j]`` is the end of j's subtree.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_kernels.interval_attention.backends import BACKENDS, Shape, chosen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Which blocks of scores a mask needs, and who computes them: made once for a batch, for all layers and passes.

    Attributes:
        lists: arrays as the backend wants them. The first two axes of each are split on a mesh as rows and queries
            are, and every device has the plan of its own.
        backend: name of the backend.
        shape: what it was made for, which a call must have; None where lists were made by hand.
    """

    lists: Any
    backend: str = dataclasses.field(metadata={"static": True})
    shape: Shape | None = dataclasses.field(default=None, metadata={"static": True})


def make_plan(
    end: jax.Array,
    *,
    groups: int,
    head_width: int,
    dtype: str | jnp.dtype,
    queries: int | None = None,
    first: int | jax.Array = 0,
    behind: bool = False,
    soft_cap: float = 0.0,
    segments: bool = True,
    implementation: str = "auto",
) -> Plan:
    """The plan of an interval mask, for every window.

    Args:
        end: [B, T] int32, as ``interval_attention`` takes it.
        groups: N / K, query heads that share a KV head.
        head_width: H.
        dtype: of the queries, keys and values.
        queries: how many queries there are; T when None.
        first: index of the first query.
        behind: the queries may lie behind keys that are not theirs (``first`` > 0 though there are T of them), so
            that more blocks may be needed than of a causal mask.
        soft_cap: on the scores, by which "auto" chooses.
        segments: the mask is one of packed segments and padding, for "auto" to choose by. Not known to be one, it may
            still be computed by what is exact for both.
        implementation: as ``interval_attention`` takes it.

    Raises:
        ValueError: the implementation is unknown, does not run on these devices or cannot take the shape.
    """
    rows, tokens = end.shape
    dtype = jnp.dtype(dtype).name
    queries = tokens if queries is None else queries
    shape = Shape(rows, queries, tokens, groups, head_width, dtype, behind, soft_cap, segments)
    name = chosen(implementation, shape)
    return Plan(BACKENDS[name].plan(end, first, shape), name, shape)


def interval_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    *,
    window: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    first: int | jax.Array = 0,
    positions: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    plan: Plan | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Attend, softmax in float32. A query that sees no key gives zeros and has zero gradient.

    Blocks of scores in which nothing is visible are skipped, forward and backward. What stands at a query that sees
    nothing, or at a key and value that nobody sees, has no influence, NaN included.

    Args:
        q: [B, Q, N, H] queries of the tokens ``first ... first + Q - 1``.
        k: [B, T, K, H] keys; N is a multiple of K, and query heads ``g * N/K ... (g + 1) * N/K - 1`` share KV head g.
        v: [B, T, K, H] values.
        end: [B, T] int32, first query index that no longer sees key j; 0 where nobody does.
        window: query i also needs to lie less than so far behind key j; 0 = no window. An int, or a traced int32
            scalar.
        scale: of the scores; ``H ** -0.5`` when None.
        soft_cap: scaled scores become ``soft_cap * tanh(score / soft_cap)``; 0 = they stay.
        first: index of the first query, where a row's queries are split over devices. Where its keys are split too it
            may be T or more, or negative: such queries see nothing. An int, or a traced int32 scalar.
        positions: [B, T] int32 that the window counts by, rising from a key to every query that sees it. None counts
            by index, which is wrong only where other branches of a tree lie between a token and its past.
        query_positions: [B, Q] int32, those of the queries; None takes them from ``positions``, where all of their
            tokens must then be.
        plan: ``make_plan`` of ``end``, for batches that attend more than once; made here when None.
        implementation: "xla" is plain JAX, linear in T in memory; "cudnn" is cuDNN on GPUs where the mask is one of
            packed segments, and plain JAX elsewhere; "tpu" the kernels for TPUs; "mosaic_gpu" those for Hopper GPUs;
            "tpu_interpreted" and "mosaic_gpu_interpreted" run them without such a device, slowly; "reference" builds
            the whole mask; "auto" picks by the devices (``docs/kernels.md``). A plan that is given has picked already.

    Returns:
        [B, Q, N, H] in q's type.

    Raises:
        ValueError: shapes do not fit together, or the implementation is unknown or cannot be had.
    """
    return _attended(
        q,
        k,
        v,
        end,
        with_lse=False,
        window=window,
        scale=scale,
        soft_cap=soft_cap,
        first=first,
        positions=positions,
        query_positions=query_positions,
        plan=plan,
        implementation=implementation,
    )[0]


def interval_attention_with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    *,
    window: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    first: int | jax.Array = 0,
    positions: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    plan: Plan | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """``interval_attention``, and the log-sum-exp of each query's scores, by which parts of a row can be joined.

    Returns:
        ([B, Q, N, H] in q's type, [B, Q, N] float32, minus infinity for a query that sees nothing). Both can be
        differentiated.
    """
    return _attended(
        q,
        k,
        v,
        end,
        with_lse=True,
        window=window,
        scale=scale,
        soft_cap=soft_cap,
        first=first,
        positions=positions,
        query_positions=query_positions,
        plan=plan,
        implementation=implementation,
    )


def _attended(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    *,
    with_lse: bool,
    window: int | jax.Array,
    scale: float | None,
    soft_cap: float,
    first: int | jax.Array,
    positions: jax.Array | None,
    query_positions: jax.Array | None,
    plan: Plan | None,
    implementation: str,
) -> tuple[jax.Array, jax.Array | None]:
    """What both functions return, and None for a log-sum-exp that is not asked for."""
    _check_shapes(q, k, v, end, positions, query_positions)
    (batch, queries, heads, width), tokens = q.shape, k.shape[1]
    if plan is None:
        groups = heads // k.shape[2]
        options = {"groups": groups, "head_width": width, "dtype": q.dtype, "queries": queries, "first": first}
        options |= {"behind": not (isinstance(first, int) and first == 0), "soft_cap": soft_cap}
        plan = make_plan(end, **options, implementation=implementation)
    made, called = plan.shape, (batch, queries, tokens, heads // k.shape[2], width)
    if made is not None and called != (made.rows, made.queries, made.tokens, made.groups, made.head_width):
        raise ValueError(f"the plan was made for {made}, and this is (rows, queries, tokens, groups, width) = {called}")
    index, query = jnp.arange(tokens, dtype=jnp.int32), first + jnp.arange(queries, dtype=jnp.int32)
    furthest = jnp.take(jax.lax.cummax(end, axis=1), jnp.clip(query, 0, tokens - 1), axis=1)
    seeing = ((query >= 0) & (furthest > query))[..., None]
    seen = (end > index)[..., None, None]
    q, k, v = jnp.where(seeing[..., None], q, 0), jnp.where(seen, k, 0), jnp.where(seen, v, 0)
    window, scale = jnp.asarray(window, jnp.int32), width**-0.5 if scale is None else scale
    places = None
    if positions is not None:
        if query_positions is None:
            query_positions = jax.lax.dynamic_slice_in_dim(positions, first, queries, axis=1)
        places = query_positions, positions
    backend, arguments = BACKENDS[plan.backend], (q, k, v, end, window, first, scale, soft_cap, places, plan.lists)
    if not with_lse and backend.attend_alone is not None:
        return jnp.where(seeing[..., None], backend.attend_alone(*arguments), 0), None
    attended, log_total = backend.attend(*arguments)
    return jnp.where(seeing[..., None], attended, 0), jnp.where(seeing, log_total, -jnp.inf)


def _check_shapes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    positions: jax.Array | None,
    query_positions: jax.Array | None,
) -> None:
    fit = q.ndim == k.ndim == 4 and min(*q.shape, *k.shape) > 0 and k.shape == v.shape
    fit = fit and k.shape[::3] == q.shape[::3] and not q.shape[2] % k.shape[2] and q.shape[1] <= k.shape[1]
    if not fit:
        raise ValueError(
            f"q {q.shape} [B, Q, N, H] needs k and v of one shape [B, T, K, H] with K dividing N, Q at most T, and "
            f"nothing empty; got {k.shape}, {v.shape}"
        )
    if query_positions is not None and positions is None:
        raise ValueError("query_positions are given and positions are not; windows count by both, or by index")
    for name, integers, wanted in (
        ("end", end, k.shape[:2]),
        ("positions", positions, k.shape[:2]),
        ("query_positions", query_positions, q.shape[:2]),
    ):
        if integers is not None and (integers.shape != wanted or not jnp.issubdtype(integers.dtype, jnp.integer)):
            raise ValueError(
                f"{name} are {integers.dtype} {integers.shape}; one integer per token needs int32 {wanted}"
            )


def segment_ends(segment_ids: jax.Array) -> jax.Array:
    """``end`` for packed rows.

    Args:
        segment_ids: [B, T] int32; equal neighbours form one segment, 0 is padding.

    Returns:
        [B, T] int32: index after the last token of each token's segment; 0 on padding.
    """
    tokens = segment_ids.shape[1]
    last = jnp.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(segment_ids[:, :1], bool)], axis=1)
    ends = jnp.where(last, jnp.arange(1, tokens + 1, dtype=jnp.int32), tokens)
    ends = jax.lax.cummin(ends, axis=1, reverse=True)
    return jnp.where(segment_ids > 0, ends, 0)
