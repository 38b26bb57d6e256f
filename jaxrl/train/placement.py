"""Micro-batches on their way to the devices of all processes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl import mesh as meshes
from jaxrl.processes.exchange import is_first
from jaxrl.records import Batch, Tree

PLANNED = (
    *("positions", "segment_ids", "mask", "versions", "advantages", "proximal_shares"),
    *("rl_weights", "kl_weights", "ce_weights", "entropy_weights"),
    *("ends", "copies", "predictors"),
)
"""Fields that every process knows of all trajectories, because they follow from outlines."""


UNSAID = {"experts": -1}
"""What stands for contents that a process does not know, where it is not 0."""

AT_ONCE_BYTES = 16 << 20
"""What a device may hold of a field at once while what processes have of it is added up, if that is more than what it
keeps in the end."""


def said_once(batch: Batch) -> Batch:
    """A batch that every process has whole, for a placement that adds up what all have: nothing in all but the
    first."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    contents = {name: value for name, value in values.items() if name not in PLANNED and value is not None}
    return batch.replace(**{name: once(value, UNSAID.get(name, 0)) for name, value in contents.items()})


def once(values: np.ndarray, unsaid: int = 0) -> np.ndarray:
    """The same of a single field."""
    return values if is_first() else np.full_like(values, unsaid)


class Placement:
    """Puts micro-batches where their rows are computed; each process supplies the rows of its devices.

    Args:
        pooled: of what is not ``PLANNED`` a process knows only what it played itself, and has zeros elsewhere, or what
            is ``UNSAID``. The devices add up what all processes have, which is exact, so that tokens never pass through
            another host.

    Attributes:
        rows: the sharding of every field.
    """

    def __init__(self, mesh: Mesh, *, pooled: bool = False) -> None:
        self._pooled = pooled and jax.process_count() > 1
        self.rows = NamedSharding(mesh, meshes.partition_spec(("batch", None), meshes.COMPUTE_RULES, mesh))
        self._by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._circles = _circles(mesh) if self._pooled else []
        self._add = jax.jit(self._added)
        self._join = jax.jit(lambda added: jnp.concatenate(added, axis=1))

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the devices. All processes call this together, under the mesh."""
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
        tree = fields.pop("tree")
        placed = Batch(**{name: self._put(name, values) for name, values in fields.items() if values is not None})
        if tree is None:
            return placed
        nodes = {field.name: getattr(tree, field.name) for field in dataclasses.fields(Tree)}
        return placed.replace(tree=Tree(**{name: self._put(name, values) for name, values in nodes.items()}))

    def _put(self, name: str, values: np.ndarray) -> jax.Array:
        if name in PLANNED or not self._pooled:
            return jax.make_array_from_callback(values.shape, self.rows, lambda index: values[index])
        unsaid = values.dtype.type(UNSAID.get(name, 0))
        processes, tokens = len(self._circles[0]), values.shape[1]
        shard_bytes = values.nbytes // values.shape[0] * self.rows.shard_shape(values.shape)[0]
        rounds = min(tokens, -(-processes * shard_bytes // max(shard_bytes, AT_ONCE_BYTES)))
        length = -(-tokens // rounds)
        added: list[jax.Array] = []
        for first in range(0, tokens, length):
            jax.block_until_ready(added)  # and the parts before are free again
            added.append(self._add(self._parts(values[:, first : first + length]), unsaid))
        return added[0] if len(added) == 1 else self._join(added)

    def _parts(self, values: np.ndarray) -> jax.Array:
        """[devices, processes, rows of a shard, T, ...]: on each device what this process has for it and for those of
        its circle."""
        places = self.rows.devices_indices_map(values.shape)
        wanted = [places[device] for device in self.rows.mesh.devices.flat]
        circle_of = {place: circle for circle in self._circles for place in circle}

        def parts_for(index: tuple[slice, ...]) -> np.ndarray:
            return np.stack([values[wanted[place]] for place in circle_of[index[0].start or 0]])[None]

        shape = (len(wanted), len(self._circles[0]), *self.rows.shard_shape(values.shape))
        return jax.make_array_from_callback(shape, self._by_device, parts_for)

    def _added(self, parts: jax.Array, unsaid: jax.Array) -> jax.Array:
        """[devices, processes, rows of a shard, T, ...] -> [B, T, ...]."""
        names = self.rows.mesh.axis_names

        def own_sum(parts: jax.Array, unsaid: jax.Array) -> jax.Array:
            said = jax.lax.psum_scatter(parts[0] - unsaid, names, axis_index_groups=self._circles)
            return said + unsaid

        specs = self._by_device.spec, PartitionSpec()
        return jax.shard_map(own_sum, in_specs=specs, out_specs=self.rows.spec, check_vma=False)(parts, unsaid)


def _circles(mesh: Mesh) -> list[list[int]]:
    """Places in the mesh, in circles of one device of every process, which has as many as any other."""
    of_process: dict[int, list[int]] = {}
    for place, device in enumerate(mesh.devices.flat):
        of_process.setdefault(device.process_index, []).append(place)
    return [list(circle) for circle in zip(*of_process.values(), strict=True)]
