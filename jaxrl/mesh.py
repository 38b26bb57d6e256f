"""Device meshes, and the tables that say which mesh axis each logical axis of an array lies on.

Every array is described by the *logical* name of each of its axes (``("layers", "embed", "ffn")``); a rule table maps
logical names to mesh axes. There are two main tables because weights rest sharded over ``fsdp`` and are gathered to
another layout right before use: autodiff then returns each gradient in its weight's resting layout.

Meshes have explicit axis types, so the sharding of every value is part of its type. Code that runs with no mesh set
passes through the same functions, which then do nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from jaxrl.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis name -> mesh axis, several mesh axes, or None for an axis that is never split."""

PARAM_RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "query_heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "ffn": "tensor",
    "experts": None,
    "expert_ffn": "tensor",
}
"""Where the weights, their gradients and the optimizer state rest during training."""

_TENSOR_PARALLEL: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": None,
    "query_heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "ffn": "tensor",
    "experts": None,
    "expert_ffn": "tensor",
}

COMPUTE_RULES: Rules = {"batch": ("data", "fsdp"), "tokens": None, "token_shards": "tensor", **_TENSOR_PARALLEL}
"""Where weights and activations lie while they are multiplied. ``token_shards`` is the token axis of work that every
tensor-parallel device does for its own share of the tokens."""

ROLLOUT_RULES: Rules = {"pages": None, **_TENSOR_PARALLEL}
"""Where the rollout engine keeps its copy of the weights, and its KV pages."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp`` and ``tensor``, all of explicit type.

    Args:
        config: length of each axis; -1 on one of them takes the devices that remain.
        devices: devices to use; all of the process's backend when None.

    Raises:
        ConfigError: two axes are -1, or the lengths do not multiply to the number of devices.
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
            f"MeshConfig asks for {asked} devices (data x fsdp x tensor) but {len(devices)} are there; "
            f"let the lengths multiply to {len(devices)}"
        )
    return jax.make_mesh(tuple(lengths.values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def partition_spec(axes: Sequence[str | None], rules: Rules, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of an array whose axes have these logical names.

    Mesh axes of length 1 are left out, so that arrays on a mesh that does not split them are plainly unsharded.

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
        targets = tuple(target for target in targets if mesh.shape[target] > 1)
        for target in targets:
            if target in used:
                raise ValueError(
                    f"mesh axis {target!r} would split both {used[target]!r} and {axis!r} of {tuple(axes)}; "
                    "change one rule"
                )
            used[target] = str(axis)
        parts.append(targets[0] if len(targets) == 1 else targets or None)
    return PartitionSpec(*parts)


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
    """``function`` run by every device on its own shard, for work that needs no communication.

    This is the one escape from explicit sharding: kernels and chunked loops see plain local arrays. Arguments are
    brought to their compute layout first. With no mesh set, ``function`` itself.

    Args:
        in_axes: logical axes of each positional argument.
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
