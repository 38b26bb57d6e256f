"""What a policy loss sees: one value for every token of packed rows, made safe once.

Everything but the log-probabilities under the policy being trained is a constant here, and every value of a token that
the policy did not sample is 0, whatever stood there, NaN included: a zero weight times NaN is NaN. So a loss is its
formula and nothing else, and a masked token has exactly zero gradient in all of them.
"""

from typing import Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.rl import sequences

Span = Literal["token", "geometric", "product"]
"""Over what a ratio is taken: the token, the geometric mean over its trajectory, or the product over it. Elsewhere
"sequence" means the second (TRL's losses, AReaL) or the third (verl, TRL's correction of the sampler)."""

MAX_LOG_RATIO = 20.0  # keeps exp finite; beyond it the gradient of a token is zero


@flax.struct.dataclass
class Tokens:
    """The sampled tokens of packed rows. Log-probabilities are in nats, of the temperature-scaled distribution.

    Three policies are told apart: the one being trained, the proximal one that the ratio of a clipped loss is taken
    against (the trainer's weights when the step began), and the behaviour policy that sampled the token.
    """

    logprobs: jax.Array  # [B, T] under the policy being trained; gradients flow through these only
    proximal_logprobs: jax.Array  # [B, T]
    behaviour_logprobs: jax.Array  # [B, T]
    advantages: jax.Array  # [B, T]
    mask: jax.Array  # [B, T] float, 1 where the policy sampled the token
    segment_ids: jax.Array  # [B, T] int32, 0 = padding; one segment is one trajectory
    entropy: jax.Array  # [B, T] nats, of the distribution the token was drawn from; a constant
    recorded: jax.Array  # [B, T] float, the mask before tokens were left out; denominators count these

    @property
    def log_ratio(self) -> jax.Array:
        """[B, T] logprob - proximal logprob, clipped to ±20."""
        return bounded(self.logprobs - self.proximal_logprobs)

    @property
    def ratio(self) -> jax.Array:
        """[B, T] exp of ``log_ratio``; 1 where nothing was sampled."""
        return jnp.exp(self.log_ratio)

    @property
    def behaviour_ratio(self) -> jax.Array:
        """[B, T] exp(logprob - behaviour logprob), the exponent clipped to ±20."""
        return jnp.exp(bounded(self.logprobs - self.behaviour_logprobs))

    @property
    def mismatch(self) -> jax.Array:
        """[B, T] proximal logprob - behaviour logprob, clipped to ±20. A constant."""
        return bounded(self.proximal_logprobs - self.behaviour_logprobs)

    def only(self, keep: jax.Array) -> "Tokens":
        """The record without the tokens where ``keep`` [B, T] is 0, as if the policy had not sampled them."""
        return sampled(
            self.mask * keep,
            self.logprobs,
            proximal_logprobs=self.proximal_logprobs,
            behaviour_logprobs=self.behaviour_logprobs,
            advantages=self.advantages,
            segment_ids=self.segment_ids,
            entropy=self.entropy,
        ).replace(recorded=self.recorded)

    @property
    def recorded_lengths(self) -> jax.Array:
        """[B, T] sampled tokens of the trajectory a token belongs to, those left out among them, at least 1."""
        return sequences.length(self.recorded, self.segment_ids)

    def over_sequence(self, values: jax.Array) -> jax.Array:
        """[B, T] the sum of ``values`` over the sampled tokens of the trajectory, at every one of its tokens."""
        return sequences.total(values * self.mask, self.segment_ids)

    def mean_over_sequence(self, values: jax.Array) -> jax.Array:
        """[B, T] the mean of ``values`` over the sampled tokens of the trajectory, at every one of its tokens."""
        return sequences.mean(values, self.mask, self.segment_ids)

    def spanned(self, log_ratios: jax.Array, span: Span) -> jax.Array:
        """[B, T] logarithms of ratios of tokens, or their mean or sum over the trajectory; clipped to ±20."""
        if span == "geometric":
            log_ratios = self.mean_over_sequence(log_ratios)
        elif span == "product":
            log_ratios = self.over_sequence(log_ratios)
        return bounded(log_ratios)

    def ratio_of(self, span: Span) -> jax.Array:
        """[B, T] exp of logprob - proximal logprob, taken over ``span``."""
        return jnp.exp(self.spanned(self.logprobs - self.proximal_logprobs, span))


def abstract_tokens() -> Tokens:
    """Shapes and types of a record of 2 rows of 3 tokens, to try out what is made of one."""
    floats, integers = (jax.ShapeDtypeStruct((2, 3), dtype) for dtype in (jnp.float32, jnp.int32))
    return Tokens(floats, floats, floats, floats, floats, integers, floats, floats)


def bounded(log_ratio: jax.Array) -> jax.Array:
    """The logarithm of a ratio, clipped to ±20; no gradient flows beyond."""
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


class TokenLoss(NamedTuple):
    """What a policy loss gives back.

    Attributes:
        loss: [B, T], before aggregation; it is weighted and summed by the trainer.
        metrics: by name, [B, T]; their means over the tokens it was given are logged. The names must not depend on
            values.
    """

    loss: jax.Array
    metrics: dict[str, jax.Array]


def sampled(
    mask: jax.Array,
    logprobs: jax.Array,
    *,
    proximal_logprobs: jax.Array,
    behaviour_logprobs: jax.Array,
    advantages: jax.Array,
    segment_ids: jax.Array,
    entropy: jax.Array,
) -> Tokens:
    """The record, with 0 in place of what was not sampled, and no gradient but through ``logprobs``. All [B, T]."""
    here = mask > 0

    def constant(values: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(jnp.where(here, values, 0.0))

    return Tokens(
        logprobs=jnp.where(here, logprobs, 0.0),
        proximal_logprobs=constant(proximal_logprobs),
        behaviour_logprobs=constant(behaviour_logprobs),
        advantages=constant(advantages),
        mask=here.astype(logprobs.dtype),
        segment_ids=segment_ids,
        entropy=constant(entropy),
        recorded=here.astype(logprobs.dtype),
    )
