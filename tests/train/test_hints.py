"""What a policy that is its own teacher is told."""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.config import AlgorithmConfig, ChatConfig, Config, ConfigError, TrainConfig
from jaxrl.records import Conversation, Demonstration, Message, Problem, RewardStatus, ToolCall, ToolStatus, Trajectory
from jaxrl.rl import algorithm
from jaxrl.rl.example import example
from jaxrl.text.chat import ChatFormat
from jaxrl.train.hints import FAILED, SOLVED, hinted
from jaxrl.train.session import what_is_recorded
from jaxrl.train.shares import check_processes
from tests.scripted_engine import small_tokenizer

TOKENIZER = small_tokenizer()
CHAT = ChatFormat(ChatConfig(show_tools=False), (), TOKENIZER)


def session(hint: Any, row_tokens: int = 512, demonstrations: tuple[Any, ...] = ()) -> Any:
    config = Config(algorithm=AlgorithmConfig(hint=hint), train=TrainConfig(row_tokens=row_tokens))
    return types.SimpleNamespace(config=config, chat=CHAT, demonstrations=demonstrations)


def attempt(draw: int, sample: int, *, right: bool, said: str = "") -> Trajectory:
    """Its tool, if it said anything, failed."""
    one = example(0)
    turn = dataclasses.replace(one.turns[0], calls=(ToolCall("python", {}, ToolStatus.ERROR, stderr=said),))
    return dataclasses.replace(
        one,
        problem=Problem(f"p{draw}", f"{draw}?", "2"),
        draw=draw,
        sample=sample,
        text=f"attempt {draw} {sample}",
        turns=(turn, *one.turns[1:]),
        reward_status=RewardStatus.CORRECT if right else RewardStatus.WRONG,
    )


def told(trajectories: list[Trajectory], *arguments: Any) -> list[str]:
    """The text before each response; "" where there is no hint."""
    found = hinted(session(*arguments), trajectories)
    return ["" if one is None else TOKENIZER.decode(one.prompt_ids) for one in found]


def test_an_attempt_is_told_another_that_solved_its_problem_or_else_what_its_tools_said() -> None:
    played = [
        *(attempt(0, 2, right=True), attempt(0, 1, right=True), attempt(0, 0, right=False, said="oops")),
        *(
            attempt(1, 0, right=True, said="a warning"),
            attempt(2, 0, right=False, said="NameError"),
            attempt(3, 0, right=False),
        ),
    ]
    texts = told(played, "attempts")
    assert [f"attempt 0 {other}" in text for text, other in zip(texts, (1, 2, 1), strict=False)] == [True] * 3
    assert all(SOLVED in text and "0?" in text and "oops" not in text for text in texts[:3])
    assert texts[3] == texts[5] == ""  # nobody else solved it; and nothing was said
    assert FAILED in texts[4] and "NameError" in texts[4] and SOLVED not in texts[4]


def test_a_demonstration_of_the_problem_is_the_hint() -> None:
    shown = (
        Demonstration(Problem("p0", "0?", "2"), ("first try", "15", "it is 2")),
        Conversation("p1", (Message("user", "1?"), Message("assistant", "so it is 3"))),
        Demonstration(Problem("p0", "0?", "2"), ("another",)),
    )
    texts = told([attempt(draw, 0, right=False, said="oops") for draw in range(3)], "demonstration", 512, shown)
    assert "first try" in texts[0] and "it is 2" in texts[0] and "another" not in texts[0]
    assert "so it is 3" in texts[1] and texts[1].count("1?") == 1 and texts[2] == ""


def test_what_a_row_cannot_hold_is_left_out() -> None:
    played = [attempt(0, 0, right=True), attempt(0, 1, right=False)]
    (needed,) = [len(one.prompt_ids) + len(one.ids) for one in hinted(session("attempts"), played) if one is not None]
    for room, there in ((needed, True), (needed - 1, False)):
        assert (hinted(session("attempts", room), played)[1] is not None) is there
    after = hinted(session("attempts"), played)[1]
    assert after.experts is None and np.array_equal(after.ids, played[1].ids)


def test_hints_and_what_looks_at_them_go_together() -> None:
    own, hint = "AlgorithmConfig.advantage=self_distillation", "AlgorithmConfig.hint=attempts"
    for settings, complaint in (
        ([own], "set AlgorithmConfig.hint"),
        ([hint], "AlgorithmConfig.hint is for advantages"),
    ):
        config = configuration.load("", settings)
        with pytest.raises(ConfigError, match=complaint):
            algorithm.check(config.algorithm, what_is_recorded(config))
    config = configuration.load("", [own, hint])
    algorithm.check(config.algorithm, what_is_recorded(config))
    check_processes(config, 1)
    with pytest.raises(ConfigError, match="hint='attempts' needs a single process, but this run has 2"):
        check_processes(config, 2)
    with pytest.raises(ConfigError, match="hint='demonstration' but SftConfig.demonstrations is empty"):
        configuration.load("", ["AlgorithmConfig.hint=demonstration", "SftConfig.demonstrations=''"])
