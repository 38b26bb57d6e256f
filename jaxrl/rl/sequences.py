"""Arithmetic over each trajectory of packed rows, its result given back at every one of its tokens.

A trajectory is one segment, a run of equal numbers in ``segment_ids``. Sums are pairwise, by doubling the distance that
is looked back: nothing is added across the border of a segment, not even as a difference that cancels, the order of the
additions is fixed, and the rounding error grows with the logarithm of the length.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import mesh as meshes

ROWS = ("batch", None)


def total(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, T] the sum of ``values`` over the segment a token lies in, the same number at all of its tokens.

    Args:
        values: [B, T]; 0 where a token should not count.
        segment_ids: [B, T] int; equal numbers lie side by side.
    """
    return _total(values, segment_ids)


def mean(values: jax.Array, mask: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, T] the mean of ``values`` over the sampled tokens of the segment, 0 where it has none.

    Args:
        values: [B, T], finite.
        mask: [B, T] float, 1 where the policy sampled the token.
        segment_ids: as in ``total``.
    """
    return total(values * mask, segment_ids) / length(mask, segment_ids)


def length(mask: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, T] how many sampled tokens the segment has, at least 1 so that it divides."""
    return jnp.maximum(total(mask, segment_ids), 1.0)


def largest(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, T] the largest of ``values`` in the segment. No gradient flows."""
    return _over_segments(jax.lax.stop_gradient(values), segment_ids, jnp.maximum)


def still_to_come(values: jax.Array, mask: jax.Array, segment_ids: jax.Array, discount: float) -> jax.Array:
    """[B, T] at each token Σ_{k ≥ 0} discount^k of ``values`` at the k-th sampled token from it on, in its segment.

    Tokens that were not sampled are passed over: they neither add nor discount. No gradient flows.

    Args:
        values: [B, T]; 0 where the mask is.
        mask: [B, T] float, 1 where the policy sampled the token.
        segment_ids: as in ``total``.
        discount: of one sampled token.
    """
    local = functools.partial(_still_to_come, discount=discount)
    constant = jax.lax.stop_gradient(values)
    return meshes.per_shard(local, [ROWS, ROWS, ROWS], ROWS)(constant, mask, segment_ids)


def _still_to_come(values: jax.Array, mask: jax.Array, segment_ids: jax.Array, discount: float) -> jax.Array:
    place = jnp.arange(values.shape[1])
    goes_on = (segment_ids == jnp.roll(segment_ids, -1, axis=1)) & (place < values.shape[1] - 1)
    factors = jnp.where(goes_on, jnp.where(mask > 0, discount, 1.0), 0.0).astype(values.dtype)

    def joined(later: tuple, earlier: tuple) -> tuple:
        """Of x -> value + factor x, first that of the tokens after, then that of those before."""
        return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

    return jax.lax.associative_scan(joined, (factors, values), reverse=True, axis=1)[1]


@jax.custom_vjp
def _total(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    return _over_segments(values, segment_ids, jnp.add)


def _total_forward(values: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _total(values, segment_ids), segment_ids


def _total_backward(segment_ids: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, np.ndarray]:
    """The matrix of the sum is symmetric, so its transpose is the sum again: no scatter, whose order would be open."""
    return _total(cotangent, segment_ids), np.zeros(segment_ids.shape, jax.dtypes.float0)


_total.defvjp(_total_forward, _total_backward)


def _over_segments(
    values: jax.Array, segment_ids: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    local = functools.partial(_over_local_segments, combine=combine)
    return meshes.per_shard(local, [ROWS, ROWS], ROWS)(values, segment_ids)


def _over_local_segments(
    values: jax.Array, segment_ids: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    tokens = values.shape[1]
    place = jnp.arange(tokens)
    distance = 1
    while distance < tokens:
        same = (segment_ids == jnp.roll(segment_ids, distance, axis=1)) & (place >= distance)
        values = jnp.where(same, combine(values, jnp.roll(values, distance, axis=1)), values)
        distance *= 2
    is_last = (segment_ids != jnp.roll(segment_ids, -1, axis=1)) | (place == tokens - 1)
    last = jax.lax.cummin(jnp.where(is_last, place, tokens), axis=1, reverse=True)
    return jnp.take_along_axis(values, last, axis=1)
