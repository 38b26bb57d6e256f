"""Losses that fit the log-ratio of a whole sequence to its reward."""

from jaxrl.rl.methods import not_negative
from jaxrl.rl.tokens import TokenLoss, Tokens


def sppo(tokens: Tokens, *, eta: float = 1.0) -> TokenLoss:
    """(sum of logprob - proximal logprob - eta A)^2 over the sequence.

    Self-play preference optimisation (SPPO, arXiv 2405.00675) with the advantage as the score of a sequence; verl's
    recipe. Aggregate by ``sequence``: the same value stands at every token.

    Args:
        tokens: see ``Tokens``.
        eta: how far an advantage of 1 should move the log-ratio of the sequence, nats.
    """
    not_negative("sppo", eta=eta)
    log_ratio = tokens.over_sequence(tokens.logprobs - tokens.proximal_logprobs)
    residual = log_ratio - eta * tokens.mean_over_sequence(tokens.advantages)
    return TokenLoss(residual**2, {"sequence_log_ratio": log_ratio})
