"""Policy losses by name: each a function of ``Tokens`` whose keyword arguments are its settings."""

from collections.abc import Callable, Mapping

from jaxrl.rl.policy_losses.clipped import ppo_clip
from jaxrl.rl.tokens import TokenLoss

POLICY_LOSSES: Mapping[str, Callable[..., TokenLoss]] = {
    "ppo_clip": ppo_clip,
}
