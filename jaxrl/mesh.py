"""Device meshes, and the tables that say which mesh axis each logical axis of an array lies on.

Every array is described by the *logical* name of each of its axes (``("layers", "embed", "ffn")``); a rule table maps
logical names to mesh axes. There are two main tables because weights rest sharded over ``fsdp`` and are gathered to
another layout right before use: autodiff then returns each gradient in its weight's resting layout.

Meshes have explicit axis types, so the sharding of every value is part of its type. Code that runs with no mesh set
passes through the same functions, which then do nothing.
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from jaxrl.config import ConfigError, MeshConfig

AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")
"""Outermost first: neighbours on the last axis exchange most and lie closest together."""

ROLLOUT_AXES = ("replica", "tensor", "query")
"""Devices along ``query`` hold the same KV heads and share out all else of a replica; the axis is only there where a
replica has more devices than the model has KV heads."""

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis name -> mesh axis, several mesh axes, or None for an axis that is never split."""

PARAM_RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "expert"),
    "query_heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "ffn": "tensor",
    "choices": None,
    "experts": ("expert", "tensor"),
    "expert_embed": "fsdp",
    "expert_ffn": None,
    "rank": None,
    "block": None,
}
"""Where the weights, their gradients and the optimizer state rest during training."""

_TENSOR_PARALLEL: Rules = {
    "layers": None,
    "vocab": ("tensor", "query"),
    "embed": None,
    "query_heads": ("tensor", "query"),
    "kv_heads": "tensor",
    "head": None,
    "ffn": ("tensor", "query"),
    "choices": None,
    "experts": ("expert", "tensor", "query"),
    "expert_embed": None,
    "expert_ffn": None,
    "rank": None,
    "block": None,
}

COMPUTE_RULES: Rules = {
    "batch": ("slice", "data", "fsdp", "expert"),
    "tokens": "context",
    "token_shards": ("context", "tensor"),
    **_TENSOR_PARALLEL,
}
"""Where weights and activations lie while they are multiplied. ``tokens`` is the token axis of everything but
attention, which sees the keys of whole rows; ``token_shards`` that of work which every tensor-parallel device does for
its own share of the tokens. Experts stay on their devices, and the tokens of ``batch`` come to them: both lie on
``expert``."""

