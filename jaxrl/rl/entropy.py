"""What the entropy of a token's distribution decides: which tokens are trained on, and how much randomness is paid."""

import jax

from jaxrl.rl import order
from jaxrl.rl.tokens import Tokens


def most_uncertain(tokens: Tokens, share: float) -> jax.Array:
    """[B, T] float, 1 on this share of the sampled tokens: those of highest entropy, 0 elsewhere.

    "Beyond the 80/20 rule" (arXiv 2506.01939) trains on the most uncertain fifth alone. The denominator stays that of
    all tokens. The threshold is the quantile over the micro-batch, in proportion between two tokens (TRL's
    ``top_entropy_quantile``).

    Args:
        tokens: see ``Tokens``.
        share: above 0; 1 keeps all.
    """
    if share >= 1:
        return tokens.mask
    (threshold,) = order.quantiles(tokens.entropy, tokens.mask > 0, (1 - share,))
    return tokens.mask * (tokens.entropy >= threshold)


def adapted(coefficient: float, entropy: float, *, target: float, step: float, largest: float) -> float:
    """The weight of the entropy bonus after an update that found this entropy.

    Up by ``step`` where the entropy is at most ``target``, down by it otherwise, between 0 and ``largest``
    (Skywork-OR1, arXiv 2505.22312; TRL's ``use_adaptive_entropy``).

    Args:
        coefficient: the weight so far.
        entropy: nats, mean over the sampled tokens.
        target: nats, below which it should not fall. It depends on the task: TRL's 0.2 is close to collapse.
        step: how far the weight moves.
        largest: which it never exceeds.
    """
    moved = coefficient + (step if entropy <= target else -step)
    return min(max(moved, 0.0), largest)
