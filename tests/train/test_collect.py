"""Collecting a step's episodes: groups played ahead go on during the update, and end with it."""

import asyncio
import dataclasses
import types

import pytest

from jaxrl.config import ChatConfig, Config, EnvConfig, TrainConfig
from jaxrl.data.problems import ProblemStream
from jaxrl.episodes import Player
from jaxrl.observe.metrics import PhaseTimer
from jaxrl.records import Problem, RewardStatus, ToolCall, ToolStatus
from jaxrl.text.chat import ChatFormat, ToolSchema
from jaxrl.train.loop import collect
from jaxrl.train.progress import RunProgress
from tests.scripted_engine import ScriptedEngine, answer, call, small_tokenizer

OWN, AHEAD = 2, 1
TRAIN = TrainConfig(problems=OWN, samples=4, prefetch_groups=AHEAD, max_draws=2)


class GatedTool:
    """A tool that answers once its gate is open."""

    schema = ToolSchema("python", "Runs Python.", {"type": "object", "properties": {"code": {"type": "string"}}})

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def call(self, arguments, seconds):
        await self.gate.wait()
        return ToolCall("python", arguments, ToolStatus.OK, stdout="15")


class Verifier:
    async def grade(self, text, gold):
        return RewardStatus.CORRECT if text == gold else RewardStatus.WRONG


def make_player(script, tool) -> Player:
    tokenizer = small_tokenizer()
    chat = ChatFormat(ChatConfig(show_tools=False), (tool.schema,), tokenizer)
    engine = ScriptedEngine(tokenizer, script)
    return Player(engine, chat, tokenizer, (tool,), Verifier(), EnvConfig(), max_response_tokens=400)


def make_session(**changes: int) -> types.SimpleNamespace:
    problems = tuple(Problem(f"sums/{i}", f"{i}?", "15") for i in range(8))
    config = Config(train=dataclasses.replace(TRAIN, **changes))
    return types.SimpleNamespace(
        config=config, problem_stream=lambda progress: restored(ProblemStream(problems, 0), progress)
    )


def restored(stream: ProblemStream, progress: RunProgress) -> ProblemStream:
    if progress.stream:
        stream.restore(progress.stream)
    return stream


RECORDER = types.SimpleNamespace(timer=PhaseTimer(lambda phase: None))


def half_right(draw: int, sample: int) -> list[str]:
    """The step's own groups answer at once, half of them right; the group ahead waits for its tool."""
    final = answer("15" if sample % 2 else "16")
    return [final] if draw < OWN else [call("1"), final]


def test_groups_ahead_are_still_played_during_the_update() -> None:
    async def run() -> None:
        tool = GatedTool()
        player, progress = make_player(half_right, tool), RunProgress(stage="rl")
        async with collect(make_session(), RECORDER, player, progress) as collected:
            assert [chosen.kept[0].draw for chosen in collected.kept] == [0, 1]
            await asyncio.sleep(0.01)  # the update
            assert not collected.ahead.done()
            tool.gate.set()
            (group,) = await collected.ahead
        assert group.draw == OWN and len(group.trajectories) == TRAIN.samples
        progress.pending = (group,)
        async with collect(make_session(), RECORDER, player, progress) as collected:
            assert sorted({t.draw for t in collected.played}) == [OWN, OWN + 1]
            assert [group.draw for group in await collected.ahead] == [OWN + 2]

    asyncio.run(run())


def test_more_groups_ahead_than_a_step_needs_keep_their_order() -> None:
    def script(draw: int, sample: int) -> list[str]:
        return [answer("15" if sample % 2 else "16")]

    async def run() -> None:
        session, player, progress = make_session(prefetch_groups=3), make_player(script, GatedTool()), RunProgress()
        for first in (0, 2, 4):
            async with collect(session, RECORDER, player, progress) as collected:
                assert [chosen.kept[0].draw for chosen in collected.kept] == [first, first + 1]
                progress.pending = await collected.ahead
            assert [group.draw for group in progress.pending] == [first + 2, first + 3, first + 4]

    asyncio.run(run())


def test_an_update_that_fails_leaves_no_episode_behind() -> None:
    async def run() -> None:
        player = make_player(half_right, GatedTool())
        with pytest.raises(FloatingPointError):
            async with collect(make_session(), RECORDER, player, RunProgress(stage="rl")):
                await asyncio.sleep(0.01)
                assert player.engine.active
                raise FloatingPointError
        assert not player.engine.active
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_groups_ahead_are_used_when_nothing_survived() -> None:
    """Draws 0 and 1 are all wrong, so the step goes on with draw 2, which was played ahead, and draws 3."""

    def script(draw: int, sample: int) -> list[str]:
        return [answer("15" if draw >= OWN and sample % 2 else "16")]

    async def run() -> None:
        progress = RunProgress(stage="rl")
        async with collect(make_session(), RECORDER, make_player(script, GatedTool()), progress) as collected:
            assert sorted({t.draw for t in collected.played}) == [0, 1, 2, 3]
            assert [chosen.kept[0].draw for chosen in collected.kept] == [2, 3]
            assert [group.draw for group in await collected.ahead] == [4]
        assert progress.stream["next_draw"] == 5

    asyncio.run(run())


@pytest.mark.parametrize("refill", [False, True])
def test_a_step_is_filled_up_until_all_its_groups_teach_something(refill: bool) -> None:
    """Only every third draw has answers of both kinds; two problems a step."""

    def script(draw: int, sample: int) -> list[str]:
        return [answer("15" if draw % 3 or sample % 2 else "16")]

    async def run() -> None:
        session, progress = make_session(refill=refill, max_draws=5, prefetch_groups=1), RunProgress(stage="rl")
        player = make_player(script, GatedTool())
        async with collect(session, RECORDER, player, progress) as collected:
            kept = [chosen.kept[0].draw for chosen in collected.kept]
            assert kept == ([0, 3] if refill else [0])
            assert len(collected.selections) == (4 if refill else 2)
            assert [group.draw for group in await collected.ahead] == [len(collected.selections)]

    asyncio.run(run())


def test_filling_up_ends_with_the_last_draw() -> None:
    async def run() -> None:
        session = make_session(refill=True, max_draws=2, prefetch_groups=0)
        player = make_player(lambda draw, sample: [answer("15" if draw or sample % 2 else "16")], GatedTool())
        async with collect(session, RECORDER, player, RunProgress(stage="rl")) as collected:
            assert [len(collected.kept), len(collected.selections)] == [1, 3]

    asyncio.run(run())
