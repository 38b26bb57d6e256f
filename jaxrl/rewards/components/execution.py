"""Rewards about what code does: how fast it is, and what it prints."""

import json

from jaxrl.records import ToolStatus
from jaxrl.rewards.graded import Graded


def correct_then_fast(
    graded: Graded,
    *,
    reference_seconds: float = 1.0,
    cap: float = 1.0,
    wrong: float = -0.3,
    failed: float = -0.6,
    unreadable: float = -1.0,
) -> float:
    """0.5 + 0.5 · min(reference / seconds, cap) for a correct answer; else by how the last call ended (ACECode).

    arXiv 2412.17264. Speed counts only once the answer is right. The levels below are those common since CodeRL; the
    paper names none.

    Args:
        graded: its calls' run time counts, without waiting in queues.
        reference_seconds: what a good solution takes.
        cap: more than 1 pays for being faster than that.
        wrong: the code ran and the answer is wrong.
        failed: the last call raised, or ran out of something.
        unreadable: the last call could not be run at all, or there was none.
    """
    trajectory = graded.trajectory
    if trajectory.correct:
        return 0.5 + 0.5 * min(reference_seconds / max(trajectory.tool_seconds, 1e-9), cap)
    status = trajectory.calls[-1].status if trajectory.calls else ToolStatus.PARSE_ERROR
    if status.is_unreadable:
        return unreadable
    return failed if status.is_error else wrong


def execution_prediction(graded: Graded) -> float:
    """0.9 · accuracy + 0.1 for an answer in the right form, else 0 (CodeBoost, arXiv 2508.05242).

    Accuracy is the mean of 1 for exactly the right standard output and half of the share of lines of standard error
    that prediction and truth have in common. Problem and answer are what code prints: a JSON object with "stdout" and
    "stderr", or plain text, which is standard output alone. ``RewardConfig.verifier`` is then "execution" too.
    """
    answer, gold = graded.trajectory.answer, graded.trajectory.problem.answer
    if answer is None:
        return 0.0
    (stdout, stderr), (true_stdout, true_stderr) = _printed(answer), _printed(gold)
    predicted, true = set(stderr.splitlines()), set(true_stderr.splitlines())
    common = len(predicted & true) / len(predicted | true) if predicted | true else 1.0
    return 0.9 * (float(stdout == true_stdout) + 0.5 * common) / 2 + 0.1


def same_output(answer: str, gold: str) -> bool:
    """Whether a prediction is right in both streams."""
    return _printed(answer) == _printed(gold)


def _printed(text: str) -> tuple[str, str]:
    """Standard output and standard error, white space at their ends aside."""
    try:
        streams = json.loads(text)
    except ValueError:
        streams = text
    if not isinstance(streams, dict):
        return text.strip(), ""
    return str(streams.get("stdout", "")).strip(), str(streams.get("stderr", "")).strip()
