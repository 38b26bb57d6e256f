"""``jaxrl prefer``: training on answers that were compared or judged. Started again on its folder, it goes on."""

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrl.config import Config, ConfigError
from jaxrl.data import packing, preferences
from jaxrl.data.preferences import Answer, Preference
from jaxrl.observe.metrics import PhaseTimer
from jaxrl.observe.progress import Progress
from jaxrl.observe.report import SUMMARY_FILE
from jaxrl.records import Batch, Conversation, Trajectory
from jaxrl.rl.preference import VALUED
from jaxrl.train import experiment
from jaxrl.train.attention import packed_kernels
from jaxrl.train.checkpoint import Checkpoints
from jaxrl.train.preference_loss import method, preference_loss, score_loss
from jaxrl.train.progress import RunProgress
from jaxrl.train.recorder import Recorder
from jaxrl.train.run import RunError, open_run
from jaxrl.train.session import Session, open_offline_session
from jaxrl.train.sft import batch_of, episode_sequence, is_saved, offline_updater
from jaxrl.train.state import TrainState

LOG = logging.getLogger(__name__)
LINE_EVERY = 25
"""Steps between plain progress lines."""


def packed(session: Session, rows: Sequence[Preference], note: Callable[[str], None] = LOG.warning) -> list[Batch]:
    """Packed rows: the chosen and the rejected answers, or judged answers and those to another prompt, or steps.

    Episodes that a row cannot hold are left out, for nobody can take them out of a run's folder; rows of files are not.

    Args:
        note: is told how many were left out.

    Raises:
        ConfigError: a row of a file does not fit into a packed row, or no episode does.
    """
    config = session.config.prefer
    shape = {"rows": config.rows, "row_tokens": config.row_tokens}

    def sequence(index: int, number: int, of: Preference | None = None) -> tuple[np.ndarray, np.ndarray]:
        return _answered(session, rows[index], (of or rows[index]).answers[number], f"{config.data}, row {index}")

    if config.kind == "process":
        return packing.pack_steps([_steps(session, row) for row in rows], **shape)
    if config.kind == "judged":
        others = preferences.unrelated(config, rows)
        couples = [(sequence(index, 0), sequence(index, 0, other)) for index, other in enumerate(others)]
    else:
        couples = [(sequence(index, 0), sequence(index, 1)) for index in range(len(rows))]
    lengths = [sum(len(ids) for ids, _ in couple) for couple in couples]
    played = [isinstance(row.answers[0], Trajectory) for row in rows]
    chosen = [i for i, length in enumerate(lengths) if not played[i] or length <= config.row_tokens]
    if len(chosen) < len(rows):
        longer = f"{len(rows) - len(chosen)} of {len(rows)} couples of episodes"
        if not chosen:
            raise ConfigError(
                f"{config.data}: {longer} have more than PreferConfig.row_tokens={config.row_tokens} tokens, the "
                f"shortest {min(lengths)}; raise it"
            )
        note(f"left out: {longer}, with more than PreferConfig.row_tokens={config.row_tokens} tokens")
    signs = [1.0 if rows[i].good else -1.0 for i in chosen]
    return packing.pack_couples([couples[i] for i in chosen], signs, **shape, learned_weight=config.sft_weight)


