"""Resample on Correct (RoC): of the correct trajectories of a group keep the clean ones, of the others a varied rest.

Source: rStar2-Agent (arXiv 2508.20722, section 3.2) and its release (microsoft/rStar, ``rstar2_agent/down_sample``).
Where the two differ there is a method for each, or one of these choices:

* Penalties count structured statuses. The release searches tool responses for the word "error" and misses
  the first turn when it counts turns; ``text_penalties`` does exactly that, for comparison.
* Quotas always sum to what is kept. The release rounds both sides half to even and stops on an assertion
  where both round the same way; there, negatives are rounded down (the paper's rule) and positives fill up.
* A group with fewer trajectories than are to be kept is kept whole; the release drops it.
* Groups are never cut to a multiple of the number of devices.
* Order means sample index, never finish order, so "the first negatives" is an unbiased choice.
"""

import re
from typing import Literal

import numpy as np

from jaxrl.records import ToolStatus, Trajectory
from jaxrl.rl.selection.candidates import Candidates

NO_CALL_PENALTY = 0.5  # a nudge to use the tool: worse than clean calls, better than failing ones
_TOOL_RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
_ANSWER = re.compile(r"<answer>.*?</answer>", re.DOTALL)
_ASSISTANT_TURN = re.compile(r"<\|im_start\|>assistant.*?<\|im_end\|>", re.DOTALL)


def roc(
    candidates: Candidates,
    *,
    min_positive: int = 2,
    min_negative: int = 2,
    error_penalty: bool = True,
    format_penalty: bool = True,
) -> np.ndarray:
    """The release's choice: the positives with the lowest penalties, ties by index; the first negatives.

    Args:
        candidates: the group; all of it stays where ``keep`` is 0.
        min_positive: floor on kept positives; -1 for none.
        min_negative: floor on kept negatives; -1 for none.
        error_penalty: count the share of failed calls.
        format_penalty: count surplus answer tags.

    Returns:
        Ascending indices.
    """
    if not candidates.keep:
        return np.arange(len(candidates.trajectories))
    penalties = [penalty(t, errors=error_penalty, form=format_penalty) for t in candidates.trajectories]
    floors = {"min_positive": min_positive, "min_negative": min_negative}
    return resample_on_correct(np.array(penalties), candidates.correct, candidates.keep, "greedy", **floors)


def roc_sampled(
    candidates: Candidates,
    *,
    min_positive: int = 2,
    min_negative: int = 2,
    error_penalty: bool = True,
    format_penalty: bool = True,
    epsilon: float = 0.1,
) -> np.ndarray:
    """The paper's choice: positives drawn with weight 1 / (penalty + epsilon), negatives drawn uniformly.

    Args:
        candidates: the group; all of it stays where ``keep`` is 0.
        min_positive: floor on kept positives; -1 for none.
        min_negative: floor on kept negatives; -1 for none.
        error_penalty: count the share of failed calls.
        format_penalty: count surplus answer tags.
        epsilon: keeps the weight of a clean trajectory finite.

    Returns:
        Ascending indices.
    """
    if not candidates.keep:
        return np.arange(len(candidates.trajectories))
    penalties = [penalty(t, errors=error_penalty, form=format_penalty) for t in candidates.trajectories]
    return resample_on_correct(
        np.array(penalties),
        candidates.correct,
        candidates.keep,
        "inverse",
        min_positive=min_positive,
        min_negative=min_negative,
        epsilon=epsilon,
        rng=candidates.rng,
    )


def error_penalty(calls: int, errors: int) -> float:
    """Share of tool calls that failed, in [0, 1]; 0.5 without any call (rStar2-Agent, p_err)."""
    return errors / calls if calls else NO_CALL_PENALTY


def format_penalty(answer_tags: int, turns: int, balanced: bool = True) -> float:
    """Surplus answer tags per turn, in [0, 1]; 1 without a tag or with an unbalanced one (rStar2-Agent, p_format).

    Args:
        answer_tags: closed answer tags in what the policy wrote.
        turns: all policy turns. The release counts the first one out; pass ``turns - 1`` for its value.
        balanced: every opened tag was closed.
    """
    if answer_tags < 1 or turns < 1 or not balanced:
        return 1.0
    return min(1.0, (answer_tags - 1) / turns)


def text_penalties(text: str) -> tuple[float, float]:
    """(error penalty, format penalty) of a decoded response as the rStar release computes them from text.

    Every quirk is kept: any "error" inside a tool response is a failure, a timeout without that word is
    none; answer tags count wherever they stand; turns are complete assistant turns inside the response, to
    which the first turn does not belong because its header is part of the prompt.

    Args:
        text: the response with special tokens kept.
    """
    responses = _TOOL_RESPONSE.findall(text)
    errors = sum("error" in response.lower() for response in responses)
    pairs = len(_ANSWER.findall(text))
    balanced = text.count("<answer>") == text.count("</answer>") == pairs
    turns = len(_ASSISTANT_TURN.findall(text))
    return error_penalty(len(responses), errors), format_penalty(pairs, turns, balanced)


