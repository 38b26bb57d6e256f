"""Losses of a student towards a teacher, token by token."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError, DistillConfig
from jaxrl.rl import divergence, sequences
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


def forward_kl_top(predictions: Predictions, *, k: int = 32, temperature: float = 1.0) -> jax.Array:
    """Σ p_T (ln p_T - ln p) over the ``k`` tokens that the teacher thinks likeliest, not normalised anew.

    What verl distils from, whose teacher sends no more than these. It may be below 0; with ``k`` the vocabulary it is
    KL(teacher || student), the ``generalised_jsd`` of beta 0.

    Args:
        predictions: logits [..., V].
        k: at least 1; more than V means V.
        temperature: divides both.

    Raises:
        ConfigError: ``k`` below 1.
    """
    if k < 1:
        raise ConfigError(f"forward_kl_top: k={k} must be at least 1")
    other = jax.lax.stop_gradient(jax.nn.log_softmax(predictions.teacher / temperature, axis=-1))
    likeliest, places = jax.lax.top_k(other, min(k, other.shape[-1]))
    own = jax.nn.log_softmax(predictions.student / temperature, axis=-1)
    return _kl(likeliest, jnp.take_along_axis(own, places, axis=-1))


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


def minillm(taught: Taught, *, discount: float = 1.0, length_normalised: bool = True) -> TokenLoss:
    """On-policy distillation that credits a token with what comes after it: -ρ Σ_{k ≥ 0} discount^k d_{t + k}.

    d = teacher logprob - logprob, a constant, of the sampled tokens of the trajectory; ρ the ratio to the policy that
    sampled. MiniLLM (arXiv 2306.08543, section 2.2), whose sampling from a mixture with the teacher and whose exact
    term of the single step are not here. With ``discount`` 1 and without ``length_normalised`` the gradient is in
    expectation that of the KL(student || teacher) of whole trajectories, which ``on_policy`` takes token by token.

    Args:
        taught: sampled tokens.
        discount: of one token.
        length_normalised: divide by Σ discount^k over the same tokens, so that early tokens do not weigh more.
    """
    tokens = taught.tokens
    log_ratio = jnp.clip(tokens.logprobs - tokens.behaviour_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantage = jax.lax.stop_gradient(taught.teacher_logprobs - tokens.logprobs) * tokens.mask
    returns = sequences.still_to_come(advantage, tokens.mask, tokens.segment_ids, discount)
    if length_normalised:
        counts = sequences.still_to_come(tokens.mask, tokens.mask, tokens.segment_ids, discount)
        returns /= jnp.maximum(counts, 1.0)
    return TokenLoss(-returns * jnp.exp(log_ratio), {"teacher_advantage": advantage})


def k2(taught: Taught) -> TokenLoss:
    """(logprob - teacher logprob)² / 2 of sampled tokens; in expectation the gradient of KL(student || teacher)."""
    return _estimate(taught, "k2")


def k3(taught: Taught) -> TokenLoss:
    """exp(-d) + d - 1 of d = logprob - teacher logprob; in expectation the gradient of KL(teacher || student)."""
    return _estimate(taught, "k3")


SAMPLED_LOSSES: Mapping[str, Callable[..., TokenLoss]] = {
    "on_policy": on_policy,
    "minillm": minillm,
    "k2": k2,
    "k3": k3,
}
"""Those that see the sampled tokens alone, in ``Taught``."""

WHOLE_LOSSES: Mapping[str, Callable[..., jax.Array]] = {
    "generalised_jsd": generalised_jsd,
    "forward_kl_top": forward_kl_top,
}
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
