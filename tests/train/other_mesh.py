"""Restores a run's newest checkpoint on a mesh of eight devices and says whether the values are those of the export.

``other_mesh.py RUN``; the export holds the same step's weights.
"""

import dataclasses
import pathlib
import sys

import jax
import numpy as np

from jaxrl.config import MeshConfig
from jaxrl.model import hf
from jaxrl.train import experiment
from jaxrl.train.checkpoint import Checkpoints
from jaxrl.train.run import RunFolder
from jaxrl.train.session import open_session

if __name__ == "__main__":
    run = RunFolder(pathlib.Path(sys.argv[1]))
    config = run.read_config()
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=2, fsdp=4),
        sft=dataclasses.replace(config.sft, rows=8),
        train=dataclasses.replace(config.train, rows=8),
    )
    session = open_session(config, run)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    progress, state, _ = experiment.restore(session, checkpoints, checkpoints.find("latest"))
    checkpoints.close()
    _, exported = hf.load_folder(run.export)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(np.asarray(a), b)), state.params, exported)
    split = len({shard.device for shard in state.params["layers"]["gate"].addressable_shards})
    print(f"devices {split}, same values {all(jax.tree.leaves(same))}, step {progress.step}")
