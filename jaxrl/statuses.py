"""How tool calls, trajectories and gradings end. Apart from the records, so that reading a status loads no jax."""

import enum


class ToolStatus(enum.StrEnum):
    """How one tool call ended. Decided by the trusted side, never by what the called code printed."""

    OK = "ok"
    ERROR = "error"  # the code raised, or left with a non-zero exit status or a signal
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    OUTPUT_LIMIT = "output_limit"
    PARSE_ERROR = "parse_error"  # the call itself could not be read
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"
    INFRA_ERROR = "infra_error"  # ours, not the model's: retried, then the trajectory leaves the batch

    @property
    def is_error(self) -> bool:
        """Whether the call counts against the model: every outcome but success and faults of ours."""
        return self not in (ToolStatus.OK, ToolStatus.INFRA_ERROR)

    @property
    def is_unreadable(self) -> bool:
        """Whether nothing was run because the call itself was wrong."""
        return self in (ToolStatus.PARSE_ERROR, ToolStatus.UNKNOWN_TOOL, ToolStatus.BAD_ARGUMENTS)


class StopReason(enum.StrEnum):
    """Why a trajectory ended."""

    ANSWERED = "answered"  # the last turn made no call and holds an answer
    NO_CALL = "no_call"  # the last turn made no call and holds no answer
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    WALL_CLOCK = "wall_clock"
    INFRA_ERROR = "infra_error"


class RewardStatus(enum.StrEnum):
    """What the verifier could say. Only the first three may train."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    VERIFIER_TIMEOUT = "verifier_timeout"
    VERIFIER_CRASH = "verifier_crash"

    @property
    def trainable(self) -> bool:
        return self in (RewardStatus.CORRECT, RewardStatus.WRONG, RewardStatus.NO_ANSWER)
