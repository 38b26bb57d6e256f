"""A whole run: cold start, reinforcement, export, report. Started again on its folder, it goes on where it stood."""

import asyncio
import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import optax

from jaxrl import mesh as meshes
from jaxrl.config import Config, MeshConfig
from jaxrl.model import adapter_folder, companions, hf, spec, value
from jaxrl.model.folders import together
from jaxrl.observe import alarms
from jaxrl.observe.metrics import PhaseTimer
from jaxrl.observe.progress import Progress
from jaxrl.observe.report import Comparison, Estimate, Report, write_summary
from jaxrl.processes.exchange import is_first
from jaxrl.rl.preference import VALUED, needs_reference
from jaxrl.rl.targets import keeps_reference
from jaxrl.train.checkpoint import Checkpoints
from jaxrl.train.critic import Critic, abstract_critic, new_critic
from jaxrl.train.loop import reinforce
from jaxrl.train.progress import RunProgress, Stage
from jaxrl.train.recorder import Recorder
from jaxrl.train.run import RunError, open_run
from jaxrl.train.session import Session, open_session
from jaxrl.train.sft import cold_start
from jaxrl.train.shares import known_here
from jaxrl.train.state import (
    HOST,
    TrainState,
    abstract_params,
    abstract_state,
    copied,
    in_memory,
    new_state,
    restarted,
    sft_optimizer,
)


def train(
    config: Config, folder: pathlib.Path, view: Progress, *, cold_start_only: bool = False, which: str = "latest"
) -> Report:
    """Train in ``folder`` until the configured steps are done.

    Args:
        which: the checkpoint to go on from, as for ``Checkpoints.find``; newer ones are removed.

    Raises:
        ConfigError, RunError, CheckpointError: before anything is compiled or lost, with the remedy.
    """
    timer = PhaseTimer(view.phase)
    with open_run(folder) as run, contextlib.closing(Checkpoints(run.checkpoints, config.checkpoint)) as checkpoints:
        with timer.phase("prepare"):
            session = open_session(config, run)
            step = checkpoints.latest() if which == "latest" else checkpoints.find(which)
            session = session.on_base(kept=step is not None, on_bytes=shown_in(view))
            progress, state, reference = (
                beginning(session, shown_in(view)) if step is None else restore(session, checkpoints, step)
            )
            if progress.stage == "prefer":
                raise RunError(f"{folder} is a run of `jaxrl prefer`; start from its export in a new --run")
            if progress.stage == "rl":
                session.problem_stream(progress)  # refuses data that is not the run's
            if not cold_start_only:
                asyncio.run(session.check_sandbox())
            session.keep_tokenizer()
            if step is None:
                session.keep_base()
            if session.base is not None:
                trained, frozen = spec.count(session.trained_specs), spec.count(session.specs)
                view.note(f"adapters: {trained:,} trained parameters on {frozen:,} frozen ones")
            with together("prepare"):
                if is_first():
                    for line in (*run.write_config(config), *run.write_kernels(session.kernels())):
                        view.note(f"changed since the last start: {line}")
                    run.go_back(step, progress.global_step)
            if step is not None and (removed := checkpoints.rewind(step)):
                view.note(f"going back to checkpoint {step}: removed {', '.join(map(str, removed))}")
        if progress.stage == "rl" and progress.step >= config.train.steps and not cold_start_only:
            view.note(f"{progress.step} steps are done, TrainConfig.steps={config.train.steps}: nothing to train")
        recorder = Recorder(config, run, view, timer, progress, checkpoints)
        try:
            if progress.stage == "sft":
                state = cold_start(session, recorder, progress, state)
            if progress.stage == "sft" and not cold_start_only:
                progress.begin_reinforcement()
                offload = config.optimizer.offload
                state = restarted(state, session.rl_optimizer, session.mesh, offload=offload)
                reference = copied(state.params) if keeps_reference(config.algorithm) else None
            if not cold_start_only:
                critic = _critic(session, checkpoints, step, state.params) if config.critic.enabled else None
                state = asyncio.run(reinforce(session, recorder, progress, state, reference, critic))
            with timer.phase("export"):
                export(session, state.params, run.export, on_bytes=shown_in(view))
            recorder.settle(progress)
        finally:
            recorder.close()
        checkpoints.wait()
        report = _report(session, progress)
        if is_first():
            write_summary(run.path, report)
        return report


def export(
    session: Session,
    params: Any,
    folder: pathlib.Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = hf.MAX_FILE_BYTES,
    on_bytes: hf.OnBytes = hf.ignore,
) -> hf.Exported:
    """Write model and tokenizer as a folder that ``transformers`` loads, with adapters merged into the weights; see
    ``hf.save_folder``. A value head has a file of its own there."""
    tokenizer, source = session.tokenizer, session.run.source
    if session.base is not None:
        params = _merged(session, params)
    head = params[value.HEAD] if session.valued else None

    def companion_files(staging: pathlib.Path) -> None:
        companions.restore(source, staging)
        session.chat.save(staging)
        if head is not None:
            value.save_head(staging, head)

    return hf.save_folder(
        folder,
        session.model,
        params[value.DECODER] if session.valued else params,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
        generation=companions.generation_config(source),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        also=companion_files,
        on_bytes=on_bytes,
    )


