"""The reinforcement loop: problems → episodes → groups → select → advantages → pack → update → sync."""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np

from jaxrl.config import Config
from jaxrl.data import packing
from jaxrl.episodes import Player, play_groups
from jaxrl.evaluate.run import evaluate
from jaxrl.records import Batch, Group, Trajectory
from jaxrl.rl import algorithm, selection
from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.outcomes import Outcomes, of_trajectories
from jaxrl.train import stages
from jaxrl.train.critic import Critic
from jaxrl.train.distill import distilled
from jaxrl.train.mixture import Mixture
from jaxrl.train.progress import RunProgress
from jaxrl.train.recorder import Recorder
from jaxrl.train.session import Session, open_player, what_is_recorded
from jaxrl.train.state import TrainState
from jaxrl.train.steering import Steering
from jaxrl.train.update import Updater, over_updates, policy_gradient_loss


@dataclasses.dataclass(frozen=True)
class Collected:
    """One step's episodes: everything that was played, and what selection kept of it."""

    played: tuple[Trajectory, ...]
    selections: tuple[selection.Selection, ...]
    ahead: asyncio.Task[tuple[Group, ...]]  # groups of the next step, still being played

    @property
    def kept(self) -> tuple[selection.Selection, ...]:
        return tuple(chosen for chosen in self.selections if chosen.kept)

    @property
    def trained(self) -> tuple[Trajectory, ...]:
        return tuple(trajectory for chosen in self.kept for trajectory in chosen.kept)


async def reinforce(
    session: Session,
    recorder: Recorder,
    progress: RunProgress,
    state: TrainState,
    reference: Any | None,
    critic: Critic | None = None,
) -> TrainState:
    """Run the steps that remain and leave the run evaluated and saved; ``progress`` and ``critic`` advance in place."""
    config, timer = session.config, recorder.timer
    if progress.step >= config.train.steps and progress.after is not None:
        return state
    recorder.view.stage("reinforcement", config.train.steps, first=progress.step)
    mixture = Mixture(session)
    loss = policy_gradient_loss(session.model, config.algorithm, config.engine.temperature, mixture.loss)
    loss, teacher = distilled(session, loss, "reinforcement")
    updater = Updater(
        loss,
        session.rl_optimizer,
        session.mesh,
        session.launches,
        offload=config.optimizer.offload,
        base=session.base,
        teacher=teacher,
    )
    steering = Steering(session)
    async with contextlib.AsyncExitStack() as stack:
        with timer.phase("compile"):
            updater.compile(state, config.train.rows, config.train.row_tokens, reference, session.recorded_experts)
            steering.compile(state.params, reference)
            if critic is not None:
                critic.compile()
            weights = session.rollout_weights(state.params)
            player = await stack.enter_async_context(open_player(session, weights, progress.step))
        if progress.before is None:
            progress.before = progress.after = await measure(session, recorder, player, progress)
            recorder.save(progress, state, reference, progress.before.get("pass_rate"), critic and critic.state)
        while progress.step < config.train.steps:
            state, reference, limited = await stages.enter(
                session, recorder, progress, state, reference, player, updater
            )
            recorder.begin_step(player.engine.stats())
            updates, learned = [], {}
            async with collect(session, recorder, limited, progress) as collected:
                with timer.phase("update"):
                    values = None if critic is None else await asyncio.to_thread(critic.values, collected.trained)
                    charge = functools.partial(steering.charged, reference=reference, progress=progress)
                    packed = await asyncio.to_thread(pack, config, collected.kept, progress.memory, charge, values)
                    if critic is not None and collected.trained:
                        learned = await asyncio.to_thread(critic.learn, collected.trained, values)
                        packed = packed if progress.step >= config.critic.first_steps else []
                    packed = mixture.mixed(packed, collected.kept, progress.step)
                    for batches in await asyncio.to_thread(steering.prepared, packed, state.params, progress):
                        state, metrics = await asyncio.to_thread(updater.step, state, batches, reference)
                        updates.append(metrics)
                with timer.phase("rollout"):
                    progress.pending = await collected.ahead
            progress.step += 1
            progress.skipped_steps += not collected.kept
            with timer.phase("sync"):
                session.hand_over(state.params, player.engine, progress.step)
                reference = steering.refreshed(reference, state.params, progress.step)
            trained_on = sum(len(group.kept) for group in collected.kept)
            metrics = steering.adapt(over_updates(updates), trained_on, progress) | learned
            engine = player.engine.stats()
            recorder.rl_step(progress, collected.played, collected.selections, metrics, engine)
            evaluated = _is_due(progress.step, config.train.eval_every, config.train.steps)
            if evaluated:
                progress.after = await measure(session, recorder, player, progress)
            if evaluated or progress.step % config.checkpoint.every == 0:
                pass_rate = progress.after.get("pass_rate") if evaluated else None
                recorder.save(progress, state, reference, pass_rate, critic and critic.state)
    return state


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


