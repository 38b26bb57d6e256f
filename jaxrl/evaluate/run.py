"""One evaluation: play every problem, leave out what our own machinery spoiled, and average."""

import collections
import dataclasses
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from jaxrl.config import ConfigError, EvalConfig
from jaxrl.episodes import Player, play_groups
from jaxrl.evaluate.metrics import avg_at_k, maj_at_k, pass_at_k
from jaxrl.observe.report import Estimate
from jaxrl.records import Group, Problem, StopReason, Trajectory
from jaxrl.rewards.integers import read_integer

FIRST_EVALUATION_DRAW = 1 << 30
"""Training counts its draws from 0, evaluation from here, so that no random key is used in both. Every evaluation uses
the same keys: two weight versions are compared on the same luck."""


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """Figures of one evaluation, over the trajectories that count.

    Attributes:
        average: avg@k, k = all samples (the share of correct samples, pass@1).
        pass_at: pass@k for each k asked for that there are samples for.
        majority: maj@k, k = all samples.
        samples: trajectories played for each problem.
        trajectories: how many count.
        excluded: how many do not, because sandbox, engine or verifier failed.
        tool_error_share_in_correct: failed calls among the calls of correct trajectories; NaN without such calls.
        calls: tool calls of a trajectory, mean.
        response_tokens: length of a response, mean, tool output included.
        truncated_share: trajectories that ran out of tokens.
        stop_reasons: how many trajectories ended in which way.
        greedy: the policy's most probable token was taken each time.
    """

    average: Estimate
    pass_at: dict[int, Estimate]
    majority: Estimate
    samples: int
    trajectories: int
    excluded: int
    tool_error_share_in_correct: float
    calls: float
    response_tokens: float
    truncated_share: float
    stop_reasons: dict[StopReason, int]
    greedy: bool


async def evaluate(
    player: Player,
    problems: Sequence[Problem],
    config: EvalConfig,
    *,
    on_group: Callable[[Group], None] | None = None,
    in_flight: int | None = None,
    play: Callable[..., AsyncGenerator[Group]] = play_groups,
) -> EvalReport:
    """Play ``config.samples`` trajectories of every problem (one where greedy) and report.

    Args:
        player: its temperature is replaced by ``config.temperature``, and no judge is asked.
        on_group: called with every group in the order of the problems (progress, traces).
        in_flight: as for ``play_groups``.
        play: what plays the groups, called as ``play_groups`` is.

    Raises:
        ConfigError: a k greater than the number of samples.
    """
    greedy = config.temperature == 0
    if not greedy and max(config.k, default=1) > config.samples:
        raise ConfigError(
            f"EvalConfig.k={config.k} asks for more than EvalConfig.samples={config.samples}; raise samples or lower k"
        )
    samples = 1 if greedy else config.samples
    player = dataclasses.replace(player, temperature=config.temperature, scorer=player.scorer.unjudged())
    draws = ((FIRST_EVALUATION_DRAW + index, problem) for index, problem in enumerate(problems))
    groups = []
    async with aclosing(play(player, draws, samples, in_flight=in_flight)) as played:
        async for group in played:
            groups.append(group)
            if on_group is not None:
                on_group(group)
    return report(groups, k=[k for k in config.k if k <= samples], samples=samples, greedy=greedy)


def report(groups: Sequence[Group], *, k: Sequence[int], samples: int, greedy: bool) -> EvalReport:
    """The figures of groups that were played."""
    kept = [[trajectory for trajectory in group.trajectories if trajectory.trainable] for group in groups]
    correct = [[trajectory.correct for trajectory in row] for row in kept]
    flat = [trajectory for row in kept for trajectory in row]
    statuses = [call.status for trajectory in flat if trajectory.correct for call in trajectory.calls]
    reasons = collections.Counter(trajectory.stop_reason for trajectory in flat)
    return EvalReport(
        average=avg_at_k(correct),
        pass_at={count: pass_at_k(correct, count) for count in k},
        majority=maj_at_k([[_vote(trajectory) for trajectory in row] for row in kept], correct),
        samples=samples,
        trajectories=len(flat),
        excluded=sum(len(group.trajectories) for group in groups) - len(flat),
        tool_error_share_in_correct=_share(sum(status.is_error for status in statuses), len(statuses)),
        calls=_share(sum(len(trajectory.calls) for trajectory in flat), len(flat)),
        response_tokens=_share(sum(len(trajectory.ids) for trajectory in flat), len(flat)),
        truncated_share=_share(reasons[StopReason.MAX_TOKENS], len(flat)),
        stop_reasons=dict(reasons),
        greedy=greedy,
    )


def _vote(trajectory: Trajectory) -> str | None:
    """The answer in the form in which it votes: integers in canonical digits, other text without its spaces."""
    if trajectory.answer is None:
        return None
    return read_integer(trajectory.answer) or "".join(trajectory.answer.split())


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan
