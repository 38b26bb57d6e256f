"""Sums of rewards still to come, and whitening: what several families of advantages are made of."""

from collections.abc import Sequence

import numpy as np
import scipy.signal

VARIANCE_FLOOR = 1e-8
"""Beside the variance, as in verl; keeps what is constant at 0."""


def discounted_sums(values: np.ndarray, discount: float) -> np.ndarray:
    """Of each entry t of [K], Σ_{k ≥ t} discount^(k - t) · values[k]. [K] float64."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return values
    return scipy.signal.lfilter([1.0], [1.0, -discount], values[::-1])[::-1]


def cut_sums(rewards: np.ndarray, continues: np.ndarray, discount: float) -> np.ndarray:
    """As ``discounted_sums``, but a step that does not continue counts for itself alone, and cuts off what comes after.

    R_t = r_t + discount · R_{t + 1} where both steps continue, else r_t (UI-S1, arXiv 2509.11543, semi-online returns).

    Args:
        rewards: [K].
        continues: [K] bool.
        discount: of one step.
    """
    sums, later = np.array(rewards, np.float64), 0.0
    for step in range(len(sums) - 1, -1, -1):
        if continues[step]:
            sums[step] += discount * later
        later = sums[step] if continues[step] else 0.0
    return sums


def whitened(values: Sequence[np.ndarray], masks: Sequence[np.ndarray], *, shift: bool = True) -> list[np.ndarray]:
    """Values of each trajectory [T_i], less the mean and over the std of all its masked tokens of all trajectories.

    The variance is unbiased; where fewer than two tokens are masked it is 0.

    Args:
        values: of each [T_i].
        masks: of each [T_i], such as ``Outcomes.trained_masks``; only tokens with 1 count, others come out as 0.
        shift: False keeps the mean.

    Returns:
        Of each [T_i] float32.
    """
    chosen = [np.asarray(mask) > 0 for mask in masks]
    pool = np.concatenate([np.zeros(0), *(value[mask] for value, mask in zip(values, chosen, strict=True))])
    mean = pool.mean() if len(pool) else 0.0
    variance = pool.var(ddof=1) if len(pool) > 1 else 0.0
    scale, added = 1 / np.sqrt(variance + VARIANCE_FLOOR), 0.0 if shift else mean
    return [
        np.where(mask, (value - mean) * scale + added, 0.0).astype(np.float32)
        for value, mask in zip(values, chosen, strict=True)
    ]
