"""A loss that fades out as the ratio leaves 1, where others clip."""

import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError
from jaxrl.rl.tokens import Span, TokenLoss, Tokens


def sapo(
    tokens: Tokens,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    span: Span = "token",
) -> TokenLoss:
    """-A (4 / t) sigmoid(t (r - 1)): the gradient at r = 1 is that of the plain ratio, and falls off on both sides.

    SAPO (arXiv 2511.20347). The value at r = 1 is -2 A / t and not -A: compare gradients, not
    losses. Its paper, TRL and verl aggregate by ``sequence``.

    Args:
        tokens: see ``Tokens``.
        temperature_positive: t where A > 0.
        temperature_negative: t elsewhere; a larger one fades sooner.
        span: "geometric" takes the mean over the sequence as the ratio.

    Raises:
        ConfigError: a temperature that is not above 0.
    """
    if min(temperature_positive, temperature_negative) <= 0:
        raise ConfigError(
            f"sapo: temperature_positive={temperature_positive} and temperature_negative={temperature_negative} must "
            "be above 0"
        )
    temperature = jnp.where(tokens.advantages > 0, temperature_positive, temperature_negative)
    gate = jax.nn.sigmoid(temperature * (tokens.ratio_of(span) - 1))
    return TokenLoss(-tokens.advantages * 4 / temperature * gate, {"gate": 4 * gate * (1 - gate)})