ROLLOUT_RULES: Rules = {"pages": None, **_TENSOR_PARALLEL}
"""Where the rollout engine keeps its copy of the weights, and its KV pages."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes ``AXES``, all of explicit type.

    Args:
        config: length of each axis; -1 on one of them takes the devices that remain.
        devices: devices to use; all of the process's backend when None.

    Raises:
        ConfigError: two axes are -1, the lengths do not multiply to the number of devices, or the slices asked for are
            not those of the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    lengths = {axis: getattr(config, axis) for axis in AXES}
    open_axes = [axis for axis, length in lengths.items() if length == -1]
    known = math.prod(length for length in lengths.values() if length != -1)
    if len(open_axes) > 1:
        raise ConfigError(f"MeshConfig.{open_axes[0]} and MeshConfig.{open_axes[1]} are both -1; give one a length")
    if any(length < 1 and length != -1 for length in lengths.values()):
        raise ConfigError(f"MeshConfig lengths {lengths} must be at least 1, or -1 for all devices that remain")
    if open_axes:
        lengths[open_axes[0]] = len(devices) // known
    if math.prod(lengths.values()) != len(devices):
        asked = " x ".join(str(getattr(config, axis)) for axis in AXES)
        raise ConfigError(
            f"MeshConfig asks for {asked} devices ({' x '.join(AXES)}) but {len(devices)} are there; "
            f"let the lengths multiply to {len(devices)}"
        )
    within = tuple(lengths[axis] for axis in AXES[1:])
    arranged = [
        # What is left of a slice that gave devices to roll out has gaps, of which no grid of neighbours can be made.
        np.array(sorted(group, key=lambda device: device.process_index)).reshape(within)
        if config.rollout_devices
        else mesh_utils.create_device_mesh(within, group, allow_split_physical_axes=True)
        for group in by_slice(devices, lengths["slice"])
    ]
    return Mesh(np.stack(arranged), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def by_slice(devices: Sequence[jax.Device], slices: int) -> list[list[jax.Device]]:
    """Devices in groups of equal size, between which the network is slow.

    A TPU says which slice it belongs to. Elsewhere a slice is the devices of one or more whole processes; the devices
    of a single process may be cut as well, to try out what several slices do.

    Raises:
        ConfigError: the devices belong to another number of slices, or slices or processes have unequal numbers of
            them.
    """
    of_processes = collections.Counter(device.process_index for device in devices)
    if len(set(of_processes.values())) > 1:
        raise ConfigError(
            f"the processes have different numbers of devices that train: {dict(sorted(of_processes.items()))}; what "
            "they exchange is cut for equal ones, so start each of them with as many"
        )
    tpu = devices[0].platform == "tpu"
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        # A topology that is described but not there names no slices where it has only one.
        group = getattr(device, "slice_index", 0) if tpu else device.process_index
        groups.setdefault(group, []).append(device)
    if len({len(group) for group in groups.values()}) > 1:
        sizes = {name: len(group) for name, group in groups.items()}
        raise ConfigError(f"the slices have different numbers of devices: {sizes}")
    divides = len(groups) == slices if tpu else len(groups) == 1 or len(groups) % slices == 0
    if not divides:
        raise ConfigError(
            f"MeshConfig.slice={slices} but the devices belong to {len(groups)} {'slices' if tpu else 'processes'}; "
            f"set MeshConfig.slice={len(groups)}"
        )
    ordered = [device for name in sorted(groups) for device in groups[name]]
    size = len(ordered) // slices
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def split_devices(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> tuple[list[jax.Device], list[jax.Device]]:
    """The devices that train and those that roll out: the same ones, or with ``rollout_devices`` the last so many.

    Of several processes each gives as many: weights then reach every replica from devices of its own process.

    Args:
        devices: as for ``make_mesh``.

    Raises:
        ConfigError: none would be left to train, or the processes cannot give equally many.
    """
    devices = list(jax.devices() if devices is None else devices)
    playing = config.rollout_devices
    if not playing:
        return devices, devices
    of_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        of_process.setdefault(device.process_index, []).append(device)
    processes, smallest = len(of_process), min(map(len, of_process.values()))
    if playing % processes:
        raise ConfigError(
            f"MeshConfig.rollout_devices={playing} cannot be taken in equal parts from {processes} processes; make it "
            f"{playing + processes - playing % processes}, or another multiple of {processes}"
        )
    if playing // processes >= smallest:
        raise ConfigError(
            f"MeshConfig.rollout_devices={playing} leaves none of the {smallest} devices"
            f"{' of a process' if processes > 1 else ''} to train; lower it, or set it to 0 so that all of them do both"
        )
    given = {device.id for own in of_process.values() for device in own[-(playing // processes) :]}
    return [one for one in devices if one.id not in given], [one for one in devices if one.id in given]


def make_rollout_mesh(
    mesh: Mesh, tensor: int = 0, devices: Sequence[jax.Device] | None = None, kv_heads: int = 0
) -> Mesh:
    """Devices regrouped as replicas of the rollout engine, those of a process beside each other.

    A training mesh lays neighbours of a TPU slice along its axes, across the processes that hold them.

    Args:
        mesh: the training mesh.
        tensor: devices that share one replica's weights; 0 = as many as the training mesh's ``tensor`` axis.
        devices: those that roll out; those of the training mesh when None.
        kv_heads: of the model; a replica of a multiple of so many devices holds each of them several times. 0: never.

    Raises:
        ConfigError: the devices of one slice cannot be cut into replicas of this size, or a replica would have devices
            of several processes.
    """
    tensor = tensor or mesh.shape["tensor"]
    within = mesh.size // mesh.shape["slice"] if devices is None else len(devices)
    if within % tensor:
        raise ConfigError(
            f"MeshConfig.rollout_tensor={tensor} does not divide the {within} devices of a slice; choose one of "
            f"{', '.join(map(str, divisors(within)))}"
        )
    slices = mesh.devices.reshape(mesh.shape["slice"], -1) if devices is None else [devices]
    ordered = [device for each in slices for device in sorted(each, key=lambda device: device.process_index)]
    replicas = np.array(ordered).reshape(-1, tensor)
    if any(len({device.process_index for device in replica}) > 1 for replica in replicas):
        smallest = min(collections.Counter(device.process_index for device in ordered).values())
        raise ConfigError(
            f"a replica of the rollout engine needs {tensor} devices of one process, but these lie in several; set "
            f"MeshConfig.rollout_tensor to a divisor of the {smallest} devices of a process"
        )
    lengths = replica_lengths(tensor, kv_heads)
    axes = (ROLLOUT_AXES[0], *lengths)
    return Mesh(replicas.reshape(-1, *lengths.values()), axes, axis_types=(AxisType.Explicit,) * len(axes))


def replica_lengths(tensor: int, kv_heads: int) -> dict[str, int]:
    """Length of every axis of a replica of so many devices."""
    if not kv_heads or tensor <= kv_heads or tensor % kv_heads:
        return {"tensor": tensor}
    return {"tensor": kv_heads, "query": tensor // kv_heads}


def replica_meshes(rollout_mesh: Mesh) -> tuple[Mesh, ...]:
    """One mesh for each replica on devices of this process, with the axes of ``replica_lengths``."""
    axes = rollout_mesh.axis_names[1:]
    return tuple(
        Mesh(replica, axes, axis_types=(AxisType.Explicit,) * len(axes))
        for replica in rollout_mesh.devices
        if replica.flat[0].process_index == jax.process_index()
    )


def divisors(number: int) -> list[int]:
    """All divisors, rising: what a message offers in place of a length that does not divide."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def partition_spec(axes: Sequence[str | None], rules: Rules, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of an array whose axes have these logical names.

    Mesh axes of length 1, and those the mesh does not have, are left out, so that arrays on a mesh that does not split
    them are plainly unsharded.

    Args:
        axes: one logical name per array axis; None for an axis that is never split.

    Raises:
        ValueError: a name is not in the table, or a mesh axis would split two axes of the array.
    """
    parts: list[tuple[str, ...] | None] = []
    used: dict[str, str] = {}
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(f"logical axis {axis!r} is not in the rule table; known: {', '.join(rules)}")
        targets = rules[axis] if axis is not None else None
        targets = (targets,) if isinstance(targets, str) else targets or ()
        targets = tuple(target for target in targets if mesh.shape.get(target, 1) > 1)
        for target in targets:
            if target in used:
                raise ValueError(
                    f"mesh axis {target!r} would split both {used[target]!r} and {axis!r} of {tuple(axes)}; "
                    "change one rule"
                )
            used[target] = str(axis)
        parts.append(targets[0] if len(targets) == 1 else targets or None)
    return PartitionSpec(*parts)


def pieces(axis: str, rules: Rules, mesh: Mesh | AbstractMesh) -> int:
    """Into how many pieces an axis of this logical name is cut."""
    targets = rules[axis] or ()
    return math.prod(mesh.shape.get(target, 1) for target in ((targets,) if isinstance(targets, str) else targets))


def compute_axes(axis: str | None) -> tuple[str, ...]:
    """Axes of the mesh in use that split a logical axis while it is computed with; none where no mesh is set."""
    if axis is None:
        return ()
    part = partition_spec((axis,), COMPUTE_RULES, jax.sharding.get_abstract_mesh())[0]
    return (part,) if isinstance(part, str) else part or ()


def compute_spec(axes: Sequence[str | None]) -> PartitionSpec | None:
    """The compute layout of an array under the mesh in use, as ``out_sharding`` wants it; None when no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else partition_spec(axes, COMPUTE_RULES, mesh)


