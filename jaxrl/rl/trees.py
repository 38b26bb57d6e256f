"""Turns, states and shared prefixes of real trajectories, as an advantage sees them."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from jaxrl.records import Trajectory


def turns_of(trajectory: Trajectory) -> np.ndarray:
    """[T] int: the policy turn of each token, from 0; -1 where the environment wrote it."""
    turns = np.full(len(trajectory.ids), -1)
    for number, turn in enumerate(turn for turn in trajectory.turns if turn.author == "policy"):
        turns[turn.start : turn.end] = number
    return turns


def states_of(trajectory: Trajectory) -> list[bytes]:
    """Names of what the policy read last before each of its turns: the prompt, then the tool's output.

    Two turns of one group whose states are equal were taken in the same situation, if one takes the last observation
    for the situation (GiGPO's anchor states, arXiv 2505.10978).
    """
    states, seen = [], trajectory.prompt_ids
    for turn in trajectory.turns:
        if turn.author == "policy":
            states.append(hashlib.blake2b(seen.tobytes(), digest_size=16).digest())
        else:
            seen = trajectory.ids[turn.start : turn.end]
    return states


def nodes_of(trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """Of each trajectory, the node that each policy turn leads to, [policy turns] int.

    Trajectories of one draw that are token for token the same up to the end of a turn have the same node there. Nothing
    has to record where a rollout branched: what branched late shares its prefix, and so does what was sampled twice.
    """
    return numbered([trajectory.draw for trajectory in trajectories], map(paths_of, trajectories))


def paths_of(trajectory: Trajectory) -> list[bytes]:
    """Names of all that was written up to the end of each policy turn."""
    prefix, done, path = hashlib.blake2b(digest_size=16), 0, []
    for turn in trajectory.turns:
        if turn.author == "policy":
            prefix.update(trajectory.ids[done : turn.end].tobytes())
            done = turn.end
            path.append(prefix.digest())
    return path


def numbered(draws: Iterable[int], paths: Iterable[Sequence[bytes]]) -> list[np.ndarray]:
    """The nodes of trajectories, from their draws and their ``paths_of``."""
    numbers: dict[tuple[int, bytes], int] = {}
    return [
        np.array([numbers.setdefault((draw, name), len(numbers)) for name in path], int)
        for draw, path in zip(draws, paths, strict=True)
    ]
