"""Losses of a student towards a teacher, token by token."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError, DistillConfig
from jaxrl.rl import divergence
from jaxrl.rl.methods import configured
from jaxrl.rl.tokens import MAX_LOG_RATIO, TokenLoss, Tokens


@flax.struct.dataclass
class Predictions:
    """What a student and its teacher predict: logits [..., V] of both. Gradients flow through the student's."""

    student: jax.Array
    teacher: jax.Array


def generalised_jsd(predictions: Predictions, *, beta: float = 0.5, temperature: float = 1.0) -> jax.Array:
    """Generalised Jensen-Shannon divergence of two distributions (GKD, arXiv 2306.13649, equation 1).

    With the mixture M = beta teacher + (1 - beta) student: beta KL(teacher || M) + (1 - beta) KL(student || M). At
    beta = 0 it is taken as KL(teacher || student), at beta = 1 as KL(student || teacher), the limits of its ratio to
    beta and to 1 - beta.

    Args:
        predictions: logits [..., V].
        beta: between 0 and 1.
        temperature: divides both.

    Returns:
        [...] nats, at least 0.

    Raises:
        ConfigError: ``beta`` outside its range.
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta={beta} of the generalised Jensen-Shannon divergence must lie between 0 and 1")
    own = jax.nn.log_softmax(predictions.student / temperature, axis=-1)
    other = jax.lax.stop_gradient(jax.nn.log_softmax(predictions.teacher / temperature, axis=-1))
    if beta == 0:
        return _kl(other, own)
    if beta == 1:
        return _kl(own, other)
    mixture = jnp.logaddexp(own + math.log1p(-beta), other + math.log(beta))
    return beta * _kl(other, mixture) + (1 - beta) * _kl(own, mixture)


@flax.struct.dataclass
class Taught:
    """Sampled tokens, and what the teacher thinks of them."""

    tokens: Tokens
    teacher_logprobs: jax.Array  # [B, T], of the sampled tokens; a constant


def on_policy(taught: Taught, *, drop: float = 0.2, ratio_penalty: float = 1e-3) -> TokenLoss:
    """On-policy distillation as a policy gradient: -ρ A + ratio_penalty (ln ρ)².

    A = teacher logprob - logprob, a constant. ρ is the ratio to the policy that sampled. A token whose probability fell
    by more than ``drop`` since it was sampled has no gradient from A (prime-rl). In expectation the gradient is that of
    KL(student || teacher).
    """
    tokens = taught.tokens
    log_ratio = jnp.clip(tokens.logprobs - tokens.behaviour_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantage = jax.lax.stop_gradient(taught.teacher_logprobs - tokens.logprobs)
    fall = jnp.exp(tokens.behaviour_logprobs) - jnp.exp(tokens.logprobs)
    keep = jax.lax.stop_gradient((fall <= drop).astype(log_ratio.dtype))
    loss = -keep * advantage * jnp.exp(log_ratio) + ratio_penalty * log_ratio**2
    return TokenLoss(loss, {"teacher_advantage": advantage, "distilled_fraction": keep})


def k2(taught: Taught) -> TokenLoss:
    """(logprob - teacher logprob)² / 2 of sampled tokens; in expectation the gradient of KL(student || teacher)."""
    return _estimate(taught, "k2")


def k3(taught: Taught) -> TokenLoss:
    """exp(-d) + d - 1 of d = logprob - teacher logprob; in expectation the gradient of KL(teacher || student)."""
    return _estimate(taught, "k3")


SAMPLED_LOSSES: Mapping[str, Callable[..., TokenLoss]] = {"on_policy": on_policy, "k2": k2, "k3": k3}
"""Those that see the sampled tokens alone, in ``Taught``."""

WHOLE_LOSSES: Mapping[str, Callable[..., jax.Array]] = {"generalised_jsd": generalised_jsd}
"""Those that see whole distributions."""


def distillation(config: DistillConfig) -> Callable[..., Any]:
    """The loss that ``loss`` and ``loss_settings`` name.

    Raises:
        ConfigError: see ``methods.configured``.
    """
    return configured("DistillConfig.loss", SAMPLED_LOSSES | WHOLE_LOSSES, config.loss, config.loss_settings)


def _estimate(taught: Taught, estimator: str) -> TokenLoss:
    tokens = taught.tokens
    return TokenLoss(divergence.kl(tokens.logprobs, taught.teacher_logprobs, tokens.mask, estimator), {})


def _kl(left: jax.Array, right: jax.Array) -> jax.Array:
    """KL of log-probabilities [..., V]; what ``left`` gives no chance adds nothing."""
    return jnp.where(jnp.isneginf(left), 0.0, jnp.exp(left) * (left - right)).sum(axis=-1)
