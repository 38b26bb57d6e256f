"""Reward components against published code, papers' tables and worked numbers."""

import collections
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxrl.records import Problem, RewardStatus, StopReason, ToolCall, ToolStatus, Trajectory, Turn
from jaxrl.rewards.components import COMPONENTS
from jaxrl.rewards.components.execution import correct_then_fast, execution_prediction
from jaxrl.rewards.components.judged import error_location, flawed_positive, location_reward, same_verdict, verdict_of
from jaxrl.rewards.components.outcome import correct, form, length, overlong
from jaxrl.rewards.components.tools import calls_of_turns, tool_use, turn_bonus
from jaxrl.rewards.graded import Graded
from jaxrl.rl.example import example

Golden = Callable[[str], list[dict[str, Any]]]
RIGHT, WRONG = example(0), example(1)


def graded(trajectory: Trajectory = RIGHT, judgement: str | None = None, most: int = 8, **changes: Any) -> Graded:
    return Graded(dataclasses.replace(trajectory, **changes), most, judgement)


def with_calls(trajectory: Trajectory, *of_turns: list[ToolStatus], **changes: Any) -> Graded:
    turns = tuple(Turn(0, 1, "policy", tuple(ToolCall("python", {}, s) for s in statuses)) for statuses in of_turns)
    return graded(trajectory, turns=turns, **changes)


OK, ERROR, PARSE = ToolStatus.OK, ToolStatus.ERROR, ToolStatus.PARSE_ERROR


def test_every_case_of_fapo(golden: Golden) -> None:
    """Of the policy's reward: what the rule said of the answer is given, since answers are read and graded otherwise
    here. The release runs ``eval`` on what the judge wrote, so that "1.0" is a step; here, as in verl's recipe, it is
    not. That recipe asks no judge about the test split; here no judge is asked in evaluations."""
    counted: collections.Counter[str] = collections.Counter()
    differ = 0
    for case in golden("fapo/rewards"):
        kind = case["id"].split("/")[0]
        counted[kind] += 1
        inputs, outputs = case["inputs"], case["outputs"]
        if kind == "genrm":
            verdict = verdict_of(inputs["judge_text"])
            assert location_reward(verdict, inputs["ground_truth"], inputs["total_steps"]) == outputs["score"], case
            continue
        for version, judgement in (
            ("fapo_repo", inputs["judge_reply"]),
            ("recipe_train", inputs["judge_reply"]),
            ("recipe_test", None),
        ):
            expected = outputs[version]
            status = RewardStatus.CORRECT if expected["acc"] else RewardStatus.WRONG
            seen = graded(judgement=judgement, reward_status=status)
            got = correct(seen, right=1.0, wrong=-1.0) + flawed_positive(seen)
            if version == "fapo_repo" and judgement == "\\boxed{1.0}" and expected["acc"]:
                assert (got, expected["score"]) == (1.0, 0.0), case["id"]
                differ += 1
            else:
                assert got == expected["score"], (case["id"], version)
    assert counted == {"reasoning": 144, "genrm": 110} and differ == 10


@pytest.mark.parametrize(("clean", "wrong", "mean", "flawed"), [(1, 7, -0.6, 0.6), (4, 4, 0, 0), (6, 2, 0.4, -0.4)])
def test_a_flawed_positive_pays_while_wrong_answers_outnumber_clean_ones(
    clean: int, wrong: int, mean: float, flawed: float
) -> None:
    group = [graded()] * clean + [graded(WRONG)] * wrong + [graded(judgement="\\boxed{2}")] * 2
    rewards = [correct(one, wrong=-1.0) + flawed_positive(one) for one in group]
    assert np.mean(rewards) == pytest.approx(mean) and rewards[-1] - np.mean(rewards) == pytest.approx(flawed)


def test_soft_overlong_punishment_is_that_of_trl(golden: Golden) -> None:
    cases = [case for case in golden("trl/advantages") if case["id"].startswith("soft_overlong")]
    for case in cases:
        settings = case["settings"]
        for tokens, expected in zip(case["inputs"]["lengths"], case["outputs"]["rewards"], strict=True):
            seen = graded(ids=np.zeros(tokens, np.int32))
            got = overlong(seen, buffer=settings["soft_punish_cache"], longest=settings["max_completion_len"])
            assert got == pytest.approx(expected), case["id"]
    assert len(cases) == 4
    assert overlong(graded(ids=np.zeros(9), most=10)) == -0.5  # a fifth of 10 is the buffer
    assert overlong(graded(ids=np.zeros(9), most=12), share=0.5) == -0.5
    assert overlong(graded(ids=np.zeros(4), most=8), buffer=100) == -0.5


