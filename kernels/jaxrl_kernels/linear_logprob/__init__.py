"""Log-probabilities of tokens from hidden states and the output matrix, without the logits of all tokens at once."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels.linear_logprob import reference, xla

Implementation = Literal["auto", "xla", "reference"]


class LinearLogprob(NamedTuple):
    """What distributions over the vocabulary say of given tokens, [T] float32 each, in nats.

    ``lse`` is the log-sum-exp of the scaled logits, so that a token's own one is ``logprob + lse``.
    """

    logprob: jax.Array
    entropy: jax.Array
    lse: jax.Array


def linear_logprob(
    hidden: jax.Array,
    head: tuple[jax.Array, ...],
    targets: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    soft_cap: float = 0.0,
    chunk: int = 1024,
    vocab_axis: str | tuple[str, ...] | None = None,
    implementation: Implementation = "auto",
) -> LinearLogprob:
    """Score ``targets`` under ``softmax(hidden @ matrix.T / temperature)``; softmax and sums in float32.

    All results can be differentiated for ``hidden`` and ``head``; the backward pass forms each chunk's logits again.
    Beside them it holds the gradient of ``head`` in float32, in which the chunks' parts are added up.

    Args:
        hidden: [T, D].
        head: (matrix [V, D],), or with low-rank factors [D, r] and [r, V] of what is added to its transpose.
        targets: [T] int32, each in 0 ... V - 1; what another one gives is not defined.
        temperature: logits are divided by it; > 0. It is not differentiated.
        soft_cap: logits become ``soft_cap * tanh(logit / soft_cap)`` before that; 0 = they stay.
        chunk: tokens whose logits exist at once.
        vocab_axis: axis of the mesh, or axes, that split the vocabulary, under ``jax.shard_map`` with
            ``check_vma=False``: ``matrix`` and the last factor are then this device's part, in order, ``hidden`` and
            ``targets`` are the same on all devices of the axis, and so are the results.
        implementation: "xla" is plain JAX; "reference" holds all logits and takes no ``vocab_axis``.

    Raises:
        ValueError: shapes do not fit together, or the implementation is unknown or cannot split the vocabulary.
    """
    if not isinstance(head, tuple) or not head:
        raise ValueError(f"head is a tuple (matrix,) or (matrix, factor, factor), not {type(head).__name__}")
    if chunk < 1 or (isinstance(temperature, int | float) and temperature <= 0):
        raise ValueError(f"chunk={chunk} must be at least 1, and temperature={temperature} above 0")
    matrix, *pair = head
    fit = hidden.ndim == matrix.ndim == 2 and matrix.shape[1] == hidden.shape[1] and targets.shape == hidden.shape[:1]
    if not fit or not len(hidden) or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"hidden {hidden.shape} [T, D] with T > 0 needs a matrix [V, D] and integer targets [T]; "
            f"got {matrix.shape}, {targets.dtype} {targets.shape}"
        )
    wanted = [(matrix.shape[1], pair[0].shape[-1]), (pair[0].shape[-1], matrix.shape[0])] if pair else []
    if [factor.shape for factor in pair] != wanted:
        raise ValueError(f"matrix {matrix.shape} [V, D] needs factors [D, r] and [r, V]; got {[x.shape for x in pair]}")
    temperature = jnp.asarray(temperature, jnp.float32)
    match implementation:
        case "auto" | "xla":
            settings = xla.Settings(soft_cap, chunk, vocab_axis)
            return LinearLogprob(*xla.linear_logprob(settings, hidden, head, targets, temperature))
        case "reference" if vocab_axis is None:
            return LinearLogprob(*reference.linear_logprob(hidden, head, targets, temperature, soft_cap))
    raise ValueError(
        f"implementation={implementation!r} with vocab_axis={vocab_axis!r} cannot be had; choose auto or xla, or "
        "reference without an axis"
    )
