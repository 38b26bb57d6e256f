"""How the tokens of a row that a mesh splits meet its keys. That both ways give the same is tested on meshes."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxrl.config import ModelConfig
from jaxrl.mesh import AXES
from jaxrl.model.packed_attention import packed_attention


@pytest.mark.parametrize(
    ("way", "context", "around"), [("ring", 2, True), ("gather", 2, False), ("ring", 1, False)], ids=str
)
def test_keys_travel_around_the_devices_where_the_configuration_says_so(way: str, context: int, around: bool) -> None:
    config = ModelConfig(context_attention=way)
    lengths = tuple(context if axis == "context" else 1 for axis in AXES)
    heads = (config.query_heads, config.kv_heads, config.kv_heads)
    shapes = [jax.ShapeDtypeStruct((1, 16, count, config.head_width), jnp.float32) for count in heads]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> jax.Array:
        return packed_attention(config, end, None)(q, k, v, jnp.int32(0))

    with jax.sharding.use_abstract_mesh(AbstractMesh(lengths, AXES, axis_types=(AxisType.Explicit,) * len(AXES))):
        traced = jax.make_jaxpr(attend)(*shapes, jax.ShapeDtypeStruct((1, 16), jnp.int32))
    assert ("ppermute" in str(traced)) == around


@pytest.mark.parametrize(
    ("changes", "context", "tree", "reason"),
    [
        ({}, 1, False, ""),
        ({}, 1, True, "packed segments are needed"),
        ({"attention_soft_cap": 50.0}, 1, False, "it has no soft cap"),
        ({"context_attention": "gather"}, 2, False, "whole rows are needed"),
        ({"context_attention": "ring"}, 2, False, "packed segments are needed"),
    ],
    ids=str,
)
def test_cudnn_computes_packed_segments_of_whole_rows_alone(
    changes: dict[str, Any], context: int, tree: bool, reason: str
) -> None:
    config = ModelConfig(head_width=128, compute_dtype="bfloat16", **changes)
    lengths = tuple(context if axis == "context" else 1 for axis in AXES)
    heads = (config.query_heads, config.kv_heads, config.kv_heads)
    shapes = [jax.ShapeDtypeStruct((1, 16, count, config.head_width), jnp.bfloat16) for count in heads]
    integers = jax.ShapeDtypeStruct((1, 16), jnp.int32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, positions: jax.Array) -> jax.Array:
        return packed_attention(config, end, positions if tree else None)(q, k, v, jnp.int32(0))

    options = {
        "axis_types": (AxisType.Explicit,) * len(AXES),
        "abstract_device": AbstractDevice("NVIDIA H200", 1, "gpu"),
    }
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh(lengths, AXES, **options)),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        traced = jax.make_jaxpr(attend)(*shapes, integers, integers)
    assert ("dot_product_attention_fwd" in str(traced)) == (not reason)
    assert bool(said) == bool(reason) and all(re.search(reason, str(warning.message)) for warning in said)
