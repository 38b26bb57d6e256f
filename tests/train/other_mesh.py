"""Restores a run's newest checkpoint on a mesh of eight devices and on one, takes the next update on both, and says
whether everything restored is equal and how far the parameters lie apart after the update.

``other_mesh.py RUN``
"""

import dataclasses
import pathlib
import sys

import jax
import numpy as np

from jaxrl import mesh as meshes
from jaxrl.config import MeshConfig
from jaxrl.observe.traces import read_episodes
from jaxrl.rl import selection
from jaxrl.train import experiment
from jaxrl.train.checkpoint import Checkpoints
from jaxrl.train.pack import pack
from jaxrl.train.run import RunFolder
from jaxrl.train.session import open_session
from jaxrl.train.update import Updater, policy_gradient_loss

if __name__ == "__main__":
    run = RunFolder(pathlib.Path(sys.argv[1]))
    config = run.read_config()
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=2, fsdp=4),
        sft=dataclasses.replace(config.sft, rows=8),
        train=dataclasses.replace(config.train, rows=8),
    )
    episodes = read_episodes(sorted((run.path / "episodes").glob("rl_*.jsonl"))[-1])
    groups = [[t for t in episodes if t.draw == draw] for draw in sorted({t.draw for t in episodes})]
    kept = tuple(selection.chooser(config.algorithm).choose(group, np.random.default_rng(0)) for group in groups)
    (batches,) = pack(config, tuple(chosen for chosen in kept if chosen.kept), {})

    wide = open_session(config, run)
    narrow = dataclasses.replace(wide, mesh=meshes.make_mesh(MeshConfig(), jax.devices()[:1]))
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    restored, updated = [], []
    for session in (narrow, wide):
        progress, state, reference = experiment.restore(session, checkpoints, checkpoints.find("latest"))
        restored.append(jax.device_get((state, reference)))
        loss = policy_gradient_loss(session.model, config.algorithm, config.engine.temperature)
        split = len({shard.device for shard in state.params["layers"]["gate"].addressable_shards})
        state, metrics = Updater(loss, session.rl_optimizer, session.mesh).step(state, batches, reference)
        updated.append(jax.device_get(state.params))
    checkpoints.close()
    equal = jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), *restored))
    moved = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), restored[0][0].params, updated[0])))
    apart = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), *updated)))
    print(f"devices {split}, step {progress.step}, {len(equal)} arrays equal: {all(equal)}")
    print(f"the update moved by {moved:.1e}, the two lie apart by less than a hundredth: {apart < 0.01 * moved}")
