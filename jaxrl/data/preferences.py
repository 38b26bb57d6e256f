"""Answers that somebody compared or judged, from JSONL files, whose format docs/algorithms.md has, or from the episodes
of runs, which the verifier judged."""

import collections
import dataclasses
import itertools
import pathlib
import random
from collections.abc import Sequence
from typing import Any

from jaxrl.config import PreferConfig
from jaxrl.data.problems import DataError, Row, read_rows
from jaxrl.data.recorded import episodes, messages
from jaxrl.records import Message, Trajectory

Prompt = tuple[Message, ...]
Answer = tuple[Message, ...] | Trajectory
"""What was written, or what a policy played."""

FIELDS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "judged": ("prompt", "completion", "label"),
    "reward": ("prompt", "chosen", "rejected"),
    "process": ("prompt", "completions", "labels"),
}
"""What a row has, by kind."""


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt with two answers, the chosen one first; or with a single one that was judged; or with one in steps."""

    prompt: Prompt
    answers: tuple[Answer, ...] = ()
    good: bool = True  # of a single answer
    steps: tuple[tuple[str, bool], ...] = ()  # text of each, and whether it is right


def load(config: PreferConfig, seed: int) -> tuple[tuple[Preference, ...], tuple[Preference, ...]]:
    """Rows to train on and rows kept back, the latter chosen by ``seed``. No prompt is in both.

    Raises:
        DataError: no file, too few prompts, or a row that is not of the kind; the message names file and line.
    """
    if not config.data:
        raise DataError("PreferConfig.data names no file; add --set PreferConfig.data=pairs.jsonl")
    rows: list[Preference] = []
    for part in map(str.strip, config.data.split(",")):
        path = pathlib.Path(part)
        rows += _of_run(path, config) if path.is_dir() else [preference(row, config.kind) for row in read_rows(part)]
    if len(rows) < 2:
        raise DataError(f"{config.data} has {len(rows)} rows; at least 2 are needed")
    back = _kept_back([row.prompt for row in rows], min(config.held_out, len(rows) // 2), seed)
    if config.held_out and not back:
        least = min(collections.Counter(row.prompt for row in rows).values())
        raise DataError(
            f"{config.data}: PreferConfig.held_out={config.held_out} of {len(rows)} rows cannot be kept back, for the "
            f"prompt with the fewest has {least}; raise it to that, lower PreferConfig.pairs_of_problem, or give rows "
            "of more prompts"
        )
    learned, held_out = (tuple(row for row in rows if (row.prompt in back) is kept) for kept in (False, True))
    if config.kind == "judged":
        for part in (learned, held_out):
            unrelated(config, part)
    return learned, held_out


def _kept_back(prompts: Sequence[Prompt], most: int, seed: int) -> set[Prompt]:
    """Prompts with ``most`` rows together, or the next fewer where they do not come out even."""
    counts = collections.Counter(prompts)
    chosen = list(counts)
    random.Random(f"preferences {seed}").shuffle(chosen)
    back: set[Prompt] = set()
    for prompt in chosen:
        if counts[prompt] <= most:
            back.add(prompt)
            most -= counts[prompt]
    return back


def _of_run(run: pathlib.Path, config: PreferConfig) -> list[Preference]:
    """What a run played to train on: a right and a wrong answer to one problem, or every answer by itself.

    Raises:
        DataError: no episodes, none that make a pair, or a kind that episodes do not supply.
    """
    if config.kind == "process":
        raise DataError(f"{run}: episodes have no judged steps; PreferConfig.kind='process' takes JSONL files")
    groups: dict[Prompt, tuple[list[Trajectory], list[Trajectory]]] = {}
    for episode in episodes(run, correct_only=False):
        prompt = (Message("user", episode.problem.question, learned=False),)
        right, wrong = groups.setdefault(prompt, ([], []))
        (right if episode.correct else wrong).append(episode)
    if config.kind == "judged":
        return [
            Preference(prompt, (episode,), episode.correct)
            for prompt, sides in groups.items()
            for side in sides
            for episode in side
        ]
    most = config.pairs_of_problem or None
    pairs = [
        Preference(prompt, pair)
        for prompt, (right, wrong) in groups.items()
        for pair in itertools.islice(zip(right, wrong, strict=False), most)
    ]
    if not pairs:
        raise DataError(
            f"{run}: of {len(groups)} problems none has both a right and a wrong answer; play more samples of each, or "
            "set PreferConfig.kind='judged'"
        )
    return pairs


def unrelated(config: PreferConfig, rows: Sequence[Preference]) -> list[Preference]:
    """Of each row the next one, after the last the first, whose prompt is another: its answer was to something else.

    Raises:
        DataError: all rows have the same prompt.
    """
    count, others = len(rows), []
    for index, row in enumerate(rows):
        following = (rows[(index + step) % count] for step in range(1, count))
        other = next((one for one in following if one.prompt != row.prompt), None)
        if other is None:
            raise DataError(
                f"{config.data}: PreferConfig.kind='judged' takes answers to other prompts, and a part of {count} rows "
                f"has a single prompt; give rows with others, or change PreferConfig.held_out={config.held_out}"
            )
        others.append(other)
    return others


def preference(row: Row, kind: str) -> Preference:
    """The preference of a row.

    Raises:
        DataError: naming file, line and what is wrong.
    """
    if missing := [name for name in FIELDS[kind] if name not in row.fields]:
        raise DataError(f"{row.place}: no {missing[0]!r}; a row of kind {kind!r} has {', '.join(FIELDS[kind])}")
    prompt = tuple(
        dataclasses.replace(message, learned=False)
        for message in _messages(row.fields["prompt"], "user", f"{row.place}: prompt", "")
    )
    if prompt[-1].role == "assistant":
        raise DataError(f"{row.place}: the prompt ends with the assistant; answers begin with it")
    if kind == "process":
        return Preference(prompt, steps=_steps(row))
    names = [name for name in FIELDS[kind] if name not in ("prompt", "label")]
    answers = tuple(_answer(row, name, prompt[-1].role) for name in names)
    label = row.fields["label"] if kind == "judged" else True
    if not isinstance(label, bool):
        raise DataError(f"{row.place}: label is {label!r}; it must be true or false")
    return Preference(prompt, answers, label)


def _answer(row: Row, name: str, before: str) -> tuple[Message, ...]:
    answer = _messages(row.fields[name], "assistant", f"{row.place}: {name}", before)
    if answer[-1].role != "assistant" or not any(message.learned for message in answer if message.role == "assistant"):
        raise DataError(f"{row.place}: {name} must end with an assistant message, and one must have a weight")
    return tuple(answer)


def _steps(row: Row) -> tuple[tuple[str, bool], ...]:
    texts, labels = row.fields["completions"], row.fields["labels"]
    if not (isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels) and texts):
        raise DataError(f"{row.place}: completions and labels must be lists of the same length, of one step or more")
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(label, bool) for label in labels):
        raise DataError(f"{row.place}: completions must be texts and labels true or false")
    return tuple(zip(texts, labels, strict=True))


def texts_of(preferences: Sequence[Preference]) -> list[str]:
    """All text in them that a tokenizer may be trained on."""
    texts = []
    for one in preferences:
        texts += [message.text for message in one.prompt]
        for answer in one.answers:
            texts += [answer.text] if isinstance(answer, Trajectory) else [message.text for message in answer]
        texts += [text for text, _ in one.steps]
    return texts


def _messages(value: Any, role: str, where: str, before: str) -> list[Message]:
    return messages([{"role": role, "content": value}] if isinstance(value, str) else value, where, before)
