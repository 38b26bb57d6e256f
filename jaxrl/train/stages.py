"""Stages of one run: limits that change at a step, problems that are dropped, optimizers that start anew."""

import contextlib
import dataclasses
from typing import Any

from jaxrl.config import Config
from jaxrl.episodes import Player
from jaxrl.train.group_queue import GroupQueue
from jaxrl.train.progress import RunProgress
from jaxrl.train.recorder import Recorder
from jaxrl.train.session import Session
from jaxrl.train.state import TrainState, copied
from jaxrl.train.update import Updater

DRAWS = 3 << 29
"""First draw number of the episodes that decide what a stage drops; keeps their random keys apart from
training's and evaluation's."""
IN_FLIGHT = 256
"""Problems begun at once while every problem of a training set is played."""


def index(config: Config, step: int) -> int:
    """Which stage a step belongs to; 0 when there are no stages."""
    return sum(step >= end for end in config.stages.until[:-1])


async def enter(
    session: Session,
    recorder: Recorder,
    progress: RunProgress,
    state: TrainState,
    reference: Any | None,
    player: Player,
    updater: Updater,
    queue: GroupQueue,
) -> tuple[TrainState, Any | None, Player]:
    """Apply the stage of ``progress.step``: its limits always, its one-time changes on its first step.

    Returns:
        State, reference, and ``player`` with the limits of the stage.
    """
    stages = session.config.stages
    if not stages.until:
        return state, reference, player
    number = index(session.config, progress.step)
    limits = dataclasses.replace(player.config, max_turns=stages.max_turns[number])
    player = dataclasses.replace(player, config=limits, max_response_tokens=stages.max_response_tokens[number])
    begins = progress.step == (0, *stages.until)[number] and progress.stage_entered < number + 1
    if not begins:
        return state, reference, player
    if stages.drop_solved[number] or stages.drop_unsolved[number]:
        await queue.discard()
        with recorder.timer.phase("choose problems"):
            progress.problems = await _choose(session, recorder, player, number)
        if progress.stream:
            remaining = session.problem_stream(dataclasses.replace(progress, stream={})).state()
            progress.stream = remaining | {"next_draw": progress.stream["next_draw"]}
    if stages.reset_optimizer[number]:
        state = updater.reset(state)
        reference = None if reference is None else copied(state.params)
    progress.stage_entered = number + 1
    return state, reference, player


async def _choose(session: Session, recorder: Recorder, player: Player, number: int) -> tuple[str, ...]:
    """Ids of the problems that the stage keeps after playing each; all problems if it would drop every one."""
    stages = session.config.stages
    to_solve, to_fail = stages.drop_solved[number], stages.drop_unsolved[number]
    draws = [(DRAWS + position, problem) for position, problem in enumerate(session.train_problems)]
    kept, solved, unsolved = [], 0, 0
    groups = session.shares.play(player, draws, max(to_solve, to_fail), in_flight=IN_FLIGHT)
    async with contextlib.aclosing(groups):
        async for group in groups:
            correct = [trajectory.correct for trajectory in group.trajectories]
            always = to_solve > 0 and all(correct[:to_solve])
            never = to_fail > 0 and not any(correct[:to_fail])
            solved += always
            unsolved += never
            if not (always or never):
                kept.append(group.problem.id)
    recorder.view.note(
        f"stage {number + 1}: {len(kept)} of {len(draws)} problems stay, {solved} always solved and {unsolved} never"
    )
    return tuple(kept) or tuple(problem.id for problem in session.train_problems)
