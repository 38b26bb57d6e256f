"""avg@k, pass@k and maj@k over problems, with 95 % intervals; all NaN where there is no problem to average.

Problems may have different numbers of samples, since samples lost to faults of our own are left out.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

from jaxrl.observe.report import Estimate


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean of one value in [0, 1] for each problem, with the 95 % interval for the mean over problems like these.

    The samples of a problem are not independent, so the problem is the unit (Miller 2024, arXiv 2411.00640). The spread
    over problems gives the effective sample size n* = p(1−p)/(s²/n) (Korn and Graubard 1998), and that the score
    interval of Wilson (1927) with Student's t for n−1 degrees of freedom: unlike p ± t·s/√n it stays within [0, 1] and
    holds for rates near 0 and 1. Where every problem has the value 0, or every one 1, n* is n. One problem alone says
    nothing about others: [0, 1].
    """
    array = np.asarray(values, np.float64)
    count = len(array)
    if count < 2:
        return Estimate(float(array[0]), 0.0, 1.0) if count else Estimate(math.nan, math.nan, math.nan)
    mean, variance = float(array.mean()), float(array.var(ddof=1) / count)
    unanimous = mean in (0.0, 1.0)
    if variance == 0.0 and not unanimous:
        return Estimate(mean, mean, mean)
    effective = count if unanimous else mean * (1 - mean) / variance
    squared = float(scipy.stats.t.ppf(0.975, count - 1)) ** 2 / effective
    centre = (mean + squared / 2) / (1 + squared)
    margin = math.sqrt(squared * (mean * (1 - mean) + squared / 4)) / (1 + squared)
    return Estimate(mean, max(0.0, centre - margin), min(1.0, centre + margin))


def avg_at_k(correct: Sequence[Sequence[bool]]) -> Estimate:
    """Mean share of correct samples; pass@1 estimated from all samples.

    Args:
        correct: for each problem, whether each of its samples is right. Problems without samples are left out.
    """
    return mean_interval([sum(row) / len(row) for row in correct if row])


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> Estimate:
    """Chance that at least one of ``k`` samples is right, unbiased: 1 − C(n−c, k)/C(n, k) for c right of n.

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1. Problems with fewer than ``k`` samples are left out.
    """
    if k < 1:
        raise ValueError(f"pass@k needs k >= 1, got {k}")
    values = [1 - math.comb(len(row) - sum(row), k) / math.comb(len(row), k) for row in correct if len(row) >= k]
    return mean_interval(values)


def maj_at_k(votes: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]]) -> Estimate:
    """Chance that the most frequent answer of a problem's samples is right (self-consistency, Wang et al. 2022).

    Samples without an answer do not vote; a problem without any vote counts 0. Among answers with equally many votes
    one is drawn at random: the value is the expectation over that draw.

    Args:
        votes: for each problem, the answers in a form in which equal answers are equal texts; None = no answer.
        correct: as for ``avg_at_k``, in the same order. Where equal votes differ in it, their mean counts.
    """
    return mean_interval([_majority(*rows) for rows in zip(votes, correct, strict=True) if rows[0]])


def _majority(votes: Sequence[str | None], correct: Sequence[bool]) -> float:
    supporters: dict[str, list[bool]] = collections.defaultdict(list)
    for vote, right in zip(votes, correct, strict=True):
        if vote is not None:
            supporters[vote].append(right)
    if not supporters:
        return 0.0
    most = max(map(len, supporters.values()))
    return float(np.mean([np.mean(rights) for rights in supporters.values() if len(rights) == most]))
