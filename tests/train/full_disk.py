"""Saves checkpoints into a folder until its disk is full, then restores the newest: ``full_disk.py FOLDER``."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.config import CheckpointConfig
from jaxrl.train.checkpoint import CheckpointError, Checkpoints


def state(step: int) -> dict[str, jax.Array]:
    return {"weights": jnp.asarray(np.random.default_rng(step).normal(size=(64, 1024)), jnp.float32)}


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
    try:
        for step in range(8):
            checkpoints.save(step, state(step), None, {"step": step}, None)
            checkpoints.wait()
    except CheckpointError as error:
        print(f"error: {error}")
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
    latest = checkpoints.latest()
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))
    restored, _ = checkpoints.restore(latest, target, None)
    print(f"restored: {np.array_equal(restored['weights'], state(latest)['weights'])}")
