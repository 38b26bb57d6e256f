"""Losses of a student towards a teacher, token by token."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError, DistillConfig
from jaxrl.rl import divergence, sequences
from jaxrl.rl.methods import configured, not_negative
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
    divergences: jax.Array | None = None  # [B, T] KL(student || teacher) of every token, for ``DECOMPOSED_LOSSES``


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
    sampled. MiniLLM (arXiv 2306.08543, section 2.2), whose sampling from a mixture with the teacher is not here; its
    exact term of the single step is in ``minillm_single_step``. With ``discount`` 1 and without ``length_normalised``
    the gradient is in expectation that of the KL(student || teacher) of whole trajectories, which ``on_policy`` takes
    token by token.

    Args:
        taught: sampled tokens.
        discount: of one token.
        length_normalised: divide by Σ discount^k over the same tokens, so that early tokens do not weigh more.
    """
    advantage, returns, counts = _still_to_come(taught, discount)
    if length_normalised:
        returns /= jnp.maximum(counts, 1.0)
    return TokenLoss(-returns * _ratio(taught.tokens), {"teacher_advantage": advantage})


def minillm_single_step(taught: Taught, *, discount: float = 1.0, length_normalised: bool = True) -> TokenLoss:
    """As ``minillm``, but a token's own term is exact: KL(student || teacher) - ρ Σ_{k ≥ 1} discount^k d_{t + k}.

    MiniLLM's single-step decomposition (arXiv 2306.08543, equation 3): the KL over the whole vocabulary in the place of
    the sampled d_t, which has less variance; it takes a second comparison of student and teacher. TRL's
    ``single_step_decomposition`` adds the KL and leaves d_t in the sum, so that it counts twice.

    Args:
        taught: sampled tokens with ``divergences``.
        discount: of one token.
        length_normalised: divide the sum by Σ_{k ≥ 0} discount^k, as ``minillm`` does.
    """
    advantage, returns, counts = _still_to_come(taught, discount)
    later = returns - advantage
    if length_normalised:
        later /= jnp.maximum(counts, 1.0)
    loss = taught.divergences - later * _ratio(taught.tokens)
    return TokenLoss(loss, {"teacher_advantage": advantage, "single_step": taught.divergences})


def importance_weighted(taught: Taught, *, gamma: float = 0.5) -> TokenLoss:
    """On-policy distillation in which a token counts by how little went astray before it: -ρ w d.

    d = teacher logprob - behaviour logprob; w = 1 + gamma (1 - Σ |d| of the tokens before / Σ |d| of all), of the
    sampled tokens of the trajectory: 1 + gamma for the first and 1 behind the last. IW-OPD (arXiv 2606.22600, algorithm
    1; TRL's ``iw_opd``): far from where the teacher would be, what it thinks means less.

    Args:
        taught: sampled tokens.
        gamma: how much more the first token counts than one after all that went astray.
    """
    not_negative("importance_weighted", gamma=gamma)
    tokens = taught.tokens
    advantage = (taught.teacher_logprobs - tokens.behaviour_logprobs) * tokens.mask
    astray = jnp.abs(advantage)
    here_and_later = sequences.still_to_come(astray, tokens.mask, tokens.segment_ids, 1.0)
    whole = jnp.maximum(tokens.over_sequence(astray), 1e-8)
    weight = jax.lax.stop_gradient(1 + gamma * jnp.clip(here_and_later / whole, 0.0, 1.0))
    return TokenLoss(-weight * advantage * _ratio(tokens), {"teacher_advantage": advantage, "prefix_weight": weight})


def k2(taught: Taught) -> TokenLoss:
    """(logprob - teacher logprob)² / 2 of sampled tokens; in expectation the gradient of KL(student || teacher)."""
    return _estimate(taught, "k2")


def k3(taught: Taught) -> TokenLoss:
    """exp(-d) + d - 1 of d = logprob - teacher logprob; in expectation the gradient of KL(teacher || student)."""
    return _estimate(taught, "k3")


SAMPLED_LOSSES: Mapping[str, Callable[..., TokenLoss]] = {
    "on_policy": on_policy,
    "importance_weighted": importance_weighted,
    "minillm": minillm,
    "k2": k2,
    "k3": k3,
}
"""Those that see the sampled tokens alone, in ``Taught``."""

DECOMPOSED_LOSSES: Mapping[str, Callable[..., TokenLoss]] = {"minillm_single_step": minillm_single_step}
"""Those that see the sampled tokens and, of every token, the KL of whole distributions."""

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
    table = SAMPLED_LOSSES | DECOMPOSED_LOSSES | WHOLE_LOSSES
    return configured("DistillConfig.loss", table, config.loss, config.loss_settings)


def _estimate(taught: Taught, estimator: str) -> TokenLoss:
    tokens = taught.tokens
    return TokenLoss(divergence.kl(tokens.logprobs, taught.teacher_logprobs, tokens.mask, estimator), {})


def _still_to_come(taught: Taught, discount: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, T] of the sampled tokens: teacher logprob - logprob, the discounted sum of it from a token on, and of 1."""
    tokens = taught.tokens
    advantage = jax.lax.stop_gradient(taught.teacher_logprobs - tokens.logprobs) * tokens.mask
    sums = [
        sequences.still_to_come(values, tokens.mask, tokens.segment_ids, discount)
        for values in (advantage, tokens.mask)
    ]
    return advantage, *sums


def _ratio(tokens: Tokens) -> jax.Array:
    """[B, T] of the policy to the one that sampled."""
    return jnp.exp(jnp.clip(tokens.logprobs - tokens.behaviour_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _kl(left: jax.Array, right: jax.Array) -> jax.Array:
    """KL of log-probabilities [..., V]; what ``left`` gives no chance adds nothing."""
    return jnp.where(jnp.isneginf(left), 0.0, jnp.exp(left) * (left - right)).sum(axis=-1)
