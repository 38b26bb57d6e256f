"""What the answer, its form and its length are worth."""

from jaxrl.records import StopReason
from jaxrl.rewards.graded import Graded


def correct(graded: Graded, *, right: float = 1.0, wrong: float = 0.0) -> float:
    """``right`` for a correct answer, ``wrong`` for any other and for none (ReTool and FAPO: 1 and -1)."""
    return right if graded.trajectory.correct else wrong


def form(graded: Graded, *, good: float = 1.0, bad: float = 0.0, when_correct: bool = True) -> float:
    """Whether the trajectory ended with one answer whose tags are balanced.

    Args:
        graded: see ``Graded``.
        good: worth of good form.
        bad: worth of any other.
        when_correct: False gives 0 for a correct answer, whatever its form (DataMind: good 0, bad -0.1).
    """
    trajectory = graded.trajectory
    if trajectory.correct and not when_correct:
        return 0.0
    one = trajectory.stop_reason is StopReason.ANSWERED and trajectory.answer_tags == 1 and trajectory.balanced_tags
    return good if one else bad


def length(graded: Graded) -> float:
    """-tokens / longest response allowed, tool output included: a small price of every token."""
    return -len(graded.trajectory.ids) / graded.max_response_tokens


def overlong(graded: Graded, *, buffer: int = -1, share: float = 0.2, longest: int = 0) -> float:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13): 0 up to longest - buffer, then down to -1.

    -(tokens - (longest - buffer)) / buffer inside the buffer, -1 behind it.

    Args:
        graded: see ``Graded``; tokens count tool output.
        buffer: tokens, at most ``longest``; -1 = ``share`` of it; 0 punishes only what is longer.
        share: 4096 of 20480 tokens in DAPO.
        longest: tokens; 0 = the longest response allowed.
    """
    longest = longest or graded.max_response_tokens
    buffer = round(share * longest) if buffer < 0 else min(buffer, longest)
    excess = len(graded.trajectory.ids) - (longest - buffer)
    return -min(excess / max(buffer, 1), 1.0) if excess > 0 else 0.0
