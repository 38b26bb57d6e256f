"""Every kernel lowered for the chips that it is for, which plain JAX does anywhere.

What a chip has no instruction for, and blocks that are no whole tiles, are refused here already; whether they fit is
for the compilers (``test_compiled.py``).
"""

import re

import jax
import pytest
from jax.sharding import AbstractMesh

from jaxrl_kernels.bars import rivals
from jaxrl_kernels.interval_attention import backends as interval
from tests.kernels import compiled_for_hopper, compositions
from tests.kernels.compiled import PAGED_SHAPES, SHAPES, PagedShape, Shape, lowered, lowered_copy, lowered_paged


def mesh_of(kind: str, devices: int = 1) -> AbstractMesh:
    """So many devices of this kind."""
    device = jax.sharding.AbstractDevice(kind, 1, "tpu" if kind.startswith("TPU") else "gpu")
    return AbstractMesh((devices,), (compositions.SPLIT,), abstract_device=device)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU7x"])
@pytest.mark.parametrize("shape", [*SHAPES, *PAGED_SHAPES], ids=lambda shape: shape.name)
def test_for_tpus(kind: str, shape: Shape | PagedShape) -> None:
    program = lowered(shape, mesh_of(kind)) if isinstance(shape, Shape) else lowered_paged(shape, mesh_of(kind))
    # Of interval attention: forward, gradient of queries, gradients of keys and values.
    assert program.as_text().count("tpu_custom_call") == (3 if isinstance(shape, Shape) else 1)


@pytest.mark.parametrize("shape", compiled_for_hopper.SHAPES, ids=lambda shape: shape.name)
def test_for_hopper(shape: Shape) -> None:
    program = lowered(shape, mesh_of("NVIDIA H200"), platform="cuda")
    assert program.as_text().count("custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize(("kind", "platform"), [("TPU v5 lite", "tpu"), ("TPU7x", "tpu"), ("NVIDIA H200", "cuda")])
@pytest.mark.parametrize("name", compositions.COMPOSITIONS)
def test_what_is_composed_of_them(name: str, kind: str, platform: str) -> None:
    program = compositions.lowered(name, mesh_of(kind, devices=2), platform).as_text()
    kernels = compositions.COMPOSITIONS[name].kernels if platform == "tpu" else 0
    called = [len(re.findall(call, program)) for call in ("tpu_custom_call", "@mosaic_gpu|@__cudnn")]
    assert called == [0, 0] if not kernels else called[0] >= kernels and not called[1]


@pytest.mark.parametrize("packed", [False, True])
def test_what_kernels_for_tpus_are_measured_against(packed: bool) -> None:
    mesh, tokens, whole = mesh_of("TPU v5 lite"), 1024, jax.sharding.PartitionSpec()

    def array(*lengths: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(lengths, dtype, sharding=jax.sharding.NamedSharding(mesh, whole))

    with jax.sharding.use_abstract_mesh(mesh):
        shape = interval.Shape(1, tokens, tokens, 4, 128, "bfloat16")
        name, rival = rivals.packed(shape) if packed else rivals.causal()

        def both(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> tuple[jax.Array, ...]:
            output, pull = jax.vjp(lambda q, k, v: rival(q, k, v, end), q, k, v)
            return output, *pull(output)

        q, k = (array(1, tokens, count, 128) for count in (8, 2))
        traced = jax.jit(both).trace(q, k, k, array(1, tokens, dtype="int32"))
        program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert name.startswith("splash") and program.count("tpu_custom_call") == 3


def test_blocks_that_are_no_whole_tiles_are_refused() -> None:
    mesh = mesh_of("TPU v5 lite")
    assert "tpu_custom_call" in lowered_copy(mesh, rows=104).as_text()
    with pytest.raises(ValueError, match="divisible by 8 and 128"):
        lowered_copy(mesh, rows=100)
