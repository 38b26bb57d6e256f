"""The reinforcement loop: problems → episodes → groups → select → advantages → pack → update → sync."""

import asyncio
import contextlib
import dataclasses
import itertools
from typing import Any

from jaxrl.data.tree_packing import figures, sharing_of
from jaxrl.episodes import Player
from jaxrl.evaluate.run import evaluate
from jaxrl.records import Group, Trajectory
from jaxrl.rl.correction import of_narrow_pages
from jaxrl.train import stages
from jaxrl.train.collect import collect, open_queue
from jaxrl.train.critic import Critic
from jaxrl.train.distill import distilled
from jaxrl.train.methods import methods_of
from jaxrl.train.mixture import Mixture
from jaxrl.train.pack import earned, pack, ranked_in_parts
from jaxrl.train.progress import RunProgress
from jaxrl.train.recorder import Recorder
from jaxrl.train.session import Session, open_player
from jaxrl.train.state import TrainState
from jaxrl.train.steering import Steering
from jaxrl.train.update import Updater, over_updates, policy_gradient_loss


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
    for warning in filter(None, (ranked_in_parts(config), of_narrow_pages(config))):
        recorder.view.note(warning)
    mixture, methods = Mixture(session), methods_of(config)
    loss = policy_gradient_loss(session.model, config.algorithm, config.engine.temperature, mixture.loss)
    loss, teacher = distilled(session, loss, "reinforcement")
    updater = Updater(
        loss,
        session.rl_optimizer,
        session.mesh,
        session.launches,
        offload=config.optimizer.offload,
        experts=session.recorded_experts,
        sharing=sharing_of(config.train),
        base=session.base,
        teacher=teacher,
        pooled=True,
    )
    steering = Steering(session)
    async with contextlib.AsyncExitStack() as stack:
        with timer.phase("compile"):
            updater.compile(state, config.train.rows, config.train.row_tokens, reference)
            steering.compile(state.params, reference)
            if critic is not None:
                critic.compile()
            weights = session.rollout_weights(state.params)
            player = await stack.enter_async_context(open_player(session, weights, progress.step))
        queue = open_queue(config, progress, session.shares.play_group, session.shares.agree)
        await stack.enter_async_context(contextlib.aclosing(queue))
        if progress.before is None:
            progress.before = progress.after = await measure(session, recorder, player, progress)
            recorder.save(progress, state, reference, progress.before.get("pass_rate"), critic and critic.state)
        while progress.step < config.train.steps:
            state, reference, limited = await stages.enter(
                session, recorder, progress, state, reference, player, updater, queue
            )
            recorder.begin_step(player.engine.stats())
            collected = await collect(session, recorder, queue, limited, progress, methods.rules)
            updates, learned = [], {}
            with timer.phase("update"):
                values = None if critic is None else await asyncio.to_thread(critic.values, collected.trained)
                outcomes = earned(methods.recorded, collected.kept, progress.memory, values)
                scored = collected.trained, state.params, reference, progress
                outcomes = await asyncio.to_thread(steering.seen, outcomes, *scored)
                packed = await asyncio.to_thread(pack, config, collected.kept, progress.memory, outcomes, methods)
                shared = figures(packed)
                if critic is not None and collected.trained:
                    learned = await asyncio.to_thread(critic.learn, collected.trained, outcomes)
                    packed = packed if progress.step >= config.critic.first_steps else []
                packed = mixture.mixed(packed, collected.kept, progress.step)
                if crowded := session.crowding.note(config.train, itertools.chain(*packed)):
                    recorder.view.note(crowded)
                for prepared in await asyncio.to_thread(steering.prepared, packed, state.params, progress):
                    batches = await asyncio.to_thread(steering.completed, prepared, state.params, reference)
                    state, metrics = await asyncio.to_thread(updater.step, state, batches, reference)
                    updates.append(metrics)
            if not config.train.max_staleness:
                with timer.phase("rollout"):
                    await queue.settle()
            progress.step += 1
            progress.skipped_steps += not collected.kept
            progress.too_old += collected.too_old
            with timer.phase("sync"):
                await session.hand_over(state.params, player.engine, progress.step)
                reference = steering.refreshed(reference, state.params, progress.step)
            trained_on = sum(len(group.kept) for group in collected.kept)
            metrics = (
                steering.adapt(over_updates(updates), trained_on, progress) | learned | shared | collected.staleness
            )
            engine = player.engine.stats()
            recorder.rl_step(progress, collected.played, collected.selections, metrics, engine)
            evaluated = _is_due(progress.step, config.train.eval_every, config.train.steps)
            if evaluated:
                progress.after = await measure(session, recorder, player, progress)
            if evaluated or progress.step % config.checkpoint.every == 0:
                progress.pending, progress.unfinished = queue.pending, queue.unfinished
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
        sampled = await evaluate(player, problems, config, on_group=note, play=session.shares.play)
        greedy = sampled
        if not sampled.greedy:
            config = dataclasses.replace(config, temperature=0.0)
            greedy = await evaluate(player, problems, config, on_group=note, play=session.shares.play)
    return recorder.evaluation(progress, sampled, greedy, played)
