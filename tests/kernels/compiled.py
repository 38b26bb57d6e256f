"""Compiles the TPU kernels for chips that are not there: one JSON object a line for every shape.

    python -m tests.kernels.compiled v5e:2x2

Runs in a process of its own that has the compiler (``jaxrl.check.environment``).
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxrl_kernels import interval_attention_with_lse, make_plan


@dataclasses.dataclass(frozen=True)
class Shape:
    """One row; the blocks are those of the table."""

    name: str
    tokens: int
    query_heads: int
    kv_heads: int
    width: int
    dtype: str = "bfloat16"
    soft_cap: float = 0.0


SHAPES = (
    Shape("grouped", 4096, 8, 2, 128),
    Shape("float32", 2048, 2, 2, 128, dtype="float32"),
    Shape("narrow", 2048, 4, 2, 64, soft_cap=30.0),
    Shape("wide_float32", 1024, 4, 2, 256, dtype="float32", soft_cap=50.0),
)
"""Both passes of each, with a window that is an argument."""


def lowered(shape: Shape, device: jax.Device) -> jax.stages.Lowered:
    """Output, log-sum-exp and all gradients."""
    mesh = jax.sharding.Mesh([device], ("one",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(*lengths: int, dtype: str = shape.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(lengths, dtype, sharding=whole)

    def both(
        q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, window: jax.Array, cotangents: tuple
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
        heads = {"groups": shape.query_heads // shape.kv_heads, "head_width": shape.width}
        plan = make_plan(end, **heads)
        if plan.backend != "tpu":
            raise AssertionError(f"auto took {plan.backend} for {shape} on {device.device_kind}")

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return interval_attention_with_lse(q, k, v, end, window=window, soft_cap=shape.soft_cap, plan=plan)

        results, pull = jax.vjp(attend, q, k, v)
        return results, pull(cotangents)

    tokens = shape.tokens
    q, k = array(1, tokens, shape.query_heads, shape.width), array(1, tokens, shape.kv_heads, shape.width)
    integers = array(1, tokens, dtype="int32"), array(dtype="int32")
    with jax.set_mesh(mesh):
        traced = jax.jit(both).trace(
            q, k, k, *integers, (q, array(1, tokens, shape.query_heads, dtype=jnp.float32.__name__))
        )
        return traced.lower(lowering_platforms=("tpu",))


def main(topology: str) -> None:
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    for shape in SHAPES:
        program = lowered(shape, device)
        kernels = program.as_text().count("tpu_custom_call")
        memory = program.compile().memory_analysis()
        scores = 4 * shape.query_heads * shape.tokens**2
        answer = {"shape": shape.name, "kind": device.device_kind, "kernels": kernels}
        print(json.dumps(answer | {"temporary": memory.temp_size_in_bytes, "scores": scores}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
