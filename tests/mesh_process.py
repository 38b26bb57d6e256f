"""Run by test_mesh.py with eight virtual devices: compares meshes with one device, prints a JSON line for each."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.config import MeshConfig, ModelConfig
from jaxrl.mesh import PARAM_RULES, ROLLOUT_RULES, make_mesh, partition_spec
from jaxrl.model.logprob import logits, sequence_logprobs
from jaxrl.model.spec import initialize, shardings
from jaxrl.model.transformer import KV_AXES, init_pages, paged_hidden_states, param_specs

CONFIG = ModelConfig(
    vocab_size=48, layers=2, width=16, query_heads=8, kv_heads=4, head_width=8, ffn_width=32, init_scale=0.2,
    logprob_chunk=16, remat="full", tie_embeddings=False,
)  # fmt: skip
ROWS, TOKENS = 8, 24


def loss(params: dict, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    stats = sequence_logprobs(params, CONFIG, tokens, positions, segment_ids, 0.7)
    return jnp.sum(stats.logprobs) / 100 + jnp.sum(stats.entropy) / 300


def rollout(params: dict, tokens: jax.Array, positions: jax.Array, pages: object, table: jax.Array) -> jax.Array:
    hidden, pages = paged_hidden_states(params, CONFIG, tokens, positions, pages, table)
    hidden, pages = paged_hidden_states(params, CONFIG, tokens[:, :1], positions[:, -1:] + 1, pages, table)
    return logits(params, CONFIG, hidden)


def main() -> None:
    specs = param_specs(CONFIG)
    params = initialize(specs, jax.random.key(0))
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, CONFIG.vocab_size, (ROWS, TOKENS)).astype(np.int32)
    segment_ids = np.repeat([[1] * 9 + [2] * 11 + [0] * 4], ROWS, axis=0).astype(np.int32)
    positions = np.repeat([[*range(9), *range(11), *range(4)]], ROWS, axis=0).astype(np.int32)
    batch = (tokens, positions, segment_ids)
    paged = (tokens[:, :8], np.repeat(np.arange(8, dtype=np.int32)[None], ROWS, axis=0))
    table = generator.permutation(ROWS * 3).reshape(ROWS, 3).astype(np.int32)
    wanted_loss, wanted = jax.jit(jax.value_and_grad(loss))(params, *batch)
    wanted_logits = jax.jit(rollout)(params, *paged, init_pages(CONFIG, ROWS * 3, 4), table)
    for data, fsdp, tensor in ((2, 2, 2), (8, 1, 1), (1, 8, 1)):
        mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
        resting = shardings(specs, mesh, PARAM_RULES)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, resting)
            got_loss, got = jax.jit(jax.value_and_grad(loss))(placed, *batch)
            rollout_error = None
            if min(data, fsdp, tensor) > 1:
                pages = init_pages(CONFIG, ROWS * 3, 4)
                pages = jax.device_put(pages, jax.NamedSharding(mesh, partition_spec(KV_AXES, ROLLOUT_RULES, mesh)))
                rollout_params = jax.device_put(params, shardings(specs, mesh, ROLLOUT_RULES))
                got_logits = jax.jit(rollout)(rollout_params, *paged, pages, table)
                rollout_error = float(np.abs(np.asarray(got_logits) - np.asarray(wanted_logits)).max())
        paths = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(got)]
        at_rest = jax.tree.leaves(placed)
        report = {
            "mesh": f"{data}x{fsdp}x{tensor}",
            "loss_error": abs(float(got_loss) - float(wanted_loss)) / abs(float(wanted_loss)),
            "gradient_error": max(
                float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
                for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
            ),
            "misplaced_gradients": [
                path for (path, leaf), rest in zip(paths, at_rest, strict=True) if leaf.sharding != rest.sharding
            ],
            "split_parameters": sum(leaf.ndim > 2 and not leaf.is_fully_replicated for leaf in at_rest),
            "matrices": sum(leaf.ndim > 2 for leaf in at_rest),
            "rollout_error": rollout_error,
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
