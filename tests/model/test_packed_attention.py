"""How the tokens of a row that a mesh splits meet its keys. That both ways give the same is tested on meshes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

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
