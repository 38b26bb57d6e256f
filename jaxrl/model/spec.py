"""One table describes every parameter; everything else about parameters is derived from it.

A model is a nested dict of arrays. A tree of ``ParamSpec`` mirrors it, and initial values, abstract shapes,
shardings, the weight-decay mask and the Hugging Face names are all read from that tree.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxrl.config import ConfigError
from jaxrl.mesh import Rules, divisors, partition_spec

LAYERS = "layers"
"""Logical name of the leading axis on which the layers' parameters are stacked."""

EXPERTS = "experts"
"""Logical name of the axis on which the experts' parameters of a layer are stacked."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Attributes:
        shape: of the array here; layer parameters have the layers on their first axis.
        dtype: type the trainer keeps it in.
        axes: logical name of every axis, see ``jaxrl.mesh``.
        init: ``(key, shape, dtype) -> array``, as in ``jax.nn.initializers``.
        hf_name: name of the tensor in a Hugging Face folder, with ``{layer}`` and ``{expert}`` where they are stacked.
        hf_layout: for each axis of the Hugging Face tensor, the axes here that it merges, in order. A linear layer is
            stored there as [outputs, inputs]: a query projection with axes ("layers", "embed", "query_heads", "head")
            has the layout (("query_heads", "head"), ("embed",)). Leading axes that it leaves out are stacked tensors.
        decay: whether weight decay applies (not to norms and biases).
        layers: those on the first axis, in order, of a parameter that not all layers have; None = all.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]
    init: Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
    hf_name: str
    hf_layout: tuple[tuple[str, ...], ...]
    decay: bool = True
    layers: tuple[int, ...] | None = None

    @property
    def stacked_axes(self) -> tuple[str, ...]:
        """Leading axes that run over Hugging Face tensors: none, the layers, or the layers and their experts."""
        return self.axes[: len(self.axes) - sum(map(len, self.hf_layout))]

    def compute_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """Type of a copy that is only computed with, which changes no result: vectors are never rounded in training."""
        return jnp.dtype(dtype) if len(self.hf_layout) > 1 else self.dtype

    @property
    def hf_names(self) -> dict[tuple[int, ...], str]:
        """The Hugging Face tensors that make up the parameter, by their index on its stacked axes."""
        names = {}
        for place in np.ndindex(self.shape[: len(self.stacked_axes)]):
            index = dict(zip(self.stacked_axes, place, strict=True))
            layer = index.get(LAYERS, 0)
            names[place] = self.hf_name.format(
                layer=layer if self.layers is None else self.layers[layer], expert=index.get(EXPERTS, 0)
            )
        return names

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of one Hugging Face tensor."""
        length = dict(zip(self.axes, self.shape, strict=True))
        return tuple(math.prod(length[axis] for axis in merged) for merged in self.hf_layout)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """What stands at one index of the stacked axes as the Hugging Face tensor; inverse of ``from_hf``."""
        axes = self.axes[len(self.stacked_axes) :]
        order = [axes.index(axis) for merged in self.hf_layout for axis in merged]
        return np.ascontiguousarray(np.transpose(array, order)).reshape(self.hf_shape)

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """A Hugging Face tensor as it stands at its index of the stacked axes.

        Raises:
            ValueError: the tensor's shape is not ``hf_shape``.
        """
        if tuple(tensor.shape) != self.hf_shape:
            raise ValueError(
                f"{self.hf_name} has shape {tuple(tensor.shape)}; the configuration makes it {self.hf_shape}"
            )
        length = dict(zip(self.axes, self.shape, strict=True))
        flat = [axis for merged in self.hf_layout for axis in merged]
        axes = self.axes[len(self.stacked_axes) :]
        split = tensor.reshape([length[axis] for axis in flat])
        return np.ascontiguousarray(np.transpose(split, [flat.index(axis) for axis in axes]))


Specs = dict[str, Any]
"""A nested dict with ParamSpec leaves."""


def initialize(specs: Specs, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters. Each depends on ``key`` and its own path only, so another parameter changes nothing here."""

    def draw(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
        own_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return spec.init(own_key, spec.shape, spec.dtype)

    return jax.tree_util.tree_map_with_path(draw, specs)


def abstract(specs: Specs) -> dict[str, Any]:
    """Shapes and types without values, for ahead-of-time compilation and checkpoint targets."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)


def shardings(specs: Specs, mesh: Mesh, rules: Rules) -> dict[str, Any]:
    """The NamedSharding of every parameter under a rule table.

    Raises:
        ConfigError: a mesh axis does not divide the parameter axis it splits.
    """

    def sharding(spec: ParamSpec) -> NamedSharding:
        partition = partition_spec(spec.axes, rules, mesh)
        for axis, length, part in zip(spec.axes, spec.shape, partition, strict=True):
            parts = (part,) if isinstance(part, str) else part or ()
            pieces = math.prod(mesh.shape[name] for name in parts)
            if length % pieces:
                raise ConfigError(
                    f"{spec.hf_name}: axis {axis!r} of length {length} cannot be split over "
                    f"{' x '.join(parts)} = {pieces} devices; choose one of {', '.join(map(str, divisors(length)))}"
                )
        return NamedSharding(mesh, partition)

    return jax.tree.map(sharding, specs)


def decay_mask(specs: Specs) -> dict[str, Any]:
    """True where weight decay applies."""
    return jax.tree.map(lambda spec: spec.decay, specs)


def count(specs: Specs) -> int:
    """Number of parameters."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))
