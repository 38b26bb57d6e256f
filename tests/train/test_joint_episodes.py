"""Episodes that several agents play: who is asked what, who is compared with whom, and what is refused."""

import asyncio
import pathlib
import re

import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.config import AlgorithmConfig, ChatConfig, ConfigError, EnvConfig
from jaxrl.episodes import Player, play_group
from jaxrl.records import Group, Problem, RewardStatus
from jaxrl.rl import algorithm
from jaxrl.rl.advantages.roles import hierarchical
from jaxrl.rl.outcomes import Outcomes, Recorded, of_trajectories
from jaxrl.text.chat import ChatFormat
from jaxrl.train.joint_episodes import joint_play
from jaxrl.train.session import what_is_recorded
from tests.scripted_engine import ScriptedEngine, answer, small_tokenizer
from tests.train.test_presets import Tool, Verifier

EPISODES = 3
SAID = {0: "15", 1: "16", 2: "14", 3: "15", 4: "15", 5: "16", 6: "16", 7: "15", 8: "16"}
"""What sample k + 3 a answers, the agent a of episode k; 15 is right."""


class Failing(Verifier):
    """Breaks where the answer is 14."""

    async def grade(self, text, gold):
        return RewardStatus.VERIFIER_CRASH if text == "14" else await super().grade(text, gold)


CHAT = ChatFormat(ChatConfig(show_tools=False), (Tool.schema,), small_tokenizer())


def played(config: EnvConfig, verifier: Verifier | None = None, room: int = 256) -> Group:
    tokenizer = small_tokenizer()
    player = Player(
        ScriptedEngine(tokenizer, lambda draw, sample: [answer(SAID[sample])]),
        CHAT,
        tokenizer,
        (),
        verifier or Verifier(),
        config,
        max_response_tokens=160,
    )
    return asyncio.run(
        play_group(player, Problem("sums/1", "12+3?", "15"), 7, EPISODES, joint=joint_play(config, room))
    )


def own(tmp_path: pathlib.Path, body: str, start: str = "async def mine(episode):") -> EnvConfig:
    (tmp_path / "mine.py").write_text(f"import asyncio\nimport dataclasses\n\n\n{start}\n    {body}\n")
    return EnvConfig(joint_episode=f"{tmp_path}/mine.py:mine")


def test_revisers_see_the_draft_of_their_episode_and_are_compared_within_it() -> None:
    group = played(EnvConfig(joint_episode="draft_and_revise"))
    seen = [(one.sample, one.role, one.episode, one.reward) for one in group.trajectories]
    assert seen == [
        *[(0, "proposer", 0, 1.0), (3, "reviser", 0, 1.0), (6, "reviser", 0, 0.0)],
        *[(1, "proposer", 1, 0.0), (4, "reviser", 1, 1.0), (7, "reviser", 1, 1.0)],
        *[(2, "proposer", 2, 0.0), (5, "reviser", 2, 0.0), (8, "reviser", 2, 0.0)],
    ]
    asked = [one.problem.question for one in group.trajectories]
    assert asked[0] == asked[3] == asked[6] == "12+3?"
    assert all('"15"' in question for question in asked[1:3]) and all('"16"' in question for question in asked[4:6])
    outcomes = of_trajectories(group.trajectories, np.zeros(9, int), Recorded(several_agents=True), {})
    expected = [2 / 3, 0.5, -0.5, -1 / 3, 0, 0, -1 / 3, 0, 0]
    np.testing.assert_allclose(hierarchical(outcomes).values, expected, atol=1e-6)


def test_revisers_are_shown_what_the_prompt_has_room_for() -> None:
    def asked(room: int) -> str:
        return played(EnvConfig(joint_episode="draft_and_revise"), room=room).trajectories[1].problem.question

    whole = asked(256)
    needed, cut = len(CHAT.prompt(whole)), len(CHAT.prompt(whole.replace('"15"', '"1"')))
    assert cut < needed and asked(needed) == whole
    assert asked(needed - 1) == asked(cut) == whole.replace('"15"', '"1"')
    assert asked(cut - 1) == "12+3?"


def test_a_role_that_nobody_has_is_refused_but_all_of_a_step_may_be_filtered() -> None:
    group = played(EnvConfig(joint_episode="draft_and_revise"))

    def seen(keep: set[str], memory: dict[str, float]) -> Outcomes:
        kept = [one for one in group.trajectories if one.role in keep]
        return of_trajectories(kept, np.zeros(len(kept), int), Recorded(several_agents=True), memory)

    whole = seen({"proposer", "reviser"}, {})
    with pytest.raises(
        ConfigError, match="the role 'drafter' over the group, but nobody has it: there are proposer, r"
    ):
        hierarchical(whole, proposer="drafter")
    later = seen({"reviser"}, {**hierarchical(whole).memory})
    np.testing.assert_allclose(hierarchical(later).values, [0.5, -0.5, 0, 0, 0, 0], atol=1e-6)
    with pytest.raises(ConfigError, match="nobody has it: there are reviser"):
        hierarchical(later, proposer="another")


