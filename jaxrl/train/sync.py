"""Hand the trainer's weights to the rollout engine: cast, move, check that all of them arrived."""

from typing import Any

import jax

from jaxrl.config import ModelConfig
from jaxrl.model import spec, transformer


def rollout_params(params: Any, model: ModelConfig, device: jax.Device | None = None) -> Any:
    """A copy of ``params`` on one device, as the engine wants it: what is multiplied is in the compute type.

    The copy is real even where nothing is cast: the trainer donates its buffers to the next update.

    Raises:
        ValueError: a weight is missing, extra, or of another shape than the model's specification says.
    """
    specs = transformer.param_specs(model)
    expected = spec.abstract(specs)
    if jax.tree.structure(expected) != jax.tree.structure(params):
        raise ValueError("the trainer's weights are not the model's: the trees differ")
    for (path, want), have in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(params), strict=True):
        if want.shape != have.shape:
            raise ValueError(
                f"weight {jax.tree_util.keystr(path)} has shape {have.shape}; the model wants {want.shape}"
            )
    place = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])

    def copy(leaf: jax.Array, one: spec.ParamSpec) -> jax.Array:
        return jax.device_put(leaf.astype(one.compute_dtype(model.compute_dtype)), place, may_alias=False)

    return jax.tree.map(copy, params, specs)
