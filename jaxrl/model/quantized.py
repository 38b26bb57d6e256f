"""Frozen matrices in 8 or 4 bits a number, for adapters to stand on; where they multiply they are floats again.

A matrix is cut into blocks along its last input axis. Each block keeps its largest magnitude, and of every number the
nearest of a few levels between minus and plus that magnitude: 255 even ones for ``int8``; for ``nf4`` the 16 of
Dettmers et al. 2023, "QLoRA", appendix E, which normally distributed weights hit about equally often.

Floats made of codes become the same codes again, also when they were rounded to bfloat16 in between: the largest number
of a block is its magnitude exactly, and the others stay nearest to their levels. So a folder of them says all.
"""

import functools
import itertools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxrl.config import ConfigError
from jaxrl.mesh import Rules, divisors, partition_spec, pieces, to_compute
from jaxrl.model.spec import ParamSpec, Specs

BLOCK = 64
"""Numbers of a block, as in QLoRA; where it does not divide the axis, their greatest common divisor."""

NUMBERS = "block"
"""Logical name of the axis inside a block."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Levels of ``nf4``. Two codes are in one byte: of the first half of a block in the lower bits, of the second above."""

INT8_LEVELS = 127
"""Levels of ``int8`` on either side of 0."""


@flax.struct.dataclass
class Quantized:
    """A matrix in codes; in a table of parameters, their two specifications.

    Attributes:
        codes: [..., blocks, numbers (nf4: half as many bytes), ...] int8 or uint8.
        magnitudes: [..., blocks, ...] bfloat16.
        kind: "int8" or "nf4".
        axis: of the matrix that is cut into blocks, counted from the end.
        dtype: of the matrix.
    """

    codes: Any
    magnitudes: Any
    kind: str = flax.struct.field(pytree_node=False)
    axis: int = flax.struct.field(pytree_node=False)
    dtype: str = flax.struct.field(pytree_node=False)

    def rounded(self, dtype: str | jnp.dtype | None = None) -> jax.Array:
        """The matrix, split as the codes are, in its own type unless another is given."""
        levels = _int8_values(self.codes) if self.kind == "int8" else _nf4_values(self.codes, self.axis)
        inner = levels.ndim + self.axis
        values = levels * jnp.expand_dims(self.magnitudes.astype(jnp.float32), inner)
        shape = (*values.shape[: inner - 1], values.shape[inner - 1] * values.shape[inner], *values.shape[inner + 1 :])
        split = _partition(values)
        merged = None if split is None else jax.sharding.PartitionSpec(*split[:inner], *split[inner + 1 :])
        return jnp.reshape(values, shape, out_sharding=merged).astype(dtype or self.dtype)


def in_compute(weight: jax.Array | Quantized, dtype: jnp.dtype, axes: tuple[str | None, ...]) -> jax.Array:
    """A matrix in the compute type and layout. Codes travel as they are and are rounded where they arrive.

    Args:
        axes: logical axes of the matrix.
    """
    if not isinstance(weight, Quantized):
        return to_compute(weight.astype(dtype), axes)
    cut = len(axes) + weight.axis + 1
    codes = to_compute(weight.codes, (*axes[:cut], None, *axes[cut:]))
    return weight.replace(codes=codes, magnitudes=to_compute(weight.magnitudes, axes)).rounded(dtype)


def quantized_specs(specs: Specs, kind: str) -> Specs:
    """The decoder's table with codes and magnitudes of the matrices that are kept so: those of attention and of
    feed-forwards, experts included, but not embeddings, output head and router.

    Raises:
        ConfigError: the numbers of a block cannot be paired in bytes.
    """
    layers = {name: _pair(spec, kind) if _is_cut(name, spec) else spec for name, spec in specs["layers"].items()}
    return {**specs, "layers": layers}


def check_blocks(specs: Specs, mesh: Mesh | AbstractMesh, rules: Rules) -> None:
    """Every device must get whole blocks of what is kept in codes.

    Args:
        specs: see ``quantized_specs``.

    Raises:
        ConfigError: a mesh would cut through blocks; the message says what would not.
    """
    for weight in specs["layers"].values():
        if not isinstance(weight, Quantized):
            continue
        cut = len(weight.magnitudes.axes) + weight.axis
        axis, blocks = weight.magnitudes.axes[cut], weight.magnitudes.shape[cut]
        block = weight.codes.shape[cut + 1] * (2 if weight.kind == "nf4" else 1)
        if blocks % (parts := pieces(axis, rules, mesh)):
            (over,) = partition_spec((axis,), rules, mesh)
            raise ConfigError(
                f"LoraConfig.base={weight.kind!r}: {weight.codes.hf_name} has axis {axis!r} of length "
                f"{blocks * block} in {blocks} blocks of {block} numbers, which cannot be split over "
                f"{over if isinstance(over, str) else ' x '.join(over)} = {parts} devices; choose one of "
                f"{', '.join(map(str, divisors(blocks)))}, or LoraConfig.base='none'"
            )


