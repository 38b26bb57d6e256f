"""Texts on their way into rows, and which of them lie in which row."""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Segment:
    """One text to place. Every array is [T, ...]; ``values`` are further fields of ``Batch``, others stay empty.

    ``group`` and ``prompt_tokens`` say what it may share with others, where anything is shared.
    """

    tokens: np.ndarray
    mask: np.ndarray
    values: Mapping[str, np.ndarray]
    prompt_tokens: int = 0
    group: int = 0


def placed(sizes: Sequence[tuple[int, ...]], rows: int, limits: tuple[int, ...]) -> list[list[list[int]]]:
    """Indices of the units in each row of each batch.

    Args:
        sizes: what each unit takes of everything a row has only so much of; the first counts for how full a row is.
        rows: rows of a batch.
        limits: how much of it a row has.
    """
    filled = assign(sizes, limits)
    count = math.ceil(len(filled) / rows)
    # Every count-th row: the rows of the longest units come first and would crowd into the first batches.
    return [filled[batch::count] for batch in range(count)]


def assign(sizes: Sequence[tuple[int, ...]], limits: tuple[int, ...]) -> list[list[int]]:
    """Indices of the units in each row: longest first, each into the fullest row that still holds it."""
    filled: list[list[int]] = []
    free: list[tuple[tuple[int, ...], int]] = []  # (what is left, row), ascending
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        size = sizes[index]
        place = bisect.bisect_left(free, ((size[0],), -1))
        while place < len(free) and any(left < taken for left, taken in zip(free[place][0], size, strict=True)):
            place += 1
        if place < len(free):
            room, row = free.pop(place)
        else:
            room, row = limits, len(filled)
            filled.append([])
        filled[row].append(index)
        bisect.insort(free, (tuple(left - taken for left, taken in zip(room, size, strict=True)), row))
    return filled
