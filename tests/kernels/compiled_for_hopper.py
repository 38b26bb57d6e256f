"""Compiles the kernels for Hopper GPUs without one: one JSON object a line for cuDNN, and for every shape.

    python -m tests.kernels.compiled_for_hopper

Runs in a process of its own that has the compiler (``jaxrl.check.environment``), which prints what it made where
MOSAIC_GPU_DUMP_PTX and MOSAIC_GPU_DUMP_PTXAS say so.
"""

import json
import re

import jax
import jax.numpy as jnp

from jaxrl.check import devices, targets
from jaxrl_kernels import interval_attention, make_plan
from tests.kernels import compositions
from tests.kernels.compiled import Shape, lowered

SHAPES = (
    Shape("grouped", 4096, 8, 2, 128),
    Shape("capped", 2048, 5, 1, 128, soft_cap=50.0),
    Shape("narrow", 2048, 4, 4, 64),
)
"""Both passes of each, with a window that is an argument."""


def by_cudnn(shape: Shape, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """How often each of cuDNN's functions is called by the compiled gradient of what "auto" takes for the shape."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    heads = {"groups": shape.query_heads // shape.kv_heads, "head_width": shape.width, "dtype": shape.dtype}

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, window: jax.Array) -> jax.Array:
        attended = interval_attention(q, k, v, end, window=window, plan=make_plan(end, **heads))
        return (attended.astype(jnp.float32) ** 2).sum()

    def array(*lengths: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(lengths, dtype, sharding=whole)

    q, k, v = (
        array(2, shape.tokens, count, shape.width, dtype=shape.dtype)
        for count in (shape.query_heads, shape.kv_heads, shape.kv_heads)
    )
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v, array(2, shape.tokens), array())
        program = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    called = re.findall(r'custom_call_target="__cudnn\$(\w+)"', program)
    return {name: called.count(name) for name in sorted(set(called))}


def main() -> None:
    two = devices.described(targets.parse("h200x2"))
    mesh = jax.sharding.Mesh(two[:1], ("one",))
    print(json.dumps({"cudnn": by_cudnn(SHAPES[0], mesh), "description": devices.target_config(two)}), flush=True)
    for shape in SHAPES:
        program = lowered(shape, mesh, platform="cuda")
        kernels = program.as_text().count("custom_call @mosaic_gpu")
        memory, scores = program.compile().memory_analysis(), 4 * shape.query_heads * shape.tokens**2
        answer = {"shape": shape.name, "kernels": kernels, "temporary": memory.temp_size_in_bytes, "too_much": scores}
        print(json.dumps(answer), flush=True)
    for answer in compositions.compiled(two, "cuda"):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
