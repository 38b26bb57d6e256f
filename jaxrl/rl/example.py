"""The smallest trajectories there are, on which methods are tried before a run starts."""

import numpy as np

from jaxrl.records import Problem, RewardStatus, StopReason, ToolCall, ToolStatus, Trajectory, Turn


def example(sample: int) -> Trajectory:
    """A turn that calls, what the tool says, and a turn that answers, of 3 + ``sample`` tokens; sample 0 is right."""
    tokens = 3 + sample
    call = ToolCall("python", {"code": "print(1 + 1)"}, ToolStatus.OK)
    return Trajectory(
        problem=Problem("example", "1+1?", "2"),
        draw=0,
        sample=sample,
        prompt_ids=np.zeros(1, np.int32),
        ids=np.zeros(tokens, np.int32),
        mask=(np.arange(tokens) != 1).astype(np.int8),
        logprobs=np.zeros(tokens, np.float32),
        versions=np.zeros(tokens, np.int32),
        turns=(Turn(0, 1, "policy", (call,)), Turn(1, 2, "tool"), Turn(2, tokens, "policy")),
        stop_reason=StopReason.ANSWERED,
        answer="2" if sample == 0 else "3",
        answer_tags=1,
        reward=float(sample == 0),
        reward_status=RewardStatus.CORRECT if sample == 0 else RewardStatus.WRONG,
        greedy_reward=0.0,
    )
