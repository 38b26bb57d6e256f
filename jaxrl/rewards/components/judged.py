"""What a judge says of a solution, and what a judge's own verdict is worth (FAPO, arXiv 2510.22543).

A judge answers with the number of the first wrong step in a box, or -1 for none.
"""

import json
import re

from jaxrl.rewards.answers import last_box
from jaxrl.rewards.graded import Graded

NO_ERROR = -1


def flawed_positive(graded: Graded) -> float:
    """-1 where the answer is correct and the judge found a wrong step, else 0. It takes ``RewardConfig.judge``.

    With weight 1 beside 1 and -1 for the answer, a flawed correct one is worth 0: more than the mean while wrong
    answers outnumber clean ones, less afterwards. What the judge wrote and what cannot be read count as no flaw.
    """
    verdict = None if graded.judgement is None else verdict_of(graded.judgement)
    return -1.0 if graded.trajectory.correct and verdict not in (None, NO_ERROR) else 0.0


def error_location(graded: Graded) -> float | None:
    """What the policy's own verdict on a solution is worth, for training a judge; see ``location_reward``.

    The problem's answer is a JSON object {"first_error": step or -1, "steps": count}; ``RewardConfig.verifier`` is then
    "error_location" too. None where it is something else.
    """
    truth = _truth_of(graded.trajectory.problem.answer)
    return None if truth is None else location_reward(_step_number(graded.trajectory.answer or ""), *truth)


def location_reward(verdict: int | None, truth: int, steps: int) -> float:
    """1 and -1 for a right and a wrong verdict on whether there is an error; 1 - distance / steps where both say so.

    Args:
        verdict: step from 0, -1 for no error; None, and what lies outside, is worth -1.
        truth: the same.
        steps: of the solution.
    """
    if verdict is None or not NO_ERROR <= verdict < steps:
        return -1.0
    if NO_ERROR in (verdict, truth):
        return 1.0 if verdict == truth else -1.0
    return 1.0 - abs(verdict - truth) / steps


def same_verdict(answer: str, gold: str) -> bool | None:
    """Whether a judge's answer finds an error where there is one, and none where there is none."""
    truth = _truth_of(gold)
    return None if truth is None else location_reward(_step_number(answer), *truth) > 0


def _truth_of(gold: str) -> tuple[int, int] | None:
    """First wrong step and steps of a solution; None where the text is something else."""
    try:
        truth = json.loads(gold)
        return truth["first_error"], truth["steps"]
    except (ValueError, KeyError, TypeError):
        return None


def verdict_of(reply: str) -> int | None:
    """The integer in the last box of a judge's reply; None without a box or with anything else in it."""
    box = last_box(reply)
    return None if box is None else _step_number(box)


def _step_number(text: str) -> int | None:
    """An integer in ASCII digits, white space around it aside."""
    return int(text) if re.fullmatch(r"\s*[-+]?[0-9]{1,9}\s*", text) else None
