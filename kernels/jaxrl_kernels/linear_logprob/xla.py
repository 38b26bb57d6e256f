"""A chunk of tokens at a time, in plain JAX, with the vocabulary whole or split over an axis of a mesh.

With p the probabilities, L the log-sum-exp and H the entropy of scaled logits s, the gradient for s is

    of the log-probability of y   onehot(y) - p
    of H                          -p (s - L + H)
    of L                          p

and a chunk's logits, formed again in the backward pass, need no more than L and H of the forward one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxrl_kernels.chunks import cut, joined
from jaxrl_kernels.linear_logprob.scores import linear_scores
from jaxrl_kernels.softmax import soft_capped

Results = tuple[jax.Array, jax.Array, jax.Array]
"""Log-probability, entropy and log-sum-exp, [T] each."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """As the contract names them."""

    soft_cap: float
    chunk: int
    vocab_axis: str | tuple[str, ...] | None

    def total(self, parts: jax.Array) -> jax.Array:
        """The sum over the parts of the vocabulary."""
        return parts if self.vocab_axis is None else jax.lax.psum(parts, self.vocab_axis)

    def largest(self, parts: jax.Array) -> jax.Array:
        """The largest of the parts of the vocabulary."""
        return parts if self.vocab_axis is None else jax.lax.pmax(parts, self.vocab_axis)

    def hits(self, targets: jax.Array, length: int) -> jax.Array:
        """[t, V] bool: which of this device's ``length`` rows of the vocabulary is the target."""
        first = 0 if self.vocab_axis is None else jax.lax.axis_index(self.vocab_axis) * length
        return targets[:, None] == first + jnp.arange(length, dtype=targets.dtype)


def scaled_scores(
    settings: Settings, hidden: jax.Array, head: tuple[jax.Array, ...], temperature: jax.Array
) -> jax.Array:
    return soft_capped(linear_scores(hidden, head), settings.soft_cap) / temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_logprob(
    settings: Settings, hidden: jax.Array, head: tuple[jax.Array, ...], targets: jax.Array, temperature: jax.Array
) -> Results:
    """As the contract says."""
    return _forward(settings, hidden, head, targets, temperature)[0]


def _forward(
    settings: Settings, hidden: jax.Array, head: tuple[jax.Array, ...], targets: jax.Array, temperature: jax.Array
) -> tuple[Results, tuple]:
    def score(_: None, piece: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, ...]]:
        hidden, targets = piece
        scaled = scaled_scores(settings, hidden, head, temperature)
        top = settings.largest(scaled.max(axis=-1))
        weights = jnp.exp(scaled - top[:, None])
        hit = jnp.where(settings.hits(targets, scaled.shape[1]), scaled, 0.0)
        sums = jnp.stack([part.sum(axis=-1) for part in (weights, weights * scaled, hit)])
        total, weighted, own = settings.total(sums)
        log_total = top + jnp.log(total)
        return None, (own - log_total, log_total, log_total - weighted / total)

    _, pieces = jax.lax.scan(score, None, (cut(hidden[None], settings.chunk), cut(targets[None], settings.chunk)))
    logprob, log_total, entropy = (joined(piece, 1, len(targets))[0] for piece in pieces)
    return (logprob, entropy, log_total), (hidden, head, targets, temperature, log_total, entropy)


def _backward(settings: Settings, saved: tuple, gradients: Results) -> tuple:
    hidden, head, targets, temperature, log_total, entropy = saved
    # Every device of the axis used the results, each for a share of what came of them.
    gradients = settings.total(jnp.stack(gradients))

    def differentiate(sums: tuple[jax.Array, ...], piece: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        hidden, targets, log_total, entropy, of_results = piece
        of_logprob, of_entropy, of_total = of_results.T[..., None]
        scaled, pull = jax.vjp(lambda hidden, head: scaled_scores(settings, hidden, head, temperature), hidden, head)
        logprobs = scaled - log_total[:, None]
        factor = of_logprob + of_entropy * (logprobs + entropy[:, None]) - of_total
        hit = jnp.where(settings.hits(targets, scaled.shape[1]), of_logprob, 0.0)
        hidden_gradient, head_gradient = pull(hit - jnp.exp(logprobs) * factor)
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, head_gradient), hidden_gradient

    pieces = [cut(x[None], settings.chunk) for x in (hidden, targets, log_total, entropy, gradients.T)]
    # Rounded to bfloat16 after every chunk, the sum of a thousand of them would be off by a sixth.
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
    sums, hidden_gradient = jax.lax.scan(differentiate, nothing, pieces)
    head_gradient = jax.tree.map(lambda total, x: total.astype(x.dtype), sums, head)
    return joined(hidden_gradient, 1, len(targets))[0], head_gradient, None, None


linear_logprob.defvjp(_forward, _backward)
