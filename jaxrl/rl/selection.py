"""Which trajectories of a group are trained on: equal-reward rejection and Resample on Correct (RoC).

Host side, numpy, a handful of numbers a group. Source: rStar2-Agent (arXiv 2508.20722, section 3.2) and its
release (microsoft/rStar, ``rstar2_agent/down_sample``). Where the two differ there is a mode, or one of
these choices:

* Penalties count structured statuses. The release searches tool responses for the word "error" and misses
  the first turn when it counts turns; ``text_penalties`` does exactly that, for comparison.
* Quotas always sum to what is kept. The release rounds both sides half to even and stops on an assertion
  where both round the same way; there, negatives are rounded down (the paper's rule) and positives fill up.
* A group with fewer trajectories than are to be kept is kept whole; the release drops it.
* Groups are never cut to a multiple of the number of devices.
* Order means sample index, never finish order, so "the first negatives" is an unbiased choice.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxrl.config import AlgorithmConfig
from jaxrl.records import ToolStatus, Trajectory

NO_CALL_PENALTY = 0.5  # a nudge to use the tool: worse than clean calls, better than failing ones
_TOOL_RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
_ANSWER = re.compile(r"<answer>.*?</answer>", re.DOTALL)
_ASSISTANT_TURN = re.compile(r"<\|im_start\|>assistant.*?<\|im_end\|>", re.DOTALL)

Statistics = dict[str, tuple[float, float]]  # name -> (sum, count); groups add up


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is kept of one group, and why not more.

    Attributes:
        kept: in the order of their sample index; empty when the group is rejected.
        rejected: why the whole group was left out; "" when it was not.
        statistics: (sum, count) by name, over raw and kept trajectories.
    """

    kept: tuple[Trajectory, ...]
    rejected: Literal["", "untrainable", "all_correct", "all_wrong"]
    statistics: Statistics


def equal_reward(rewards: np.ndarray) -> bool:
    """True if every reward [G] is close to the first (within 1e-8 + 1e-5 |first|), also for G < 2.

    Such a group has no advantage to learn from.
    """
    rewards = np.asarray(rewards, np.float64)
    return bool(np.isclose(rewards, rewards[:1], rtol=1e-5, atol=1e-8).all())


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
    mode: Literal["greedy", "inverse", "off"] = "greedy",
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
    * ``off``: the first ``keep``, whatever they are.

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
    if mode == "off":
        return np.arange(min(keep, len(positive)))
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


def select_group(trajectories: Sequence[Trajectory], config: AlgorithmConfig, rng: np.random.Generator) -> Selection:
    """Choose what to train on from one group: leave out, reject, resample.

    Trajectories that our own machinery spoiled are left out first and counted. A group whose remaining
    trajectories are all correct or all wrong is rejected (``reject_equal``), judged before any resampling.
    The rest goes through Resample on Correct. The result does not depend on the order of the input.

    Args:
        trajectories: all trajectories of one draw.
        config: selection switches, quotas and penalties.
        rng: source of the draws; seed it from the run's seed and the draw, so that a resumed run draws the same.
    """
    ordered = sorted(trajectories, key=lambda trajectory: trajectory.sample)
    trainable = [trajectory for trajectory in ordered if trajectory.trainable]
    correct = np.array([trajectory.correct for trajectory in trainable], bool)
    penalties = np.array([penalty(trajectory, config) for trajectory in trainable], np.float64)
    rejected = _rejection(correct, config.reject_equal)
    if rejected:
        kept = np.arange(0)
    else:
        kept = resample_on_correct(
            penalties,
            correct,
            config.keep,
            config.roc,
            min_positive=config.min_positive,
            min_negative=config.min_negative,
            epsilon=config.roc_epsilon,
            rng=rng,
        )
    counts = np.array([tool_counts(trajectory) for trajectory in trainable], np.int64).reshape(-1, 2)
    statistics = _statistics(correct, penalties, counts, kept)
    statistics["untrainable_share"] = (float(len(ordered) - len(trainable)), float(len(ordered)))
    statistics["groups_all_correct"] = (float(rejected == "all_correct"), 1.0)
    statistics["groups_all_wrong"] = (float(rejected == "all_wrong"), 1.0)
    return Selection(tuple(trainable[index] for index in kept), rejected, statistics)


def penalty(trajectory: Trajectory, config: AlgorithmConfig) -> float:
    """Quality penalty of a trajectory in [0, 2]: the sum of the penalties that are switched on."""
    total = 0.0
    if config.error_penalty:
        total += error_penalty(*tool_counts(trajectory))
    if config.format_penalty:
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


def _rejection(correct: np.ndarray, reject_equal: bool) -> Literal["", "untrainable", "all_correct", "all_wrong"]:
    if not len(correct):
        return "untrainable"
    if not reject_equal or not equal_reward(correct):
        return ""
    return "all_correct" if correct[0] else "all_wrong"


def _statistics(correct: np.ndarray, penalties: np.ndarray, counts: np.ndarray, kept: np.ndarray) -> Statistics:
    """What selection did, as (sum, count). ``counts`` [G, 2] holds calls and errors."""
    chosen = np.zeros(len(correct), bool)
    chosen[kept] = True

    def share(values: np.ndarray, among: np.ndarray) -> tuple[float, float]:
        return float(values[among].sum()), float(among.sum())

    def error_share(among: np.ndarray) -> tuple[float, float]:
        calls, errors = counts[among].sum(axis=0)
        return float(errors), float(calls)

    return {
        "pass_rate": share(correct, np.ones(len(correct), bool)),
        "pass_rate_kept": share(correct, chosen),
        "kept_share_of_correct": share(chosen, correct),
        "kept_share_of_wrong": share(chosen, ~correct),
        "penalty_of_correct_kept": share(penalties, correct & chosen),
        "penalty_of_correct_dropped": share(penalties, correct & ~chosen),
        "tool_error_share_in_correct": error_share(correct),
        "tool_error_share_in_correct_kept": error_share(correct & chosen),
        "tool_error_share_in_wrong": error_share(~correct),
    }
