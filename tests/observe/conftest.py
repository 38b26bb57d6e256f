"""Episodes to observe."""

import dataclasses

import numpy as np
import pytest

from jaxrl.records import (
    Problem,
    RewardStatus,
    StopReason,
    ToolCall,
    ToolStatus,
    Trajectory,
    Turn,
)

RESPONSE = "I add them.<call>print(3 + 4)</call>|[7]||The sum is 7.|"
"""Text of the episode: 36 characters of policy, 4 of the environment, then policy again; one token a character."""


@pytest.fixture
def episode() -> Trajectory:
    """Two policy turns around one tool turn; token ids are code points, so ``"".join(map(chr, ids))`` decodes."""
    ids = np.array([ord(letter) for letter in RESPONSE], np.int32)
    mask = np.ones(len(ids), np.int8)
    mask[37:41] = 0
    rng = np.random.default_rng(0)
    logprobs = np.where(mask, -rng.random(len(ids)), 0).astype(np.float32)
    call = ToolCall(
        "python",
        {"code": "print(3 + 4)\n"},
        ToolStatus.OK,
        stdout="7\n",
        seconds=0.004,
        queue_seconds=0.01,
        isolation="namespaces",
    )
    return Trajectory(
        problem=Problem("stories/17", "3 apples and 4 apples?", "7", "stories"),
        draw=5,
        sample=2,
        prompt_ids=np.array([ord(letter) for letter in "Q: 3 + 4?"], np.int32),
        ids=ids,
        mask=mask,
        logprobs=logprobs,
        versions=np.where(mask, 3, -1).astype(np.int32),
        turns=(Turn(0, 37, "policy", (call,)), Turn(37, 41, "tool"), Turn(41, len(ids), "policy")),
        stop_reason=StopReason.ANSWERED,
        text=RESPONSE,
        answer="7",
        answer_tags=1,
        reward=1.0,
        reward_status=RewardStatus.CORRECT,
        seconds=1.5,
        tool_seconds=0.004,
    )


@pytest.fixture
def wrong_episode(episode: Trajectory) -> Trajectory:
    """As ``episode``, but the call failed twice in the same way and the answer is wrong."""
    call = dataclasses.replace(episode.calls[0], status=ToolStatus.ERROR, stdout="", stderr="NameError: x")
    turns = (dataclasses.replace(episode.turns[0], calls=(call, call)), *episode.turns[1:])
    return dataclasses.replace(episode, sample=3, turns=turns, answer="8", reward=0.0, reward_status=RewardStatus.WRONG)
