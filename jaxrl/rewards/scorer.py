"""The reward of a trajectory: named components, their weights, and a judge that may be asked about correct answers."""

import asyncio
import concurrent.futures
import dataclasses
import inspect
import logging
import threading
import typing
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from jaxrl.config import ConfigError, RewardConfig, nearest
from jaxrl.records import Problem, Trajectory
from jaxrl.rewards.components import COMPONENTS, OF_MODELS, correct
from jaxrl.rewards.graded import Graded
from jaxrl.rewards.learned import check_folder, loaded
from jaxrl.rl.example import example
from jaxrl.rl.methods import configured
from jaxrl.rl.trial import described, numeric, tried

JUDGE_FAILED = "judge_failed"
"""Logged beside the components where a judge was asked: 1 where it gave no reply."""

Component = Callable[[Graded], Any]
Judge = Callable[[Trajectory], Any]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """What a run rewards. Made by ``scorer``.

    Attributes:
        components: by name.
        weights: of the components, by name.
        of_turns: names of components that reward single turns.
        judge: asked about trajectories that are correct; None = nobody is.
        judge_seconds: how long it may take.
        models: folders of the reward models that components ask.
    """

    components: Mapping[str, Component]
    weights: Mapping[str, float]
    of_turns: frozenset[str] = frozenset()
    judge: Judge | None = None
    judge_seconds: float = 60.0
    models: tuple[str, ...] = ()

    def compile(self, longest: int) -> None:
        """Read and compile the reward models, for episodes of at most ``longest`` tokens with their prompts."""
        for folder in self.models:
            loaded(folder).compile(longest)

    def unjudged(self) -> "Scorer":
        """The same without a judge, for trajectories that are not trained on."""
        return dataclasses.replace(self, judge=None)

    async def score(self, trajectory: Trajectory, max_response_tokens: int) -> Trajectory:
        """The trajectory with its reward, its components, and what its turns earned.

        A component that gives None or nan adds nothing and stays out of them. A trajectory that cannot be trained on
        has reward 0 and no components. A judge that fails, or is late, has said nothing.
        """
        if not trajectory.trainable:
            return trajectory
        judgement, told = None, {}
        if self.judge is not None and trajectory.correct:
            judgement = await self._ask(trajectory)
            told = {JUDGE_FAILED: float(judgement is None)}
        graded = Graded(trajectory, max_response_tokens, judgement)
        values = {name: component(graded) for name, component in self.components.items()}
        values = {name: await value if inspect.isawaitable(value) else value for name, value in values.items()}
        given = {name: _numbers(name, value, trajectory) for name, value in values.items() if value is not None}
        given = {name: value for name, value in given.items() if not np.isnan(value).any()}
        for name, value in given.items():
            _check_shape(name, value, trajectory, of_turns=name in self.of_turns)
        earned = sum(self.weights[name] * value for name, value in given.items() if name in self.of_turns)
        whole = sum(self.weights[name] * value for name, value in given.items() if name not in self.of_turns)
        return dataclasses.replace(
            trajectory,
            reward=float(whole),
            components={name: float(value.sum()) for name, value in given.items()} | told,
            turns=_with_rewards(trajectory, np.broadcast_to(earned, trajectory.policy_turns)),
        )

    async def _ask(self, trajectory: Trajectory) -> str | None:
        try:
            async with asyncio.timeout(self.judge_seconds):
                reply = await _called(self.judge, trajectory)
            return None if reply is None else str(reply)
        except Exception as error:  # whatever a judge does wrong must not cost the policy its reward
            logging.getLogger(__name__).warning("the judge gave no reply: %s: %s", type(error).__name__, error)
            return None


CORRECTNESS = Scorer({"correct": correct}, {"correct": 1.0})
"""1 for a correct answer, 0 for any other."""


def component_names(config: RewardConfig) -> list[str]:
    """What the components are called in ``Trajectory.components``: without the file of a function of the user's."""
    return [name.rpartition(":")[2] for name in config.components]


