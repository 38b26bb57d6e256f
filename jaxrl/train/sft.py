"""The cold start: masked cross-entropy on demonstrations, packed once, in an order that is a function of the step."""

from typing import Any

import numpy as np

from jaxrl.config import ConfigError, PreferConfig, SftConfig
from jaxrl.data import packing, recorded
from jaxrl.data.recorded import Worked
from jaxrl.records import Batch, Conversation, Demonstration, Trajectory
from jaxrl.rl.supervised import supervised_loss
from jaxrl.train.distill import distilled
from jaxrl.train.progress import RunProgress
from jaxrl.train.recorder import Recorder
from jaxrl.train.session import Session
from jaxrl.train.state import TrainState, sft_optimizer
from jaxrl.train.update import LossFunction, Updater, cross_entropy_loss

LINE_EVERY = 25
"""Steps between plain progress lines."""
SAVE_EVERY = 10
"""Steps without episodes for each step of ``CheckpointConfig.every``: they are much shorter than those with."""


def cold_start(session: Session, recorder: Recorder, progress: RunProgress, state: TrainState) -> TrainState:
    """Run the cold-start steps that remain; ``progress`` advances in place, checkpoints are written on the way."""
    config = session.config
    if progress.step >= config.sft.steps:
        return state
    recorder.view.stage("cold start", config.sft.steps, first=progress.step, every=LINE_EVERY)
    with recorder.timer.phase("pack"):
        batches = packing.pack_sequences(
            [sequence(session, worked) for worked in session.demonstrations],
            rows=config.sft.rows,
            row_tokens=config.sft.row_tokens,
            update="batch",
        )
    if crowded := session.crowding.note(config.sft, batches):
        recorder.view.note(crowded)
    supervised = supervised_loss("SftConfig.loss", config.sft.loss, config.sft.loss_settings)
    loss, teacher = distilled(session, cross_entropy_loss(session.model, supervised), "cold_start")
    updater = offline_updater(session, loss, config.sft, teacher)
    with recorder.timer.phase("compile"):
        updater.compile(state, config.sft.rows, config.sft.row_tokens)
    while progress.step < config.sft.steps:
        with recorder.timer.phase("cold start"):
            state, metrics = updater.step(state, [batch_of(batches, config.train.seed, progress.step)])
        progress.step += 1
        recorder.sft_step(progress, metrics)
        if is_saved(progress.step, config.sft.steps, config.checkpoint.every):
            recorder.save(progress, state, None, None)
    return state


def offline_updater(
    session: Session, loss: LossFunction, section: SftConfig | PreferConfig, teacher: Any = None
) -> Updater:
    """An updater for a stage that plays no episodes."""
    optimizer = session.config.optimizer
    return Updater(
        loss,
        sft_optimizer(section, optimizer, session.trained_specs),
        session.mesh,
        offload=optimizer.offload,
        base=session.base,
        teacher=teacher,
    )


def is_saved(step: int, steps: int, every: int) -> bool:
    """Whether a checkpoint is due after so many steps of such a stage."""
    return step == steps or step % (SAVE_EVERY * every) == 0


def sequence(session: Session, worked: Worked) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, [T] each, of anything that is learned from.

    Raises:
        ConfigError: an episode of a run with another tokenizer, or a control token in what the policy would write.
    """
    mask_failed = session.config.sft.mask_failed_calls
    if isinstance(worked, Demonstration):
        return session.chat.demonstration(worked, mask_failed=mask_failed)
    if isinstance(worked, Conversation):
        return session.chat.conversation(worked, mask_failed=mask_failed)
    return episode_sequence(session, worked, mask_failed=mask_failed)


def episode_sequence(
    session: Session, episode: Trajectory, *, mask_failed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, [T] each, of an episode of some run.

    Raises:
        ConfigError: it was played with another tokenizer.
    """
    if session.tokenizer.decode(episode.ids) != episode.text:
        raise ConfigError(
            f'the episode of problem "{episode.problem.id}" (draw {episode.draw}, sample {episode.sample}) was played '
            "with another tokenizer; set TokenizerConfig.path to the folder tokenizer of the run it is from"
        )
    return recorded.sequence_of(episode, mask_failed=mask_failed)


def batch_of(batches: list[Batch], seed: int, step: int) -> Batch:
    """The batch of a step: every epoch is a fresh permutation."""
    epoch, position = divmod(step, len(batches))
    return batches[np.random.default_rng((seed, epoch)).permutation(len(batches))[position]]
