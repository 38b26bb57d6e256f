"""Compilers for devices that are not there, where they are installed, and a model that compiles in seconds."""

import pytest

from jaxrl.check import environment

SMALL = (
    "ModelConfig.layers=2",
    "ModelConfig.width=256",
    "ModelConfig.query_heads=2",
    "ModelConfig.kv_heads=2",
    "ModelConfig.head_width=128",
    "ModelConfig.ffn_width=512",
    "ModelConfig.vocab_size=1024",
    "ModelConfig.compute_dtype=bfloat16",
    "ModelConfig.remat=full",
    "EngineConfig.slots=8",
    "EngineConfig.max_prompt_tokens=64",
    "EngineConfig.max_response_tokens=192",
    "TrainConfig.rows=8",
    "TrainConfig.row_tokens=256",
    "SftConfig.demonstrations=",
    "MeshConfig.tensor=2",
)
"""Overrides of smoke."""


def needs_compiler(platform: str) -> None:
    """Skip where the compiler is not installed."""
    if not environment.installed(platform):
        pytest.skip(f"the compiler for {platform} is not installed: jaxrl check --install {platform}")
