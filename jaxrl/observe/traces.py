"""Episodes on disk and on the screen. The file format is described in docs/episodes.md."""

import base64
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from jaxrl.observe.terminal import Marked, outcome, printable
from jaxrl.records import Problem, RewardStatus, StopReason, ToolCall, ToolStatus, Trajectory, Turn

EPISODES_FOLDER = "episodes"
FORMAT = 1
"""Version of the file format; a reader refuses any other."""

EPISODE_LEGEND = Text(
    "▌ sampled by the policy (mask 1, trained on)   ┊ written by the environment (mask 0)   "
    "weights N: those after N reinforcement steps",
    "dim",
)

_ARRAYS = {
    "prompt_ids": np.int32,
    "ids": np.int32,
    "mask": np.int8,
    "logprobs": np.float32,
    "versions": np.int32,
}


def to_json(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as plain values; ``from_json`` gives an equal record back, floats to the last bit."""
    row: dict[str, Any] = {"format": FORMAT}
    for field in dataclasses.fields(Trajectory):
        value = getattr(trajectory, field.name)
        if field.name == "logprobs":
            # The shortest decimal that reads back as the same float32, not the 17 digits of its float64 image.
            row[field.name] = [float(str(number)) for number in value.astype(np.float32)]
        elif field.name in _ARRAYS:
            row[field.name] = value.tolist()
        elif field.name == "experts":
            row[field.name] = None if value is None else _packed(value)
        elif field.name == "problem":
            row[field.name] = dataclasses.asdict(value)
        elif field.name == "turns":
            row[field.name] = [dataclasses.asdict(turn) for turn in value]
        else:
            row[field.name] = value
    return row


def from_json(row: dict[str, Any]) -> Trajectory:
    """The trajectory that ``to_json`` wrote.

    Raises:
        ValueError: another format version, a missing or unknown field, or an unknown status.
    """
    values = dict(row)
    version = values.pop("format", None)
    if version != FORMAT:
        raise ValueError(f"episode format {version!r}, but this jaxrl reads format {FORMAT}")
    try:
        values["problem"] = Problem(**values["problem"])
        values["turns"] = tuple(_turn(turn) for turn in values["turns"])
        values["stop_reason"] = StopReason(values["stop_reason"])
        values["reward_status"] = RewardStatus(values["reward_status"])
        for name, dtype in _ARRAYS.items():
            values[name] = np.asarray(values[name], dtype)
        if values.get("experts") is not None:
            values["experts"] = _unpacked(**values["experts"])
        return Trajectory(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an episode of format {FORMAT}: {type(error).__name__}: {error}") from error


def _packed(array: np.ndarray) -> dict[str, Any]:
    """An array that nobody reads by eye and whose numbers would be long."""
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "base64": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
    }


def _unpacked(shape: Sequence[int], dtype: str, **encoded: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(encoded["base64"]), dtype).reshape(shape)


def write_episodes(
    folder: pathlib.Path, kind: str, step: int, trajectories: Iterable[Trajectory], process: int = 0
) -> pathlib.Path:
    """Write ``<folder>/episodes/<kind>_<step>.jsonl``, one episode a line, and return its path.

    The file appears whole or not at all; a resumed run that plays the step again replaces it.

    Args:
        folder: the run folder.
        kind: "rl" for episodes played to train on, "eval" for those of an evaluation.
        process: of the run; every one after the first writes a file of its own, ``<kind>_<step>-<process>.jsonl``.
    """
    path = folder / EPISODES_FOLDER / f"{kind}_{step:06d}{f'-{process}' if process else ''}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".jsonl.tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for trajectory in trajectories:
            file.write(json.dumps(to_json(trajectory), separators=(",", ":")) + "\n")
    os.replace(unfinished, path)
    return path


def step_of(path: pathlib.Path) -> int:
    """The step whose episodes a file holds, by its name."""
    return int(path.stem.rpartition("_")[2].partition("-")[0])


def read_episodes(path: pathlib.Path) -> tuple[Trajectory, ...]:
    """The episodes of one file.

    Raises:
        ValueError: names the file and line that cannot be read.
    """
    trajectories = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                trajectories.append(from_json(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    return tuple(trajectories)


def format_trajectory(trajectory: Trajectory, decode: Callable[[Sequence[int]], str]) -> RenderableType:
    """An episode to read: its turns, tool calls and their results, its reward, and where the mask lies.

    A bar ▌ runs beside every token the policy sampled (mask 1: trained on), dots ┊ beside every token the environment
    wrote (mask 0: never trained on), so the mask shows without colours too. It is taken from the mask itself, not from
    the turns.

    Args:
        decode: token ids to text, special tokens kept.
    """
    problem = trajectory.problem
    heading = Text(f"problem {printable(problem.id)} · sample {trajectory.sample}", "bold")
    parts: list[RenderableType] = [
        Rule(heading, align="left"),
        _caption("prompt", f"{len(trajectory.prompt_ids)} tokens, written by the environment"),
        _block(decode(trajectory.prompt_ids.tolist()), sampled=False),
    ]
    number = 0
    for turn in trajectory.turns:
        spans = _mask_runs(trajectory.mask, turn.start, turn.end)
        for start, end, sampled in spans:
            parts.append(_span_caption(trajectory, start, end, sampled))
            text = decode(trajectory.ids[start:end].tolist())
            parts.append(_block(text, sampled))
        for call in turn.calls:
            number += 1
            parts += _call_parts(number, call)
    parts.append(_verdict(trajectory))
    return Group(*parts)


def _turn(row: dict[str, Any]) -> Turn:
    calls = tuple(ToolCall(**{**call, "status": ToolStatus(call["status"])}) for call in row["calls"])
    return Turn(**{**row, "calls": calls})


def _mask_runs(mask: np.ndarray, start: int, end: int) -> list[tuple[int, int, bool]]:
    """Maximal spans of equal mask within [start, end)."""
    changes = [start, *(start + 1 + np.flatnonzero(np.diff(mask[start:end]))).tolist(), end]
    return [(a, b, bool(mask[a])) for a, b in itertools.pairwise(changes) if a < b]


def _caption(label: str, facts: str, style: str = "bold") -> Text:
    return Text.assemble((label, style), ("  " + facts, "dim"))


def _span_caption(trajectory: Trajectory, start: int, end: int, sampled: bool) -> Text:
    tokens = f"{end - start} token{'s' if end - start > 1 else ''}"
    if not sampled:
        return _caption("environment", f"{tokens}, mask 0")
    versions = sorted(set(trajectory.versions[start:end].tolist()))
    mean = round(float(trajectory.logprobs[start:end].mean()), 2) + 0.0  # the sum takes the sign off -0.0
    weights = "weights " + ", ".join(map(str, versions))
    return _caption("policy", f"{tokens}, mask 1, mean log-probability {mean:.2f}, {weights}", "bold cyan")


def _block(text: str, sampled: bool) -> RenderableType:
    body = Text(printable(text).strip("\n") or "(only line breaks)", "" if sampled else "dim", overflow="fold")
    return Marked(body, "▌ ", "cyan") if sampled else Marked(body, "┊ ", "dim")


def _call_parts(number: int, call: ToolCall) -> list[RenderableType]:
    good = call.status is ToolStatus.OK
    facts = [f"{call.seconds:.3f} s"]
    if call.queue_seconds >= 0.001:
        facts.append(f"{call.queue_seconds:.3f} s in the queue")
    if call.attempts > 1:
        facts.append(f"{call.attempts} attempts")
    if call.isolation:
        facts.append(f"isolation {call.isolation}")
    head = Text.assemble(
        (f"call {number}", "bold"),
        f"  {printable(call.name) or '(no name)'} ",
        (str(call.status).replace("_", " "), "bold green" if good else "bold red"),
        ("  " + ", ".join(facts), "dim"),
    )
    parts: list[RenderableType] = [head]
    for name, value in call.arguments.items():
        parts.append(_labelled(name, value if isinstance(value, str) else json.dumps(value)))
    for name, text in (("stdout", call.stdout), ("stderr", call.stderr)):
        if text:
            parts.append(_labelled(name, text))
    return parts


def _labelled(label: str, text: str) -> RenderableType:
    body = Text(printable(text).rstrip("\n"), overflow="fold")
    return Group(Text(f"  {printable(label)}:", "dim"), Marked(body, "    "))


def _verdict(trajectory: Trajectory) -> Text:
    style = "bold green" if trajectory.correct else "bold yellow" if not trajectory.trainable else "bold red"
    answer = "no answer" if trajectory.answer is None else f"answer {printable(trajectory.answer)!r}"
    facts = [
        answer,
        f"wanted {printable(trajectory.problem.answer)!r}",
        f"stopped: {str(trajectory.stop_reason).replace('_', ' ')}",
        f"{int(trajectory.mask.sum())} of {len(trajectory.ids)} tokens sampled",
        f"{trajectory.seconds:.2f} s",
    ]
    reward = f"reward {trajectory.reward:g}" if trajectory.trainable else "no reward"
    return Text.assemble((f"{reward}, {outcome(trajectory)}", style), "  " + ", ".join(facts))
