"""One step's episodes: groups out of the queue, and what selection keeps of them."""

import dataclasses
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np

from jaxrl.config import Config
from jaxrl.episodes import Player, play_group
from jaxrl.records import Group, Trajectory
from jaxrl.rl import algorithm, selection, staleness
from jaxrl.train.group_queue import Choice, GroupQueue, alone
from jaxrl.train.joint_episodes import joint_play
from jaxrl.train.progress import RunProgress
from jaxrl.train.recorder import Recorder
from jaxrl.train.session import Session


@dataclasses.dataclass(frozen=True)
class Collected:
    """One step's episodes: everything that was played, and what selection kept of it."""

    played: tuple[Trajectory, ...]
    selections: tuple[selection.Selection, ...]
    too_old: int  # trajectories that were played and dropped
    staleness: dict[str, float]  # see ``rl.staleness.figures``

    @property
    def kept(self) -> tuple[selection.Selection, ...]:
        return tuple(chosen for chosen in self.selections if chosen.kept)

    @property
    def trained(self) -> tuple[Trajectory, ...]:
        return tuple(trajectory for chosen in self.kept for trajectory in chosen.kept)


def open_queue(
    config: Config,
    progress: RunProgress,
    play: Callable[..., Coroutine[Any, Any, Group]] = play_group,
    agree: Callable[[Choice], Awaitable[list[int]]] = alone,
) -> GroupQueue:
    """The groups that wait to be trained on, as a run left them.

    Args:
        play: called as ``play_group`` is.
        agree: as for ``GroupQueue``, where it matters.
    """
    play = functools.partial(
        play,
        samples=config.train.samples,
        greedy_baseline=config.algorithm.greedy_baseline,
        extra_samples=algorithm.extra_samples(config.algorithm),
        joint=joint_play(config.env, config.engine.max_prompt_tokens),
    )
    finished_first = config.train.next_groups == "finished"
    return GroupQueue(
        play,
        finished_first=finished_first,
        agree=agree if finished_first else alone,  # the order of the draws is the same everywhere
        pending=progress.pending,
        unfinished=progress.unfinished,
    )


async def collect(
    session: Session,
    recorder: Recorder,
    queue: GroupQueue,
    player: Player,
    progress: RunProgress,
    rules: selection.Chooser,
) -> Collected:
    """Take groups until something survives selection, drawing problems again up to ``TrainConfig.max_draws`` times.

    With ``TrainConfig.refill`` until as many groups survive as the step has problems.

    The queue is filled first, with the present weights. Synchronously it holds the step's own groups and
    ``TrainConfig.prefetch_groups`` of the next step behind them: decode slots have work while this step's stragglers
    wait for their tools and during the update. Only the change of weights waits for them, so which groups are played
    with which weights does not depend on timing, and a resumed run plays the same. Asynchronously it holds the groups
    of ``TrainConfig.max_staleness`` further steps, and nothing waits for them: since as many are begun with each
    version as a step trains on, none that is trained on in the order of the draws is older than that.
    """
    train = session.config.train
    ahead, wanted = train.problems * train.max_staleness + train.prefetch_groups, train.problems
    limit = max(train.max_staleness, int(train.prefetch_groups > 0))
    played: list[Trajectory] = []
    fresh: list[Trajectory] = []
    selections: list[selection.Selection] = []
    for _ in range(train.max_draws):
        with recorder.timer.phase("rollout"):
            stream = session.problem_stream(progress)
            again = [(draw, stream.problem(draw)) for draw in queue.unbegun]
            queue.begin(player, [*again, *(stream.next() for _ in range(wanted + ahead - len(queue)))])
            progress.stream = stream.state()
            groups = await queue.take(wanted)
        for group in groups:
            rng = np.random.default_rng((train.seed, group.draw))
            young = staleness.young(group.trajectories, progress.step, limit)
            selections.append(rules.choose(young, rng))
            played += group.trajectories
            fresh += young
        survivors = sum(bool(chosen.kept) for chosen in selections)
        wanted = train.problems - survivors if train.refill else train.problems
        if survivors and not (train.refill and wanted):
            break
    too_old = len(played) - len(fresh)
    return Collected(tuple(played), tuple(selections), too_old, staleness.figures(fresh, too_old, progress.step))
