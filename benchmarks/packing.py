"""What a train step costs where trajectories of a group share what they can, against rows that share nothing.

Whole steps of ``Updater``, forward, backward and optimizer, in CPU time of runs in turns, rows of one length. The group
of the demand has a long prompt and short answers; the other one's answers begin alike. Gradients must be the same.

    python benchmarks/packing.py --json
"""

import argparse
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import config as configuration
from jaxrl import mesh as meshes
from jaxrl.config import AlgorithmConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxrl.data import packing
from jaxrl.data.tree_packing import figures, sharing_of
from jaxrl.model import transformer
from jaxrl.records import Batch, Problem, StopReason, Trajectory
from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.train.state import initial_params, new_state, rl_optimizer
from jaxrl.train.update import Updater, policy_gradient_loss

ROW_TOKENS = 2176  # two of the first group's trajectories with nothing left over
GROUPS = {
    "group of 16, prompt 1024, answers 64": ("shared_prompt", {"prompt": 1024, "common": 0, "own": 64}, ">= 4"),
    "group of 16, prompt 64, answers 512 of which 384 in common": (
        "tree",
        {"prompt": 64, "common": 384, "own": 128},
        None,
    ),
}
"""What is shared, lengths in tokens, and how many times as fast the step must be."""


def group(vocabulary: int, prompt: int, common: int, own: int) -> list[Trajectory]:
    draw = np.random.default_rng(0)
    asked, begun = draw.integers(1, vocabulary, prompt), draw.integers(1, vocabulary, common)
    tokens = common + own
    return [
        Trajectory(
            problem=Problem("benchmark", "?", "1"),
            draw=0,
            sample=sample,
            prompt_ids=asked.astype(np.int32),
            ids=np.concatenate([begun, draw.integers(1, vocabulary, own)]).astype(np.int32),
            mask=np.ones(tokens, np.int8),
            logprobs=draw.normal(-np.log(vocabulary), 0.2, tokens).astype(np.float32),
            versions=np.zeros(tokens, np.int32),
            turns=(),
            stop_reason=StopReason.ANSWERED,
        )
        for sample in range(16)
    ]


def packed(trajectories: list[Trajectory], train: TrainConfig) -> list[Batch]:
    advantages = [float(one.sample % 3) - 1 for one in trajectories]
    weights = aggregation_weights([one.mask for one in trajectories], "token")
    shape = {"rows": train.rows, "row_tokens": train.row_tokens, "sharing": sharing_of(train)}
    return packing.pack_trajectories(trajectories, advantages, weights, **shape)


class Step:
    """Train steps of one way to pack."""

    def __init__(self, model: ModelConfig, trajectories: list[Trajectory], train: TrainConfig) -> None:
        self._mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
        specs = transformer.param_specs(model)
        optimizer = rl_optimizer(OptimizerConfig(), specs)
        self.batches = packed(trajectories, train)
        self._loss = policy_gradient_loss(model, AlgorithmConfig(), 1.0)
        self._updater = Updater(self._loss, optimizer, self._mesh, sharing=sharing_of(train))
        self._state = new_state(initial_params(specs, self._mesh, 0), optimizer, self._mesh)

    def gradient(self) -> Any:
        gradient = jax.jit(jax.grad(self._loss, has_aux=True))
        parts = [gradient(jax.device_get(self._state.params), batch, None)[0] for batch in self.batches]
        return functools.reduce(lambda left, right: jax.tree.map(jnp.add, left, right), parts)

    def seconds(self) -> float:
        start = time.process_time()
        self._state, _ = self._updater.step(self._state, self.batches)
        jax.block_until_ready(self._state)
        return time.process_time() - start


def measured(name: str, recipe: str, rounds: int) -> dict[str, Any]:
    way, lengths, demand = GROUPS[name]
    model = configuration.load(recipe, ["ModelConfig.vocab_size=768"]).model
    trajectories = group(model.vocab_size, **lengths)
    steps = [
        Step(model, trajectories, TrainConfig(rows=1, row_tokens=ROW_TOKENS, packing=kind)) for kind in ("rows", way)
    ]
    gradients = [jax.tree.leaves(step.gradient()) for step in steps]
    largest = max(float(jnp.abs(leaf).max()) for leaf in gradients[0])
    difference = max(float(jnp.abs(left - right).max()) for left, right in zip(*gradients, strict=True))
    seconds = [[step.seconds() for step in steps] for _ in range(rounds + 1)][1:]  # the first compiles
    plain, shared = (statistics.median(values) for values in zip(*seconds, strict=True))
    same = difference <= 1e-5 * largest
    return {
        "figure": f"packing: {way}, {name}",
        "value": round(plain / shared, 2),
        "unit": "times as fast as rows",
        "demand": demand,
        "holds": bool(same and plain / shared >= 4) if demand else bool(same),
        "tokens_per_node": round(figures([steps[1].batches])["packing/tokens_per_node"], 2),
        "rows": [len(step.batches) for step in steps],
        "seconds": [round(plain, 3), round(shared, 3)],
        "gradient_difference": f"{difference / largest:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart", help="whose model takes the step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    for name in GROUPS:
        row = measured(name, options.recipe, options.rounds)
        print(json.dumps(row) if options.json else f"{row['figure']}: {row['value']} {row['unit']}", flush=True)


if __name__ == "__main__":
    main()