async def measure(session: Session, recorder: Recorder, player: Player, progress: RunProgress) -> dict[str, Any]:
    """Evaluate the present weights, sampled and greedy, on problems never trained on."""
    config, problems = session.config.eval, session.eval_problems
    played: list[Trajectory] = []

    def note(group: Group) -> None:
        played.extend(group.trajectories)

    with recorder.timer.phase("evaluate"):
        sampled = await evaluate(player, problems, config, on_group=note)
        greedy = sampled
        if not sampled.greedy:
            greedy = await evaluate(player, problems, dataclasses.replace(config, temperature=0.0), on_group=note)
    return recorder.evaluation(progress, sampled, greedy, played)


@contextlib.asynccontextmanager
async def collect(
    session: Session, recorder: Recorder, player: Player, progress: RunProgress
) -> AsyncIterator[Collected]:
    """Play until something survives selection, drawing problems again up to ``TrainConfig.max_draws`` times.

    With ``TrainConfig.refill`` until as many groups survive as the step has problems.

    ``TrainConfig.prefetch_groups`` groups of the next step are played behind this step's own, with the present
    weights: decode slots have work while this step's stragglers wait for their tools, and they are still being played
    inside the context, during the update. Only the change of weights waits for them, so which groups are played with
    which weights does not depend on timing, and a resumed run plays the same.
    """
    train, rules = session.config.train, selection.chooser(session.config.algorithm)
    extra_samples = algorithm.extra_samples(session.config.algorithm)
    greedy_baseline, wanted = session.config.algorithm.greedy_baseline, train.problems
    stream = session.problem_stream(progress)
    played: list[Trajectory] = []
    selections: list[selection.Selection] = []
    ready = list(progress.pending)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(train.max_draws):
            with recorder.timer.phase("rollout"):
                draws = [stream.next() for _ in range(max(wanted + train.prefetch_groups - len(ready), 0))]
                groups = play_groups(
                    player, draws, train.samples, greedy_baseline=greedy_baseline, extra_samples=extra_samples
                )
                playing = await stack.enter_async_context(contextlib.aclosing(groups))
                while len(ready) < wanted:
                    ready.append(await anext(playing))
            now, ready = ready[:wanted], ready[wanted:]
            for group in now:
                rng = np.random.default_rng((train.seed, group.draw))
                selections.append(rules.choose(group.trajectories, rng))
                played += group.trajectories
            survivors = sum(bool(chosen.kept) for chosen in selections)
            wanted = train.problems - survivors if train.refill else train.problems
            if survivors and not (train.refill and wanted):
                break
            with recorder.timer.phase("rollout"):
                ready += [group async for group in playing]
        progress.stream = stream.state()
        ahead = asyncio.create_task(_all_of(ready, playing))
        stack.push_async_callback(_cancel, ahead)
        yield Collected(tuple(played), tuple(selections), ahead)


async def _all_of(ready: list[Group], playing: AsyncGenerator[Group]) -> tuple[Group, ...]:
    """The groups played already and those still being played."""
    return (*ready, *[group async for group in playing])


async def _cancel(task: asyncio.Task) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def pack(
    config: Config,
    selections: tuple[selection.Selection, ...],
    memory: dict[str, float],
    charge: Callable[[Outcomes, Sequence[Trajectory]], Outcomes] = lambda outcomes, _: outcomes,
    values: Sequence[np.ndarray] | None = None,
) -> list[list[Batch]]:
    """Micro-batches of each optimizer update: advantages by step, aggregation weights by update, fixed shapes.

    Args:
        memory: what the advantage keeps from step to step; brought up to date in place.
        charge: what rewards pay before advantages are made of them.
        values: a critic's, of each kept trajectory [T_i].
    """
    trajectories = [trajectory for group in selections for trajectory in group.kept]
    if not trajectories:
        return []
    groups = np.repeat(np.arange(len(selections)), [len(group.kept) for group in selections])
    masked = np.array([flag for group in selections for flag in group.masked or (False,) * len(group.kept)], bool)
    held = what_is_recorded(config)
    outcomes = of_trajectories(trajectories, groups, held, memory, values)
    estimate = algorithm.advantage(config.algorithm, held)(charge(outcomes, trajectories))
    memory.update(estimate.memory)
    updates = []
    for part in np.array_split(np.arange(len(selections)), config.train.updates_per_step):
        if not (members := np.flatnonzero(np.isin(groups, part) & ~masked).tolist()):
            continue
        chosen, advantages = [trajectories[i] for i in members], [estimate.values[i] for i in members]
        masks, constant_length = [trajectory.mask for trajectory in chosen], config.engine.max_response_tokens
        weights = aggregation_weights(masks, config.algorithm.aggregation, constant_length)
        rows, row_tokens = config.train.rows, config.train.row_tokens
        updates.append(
            packing.pack_trajectories(
                chosen,
                advantages,
                weights,
                rows=rows,
                row_tokens=row_tokens,
                observation_weight=config.mix.observation_weight,
            )
        )
    return updates
