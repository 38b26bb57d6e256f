"""What each verb of the command line does, once its arguments are read."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence

import jax
from rich.console import Console

from jaxrl.check import environment, targets
from jaxrl.check import report as check_report
from jaxrl.check import run as check_run
from jaxrl.check.devices import target_config
from jaxrl.config import Config, ConfigError
from jaxrl.data.problems import DataError, load_held_out
from jaxrl.episodes import play_groups
from jaxrl.evaluate.run import FIRST_EVALUATION_DRAW
from jaxrl.evaluate.run import evaluate as run_evaluation
from jaxrl.model import spec, tensor_files
from jaxrl.observe.progress import Progress
from jaxrl.observe.report import final_table
from jaxrl.observe.traces import EPISODE_LEGEND, format_trajectory
from jaxrl.processes.exchange import is_first
from jaxrl.rewards.verifier import VerifierStartError
from jaxrl.sandbox import SandboxUnavailable
from jaxrl.text.tokenizer import TokenizerError
from jaxrl.train import experiment
from jaxrl.train import prefer as preferences
from jaxrl.train.checkpoint import CheckpointError, Checkpoints
from jaxrl.train.progress import RunProgress
from jaxrl.train.run import RunError, RunFolder, open_run
from jaxrl.train.session import Session, open_player, open_session, reopen_session
from jaxrl_kernels import bars, bench, block_sizes, tuning
from jaxrl_kernels.choice import TPUS, device_kind

BAR_ROUNDS = 20
"""The fewest of which a median is taken for what kernels must reach."""

EXPECTED_ERRORS = (
    RunError,
    CheckpointError,
    SandboxUnavailable,
    VerifierStartError,
    environment.CompilerError,
    OSError,
)
"""Errors whose message is all a user needs, beside those about what was given (configuration, data, tokenizer, files);
anything else is a defect and shows its traceback."""
__all__ = [
    "EXPECTED_ERRORS",
    "DataError",
    "TokenizerError",
    "check",
    "evaluate",
    "export",
    "import_folder",
    "install_compiler",
    "prefer",
    "rollout",
    "train",
]

PIPE_COLUMNS = 120


def train(config: Config, folder: pathlib.Path, *, cold_start_only: bool, which: str) -> None:
    """``jaxrl train`` and ``jaxrl sft``. Of several processes the first shows what they do."""
    with contextlib.ExitStack() as stack:
        shown = None if is_first() else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        view = stack.enter_context(Progress(folder.name, file=shown))
        report = experiment.train(config, folder, view, cold_start_only=cold_start_only, which=which)
    if is_first():
        _console().print(final_table(report))


def prefer(config: Config, folder: pathlib.Path, which: str) -> None:
    """``jaxrl prefer``."""
    with Progress(folder.name) as view:
        summary = preferences.prefer(config, folder, view, which=which)
    for name in summary["after"] or {}:
        print(f"{name:>20}, held out: {summary['before'][name]:10.4g} before, {summary['after'][name]:10.4g} after")
    print(f"model: {summary['export']}")


def evaluate(config: Config, folder: pathlib.Path, which: str, as_json: bool) -> None:
    """``jaxrl eval``: prints a table, or one JSON object."""
    session, params, version = _checkpoint(config, folder, which)

    async def measure():
        async with open_player(session, params, version) as player:
            return await run_evaluation(player, session.eval_problems, config.eval)

    report = asyncio.run(measure())
    figures = {f"pass@{k}": estimate for k, estimate in report.pass_at.items()} | {
        f"maj@{report.samples}": report.majority
    }
    figures = {f"avg@{report.samples}": report.average} | figures
    if as_json:
        row = dataclasses.asdict(report)
        print(json.dumps({name: None if value != value else value for name, value in row.items()}))  # NaN is no JSON
        return
    kind = "greedy" if report.greedy else f"sampled at temperature {config.eval.temperature:g}"
    kind += _narrow(config)
    print(f"{len(session.eval_problems)} problems, {report.samples} samples each, {kind}; 95 % intervals")
    for name, estimate in figures.items():
        print(f"{name:>8}  {estimate.value:6.1%}  ({estimate.low:.1%} to {estimate.high:.1%})")
    share = report.tool_error_share_in_correct
    print(f"failed calls in correct trajectories: {'no calls' if math.isnan(share) else f'{share:.1%}'}")
    if report.excluded:
        print(f"left out through faults of ours: {report.excluded} trajectories")


def _narrow(config: Config) -> str:
    """What to add where keys and values are rounded, so that what is shown is not exactly the policy's."""
    return "" if config.engine.kv_dtype == "auto" else f", with keys and values rounded to {config.engine.kv_dtype}"


