"""Logits of hidden states, as every backend and the sampler take them."""

from collections.abc import Sequence

import jax

from jaxrl_kernels.products import product


def linear_scores(
    hidden: jax.Array, head: Sequence[jax.Array], out_sharding: jax.sharding.PartitionSpec | None = None
) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]; ``head`` is (matrix [V, D],), or with two factors [D, r] and
    [r, V] of what is added to its transpose."""
    matrix, *pair = head
    scores = product("...d,vd->...v", hidden, matrix, out_sharding=out_sharding)
    if not pair:
        return scores
    narrow = product("...d,dr->...r", hidden, pair[0]).astype(hidden.dtype)
    return scores + product("...r,rv->...v", narrow, pair[1], out_sharding=out_sharding)
