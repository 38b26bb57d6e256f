"""Packs trajectories so that what those of a group have in common is computed once: their prompt, or all beginnings.

Only the network sees less. The losses are of every trajectory's own tokens, with its own weights, advantages and
log-probabilities, laid out as without sharing; a node's gradient is the sum of what they make of it. Sharing is
therefore exact for every loss but those that rank or average over a micro-batch, which then holds other trajectories;
nothing about a loss needs to be linear in its advantage.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl.config import TrainConfig
from jaxrl.data.segments import Segment, assign, placed
from jaxrl.data.tries import agreement, trie
from jaxrl.records import Batch, Tree


class Sharing(NamedTuple):
    """What trajectories of a group share, and the shape of what their losses see.

    Attributes:
        responses: beginnings of responses as well, not the prompt alone.
        loss_tokens: U, response tokens of all trajectories in a row; at least as many as a row has.
    """

    responses: bool
    loss_tokens: int


def sharing_of(train: TrainConfig) -> Sharing | None:
    """What ``packing`` names; None where every trajectory is packed by itself."""
    if train.packing == "rows":
        return None
    responses = train.packing == "tree"
    return Sharing(responses, train.row_tokens * (train.tree_loss_rows if responses else 1))


def pack(segments: Sequence[Segment], sharing: Sharing, *, rows: int, row_tokens: int) -> list[Batch]:
    """Micro-batches of segments, those of a group side by side as far as a row holds them.

    Args:
        segments: prompt and response each, none longer than a row; those of a group follow each other.
        sharing: what is shared.
        rows: rows of a micro-batch.
        row_tokens: tokens of a row, nodes of its tree.
    """
    limits = row_tokens, sharing.loss_tokens
    groups = [list(members) for _, members in itertools.groupby(segments, key=lambda segment: segment.group)]
    order = _by_tokens if sharing.responses else functools.partial(_by_room, limits=limits)
    units = [unit for members in groups for unit in _units(order(members), sharing, limits)]
    sizes = [unit.size for unit in units]
    return [
        _batch([[units[index] for index in row] for row in batch], rows, limits)
        for batch in placed(sizes, rows, limits)
    ]


def without_sharing(batch: Batch, sharing: Sharing | None) -> Batch:
    """The batch in the form that programs with ``sharing`` take: each of its segments alone in the tree."""
    if sharing is None or batch.tree is not None:
        return batch
    tokens = batch.tokens.shape[1]
    index, ids = np.arange(tokens, dtype=np.int32), np.asarray(batch.segment_ids)
    last = np.diff(ids, axis=1, append=-1) != 0
    ends = np.minimum.accumulate(np.where(last, index + 1, tokens)[:, ::-1], axis=1)[:, ::-1]
    begins = np.diff(ids, axis=1, prepend=0) != 0
    predictors = np.where(begins | (ids == 0), -1, index - 1)
    extra = ((0, 0), (0, sharing.loss_tokens - tokens))
    tree = Tree(
        tokens=batch.tokens,
        positions=batch.positions,
        ends=np.where(ids > 0, ends, 0).astype(np.int32),
        copies=(ids > 0).astype(np.int32),
        predictors=np.pad(predictors.astype(np.int32), extra, constant_values=-1),
    )
    experts, plain = batch.experts, batch.replace(experts=None)
    fields = {name: np.pad(values, extra) for name, values in vars(plain).items() if values is not None}
    return Batch(**fields, experts=experts, tree=tree)


def figures(updates: Sequence[Sequence[Batch]]) -> dict[str, float]:
    """Of a step's updates ``packing/tokens_per_node``: tokens of its trajectories for every one that is computed.
    Nothing where nothing is shared."""
    copies = [batch.tree.copies for batches in updates for batch in batches if batch.tree is not None]
    if not copies:
        return {}
    return {"packing/tokens_per_node": sum(map(np.sum, copies)) / max(sum(map(np.count_nonzero, copies)), 1)}


class _Unit(NamedTuple):
    """Segments that lie in one row, with the nodes each shares with the one before it."""

    segments: list[Segment]
    shared: list[int]

    @property
    def size(self) -> tuple[int, int]:
        """Nodes, and response tokens of all segments."""
        nodes = sum(map(_length, self.segments)) - sum(self.shared)
        return nodes, sum(map(_response, self.segments))


def _by_tokens(group: Sequence[Segment]) -> list[Segment]:
    """The order in which equal beginnings follow each other."""
    return sorted(group, key=lambda segment: segment.tokens.astype(">i4").tobytes())


def _by_room(group: Sequence[Segment], limits: tuple[int, int]) -> list[Segment]:
    """The order in which those follow each other that fill a row best, beside their prompt."""
    prompt = _shared_prompt(group)
    sizes = [(_length(segment) - prompt, _response(segment)) for segment in group]
    return [group[index] for row in assign(sizes, (limits[0] - prompt, limits[1])) for index in row]


def _units(group: Sequence[Segment], sharing: Sharing, limits: tuple[int, int]) -> list[_Unit]:
    """Those that follow each other as long as they share something and a row holds them."""
    units: list[_Unit] = []
    size = limits
    for index, segment in enumerate(group):
        common = _agreement(group[index - 1], segment, sharing) if index else 0
        taken = _length(segment) - common, _response(segment)
        size = tuple(have + more for have, more in zip(size, taken, strict=True))
        if not common or any(have > limit for have, limit in zip(size, limits, strict=True)):
            units.append(_Unit([segment], [0]))
            size = units[-1].size
        else:
            units[-1].segments.append(segment)
            units[-1].shared.append(common)
    return units


def _agreement(first: Segment, second: Segment, sharing: Sharing) -> int:
    recorded = tuple(segment.values.get("experts") for segment in (first, second))
    if (recorded[0] is None) != (recorded[1] is None):
        return 0
    limit = None if sharing.responses else _shared_prompt((first, second))
    return agreement(first.tokens, second.tokens, None if recorded[0] is None else recorded, limit)


def _shared_prompt(segments: Sequence[Segment]) -> int:
    """Nodes of a prompt that all of them have; its last token predicts what they do not."""
    return max(min(segment.prompt_tokens for segment in segments) - 1, 0)


def _batch(filled: Sequence[Sequence[_Unit]], rows: int, limits: tuple[int, int]) -> Batch:
    everything = [segment for row in filled for unit in row for segment in unit.segments]
    recorded = (segment.values["experts"] for segment in everything if "experts" in segment.values)
    row_tokens, loss_tokens = limits
    computed = Batch.zeros(rows, row_tokens, next(recorded, None))
    ends, copies = np.zeros((2, rows, row_tokens), np.int32)
    tree = Tree(computed.tokens, computed.positions, ends, copies, np.full((rows, loss_tokens), -1, np.int32))
    batch = Batch.zeros(rows, loss_tokens).replace(experts=computed.experts, tree=tree)
    if any("groups" in segment.values for segment in everything):
        batch = batch.replace(groups=np.zeros((rows, loss_tokens), np.int32))
    for row, units in enumerate(filled):
        first, start, number = 0, 0, 0
        for unit in units:
            nodes = trie(list(map(_length, unit.segments)), unit.shared)
            here = row, slice(first, first + len(nodes.ends))
            tree.ends[here], tree.copies[here] = first + nodes.ends, nodes.copies
            for segment, places in zip(unit.segments, nodes.places, strict=True):
                number += 1
                _fill(batch, row, (first + places, slice(start, start + _response(segment))), segment, number)
                start += _response(segment)
            first += len(nodes.ends)
    return batch


def _fill(batch: Batch, row: int, where: tuple[np.ndarray, slice], segment: Segment, number: int) -> None:
    """Write a segment to its nodes and to its place among what the losses see."""
    nodes, span = where
    tree, before = batch.tree, segment.prompt_tokens
    index = np.arange(len(nodes), dtype=np.int32)
    tree.tokens[row, nodes], tree.positions[row, nodes] = segment.tokens, index
    if "experts" in segment.values:
        batch.experts[row, nodes] = segment.values["experts"]
    tree.predictors[row, span] = np.concatenate([[-1], nodes[:-1]])[before:]
    batch.tokens[row, span], batch.positions[row, span] = segment.tokens[before:], index[before:]
    batch.segment_ids[row, span], batch.mask[row, span] = number, segment.mask[before:]
    for name, values in segment.values.items():
        if name != "experts":
            getattr(batch, name)[row, span] = values[before:]


def _length(segment: Segment) -> int:
    return len(segment.tokens)


def _response(segment: Segment) -> int:
    return len(segment.tokens) - segment.prompt_tokens
