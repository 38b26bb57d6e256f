"""Whether two sets of parameters are the same model: the same values, and the same logits."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrl.config import ModelConfig
from jaxrl.mesh import COMPUTE_RULES, pieces, to_compute
from jaxrl.model.logprob import logits
from jaxrl.model.transformer import Params, hidden_states

TOKENS = 16
"""Length of the row whose last logits are compared; so many for each piece where a mesh splits the tokens of a row."""
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of logits as a share of the largest logit, by compute type."""


class Different(ValueError):
    """Two models are not the same; the message says where."""


def check_same_values(params: Params, found: Params, dtype: str) -> None:
    """Compare parameters that rest in the same way.

    Args:
        params: the original, any type.
        found: what became of it.
        dtype: type through which the values went.

    Raises:
        Different: naming the first parameter with another value.
    """
    for (path, value), other in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(found), strict=True):
        if not _same(_through(value, dtype), other):
            raise Different(f"{jax.tree_util.keystr(path, simple=True, separator='/')} has other values")


def check_same_logits(
    config: ModelConfig, params: Params, found_config: ModelConfig, found: Params, dtype: str, mesh: Mesh | None
) -> float:
    """Compare the logits after a row of random tokens; returns the largest difference.

    Args:
        config, params: the original, any type.
        found_config, found: what became of it, resting in the same way.
        dtype: type through which the values went.
        mesh: where both rest; None where they are on no mesh.

    Raises:
        Different: by more than rounding.
    """
    rows, shards = (pieces(axis, COMPUTE_RULES, mesh) if mesh is not None else 1 for axis in ("batch", "token_shards"))
    row = np.random.default_rng(0).integers(0, config.vocab_size, TOKENS * shards, np.int32)
    tokens = np.tile(row, (rows, 1))
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        wanted, got = (
            np.asarray(_last_logits(config, _through(params, dtype), tokens).addressable_data(0))
            for config, params in ((config, params), (found_config, found))
        )
    difference, largest = float(np.abs(wanted - got).max()), float(np.abs(wanted).max())
    if not difference <= TOLERANCES[config.compute_dtype] * max(largest, 1.0):
        raise Different(f"its logits differ by {difference:.1e} where the largest is {largest:.1e}")
    return difference


def _through(params: Params, dtype: str) -> Params:
    """As a file of this type has them. Never inside a compiled function: a compiler may drop a cast there and back."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, dtype), params)


@jax.jit
def _same(value: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.array_equal(value.astype(other.dtype), other, equal_nan=True)


@functools.partial(jax.jit, static_argnames="config")
def _last_logits(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """[B, 1, V] of rows [B, T]."""
    params = jax.tree.map(lambda leaf: leaf.astype(config.param_dtype), params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = hidden_states(params, config, tokens, positions, jnp.ones_like(tokens))
    return logits(params, config, to_compute(hidden, ("batch", None, None))[:, -1:])
