"""Run by test_processes.py as one of several processes: updates on trajectories of which each process knows its own.

``updating.py PORT COUNT PROCESS FILE`` writes the parameters after two of them, and the tokens that were packed.
"""

import sys

import jax
import numpy as np

from jaxrl.config import AlgorithmConfig, Config, EngineConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxrl.data import packing
from jaxrl.mesh import make_mesh
from jaxrl.model.transformer import param_specs
from jaxrl.processes import join
from jaxrl.processes.exchange import is_first
from jaxrl.records import Group, Problem, RewardStatus, StopReason, Trajectory
from jaxrl.rl import selection
from jaxrl.train import shares
from jaxrl.train.pack import pack
from jaxrl.train.placement import said_once
from jaxrl.train.state import initial_params, new_state, rl_optimizer
from jaxrl.train.update import Updater, policy_gradient_loss

MODEL = ModelConfig(vocab_size=48, layers=1, width=16, query_heads=4, kv_heads=2, head_width=8, ffn_width=32)
CONFIG = Config(
    model=MODEL,
    engine=EngineConfig(max_response_tokens=24),
    algorithm=AlgorithmConfig(selection="first", keep=4, reject_equal=False),
    # Adam divides a gradient by its own size: with a tiny eps the rounding of a gradient near 0 would become its sign.
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-2),
    train=TrainConfig(rows=16, row_tokens=32, updates_per_step=2),
)
MESH = MeshConfig(fsdp=2, tensor=2)
"""Weights are gathered, gradients and activations are summed between all processes, if there are four."""


def group(draw: int) -> Group:
    random = np.random.default_rng(draw)
    problem = Problem(f"p/{draw}", "?", "1")

    def trajectory(sample: int) -> Trajectory:
        tokens = int(random.integers(6, 24))
        mask = (random.random(tokens) < 0.7).astype(np.int8)
        return Trajectory(
            problem=problem,
            draw=draw,
            sample=sample,
            prompt_ids=random.integers(4, 48, 5).astype(np.int32),
            ids=random.integers(4, 48, tokens).astype(np.int32),
            mask=mask,
            logprobs=((-4 + 0.3 * random.normal(size=tokens)) * mask).astype(np.float32),
            versions=np.where(mask, 0, -1).astype(np.int32),
            turns=(),
            stop_reason=StopReason.ANSWERED,
            reward=float(sample % 2),
            reward_status=RewardStatus.CORRECT if sample % 2 else RewardStatus.WRONG,
        )

    return Group(problem, draw, tuple(trajectory(sample) for sample in range(5)))


def main() -> int:
    mesh, specs = make_mesh(MESH), param_specs(MODEL)
    optimizer = rl_optimizer(CONFIG.optimizer, specs)
    state = new_state(initial_params(specs, mesh, 0), optimizer, mesh)
    updater = Updater(policy_gradient_loss(MODEL, CONFIG.algorithm, 1.0), optimizer, mesh, pooled=True)
    groups = [shares.known_here(group(draw)) for draw in range(6)]
    rules = selection.chooser(CONFIG.algorithm)
    chosen = [rules.choose(one.trajectories, np.random.default_rng(0)) for one in groups]
    for batches in pack(CONFIG, tuple(chosen), {}):
        state, metrics = updater.step(state, batches)
    with jax.set_mesh(mesh):
        ids = group(9).trajectories[0].ids
        (worked,) = packing.pack_sequences([(ids, np.zeros(len(ids)))], rows=2, row_tokens=32)
        placed = {"tokens": batches[0], "tokens of a demonstration": said_once(worked)}
        seen = {"params": state.params} | {name: updater._place(batch).tokens for name, batch in placed.items()}
        seen = jax.jit(lambda tree: tree, out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))(seen)
    if is_first():
        named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(seen)}
        np.savez(sys.argv[4], grad_norm=metrics["grad_norm"], **named)
    return 0


if __name__ == "__main__":
    port, count, process = map(int, sys.argv[1:4])
    sys.exit(join.run(join.Place(f"127.0.0.1:{port}", count, process, 60), main))
