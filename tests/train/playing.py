"""Run by test_processes.py as one of several processes: groups that are trained on as they are finished.

``playing.py PORT COUNT PROCESS FOLDER`` plays eight draws, of which the second and the third straggle until the others
have been taken, and writes which were taken together, of which of them this process has the tokens, and what is left
behind.
"""

import asyncio
import contextlib
import json
import pathlib
import sys
import time
from typing import Any

import jax

from jaxrl.processes import join
from jaxrl.processes.exchange import exchange, notices
from jaxrl.records import Group
from jaxrl.train import shares
from jaxrl.train.group_queue import GroupQueue
from tests.train import updating

DRAWS, STRAGGLERS = range(8), (1, 2)


async def take_all() -> list[list[Group]]:
    gate, own = asyncio.Event(), shares.Shares()

    async def play_group(player: Any, problem: Any, draw: int, samples: int, **settings: Any) -> Group:
        del player, problem, samples, settings
        if draw in STRAGGLERS:
            await gate.wait()
        return updating.group(draw)

    shares.play_group = play_group

    def play(player: Any, problem: Any, draw: int) -> Any:
        return own.play_group(player, problem, draw, 5)

    taken = []
    async with contextlib.aclosing(GroupQueue(play, finished_first=True, agree=own.agree)) as queue:
        queue.begin(None, [(draw, updating.group(draw).problem) for draw in DRAWS])
        while len(queue):
            if len(queue) == len(STRAGGLERS):
                gate.set()
            taken.append(await queue.take(2))
    return taken


def main() -> int:
    taken = asyncio.run(take_all())
    exchange("all have taken all", b"")
    given_up = time.monotonic() + 10
    while notices(shares.PLAYED) and time.monotonic() < given_up:
        time.sleep(0.1)  # what the last one frees is not gone for all at once
    report = {
        "taken": [[group.draw for group in groups] for groups in taken],
        "whole": [g.draw for groups in taken for g in groups if any(one.ids.any() for one in g.trajectories)],
        "left": notices(shares.PLAYED),
    }
    (pathlib.Path(sys.argv[4]) / f"{jax.process_index()}.json").write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    port, count, process = map(int, sys.argv[1:4])
    sys.exit(join.run(join.Place(f"127.0.0.1:{port}", count, process, 60), main))
