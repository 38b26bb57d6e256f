"""What a preference loss sees: whole answers, as sums over their tokens.

Sums are taken pairwise, in float32: an answer of thousands of tokens has a log-probability of thousands of nats, of
which a log-ratio is a small difference, and summing in order loses it (its sign, beyond 2,000 tokens, by a comment in
AReaL). Where there is a reference the difference is taken token by token, before the sum.
"""

import math
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

MAX_EXPONENT = 40.0  # keeps exp and its square finite in float32; beyond it a term has no gradient

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@flax.struct.dataclass
class Answers:
    """N answers, one of each pair. All fields [N] float32, in nats."""

    logprobs: jax.Array  # summed over the answer's tokens, under the policy being trained; gradients flow through these
    log_ratios: jax.Array  # of the policy to the reference, summed; equal to ``logprobs`` without a reference
    lengths: jax.Array  # tokens, at least 1

    def score(self, divergence: Divergence, alpha: float) -> jax.Array:
        """The derivative of an f-divergence at the ratio u, 0 where the policy is the reference (f-DPO, arXiv
        2309.16240, table 1, but for constants).

        ``reverse_kl``: ln u; ``forward_kl``: 1 - 1 / u; ``js_divergence``: ln(2 u / (1 + u)); ``alpha_divergence``:
        (u^(alpha - 1) - 1) / (alpha - 1), as in TRL.
        """
        if divergence == "forward_kl":
            return -jnp.expm1(jnp.minimum(-self.log_ratios, MAX_EXPONENT))
        if divergence == "js_divergence":
            return jax.nn.log_sigmoid(self.log_ratios) + math.log(2)
        if divergence == "alpha_divergence" and abs(alpha - 1) > 1e-6:
            return jnp.expm1(jnp.minimum((alpha - 1) * self.log_ratios, MAX_EXPONENT)) / (alpha - 1)
        return self.log_ratios


@flax.struct.dataclass
class Pairs:
    """N pairs, of which some may be empty places."""

    chosen: Answers
    rejected: Answers
    present: jax.Array  # [N] float32, 1 where there is a pair

    @property
    def margin(self) -> jax.Array:
        """[N] log-ratio of the chosen answer above that of the rejected one."""
        return self.chosen.log_ratios - self.rejected.log_ratios


@flax.struct.dataclass
class Judged:
    """N answers that were judged by themselves, of which some may be empty places."""

    answers: Answers
    desirable: jax.Array  # [N] bool
    unrelated: jax.Array  # [N] log-ratios of answers to other prompts, given this one's prompt
    present: jax.Array  # [N] float32, 1 where there is an answer


def mean_of(values: jax.Array, present: jax.Array) -> jax.Array:
    """Mean of [N] values over what is present; 0 of nothing."""
    return jnp.where(present > 0, values, 0.0).sum() / jnp.maximum(present.sum(), 1)


def pairwise_sum(values: jax.Array) -> jax.Array:
    """The sum over the last axis, halves of halves, so that the error grows with the logarithm of its length."""
    while values.shape[-1] > 1:
        padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)])
        values = padded[..., 0::2] + padded[..., 1::2]
    return values[..., 0]


def segment_sums(values: jax.Array, segment_ids: jax.Array, segments: int) -> jax.Array:
    """Sums of [B, T] values over each of the first ``segments`` segments of a row: [B, segments]."""
    own = segment_ids[:, None, :] == jnp.arange(1, segments + 1, dtype=segment_ids.dtype)[None, :, None]
    return pairwise_sum(jnp.where(own, values[:, None, :], 0.0))


def without_length(mask: jax.Array, segment_ids: jax.Array, segments: int, alpha: float) -> jax.Array:
    """Weights [B, T] of tokens for LD-DPO (arXiv 2409.06411): 1 up to the length of the shorter answer of the pair, and
    ``alpha`` beyond it.

    Args:
        mask: [B, T], 1 on the tokens of answers.
        segment_ids: [B, T]; segments 2i - 1 and 2i of a row are the answers of a pair.
        segments: in a row at most, even.
        alpha: 1 is plain DPO.
    """
    lengths = segment_sums(mask, segment_ids, segments)
    shorter = jnp.minimum(lengths[:, 0::2], lengths[:, 1::2]).repeat(2, axis=1)
    one_hot = segment_ids[:, :, None] == jnp.arange(1, segments + 1, dtype=segment_ids.dtype)
    before = jnp.cumsum(mask, axis=1) - mask  # tokens of answers that precede one in its row
    earlier = jnp.cumsum(lengths, axis=1) - lengths  # of them in earlier segments
    place = before - jnp.where(one_hot, earlier[:, None, :], 0.0).sum(axis=2)
    within = place < jnp.where(one_hot, shorter[:, None, :], 0.0).sum(axis=2)
    return jnp.where(within, 1.0, alpha) * mask


def agreement(
    logprobs: jax.Array, log_square_sums: jax.Array, mask: jax.Array, segment_ids: jax.Array, segments: int
) -> jax.Array:
    """How much on-policy each answer is (WPO, arXiv 2406.11827): exp of the mean of ln p - ln Σ p². No gradient flows.

    Args:
        logprobs: [B, T] of the policy being trained.
        log_square_sums: [B, T], logarithm of the sum of squared probabilities over the vocabulary.

    Returns:
        [B, segments]. The weight of a pair is the product of its two; as in TRL it may exceed 1.
    """
    excess = jax.lax.stop_gradient(jnp.where(mask > 0, logprobs - log_square_sums, 0.0))
    lengths = jnp.maximum(segment_sums(mask, segment_ids, segments), 1)
    return jnp.exp(segment_sums(excess, segment_ids, segments) / lengths)
