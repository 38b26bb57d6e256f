"""Which process plays which draw, and groups that all processes know of.

What a draw samples does not depend on who plays it: its random numbers are named by draw and sample. So a run in many
processes is the run in one.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

import jax
import numpy as np

from jaxrl.config import Config, ConfigError
from jaxrl.episodes import JointPlay, Player, play_group, play_groups
from jaxrl.observe import traces
from jaxrl.processes.exchange import exchange, forget, receive, send
from jaxrl.records import Group, Problem
from jaxrl.rl.targets import TARGETS
from jaxrl.train import outlines

T = TypeVar("T")


def is_own(draw: int) -> bool:
    """Whether this process plays the draw."""
    return draw % jax.process_count() == jax.process_index()


def known_here(group: Group) -> Group:
    """A group whole where it is this process's own, and else its outline."""
    return group if is_own(group.draw) else outlines.outline(group)


def agreed(pending: Sequence[Group], unfinished: Sequence[int], name: str) -> tuple[tuple[Group, ...], tuple[int, ...]]:
    """Groups that have been played, whole, and draws that have not, where each process knows its own groups whole and
    may not have heard yet that one of another has ended: whoever plays a draw says what it has.

    All processes call this together, of the same draws and with a fresh name.

    Returns:
        In the order of the draws, and the same in every process.
    """
    if jax.process_count() == 1:
        return tuple(pending), tuple(unfinished)
    draws = {group.draw for group in pending} | set(unfinished)
    own = {group.draw: [traces.to_json(t) for t in group.trajectories] for group in pending if is_own(group.draw)}
    whole = {}
    for message in exchange(f"jaxrl/groups/{name}", json.dumps(own).encode()):
        for draw, rows in json.loads(message).items():
            trajectories = tuple(map(traces.from_json, rows))
            whole[int(draw)] = Group(trajectories[0].problem, int(draw), trajectories)
    return tuple(whole[draw] for draw in sorted(whole)), tuple(sorted(draws - set(whole)))


def check_processes(config: Config, processes: int) -> None:
    """Refuse what one process alone can do.

    Args:
        processes: of the run.

    Raises:
        ConfigError: naming the setting.
    """
    if processes == 1:
        return
    algorithm = config.algorithm
    of_whole_groups = {
        "AlgorithmConfig.reference_ratios=True": algorithm.reference_ratios,
        f"AlgorithmConfig.loss={algorithm.loss!r}": algorithm.loss in TARGETS,
    }
    if found := [setting for setting, used in of_whole_groups.items() if used]:
        raise ConfigError(
            f"{', '.join(found)} needs a single process, but this run has {processes}, each of which knows whole "
            "trajectories only of what it played; change it, or train in one process"
        )
    packing, recorded = config.train.packing, config.engine.record_experts
    if packing == "tree" or (packing == "shared_prompt" and recorded):
        raise ConfigError(
            f"TrainConfig.packing={packing!r}{' with EngineConfig.record_experts=True' if recorded else ''} needs a "
            f"single process, but this run has {processes}, each of which knows what trajectories have in common only "
            f"of what it played; set it to {'rows' if recorded else 'shared_prompt'!r}"
        )
    if config.train.next_groups == "finished":
        raise ConfigError(
            f'TrainConfig.next_groups="finished" needs a single process, but this run has {processes}, each of which '
            'knows when its own groups end; set it to "drawn", or train in one process'
        )


class Shares:
    """Plays draws in all processes. All of them make the same calls in the same order."""

    def __init__(self) -> None:
        self._plays = itertools.count()
        self._turn = asyncio.Lock()

    async def play_group(
        self,
        player: Player,
        problem: Problem,
        draw: int,
        samples: int,
        *,
        greedy_baseline: bool = False,
        extra_samples: Callable[[np.ndarray], int] | None = None,
        joint: JointPlay | None = None,
    ) -> Group:
        """As ``episodes.play_group`` in the process whose draw it is; in others its outline. Once for each draw."""
        play = functools.partial(play_group, greedy_baseline=greedy_baseline, extra_samples=extra_samples, joint=joint)
        if jax.process_count() == 1:
            return await play(player, problem, draw, samples)
        name = f"jaxrl/group/{draw}"
        if is_own(draw):
            group = await play(player, problem, draw, samples)
            await asyncio.to_thread(send, name, outlines.encode(group))
        else:
            async with self._turn:  # one after the other: each wait takes a thread, of which there are few
                group = await _received(name, problem, draw)
        await asyncio.to_thread(forget, name)
        return group

    def play(
        self,
        player: Player,
        draws: Iterable[tuple[int, Problem]],
        samples: int,
        *,
        in_flight: int | None = None,
        greedy_baseline: bool = False,
        extra_samples: Callable[[np.ndarray], int] | None = None,
    ) -> AsyncGenerator[Group]:
        """As ``play_groups``, but each process plays its own draws alone and gets outlines of the others.

        Args:
            draws: the same in every process, and finite if there is more than one.
            in_flight: of each process.
        """
        play = functools.partial(
            play_groups,
            player,
            samples=samples,
            in_flight=in_flight,
            greedy_baseline=greedy_baseline,
            extra_samples=extra_samples,
        )
        if jax.process_count() == 1:
            return play(draws)
        return _play_share(f"jaxrl/play/{next(self._plays)}", play, tuple(draws))


async def _play_share(
    name: str, play: Callable[..., AsyncGenerator[Group]], draws: tuple[tuple[int, Problem], ...]
) -> AsyncGenerator[Group]:
    played: asyncio.Queue[Group] = asyncio.Queue()

    async def play_own() -> None:
        own = [(draw, problem) for draw, problem in draws if is_own(draw)]
        async with contextlib.aclosing(play(own)) as groups:
            async for group in groups:
                await asyncio.to_thread(send, f"{name}/{group.draw}", outlines.encode(group))
                played.put_nowait(group)

    async def next_group(draw: int, problem: Problem) -> Group:
        return await (played.get() if is_own(draw) else _received(f"{name}/{draw}", problem, draw))

    playing = asyncio.create_task(play_own())
    try:
        for draw, problem in draws:
            yield await _unless_failed(next_group(draw, problem), playing)
        await playing
        await asyncio.to_thread(forget, name)
    finally:
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)


async def _received(name: str, problem: Problem, draw: int) -> Group:
    unwanted = threading.Event()
    try:
        return outlines.decode(await asyncio.to_thread(receive, name, unwanted), problem, draw)
    finally:
        unwanted.set()  # cancelled: the thread would wait on


async def _unless_failed(wanted: Awaitable[T], other: asyncio.Task[None]) -> T:
    """What is wanted; an exception of the other task is raised at once."""
    task = asyncio.ensure_future(wanted)
    try:
        await asyncio.wait((task, other), return_when=asyncio.FIRST_COMPLETED)
        if other.done():
            other.result()
        return await task
    finally:
        task.cancel()