def rollout(config: Config, folder: pathlib.Path, which: str, count: int) -> None:
    """``jaxrl rollout``: plays episodes of unseen problems and prints them."""
    session, params, version = _checkpoint(config, folder, which)
    draws = [(FIRST_EVALUATION_DRAW + index, problem) for index, problem in enumerate(session.eval_problems[:count])]
    console = _console()
    console.print(EPISODE_LEGEND + _narrow(config))

    async def play() -> None:
        async with open_player(session, params, version) as player:
            async with contextlib.aclosing(play_groups(player, draws, 1)) as groups:
                async for group in groups:
                    console.print(format_trajectory(group.trajectories[0], session.tokenizer.decode))

    asyncio.run(play())


def export(
    config: Config,
    folder: pathlib.Path,
    which: str,
    to: pathlib.Path,
    dtype: str | None,
    max_shard_bytes: int,
    *,
    adapter: bool = False,
) -> None:
    """``jaxrl export``: writes a checkpoint as a Hugging Face folder and reads it back, or its adapter as PEFT's."""
    if adapter and not config.lora.rank:
        raise ConfigError(f"{folder} trains all weights and has no adapter; leave out --adapter")
    run = _existing(folder)
    session = reopen_session(config, run)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint, read_only=True)
    step = checkpoints.find(which)
    session = experiment.as_saved(session, checkpoints, step)
    with Progress(str(to)) as view:
        view.phase("export")
        trained = experiment.restore_params(session, checkpoints, step)
        checkpoints.close()
        if not adapter:
            session = session.on_base(kept=True, on_bytes=experiment.shown_in(view))
            done = experiment.export(
                session, trained, to, dtype=dtype, max_shard_bytes=max_shard_bytes, on_bytes=experiment.shown_in(view)
            )
    if adapter:
        experiment.export_adapter(session, trained, to)
        print(f"adapter of checkpoint {step} of {folder} written to {to}; load it with peft.PeftModel.from_pretrained")
        return
    print(
        f"checkpoint {step} of {folder} written to {to}: {_amount(done.tensors, done.bytes, done.files)}, "
        f"read back with equal values and logits that differ by at most {done.logit_difference:.1e}; "
        "load it with transformers.AutoModelForCausalLM.from_pretrained"
    )


def import_folder(config: Config, source: pathlib.Path, folder: pathlib.Path) -> None:
    """``jaxrl import``: every tensor is checked, then the folder becomes checkpoint 0 of a new run."""
    model = dataclasses.replace(config.model, path=str(source))
    config = dataclasses.replace(config, model=model)
    with open_run(folder) as run:
        checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
        if checkpoints.latest() is not None:
            raise RunError(
                f"run folder {folder} already holds checkpoint {checkpoints.latest()}; choose another with --run"
            )
        session = open_session(config, run)
        with Progress(folder.name) as view:
            view.phase("import")
            session = session.on_base(kept=False, on_bytes=experiment.shown_in(view))
            progress, state, reference = experiment.beginning(session, experiment.shown_in(view))
        session.keep_tokenizer()
        session.keep_base()
        checkpoints.save(0, state, reference, progress.to_json(), None)
        checkpoints.close()
        # Written last: from here on the run folder holds all there is, and the source may go.
        run.write_config(dataclasses.replace(config, model=dataclasses.replace(session.model, path="")))
    count = spec.count(session.specs)
    headers = tensor_files.read_headers(source).values()
    amount = _amount(len(headers), sum(header.bytes for header in headers), len({header.file for header in headers}))
    print(
        f"{source}: {amount}, every name, shape and type as its config.json has it; {count:,} parameters imported as "
        f"{session.model.param_dtype}; train with: jaxrl train --run {folder}"
    )


def check(recipe: str, overrides: Sequence[str], target: str, *, as_json: bool, again: bool) -> bool:
    """``jaxrl check``: whether a recipe fits on a target; prints a table, or one JSON object."""
    wanted = targets.parse(target)
    config = check_run.configuration(recipe, overrides)
    if not environment.installed(wanted.platform):
        install_compiler(wanted.platform)
    if as_json:
        report = check_run.check(config, wanted, lambda line: print(line, file=sys.stderr), cached=not again)
        print(check_report.as_json(report))
        return report.result.fits
    with Progress(f"check {wanted.name}") as view:
        view.phase("compile")
        report = check_run.check(config, wanted, view.note, cached=not again)
    check_report.show(report, _console())
    return report.result.fits


