"""Losses that fit what the policy thinks of a whole sequence to its reward.

``gvpo`` and ``flowrl`` compare the sequences of a group with each other, ``a_star_po`` with the reference. Their
targets are completed on the host, before an update and over all of it, by the functions in ``jaxrl.rl.targets``, and
stand in the place of advantages.
"""

import jax
import jax.numpy as jnp

from jaxrl.rl.methods import not_negative
from jaxrl.rl.tokens import TokenLoss, Tokens, bounded


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


def gvpo(tokens: Tokens, *, beta: float = 0.1) -> TokenLoss:
    """½ (beta · sum of logprob - proximal logprob - target)² over the sequence.

    GVPO (arXiv 2504.19599, equation 9): the target is the advantage and the group's mean of the first term, so that the
    squares are of differences within the group and the partition function of the optimal policy cancels. Take
    ``dr_grpo`` for the advantage and aggregate by ``sequence``; verl's recipe divides by n - 1 of a group, not by n.

    Args:
        tokens: see ``Tokens``; in ``advantages`` stand the targets, the same at all tokens of a sequence.
        beta: how dearly a nat is paid for; the KL to the proximal policy that the optimum is regularised by.
    """
    not_negative("gvpo", beta=beta)
    log_ratio = tokens.over_sequence(tokens.logprobs - tokens.proximal_logprobs)
    residual = beta * log_ratio - tokens.mean_over_sequence(tokens.advantages)
    return TokenLoss(0.5 * residual**2, {"sequence_log_ratio": log_ratio})


def flowrl(tokens: Tokens, *, beta: float = 15.0, cap: float = 10.0) -> TokenLoss:
    """sg(min(Π r, cap)) (mean logprob - target)² over the sequence.

    FlowRL (arXiv 2509.15207, equation 6): the target is beta · advantage + mean reference logprob - ln Z, so that the
    policy comes to write in proportion to exp of the reward. Where its release trains a network for ln Z, here it is
    what makes the residuals of a group have mean 0 (VarGrad, arXiv 2010.10436). Aggregate by ``sequence``.

    Args:
        tokens: see ``Tokens``; in ``advantages`` stand the targets, the same at all tokens of a sequence.
        beta: of the advantage, per token of the sequence.
        cap: largest weight of a sequence that grew likelier since it was sampled.
    """
    not_negative("flowrl", beta=beta, cap=cap)
    weight = jnp.minimum(jnp.exp(bounded(tokens.over_sequence(tokens.logprobs - tokens.proximal_logprobs))), cap)
    residual = tokens.mean_over_sequence(tokens.logprobs) - tokens.mean_over_sequence(tokens.advantages)
    return TokenLoss(jax.lax.stop_gradient(weight) * residual**2, {"sequence_weight": weight})


def a_star_po(tokens: Tokens, *, beta: float = 1e-3) -> TokenLoss:
    """(beta · sum of logprob - target)² over the sequence.

    A*-PO (arXiv 2505.20686, equation 3; TRL's ``A2PO``): the target is the advantage and beta · the sum of the
    reference's logprob, so that beta · the log-ratio to the reference comes to be the advantage, as it is for the best
    policy near the reference. Take ``optimal_value`` for the advantage and aggregate by ``sequence``.

    Args:
        tokens: see ``Tokens``; in ``advantages`` stand the targets, the same at all tokens of a sequence.
        beta: β₂ of the paper; 1e-3 in TRL.
    """
    not_negative("a_star_po", beta=beta)
    residual = beta * tokens.over_sequence(tokens.logprobs) - tokens.mean_over_sequence(tokens.advantages)
    return TokenLoss(residual**2, {"residual": residual})
