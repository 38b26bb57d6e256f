"""Run by test_placement.py with eight virtual devices: reads a folder onto meshes and writes it from there, and prints
a JSON line for each.

``sharded_folders.py FOLDER SCRATCH``
"""

import hashlib
import json
import pathlib
import sys
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from jaxrl.config import MeshConfig, ModelConfig
from jaxrl.mesh import PARAM_RULES, ROLLOUT_RULES, make_mesh
from jaxrl.model import hf, placement, spec, transformer

SPLIT_STACKS = {**PARAM_RULES, "layers": "data"}
"""As experts would be split: every device holds some of the tensors that a parameter stacks. Nothing computes so."""
CASES = (
    (MeshConfig(data=2, fsdp=2, tensor=2), PARAM_RULES),
    (MeshConfig(data=8, fsdp=1), PARAM_RULES),
    (MeshConfig(fsdp=8), PARAM_RULES),
    (MeshConfig(data=2, fsdp=1, tensor=4), ROLLOUT_RULES),
    (MeshConfig(slice=2, fsdp=1, context=2, tensor=2), PARAM_RULES),
    (MeshConfig(data=2, fsdp=2, tensor=2), SPLIT_STACKS),
)


def tensors(config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Every tensor as an export would have it."""
    specs, leaves = map(flax.traverse_util.flatten_dict, (transformer.param_specs(config), params))
    return {
        name: placement.whole_tensor(specs[key], leaves[key], place)
        for key in specs
        for place, name in specs[key].hf_names.items()
    }


def digests(folder: pathlib.Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("model*")}


def main() -> None:
    source, scratch = map(pathlib.Path, sys.argv[1:])
    config, on_host = hf.load_folder(source)
    read_tensor, read = placement.read_tensor, []

    def counted(*arguments: Any) -> np.ndarray:
        tensor = read_tensor(*arguments)
        read.append(tensor.nbytes)
        return tensor

    placement.read_tensor = counted
    seen: list[tuple[str, int, int]] = []
    for lengths, rules in CASES:
        mesh = make_mesh(lengths)
        read.clear()
        seen.clear()
        _, params = hf.load_folder(source, mesh=mesh, rules=rules, on_bytes=lambda *now: seen.append(now))
        wanted = spec.shardings(transformer.param_specs(config), mesh, rules)
        leaves, host = jax.tree.leaves(params), jax.tree.leaves(on_host)
        report = {
            "mesh": "x".join(map(str, mesh.devices.shape)),
            "equal": all(np.asarray(a).tobytes() == b.tobytes() for a, b in zip(leaves, host, strict=True)),
            "misplaced": sum(a.sharding != w for a, w in zip(leaves, jax.tree.leaves(wanted), strict=True)),
            "most_split": max(len({str(shard.index) for shard in leaf.addressable_shards}) for leaf in leaves),
            "bytes_read": sum(read),
            "bytes": sum(leaf.nbytes for leaf in host),
            "progress": [seen[0][1] > 0, *seen[-1]],
            "tensors_back": all(
                np.array_equal(tensor, tensors(config, on_host)[name])
                for name, tensor in tensors(config, params).items()
            ),
        }
        if rules is not SPLIT_STACKS:
            done = hf.save_folder(scratch / "copy", config, params, max_shard_bytes=20_000)
            report |= {"files": digests(scratch / "copy"), "logit_difference": done.logit_difference}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
