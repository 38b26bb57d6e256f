"""Compiles the kernels for Hopper GPUs without one: one JSON object a line for every shape.

    python -m tests.kernels.compiled_for_hopper

Runs in a process of its own that has the compiler (``jaxrl.check.environment``), which prints what it made where
MOSAIC_GPU_DUMP_PTX and MOSAIC_GPU_DUMP_PTXAS say so.
"""

import json

import jax

from jaxrl.check import devices, targets
from tests.kernels import compositions
from tests.kernels.compiled import Shape, lowered

SHAPES = (
    Shape("grouped", 4096, 8, 2, 128),
    Shape("capped", 2048, 5, 1, 128, soft_cap=50.0),
    Shape("narrow", 2048, 4, 4, 64),
)
"""Both passes of each, with a window that is an argument."""


def main() -> None:
    two = devices.described(targets.parse("h200x2"))
    mesh = jax.sharding.Mesh(two[:1], ("one",))
    for shape in SHAPES:
        program = lowered(shape, mesh, platform="cuda")
        kernels = program.as_text().count("custom_call @mosaic_gpu")
        memory, scores = program.compile().memory_analysis(), 4 * shape.query_heads * shape.tokens**2
        answer = {"shape": shape.name, "kernels": kernels, "temporary": memory.temp_size_in_bytes, "too_much": scores}
        print(json.dumps(answer), flush=True)
    for answer in compositions.compiled(two, "cuda"):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