def _answered(session: Session, row: Preference, answer: Answer, place: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a row's prompt with an answer, which may have been given to another prompt."""
    if not isinstance(answer, Trajectory):
        return session.chat.conversation(Conversation(place, (*row.prompt, *answer)))
    own = row.answers[0]
    if isinstance(own, Trajectory):
        before = own.prompt_ids
    else:
        before, _ = session.chat.conversation(Conversation(place, row.prompt))
    return episode_sequence(session, dataclasses.replace(answer, prompt_ids=before))


def _steps(session: Session, row: Preference) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a prompt and an answer in steps, each tokenised by itself, and the sign of each step on its last token."""
    ids = session.chat.conversation(Conversation("prompt", row.prompt))[0].tolist()
    signs = [0] * len(ids)
    for text, right in row.steps:
        written = session.tokenizer.encode(text, special=True)
        ids += written
        signs += [0] * (len(written) - 1) + [1 if right else -1] if written else []
    return np.asarray(ids, np.int32), np.asarray(signs, np.int8)


def prefer(config: Config, folder: pathlib.Path, view: Progress, *, which: str = "latest") -> dict[str, Any]:
    """Train in ``folder`` until the configured steps are done; returns what stands in its summary.json.

    Args:
        which: the checkpoint to go on from, as for ``Checkpoints.find``; newer ones are removed.

    Raises:
        ConfigError, DataError, RunError, CheckpointError: before anything is compiled or lost, with the remedy.
    """
    timer = PhaseTimer(view.phase)
    method(config.prefer)
    with open_run(folder) as run, contextlib.closing(Checkpoints(run.checkpoints, config.checkpoint)) as checkpoints:
        with timer.phase("prepare"):
            rows, held_out = preferences.load(config.prefer, config.data.seed)
            session = open_offline_session(config, run, preferences.texts_of(rows), valued=config.prefer.kind in VALUED)
            step = checkpoints.latest() if which == "latest" else checkpoints.find(which)
            session = session.on_base(kept=step is not None, on_bytes=experiment.shown_in(view))
            if step is None:
                progress, state, reference = experiment.beginning(session, experiment.shown_in(view), stage="prefer")
            else:
                progress, state, reference = experiment.restore(session, checkpoints, step)
            if progress.stage != "prefer":
                raise RunError(f"{folder} is a run of `jaxrl train`; export it, and start from there in a new --run")
            session.keep_tokenizer()
            if step is None:
                session.keep_base()
            kernels = packed_kernels(session.model, session.mesh, (config.prefer,))
            for line in (*run.write_config(config), *run.write_kernels(kernels)):
                view.note(f"changed since the last start: {line}")
            run.go_back(step, progress.global_step)
            if step is not None:
                checkpoints.rewind(step)
        recorder = Recorder(config, run, view, timer, progress, checkpoints)
        try:
            state = _learn(session, recorder, progress, state, reference, rows, held_out)
            with timer.phase("export"):
                experiment.export(session, state.params, run.export, on_bytes=experiment.shown_in(view))
            recorder.settle(progress)
        finally:
            recorder.close()
        checkpoints.wait()
        summary = {"steps": progress.step, "before": progress.before, "after": progress.after}
        summary |= {"export": str(run.export), "seconds_by_phase": progress.seconds}
        (run.path / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        return summary


def _learn(
    session: Session,
    recorder: Recorder,
    progress: RunProgress,
    state: TrainState,
    reference: Any | None,
    rows: Sequence[Preference],
    held_out: Sequence[Preference],
) -> TrainState:
    config, timer = session.config, recorder.timer
    section = config.prefer
    recorder.view.stage("preferences", section.steps, first=progress.step, every=LINE_EVERY)
    with timer.phase("pack"):
        note = recorder.view.note
        batches, measured = packed(session, rows, note), packed(session, held_out, note) if held_out else []
        if crowded := session.crowding.note(section, (*batches, *measured)):
            note(crowded)
        couples = max(int(batch.segment_ids.max()) // 2 for batch in (*batches, *measured))
    loss = (score_loss if section.kind in VALUED else preference_loss)(session.model, section, couples)
    updater = offline_updater(session, loss, section)

    def measure() -> dict[str, float]:
        with timer.phase("measure"):
            values = updater.measure(state.params, measured, reference) if measured else {}
        recorder.measurement(progress, values)
        return values

    with timer.phase("compile"):
        updater.compile(state, section.rows, section.row_tokens, reference)
    if progress.before is None:
        progress.before = progress.after = measure()
    while progress.step < section.steps:
        with timer.phase("preferences"):
            batch = batch_of(batches, config.train.seed, progress.step)
            state, metrics = updater.step(state, [batch], reference)
        progress.step += 1
        recorder.offline_step(progress, "prefer", metrics)
        last = progress.step == section.steps
        if last or (section.measure_every and progress.step % section.measure_every == 0):
            progress.after = measure()
        if is_saved(progress.step, section.steps, config.checkpoint.every):
            recorder.save(progress, state, reference, None)
    return state
