"""Hand the trainer's weights to the rollout engines: cast, reshard on the devices, check that all of them arrived."""

import asyncio
import contextlib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxrl import mesh as meshes
from jaxrl.config import ModelConfig
from jaxrl.model import lora, quantized, spec, transformer
from jaxrl.rollout.fleet import Fleet
from jaxrl.train import transfer


async def hand_over(
    params: Any,
    model: ModelConfig,
    fleet: Fleet,
    version: int,
    launches: contextlib.AbstractContextManager[Any] | None = None,
) -> None:
    """Give every replica the trainer's weights between two of its rounds, whatever sequences are open.

    Its old weights are freed before the new ones are made, so that one copy is held at any time.

    Args:
        params: the trainer's, on the devices of the fleet or on others.
        version: name of these weights.
        launches: as for ``Engine``.

    Raises:
        ValueError: as for ``rollout_params``; the fleet keeps what it has.
    """
    _check(params, transformer.param_specs(model))

    def moved() -> tuple[Any, ...]:
        with launches or contextlib.nullcontext():
            return rollout_params(params, model, fleet.mesh)

    async with fleet.between_rounds():
        fleet.release_weights()
        fleet.set_weights(await asyncio.to_thread(moved), version)


def rollout_params(params: Any, model: ModelConfig, mesh: Mesh) -> tuple[Any, ...]:
    """Copies of ``params``, one for each replica, split over its devices: what is multiplied is in the compute type.

    A weight is cast where it rests, and travels straight from there to where it is used, never through the host. What
    is cast and not yet there is bounded: other devices get a weight in blocks (``transfer``), the same ones a few
    layers at a time, see ``layers_at_once``. The copies are real even where nothing has to move: the trainer donates
    its buffers to the next update.

    Args:
        params: the trainer's weights.
        mesh: from ``mesh.make_rollout_mesh``, of the devices that hold ``params`` or of others.

    Raises:
        ValueError: a weight is missing, extra, or of another shape than the model's specification says.
        ConfigError: the rollout mesh cannot split a weight.
    """
    specs = transformer.param_specs(model)
    _check(params, specs)
    return _moved(params, specs, model, mesh, may_alias=False)


def rollout_base(base: lora.Base, model: ModelConfig, mesh: Mesh) -> tuple[lora.Base, ...]:
    """Frozen weights for each replica, once for all steps; otherwise as ``rollout_params``.

    Nothing consumes them, so weights that are there in the right type already are the trainer's own and no copy. They
    must not be released (``Fleet.release_weights``).
    """
    specs = quantized.matching(transformer.param_specs(model), base.params)
    _check(base.params, specs)
    return tuple(base.replace(params=params) for params in _moved(base.params, specs, model, mesh, may_alias=True))


def with_adapters(
    bases: tuple[lora.Base, ...], adapters: lora.Adapters, specs: spec.Specs, model: ModelConfig, mesh: Mesh
) -> tuple[Any, ...]:
    """The weights of ``rollout_base`` themselves, with copies of the trainer's adapters.

    Args:
        specs: the adapters' table.

    Raises:
        ValueError: an adapter is missing, extra, or of another shape than its specification says.
    """
    _check(adapters, specs)
    moved = _moved(lora.scaled(adapters, bases[0].scale), specs, model, mesh, may_alias=False)
    return tuple(lora.attached(base.params, own) for base, own in zip(bases, moved, strict=True))


def _moved(params: Any, specs: spec.Specs, model: ModelConfig, mesh: Mesh, *, may_alias: bool) -> tuple[Any, ...]:
    devices, under_way = set(mesh.devices.flat), []

    def move(leaf: jax.Array, one: spec.ParamSpec, sharding: NamedSharding) -> jax.Array:
        dtype = one.compute_dtype(model.compute_dtype)
        if devices.isdisjoint(leaf.sharding.device_set):
            return transfer.carried(leaf, dtype, sharding)
        moved = _resharded(leaf.astype(dtype), sharding, may_alias=may_alias)
        under_way.append(moved)
        if sum(array.nbytes for array in under_way) > transfer.CHUNK_BYTES:
            jax.block_until_ready(under_way)  # and what was cast is free again
            under_way.clear()
        return moved

    moved = jax.tree.map(move, params, specs, spec.shardings(specs, mesh, meshes.ROLLOUT_RULES))
    return tuple(
        jax.tree.map(functools.partial(_piece, replica=replica), moved) for replica in meshes.replica_meshes(mesh)
    )


def layers_at_once(shape: tuple[int, ...], itemsize: int) -> int:
    """How many entries of the first axis of a weight change their layout in one program.

    Where XLA knows no exchange between two layouts, as from one axis to another over more devices, each device holds
    what the program moves whole for a moment (on TPUs three times): so it gets no more than ``transfer.CHUNK_BYTES``,
    or one layer.
    """
    each = math.prod(shape[1:]) * itemsize
    return min(shape[0], max(1, transfer.CHUNK_BYTES // each))


def is_cut(before: NamedSharding, after: NamedSharding) -> bool:
    """Whether a weight can change its layout a few layers at a time: neither splits its first axis."""
    return not any(sharding.spec and sharding.spec[0] for sharding in (before, after))


def _resharded(array: jax.Array, sharding: NamedSharding, *, may_alias: bool) -> jax.Array:
    """The array laid out anew on its own devices."""
    now = array.sharding
    if not isinstance(now, NamedSharding) or now.is_equivalent_to(sharding, array.ndim):
        return jax.device_put(array, sharding, may_alias=may_alias)
    count = layers_at_once(array.shape, array.dtype.itemsize) if array.ndim else 1
    if not array.ndim or count == array.shape[0] or not is_cut(now, sharding):
        return _at_once(array, sharding)
    moved = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(array.shape, array.dtype)
    last = array.shape[0] - count
    for first in (*range(0, last, count), last):  # the last part may overlap the one before: then one program does
        moved = _put(moved, _at_once(_layers(array, first, count=count), sharding), first)
        jax.block_until_ready(moved)  # or all parts might be there at once
    return moved


def _at_once(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """``jax.device_put`` would take it through the host where one process has all devices and the pieces differ."""
    # No one program takes devices in two orders, which a TPU slice has where processes cross the mesh.
    if list(array.sharding.mesh.devices.flat) != list(sharding.mesh.devices.flat):
        return jax.device_put(array, sharding, may_alias=False)
    return jax.jit(same, out_shardings=sharding)(array)


@functools.partial(jax.jit, static_argnames="count")
def _layers(array: jax.Array, first: jax.Array, *, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, first, count)


@functools.partial(jax.jit, donate_argnums=0)
def _put(moved: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(moved, part, first, 0)


def same(array: jax.Array) -> jax.Array:
    """The program that changes nothing but where its argument lies."""
    return array


def _piece(array: jax.Array, replica: Mesh) -> jax.Array:
    """What this replica's devices hold of an array, without moving it."""
    devices = set(replica.devices.flat)
    shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
    sharding = NamedSharding(replica, array.sharding.spec)
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def _check(params: Any, specs: spec.Specs) -> None:
    expected = spec.abstract(specs)
    if jax.tree.structure(expected) != jax.tree.structure(params):
        raise ValueError("the trainer's weights are not the model's: the trees differ")
    for (path, want), have in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(params), strict=True):
        if want.shape != have.shape:
            raise ValueError(
                f"weight {jax.tree_util.keystr(path)} has shape {have.shape}; the model wants {want.shape}"
            )