def test_soft_overlong_punishment_is_that_of_areal_up_to_the_limit(golden: Golden) -> None:
    """Behind the longest response, where none of ours ends, AReaL's falls on and ours stays."""
    cases = [case for case in golden("areal/decoupled_ppo") if case["id"].startswith("overlong/")]
    for case in cases:
        settings, lengths = case["settings"], case["inputs"]["lengths"]
        factor, longest = settings["overlong_penalty_factor"], settings["max_response_length"]
        for tokens, expected in zip(lengths, case["outputs"]["added_reward"], strict=True):
            seen = graded(ids=np.zeros(tokens, np.int32))
            got = factor * overlong(seen, buffer=settings["overlong_tokens"], longest=longest)
            assert got == pytest.approx(expected if tokens <= longest else -factor, abs=1e-6), (case["id"], tokens)
    assert len(cases) == 3


def test_what_an_answer_and_its_form_are_worth() -> None:
    assert (correct(graded()), correct(graded(WRONG)), correct(graded(WRONG), wrong=-1.0)) == (1, 0, -1)
    assert form(graded()) == 1.0
    for change in ({"answer_tags": 2}, {"balanced_tags": False}, {"stop_reason": StopReason.MAX_TURNS}):
        assert form(graded(**change)) == 0.0
        assert form(graded(**change), good=0.0, bad=-0.1, when_correct=False) == 0.0
        assert form(graded(WRONG, **change), good=0.0, bad=-0.1, when_correct=False) == -0.1
    assert form(graded(WRONG), good=0.0, bad=-0.1, when_correct=False) == 0.0
    assert length(graded(ids=np.zeros(6))) == -0.75


def test_the_use_of_tools() -> None:
    assert tool_use(with_calls(RIGHT, [OK, ERROR], [OK, OK])) == 0.75
    assert tool_use(with_calls(RIGHT, []), without=-0.5) == -0.5
    assert tool_use(with_calls(RIGHT, [OK, ToolStatus.INFRA_ERROR])) == 1.0
    turns = calls_of_turns(with_calls(RIGHT, [OK], [OK, ERROR], []), good=1.0, bad=-1.0, silent=0.25)
    np.testing.assert_array_equal(turns, [1.0, -1.0, 0.25])


@pytest.mark.parametrize(("tool_turns", "expected"), [(0, -1.0), (1, -0.9), (3, -0.7), (4, -0.6), (7, -0.6)])
def test_the_turn_bonus_of_retools_recipe(tool_turns: int, expected: float) -> None:
    """verl counts the messages of a chat, num_turns = 2 + 2 · tool turns: min(-0.6, -1 + (num_turns - 2) / 2 · 0.1)."""
    seen = with_calls(WRONG, *[[OK]] * tool_turns, [])
    assert correct(seen, wrong=-1.0) + turn_bonus(seen) == pytest.approx(expected)
    assert turn_bonus(with_calls(RIGHT, [OK])) == 0.0


def test_correct_then_fast() -> None:
    assert correct_then_fast(graded(tool_seconds=2.0), reference_seconds=1.0) == 0.75
    assert correct_then_fast(graded(tool_seconds=0.5), reference_seconds=1.0) == 1.0
    assert correct_then_fast(graded(tool_seconds=0.5), reference_seconds=1.0, cap=1.5) == 1.25
    assert correct_then_fast(graded(tool_seconds=0.0)) == 1.0
    ran = [with_calls(WRONG, calls, tool_seconds=0.1) for calls in ([ERROR, OK], [OK, ERROR], [OK, PARSE], [])]
    assert [correct_then_fast(one) for one in ran] == [-0.3, -0.6, -1.0, -1.0]


def test_execution_prediction() -> None:
    def reward(answer: str | None, stdout: str, stderr: str = "") -> float:
        gold = json.dumps({"stdout": stdout, "stderr": stderr})
        return execution_prediction(graded(answer=answer, problem=Problem("p", "?", gold)))

    assert reward('{"stdout": "3", "stderr": ""}', "3\n") == pytest.approx(0.9 * 0.75 + 0.1)
    assert reward("3", "3") == pytest.approx(0.9 * 0.75 + 0.1)
    assert reward("4", "3") == pytest.approx(0.9 * 0.25 + 0.1)
    assert reward(None, "3") == 0.0
    half = '{"stdout": "", "stderr": "line 1\\nKeyError: 2"}'
    assert reward(half, "", "line 1\nKeyError: 3") == pytest.approx(0.9 * (1 + 0.5 / 3) / 2 + 0.1)


def test_a_judges_own_verdict() -> None:
    gold = json.dumps({"first_error": 4, "steps": 8})
    assert error_location(graded(answer="7", problem=Problem("p", "?", gold))) == 0.625
    assert error_location(graded(answer=None, problem=Problem("p", "?", gold))) == -1.0
    assert (same_verdict("7", gold), same_verdict("-1", gold), same_verdict("x", gold)) == (True, False, False)
    assert same_verdict("7", "no truth") is None and error_location(graded()) is None


def test_every_row_of_the_table_is_tried() -> None:
    """Here, but for reward models, which tests/train/test_reward_model.py trains first."""
    assert set(COMPONENTS) == {
        "correct", "form", "length", "overlong", "tool_use", "turn_bonus", "calls_of_turns", "flawed_positive",
        "error_location", "correct_then_fast", "execution_prediction", "reward_model", "process_reward",
    }  # fmt: skip
