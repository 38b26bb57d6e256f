"""Run by test_transfer.py with eight virtual devices: arrays carried from the first four or five to the last three or
two, and the memory that takes, as they are and as if a process lacked parts of them; prints a JSON line for each."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrl.train import transfer

CHUNK = 4096
LAYOUTS = {
    "equal pieces": ((2, 2), (2,), ("b",), ("t",)),
    "one device to one": ((1,), (1,), ("a",), ("t",)),
    "whole to pieces": ((4,), (2,), (), ("t",)),
    "pieces to whole": ((4,), (3,), ("a",), ()),
    "another axis": ((4,), (2,), ("a",), (None, "t")),
    "both axes to one": ((2, 2), (4,), ("a", "b"), (None, None, "t")),
}
"""Lengths of the mesh on both sides, and partitions there of an array [8, 40, 36]."""


def bytes_of(devices: list[jax.Device]) -> int:
    """Memory of all arrays that live on these devices, each buffer counted once."""
    shards = [shard for array in jax.live_arrays() for shard in array.addressable_shards if shard.device in devices]
    return sum({(s.device, s.data.unsafe_buffer_pointer()): s.data.nbytes for s in shards}.values())


def carry(name: str, gathers: bool) -> dict[str, Any]:
    have, want, sends, receives = LAYOUTS[name]
    devices = jax.devices()
    sending, receiving = devices[: int(np.prod(have))], devices[-int(np.prod(want)) :]
    axes, explicit = ("a", "b")[: len(have)], (AxisType.Explicit,)
    giving = Mesh(np.array(sending).reshape(have), axes, axis_types=explicit * len(axes))
    source = NamedSharding(giving, PartitionSpec(*sends))
    target = NamedSharding(Mesh(np.array(receiving), ("t",), axis_types=explicit), PartitionSpec(*receives))
    values = np.random.default_rng(0).normal(size=(8, 40, 36)).astype(np.float32)
    array = jax.device_put(values, source)
    held, peaks, cut, put = bytes_of(sending), [0, 0], transfer._cut, transfer._put

    def watched_cut(*arguments: Any, **options: Any) -> jax.Array:
        block = cut(*arguments, **options)
        peaks[0] = max(peaks[0], bytes_of(sending) - held)
        return block

    def watched_put(*arguments: Any) -> jax.Array:
        peaks[1] = max(peaks[1], bytes_of(receiving))
        return put(*arguments)

    transfer._cut, transfer._put = watched_cut, watched_put
    if gathers:
        transfer._whole_in_every_process = lambda array: False
    copy = transfer.carried(array, jnp.dtype(jnp.bfloat16), target, chunk_bytes=CHUNK)
    transfer._cut, transfer._put = cut, put
    return {
        "layout": name,
        "gathers": gathers,
        "equal": bool(np.array_equal(np.asarray(copy), values.astype(jnp.bfloat16))),
        "placed": copy.sharding == target,
        "sending": peaks[0] / CHUNK,
        "receiving": (peaks[1] - copy.nbytes * (1 if receives else len(receiving))) / CHUNK,
        "left": bytes_of(sending) - held,
        "copies": bytes_of(receiving) / copy.nbytes,
    }


if __name__ == "__main__":
    for gathers in (False, True):
        for layout in LAYOUTS:
            print(json.dumps(carry(layout, gathers)), flush=True)
    sys.exit()
