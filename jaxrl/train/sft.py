"""The cold start: masked cross-entropy on demonstrations, packed once, in an order that is a function of the step."""

import numpy as np

from jaxrl.data import packing
from jaxrl.records import Batch
from jaxrl.train.progress import RunProgress
from jaxrl.train.recorder import Recorder
from jaxrl.train.session import Session
from jaxrl.train.state import TrainState, sft_optimizer
from jaxrl.train.update import Updater, cross_entropy_loss

LINE_EVERY = 25
"""Steps between plain progress lines."""
SAVE_EVERY = 10
"""Cold-start steps for each step of ``CheckpointConfig.every``: they are much shorter than those of reinforcement."""


def cold_start(session: Session, recorder: Recorder, progress: RunProgress, state: TrainState) -> TrainState:
    """Run the cold-start steps that remain; ``progress`` advances in place, checkpoints are written on the way."""
    config = session.config
    if progress.step >= config.sft.steps:
        return state
    recorder.view.stage("cold start", config.sft.steps, first=progress.step, every=LINE_EVERY)
    with recorder.timer.phase("pack"):
        sequences = [session.chat.demonstration(demonstration) for demonstration in session.demonstrations]
        batches = packing.pack_sequences(
            sequences, rows=config.sft.rows, row_tokens=config.sft.row_tokens, update="batch"
        )
    updater = Updater(
        cross_entropy_loss(session.model),
        sft_optimizer(config.sft, config.optimizer, session.trained_specs),
        session.mesh,
        offload=config.optimizer.offload,
        base=session.base,
    )
    with recorder.timer.phase("compile"):
        updater.compile(state, config.sft.rows, config.sft.row_tokens)
    while progress.step < config.sft.steps:
        with recorder.timer.phase("cold start"):
            state, metrics = updater.step(state, [_batch(batches, config.train.seed, progress.step)])
        progress.step += 1
        recorder.sft_step(progress, metrics)
        last = progress.step == config.sft.steps
        if last or progress.step % (SAVE_EVERY * config.checkpoint.every) == 0:
            recorder.save(progress, state, None, None)
    return state


def _batch(batches: list[Batch], seed: int, step: int) -> Batch:
    """The batch of a step: every epoch is a fresh permutation."""
    epoch, position = divmod(step, len(batches))
    return batches[np.random.default_rng((seed, epoch)).permutation(len(batches))[position]]