def bench_kernels(tokens: int, rounds: int, *, tune: bool, table: pathlib.Path | None, as_json: bool) -> bool:
    """Print what the kernels cost here, or with which sizes of blocks; whether all demands hold.

    On a GPU or TPU it is the table of what they must reach, against what else computes the same there, of sizes of its
    own and one JSON object a line.

    Args:
        tokens: of a row, on a CPU or of what is tuned.
        rounds: in which alternatives take turns.
        tune: sizes are tried, and the fastest written.
        table: into which file; that of the kernels when None.
        as_json: print one JSON object a line.

    Raises:
        ConfigError: sizes are asked for on a device whose kernels have no choice of them, or cannot be written.
    """
    if tokens < 1 or rounds < 1:
        raise ConfigError(f"--tokens {tokens} and --rounds {rounds} must be at least 1")
    if table is not None and not tune:
        raise ConfigError(f"--table {table} is written by --tune alone; give both")
    if tune:
        _tune_kernels(tokens, rounds, table or block_sizes.FILE, as_json)
        return True
    if jax.default_backend() != "cpu":
        return print_bars(bars.table(bars.Sizes(rounds=max(rounds, BAR_ROUNDS))))
    figures = bench.figures(tokens, rounds) + bench.decode_figures(rounds)
    for figure in figures:
        demand = f" (demanded: {figure['demand']})" if figure["demand"] else ""
        text = f"{figure['figure']} {figure['what']}: {figure['value']}{demand}"
        print(json.dumps(figure) if as_json else text, flush=True)
    return all(figure["holds"] in (True, None) for figure in figures)


def dump_target(file: pathlib.Path) -> None:
    """Write what XLA knows of the GPU at hand: text to stand in the place of ``jaxrl.check.devices.GPU_DESCRIPTION``.

    Raises:
        ConfigError: it is none.
    """
    file.write_text(target_config(jax.devices()), encoding="utf-8")


def print_bars(figures: Iterable[dict]) -> bool:
    """One JSON object a line, each as soon as it is measured; whether all demands hold."""
    holds = True
    for figure in figures:
        print(json.dumps(figure), flush=True)
        holds &= figure["holds"] in (True, None)
    return holds


def _tune_kernels(tokens: int, rounds: int, table: pathlib.Path, as_json: bool) -> None:
    kind = device_kind()
    if not kind.startswith(TPUS):
        raise ConfigError(
            f"--tune measures sizes of blocks on a TPU, and this is {kind!r}, whose kernels have one size"
        )
    try:
        block_sizes.write({}, table)  # before what takes long
    except (OSError, ValueError) as error:
        raise ConfigError(f"the table of block sizes cannot be written: {error}; name another with --table") from error
    extent = tuning.Extent(tokens, rounds)
    tried = itertools.chain(tuning.packed_rows(extent), tuning.pages(extent))
    for result in tuning.written(tried, table, f"{tokens} tokens"):
        said = result.refused or " + ".join(f"{1000 * seconds:.2f} ms" for seconds in result.seconds)
        pages = f", pages of {result.key.page}" if result.key.page else ""
        where = f"{result.key.kernel}, heads {result.key.head_width} wide{pages}"
        text = f"{where}: {result.rows} rows by {result.keys} keys: {said}"
        print(json.dumps(dataclasses.asdict(result)) if as_json else text, flush=True)


def install_compiler(platform: str) -> None:
    """``jaxrl check --install``: the compiler for TPUs or GPUs, beside jax and unseen by it."""

    def say(line: str) -> None:
        print(f"jaxrl: {line}", file=sys.stderr)

    say(f"the compiler for {platform}s is in {environment.install(platform, say)}")


def _amount(tensors: int, size: int, files: int) -> str:
    return f"{tensors} tensors of {size:,} bytes in {files} file{'' if files == 1 else 's'}"


def _checkpoint(config: Config, folder: pathlib.Path, which: str) -> tuple[Session, object, int]:
    """Session, rollout weights and weight version of a checkpoint."""
    run = _existing(folder)
    session = reopen_session(config, run, load_held_out(config.data)).on_base(kept=True)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint, read_only=True)
    step = checkpoints.find(which)
    if experiment.as_saved(session, checkpoints, step).valued:
        raise ConfigError(f"{folder} is a reward model, which plays no episodes; give the run of a policy")
    progress = RunProgress.from_json(checkpoints.host(step))
    version = progress.step if progress.stage == "rl" else 0
    params = experiment.restore_params(session, checkpoints, step)
    checkpoints.close()
    return session, session.rollout_weights(params), version


def _console() -> Console:
    """The terminal, or for a pipe or a file lines of 120 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_COLUMNS)


def _existing(folder: pathlib.Path) -> RunFolder:
    run = RunFolder(folder)
    run.read_config()
    return run
