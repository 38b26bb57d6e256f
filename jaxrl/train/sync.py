"""Hand the trainer's weights to the rollout engines: cast, reshard on the devices, check that all of them arrived."""

import contextlib
import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxrl import mesh as meshes
from jaxrl.config import ModelConfig
from jaxrl.model import spec, transformer
from jaxrl.rollout.fleet import Fleet


def hand_over(
    params: Any,
    model: ModelConfig,
    fleet: Fleet,
    version: int,
    launches: contextlib.AbstractContextManager[Any] | None = None,
) -> None:
    """Give every replica the trainer's weights. An idle one frees its old ones before the new ones are made.

    Args:
        params: the trainer's, on the devices of the fleet.
        version: name of these weights.
        launches: as for ``Engine``.

    Raises:
        ValueError: as for ``rollout_params``; the fleet keeps what it has.
    """
    _check(params, model)
    fleet.release_weights()
    with launches or contextlib.nullcontext():
        fleet.set_weights(rollout_params(params, model, fleet.mesh), version)


def rollout_params(params: Any, model: ModelConfig, mesh: Mesh) -> tuple[Any, ...]:
    """Copies of ``params``, one for each replica, split over its devices: what is multiplied is in the compute type.

    A weight is cast where it rests, and travels straight from there to where it is used; neither a single device nor
    the host ever sees more of it than its own piece. The copies are real even where nothing has to move: the trainer
    donates its buffers to the next update.

    Args:
        params: the trainer's weights.
        mesh: from ``mesh.make_rollout_mesh``, of the devices that hold ``params``.

    Raises:
        ValueError: a weight is missing, extra, or of another shape than the model's specification says.
        ConfigError: the rollout mesh cannot split a weight.
    """
    _check(params, model)
    specs = transformer.param_specs(model)

    def copy(leaf: jax.Array, one: spec.ParamSpec, sharding: NamedSharding) -> jax.Array:
        return jax.device_put(leaf.astype(one.compute_dtype(model.compute_dtype)), sharding, may_alias=False)

    moved = jax.tree.map(copy, params, specs, spec.shardings(specs, mesh, meshes.ROLLOUT_RULES))
    return tuple(
        jax.tree.map(functools.partial(_piece, replica=replica), moved) for replica in meshes.replica_meshes(mesh)
    )


def _piece(array: jax.Array, replica: Mesh) -> jax.Array:
    """What this replica's devices hold of an array, without moving it."""
    devices = set(replica.devices.flat)
    shards = [shard.data for shard in array.addressable_shards if shard.device in devices]
    sharding = NamedSharding(replica, array.sharding.spec)
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def _check(params: Any, model: ModelConfig) -> None:
    expected = spec.abstract(transformer.param_specs(model))
    if jax.tree.structure(expected) != jax.tree.structure(params):
        raise ValueError("the trainer's weights are not the model's: the trees differ")
    for (path, want), have in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(params), strict=True):
        if want.shape != have.shape:
            raise ValueError(
                f"weight {jax.tree_util.keystr(path)} has shape {have.shape}; the model wants {want.shape}"
            )
