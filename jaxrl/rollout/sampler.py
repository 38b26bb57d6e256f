"""Sampling one token for every row: one uniform number a row, and the log-probability the trainer will compute.

The uniform number's key names the draw of the problem, the sample in its group and the token's index in the response,
so a token never depends on which slot, round or batch it was sampled in.
"""

import jax
import jax.numpy as jnp

BLOCK = 128
"""Tokens of the vocabulary summed together in the search for the sampled one."""


def row_keys(key: jax.Array, draws: jax.Array, samples: jax.Array) -> jax.Array:
    """[R] keys ``fold_in(fold_in(key, draw), sample)``.

    Args:
        key: the run's key.
        draws: [R] int32, draw of the problem stream.
        samples: [R] int32, index within the group.
    """
    return jax.vmap(lambda draw, sample: jax.random.fold_in(jax.random.fold_in(key, draw), sample))(draws, samples)


def uniforms(keys: jax.Array, indices: jax.Array) -> jax.Array:
    """[R] float32 in [0, 1), from ``fold_in(row key, index of the token in the response)``.

    Args:
        keys: [R] from ``row_keys``.
        indices: [R] int32.
    """
    return jax.vmap(lambda key, index: jax.random.uniform(jax.random.fold_in(key, index)))(keys, indices)


def sample(logits: jax.Array, temperatures: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sample by inverse distribution function: the first token whose cumulative probability exceeds ``uniform``.

    Inverse transform sampling needs one random number a row where the Gumbel trick needs one a logit (Devroye 1986,
    Non-Uniform Random Variate Generation, section III.2). The cumulative sum is two-level: over blocks of ``BLOCK``
    tokens, then inside the block that was hit.

    Args:
        logits: [R, V].
        temperatures: [R] float32; 0 = greedy, with the log-probability at temperature 1.
        uniform: [R] float32 in [0, 1).

    Returns:
        Tokens [R] int32, and their log-probabilities [R] float32 (nats) under the untruncated distribution at the
        temperature.
    """
    rows, vocabulary = logits.shape
    greedy = temperatures <= 0.0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, temperatures)[:, None]
    top = scaled.max(axis=-1)
    blocks = jnp.pad(jnp.exp(scaled - top[:, None]), ((0, 0), (0, -vocabulary % BLOCK))).reshape(rows, -1, BLOCK)
    cumulative = jnp.cumsum(blocks.sum(axis=-1), axis=-1)
    total = cumulative[:, -1]
    target = uniform * total
    block = _first_above(cumulative, target)
    until = jnp.pad(cumulative, ((0, 0), (1, 0)))
    before = jnp.take_along_axis(until, block[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    drawn = block * BLOCK + _first_above(jnp.cumsum(inside, axis=-1), target - before)
    tokens = jnp.where(greedy, scaled.argmax(axis=-1), drawn).astype(jnp.int32)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=1)[:, 0]
    return tokens, chosen - top - jnp.log(total)


def _first_above(cumulative: jax.Array, target: jax.Array) -> jax.Array:
    """Index of the first entry above the target; where rounding leaves none, the last entry that added anything."""
    first = (cumulative <= target[:, None]).sum(axis=-1)
    last = (cumulative < cumulative[:, -1:]).sum(axis=-1)
    return jnp.minimum(first, last)