def scorer(config: RewardConfig, problem: Problem | None = None) -> Scorer:
    """What ``components`` and ``judge`` name.

    Args:
        problem: one of the run's, on which a component of the user's must not raise anything; None = components are
            tried on a problem of ours, whose form they need not know.

    Raises:
        ConfigError: see ``methods.configured`` and ``trial.tried``; two components of one name; a setting of one that
            is not there; ``flawed_positive`` without a judge; a folder without a reward model; a component that gives
            back something else than a number or one for each turn.
    """
    key = "RewardConfig.components"
    settings: dict[str, dict[str, Any]] = {name: {} for name in config.components}
    short = dict(zip(component_names(config), settings, strict=True))
    if len(short) < len(settings):
        raise ConfigError(f"{key} has two components of one name: {', '.join(settings)}; rename a function of yours")
    for setting, value in config.component_settings.items():
        component, dot, field = setting.rpartition(".")
        if not dot or component not in short:
            raise ConfigError(
                f"unknown key {setting!r} in RewardConfig.component_settings{nearest(component, short)}; "
                f'it is "COMPONENT.SETTING", of one of {", ".join(short)}'
            )
        settings[short[component]][field] = value
    if "flawed_positive" in settings and not config.judge:
        raise ConfigError(
            "RewardConfig.components names flawed_positive, which takes a judge; "
            'set RewardConfig.judge="path/to/file.py:function"'
        )
    if config.judge and ":" not in config.judge:
        raise ConfigError(f'RewardConfig.judge={config.judge!r} must be a function, as "path/to/file.py:function"')
    components = {name: configured(key, COMPONENTS, full, settings[full]) for name, full in short.items()}
    models = tuple(str(settings[name].get("folder", "")) for name in OF_MODELS if name in settings)
    for folder in models:
        check_folder(folder)
    return Scorer(
        components=components,
        weights={name: config.components[full] for name, full in short.items()},
        of_turns=frozenset(name for name, full in short.items() if _rewards_turns(full, components[name], problem)),
        judge=configured("RewardConfig.judge", {}, config.judge, {}) if config.judge else None,
        judge_seconds=config.judge_seconds,
        models=models,
    )


async def _called(judge: Judge, trajectory: Trajectory) -> Any:
    """What a judge says. A plain function is called in a thread of its own, since it may wait for a server: neither
    other episodes nor the end of the run wait for one that hangs."""
    if inspect.iscoroutinefunction(getattr(judge, "func", judge)):
        return await judge(trajectory)
    said: concurrent.futures.Future[Any] = concurrent.futures.Future()
    said.set_running_or_notify_cancel()

    def call() -> None:
        try:
            said.set_result(judge(trajectory))
        except Exception as error:
            said.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    reply = await asyncio.wrap_future(said)
    return await reply if inspect.isawaitable(reply) else reply


def _rewards_turns(full: str, component: Component, problem: Problem | None) -> bool:
    """Whether a component gives one number for each turn, tried on examples; of an asynchronous one, which may ask a
    server, the return type says it."""
    function = getattr(component, "func", component)
    if inspect.iscoroutinefunction(function):
        return typing.get_type_hints(function).get("return") is np.ndarray
    name, trajectories = full.rpartition(":")[2], [example(0), example(1)]
    if problem is not None:
        trajectories = [dataclasses.replace(one, problem=problem) for one in trajectories]
    must_give = problem is not None and ":" in full
    given = [(_on_trial(full, component, one, must_give=must_give), one) for one in trajectories]
    numbers = [(_numbers(name, value, one), one) for value, one in given if value is not None]
    of_turns = any(value.ndim for value, _ in numbers)
    for value, one in numbers:
        if not np.isnan(value).any():
            _check_shape(name, value, one, of_turns=of_turns)
    return of_turns


def _on_trial(full: str, component: Component, trajectory: Trajectory, *, must_give: bool) -> Any:
    """What a component gives for a trajectory; None where it cannot say, unless it must."""
    try:
        value = tried("RewardConfig.components", full, component, Graded(trajectory, max_response_tokens=8))
    except Exception as error:
        if must_give or isinstance(error.__cause__, ConfigError):  # the latter: its settings
            raise
        return None  # it may know problems of its own form only
    return None if inspect.isawaitable(value) else value


def _numbers(name: str, value: Any, trajectory: Trajectory) -> np.ndarray:
    if not numeric(value):
        _refuse(name, value, trajectory)
    return np.asarray(value, np.float64)


def _check_shape(name: str, value: np.ndarray, trajectory: Trajectory, *, of_turns: bool) -> None:
    if value.shape != ((trajectory.policy_turns,) if of_turns else ()):
        _refuse(name, value, trajectory)


def _refuse(name: str, value: Any, trajectory: Trajectory) -> NoReturn:
    raise ConfigError(
        f"RewardConfig.components: {name} gave {described(value)} for a trajectory of {trajectory.policy_turns} policy "
        "turns; it must give a number or None, or else always an array with one number for each policy turn"
    )


def _with_rewards(trajectory: Trajectory, earned: np.ndarray) -> tuple:
    rewards = iter(earned.tolist())
    return tuple(
        dataclasses.replace(turn, reward=next(rewards)) if turn.author == "policy" else turn
        for turn in trajectory.turns
    )
