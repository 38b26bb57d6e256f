"""Tokens per second, and idle shares of trainer and engine, with tools that answer late: synchronous, playing ahead
and asynchronous side by side; one JSON object a line.

A small model first learns sums with a calculator in Python. Every mode then trains it from there, and each of its calls
answers only after a delay: half within 0.3 s, one in forty after more than 2 s (log-normal). The first three steps, in
which queues fill, do not count. With several devices the asynchronous mode also runs with half of them for the engine.
The modes take turns, and a figure is the median over the rounds; tokens are those of episodes trained on.

    python benchmarks/staleness.py --json
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/staleness.py --json
"""

import argparse
import asyncio
import io
import json
import os
import pathlib
import random
import statistics
import sys
import tempfile
from typing import Any
from unittest import mock

import jax

from jaxrl import config as configuration
from jaxrl.config import Config
from jaxrl.envs.python_tool import PythonTool
from jaxrl.observe.progress import Progress
from jaxrl.observe.writers import read_metrics
from jaxrl.records import ToolCall
from jaxrl.train import experiment, session

SETTINGS = (
    *("ModelConfig.layers=2", "ModelConfig.width=64", "ModelConfig.ffn_width=128", "ModelConfig.head_width=16"),
    *("TokenizerConfig.vocab_size=400", "ChatConfig.show_tools=False"),
    *("SftConfig.demonstrations=gsm8k", "SftConfig.steps=80", "SftConfig.rows=8", "SftConfig.row_tokens=160"),
    *("SftConfig.learning_rate=1e-2", "SftConfig.warmup_steps=4"),
    *("EngineConfig.slots=32", "EngineConfig.max_prompt_tokens=48", "EngineConfig.max_response_tokens=112"),
    *("EngineConfig.prefill_chunk=32", "EngineConfig.round_steps=8"),
    *("TrainConfig.problems=4", "TrainConfig.samples=8", "TrainConfig.rows=4", "TrainConfig.row_tokens=160"),
    *("TrainConfig.eval_every=0", "AlgorithmConfig.keep=8", "AlgorithmConfig.reject_equal=False"),
    *("EvalConfig.samples=1", "EvalConfig.k=(1,)", "CheckpointConfig.every=1000", "SandboxConfig.preload=()"),
)
MODES = {
    "synchronous": (),
    "playing ahead": ("TrainConfig.prefetch_groups=4",),
    "asynchronous, 1": ("TrainConfig.max_staleness=1",),
    "asynchronous, 2": ("TrainConfig.max_staleness=2",),
}
SHOWN = ("engine/idle_share", "trainer/idle_share", "staleness/mean", "staleness/max", "staleness/dropped_share")
FILLING = 3
"""Steps that do not count: one more than the longest queue is ahead."""
MEDIAN_SECONDS, SPREAD, LONGEST_SECONDS = 0.3, 1.0, 6.0


class SlowTool(PythonTool):
    """Answers late."""

    delays = random.Random(0)

    async def call(self, arguments: Any, seconds: float) -> ToolCall:
        delay = min(MEDIAN_SECONDS * self.delays.lognormvariate(0.0, SPREAD), LONGEST_SECONDS)
        await asyncio.sleep(delay)
        return await super().call(arguments, seconds)


def write_sums(path: pathlib.Path, numbers: range) -> pathlib.Path:
    pairs = [(a, b) for a in numbers for b in numbers]
    rows = [
        {"question": f"{a} plus {b}?", "answer": f"It is <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"} for a, b in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(config: Config, folder: pathlib.Path, *, cold_start_only: bool = False) -> None:
    with Progress(folder.name, file=io.StringIO(), live=False) as view:
        experiment.train(config, folder, view, cold_start_only=cold_start_only)


def measured(folder: pathlib.Path) -> dict[str, float]:
    """What a run did once its queue was full."""
    rows = read_metrics(folder, "rl")[FILLING:]
    seconds = [sum(row.get(f"seconds/{phase}", 0.0) for phase in ("rollout", "update", "sync")) for row in rows]
    tokens = sum(row["tokens_per_second"] * spent for row, spent in zip(rows, seconds, strict=True))
    shown = {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in SHOWN}
    return {"tokens/s": tokens / sum(seconds), **shown, "calls": statistics.mean(row["calls"] for row in rows)}


def rounds(steps: int, count: int, folder: pathlib.Path) -> dict[str, list[dict[str, float]]]:
    train_file, held_out = (
        write_sums(folder / "train.jsonl", range(2, 9)),
        write_sums(folder / "eval.jsonl", range(9, 11)),
    )
    settings = (*SETTINGS, f"DataConfig.train='{train_file}'", f"DataConfig.eval='{held_out}'")
    train(configuration.load("", settings), folder / "cold", cold_start_only=True)
    settings += ("SftConfig.demonstrations=''", f"ModelConfig.path='{folder / 'cold' / 'export'}'")
    settings += (f"TrainConfig.steps={steps}",)
    modes = dict(MODES)
    if half := len(jax.devices()) // 2:
        modes["asynchronous, 1, apart"] = (*MODES["asynchronous, 1"], f"MeshConfig.rollout_devices={half}")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
    with mock.patch.object(session, "PythonTool", SlowTool):
        for turn in range(count):
            for name, changes in modes.items():
                run = folder / f"{name} {turn}"
                train(configuration.load("", (*settings, *changes)), run)
                results[name].append(measured(run))
    return results


def lines(results: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    middle = {
        name: {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
        for name, runs in results.items()
    }
    made = []
    for name, figures in middle.items():
        for figure, value in figures.items():
            made.append(row(f"A {name}", figure, value, "tokens/s" if figure == "tokens/s" else "", None))
    for name in [name for name in middle if name != "synchronous"]:
        ratio = middle[name]["tokens/s"] / middle["synchronous"]["tokens/s"]
        made.append(row("A ratio", f"tokens per second, {name} over synchronous", ratio, "ratio", 1.0))
    return made


def row(figure: str, what: str, value: float, unit: str, least: float | None) -> dict[str, Any]:
    return {
        "figure": figure,
        "what": what,
        "value": round(value, 3),
        "unit": unit,
        "demand": None if least is None else f">= {least:g}",
        "holds": None if least is None else value >= least,
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps of every run (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every mode; the median counts (default 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args()
    if options.steps <= FILLING:
        parser.error(f"--steps {options.steps} measures nothing, since {FILLING} do not count; give more")
    with tempfile.TemporaryDirectory() as folder:
        made = lines(rounds(options.steps, options.rounds, pathlib.Path(folder)))
    for line in made:
        if options.json:
            print(json.dumps(line))
        else:
            print(f"{line['figure']:26} {line['value']:>10} {line['unit']:8} {line['what']}")
    return 0 if all(line["holds"] is not False for line in made) else 1


if __name__ == "__main__":
    sys.exit(main())
