"""Choices that look at nothing, or at rewards alone."""

import numpy as np

from jaxrl.rl.selection.candidates import Candidates


def first(candidates: Candidates) -> np.ndarray:
    """The first ``keep`` by sample index, all of them where it is 0. Ascending indices."""
    return np.arange(min(candidates.keep or len(candidates.trajectories), len(candidates.trajectories)))


def max_variance(candidates: Candidates) -> np.ndarray:
    """The ``keep`` trajectories whose rewards have the largest variance (PODS, arXiv 2504.13818).

    They are some of the highest rewards and some of the lowest; ties by sample index. Ascending indices.
    """
    if not 0 < candidates.keep < len(candidates.trajectories):
        return first(candidates)
    order = np.argsort(candidates.rewards, kind="stable")
    splits = [np.r_[order[:low], order[len(order) - candidates.keep + low :]] for low in range(candidates.keep + 1)]
    return np.sort(max(splits, key=lambda chosen: candidates.rewards[chosen].var()))