def shown_in(view: Progress) -> hf.OnBytes:
    """Shows how far a transfer is as the detail of the view's phase."""
    return lambda what, done, total: view.detail(f"{done / 1e9:,.2f} of {total / 1e9:,.2f} GB {what}")


def export_adapter(session: Session, adapters: Any, folder: pathlib.Path) -> None:
    """Write adapters and tokenizer as a folder that ``peft`` loads."""
    lora, base = session.config.lora, session.config.model.path
    adapter_folder.save_adapter(folder, lora, session.trained_specs, adapters, base, also=session.chat.save)


def restore(session: Session, checkpoints: Checkpoints, step: int) -> tuple[RunProgress, TrainState, Any | None]:
    """What a checkpoint holds, placed on this session's mesh, whatever mesh it was saved from."""
    progress = RunProgress.from_json(checkpoints.host(step))
    progress = progress.with_played(checkpoints.played(step, known_here))
    optimizer, wants_reference = _needs(session, progress.stage)
    target = abstract_state(session.trained_specs, optimizer, session.mesh)
    state, reference = checkpoints.restore(step, target, target.params if wants_reference else None)
    if session.config.optimizer.offload:
        state = state.replace(opt_state=in_memory(state.opt_state, HOST))
    return progress, state, reference


def as_saved(session: Session, checkpoints: Checkpoints, step: int) -> Session:
    """The session for what a checkpoint holds: a policy, or a decoder with a value head."""
    preferred = RunProgress.from_json(checkpoints.host(step)).stage == "prefer"
    return dataclasses.replace(session, valued=preferred and session.config.prefer.kind in VALUED)


def restore_params(session: Session, checkpoints: Checkpoints, step: int) -> Any:
    """The trained parameters alone of a checkpoint, placed on this session's mesh."""
    return checkpoints.params(step, abstract_params(session.trained_specs, session.mesh))


def beginning(
    session: Session, on_bytes: hf.OnBytes = hf.ignore, stage: Stage | None = None
) -> tuple[RunProgress, TrainState, Any | None]:
    """Where a new run starts: in ``stage``, or in the first that `jaxrl train` goes through."""
    stage = stage or ("sft" if session.config.sft.demonstrations else "rl")
    params = session.first_params(on_bytes) if session.base is None else session.first_adapters()
    optimizer, wants_reference = _needs(session, stage)
    reference = copied(params) if wants_reference else None
    state = new_state(params, optimizer, session.mesh, offload=session.config.optimizer.offload)
    return RunProgress(stage=stage), state, reference


def _needs(session: Session, stage: Stage) -> tuple[optax.GradientTransformation, bool]:
    """The optimizer of a stage, and whether it keeps a reference."""
    config = session.config
    if stage == "rl":
        return session.rl_optimizer, keeps_reference(config.algorithm)
    section, reference = (config.prefer, needs_reference(config.prefer)) if stage == "prefer" else (config.sft, False)
    return sft_optimizer(section, config.optimizer, session.trained_specs), reference


def _critic(session: Session, checkpoints: Checkpoints, step: int | None, policy: Any) -> Critic:
    """The critic of a checkpoint, or a new one where reinforcement begins."""
    state = None if step is None else checkpoints.critic(step, abstract_critic(session))
    if state is None:
        return new_critic(session, policy)
    if session.config.optimizer.offload:
        state = state.replace(opt_state=in_memory(state.opt_state, HOST))
    return Critic(session, state)


def _merged(session: Session, adapters: Any) -> Any:
    """Floats with the adapters in them; on the host where the base is in codes because floats might not fit."""
    mesh, base = session.mesh, session.base
    if session.config.lora.base != "none" and jax.process_count() == 1:
        mesh = meshes.make_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
        everything = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        base, adapters = jax.device_put((base, adapters), everything)
    with jax.set_mesh(mesh):
        return base.merged(adapters)


def _report(session: Session, progress: RunProgress) -> Report:
    before, after = progress.before or {}, progress.after or {}
    first = before.get("estimates", {})
    comparisons = tuple(
        Comparison(label, Estimate(**first[label]) if label in first else None, Estimate(**estimate))
        for label, estimate in after.get("estimates", {}).items()
    )
    return Report(
        title=session.run.path.name,
        run_folder=str(session.run.path),
        steps=progress.step,
        comparisons=comparisons,
        tool_error_share_in_correct=after.get("tool_error_share_in_correct"),
        tokens_per_second=progress.response_tokens / max(progress.rl_seconds, 1e-9),
        seconds_by_phase=progress.seconds,
        left_out=progress.left_out,
        skipped_steps=progress.skipped_steps,
        alarms=tuple(alarms.ringing(progress.history).values()),
        export_path=str(session.run.export),
        next_command=f"jaxrl rollout {session.run.path}",
    )
