"""Groups that are played ahead, in a checkpoint: every process writes those that it played into a file of its own.

They are whole episodes, of which there may be many thousands, so none of them passes through another process.
"""

import asyncio
import dataclasses
import json
import pathlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from jaxrl.observe import traces
from jaxrl.records import Group


class PlayedHandler(ocp.AsyncCheckpointHandler):
    """An item of a checkpoint: a file for each process that saved, a group a line."""

    async def async_save(self, directory: pathlib.Path, args: "SavePlayed") -> list[future.Future]:
        """Write in the background what this process says that it played."""
        return [future.CommitFutureAwaitingContractedSignals(_written(directory, args.groups), name="played")]

    def save(self, directory: pathlib.Path, args: "SavePlayed") -> None:
        """The same, until it is written."""
        asyncio.run(_written(directory, args.groups))

    def restore(self, directory: pathlib.Path, args: "RestorePlayed") -> tuple[Group, ...]:
        """The groups that all processes wrote, in the order of their draws."""
        groups = []
        for file in pathlib.Path(directory).glob("*.jsonl"):
            with file.open(encoding="utf-8") as lines:
                groups += [args.seen(_group(json.loads(line))) for line in lines]
        return tuple(sorted(groups, key=lambda group: group.draw))


@ocp.args.register_with_handler(PlayedHandler, for_save=True)
@dataclasses.dataclass
class SavePlayed(ocp.args.CheckpointArgs):
    """``groups``: whole ones, that this process played."""

    groups: Sequence[Group]


@ocp.args.register_with_handler(PlayedHandler, for_restore=True)
@dataclasses.dataclass
class RestorePlayed(ocp.args.CheckpointArgs):
    """``seen``: makes of a group what this process keeps of it, before the next one is read."""

    seen: Callable[[Group], Group]


def _written(directory: pathlib.Path, groups: Sequence[Group]) -> Coroutine[Any, Any, None]:
    return asyncio.to_thread(_write, pathlib.Path(directory) / f"{jax.process_index()}.jsonl", groups)


def _write(file: pathlib.Path, groups: Sequence[Group]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for group in groups:
            row = [traces.to_json(trajectory) for trajectory in group.trajectories]
            lines.write(json.dumps(row, separators=(",", ":")) + "\n")


def _group(row: list[dict[str, Any]]) -> Group:
    trajectories = tuple(map(traces.from_json, row))
    return Group(trajectories[0].problem, trajectories[0].draw, trajectories)
