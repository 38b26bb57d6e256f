"""What processes tell each other of episodes: everything but what was said.

Selection, advantages, packing and metrics need lengths, masks, rewards and counts, so every process does them alike
from outlines. Tokens and log-probabilities go from the process that played them straight to the devices that train on
them (``placement``). What reads the contents of a trajectory, such as a reward, has its place before: where it was
played.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl.observe import traces
from jaxrl.records import Group, Problem, ToolCall, Trajectory
from jaxrl.train.placement import UNSAID

EXACT = ("mask", "versions")
"""Arrays that are sent as they are; they have long runs of one value."""


def outline(group: Group) -> Group:
    """The group as other processes know it: of arrays that are not ``EXACT`` only the shape, no text, no outputs of
    tools."""
    return Group(group.problem, group.draw, tuple(_outline(trajectory) for trajectory in group.trajectories))


def encode(group: Group) -> bytes:
    """The outline of a group, to be sent."""
    return json.dumps([_row(trajectory) for trajectory in group.trajectories], separators=(",", ":")).encode()


def decode(message: bytes, problem: Problem, draw: int) -> Group:
    """The outline that ``encode`` wrote, of a group that plays ``problem``."""
    return Group(problem, draw, tuple(_trajectory(row, problem) for row in json.loads(message)))


def _outline(trajectory: Trajectory) -> Trajectory:
    arrays = _arrays(trajectory)
    contents = {name: _unsaid(name, value.dtype, value.shape) for name, value in arrays.items() if name not in EXACT}
    turns = tuple(
        dataclasses.replace(turn, calls=tuple(_without_contents(call) for call in turn.calls))
        for turn in trajectory.turns
    )
    return dataclasses.replace(trajectory, text="", turns=turns, **contents)


def _unsaid(name: str, dtype: np.dtype | str, shape: Sequence[int]) -> np.ndarray:
    return np.broadcast_to(np.dtype(dtype).type(UNSAID.get(name, 0)), shape)  # takes no memory


def _without_contents(call: ToolCall) -> ToolCall:
    """Calls that differ in their arguments still do."""
    digest = hashlib.sha256(repr(sorted(call.arguments.items())).encode("utf-8", "surrogatepass")).hexdigest()
    return dataclasses.replace(call, arguments={"digest": digest}, stdout="", stderr="")


def _arrays(trajectory: Trajectory) -> dict[str, np.ndarray]:
    values = {field.name: getattr(trajectory, field.name) for field in dataclasses.fields(trajectory)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def _row(trajectory: Trajectory) -> dict[str, Any]:
    arrays = _arrays(trajectory)
    empty = {name: value[:0] for name, value in arrays.items()}
    row = traces.to_json(dataclasses.replace(_outline(trajectory), problem=Problem("", "", ""), **empty))
    shapes = {name: (value.dtype.name, value.shape) for name, value in arrays.items()}
    return row | {"arrays": shapes, "runs": {name: _runs(arrays[name]) for name in EXACT}}


def _trajectory(row: dict[str, Any], problem: Problem) -> Trajectory:
    shapes, runs = row.pop("arrays"), row.pop("runs")
    arrays = {name: _unsaid(name, dtype, shape) for name, (dtype, shape) in shapes.items()}
    for name in EXACT:
        dtype, (length,) = shapes[name]
        starts, values = runs[name]
        arrays[name] = np.repeat(np.array(values, dtype), np.diff([*starts, length]))
    return dataclasses.replace(traces.from_json(row), problem=problem, **arrays)


def _runs(values: np.ndarray) -> tuple[list[int], list[int]]:
    """Where a run of equal values begins, and its value."""
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return starts.tolist(), values[starts].tolist()