def matching(specs: Specs, params: dict[str, Any]) -> Specs:
    """The decoder's table, with codes for the matrices that ``params`` has in codes."""
    kinds = {weight.kind for weight in params["layers"].values() if isinstance(weight, Quantized)}
    return quantized_specs(specs, kinds.pop()) if kinds else specs


def quantized(name: str, spec: ParamSpec, weight: jax.Array, kind: str) -> jax.Array | Quantized:
    """A parameter of the layers as ``quantized_specs`` has it, split as it was; unchanged if it is not kept in codes.

    Args:
        name: in the table of the layers.
    """
    if not _is_cut(name, spec):
        return weight
    axis, block = _blocks(spec)
    codes, magnitudes = _encode(weight, kind, axis, block)
    return Quantized(codes, magnitudes, kind, axis, str(spec.dtype))


def all_rounded(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters in which every matrix is floats, of the type it had."""
    layers = {
        name: _rounded(weight) if isinstance(weight, Quantized) else weight for name, weight in params["layers"].items()
    }
    return {**params, "layers": layers}


@jax.jit
def _rounded(weight: Quantized) -> jax.Array:
    return weight.rounded()


@functools.partial(jax.jit, static_argnames=("kind", "axis", "block"))
def _encode(weight: jax.Array, kind: str, axis: int, block: int) -> tuple[jax.Array, jax.Array]:
    inner = weight.ndim + axis + 1
    shape = (*weight.shape[: inner - 1], weight.shape[inner - 1] // block, block, *weight.shape[inner:])
    split = _partition(weight)
    cut = None if split is None else jax.sharding.PartitionSpec(*split[:inner], None, *split[inner:])
    numbers = jnp.reshape(weight.astype(jnp.float32), shape, out_sharding=cut)
    magnitudes = jnp.abs(numbers).max(axis=inner).astype(jnp.bfloat16)
    kept = jnp.expand_dims(magnitudes.astype(jnp.float32), inner)
    relative = jnp.where(kept > 0, numbers / jnp.where(kept > 0, kept, 1.0), 0.0)
    if kind == "int8":
        return jnp.clip(jnp.round(relative * INT8_LEVELS), -INT8_LEVELS, INT8_LEVELS).astype(jnp.int8), magnitudes
    # Compared with what lies between the levels, one after the other: a search in a table would be slow on a TPU.
    codes = sum((relative > (low + high) / 2).astype(jnp.uint8) for low, high in itertools.pairwise(NF4))
    first, second = (jax.lax.slice_in_dim(codes, start, start + block // 2, axis=inner) for start in (0, block // 2))
    return first | second << 4, magnitudes


def _int8_values(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32) / INT8_LEVELS


def _nf4_values(codes: jax.Array, axis: int) -> jax.Array:
    both = jnp.concatenate([codes & 15, codes >> 4], axis=codes.ndim + axis)
    values = jnp.full_like(both, NF4[0], jnp.float32)
    for code, level in enumerate(NF4[1:], start=1):
        values = jnp.where(both == code, level, values)
    return values


def _partition(array: jax.Array) -> tuple | None:
    """How an array is split by its type, an entry an axis; None where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    spec = jax.typeof(array).sharding.spec
    return (*spec, *[None] * (array.ndim - len(spec)))


def _is_cut(name: str, spec: ParamSpec) -> bool:
    return len(spec.hf_layout) == 2 and bool(spec.stacked_axes) and name != "router"


def _blocks(spec: ParamSpec) -> tuple[int, int]:
    """The axis that is cut, counted from the end, and the numbers of a block."""
    axis = spec.axes.index(spec.hf_layout[1][-1])
    return axis - len(spec.axes), math.gcd(BLOCK, spec.shape[axis])


def _pair(spec: ParamSpec, kind: str) -> Quantized:
    axis, block = _blocks(spec)
    cut = len(spec.axes) + axis
    if kind == "nf4" and block % 2:
        raise ConfigError(
            f"LoraConfig.base='nf4' packs two numbers in a byte, but axis {spec.axes[cut]!r} of {spec.hf_name} has "
            f"length {spec.shape[cut]}; use 'int8'"
        )
    blocks = (*spec.shape[:cut], spec.shape[cut] // block)
    # No layout of a folder's tensor: what is in codes has no tensor of its own there.
    codes = ParamSpec(
        (*blocks, block if kind == "int8" else block // 2, *spec.shape[cut + 1 :]),
        jnp.dtype(jnp.int8 if kind == "int8" else jnp.uint8),
        (*spec.axes[: cut + 1], NUMBERS, *spec.axes[cut + 1 :]),
        spec.init,
        spec.hf_name,
        (),
    )
    magnitudes = ParamSpec(
        (*blocks, *spec.shape[cut + 1 :]), jnp.dtype(jnp.bfloat16), spec.axes, spec.init, spec.hf_name, ()
    )
    return Quantized(codes, magnitudes, kind, axis, str(spec.dtype))
