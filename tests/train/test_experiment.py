"""A run folder used again: gone back to an older checkpoint, resumed with other settings, read without its data."""

import dataclasses
import io
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest

from jaxrl import cli, commands
from jaxrl.config import Config, OptimizerConfig, SftConfig
from jaxrl.data.problems import DataError
from jaxrl.model import hf, spec, transformer
from jaxrl.observe.progress import Progress
from jaxrl.observe.writers import read_metrics
from jaxrl.train import experiment, state
from jaxrl.train.checkpoint import CheckpointError, Checkpoints
from jaxrl.train.progress import RunProgress
from jaxrl.train.run import RunFolder
from jaxrl.train.session import reopen_session

COLD_START = 60


@pytest.fixture
def copy(tiny_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(tiny_run, tmp_path / "run")


def train(config: Config, folder: pathlib.Path, which: str = "latest") -> str:
    shown = io.StringIO()
    with Progress("tiny", file=shown, live=False) as view:
        experiment.train(config, folder, view, which=which)
    return shown.getvalue()


def test_going_back_to_a_checkpoint_plays_the_same_steps_again(
    tiny_run: pathlib.Path, copy: pathlib.Path, run_tiny: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    steps = [row["step"] for row in read_metrics(tiny_run, "rl")]
    assert steps == [COLD_START + 1 + step for step in (1, 2, 3, 4)]
    (copy / "export" / "model.safetensors").unlink()
    resumed = run_tiny(copy, more=("--step", str(steps[-2]), "--set", "SftConfig.steps=7"))
    assert "reinforcement: 4 steps, from step 3" in resumed.stdout, resumed.stdout + resumed.stderr
    assert [row["step"] for row in read_metrics(copy, "rl")] == steps  # whatever SftConfig.steps says now
    weights = [(folder / "export" / "model.safetensors").read_bytes() for folder in (tiny_run, copy)]
    assert weights[0] == weights[1]


def test_data_that_is_not_the_runs_is_refused_before_anything_is_changed(
    tiny_config: Config, copy: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The same number of problems under other names, with a step to go back to."""
    rows = [
        {"id": f"other/{i}", "question": f"{i} plus 1?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"}
        for i in range(16)
    ]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = dataclasses.replace(
        tiny_config, data=dataclasses.replace(tiny_config.data, train=str(tmp_path / "other.jsonl"))
    )
    before = contents(copy)
    with pytest.raises(DataError, match="the saved position was taken with ids="):
        train(other, copy, which="64")
    assert contents(copy) == before


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_run_that_goes_back_forgets_how_it_ended(copy: pathlib.Path) -> None:
    run = RunFolder(copy)
    names = {file.name for file in (copy / "episodes").iterdir()}
    run.go_back(64, 64)
    assert not (copy / "summary.json").exists()
    left = {file.name for file in (copy / "episodes").iterdir()}
    assert names - left == {"rl_000065.jsonl", "eval_000065.jsonl"}


def test_a_run_that_is_done_says_so(tiny_config: Config, copy: pathlib.Path) -> None:
    fewer = dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, steps=2))
    kernels = (copy / "kernels.txt").read_text().splitlines()
    assert len(kernels) > 2 and all(line.endswith(": xla") for line in kernels)
    (copy / "kernels.txt").write_text("\n".join(kernels[1:]))
    shown = train(fewer, copy)
    assert "4 steps are done, TrainConfig.steps=2: nothing to train" in shown
    assert f"changed since the last start: {kernels[0]}" in " ".join(shown.split())
    with pytest.raises(CheckpointError, match="no checkpoint '1' in"):
        train(tiny_config, copy, which="1")


def test_an_imported_run_evaluates_its_beginning_once(
    tiny_config: Config, tiny_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Stopped before the first checkpoint that knows of the evaluation, it drops the row and writes it again."""
    train_nothing = dataclasses.replace(tiny_config.train, steps=0)
    config = dataclasses.replace(
        tiny_config, sft=dataclasses.replace(tiny_config.sft, demonstrations=""), train=train_nothing
    )
    commands.import_folder(config, tiny_run / "export", tmp_path / "run")
    for _ in range(2):
        train(config, tmp_path / "run")
    assert [row["step"] for row in read_metrics(tmp_path / "run", "eval")] == [0]


def test_a_checkpoint_is_exported_without_the_data_and_without_optimizer_state(
    tiny_config: Config, tiny_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = RunFolder(tiny_run)
    session = reopen_session(tiny_config, run)
    checkpoints = Checkpoints(run.checkpoints, tiny_config.checkpoint, read_only=True)
    step = checkpoints.find("latest")
    _, whole, _ = experiment.restore(session, checkpoints, step)
    jax.tree.map(np.testing.assert_array_equal, whole.params, experiment.restore_params(session, checkpoints, step))

    gone = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, train="gone.jsonl"))
    commands.export(gone, tiny_run, "latest", tmp_path / "model", None, hf.MAX_FILE_BYTES)
    exported = tmp_path / "model" / "model.safetensors"
    assert exported.read_bytes() == (tiny_run / "export" / "model.safetensors").read_bytes()
    assert exported.stat().st_mode == (tmp_path / "model" / "config.json").stat().st_mode  # readable as the rest


def test_parameters_of_another_model_are_refused(tiny_config: Config, tiny_run: pathlib.Path) -> None:
    run = RunFolder(tiny_run)
    model = dataclasses.replace(tiny_config.model, width=64)
    session = reopen_session(dataclasses.replace(tiny_config, model=model), run)
    checkpoints = Checkpoints(run.checkpoints, tiny_config.checkpoint, read_only=True)
    with pytest.raises(CheckpointError, match="is of another model: params/"):
        experiment.restore_params(session, checkpoints, checkpoints.find("latest"))


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_rate_rises_from_the_first_update_on(warmup: int) -> None:
    specs = transformer.param_specs(dataclasses.replace(Config().model, vocab_size=8, layers=1, width=8))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), spec.abstract(specs))
    settings = OptimizerConfig(learning_rate=0.1, warmup_steps=warmup, weight_decay=0.0)
    cold = SftConfig(learning_rate=0.1, warmup_steps=warmup, steps=1000)
    for optimizer in (state.rl_optimizer(settings, specs), state.sft_optimizer(cold, settings, specs)):
        memory, moved = optimizer.init(params), []
        for _ in range(warmup + 1):
            update, memory = optimizer.update(params, memory, params)  # a constant gradient
            moved.append(-float(update["final_norm"][0]))
        # Adam's update of a constant gradient is the rate itself.
        assert moved == pytest.approx([0.1 * (step + 1) / (warmup + 1) for step in range(warmup + 1)], rel=1e-3)


