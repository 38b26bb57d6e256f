"""Sampling follows the distribution, its log-probability is exact, and its randomness has only the names it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.rollout import sampler

LARGEST = np.float32(1 - 2**-24)


def draw(logits, temperature, uniform):
    logits, uniform = np.atleast_2d(logits), np.atleast_1d(np.float32(uniform))
    rows = np.broadcast_to(logits, (len(uniform), logits.shape[1]))
    tokens, logprobs = sampler.sample(jnp.asarray(rows), jnp.full(len(uniform), temperature, jnp.float32), uniform)
    return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.parametrize("vocabulary", [3, 128, 300, 1000])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_tokens_are_the_inverse_of_the_distribution_function(vocabulary, temperature):
    logits = np.random.default_rng(vocabulary).normal(0, 3, vocabulary).astype(np.float32)
    uniform = (np.arange(4096) + 0.5) / 4096
    tokens, logprobs = draw(logits, temperature, uniform)
    exact = logits.astype(np.float64) / temperature
    exact -= np.log(np.exp(exact - exact.max()).sum()) + exact.max()
    wanted = np.searchsorted(np.cumsum(np.exp(exact)), uniform, side="right")
    assert (tokens != wanted).mean() < 0.002  # where a uniform number falls on a border, up to rounding
    np.testing.assert_allclose(logprobs, exact[tokens], atol=2e-6)


def test_greedy_takes_the_largest_and_scores_it_at_temperature_one():
    logits = np.random.default_rng(0).normal(0, 2, (5, 200)).astype(np.float32)
    tokens, logprobs = sampler.sample(logits, jnp.zeros(5), jnp.linspace(0, 0.99, 5))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[np.arange(5), tokens], atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, float(LARGEST)]))
def test_impossible_tokens_are_never_sampled(seed, uniform):
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 5, 257).astype(np.float32)
    logits[generator.random(257) < 0.7] = -np.inf
    logits[generator.integers(257)] = 0.0
    logits[-3:] = -np.inf if generator.random() < 0.5 else 1.0
    token, logprob = draw(logits, 1.0, uniform)
    assert logits[token[0]] > -np.inf and np.isfinite(logprob[0])


def test_the_smallest_and_largest_uniform_number_reach_the_ends():
    assert draw(np.zeros(256, np.float32), 1.0, [0.0, LARGEST])[0].tolist() == [0, 255]


def test_uniform_numbers_depend_on_draw_sample_and_index_and_on_nothing_else():
    key = jax.random.key(7)
    names = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**31 - 1, 3, 9), (-5, 3, 9)]

    def numbers(names):
        draws, samples, indices = jnp.asarray(names, jnp.int32).T
        return np.asarray(sampler.uniforms(sampler.row_keys(key, draws, samples), indices)).tolist()

    together = numbers(names)
    assert len(set(together)) == len(names)
    assert [numbers([name])[0] for name in reversed(names)] == together[::-1]
    fold = jax.random.fold_in
    assert together[1] == float(jax.random.uniform(fold(fold(fold(key, 1), 0), 0)))
    assert all(0 <= number < 1 for number in together)
