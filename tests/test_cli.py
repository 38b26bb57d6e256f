"""Bad input on the command line: one clear line with value, limit and remedy, and the right exit code."""

import fcntl
import json
import pathlib
import subprocess
import sys

import pytest

from jaxrl import __version__, cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(arguments)
    return code, capsys.readouterr().err


def train(capsys: pytest.CaptureFixture[str], folder: pathlib.Path, *overrides: str) -> tuple[int, str]:
    settings = [part for override in overrides for part in ("--set", override)]
    return run(capsys, "train", "smoke", "--run", str(folder / "run"), *settings)


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for verb in ("train", "sft", "eval", "rollout", "export", "import", "check"):
        assert f"    {verb} " in shown


def test_the_package_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "jaxrl", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"jaxrl {__version__}\n"), done.stderr
    done = subprocess.run([sys.executable, "-m", "jaxrl", "train", "nope"], capture_output=True, text=True, check=False)
    assert done.returncode == cli.BAD_USAGE and "no recipe called 'nope'" in done.stderr


@pytest.mark.parametrize("verb", ["train", "sft", "eval", "rollout", "export", "import", "check"])
def test_every_verb_shows_examples(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    assert f"jaxrl {verb}" in capsys.readouterr().out.partition("examples:")[2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("TrainConfig.step=3", "unknown key TrainConfig.step; did you mean TrainConfig.steps?"),
        ("TrainConfig.steps=many", "TrainConfig.steps='many' has type str; it must be int"),
        ("EngineConfig.max_prompt_tokens=10", "max_prompt_tokens=10 but 68 of 68 problems have more, the longest,"),
        ("ModelConfig.vocab_size=100", "ModelConfig.vocab_size=100 is smaller than the tokenizer's"),
        ("MeshConfig.data=7", "MeshConfig asks for"),
        ("EngineConfig.pages=1", "EngineConfig.pages=1 of 16 tokens cannot hold one sequence"),
        ("SandboxConfig.preload=('nope',)", "preload names 'nope', which"),
        ("EnvConfig.max_tool_tokens=3", "max_tool_tokens=3 cannot hold the cut mark"),
    ],
)
def test_bad_configuration_is_bad_usage(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, override: str, message: str
) -> None:
    code, shown = train(capsys, tmp_path, override)
    assert (code, shown.count("\n")) == (cli.BAD_USAGE, 1), shown
    assert message in shown
    assert not (tmp_path / "run").exists()  # nothing was begun, so nothing is left


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "no problem file"),
        (['{"question": "1+1?", "answer": "2"'], "problems.jsonl:1: not JSON"),
        (['{"id": "a", "question": "1+1?", "answer": "2"}', '{"id": "b", "question": "2+2?"}'], "problems.jsonl:2"),
        ([], "no rows"),
    ],
    ids=["missing file", "malformed row", "answer missing", "empty file"],
)
def test_bad_data_names_file_and_line(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, lines: list[str] | None, message: str
) -> None:
    path = tmp_path / "problems.jsonl"
    if lines is not None:
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    code, shown = train(capsys, tmp_path, f"DataConfig.train={path}")
    assert (code, shown.count("\n")) == (cli.BAD_USAGE, 1), shown
    assert message in shown and "problems.jsonl" in shown


def test_a_run_folder_in_use_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        lock.write("4242")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, shown = train(capsys, tmp_path)
    assert code == cli.FAILED
    assert "is in use by process 4242" in shown and "choose another with --run" in shown


def test_a_folder_that_is_no_run(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    code, shown = run(capsys, "eval", str(tmp_path))
    assert code == cli.BAD_USAGE
    assert "holds no config.gin" in shown and "`jaxrl train`" in shown


def test_import_of_a_folder_that_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    code, shown = run(capsys, "import", str(model), "smoke", "--run", str(tmp_path / "run"))
    assert code != cli.DONE and shown.startswith("jaxrl: ")


def test_rollout_of_no_episodes_is_bad_usage(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    code, shown = run(capsys, "rollout", str(tmp_path), "--count", "0")
    assert code == cli.BAD_USAGE and "--count 0 must be at least 1" in shown
