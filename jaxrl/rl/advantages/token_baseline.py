"""A baseline for every token: the mean of what is still to come, weighted by how noisy the gradient is until there."""

from typing import Literal

import numpy as np

from jaxrl.rl.outcomes import Outcomes

EPSILON = 1e-8


def optimal_token_baseline(
    outcomes: Outcomes, *, align: Literal["sampled", "position"] = "sampled", zero_tail: bool = True
) -> list[np.ndarray]:
    """A_t = G_t - Σ G_t W_t / Σ W_t over the group, with W_t = Σ_{j ≤ t} (1 - 2 π_j + Σ_v π_j(v)²), as in verl.

    W_t is the squared norm of the gradient of the logits, summed up to the token; π_j is the probability of token j.
    With importance weights ρ every term is multiplied by ρ².

    Args:
        outcomes: ``logprobs`` and ``square_sums``; ``ratios`` where an importance weight corrects the loss.
        align: which tokens of two trajectories are compared: those with the same number among the sampled ones
            (``tir_optimal_token_baseline`` of verl), or those at the same position (``optimal_token_baseline``), which
            differ where a tool wrote in between.
        zero_tail: no baseline where the longest trajectory is longer than any other, for there it would be its own.

    Returns:
        [T_i] float32 of each trajectory; 0 where the environment wrote the token. One that is alone in its group has no
        baseline.

    Raises:
        ConfigError: the statistics were not recorded.
    """
    square_sums, logprobs = outcomes.need("square_sums"), outcomes.need("logprobs")
    ratios = outcomes.ratios or [np.ones(len(mask)) for mask in outcomes.masks]
    rows = zip(outcomes.rewards_by_token(), outcomes.masks, logprobs, square_sums, ratios, strict=True)
    to_come, noise, places = [], [], []
    for rewards, mask, logprob, square_sum, ratio in rows:
        sampled = np.asarray(mask) > 0
        terms = (1 - 2 * np.exp(np.asarray(logprob, np.float64)) + square_sum) * np.asarray(ratio, np.float64) ** 2
        to_come.append(np.cumsum(np.where(sampled, rewards, 0.0)[::-1])[::-1][sampled])
        noise.append(np.cumsum(np.where(sampled, terms, 0.0))[sampled])
        places.append(np.arange(sampled.sum()) if align == "sampled" else np.flatnonzero(sampled))
    advantages = [np.zeros(len(mask), np.float32) for mask in outcomes.masks]
    for group in outcomes.by_group():
        width = 1 + max(int(places[row].max(initial=-1)) for row in group)
        weighted, weights = np.zeros(width), np.zeros(width)
        for row in group:
            weighted[places[row]] += to_come[row] * noise[row]
            weights[places[row]] += noise[row]
        baseline = weighted / (weights + EPSILON) if len(group) > 1 else np.zeros(width)
        longest, tail = _tail([len(places[row]) for row in group]) if zero_tail else (-1, 0)
        for number, row in enumerate(group):
            own = (
                np.where(places[row] >= tail, 0.0, baseline[places[row]])
                if number == longest
                else baseline[places[row]]
            )
            advantages[row][np.asarray(outcomes.masks[row]) > 0] = to_come[row] - own
    return advantages


def _tail(lengths: list[int]) -> tuple[int, int]:
    """Which trajectory is longer than all others, and where the second longest ends; (-1, 0) where none is."""
    if len(lengths) < 2:
        return -1, 0
    second, longest = sorted(lengths)[-2:]
    return (lengths.index(longest), second) if longest > second else (-1, 0)