def to_compute(array: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """``array`` in its compute layout: gathered or split when an explicit mesh is set, unchanged otherwise.

    The gradient comes back in the layout ``array`` had.
    """
    spec = compute_spec(axes)
    return array if spec is None else jax.sharding.reshard(array, spec)


def per_shard(
    function: Callable[..., Any], in_axes: Sequence[Sequence[str | None]], out_axes: Any
) -> Callable[..., Any]:
    """``function`` run by every device on its own shard.

    This is the one escape from explicit sharding: kernels and chunked loops see plain local arrays. Arguments are
    brought to their compute layout first. With no mesh set, ``function`` itself.

    Args:
        in_axes: logical axes of each positional argument; those of a tree are the first ones of all its arrays.
        out_axes: logical axes of the result; for a tuple of results, a list of such tuples.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    in_specs = tuple(partition_spec(axes, COMPUTE_RULES, mesh) for axes in in_axes)
    if isinstance(out_axes, list):
        out_specs = tuple(partition_spec(axes, COMPUTE_RULES, mesh) for axes in out_axes)
    else:
        out_specs = partition_spec(out_axes, COMPUTE_RULES, mesh)
    # Kernels start loops from plain zeros, whose type does not say that they differ between devices: no such check.
    sharded = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return lambda *arrays: sharded(
        *(jax.sharding.reshard(array, spec) for array, spec in zip(arrays, in_specs, strict=True))
    )
