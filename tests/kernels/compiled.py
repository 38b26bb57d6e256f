"""Compiles the TPU kernels for chips that are not there: one JSON object a line for every shape.

    python -m tests.kernels.compiled v5e:2x2

Runs in a process of its own that has the compiler (``jaxrl.check.environment``).
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh

from jaxrl_kernels import interval_attention_with_lse, make_plan, paged_attention_with_lse
from jaxrl_kernels.choice import device_kind
from jaxrl_kernels.paged_attention.quantized import LARGEST, Scaled
from tests.kernels import compositions


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


@dataclasses.dataclass(frozen=True)
class PagedShape:
    """Rows whose queries attend to pages, of which there are as many as all page tables name."""

    name: str
    rows: int
    count: int
    query_heads: int
    kv_heads: int
    width: int = 128
    page: int = 16
    table: int = 128
    dtype: str = "bfloat16"
    soft_cap: float = 0.0
    pages: str = ""

    @property
    def page_dtype(self) -> str:
        """Type of the numbers in pages, which have scales where it is given."""
        return self.pages or self.dtype


INT8, FLOAT8 = LARGEST
PAGED_SHAPES = (
    PagedShape("decode", rows=64, count=1, query_heads=32, kv_heads=8),
    PagedShape("prefill", rows=4, count=512, query_heads=32, kv_heads=8, table=2048, soft_cap=30.0),
    PagedShape("decode_of_one_head", rows=16, count=1, query_heads=5, kv_heads=1, page=64, table=512),
    PagedShape("prefill_of_heads_of_their_own", rows=4, count=128, query_heads=32, kv_heads=32, soft_cap=30.0),
    PagedShape("wide_prefill", rows=4, count=256, query_heads=16, kv_heads=16, width=256),
    PagedShape("decode_of_heads_of_their_own", rows=16, count=1, query_heads=32, kv_heads=32, page=256, table=8),
    PagedShape("float32", rows=4, count=64, query_heads=4, kv_heads=4, page=8, width=256, dtype="float32"),
    PagedShape("decode_int8", rows=64, count=1, query_heads=32, kv_heads=8, page=128, table=16, pages=INT8),
    PagedShape("prefill_float8", rows=4, count=128, query_heads=32, kv_heads=32, page=128, table=16, pages=FLOAT8),
    PagedShape("decode_float8_of_one_head", rows=16, count=1, query_heads=5, kv_heads=1, page=256, pages=FLOAT8),
    PagedShape("float32_int8", rows=4, count=64, query_heads=4, kv_heads=2, page=128, dtype="float32", pages=INT8),
)
"""With the log-sum-exp, and with a window that is an argument."""


TOO_LARGE = 1 << 15
"""Rows of 4 KiB that no chip has the vector memory for."""

IMPLEMENTATIONS = {"tpu": "auto", "cuda": "mosaic_gpu"}


def lowered(shape: Shape, mesh: Mesh | AbstractMesh, platform: str = "tpu") -> jax.stages.Lowered:
    """Output, log-sum-exp and all gradients, for the device of this mesh."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(*lengths: int, dtype: str = shape.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(lengths, dtype, sharding=whole)

    def both(
        q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, window: jax.Array, cotangents: tuple
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
        heads = {"groups": shape.query_heads // shape.kv_heads, "head_width": shape.width, "dtype": shape.dtype}
        plan = make_plan(end, **heads, implementation=IMPLEMENTATIONS[platform])
        if plan.backend == "xla":
            raise AssertionError(f"auto took xla for {shape} on {device_kind()}")

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return interval_attention_with_lse(q, k, v, end, window=window, soft_cap=shape.soft_cap, plan=plan)

        results, pull = jax.vjp(attend, q, k, v)
        return results, pull(cotangents)

    tokens = shape.tokens
    q, k = array(1, tokens, shape.query_heads, shape.width), array(1, tokens, shape.kv_heads, shape.width)
    integers = array(1, tokens, dtype="int32"), array(dtype="int32")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(both).trace(
            q, k, k, *integers, (q, array(1, tokens, shape.query_heads, dtype=jnp.float32.__name__))
        )
        return traced.lower(lowering_platforms=(platform,))


def lowered_paged(shape: PagedShape, mesh: Mesh | AbstractMesh) -> jax.stages.Lowered:
    """Output and log-sum-exp, likewise."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(*lengths: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(lengths, dtype, sharding=whole)

    def attend(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        return paged_attention_with_lse(*arrays[:-1], window=arrays[-1], soft_cap=shape.soft_cap)

    q = array(shape.rows, shape.count, shape.query_heads, shape.width, dtype=shape.dtype)
    lengths = shape.rows * shape.table, shape.kv_heads, shape.page
    pages = array(*lengths, shape.width, dtype=shape.page_dtype)
    pages = Scaled(pages, array(*lengths, dtype="float32")) if shape.pages else pages
    integers = array(shape.rows, shape.table), array(shape.rows, shape.count), array()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(attend).trace(q, pages, pages, *integers).lower(lowering_platforms=("tpu",))


def lowered_copy(mesh: Mesh | AbstractMesh, rows: int) -> jax.stages.Lowered:
    """A copy in blocks of so many rows."""

    def copy(source: jax.Array, target: jax.Array) -> None:
        target[...] = source[...]

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = jax.ShapeDtypeStruct((2 * rows, 1024), jnp.float32, sharding=sharding)
    block = pl.BlockSpec((rows, 1024), lambda i: (i, 0))
    call = pl.pallas_call(copy, grid=(2,), in_specs=[block], out_specs=block, out_shape=array)
    return jax.jit(call).trace(array).lower(lowering_platforms=("tpu",))


def main(topology: str) -> None:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[:2]
    device = devices[0]
    mesh = Mesh([device], ("one",))
    scores = {shape: 4 * shape.query_heads * shape.tokens**2 for shape in SHAPES}
    tokens = {shape: shape.rows * shape.table * shape.page for shape in PAGED_SHAPES}
    tables = {
        shape: count * shape.kv_heads * shape.width * jnp.dtype(shape.page_dtype).itemsize
        for shape, count in tokens.items()
    }
    for shape, too_much in (scores | tables).items():
        program = (lowered if isinstance(shape, Shape) else lowered_paged)(shape, mesh)
        kernels = program.as_text().count("tpu_custom_call")
        memory = program.compile().memory_analysis()
        answer = {"shape": shape.name, "kind": device.device_kind, "kernels": kernels}
        print(json.dumps(answer | {"temporary": memory.temp_size_in_bytes, "too_much": too_much}), flush=True)
    for answer in compositions.compiled(devices, "tpu"):
        print(json.dumps(answer), flush=True)
    try:
        lowered_copy(mesh, TOO_LARGE).compile()
    except jax.errors.JaxRuntimeError as error:
        print(json.dumps({"shape": "too_large", "refused": str(error)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
