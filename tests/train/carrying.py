"""Run by test_transfer.py as one of several processes: arrays carried to the last devices of each.

``carrying.py PORT COUNT PROCESS FOLDER`` writes a report for each way an array may lie on the others, with the memory
that it took and the largest piece that was gathered, in chunks. (What gloo says of itself gets between the lines of a
standard output.)
"""

import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl.config import MeshConfig
from jaxrl.mesh import make_mesh, make_rollout_mesh, split_devices
from jaxrl.processes import join
from jaxrl.train import transfer
from tests.train.transfer_process import bytes_of

CHUNK = 4096
SHAPE = (8, 40, 36)
LAYOUTS = {
    "whole in each process": ((None, None, "tensor"), (None, "tensor")),
    "over processes": ((None, "fsdp"), (None, None, "tensor")),
    "over all, along one axis": ((None, ("fsdp", "tensor")), ()),
    "over all, a stack of matrices": ((None, "fsdp", "tensor"), (None, "tensor")),
    "over all, along every axis": (("fsdp", "tensor", "data"), (None, "tensor")),
}
"""Partitions of an array, on devices that train and on those that roll out."""


def carry(name: str) -> dict[str, Any]:
    sends, receives = LAYOUTS[name]
    config = MeshConfig(data=2 if "data" in sends else 1, rollout_devices=4, tensor=2)
    training, playing = split_devices(config)
    mesh = make_mesh(config, training)
    own = [device for device in training if device.process_index == jax.process_index()]
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    sharding = NamedSharding(mesh, PartitionSpec(*sends))
    array = jax.make_array_from_callback(SHAPE, sharding, lambda index: values[index])
    held, peak, gathered, put, gather = bytes_of(own), [0], [0], transfer._put, transfer._gather

    def watched_put(*arguments: Any) -> jax.Array:
        peak[0] = max(peak[0], bytes_of(own) - held)
        return put(*arguments)

    def watched_gather(*arguments: Any, **options: Any) -> jax.Array:
        joined = gather(*arguments, **options)
        gathered[0] = max(gathered[0], sum(shard.data.nbytes for shard in joined.addressable_shards))
        peak[0] = max(peak[0], bytes_of(own) - held)
        return joined

    transfer._put, transfer._gather = watched_put, watched_gather
    target = NamedSharding(make_rollout_mesh(mesh, 2, playing), PartitionSpec(*receives))
    copy = transfer.carried(array, jnp.dtype(jnp.bfloat16), target, chunk_bytes=CHUNK)
    transfer._put, transfer._gather = put, gather
    expected = values.astype(jnp.bfloat16)
    return {
        "layout": name,
        "equal": all(np.array_equal(shard.data, expected[shard.index]) for shard in copy.addressable_shards),
        "placed": copy.sharding == target and len(copy.addressable_shards) == 4 // jax.process_count(),
        "sending": peak[0] / CHUNK,
        "gathered": gathered[0] / CHUNK,
        "left": bytes_of(own) - held,
    }


def main() -> int:
    reports = [carry(layout) for layout in LAYOUTS]
    (pathlib.Path(sys.argv[4]) / f"{jax.process_index()}.json").write_text(json.dumps(reports), encoding="utf-8")
    return 0


if __name__ == "__main__":
    port, count, process = map(int, sys.argv[1:4])
    sys.exit(join.run(join.Place(f"127.0.0.1:{port}", count, process, 60), main))
