"""What a token that somebody else wrote contributes: losses of its log-probability, and the weight of such tokens
beside reinforcement."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError, MixConfig
from jaxrl.rl.methods import configured
from jaxrl.rl.trial import described, tried

SupervisedLoss = Callable[[jax.Array], jax.Array]


def nll(logprobs: jax.Array) -> jax.Array:
    """Negative log-likelihood: -ln p of every token. ``logprobs`` and the result have any shape, in nats."""
    return -logprobs


def dft(logprobs: jax.Array) -> jax.Array:
    """Dynamic fine-tuning: -sg(p) ln p (arXiv 2508.05629); DataMind and CHORD call it IS.

    The weight p takes back the 1/p that hides in the gradient of -ln p, so that unlikely tokens are not learned by
    heart.
    """
    return -jax.lax.stop_gradient(jnp.exp(logprobs)) * logprobs


def chord_phi(logprobs: jax.Array) -> jax.Array:
    """-sg(p (1 - p)) ln p (CHORD, arXiv 2508.11408).

    Neither what the policy knows already nor what is foreign to it counts for much.
    """
    probability = jax.lax.stop_gradient(jnp.exp(logprobs))
    return -probability * (1 - probability) * logprobs


SUPERVISED_LOSSES: Mapping[str, Callable[..., jax.Array]] = {"nll": nll, "dft": dft, "chord_phi": chord_phi}


def supervised_loss(key: str, name: str, settings: Mapping[str, Any]) -> SupervisedLoss:
    """The loss that a section names.

    Args:
        key: the field that names it, "SftConfig.loss" or "MixConfig.loss".

    Raises:
        ConfigError: see ``methods.configured``; or it does not give back one loss a token.
    """
    loss = configured(key, SUPERVISED_LOSSES, name, settings)
    logprobs = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    result = tried(key, name, jax.eval_shape, loss, logprobs)
    if not isinstance(result, jax.ShapeDtypeStruct) or result.shape != logprobs.shape:
        raise ConfigError(
            f"{key}={name!r} gave {described(result)} for log-probabilities of shape {logprobs.shape}; "
            "it must give a loss of that shape"
        )
    return loss


def demonstration_weight(mix: MixConfig, step: int) -> float:
    """μ of CHORD-μ (arXiv 2508.11408): the loss of a step is (1 - μ) policy loss + μ supervised loss.

    It rises from 0 to ``peak`` over ``warmup_steps``, falls along half a cosine to ``valley`` over ``decay_steps``, and
    stays there (the schedule of DataMind, whose defaults are ours). ``step`` counts from 0.
    """
    if step < mix.warmup_steps:
        return mix.peak * step / mix.warmup_steps
    done = min((step - mix.warmup_steps) / mix.decay_steps, 1.0) if mix.decay_steps else 1.0
    return mix.valley + (mix.peak - mix.valley) * 0.5 * (1 + math.cos(math.pi * done))
