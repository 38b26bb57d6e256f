"""The engine's copy of the weights computes what the trainer's weights compute, to the last bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import MeshConfig, ModelConfig
from jaxrl.mesh import make_mesh, make_rollout_mesh
from jaxrl.model import spec, transformer
from jaxrl.model.logprob import sequence_logprobs
from jaxrl.train.sync import is_cut, layers_at_once, rollout_params

MODEL = ModelConfig(
    vocab_size=40, layers=2, width=32, query_heads=4, kv_heads=2, head_width=8, ffn_width=48, init_scale=0.1,
    compute_dtype="bfloat16",
)  # fmt: skip
MODELS = {
    "qwen3": dataclasses.replace(MODEL, attention_bias=True, tie_embeddings=False),
    "gemma2": dataclasses.replace(MODEL, family="gemma2", logit_soft_cap=5.0),
    "qwen3_moe": dataclasses.replace(MODEL, family="qwen3_moe", experts=4, expert_width=24),
}


def engines_copy(params: dict, model: ModelConfig) -> dict:
    """What the one replica of a single device gets, as plain arrays."""
    mesh = make_rollout_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    (copy,) = rollout_params(params, model, mesh)
    return jax.tree.map(jnp.asarray, jax.device_get(copy))


def trained(model: ModelConfig) -> dict:
    """Weights none of which bfloat16 can hold, norms and biases too."""
    generator = np.random.default_rng(0)
    specs = transformer.param_specs(model)
    fresh = spec.initialize(specs, jax.random.key(0))
    return jax.tree.map(lambda x: x + jnp.asarray(0.05 * generator.normal(size=x.shape), x.dtype), fresh)


@pytest.mark.parametrize("family", MODELS)
def test_promise_1_the_engines_copy_gives_the_same_logprobs(family: str) -> None:
    model, params = MODELS[family], trained(MODELS[family])
    copy = engines_copy(params, model)
    assert copy["embedding"].dtype == copy["layers"]["query"].dtype == jnp.bfloat16
    assert copy["final_norm"].dtype == jnp.float32
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (3, 20)).astype(np.int32)
    positions = np.broadcast_to(np.arange(20, dtype=np.int32), tokens.shape)
    score = jax.jit(lambda params: sequence_logprobs(params, model, tokens, positions, np.ones_like(tokens)).logprobs)
    np.testing.assert_array_equal(score(copy), score(params))


def test_weights_of_another_model_are_refused() -> None:
    params = trained(MODEL)
    with pytest.raises(ValueError, match="the trees differ"):
        engines_copy(params, MODELS["qwen3"])
    with pytest.raises(ValueError, match=r"embedding.* has shape .40, 32.; the model wants .48, 32."):
        engines_copy(params, dataclasses.replace(MODEL, vocab_size=48))


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        ((40, 5120, 17408), 1),
        ((40, 4096, 4096), 8),
        ((37, 4096, 4096), 8),
        ((40, 1024, 1024), 40),
        ((94, 128, 4096, 1536), 1),
        ((7, 5120), 7),
        ((128_257, 4096), 32_768),
    ],
)
def test_weights_change_their_layout_a_few_layers_at_a_time(shape: tuple[int, ...], layers: int) -> None:
    """In bfloat16 no more than 256 MiB, or one layer, whatever divides their number."""
    assert layers_at_once(shape, 2) == layers


def test_a_first_axis_that_is_split_is_not_cut() -> None:
    mesh = make_rollout_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    whole, layers, first = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in ((), (None, "tensor"), ("tensor",))
    )
    assert is_cut(layers, whole) and not is_cut(first, layers) and not is_cut(whole, first)
