"""Losses of answers that were judged one by one. Each [N], before the mean over answers.

With r = beta times the log-ratio of an answer to the reference.
"""

import jax
import jax.numpy as jnp

from jaxrl.rl.preference.records import Judged, mean_of


def kto(
    judged: Judged, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> jax.Array:
    """KTO (arXiv 2402.01306, equation 8): weight (1 - σ(±(r - beta z))), + for desirable answers.

    z is the KL of policy to reference, estimated over the micro-batch from answers to other prompts, at least 0, a
    constant. The paper asks for desirable_weight / undesirable_weight · their counts' ratio between 1 and 4 / 3.
    """
    kl = jax.lax.stop_gradient(jnp.maximum(mean_of(judged.unrelated, judged.present), 0.0))
    above = beta * (judged.answers.log_ratios - kl)
    loss = 1 - jax.nn.sigmoid(jnp.where(judged.desirable, above, -above))
    return _weights(judged, desirable_weight, undesirable_weight) * loss


def apo_zero_unpaired(
    judged: Judged, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> jax.Array:
    """APO-zero on single answers (arXiv 2408.06266): 1 - σ(r) for desirable answers, σ(r) for others."""
    reward = beta * judged.answers.log_ratios
    loss = jnp.where(judged.desirable, 1 - jax.nn.sigmoid(reward), jax.nn.sigmoid(reward))
    return _weights(judged, desirable_weight, undesirable_weight) * loss


def bco(judged: Judged, *, beta: float = 0.1) -> jax.Array:
    """BCO (arXiv 2404.04656): -ln σ(±(r - δ)), δ halfway between the mean rewards of both kinds, a constant.

    δ is of the micro-batch, where the paper and TRL keep a running mean; with one kind alone it is that kind's mean.
    """
    reward = beta * judged.answers.log_ratios
    kinds = [judged.present * judged.desirable, judged.present * ~judged.desirable]
    there = [kind.any().astype(reward.dtype) for kind in kinds]
    means = [mean_of(reward, kind) for kind in kinds]
    shift = jax.lax.stop_gradient((means[0] + means[1]) / jnp.maximum(there[0] + there[1], 1))
    return -jax.nn.log_sigmoid(jnp.where(judged.desirable, reward - shift, shift - reward))


def _weights(judged: Judged, desirable: float, undesirable: float) -> jax.Array:
    return jnp.where(judged.desirable, desirable, undesirable)
