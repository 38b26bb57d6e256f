"""Rows of tokens for tests of losses: one trajectory a row unless segments are given."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.tokens import Tokens, sampled

VERL_MODES = {
    "token-mean": "token",
    "token-sum": "token_sum",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "constant",
}
"""Ours for each mode of verl's aggregation; the last takes the padded length."""


def tokens_of(
    mask: Any,
    logprobs: Any,
    advantages: Any,
    *,
    proximal: Any = None,
    behaviour: Any = None,
    entropy: Any = None,
    segment_ids: Any = None,
) -> Tokens:
    """The record of [B, T] arrays; one policy stands for the others where they are not given."""
    mask = jnp.asarray(mask, jnp.float32)
    behaviour = proximal if behaviour is None else behaviour
    proximal = behaviour if proximal is None else proximal
    return sampled(
        mask,
        jnp.asarray(logprobs, jnp.float32),
        proximal_logprobs=jnp.asarray(proximal, jnp.float32),
        behaviour_logprobs=jnp.asarray(behaviour, jnp.float32),
        advantages=jnp.asarray(advantages, jnp.float32),
        segment_ids=jnp.ones(mask.shape, jnp.int32) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32),
        entropy=jnp.zeros(mask.shape) if entropy is None else jnp.asarray(entropy, jnp.float32),
    )


def weights_of(mask: np.ndarray, mode: Any, constant_length: int = 0) -> np.ndarray:
    """[B, T] aggregation weights of rows that are a whole update."""
    return np.stack(aggregation_weights(list(mask), mode, constant_length))


def padded(array: Any, shape: tuple[int, int]) -> np.ndarray:
    """[B, T] made larger by zeros, which are padding: one compilation serves all bundles."""
    array = np.asarray(array, np.float32)
    return np.pad(array, [(0, size - have) for size, have in zip(shape, array.shape, strict=True)])


def close(got: Any, expected: Any, name: str, gradient: bool = False) -> None:
    """At the tolerances of the reference vectors."""
    np.testing.assert_allclose(got, expected, rtol=1e-4 if gradient else 1e-5, atol=1e-6, err_msg=name)
