"""Run by test_families_on_mesh.py with eight virtual devices: compares a mesh with one device, a JSON line a case."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.config import MeshConfig, ModelConfig
from jaxrl.mesh import PARAM_RULES, make_mesh
from jaxrl.model.logprob import sequence_logprobs
from jaxrl.model.moe import balance_loss
from jaxrl.model.spec import initialize, shardings
from jaxrl.model.transformer import param_specs

CONFIG = ModelConfig(
    vocab_size=48, layers=2, width=16, query_heads=8, kv_heads=4, head_width=8, ffn_width=32, init_scale=0.2,
    logprob_chunk=16, remat="full", sliding_window=7, sliding_layers=(0,), attention_bias=True,
)  # fmt: skip
CONFIGS = (
    dataclasses.replace(
        CONFIG, family="gemma3_text", local_rope_theta=50.0, attention_soft_cap=2.0, logit_soft_cap=5.0
    ),
    dataclasses.replace(CONFIG, family="qwen3_moe", experts=4, expert_width=12),
    dataclasses.replace(CONFIG, family="qwen3_moe", experts=4, expert_width=12, layers=3, dense_layers=(0,)),
)
MESHES = (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(slice=2, fsdp=1, context=2, tensor=2))
EXPERT_MESH = MeshConfig(fsdp=1, expert=2, context=2, tensor=2)
ROWS, TOKENS = 8, 24


def report(config: ModelConfig, lengths: MeshConfig) -> dict[str, object]:
    """How far loss and gradients on eight devices are from those on one."""
    specs = param_specs(config)
    params = initialize(specs, jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (ROWS, TOKENS)).astype(np.int32)
    segment_ids = np.repeat([[1] * 9 + [2] * 11 + [0] * 4], ROWS, axis=0).astype(np.int32)
    positions = np.repeat([[*range(9), *range(11), *range(4)]], ROWS, axis=0).astype(np.int32)

    def loss(params: dict) -> jax.Array:
        stats = sequence_logprobs(params, config, tokens, positions, segment_ids, 0.7)
        total = jnp.sum(stats.logprobs) / 100 + jnp.sum(stats.entropy) / 300
        return total if stats.load is None else total + balance_loss(stats.load)

    wanted_loss, wanted = jax.jit(jax.value_and_grad(loss))(params)
    mesh = make_mesh(lengths)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(specs, mesh, PARAM_RULES))
        got_loss, got = jax.jit(jax.value_and_grad(loss))(placed)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    at_rest = jax.tree.leaves(jax.tree.map(lambda leaf, rest: leaf.sharding == rest.sharding, got, placed))
    return {
        "family": config.family,
        "loss_error": abs(float(got_loss) / float(wanted_loss) - 1),
        "gradient_error": max(float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in pairs),
        "at_rest": all(at_rest),
    }


def main() -> None:
    for config in CONFIGS:
        meshes = MESHES if not config.experts else (EXPERT_MESH,) if config.dense_layers else (EXPERT_MESH, MESHES[0])
        for lengths in meshes:
            print(json.dumps(report(config, lengths)), flush=True)


if __name__ == "__main__":
    main()
