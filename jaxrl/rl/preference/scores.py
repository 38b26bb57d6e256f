"""Losses of reward models, which give every answer, or every step of one, a number. Each [N], before the mean."""

from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Scores:
    """N pairs of answers as a reward model scores them, of which some may be empty places."""

    chosen: jax.Array  # [N]
    rejected: jax.Array  # [N]
    present: jax.Array  # [N] float32, 1 where there is a pair


@flax.struct.dataclass
class Steps:
    """N steps of answers as a process reward model scores them, of which some may be empty places."""

    logits: jax.Array  # [N]
    right: jax.Array  # [N] bool
    present: jax.Array  # [N] float32, 1 where a step ends


def bradley_terry(scores: Scores, *, centring: float = 0.0) -> jax.Array:
    """-ln σ(chosen - rejected) + centring (chosen + rejected)².

    The second term (arXiv 2312.09244; 0.01 in TRL's recipes) keeps scores around 0, where the first leaves them free.
    """
    return -jax.nn.log_sigmoid(scores.chosen - scores.rejected) + centring * (scores.chosen + scores.rejected) ** 2


def step_cross_entropy(steps: Steps, *, wrong_weight: float = 1.0) -> jax.Array:
    """-ln σ(logit) of right steps, -ln σ(-logit) of wrong ones (arXiv 2305.20050; by lines of code: PRLCoder).

    Args:
        wrong_weight: how much more a wrong step counts, where they are few.
    """
    right = -jax.nn.log_sigmoid(steps.logits)
    return jnp.where(steps.right, right, wrong_weight * (right + steps.logits))  # ln σ(-x) = ln σ(x) - x


REWARD_LOSSES: Mapping[str, Callable[..., jax.Array]] = {"bradley_terry": bradley_terry}
PROCESS_LOSSES: Mapping[str, Callable[..., jax.Array]] = {"step_cross_entropy": step_cross_entropy}
