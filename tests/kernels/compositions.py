"""What is composed of the kernels, and log-probabilities over a split vocabulary, lowered for two devices."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxrl_kernels import group_decode, linear_logprob, make_groups, ring_attention

SPLIT = "split"
"""The only axis of the mesh."""

WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Composition:
    """What every one of two devices computes.

    Attributes:
        local: of one device.
        arrays: shape, type and how it is split, of each argument.
        results: how they are split.
        kernels: Pallas kernels on a TPU, at least.
        too_much: bytes that a device never holds: of its pages, of the scores of its queries, of its logits.
    """

    local: Callable[..., Any]
    arrays: tuple[tuple[tuple[int, ...], str, PartitionSpec], ...]
    results: Any
    kernels: int
    too_much: int


def _decode(q, keys, values, table, positions, shared) -> jax.Array:
    return group_decode(q, keys, values, table, positions, make_groups(table, shared, 16))


def _ring(q, k, v, end, cotangent) -> tuple[jax.Array, ...]:
    output, pull = jax.vjp(lambda q, k, v: ring_attention(q, k, v, end, axis=SPLIT, window=1500), q, k, v)
    return output, *pull(cotangent)


def _logprob(hidden, matrix, targets) -> tuple[jax.Array, ...]:
    def scored(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        found = linear_logprob(hidden, (matrix,), targets, temperature=0.7, vocab_axis=SPLIT)
        return found.logprob.sum() + found.entropy.sum()

    return jax.grad(scored, argnums=(0, 1))(hidden, matrix)


def _arrays(dtype: str, spec: PartitionSpec, *shapes: tuple[int, ...]) -> list[tuple]:
    return [(shape, dtype, spec) for shape in shapes]


HEADS, PAGES, TOKENS, ROWS = (PartitionSpec(*[None] * axis, SPLIT) for axis in (2, 1, 1, 0))
COMPOSITIONS = {
    "group_decode": Composition(
        _decode,
        (
            *_arrays("bfloat16", HEADS, (64, 1, 32, 128)),
            *_arrays("bfloat16", PAGES, *[(4096, 8, 16, 128)] * 2),
            *_arrays("int32", WHOLE, (64, 64), (64, 1), (64,)),
        ),
        HEADS,
        kernels=2,
        too_much=4096 * 4 * 16 * 128 * 2,
    ),
    "ring_attention": Composition(
        _ring,
        (
            *_arrays("bfloat16", TOKENS, (1, 4096, 8, 128), *[(1, 4096, 2, 128)] * 2),
            *_arrays("int32", WHOLE, (1, 4096)),
            *_arrays("bfloat16", TOKENS, (1, 4096, 8, 128)),
        ),
        (TOKENS,) * 4,
        kernels=3,
        too_much=8 * 2048 * 4096 * 4,
    ),
    "linear_logprob": Composition(
        _logprob,
        (
            *_arrays("bfloat16", WHOLE, (4096, 1024)),
            *_arrays("bfloat16", ROWS, (32768, 1024)),
            *_arrays("int32", WHOLE, (4096,)),
        ),
        (WHOLE, ROWS),
        kernels=0,
        too_much=4096 * 16384 * 4,
    ),
}


def lowered(name: str, mesh: Mesh | AbstractMesh, platform: str) -> jax.stages.Lowered:
    """One of them for the devices of this mesh."""
    it = COMPOSITIONS[name]
    specs = tuple(spec for *_, spec in it.arrays)
    spread = jax.shard_map(it.local, in_specs=specs, out_specs=it.results, check_vma=False)
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)) for shape, dtype, spec in it.arrays]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(spread).trace(*given).lower(lowering_platforms=(platform,))


def compiled(devices: Sequence[jax.Device], platform: str) -> Iterator[dict[str, Any]]:
    """What the compiler says of each for these two devices."""
    for name in COMPOSITIONS:
        memory = lowered(name, Mesh(devices, (SPLIT,)), platform).compile().memory_analysis()
        yield {"composition": name, "temporary": memory.temp_size_in_bytes}
