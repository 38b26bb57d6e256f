"""Updates on a tree of trajectories, on 2x2x2 devices and on one, and says whether they are those without sharing."""

import jax
import numpy as np

from jaxrl import mesh as meshes
from jaxrl.config import AlgorithmConfig, MeshConfig, OptimizerConfig
from jaxrl.data.tree_packing import Sharing
from jaxrl.model import transformer
from jaxrl.train.state import initial_params, new_state, rl_optimizer
from jaxrl.train.update import Updater, policy_gradient_loss
from tests.train.test_shared_packing import MODEL, ROW_TOKENS, SHARED, packed, played

MESHES = {
    "mesh": MeshConfig(fsdp=2, context=2, tensor=2),
    "one device": MeshConfig(),
    "rows": MeshConfig(),
}


def updated(config: MeshConfig, sharing: Sharing | None) -> tuple[dict, dict[str, float]]:
    mesh = meshes.make_mesh(config, None if config.fsdp > 1 else jax.devices()[:1])
    specs = transformer.param_specs(MODEL)
    # With so large an eps a gradient that is all rounding moves its weight by rounding, not by a whole step.
    optimizer = rl_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-2), specs)
    updater = Updater(policy_gradient_loss(MODEL, AlgorithmConfig(), 1.0), optimizer, mesh, sharing=sharing)
    state = new_state(initial_params(specs, mesh, 0), optimizer, mesh)
    updater.compile(state, 8, ROW_TOKENS)
    for _ in range(2):
        state, metrics = updater.step(state, packed(played(), sharing))
    return jax.device_get(state.params), metrics


def main() -> None:
    results = {name: updated(config, None if name == "rows" else SHARED["tree"]) for name, config in MESHES.items()}
    params, metrics = results.pop("rows")
    for name, (other, others) in results.items():
        same = jax.tree.map(lambda left, right: bool(np.allclose(left, right, atol=2e-5)), params, other)
        shown = all(np.isclose(metrics[key], others[key], rtol=1e-3, atol=1e-5) for key in metrics)
        print(f"{name}: parameters {all(jax.tree.leaves(same))}, metrics {shown}")


if __name__ == "__main__":
    main()
