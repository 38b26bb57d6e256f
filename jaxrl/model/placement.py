"""Between a parameter and the tensors of a folder that make it up: which they are, and how their bytes get to devices.

A parameter that stacks the tensors of all layers is never on the host as a whole. It is made empty where it will rest
and then filled tensor by tensor, in place; of every tensor a device gets, and the host reads, only the device's share.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.model.spec import ParamSpec
from jaxrl.model.tensor_files import Headers, read_tensor

Place = tuple[int, ...]
"""Index of a tensor on the stacked axes of its parameter; empty where nothing is stacked."""


def load_parameter(
    spec: ParamSpec, sharding: NamedSharding, headers: Headers, on_tensors: Callable[[Iterable[str]], None]
) -> jax.Array:
    """A parameter with ``sharding``, converted to its type. All processes of the mesh call this together.

    At any time the host holds one tensor of the folder, or of every split stacked axis (experts over devices) one for
    each piece.

    Args:
        headers: of tensors that fit ``spec``.
        on_tensors: told the names that have arrived.

    Raises:
        ConfigError: a file is damaged.
    """
    names, stacked = spec.hf_names, len(spec.stacked_axes)
    mesh, partition = sharding.mesh, _padded(sharding.spec, len(spec.shape))
    pieces = [math.prod(mesh.shape[axis] for axis in _mesh_axes(part)) for part in partition[:stacked]]
    steps = [length // count for length, count in zip(spec.shape[:stacked], pieces, strict=True)]
    tensor_sharding = NamedSharding(mesh, PartitionSpec(*partition[:stacked], *_tensor_partition(spec, partition)))
    place_tensors = _compiled_placement(spec, sharding, tensor_sharding)
    empty = jax.jit(lambda: jnp.zeros(spec.shape, spec.dtype), out_shardings=sharding)
    parameter = empty() if stacked else None
    for step in np.ndindex(*steps):
        # With a split stacked axis, the tensors at the same place of every piece come in one go.
        here = {
            piece: names[tuple(p * n + s for p, n, s in zip(piece, steps, step, strict=True))]
            for piece in np.ndindex(*pieces)
        }
        dtype = functools.reduce(jnp.promote_types, (headers[name].dtype for name in here.values()))
        tensors = jax.make_array_from_callback(
            (*pieces, *spec.hf_shape), tensor_sharding, _reader(here, headers, stacked, dtype), dtype=dtype
        )
        parameter = place_tensors(parameter, tensors, np.asarray(step, np.int32))
        jax.block_until_ready(parameter)  # or else the host would read on while devices wait, and hold all it has read
        on_tensors(here.values())
    return parameter


def whole_tensor(spec: ParamSpec, parameter: jax.Array | np.ndarray, place: Place) -> np.ndarray:
    """One tensor as a folder has it, on the host. All processes that share the parameter call this together."""
    part = parameter[place] if isinstance(parameter, np.ndarray) else _part(parameter, place)
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
    return spec.to_hf(np.asarray(part))


def on_mesh(parameter: jax.Array | np.ndarray) -> bool:
    """Whether it is split over the devices of a mesh, rather than on the host or on one device."""
    return isinstance(parameter, jax.Array) and isinstance(parameter.sharding, NamedSharding)


def _part(parameter: jax.Array, place: Place) -> jax.Array:
    """``parameter[place]``, split as the rest of the parameter is."""
    if not place:
        return parameter
    if not on_mesh(parameter):
        return _compiled_part(parameter, place, None)
    partition = _padded(parameter.sharding.spec, parameter.ndim)
    sharding = NamedSharding(parameter.sharding.mesh, PartitionSpec(*partition[len(place) :]))
    if any(part is not None for part in partition[: len(place)]):
        return parameter.at[place].get(out_sharding=sharding)  # a slice of a split axis cannot be compiled
    return _compiled_part(parameter, place, sharding)  # where it can, nothing but the slice is copied


@functools.partial(jax.jit, static_argnums=2)
def _compiled_part(parameter: jax.Array, place: tuple[jax.Array, ...], sharding: NamedSharding | None) -> jax.Array:
    return parameter.at[place].get(out_sharding=sharding)


def _reader(
    names: dict[Place, str], headers: Headers, stacked: int, dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """The callback that gives a device its share; devices with the same share have it read once."""
    pieces = [1 + max(axis) for axis in zip(*names, strict=True)]

    @functools.cache
    def read(bounds: tuple[tuple[int | None, int | None], ...]) -> np.ndarray:
        index = tuple(slice(*bound) for bound in bounds)
        ranges = [range(count)[part] for count, part in zip(pieces, index, strict=False)]
        shares = [
            read_tensor(names[piece], headers[names[piece]], index[stacked:]).astype(dtype, copy=False)
            for piece in itertools.product(*ranges)
        ]
        joined = np.stack(shares) if len(shares) > 1 else shares[0]
        return joined.reshape(*map(len, ranges), *shares[0].shape)

    return lambda index: read(tuple((part.start, part.stop) for part in index))


def _compiled_placement(
    spec: ParamSpec, sharding: NamedSharding, tensor_sharding: NamedSharding
) -> Callable[[jax.Array | None, jax.Array, np.ndarray], jax.Array]:
    """The function that lays a folder's tensors out as the parameter has them and puts them at a place of every piece.

    Every device works on its own share: nothing is exchanged, and the parameter is updated in place.
    """
    stacked, flat = len(spec.stacked_axes), [axis for merged in spec.hf_layout for axis in merged]
    order = [*range(stacked), *(stacked + flat.index(axis) for axis in spec.axes[stacked:])]
    parts = dict(zip(spec.axes, sharding.shard_shape(spec.shape), strict=True))

    def laid_out(tensors: jax.Array) -> jax.Array:
        split = tensors.reshape(*tensors.shape[:stacked], *(parts[axis] for axis in flat))
        return split.transpose(order).astype(spec.dtype)

    def put(parameter: jax.Array, tensors: jax.Array, step: jax.Array) -> jax.Array:
        start = (*(step[axis] for axis in range(stacked)), *[0] * (len(spec.axes) - stacked))
        return jax.lax.dynamic_update_slice(parameter, laid_out(tensors), start)

    if not stacked:
        only = jax.jit(
            jax.shard_map(laid_out, mesh=sharding.mesh, in_specs=tensor_sharding.spec, out_specs=sharding.spec)
        )
        return lambda _, tensors, __: only(tensors)
    return jax.jit(
        jax.shard_map(
            put,
            mesh=sharding.mesh,
            in_specs=(sharding.spec, tensor_sharding.spec, PartitionSpec()),
            out_specs=sharding.spec,
        ),
        donate_argnums=0,
    )


def _tensor_partition(spec: ParamSpec, partition: tuple) -> list:
    """How a folder's tensor is split so that every device's share of it is its share of the parameter.

    Raises:
        ValueError: a split inside a merged axis, where a share would not be one slice.
    """
    of = dict(zip(spec.axes, partition, strict=True))
    for merged in spec.hf_layout:
        for axis in merged[1:]:
            if of[axis] is not None:
                raise ValueError(
                    f"{spec.hf_name}: axis {axis!r} is split, but only {merged[0]!r} can be; change the rule"
                )
    return [of[merged[0]] for merged in spec.hf_layout]


def _padded(partition: PartitionSpec, length: int) -> tuple:
    return (*partition, *[None] * (length - len(partition)))


def _mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()
