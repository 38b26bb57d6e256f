"""Micro-batches on their way to the devices of all processes."""

import dataclasses

import jax
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
        processes = [device.process_index for device in mesh.devices.flat]
        self._speaks = [process not in processes[:place] for place, process in enumerate(processes)]  # one of each
        self._add = jax.jit(self._added)

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
        nothing = np.full_like(values, unsaid)[None]
        parts = jax.make_array_from_callback(
            (len(self._speaks), *values.shape),
            self._by_device,
            lambda index: values[None] if self._speaks[index[0].start or 0] else nothing,
        )
        return self._add(parts, unsaid)

    def _added(self, parts: jax.Array, unsaid: jax.Array) -> jax.Array:
        """[processes' parts, B, T, ...] -> [B, T, ...]."""
        said = (parts - unsaid).sum(axis=0, dtype=parts.dtype)
        return jax.sharding.reshard(said + unsaid, self.rows.spec)
