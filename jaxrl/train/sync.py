"""Hand the trainer's weights to the rollout engine: cast, move, check that all of them arrived."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.config import ModelConfig
from jaxrl.model import spec, transformer


def rollout_params(params: Any, model: ModelConfig, device: jax.Device | None = None) -> Any:
    """A copy of ``params`` in the compute type on one device, as the engine wants it.

    The copy is real even where nothing is cast: the trainer donates its buffers to the next update.

    Raises:
        ValueError: a weight is missing, extra, or of another shape than the model's specification says.
    """
    expected = spec.abstract(transformer.param_specs(model))
    if jax.tree.structure(expected) != jax.tree.structure(params):
        raise ValueError("the trainer's weights are not the model's: the trees differ")
    for (path, want), have in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(params), strict=True):
        if want.shape != have.shape:
            raise ValueError(
                f"weight {jax.tree_util.keystr(path)} has shape {have.shape}; the model wants {want.shape}"
            )
    place = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
    dtype = jnp.dtype(model.compute_dtype)
    return jax.tree.map(lambda leaf: jax.device_put(leaf.astype(dtype), place, may_alias=False), params)
