"""What the softmax of every attention has in common."""

import math

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Score of an invisible key; finite, so that the difference of two of them is 0 and not NaN."""


def soft_capped(scores: jax.Array, cap: float) -> jax.Array:
    """``cap * tanh(scores / cap)``, which stays within -cap ... cap (Gemma 2 report, section 2); 0 = no cap."""
    return cap * jnp.tanh(scores / cap) if cap else scores


def round_up(top: jax.Array) -> jax.Array:
    """The largest score, rounded up to a multiple of log 2.

    With it subtracted, the weights of an online softmax (which knows only the largest score so far) and of a plain one
    differ by a power of two. Rounding to bfloat16 commutes with that, so both give the same attention to float32
    rounding, and the log-probabilities of decoding and training stay together in bfloat16.
    """
    return jnp.ceil(top / math.log(2.0)) * math.log(2.0)
