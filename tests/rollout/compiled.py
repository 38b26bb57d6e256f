"""Compiles what the engine runs for a chip that is not there: one JSON object a line for every program.

    python -m tests.rollout.compiled v5e:2x2

Runs in a process of its own that has the compiler (``jaxrl.check.environment``).
"""

import json
import sys

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
NAMES = ("prefill", "decode")


def main(topology: str) -> None:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[:1]
    mesh = meshes.replica_meshes(meshes.make_rollout_mesh(meshes.make_mesh(MeshConfig(), devices)))[0]
    traced = programs.traced(ENGINE, MODEL, mesh, programs.abstract_params(MODEL, mesh))
    pages = programs.abstract_pages(ENGINE, MODEL, mesh).keys
    for name in NAMES:
        lowered = traced[name].lower(lowering_platforms=("tpu",))
        kernels, memory = lowered.as_text().count("tpu_custom_call"), lowered.compile().memory_analysis()
        answer = {"program": name, "kernels": kernels, "temporary": memory.temp_size_in_bytes}
        print(json.dumps(answer | {"keys": pages.size * pages.dtype.itemsize}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
