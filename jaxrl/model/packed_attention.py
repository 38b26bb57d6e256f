"""Attention of packed rows on a mesh: what every layer is given of the mask, and how the tokens of a row are split."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl.config import ModelConfig
from jaxrl.mesh import COMPUTE_RULES, per_shard, to_compute
from jaxrl.model.implementations import packed_implementation
from jaxrl_kernels import Plan, RingPlan, interval_attention, make_plan, make_ring_plan, ring_attention

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(q [B, T, N, H], k and v [B, T, K, H], window) -> [B, T, N, H]."""

ROWS, WHOLE = ("batch", "tokens"), ("batch", None)
QUERIES = (*ROWS, "query_heads", None)


def score_options(config: ModelConfig) -> dict[str, float]:
    """What all attention kernels are told about their scores."""
    return {"scale": (config.score_width or config.head_width) ** -0.5, "soft_cap": config.attention_soft_cap}


def packed_attention(config: ModelConfig, end: jax.Array, positions: jax.Array | None) -> Attention:
    """Attention under an interval mask, whose plan is made here, once for all layers and both passes.

    Where a mesh splits the tokens of a row, its queries stay where they are, and keys and values are gathered, or
    travel around a ring of devices, as ``ModelConfig.context_attention`` says.

    Args:
        end: [B, T] int32, as ``interval_attention`` takes it.
        positions: [B, T] int32 that windows count by, of trees; None = by index, of packed segments.
    """
    end = to_compute(end, WHOLE)
    places = () if positions is None else (to_compute(positions, WHOLE),)
    mesh = jax.sharding.get_abstract_mesh()
    if config.context_attention == "ring" and not mesh.empty and mesh.shape[COMPUTE_RULES["tokens"]] > 1:
        return _on_a_ring(config, end, places)
    return _with_whole_keys(config, end, places)


def _heads(config: ModelConfig) -> dict[str, int | str]:
    return {
        "groups": config.query_heads // config.kv_heads,
        "head_width": config.head_width,
        "dtype": config.compute_dtype,
        "implementation": packed_implementation(config),
    }


def _with_whole_keys(config: ModelConfig, end: jax.Array, places: tuple[jax.Array, ...]) -> Attention:
    """Every device has its queries and all keys of their rows."""
    index, kernel = (
        jnp.arange(end.shape[1], dtype=jnp.int32),
        functools.partial(interval_attention, **score_options(config)),
    )

    def plan_locally(end: jax.Array, index: jax.Array) -> Plan:
        known = {"soft_cap": config.attention_soft_cap, "segments": not places}
        return make_plan(end, queries=len(index), first=index[0], **known, **_heads(config))

    def attend_locally(
        q: jax.Array, index: jax.Array, k: jax.Array, v: jax.Array, *mask: jax.Array | Plan
    ) -> jax.Array:
        end, window, plan, *places = mask
        return kernel(q, k, v, end, window=window, first=index[0], positions=places[0] if places else None, plan=plan)

    plan = per_shard(plan_locally, [WHOLE, ("tokens",)], ROWS)(end, index)
    keys, masks = ("batch", None, "kv_heads", None), [WHOLE, (), ROWS, *[WHOLE for _ in places]]
    attention = per_shard(attend_locally, [QUERIES, ("tokens",), keys, keys, *masks], QUERIES)
    return lambda q, k, v, window: attention(q, index, k, v, end, window, plan, *places)


def _on_a_ring(config: ModelConfig, end: jax.Array, places: tuple[jax.Array, ...]) -> Attention:
    """Every device has its queries and the keys of the same tokens."""
    axis = COMPUTE_RULES["tokens"]
    kernel = functools.partial(ring_attention, axis=axis, **score_options(config))

    def attend_locally(q: jax.Array, k: jax.Array, v: jax.Array, *mask: jax.Array | RingPlan) -> jax.Array:
        end, window, plan, *places = mask
        return kernel(q, k, v, end, window=window, positions=places[0] if places else None, plan=plan)

    plan = per_shard(functools.partial(make_ring_plan, axis=axis, **_heads(config)), [WHOLE], ROWS)(end)
    keys, masks = (*ROWS, "kv_heads", None), [WHOLE, (), ROWS, *[WHOLE for _ in places]]
    attention = per_shard(attend_locally, [QUERIES, keys, keys, *masks], QUERIES)
    return lambda q, k, v, window: attention(q, k, v, end, window, plan, *places)
