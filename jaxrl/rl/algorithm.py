"""From the names in ``AlgorithmConfig`` to functions, checked before anything is compiled."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.config import AlgorithmConfig, ConfigError
from jaxrl.rl.advantages import ADVANTAGES
from jaxrl.rl.methods import configured
from jaxrl.rl.outcomes import Outcomes
from jaxrl.rl.policy_losses import POLICY_LOSSES
from jaxrl.rl.tokens import TokenLoss, Tokens

PolicyLoss = Callable[[Tokens], TokenLoss]
Advantage = Callable[[Outcomes], Sequence[np.ndarray | float]]


def policy_loss(config: AlgorithmConfig) -> PolicyLoss:
    """The loss that ``loss`` and ``loss_settings`` name.

    Raises:
        ConfigError: see ``methods.configured``; or it does not give back one loss a token.
    """
    loss = configured("AlgorithmConfig.loss", POLICY_LOSSES, config.loss, config.loss_settings)
    floats, integers = (jax.ShapeDtypeStruct((2, 3), dtype) for dtype in (jnp.float32, jnp.int32))
    tokens = Tokens(floats, floats, floats, floats, floats, integers, floats)
    result = jax.eval_shape(loss, tokens)
    if not isinstance(result, TokenLoss) or result.loss.shape != tokens.mask.shape:
        raise ConfigError(
            f"AlgorithmConfig.loss={config.loss!r} gave {result} for tokens of shape {tokens.mask.shape}; "
            "it must give a jaxrl.rl.tokens.TokenLoss with a loss of that shape"
        )
    return loss


def advantage(config: AlgorithmConfig) -> Advantage:
    """The estimator that ``advantage`` and ``advantage_settings`` name.

    Raises:
        ConfigError: see ``methods.configured``; or it does not give back one entry a trajectory.
    """
    estimator = configured("AlgorithmConfig.advantage", ADVANTAGES, config.advantage, config.advantage_settings)
    masks = [np.ones(2), np.ones(3)]
    values = estimator(Outcomes(rewards=np.array([1.0, 0.0]), groups=np.zeros(2, int), masks=masks))
    shapes = [np.shape(value) for value in values]
    if len(shapes) != 2 or any(shape not in ((), mask.shape) for shape, mask in zip(shapes, masks, strict=True)):
        raise ConfigError(
            f"AlgorithmConfig.advantage={config.advantage!r} gave entries of shapes {shapes} for trajectories of 2 and "
            "3 tokens; it must give one entry a trajectory, a number or an array with one for each of its tokens"
        )
    return estimator


def check(config: AlgorithmConfig) -> None:
    """Refuse methods and settings that cannot be used.

    Raises:
        ConfigError: with the nearest valid name.
    """
    policy_loss(config)
    advantage(config)
