"""Run by test_placement.py, once for every process of a run: reads a folder onto a mesh that spans them, writes it from
there, and prints what this process read and wrote as a JSON line.

``folder_process.py PROCESS PROCESSES PORT SOURCE TARGET [FAULTY_PROCESS FAULT]``: that one fails to "write" its first
file, to "tell" of it, or to "read" config.json back.
"""

import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from jaxrl.config import MeshConfig
from jaxrl.mesh import make_mesh
from jaxrl.model import hf, placement


def main() -> None:
    process, processes, port = map(int, sys.argv[1:4])
    source, target = map(pathlib.Path, sys.argv[4:6])
    fault = sys.argv[7] if sys.argv[6:7] == [str(process)] else None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    read_tensor, write_tensors, read_config = placement.read_tensor, hf.write_tensors, hf.read_config
    read, written = [], []

    def counted(*arguments: Any) -> np.ndarray:
        tensor = read_tensor(*arguments)
        read.append(tensor.nbytes)
        return tensor

    def noted(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
        fail("write")
        write_tensors(file, tensors)
        written.append(file.name)

    def fail(where: str) -> None:
        if fault == where:
            raise OSError("the disk is full")

    def read_back(*arguments: Any, **more: Any) -> Any:
        if more:
            fail("read")
        return read_config(*arguments, **more)

    placement.read_tensor, hf.write_tensors, hf.read_config = counted, noted, read_back
    mesh = make_mesh(MeshConfig(data=1, fsdp=processes, tensor=2))
    config, params = hf.load_folder(source, mesh=mesh)
    shares = [
        {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards} for leaf in jax.tree.leaves(params)
    ]
    report = {"read": sum(read), "share": sum(sum(share.values()) for share in shares), "failure": None}
    try:
        hf.save_folder(target, config, params, max_shard_bytes=20_000, on_bytes=lambda *_: fail("tell"))
    except OSError as error:
        report["failure"] = str(error)
    print(json.dumps(report | {"written": written}), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