def test_a_checkpoint_of_another_format_is_refused() -> None:
    row = RunProgress().to_json()
    assert RunProgress.from_json(row) == RunProgress()
    with pytest.raises(CheckpointError, match="a checkpoint of format 99, but this jaxrl reads format"):
        RunProgress.from_json(row | {"format": 99})
    del row["format"]
    with pytest.raises(CheckpointError, match="a checkpoint of an older jaxrl"):
        RunProgress.from_json(row)


def test_a_closed_output_is_no_traceback() -> None:
    script = (
        "import sys\nfrom jaxrl import cli, commands\n"
        "def train(*_, **__): raise BrokenPipeError\n"
        "commands.train = train\nsys.exit(cli.main(['train', 'smoke', '--run', 'nowhere']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (cli.FAILED, "")
    assert done.stderr.startswith("jaxrl: the output was closed before the first checkpoint")


def test_ctrl_c_promises_only_a_checkpoint_that_is_there(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train", interrupted)
    assert cli.main(["train", "smoke", "--run", str(tmp_path)]) == cli.INTERRUPTED
    assert "stopped before the first checkpoint; the same command begins anew" in capsys.readouterr().err
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert cli.main(["train", "smoke", "--run", str(tmp_path)]) == cli.INTERRUPTED
    assert "goes on from the last checkpoint" in capsys.readouterr().err
