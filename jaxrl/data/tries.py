"""Sequences merged into tries, as long as they agree: how trajectories that begin alike lie in one row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Trie(NamedTuple):
    """Tries in depth-first order. A node is a token with its successor: see ``records.Tree``."""

    places: list[np.ndarray]  # of each sequence [n_i], rising: the nodes of its tokens
    ends: np.ndarray  # [M] int32, index after the last node below
    copies: np.ndarray  # [M] int32, sequences that have the node


def agreement(
    first: np.ndarray,
    second: np.ndarray,
    others: tuple[np.ndarray, np.ndarray] | None = None,
    limit: int | None = None,
) -> int:
    """How many nodes two sequences share: where they agree on a token and on the one after it.

    Sequences that are the same share their last token as well, which has no successor.

    Args:
        first, second: [n] and [m] ids.
        others: [n, ...] and [m, ...], values of each token that must be the same for its node to be shared.
        limit: at most so many.
    """
    tokens = _common(first, second)
    shared = tokens if tokens == len(first) == len(second) else max(tokens - 1, 0)
    if others is not None:
        shared = min(shared, _common(*others))
    return shared if limit is None else min(shared, limit)


def trie(lengths: Sequence[int], shared: Sequence[int]) -> Trie:
    """The tries of sequences in their order.

    Args:
        lengths: of each sequence, n_i.
        shared: how many nodes each has in common with the one before it; 0 begins a new trie.
    """
    places: list[np.ndarray] = []
    total = 0
    for index, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        own = np.arange(total, total + length - common)
        places.append(np.concatenate([places[index - 1][:common], own]) if common else own)
        total += len(own)
    ends, copies = np.zeros((2, total), np.int32)
    for nodes in places:  # in depth-first order: the last that has a node is the last below it
        ends[nodes] = nodes[-1:] + 1
        copies[nodes] += 1
    return Trie(places, ends, copies)


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the longest common beginning of [n, ...] and [m, ...]."""
    length = min(len(first), len(second))
    same = (first[:length] == second[:length]).reshape(length, -1).all(axis=1)
    return length if same.all() else int(same.argmin())
