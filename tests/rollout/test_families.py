"""Promise 1 for every family: the engine's log-probabilities are the trainer's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.model import spec, transformer
from jaxrl.model.logprob import sequence_logprobs
from tests.rollout.conftest import CONFIG, MODEL, make_engine, play_all

SLIDING = {"sliding_window": 7, "sliding_layers": (0,)}
MODELS = {
    "qwen2": {},
    "llama": {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_trained_positions": 16},
    "mistral": {"sliding_window": 7, "sliding_layers": (0, 1)},
    "gemma2": {"score_width": 24, "attention_soft_cap": 4.0, "logit_soft_cap": 6.0, **SLIDING},
    "qwen3_moe": {"experts": 6, "expert_width": 32},
    "gemma3_text": {"local_rope_theta": 100.0, "rope_scaling": "linear", "rope_factor": 2.0, **SLIDING},
}
"""Features of each family that the engine's other tests leave out."""


@pytest.mark.parametrize(("dtype", "largest", "mean"), [("float32", 1e-5, 2e-6), ("bfloat16", 2e-2, 1e-3)])
@pytest.mark.parametrize("family", [*MODELS, "some layers dense"])
def test_promise_1_sampled_logprobs_are_the_trainers(family: str, dtype: str, largest: float, mean: float) -> None:
    model = dataclasses.replace(MODEL, init_scale=0.15, compute_dtype=dtype)
    if family in MODELS:
        model = dataclasses.replace(model, family=family, **MODELS[family])
    else:
        model = dataclasses.replace(model, family="qwen3_moe", layers=4, dense_layers=(0, 2), **MODELS["qwen3_moe"])
    params = spec.initialize(transformer.param_specs(model), jax.random.key(0))
    longest = CONFIG.max_prompt_tokens + CONFIG.max_response_tokens

    @jax.jit
    def score(tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), tokens.shape)
        return sequence_logprobs(params, model, tokens, positions, segment_ids).logprobs

    sampled, total = 0, 0.0
    for played in play_all(make_engine(params, model=model), [(0, 0), (1, 0), (2, 1)]).values():
        row = np.concatenate([played.prompt, played.ids])
        tokens = np.pad(row, (0, longest - len(row)))[None].astype(np.int32)
        logprobs = np.asarray(score(tokens, (np.arange(longest) < len(row))[None].astype(np.int32)))[0]
        difference = np.abs(logprobs[len(played.prompt) : len(row)] - played.logprobs) * played.mask
        assert difference.max() < largest
        sampled += played.mask.sum()
        total += difference.sum()
    assert sampled > 30 and total / sampled < mean
