"""What was recorded elsewhere, to learn from: chat messages in JSONL files, whose format docs/algorithms.md describes,
and the episodes of runs."""

import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxrl.config import SftConfig
from jaxrl.data.problems import DataError, Row, read_rows
from jaxrl.observe import traces
from jaxrl.records import Conversation, Demonstration, Message, Trajectory
from jaxrl.statuses import ToolStatus
from jaxrl.text.tokens import CALL_CLOSE, CALL_OPEN

Worked = Demonstration | Conversation | Trajectory
"""Anything that supervised training learns from."""

_FOLLOWS = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "tool": ("tool", "assistant")}
"""Which roles may follow a role; any but the system's may follow the assistant's."""


def read(sft: SftConfig) -> tuple[Conversation | Trajectory, ...]:
    """What the paths in ``sft.demonstrations`` hold, at most ``sft.count`` of each.

    Raises:
        DataError: a path that does not exist, a row that is no conversation, or a run without an episode to learn.
    """
    worked: list[Conversation | Trajectory] = []
    for part in filter(None, map(str.strip, sft.demonstrations.split(","))):
        path = pathlib.Path(part)
        if path.is_dir():
            worked += episodes(path, sft.episodes == "correct")[: sft.count]
        else:
            worked += [conversation(row) for row in read_rows(part)[: sft.count]]
    return tuple(worked)


def episodes(run: pathlib.Path, correct_only: bool) -> tuple[Trajectory, ...]:
    """The episodes that a run played to train on and whose grading holds; those of evaluations are left alone.

    Raises:
        DataError: there are none, or a file cannot be read.
    """
    files = sorted((run / traces.EPISODES_FOLDER).glob("rl_*.jsonl"))
    try:
        played = list(itertools.chain.from_iterable(map(traces.read_episodes, files)))
    except ValueError as error:
        raise DataError(str(error)) from error
    kept = tuple(episode for episode in played if episode.trainable and (episode.correct or not correct_only))
    if not kept:
        all_of_them = ", or set SftConfig.episodes='all'" if correct_only else ""
        raise DataError(
            f"{run}: {len(files)} files with {len(played)} episodes of training, none to learn from; give a run folder "
            f"that `jaxrl train` made with TrainConfig.dump_episodes{all_of_them}"
        )
    return kept


def conversation(row: Row) -> Conversation:
    """The conversation in the field ``messages`` of a row.

    Raises:
        DataError: naming file, line and what is wrong.
    """
    where = row.place
    read = messages(row.fields.get("messages"), where)
    if read[-1].role != "assistant":
        raise DataError(f"{where}: the last message is of {read[-1].role!r}; it must be the assistant's")
    if not any(message.role == "assistant" and message.learned for message in read):
        raise DataError(f"{where}: no assistant message has a weight; leave the row out")
    return Conversation(str(row.fields.get("id", where)), tuple(read))


def messages(values: Any, where: str, before: str = "") -> list[Message]:
    """Chat messages as OpenAI and Hugging Face write them, their order checked.

    Args:
        values: what stands in the row.
        where: file and line, for errors.
        before: role of the message that precedes them.

    Raises:
        DataError: naming what is wrong.
    """
    if not isinstance(values, list) or not values:
        raise DataError(f'{where}: "messages" must be a list of objects with "role" and "content"; here is {values!r}')
    read: list[Message] = []
    for index, value in enumerate(values):
        here = f"{where}: message {index}"
        if not isinstance(value, dict) or value.get("role") not in ("system", "user", "assistant", "tool"):
            raise DataError(f"{here} must be an object whose role is system, user, assistant or tool, not {value!r}")
        role = value["role"]
        allowed = _FOLLOWS.get(before, ("user", "tool"))
        if role not in allowed:
            after = f"after {before!r}" if before else "at the beginning"
            raise DataError(f"{here} is of {role!r}, but {after} comes one of {' or '.join(allowed)}")
        read.append(Message(role, _text(value, here), learned=bool(value.get("weight", 1))))
        before = role
    return _with_failures(read, values, where)


def sequence_of(episode: Trajectory, *, mask_failed: bool) -> tuple[np.ndarray, np.ndarray]:
    """An episode as it was played: ids and mask, [T] each, prompt included.

    Args:
        mask_failed: leave turns with a call that failed out of the mask.
    """
    mask = np.array(episode.mask, np.int8)
    for turn in episode.turns:
        if mask_failed and any(call.status.is_error for call in turn.calls):
            mask[turn.start : turn.end] = 0
    before = np.zeros(len(episode.prompt_ids), np.int8)
    return np.concatenate([episode.prompt_ids, episode.ids]), np.concatenate([before, mask])


def texts_of(worked: Iterable[Worked]) -> list[str]:
    """All text in them that a tokenizer may be trained on."""
    texts: list[str] = []
    for one in worked:
        if isinstance(one, Demonstration):
            texts += one.turns
        elif isinstance(one, Conversation):
            texts += [message.text for message in one.messages]
        else:
            texts.append(one.text)
    return texts


def _text(value: dict[str, Any], here: str) -> str:
    """What a message says: its content, and its tool calls in the form the policy writes them."""
    content, calls = value.get("content") or "", value.get("tool_calls") or []
    if not isinstance(content, str) or not isinstance(calls, list):
        raise DataError(f"{here}: content must be text and tool_calls a list, not {content!r} and {calls!r}")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else {}
        try:
            name, arguments = function["name"], function["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (KeyError, ValueError) as error:
            raise DataError(f"{here}: {call!r} is no tool call with a name and arguments: {error!r}") from error
        written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        content += f"\n{CALL_OPEN}{written}{CALL_CLOSE}"
    return content


def _with_failures(read: Sequence[Message], values: Sequence[dict[str, Any]], where: str) -> list[Message]:
    """The messages, those of the assistant marked whose tools say in ``status`` that a call failed."""
    marked, caller = list(read), -1
    for index, (message, value) in enumerate(zip(read, values, strict=True)):
        if message.role == "assistant":
            caller = index
        status = value.get("status", ToolStatus.OK)
        if message.role != "tool" or status == ToolStatus.OK:
            continue
        if status not in list(ToolStatus):
            raise DataError(f"{where}: message {index} has the status {status!r}; it must be {', '.join(ToolStatus)}")
        if caller >= 0 and ToolStatus(status).is_error:
            learned = marked[caller].learned
            marked[caller] = Message("assistant", marked[caller].text, learned=learned, failed=True)
    return marked
