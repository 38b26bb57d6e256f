"""All logits at once. Slow and clear: what every backend is compared with."""

import jax
import jax.numpy as jnp

from jaxrl_kernels.linear_logprob.scores import linear_scores
from jaxrl_kernels.softmax import soft_capped


def linear_logprob(
    hidden: jax.Array, head: tuple[jax.Array, ...], targets: jax.Array, temperature: jax.Array, soft_cap: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As the contract says, one line per step."""
    scaled = soft_capped(linear_scores(hidden, head), soft_cap) / jax.lax.stop_gradient(temperature)
    logprobs = jax.nn.log_softmax(scaled)
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    return jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0], entropy, jax.nn.logsumexp(scaled, axis=-1)
