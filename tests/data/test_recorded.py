"""Chat messages from files and episodes of runs, as something to learn from."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from jaxrl.config import SftConfig
from jaxrl.data import recorded
from jaxrl.data.problems import DataError
from jaxrl.observe.traces import write_episodes
from jaxrl.records import Conversation, Message, Problem, ToolCall, Trajectory, Turn
from jaxrl.statuses import RewardStatus, StopReason, ToolStatus

CALL = {"type": "function", "function": {"name": "python", "arguments": '{"code": "1+"}'}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "Add.", "tool_calls": [CALL]},
    {"role": "tool", "content": "SyntaxError", "status": "error"},
    {"role": "assistant", "content": "It is 2.", "weight": 0},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def write(path: pathlib.Path, *rows: Any) -> SftConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SftConfig(demonstrations=str(path))


def episode(sample: int, status: RewardStatus, call: ToolStatus = ToolStatus.OK) -> Trajectory:
    calls = (ToolCall("python", {"code": "1"}, call),)
    return Trajectory(
        problem=Problem("p", "1?", "1"),
        draw=0,
        sample=sample,
        prompt_ids=np.array([7, 8], np.int32),
        ids=np.arange(6, dtype=np.int32),
        mask=np.array([1, 1, 0, 0, 1, 1], np.int8),
        logprobs=np.zeros(6, np.float32),
        versions=np.zeros(6, np.int32),
        turns=(Turn(0, 2, "policy", calls), Turn(2, 4, "tool"), Turn(4, 6, "policy")),
        stop_reason=StopReason.ANSWERED,
        reward_status=status,
    )


def test_messages_keep_their_weights_calls_and_failures(tmp_path: pathlib.Path) -> None:
    sft = write(tmp_path / "chat.jsonl", {"id": "sums/1", "messages": MESSAGES}, {"messages": MESSAGES[1:]})
    first, second = recorded.read(sft)
    called = 'Add.\n<tool_call>{"name": "python", "arguments": {"code": "1+"}}</tool_call>'
    assert first == Conversation(
        "sums/1",
        (
            Message("system", "Be brief."),
            Message("user", "1+1?"),
            Message("assistant", called, failed=True),
            Message("tool", "SyntaxError"),
            Message("assistant", "It is 2.", learned=False),
            Message("user", "Sure?"),
            Message("assistant", "Yes."),
        ),
    )
    assert second.id.endswith("chat.jsonl:2") and len(second.messages) == 6
    assert recorded.read(dataclasses.replace(sft, count=1)) == (first,)


def test_a_call_that_failed_through_a_fault_of_the_sandbox_does_not_count_against_the_policy(tmp_path) -> None:
    rows = [dict(message) for message in MESSAGES]
    rows[3]["status"] = "infra_error"
    (read,) = recorded.read(write(tmp_path / "chat.jsonl", {"messages": rows}))
    assert not any(message.failed for message in read.messages)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", '"messages" must be a list'),
        ([{"role": "robot", "content": "x"}], "role is system, user, assistant or tool"),
        ([{"role": "assistant", "content": "x"}], "at the beginning comes one of system or user"),
        (MESSAGES[1:2] + MESSAGES[3:], "message 1 is of 'tool', but after 'user' comes one of assistant"),
        (MESSAGES[:2], "the last message is of 'user'"),
        (MESSAGES[1:2] + [{"role": "assistant", "content": "x", "weight": 0}], "no assistant message has a weight"),
        (MESSAGES[1:2] + [{"role": "assistant", "content": 3}], "content must be text"),
        (MESSAGES[1:2] + [{"role": "assistant", "tool_calls": [{"name": "f"}]}], "no tool call with a name"),
        (MESSAGES[1:3] + [{"role": "tool", "content": "x", "status": "bad"}] + MESSAGES[4:], "has the status 'bad'"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_line(tmp_path: pathlib.Path, messages: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as error:
        recorded.read(write(tmp_path / "chat.jsonl", {"messages": MESSAGES}, {"messages": messages}))
    assert "chat.jsonl:2" in str(error.value)


def test_of_a_run_only_episodes_that_were_trained_on_and_solved_are_learned(tmp_path: pathlib.Path) -> None:
    right, wrong = episode(0, RewardStatus.CORRECT), episode(1, RewardStatus.WRONG)
    write_episodes(tmp_path, "rl", 3, [right, wrong, episode(2, RewardStatus.VERIFIER_CRASH)])
    write_episodes(tmp_path, "eval", 4, [right, right])
    sft = SftConfig(demonstrations=str(tmp_path))
    assert [one.sample for one in recorded.read(sft)] == [0]
    assert [one.sample for one in recorded.read(dataclasses.replace(sft, episodes="all"))] == [0, 1]


def test_a_run_without_such_episodes_is_refused(tmp_path: pathlib.Path) -> None:
    write_episodes(tmp_path, "eval", 4, [episode(0, RewardStatus.CORRECT)])
    with pytest.raises(DataError, match="0 files with 0 episodes of training"):
        recorded.read(SftConfig(demonstrations=str(tmp_path)))


@pytest.mark.parametrize(
    ("call", "learned"), [(ToolStatus.OK, [1, 1]), (ToolStatus.TIMEOUT, [0, 0]), (ToolStatus.INFRA_ERROR, [1, 1])]
)
def test_failed_calls_stay_in_context_with_an_empty_mask(call: ToolStatus, learned: list[int]) -> None:
    played = episode(0, RewardStatus.CORRECT, call)
    ids, mask = recorded.sequence_of(played, mask_failed=True)
    assert ids.tolist() == [7, 8, 0, 1, 2, 3, 4, 5]
    assert mask.tolist() == [0, 0, *learned, 0, 0, 1, 1]
    assert recorded.sequence_of(played, mask_failed=False)[1].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
