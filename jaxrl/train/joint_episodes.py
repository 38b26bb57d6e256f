"""Episodes that several agents play with each other: one policy in several roles, told apart by what it is asked."""

import asyncio
import bisect
import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from jaxrl.config import ConfigError, EnvConfig
from jaxrl.episodes import JointPlay, Player, play_episode
from jaxrl.records import Problem, StopReason, Trajectory
from jaxrl.rl.methods import configured


class Spoiled(Exception):
    """A fault of ours ended an agent, so nothing that depends on it means anything."""


class JointEpisode:
    """What a function that plays such an episode gets.

    Attributes:
        problem: that the episode is about.
    """

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        player: Player,
        problem: Problem,
        draw: int,
        number: int,
        *,
        samples: int,
        max_prompt_tokens: int,
    ) -> None:
        self.problem = problem
        self._tasks, self._player, self._draw, self._number = tasks, player, draw, number
        self._samples, self._max_prompt_tokens = itertools.count(number, samples), max_prompt_tokens
        self._played: list[Trajectory] = []

    @property
    def spoiled(self) -> tuple[Trajectory, ...]:
        """Everything that was played, none of it trainable, if a fault of ours ended an agent; else nothing."""
        if all(one.trainable for one in self._played):
            return ()
        return tuple(dataclasses.replace(one, stop_reason=StopReason.INFRA_ERROR) for one in self._played)

    def fits(self, question: str) -> bool:
        """Whether the prompt that asks this has at most ``EngineConfig.max_prompt_tokens`` tokens."""
        return len(self._player.chat.prompt(question)) <= self._max_prompt_tokens

    def play(self, role: str, question: str = "", answer: str = "") -> Coroutine[Any, Any, Trajectory]:
        """Let one agent play to its end, with tools, and grade it; await what this gives back.

        The order of the calls names the random keys of what agents write, so no timing may decide it. A fault of ours
        that ends an agent ends the episode: all that plays in it is cancelled, and nothing of it is trained on.

        Args:
            role: by which advantages tell agents apart.
            question: in the place of the problem's; one that ``fits``.
            answer: what it is graded against, in the place of the problem's.
        """
        asked = dataclasses.replace(
            self.problem, question=question or self.problem.question, answer=answer or self.problem.answer
        )
        return self._play(role, asked, next(self._samples))

    async def _play(self, role: str, asked: Problem, sample: int) -> Trajectory:
        return await self._tasks.create_task(self._play_out(role, asked, sample))  # it never outlives the episode

    async def _play_out(self, role: str, asked: Problem, sample: int) -> Trajectory:
        trajectory = await play_episode(self._player, asked, self._draw, sample)
        trajectory = dataclasses.replace(trajectory, role=role, episode=self._number)
        self._played.append(trajectory)
        if not trajectory.trainable:
            raise Spoiled(f"{role} of episode {self._number} of draw {self._draw} ended through a fault of ours")
        return trajectory


async def draft_and_revise(episode: JointEpisode, *, revisers: int = 2, shown: int = 80) -> list[Trajectory]:
    """A proposer answers the problem; revisers are shown its answer and answer again. All are graded alike.

    Args:
        episode: see ``JointEpisode``.
        revisers: how many there are, roles "reviser" beside the one "proposer".
        shown: characters of the draft's answer that they are shown at most: as many as ``fits`` has room for. Where
            there is room for none they are asked the problem alone.
    """
    draft = await episode.play("proposer")
    question = _told(episode, draft.answer or "", shown)
    async with asyncio.TaskGroup() as tasks:
        revised = [tasks.create_task(episode.play("reviser", question)) for _ in range(revisers)]
    return [draft, *(one.result() for one in revised)]


def _told(episode: JointEpisode, answer: str, shown: int) -> str:
    """The problem, and what somebody said to it, cut to the room that is left."""
    problem = episode.problem.question

    def cut(length: int) -> str:
        said = f'answered "{answer[:length]}"' if answer else "gave no answer"
        return f"{problem}\nSomebody else {said}. Check it, and answer yourself."

    lengths = range(1, min(shown, len(answer) or 1) + 1)
    fitting = bisect.bisect_left(lengths, True, key=lambda length: not episode.fits(cut(length)))
    return cut(fitting) if fitting else problem


JOINT_EPISODES: Mapping[str, Callable[..., Coroutine[Any, Any, Sequence[Trajectory]]]] = {
    "draft_and_revise": draft_and_revise,
}
"""Their settings are numbers, of at least 1."""


def joint_play(config: EnvConfig, max_prompt_tokens: int) -> JointPlay | None:
    """What plays the episodes that ``joint_episode`` names; None where one agent plays alone.

    Raises:
        ConfigError: see ``methods.configured``; or it is no ``async def``, or a setting of our own ones is below 1.
    """
    if not config.joint_episode:
        return None
    key = f"EnvConfig.joint_episode={config.joint_episode!r}"
    method = configured("EnvConfig.joint_episode", JOINT_EPISODES, config.joint_episode, config.joint_episode_settings)
    if not inspect.iscoroutinefunction(method):
        raise ConfigError(f"{key} plays episodes, so it must be an async def")
    if config.joint_episode in JOINT_EPISODES:
        for name, value in config.joint_episode_settings.items():
            if value < 1:
                raise ConfigError(f"EnvConfig.joint_episode_settings[{name!r}]={value} must be at least 1")

    async def play_one(player: Player, problem: Problem, draw: int, number: int, samples: int) -> Any:
        together: Any = None
        try:
            async with asyncio.TaskGroup() as tasks:
                episode = JointEpisode(
                    tasks, player, problem, draw, number, samples=samples, max_prompt_tokens=max_prompt_tokens
                )
                together = await method(episode)
        except* Spoiled:
            pass
        return episode.spoiled or together

    async def play(player: Player, problem: Problem, draw: int, samples: int) -> tuple[Trajectory, ...]:
        async with asyncio.TaskGroup() as tasks:
            episodes = [
                tasks.create_task(play_one(player, problem, draw, number, samples)) for number in range(samples)
            ]
        played = [_checked(key, one.result(), draw, number) for number, one in enumerate(episodes)]
        return tuple(trajectory for together in played for trajectory in together)

    return play


def _checked(key: str, together: Any, draw: int, number: int) -> Sequence[Trajectory]:
    """What a function gave back for one episode, if it can be trained on."""
    whole = isinstance(together, list | tuple) and all(isinstance(one, Trajectory) for one in together)
    if not whole or any((one.draw, one.episode) != (draw, number) or not one.role for one in together):
        raise ConfigError(f"{key} gave {together!r:.80}; it must give a list of the trajectories it had played")
    if len({one.sample for one in together}) < len(together):
        raise ConfigError(f"{key} gave a trajectory twice; each is trained on once")
    if spoiled := [one.reward for one in together if not math.isfinite(one.reward)]:
        raise ConfigError(f"{key} gave a trajectory the reward {spoiled[0]}; it must be a number")
    return together