def test_a_function_of_the_users_plays_and_pays(tmp_path: pathlib.Path) -> None:
    """One agent sets a task whose answer it says, the other solves it; the first is paid where the second fails."""
    config = own(
        tmp_path,
        'set_by = await episode.play("setter", "Set a task.")\n'
        '    solved = await episode.play("solver", "Solve it.", set_by.answer)\n'
        "    return [dataclasses.replace(set_by, reward=1 - solved.reward), solved]",
    )
    group = played(config)
    assert [one.reward for one in group.trajectories] == [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert [one.problem.answer for one in group.trajectories] == ["15", "15", "15", "16", "15", "14"]


def test_the_example_in_the_documentation_plays(tmp_path: pathlib.Path) -> None:
    page = pathlib.Path(__file__).resolve().parents[2] / "docs" / "episodes.md"
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1])
    group = played(EnvConfig(joint_episode=f"{tmp_path}/mine.py:quiz", joint_episode_settings={"hard": 1.0}))
    assert [one.role for one in group.trajectories] == ["proposer", "solver"] * EPISODES
    assert [one.reward for one in group.trajectories] == [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "body",
    [
        "a, b = await episode.play('a'), await episode.play('b')\n    return [a, b]",
        "a, b = await asyncio.gather(*map(episode.play, 'ab'))\n    return [a, b]",
        "a, b, *_ = await asyncio.gather(*map(episode.play, 'ab'), return_exceptions=True)\n"
        "    return [a if a.reward else b]",
        "async with asyncio.TaskGroup() as tasks:\n        a, b = [tasks.create_task(episode.play(r)) for r in 'ab']\n"
        "    return [a.result(), b.result()]",
    ],
)
def test_promise_5_a_fault_of_ours_takes_the_whole_episode_out(tmp_path: pathlib.Path, body: str) -> None:
    """Sample 2 meets the fault, agent a of episode 2; the other two episodes are as if nothing had been."""
    group = played(own(tmp_path, body), Failing())
    trained = [(one.sample, one.role, one.reward) for one in group.trajectories if one.trainable]
    assert {number for number, *_ in trained} <= {0, 1, 3, 4} and (0, "a", 1.0) in trained
    assert not any(one.trainable for one in group.trajectories if one.episode == 2)
    assert 2 in [one.sample for one in group.trajectories]  # it is counted


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return await episode.play('a')", "must give a list of the trajectories it had played"),
        ("return [dataclasses.replace(await episode.play('a'), role='')]", "must give a list"),
        ("return [await episode.play('a')] * 2", "gave a trajectory twice"),
        ("return [dataclasses.replace(await episode.play('a'), reward=float('nan'))]", "the reward nan"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path: pathlib.Path, body: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        played(own(tmp_path, body))


def test_a_run_is_told_at_its_start_what_does_not_go_together(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="joint_episode='draft_and_revis' is no method; did you mean draft_and_rev"):
        joint_play(EnvConfig(joint_episode="draft_and_revis"), 256)
    with pytest.raises(ConfigError, match="must be an async def"):
        joint_play(own(tmp_path, "return []", "def mine(episode):"), 256)
    for name in ("revisers", "shown"):
        with pytest.raises(ConfigError, match=rf"EnvConfig.joint_episode_settings\['{name}'\]=0 must be at least 1"):
            joint_play(EnvConfig(joint_episode="draft_and_revise", joint_episode_settings={name: 0}), 256)
    joint, whole = "EnvConfig.joint_episode=draft_and_revise", "AlgorithmConfig.keep=0"
    for setting in ("AlgorithmConfig.keep=4", "AlgorithmConfig.greedy_baseline=True"):
        with pytest.raises(ConfigError, match="counts trajectories of one agent"):
            configuration.load("", [joint, whole, setting])
    config = configuration.load("", [joint, whole])
    algorithm.check(AlgorithmConfig(advantage="hierarchical"), what_is_recorded(config))
    with pytest.raises(ConfigError, match="EnvConfig.joint_episode, such as 'draft_and_revise'"):
        algorithm.check(AlgorithmConfig(advantage="hierarchical"), what_is_recorded(configuration.load("")))
