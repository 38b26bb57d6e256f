"""Interval attention of rows whose queries and keys are both split over an axis of a mesh (context parallelism).

A row is cut into as many chunks as the axis has devices, in order. Each device keeps its queries, and the chunks of
keys and values travel around the ring, so that none ever holds a row's keys whole (Liu et al. 2023, Ring Attention). A
chunk is one call of ``interval_attention``, and the parts of a query are joined by their log-sum-exp. The backward pass
sends the chunks around again, their gradients with them. What the mask leaves empty is sent on and not computed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_kernels.interval_attention import Plan, interval_attention_with_lse, make_plan

RingPlan = tuple[Plan, ...]
"""The plans of a device's queries with its own chunk of keys, with the chunk before it, with the one before that ..."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Mask:
    """What the scores of whole rows are masked by: ends and positions [B, T], the window, and the plans."""

    end: jax.Array
    positions: jax.Array | None
    window: jax.Array
    plan: RingPlan


def make_ring_plan(
    end: jax.Array,
    *,
    axis: str,
    groups: int,
    head_width: int,
    dtype: str | jnp.dtype,
    implementation: str = "auto",
) -> RingPlan:
    """The plans of this device, for every layer and window. Call it under ``jax.shard_map``.

    Args:
        end: [B, T] int32 of whole rows, as ``interval_attention`` takes it.
        axis: of the mesh, along which rows are cut; its length divides T.
        groups: N / K, query heads that share a KV head.
        head_width: H.
        dtype: of the queries, keys and values.
        implementation: as ``interval_attention`` takes it.

    Raises:
        ValueError: the axis does not divide T, or the implementation cannot be had.
    """
    devices, own = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    if end.shape[1] % devices:
        raise ValueError(f"rows of {end.shape[1]} tokens cannot be cut into {devices} equal chunks; pad them")
    length = end.shape[1] // devices

    def plan(step: int) -> Plan:
        options = {"groups": groups, "head_width": head_width, "dtype": dtype}
        options |= {"queries": length, "implementation": implementation, "segments": False}
        source = (own - step) % devices
        first = (own - source) * length if step else 0
        return make_plan(_chunk_of_ends(end, source, length), first=first, behind=step > 0, **options)

    return tuple(plan(step) for step in range(devices))


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    *,
    axis: str,
    window: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    positions: jax.Array | None = None,
    plan: RingPlan | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """``interval_attention`` of whole rows, of which this device has one chunk. Call it under ``jax.shard_map``.

    Args:
        q: [B, L, N, H] queries of this device's chunk.
        k: [B, L, K, H] its keys.
        v: [B, L, K, H] its values.
        end: [B, T] int32 of whole rows, T = L x devices on the axis.
        axis: of the mesh, along which rows are cut.
        positions: [B, T] int32 of whole rows, as ``interval_attention`` takes them.
        plan: ``make_ring_plan`` of ``end``, for batches that attend more than once; made here when None.
        window, scale, soft_cap, implementation: as ``interval_attention`` takes them.

    Returns:
        [B, L, N, H] in q's type.

    Raises:
        ValueError: shapes do not fit together, or the implementation cannot be had.
    """
    devices, length = jax.lax.axis_size(axis), q.shape[1]
    if k.shape[1] != length or end.shape[1] != length * devices:
        raise ValueError(
            f"{devices} chunks of q {q.shape} [B, L, N, H] need k and v of as many tokens and end "
            f"[B, {length * devices}] of whole rows; got {k.shape}, {end.shape}"
        )
    if positions is not None and positions.shape != end.shape:
        raise ValueError(f"positions {positions.shape} must be those of whole rows, as end is {end.shape}")
    if plan is None:
        shape = {"groups": q.shape[2] // k.shape[2], "head_width": q.shape[3], "dtype": q.dtype}
        plan = make_ring_plan(end, axis=axis, **shape, implementation=implementation)
    mask = _Mask(end, positions, jnp.asarray(window, jnp.int32), plan)
    return _attend(_Ring(axis, devices, scale, soft_cap), q, k, v, mask)


def _chunk_of_ends(end: jax.Array, source: int | jax.Array, length: int) -> jax.Array:
    """``end`` of a chunk's keys, counted from its first token as all of a call's indices are."""
    return jax.lax.dynamic_slice_in_dim(end, source * length, length, axis=1) - source * length


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What a ring is compiled for."""

    axis: str
    devices: int
    scale: float | None
    soft_cap: float

    def sent_on(self, chunk: Any) -> Any:
        """The chunk of the device before this one."""
        turn = [(device, (device + 1) % self.devices) for device in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, turn), chunk)

    def attention(self, mask: _Mask, step: int | jax.Array, plan: Plan, length: int) -> tuple[jax.Array, Callable]:
        """After so many turns: whether anything is visible here, and ``(q, k, v)`` -> this part and its log-sum-exp."""
        own = jax.lax.axis_index(self.axis)
        source = (own - step) % self.devices
        first, end = (own - source) * length, _chunk_of_ends(mask.end, source, length)
        options: dict[str, Any] = {"window": mask.window, "scale": self.scale, "soft_cap": self.soft_cap}
        needed = (first >= 0) & (end > first).any()
        if mask.positions is None:
            needed &= (mask.window == 0) | (first - length + 1 < mask.window)
        else:
            places = [jax.lax.dynamic_slice_in_dim(mask.positions, x * length, length, 1) for x in (source, own)]
            options |= {"positions": places[0], "query_positions": places[1]}
        return needed, functools.partial(interval_attention_with_lse, end=end, first=first, plan=plan, **options)

    def turns(self, turn: Callable, state: Any, plans: RingPlan) -> Any:
        """The state after every turn but the one in which a device has its own chunk."""
        if self.devices == 1:
            return state
        steps = jnp.arange(1, self.devices), jax.tree.map(lambda *lists: jnp.stack(lists), *plans[1:])
        return jax.lax.scan(lambda state, step: (turn(state, *step), None), state, steps)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, mask: _Mask) -> jax.Array:
    return _forward(ring, q, k, v, mask)[0]


def _forward(ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, mask: _Mask) -> tuple[jax.Array, tuple]:
    def turn(state: tuple, step: jax.Array, plan: Plan) -> tuple:
        chunk, joined = ring.sent_on(state[0]), state[1]
        needed, attend = ring.attention(mask, step, plan, q.shape[1])
        return chunk, jax.lax.cond(needed, lambda: _joined(joined, attend(q, *chunk)), lambda: joined)

    attended, log_total = ring.attention(mask, 0, mask.plan[0], q.shape[1])[1](q, k, v)
    joined = attended.astype(jnp.float32), log_total
    _, (attended, log_total) = ring.turns(turn, ((k, v), joined), mask.plan)
    attended = attended.astype(q.dtype)
    return attended, (q, k, v, mask, attended, log_total)


def _joined(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Two parts of the same queries: the softmax over the keys of both."""
    log_total = jnp.logaddexp(left[1], right[1])
    return sum(_share(log_part, log_total) * part for part, log_part in (left, right)), log_total


def _share(log_part: jax.Array, log_total: jax.Array) -> jax.Array:
    """[B, Q, N, 1]: the weight of a part's keys among all keys of a query; 0 where it sees none."""
    return jnp.exp(log_part - jnp.where(log_total > -jnp.inf, log_total, 0.0))[..., None]


def _backward(ring: _Ring, saved: tuple, gradient: jax.Array) -> tuple:
    """With w the share of a part, the output is the sum of w times each part: a part's gradient is w times the
    output's, and that of its log-sum-exp is w times the gradient's product with how far it lies from the output."""
    q, k, v, mask, attended, log_total = saved
    gradient, attended = gradient.astype(jnp.float32), attended.astype(jnp.float32)

    def gradients(attend: Callable, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        (part, log_part), pull = jax.vjp(attend, q, k, v)
        share = _share(log_part, log_total)
        distance = (gradient * (part.astype(jnp.float32) - attended)).sum(axis=-1)
        pulled = pull(((share * gradient).astype(part.dtype), share[..., 0] * distance))
        return tuple(x.astype(jnp.float32) for x in pulled)

    def turn(state: tuple, step: jax.Array, plan: Plan) -> tuple:
        query_sum, travelling = state
        k, v, *sums = ring.sent_on(travelling)
        needed, attend = ring.attention(mask, step, plan, q.shape[1])

        def added() -> tuple[jax.Array, ...]:
            return tuple(x + y for x, y in zip((query_sum, *sums), gradients(attend, k, v), strict=True))

        query_sum, *sums = jax.lax.cond(needed, added, lambda: (query_sum, *sums))
        return query_sum, (k, v, *sums)

    query_sum, *sums = gradients(ring.attention(mask, 0, mask.plan[0], q.shape[1])[1], k, v)
    query_sum, (_, _, *sums) = ring.turns(turn, (query_sum, (k, v, *sums)), mask.plan)
    sums = ring.sent_on(sums)  # home
    return tuple(x.astype(y.dtype) for x, y in zip((query_sum, *sums), (q, k, v), strict=True)) + (None,)


_attend.defvjp(_forward, _backward)