def quotas(
    positives: int,
    negatives: int,
    keep: int,
    *,
    min_positive: int = 0,
    min_negative: int = 0,
    round_negatives_down: bool = False,
) -> tuple[int, int]:
    """How many positives and negatives to keep: the natural mix, with a floor on either side.

    Args:
        positives: correct trajectories in the group.
        negatives: the others.
        keep: trajectories to keep in all.
        min_positive: floor on kept positives, as far as there are any; -1 for none.
        min_negative: likewise for negatives.
        round_negatives_down: the paper's rule, ⌊negatives · keep / size⌋ and positives for the rest; else the
            release's, which rounds both to the nearest, halves to even.

    Returns:
        (positives kept, negatives kept); never more than there are, summing to min(keep, positives + negatives).

    Raises:
        ValueError: the floors exceed ``keep``.
    """
    if min_positive + min_negative > keep:
        raise ValueError(
            f"min_positive={min_positive} and min_negative={min_negative} exceed keep={keep}; lower them or raise keep"
        )
    size = positives + negatives
    if size <= keep:
        return positives, negatives
    kept_negatives = negatives * keep // size if round_negatives_down else round(negatives * keep / size)
    kept_positives = keep - kept_negatives if round_negatives_down else round(positives * keep / size)
    if kept_negatives <= (floor := min(min_negative, negatives)):
        kept_negatives, kept_positives = floor, keep - floor
    if kept_positives <= (floor := min(min_positive, positives)):
        kept_positives, kept_negatives = floor, keep - floor
    if kept_positives + kept_negatives != keep:  # two exact halves rounded the same way
        kept_negatives = negatives * keep // size
        kept_positives = keep - kept_negatives
    return kept_positives, kept_negatives


def resample_on_correct(
    penalties: np.ndarray,
    positive: np.ndarray,
    keep: int,
    mode: Literal["greedy", "inverse"] = "greedy",
    *,
    min_positive: int = 0,
    min_negative: int = 0,
    epsilon: float = 0.1,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Keep ``keep`` trajectories of a group: clean positives, varied negatives (rStar2-Agent, section 3.2).

    * ``greedy`` (the release): the positives with the lowest penalties, ties by index; the first negatives.
    * ``inverse`` (the paper): positives drawn without replacement with weight 1 / (penalty + epsilon);
      negatives drawn uniformly, their quota rounded down.

    Args:
        penalties: [G] quality penalty of each trajectory, 0 = clean.
        positive: [G] bool, True where the answer is correct.
        keep: trajectories to keep; a smaller group is kept whole.
        min_positive: floor on kept positives; -1 for none.
        min_negative: floor on kept negatives; -1 for none.
        epsilon: keeps the weight of a clean trajectory finite.
        rng: source of the draws; only ``inverse`` needs it.

    Returns:
        [min(keep, G)] ascending indices.

    Raises:
        ValueError: the floors exceed ``keep``, or ``inverse`` without ``rng`` or with ``epsilon <= 0``.
    """
    penalties, positive = np.asarray(penalties, np.float64), np.asarray(positive, bool)
    positives, negatives = np.flatnonzero(positive), np.flatnonzero(~positive)
    kept_positives, kept_negatives = quotas(
        len(positives),
        len(negatives),
        keep,
        min_positive=min_positive,
        min_negative=min_negative,
        round_negatives_down=mode == "inverse",
    )
    if mode == "greedy":
        chosen = positives[np.argsort(penalties[positives], kind="stable")[:kept_positives]], negatives[:kept_negatives]
    else:
        if rng is None or epsilon <= 0:
            raise ValueError(f"mode inverse needs a random generator and epsilon > 0, not rng={rng}, epsilon={epsilon}")
        chosen = (
            positives[_draw(1 / (penalties[positives] + epsilon), kept_positives, rng)],
            negatives[_draw(np.ones(len(negatives)), kept_negatives, rng)],
        )
    return np.sort(np.concatenate(chosen))


def penalty(trajectory: Trajectory, *, errors: bool = True, form: bool = True) -> float:
    """Quality penalty of a trajectory in [0, 2]: the sum of the penalties that are switched on."""
    total = 0.0
    if errors:
        total += error_penalty(*tool_counts(trajectory))
    if form:
        total += format_penalty(trajectory.answer_tags, trajectory.policy_turns, trajectory.balanced_tags)
    return total


def tool_counts(trajectory: Trajectory) -> tuple[int, int]:
    """(calls, errors) of a trajectory; a fault of ours is neither."""
    statuses = [call.status for call in trajectory.calls if call.status is not ToolStatus.INFRA_ERROR]
    return len(statuses), sum(status.is_error for status in statuses)


def _draw(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of ``count`` draws without replacement, each proportional to the weights that remain.

    An exponential race: arrival times with rate ``weight``, first come first kept (Efraimidis and Spirakis, 2006).
    """
    return np.argsort(rng.exponential(size=len(weights)) / weights, kind="stable")[:count]
