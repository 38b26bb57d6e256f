"""Chunked log-probabilities against the plain formula, and how little they hold at once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxrl.config import MeshConfig, ModelConfig
from jaxrl.mesh import make_mesh
from jaxrl.model.logprob import logits, square_sum, token_logprobs

CONFIG = ModelConfig(vocab_size=40, width=12, logprob_chunk=8)


def inputs(config: ModelConfig, rows: int = 3, tokens: int = 11) -> tuple[dict, jax.Array, jax.Array]:
    generator = np.random.default_rng(0)
    params = {"embedding": jnp.asarray(generator.normal(size=(config.vocab_size, config.width)), jnp.float32)}
    hidden = jnp.asarray(generator.normal(size=(rows, tokens, config.width)), config.compute_dtype)
    return params, hidden, jnp.asarray(generator.integers(0, config.vocab_size, (rows, tokens)), jnp.int32)


@pytest.mark.parametrize(("temperature", "soft_cap"), [(1.0, 0.0), (0.6, 1.5)])
def test_values_and_gradients_match_the_plain_formula(temperature: float, soft_cap: float) -> None:
    config = dataclasses.replace(CONFIG, logit_soft_cap=soft_cap)
    params, hidden, targets = inputs(config)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, *targets.shape)), jnp.float32)

    def plain(params: dict, hidden: jax.Array) -> jax.Array:
        scores = hidden @ params["embedding"].T
        if soft_cap:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jax.nn.log_softmax(scores / temperature)
        logprobs = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(scores) * scores, axis=-1)
        return jnp.sum(weights[0] * logprobs + weights[1] * entropy)

    def chunked(params: dict, hidden: jax.Array) -> jax.Array:
        stats = token_logprobs(params, config, hidden, targets, temperature)
        return jnp.sum(weights[0] * stats.logprobs + weights[1] * stats.entropy)

    wanted, wanted_gradient = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(params, hidden)
    got, got_gradient = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(params, hidden)
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-4), got_gradient, wanted_gradient)


def test_logits_are_float32_in_bfloat16_too() -> None:
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    params, hidden, targets = inputs(config)
    stats = token_logprobs(params, config, hidden, targets)
    scores = logits(params, config, hidden)
    assert scores.dtype == stats.logprobs.dtype == stats.entropy.dtype == jnp.float32
    exact = jnp.einsum(
        "btd,vd->btv", hidden.astype(jnp.float32), params["embedding"].astype(jnp.bfloat16).astype(jnp.float32)
    )
    np.testing.assert_allclose(scores, exact, atol=1e-5)


def test_a_separate_head_is_used_where_there_is_one() -> None:
    params, hidden, _ = inputs(CONFIG)
    untied = params | {"head": 2 * params["embedding"]}
    np.testing.assert_allclose(logits(untied, CONFIG, hidden), 2 * logits(params, CONFIG, hidden), rtol=1e-6)


def test_no_array_holds_the_logits_of_a_long_row() -> None:
    config = ModelConfig(vocab_size=512, width=8, logprob_chunk=64)
    params, hidden, targets = inputs(config, rows=1, tokens=4096)

    def loss(params: dict, hidden: jax.Array) -> jax.Array:
        stats = token_logprobs(params, config, hidden, targets)
        return jnp.sum(stats.logprobs) + jnp.sum(stats.entropy)

    def sizes(jaxpr: object) -> list[int]:
        found = []
        for equation in jaxpr.eqns:
            found += [variable.aval.size for variable in equation.outvars]
            for sub in jaxprs_in_params(equation.params):
                found += sizes(sub)
        return found

    gradient = jax.grad(loss, argnums=(0, 1))
    assert max(sizes(jax.make_jaxpr(gradient)(params, hidden).jaxpr)) <= 64 * 512
    temporary = jax.jit(gradient).lower(params, hidden).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4096 * 512 * 4 // 4


def test_sums_of_squared_probabilities(golden: Callable[[str], list[dict[str, Any]]]) -> None:
    cases = [case for case in golden("verl/value_entropy") if case["id"].startswith("token_stats")]
    for case in cases:
        got = square_sum(jnp.asarray(case["inputs"]["logits"]))
        np.testing.assert_allclose(got, case["outputs"]["sum_pi_squared"], rtol=1e-5)
    assert len(cases) == 3


def test_a_mesh_of_one_device_changes_nothing() -> None:
    params, hidden, targets = inputs(CONFIG)
    plain = token_logprobs(params, CONFIG, hidden, targets)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        meshed = token_logprobs(params, CONFIG, hidden, targets)
    jax.tree.map(np.testing.assert_array_equal, meshed, plain)
