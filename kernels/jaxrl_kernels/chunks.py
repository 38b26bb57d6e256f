"""Rows of tokens cut into chunks, for what would be too large for all of them at once."""

import jax
import jax.numpy as jnp


def cut(values: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] flattened and cut into [chunks, chunk, ...], padded with zeros; a chunk is no longer than all."""
    flat = values.reshape(-1, *values.shape[2:])
    chunk = min(chunk, len(flat))
    padded = jnp.pad(flat, ((0, -len(flat) % chunk), *[(0, 0)] * (flat.ndim - 1)))
    return padded.reshape(-1, chunk, *flat.shape[1:])


def joined(pieces: jax.Array, batch: int, tokens: int) -> jax.Array:
    """What was made of each token of such chunks, [chunks, chunk, ...], as [B, T, ...]."""
    flat = pieces.reshape(-1, *pieces.shape[2:])
    return flat[: batch * tokens].reshape(batch, tokens, *flat.shape[1:])
