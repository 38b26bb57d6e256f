"""Matrix products keep float32 where an accelerator would round it by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import ModelConfig
from jaxrl.model.kv_pages import init_pages
from jaxrl.model.logprob import logits, sequence_logprobs
from jaxrl.model.spec import initialize
from jaxrl.model.transformer import paged_hidden_states, param_specs
from jaxrl_kernels.products import precision_of, product

CONFIG = ModelConfig(vocab_size=32, layers=1, width=16, query_heads=2, kv_heads=1, head_width=8, ffn_width=16)
MOE = dataclasses.replace(CONFIG, family="qwen3_moe", experts=4, expert_width=8)


def products(function, *arguments) -> list[str]:
    """The matrix products of a program, as it is handed to the compiler."""
    text = jax.jit(function).lower(*arguments).as_text()
    return [line for line in text.splitlines() if "stablehlo.dot_general" in line or "ragged_dot" in line]


def test_the_result_is_float32_whatever_the_operands() -> None:
    left, right = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    result = product("ab,bc->ac", left, right)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, np.full((2, 4), 3.0))


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=lambda config: config.family)
def test_no_product_of_training_or_decoding_is_left_to_the_accelerators_default(config: ModelConfig) -> None:
    params = initialize(param_specs(config), jax.random.key(0))
    tokens = jnp.zeros((1, 4), jnp.int32)
    positions = jnp.arange(4, dtype=jnp.int32)[None]

    def loss(params: dict) -> jax.Array:
        return sequence_logprobs(params, config, tokens, positions, tokens + 1).logprobs.sum()

    def decode(params: dict) -> jax.Array:
        pages = init_pages(config, 2, 4)
        hidden, _ = paged_hidden_states(params, config, tokens, positions, pages, jnp.zeros((1, 1), jnp.int32))
        return logits(params, config, hidden)

    for lines in (products(jax.grad(loss), params), products(decode, params)):
        assert len(lines) >= 8
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in lines)


def test_gradients_of_a_product_in_bfloat16_keep_their_bits_too() -> None:
    def loss(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.square(product("ab,bc->ac", left, right)).sum()

    lines = products(jax.grad(loss, argnums=(0, 1)), jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16))
    mixed = [line for line in lines if "xf32>" in line.split("->")[0]]
    assert len(mixed) == 2 and all("precision = [HIGHEST, HIGHEST]" in line for line in mixed)


def test_kernels_for_tpus_are_told_of_float32_alone() -> None:
    """Their compiler refuses a precision for bfloat16; the slow tests show it."""
    assert [precision_of(dtype) for dtype in ("float32", "bfloat16")] == [jax.lax.Precision.HIGHEST, None]
