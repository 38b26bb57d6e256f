import asyncio
import dataclasses
import math

import numpy as np
import pytest

from jaxrl.config import ConfigError, EvalConfig
from jaxrl.episodes import play_episode
from jaxrl.evaluate.run import FIRST_EVALUATION_DRAW, evaluate, report
from jaxrl.records import Group, Problem, RewardStatus, StopReason, ToolCall, ToolStatus, Trajectory, Turn
from jaxrl.rewards.scorer import CORRECTNESS
from tests.scripted_engine import UNFINISHED, answer, call
from tests.test_episodes import Tool, fault, make_player, ok

PROBLEMS = [Problem(f"p/{index}", f"What is {index}?", str(index)) for index in range(3)]


def run(script, config, **settings):
    player = make_player(lambda draw, sample: script(draw - FIRST_EVALUATION_DRAW, sample), **settings)
    seen = []
    figures = asyncio.run(evaluate(player, PROBLEMS, config, on_group=seen.append))
    return figures, player, seen


def test_figures_of_a_played_evaluation():
    def script(problem, sample):
        if problem == 0:  # right with a failing call on the way, then right at once
            return [call("bad"), call("good"), answer("0")] if sample == 0 else [answer("0.0")]
        if problem == 1:
            return [answer("7")] if sample == 0 else [answer("7") + UNFINISHED]
        return [call("lost"), answer("2")] if sample == 0 else [call("good"), answer("2")]

    outcomes = {"bad": ToolCall("python", {}, ToolStatus.ERROR, stderr="KeyError: 1"), "good": ok("1"), "lost": fault()}
    figures, player, seen = run(
        script, EvalConfig(samples=2, temperature=0.7, k=(1, 2)), tool=Tool(outcomes.__getitem__), max_turns=5
    )
    assert [group.problem for group in seen] == PROBLEMS
    # The scripted verifier compares texts, so "0.0" is wrong here; as a vote it is the same as "0".
    assert figures.average.value == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert figures.pass_at[1].value == pytest.approx(0.5)
    assert figures.pass_at[2].value == pytest.approx((1.0 + 0.0) / 2), "one sample of the third problem was lost"
    assert figures.majority.value == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert (figures.trajectories, figures.excluded, figures.samples, figures.greedy) == (5, 1, 2, False)
    assert figures.tool_error_share_in_correct == pytest.approx(1 / 3)
    assert figures.calls == pytest.approx(3 / 5)
    assert figures.truncated_share == pytest.approx(1 / 5)
    assert figures.stop_reasons == {StopReason.ANSWERED: 4, StopReason.MAX_TOKENS: 1}
    kept = [t for group in seen for t in group.trajectories if t.trainable]
    assert figures.response_tokens == pytest.approx(np.mean([len(t.ids) for t in kept]))
    assert player.engine.temperatures == {0.7}


def test_greedy_plays_each_problem_once():
    figures, player, _ = run(lambda problem, sample: [answer("1")], EvalConfig(samples=8, temperature=0.0, k=(1, 8)))
    assert (figures.greedy, figures.samples, figures.trajectories) == (True, 1, 3)
    assert list(figures.pass_at) == [1]
    assert player.engine.temperatures == {0.0}


def test_draws_are_those_of_no_training_and_the_same_every_time():
    _, player, _ = run(lambda problem, sample: [answer("1")], EvalConfig(samples=2, k=(1,)))
    assert sorted(player.engine.opened) == [(FIRST_EVALUATION_DRAW + p, s) for p in range(3) for s in range(2)]
    assert FIRST_EVALUATION_DRAW + 10**6 < 2**31, "a random key is named by 32 bits"


def test_more_k_than_samples_is_refused():
    with pytest.raises(ConfigError, match="EvalConfig.samples=2; raise samples or lower k"):
        run(lambda problem, sample: [answer("1")], EvalConfig(samples=2, k=(1, 4)))


def test_promise_5_what_the_verifier_could_not_grade_is_left_out():
    def trajectory(status, calls=()):
        empty = np.zeros(0, np.int32)
        turn = Turn(0, 0, "policy", tuple(calls))
        return Trajectory(
            PROBLEMS[0], 0, 0, empty, empty, empty, empty, empty, (turn,), StopReason.ANSWERED, answer="0",
            reward_status=status,
        )  # fmt: skip

    trajectories = tuple(
        map(trajectory, [RewardStatus.CORRECT, RewardStatus.VERIFIER_TIMEOUT, RewardStatus.VERIFIER_CRASH])
    )
    figures = report([Group(PROBLEMS[0], 0, trajectories)], k=[1], samples=3, greedy=False)
    assert (figures.average.value, figures.trajectories, figures.excluded) == (1.0, 1, 2)
    assert math.isnan(figures.tool_error_share_in_correct), "no calls, no share"


def test_no_problems_is_all_nan():
    figures = report([], k=[1], samples=2, greedy=False)
    assert math.isnan(figures.average.value) and math.isnan(figures.calls) and figures.trajectories == 0


def test_no_judge_is_asked_in_an_evaluation():
    asked = []
    player = dataclasses.replace(
        make_player(lambda draw, sample: [answer("0")]), scorer=dataclasses.replace(CORRECTNESS, judge=asked.append)
    )
    asyncio.run(evaluate(player, PROBLEMS, EvalConfig(samples=2, k=(1,))))
    assert not asked
    trajectory = asyncio.run(play_episode(player, PROBLEMS[0], 0, 0))
    assert asked == [dataclasses.replace(trajectory, reward=0.0, components={})]
