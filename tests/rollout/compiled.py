"""Compiles what the engine runs for a chip that is not there: one JSON object a line for every program.

    python -m tests.rollout.compiled v5e:2x2

Runs in a process of its own that has the compiler (``jaxrl.check.environment``).
"""

import dataclasses
import json
import sys

import jax
from jax.experimental import topologies

from jaxrl import mesh as meshes
from jaxrl.config import EngineConfig, MeshConfig, ModelConfig
from jaxrl.rollout import programs

MODEL = ModelConfig(
    vocab_size=1024,
    layers=3,
    width=256,
    query_heads=8,
    kv_heads=4,
    head_width=128,
    ffn_width=256,
    compute_dtype="bfloat16",
)
ENGINE = EngineConfig(slots=32, pages=16384, max_prompt_tokens=2048, max_response_tokens=2048)
ENGINES = (ENGINE, dataclasses.replace(ENGINE, kv_dtype="int8", page_size=128, pages=8192))
NAMES = ("prefill", "decode")


def main(topology: str) -> None:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[:1]
    mesh = meshes.replica_meshes(meshes.make_rollout_mesh(meshes.make_mesh(MeshConfig(), devices)))[0]
    for engine in ENGINES:
        traced = programs.traced(engine, MODEL, mesh, programs.abstract_params(MODEL, mesh))
        pages = programs.abstract_pages(engine, MODEL, mesh)
        smallest = min(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages))
        for name in NAMES:
            lowered = traced[name].lower(lowering_platforms=("tpu",))
            kernels, memory = lowered.as_text().count("tpu_custom_call"), lowered.compile().memory_analysis()
            answer = {"program": name, "kernels": kernels, "temporary": memory.temp_size_in_bytes}
            print(json.dumps(answer | {"smallest": smallest}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
