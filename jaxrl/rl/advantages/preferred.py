"""Preferences among the trajectories of a group, as advantages: learning from pairs that the policy has just played."""

import numpy as np
import scipy.special

from jaxrl.config import ConfigError
from jaxrl.rl.outcomes import Outcomes

MAX_LOG_RATIO = 20.0
"""Nats beyond which a log-ratio is cut before its exponential is taken."""


def online_dpo(outcomes: Outcomes, *, beta: float = 0.1) -> np.ndarray:
    """The slope of DPO's loss by the log-probability of a trajectory, over all pairs of its group with other rewards.

    Online DPO (arXiv 2402.04792): of a pair with h = beta (log-ratio of the better one to the reference - that of the
    other), beta σ(-h) for the better one and its negative for the other; the mean over the pairs of the group, times
    its trajectories. With ``loss = "reinforce"`` aggregated by ``sequence_sum`` and one update a step the gradient is
    that of the mean over groups of -ln σ(h), weighted by their sizes. TRL takes one pair of two trajectories.

    Args:
        outcomes: ``reference_ratios``.
        beta: how dearly the KL to the reference is paid for.

    Returns:
        [N] float32; 0 in a group of equal rewards.

    Raises:
        ConfigError: there are no ratios to a reference.
    """
    ratios = _ratios(outcomes)
    values = np.zeros(len(ratios))
    for rows in outcomes.by_group():
        better = outcomes.rewards[rows][:, None] > outcomes.rewards[rows][None]
        slopes = beta * better * scipy.special.expit(-beta * (ratios[rows][:, None] - ratios[rows][None]))
        values[rows] = (slopes.sum(axis=1) - slopes.sum(axis=0)) * (len(rows) / max(better.sum(), 1))
    return values.astype(np.float32)


def xpo(outcomes: Outcomes, *, beta: float = 0.1, alpha: float = 1e-5, cap: float = 10.0) -> np.ndarray:
    """``online_dpo`` less alpha · min(π_ref / π, cap): what the reference would write is to become less likely.

    XPO (arXiv 2405.21046, algorithm 1) adds alpha · the log-probability of answers that the reference sampled, so that
    the policy explores what the reference would not write. Here nothing is sampled by the reference: the term is taken
    over the group's own trajectories, each with its ratio as importance weight, which is right in expectation as long
    as ``cap`` does not bind, and of large variance far from the reference. TRL samples it, and takes the pair of one
    answer of each; to be used as ``online_dpo`` is.

    Args:
        outcomes: ``reference_ratios``.
        beta: as in ``online_dpo``.
        alpha: weight of the term; 1e-5 in TRL.
        cap: largest weight of importance.

    Returns:
        [N] float32; in a group of equal rewards the term alone.

    Raises:
        ConfigError: there are no ratios to a reference.
    """
    unlikely = np.exp(np.clip(-_ratios(outcomes), -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return (online_dpo(outcomes, beta=beta) - alpha * np.minimum(unlikely, cap)).astype(np.float32)


def nash_md(outcomes: Outcomes, *, beta: float = 0.1, mixture: float = 0.5) -> np.ndarray:
    """P(it beats the mixture of policy and reference) - ½ - beta · log-ratio to the reference (Nash-MD-PG).

    Arxiv 2312.00886, section 7, with ``loss = "reinforce"`` and ``aggregation = "sequence_sum"``. The probability that
    one trajectory is preferred to another is σ(reward - reward), as in TRL. The opponent is π^(1 - mixture)
    π_ref^mixture; where TRL mixes logits token by token and samples from that, here the others of the group play it,
    each weighted by (π_ref / π)^mixture, weights that sum to 1. TRL's KL credits every token with its own log-ratio
    alone; here a trajectory pays for its whole.

    Args:
        outcomes: ``reference_ratios``.
        beta: how dearly the KL to the reference is paid for.
        mixture: 0 plays against the policy itself, 1 against the reference.

    Returns:
        [N] float32; one that is alone in its group is as good as its opponent.

    Raises:
        ConfigError: there are no ratios to a reference, or ``mixture`` is not between 0 and 1.
    """
    if not 0 <= mixture <= 1:
        raise ConfigError(f"nash_md: mixture={mixture} must lie between 0 and 1")
    ratios, rewards = _ratios(outcomes), np.asarray(outcomes.rewards, np.float64)
    wins = np.full(len(ratios), 0.5)
    for rows in outcomes.by_group():
        if len(rows) > 1:
            chances = scipy.special.expit(rewards[rows][:, None] - rewards[rows][None])
            opponents = np.broadcast_to(-mixture * ratios[rows], chances.shape).copy()
            np.fill_diagonal(opponents, -np.inf)  # nobody plays against itself
            wins[rows] = (chances * scipy.special.softmax(opponents, axis=1)).sum(axis=1)
    return (wins - 0.5 - beta * ratios).astype(np.float32)


def _ratios(outcomes: Outcomes) -> np.ndarray:
    return np.asarray(outcomes.need("reference_ratios"), np.float64)
