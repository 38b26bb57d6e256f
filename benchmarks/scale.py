"""Large models on pods, on paper: every program of the rstar2 recipe compiled for devices that are not there.

    python benchmarks/scale.py --json                                all of ``RUNS``
    python benchmarks/scale.py --models 14B,32B --targets h200x64    some of them

Needs the compilers (``jaxrl check --install tpu``, ``--install gpu``); what they said before is read again from the
user's cache. Seconds are those of data-sheet rates, which no device reaches.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from jaxrl.check import cost, environment, programs, remedies, run, targets
from jaxrl.model import spec, transformer

MODELS: dict[str, remedies.Settings] = {
    "14B": {},
    "32B": {
        "ModelConfig.layers": 64,
        "ModelConfig.query_heads": 64,
        "ModelConfig.ffn_width": 25600,
    },
    "30B-A3B": {
        "ModelConfig.family": "qwen3_moe",
        "ModelConfig.layers": 48,
        "ModelConfig.width": 2048,
        "ModelConfig.query_heads": 32,
        "ModelConfig.kv_heads": 4,
        "ModelConfig.experts": 128,
        "ModelConfig.experts_per_token": 8,
        "ModelConfig.expert_width": 768,
        "ModelConfig.expert_chunk": 4096,
        "MeshConfig.expert": 8,
        "MeshConfig.rollout_tensor": 4,
    },
    "235B-A22B": {
        "ModelConfig.family": "qwen3_moe",
        "ModelConfig.layers": 94,
        "ModelConfig.width": 4096,
        "ModelConfig.query_heads": 64,
        "ModelConfig.kv_heads": 4,
        "ModelConfig.experts": 128,
        "ModelConfig.experts_per_token": 8,
        "ModelConfig.expert_width": 1536,
        "ModelConfig.expert_chunk": 4096,
        "MeshConfig.expert": 8,
    },
}
"""What differs from configs/rstar2_14b.gin, by the models' config.json; experts on a mesh axis of their own."""

RUNS: tuple[tuple[str, str, remedies.Settings], ...] = (
    ("14B", "v5p-64", {}),
    ("14B", "h200x64", {}),
    ("32B", "v5p-64", {"EngineConfig.pages": 4096}),
    ("32B", "h200x64", {"EngineConfig.pages": 8192}),
    ("30B-A3B", "v5p-64", {}),
    ("30B-A3B", "h200x64", {}),
    (
        "235B-A22B",
        "h200x512",
        {
            "ModelConfig.expert_chunk": 2048,
            "MeshConfig.rollout_tensor": 8,
            "MeshConfig.context": 4,
            "TrainConfig.rows": 128,
            "OptimizerConfig.offload": True,
            "EngineConfig.pages": 2048,
        },
    ),
)
"""Model, target, and what it takes there."""

PROGRAMS = tuple(name for name in programs.NAMES if name not in ("first", "score"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets_of_runs = list(dict.fromkeys(name for _, name, _ in RUNS))
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--targets", default=",".join(targets_of_runs), help=f"of {', '.join(targets_of_runs)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    options = parser.parse_args()
    for row in rows(options.models.split(","), options.targets.split(",")):
        print(json.dumps(row) if options.json else "  ".join(f"{name}={value}" for name, value in row.items()))
    return 0


def rows(models: list[str], names: list[str]) -> Iterator[dict[str, Any]]:
    """One for each run of these models on these targets whose compiler is there."""
    recipe = run.configuration("rstar2_14b", [])
    for model, name, settings in RUNS:
        target = targets.parse(name)
        if model not in models or name not in names:
            continue
        if not environment.installed(target.platform):
            print(f"scale: {name} left out; jaxrl check --install {target.platform}", file=sys.stderr)
            continue
        config = remedies.changed(recipe, MODELS[model] | settings)
        result = run.compile_for(config, target, lambda line: print(line, file=sys.stderr), names=PROGRAMS)
        yield {"figure": f"{model} on {name}", "holds": result.fits, **_values(result)}


def _values(result: run.Result) -> dict[str, Any]:
    gib = {part: round(value / targets.GIB, 2) for part, value in result.fullest.parts.items()}
    values = {
        "parameters": spec.count(transformer.param_specs(result.config.model)),
        "unit": "GiB on a device, TFLOP and GB on a device in a step",
        "fullest": result.fullest.name,
        **gib,
        "needs": round(result.fullest.total / targets.GIB, 2),
        "memory": round(result.memory / targets.GIB, 2),
    }
    if "decode" in result.compiled:
        for phase in cost.phases(result):
            values[phase.name] = {
                "tflop": round(phase.flops / 1e12, 1),
                "gb_read": round(phase.read / 1e9, 1),
                "gb_sent": round(phase.sent / 1e9, 1),
                "gb_sent_beyond": round(phase.beyond / 1e9, 1),
                "seconds": round(phase.seconds, 1),
            }
    return values


if __name__ == "__main__":
    sys.exit(main())
