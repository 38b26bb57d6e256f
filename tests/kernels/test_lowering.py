"""Every kernel lowered for the chips that it is for, which plain JAX does anywhere.

What a chip has no instruction for, and blocks that are no whole tiles, are refused here already; whether they fit is
for the compilers (``test_compiled.py``).
"""

import jax
import pytest
from jax.sharding import AbstractMesh

from tests.kernels import compiled_for_hopper
from tests.kernels.compiled import PAGED_SHAPES, SHAPES, PagedShape, Shape, lowered, lowered_copy, lowered_paged


def mesh_of(kind: str) -> AbstractMesh:
    """One device of this kind."""
    device = jax.sharding.AbstractDevice(kind, 1, "tpu" if kind.startswith("TPU") else "gpu")
    return AbstractMesh((1,), ("one",), abstract_device=device)


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


def test_blocks_that_are_no_whole_tiles_are_refused() -> None:
    mesh = mesh_of("TPU v5 lite")
    assert "tpu_custom_call" in lowered_copy(mesh, rows=104).as_text()
    with pytest.raises(ValueError, match="divisible by 8 and 128"):
        lowered_copy(mesh, rows=100)
