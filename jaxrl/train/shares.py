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
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

import jax
import numpy as np

from jaxrl.config import Config, ConfigError
from jaxrl.episodes import JointPlay, Player, play_group, play_groups
from jaxrl.processes.exchange import forget, is_first, leave_notice, notices, receive, send
from jaxrl.records import Group, Problem
from jaxrl.train import outlines
from jaxrl.train.group_queue import Choice

T = TypeVar("T")

PLAYED = "jaxrl/played/"
"""Below it notices of the draws that have been played and are heard of by some processes, but not yet by all."""
LOOK_SECONDS = 0.2
"""Between two looks there."""


def is_own(draw: int) -> bool:
    """Whether this process plays the draw."""
    return draw % jax.process_count() == jax.process_index()


def known_here(group: Group) -> Group:
    """A group whole where it is this process's own, and else its outline."""
    return group if is_own(group.draw) else outlines.outline(group)


def check_processes(config: Config, processes: int) -> None:
    """Refuse what one process alone can do.

    Args:
        processes: of the run.

    Raises:
        ConfigError: naming the setting.
    """
    if processes == 1:
        return
    if config.algorithm.hint:
        raise ConfigError(
            f"AlgorithmConfig.hint={config.algorithm.hint!r} needs a single process, but this run has {processes}, of "
            "which each can only show again what it played itself; set it to '', or train in one process"
        )
    packing, recorded = config.train.packing, config.engine.record_experts
    if packing == "tree" or (packing == "shared_prompt" and recorded):
        raise ConfigError(
            f"TrainConfig.packing={packing!r}{' with EngineConfig.record_experts=True' if recorded else ''} needs a "
            f"single process, but this run has {processes}, each of which knows what trajectories have in common only "
            f"of what it played; set it to {'rows' if recorded else 'shared_prompt'!r}"
        )


class Shares:
    """Plays draws in all processes. All of them make the same calls in the same order."""

    def __init__(self) -> None:
        self._plays, self._choices = itertools.count(), itertools.count()
        self._elsewhere = _Elsewhere()

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
            await asyncio.to_thread(leave_notice, f"{PLAYED}{draw}")
        else:
            await self._elsewhere.played(draw)
            group = outlines.decode(await _received(name), problem, draw)
        await asyncio.to_thread(forget, name, f"{PLAYED}{draw}")
        return group

    async def agree(self, choose: Choice) -> list[int]:
        """What process 0 chooses; see ``GroupQueue``."""
        if jax.process_count() == 1:
            return await choose()
        name = f"jaxrl/choice/{next(self._choices)}"
        if is_first():
            chosen = await choose()
            await asyncio.to_thread(send, name, json.dumps(chosen).encode())
        else:
            chosen = json.loads(await _received(name))
        await asyncio.to_thread(forget, name)
        return chosen

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
        if is_own(draw):
            return await played.get()
        return outlines.decode(await _received(f"{name}/{draw}"), problem, draw)

    playing = asyncio.create_task(play_own())
    try:
        for draw, problem in draws:
            yield await _unless_failed(next_group(draw, problem), playing)
        await playing
        await asyncio.to_thread(forget, name)
    finally:
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)


class _Elsewhere:
    """What other processes play. A single look tells of all; to wait for each would take a thread for each."""

    def __init__(self) -> None:
        self._awaited: dict[int, asyncio.Future[None]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def played(self, draw: int) -> None:
        """Until whoever plays the draw has sent it."""
        self._awaited[draw] = asyncio.get_running_loop().create_future()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            await self._awaited[draw]
        finally:
            del self._awaited[draw]

    async def _look(self) -> None:
        try:
            while self._awaited:
                there = set(await asyncio.to_thread(notices, PLAYED))
                for draw, awaited in self._awaited.items():
                    if str(draw) in there and not awaited.done():
                        awaited.set_result(None)
                await asyncio.sleep(LOOK_SECONDS)
        except Exception as error:
            for awaited in self._awaited.values():
                if not awaited.done():
                    awaited.set_exception(error)


async def _received(name: str) -> bytes:
    unwanted = threading.Event()
    try:
        return await asyncio.to_thread(receive, name, unwanted)
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
