"""Which of many tokens come first: order statistics over the sampled tokens of one micro-batch.

What depends on them depends on what lies in the micro-batch beside a token, and so on how an update was cut.
"""

import jax
import jax.numpy as jnp

from jaxrl import mesh as meshes
from jaxrl.rl import sequences


def ascending(values: jax.Array, mask: jax.Array) -> jax.Array:
    """[B * T] the values of the masked tokens, rising, then infinity; on every device all of them.

    Args:
        values: [B, T] float, finite.
        mask: [B, T] bool.
    """
    together = meshes.to_compute(jnp.where(mask, values, jnp.inf), (None, None))
    return jnp.sort(together.ravel())


def lowest(values: jax.Array, mask: jax.Array, count: jax.Array) -> jax.Array:
    """[B, T] bool, the ``count`` masked tokens of least value; of equal ones those that lie first, row by row.

    Args:
        values: [B, T] float, finite.
        mask: [B, T] bool.
        count: [] int; 0 selects none, more than there are selects all.
    """
    last = ascending(values, mask)[jnp.clip(count - 1, 0, values.size - 1)]
    below, equal = (
        meshes.to_compute(mask & chosen & (count > 0), (None, None)) for chosen in (values < last, values == last)
    )
    place = jnp.cumsum(equal.ravel()).reshape(equal.shape)
    return mask & meshes.to_compute(below | (equal & (place <= count - below.sum())), sequences.ROWS)


def quantiles(values: jax.Array, mask: jax.Array, shares: tuple[float, ...]) -> list[jax.Array]:
    """[] each: the values below which these shares of the masked tokens lie, between two tokens in proportion.

    Args:
        values: [B, T] float, finite.
        mask: [B, T] bool; 0 is given back if nothing is masked.
        shares: between 0 and 1.
    """
    ordered, count = ascending(values, mask), mask.sum()
    found = []
    for share in shares:
        place = share * jnp.maximum(count - 1, 0).astype(values.dtype)
        below = jnp.floor(place).astype(jnp.int32)
        above = jnp.minimum(below + 1, jnp.maximum(count - 1, 0))
        part = place - below
        value = ordered[below] * (1 - part) + jnp.where(part > 0, ordered[above], ordered[below]) * part
        found.append(jnp.where(count > 0, value, 0.0))
    return found
