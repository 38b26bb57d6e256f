"""A run that takes seconds and still learns something: sums of small numbers, half of them learned by heart."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from jaxrl import config as configuration
from jaxrl.config import Config

OVERRIDES = (
    "ModelConfig.layers=1",
    "ModelConfig.width=32",
    "ModelConfig.query_heads=2",
    "ModelConfig.kv_heads=1",
    "ModelConfig.head_width=16",
    "ModelConfig.ffn_width=64",
    "TokenizerConfig.vocab_size=400",
    "SftConfig.demonstrations=gsm8k",
    "SftConfig.steps=60",
    "SftConfig.rows=4",
    "SftConfig.row_tokens=160",
    "SftConfig.learning_rate=2e-2",
    "SftConfig.warmup_steps=4",
    "EngineConfig.slots=8",
    "EngineConfig.max_prompt_tokens=48",
    "EngineConfig.max_response_tokens=96",
    "EngineConfig.prefill_chunk=32",
    "EngineConfig.round_steps=8",
    "TrainConfig.steps=4",
    "TrainConfig.problems=3",
    "TrainConfig.samples=6",
    "TrainConfig.rows=4",
    "TrainConfig.row_tokens=160",
    "TrainConfig.eval_every=2",
    "TrainConfig.prefetch_groups=1",
    "AlgorithmConfig.keep=4",
    "AlgorithmConfig.kl_coefficient=0.01",
    "OptimizerConfig.learning_rate=1e-3",
    "OptimizerConfig.warmup_steps=1",
    "EvalConfig.samples=2",
    "EvalConfig.k=(1, 2)",
    "CheckpointConfig.every=1",
    "SandboxConfig.workers=1",
    "SandboxConfig.slots=2",
    "SandboxConfig.preload=()",
    "ChatConfig.show_tools=False",
)


def write_sums(path: pathlib.Path, pairs: list[tuple[int, int]]) -> pathlib.Path:
    rows = [
        {"question": f"{a} plus {b}?", "answer": f"It is <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"} for a, b in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_overrides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides of the defaults that make the tiny run."""
    folder = tmp_path_factory.mktemp("sums")
    train = write_sums(folder / "train.jsonl", [(a, b) for a in range(2, 6) for b in range(2, 6)])
    held_out = write_sums(folder / "eval.jsonl", [(7, 2), (8, 3)])
    return (*OVERRIDES, f"DataConfig.train='{train}'", f"DataConfig.eval='{held_out}'")


@pytest.fixture(scope="session")
def tiny_config(tiny_overrides: tuple[str, ...]) -> Config:
    return configuration.load("", tiny_overrides)


RunTiny = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_tiny(tiny_overrides: tuple[str, ...]) -> RunTiny:
    """``run_tiny(folder, *by)`` trains the tiny run in a process of its own, by way of a script and its arguments;
    ``more`` is added to the command line."""

    def run(folder: pathlib.Path, *by: str, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        settings = [argument for override in tiny_overrides for argument in ("--set", override)]
        command = [
            sys.executable,
            *(by or ("-m", "jaxrl.cli")),
            "train",
            "smoke",
            "--run",
            str(folder),
            *settings,
            *more,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, run_tiny: RunTiny) -> pathlib.Path:
    """The folder of a tiny run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = run_tiny(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
