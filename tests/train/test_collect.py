"""Collecting a step's episodes: what is begun when, what goes on during the update, what is too old to train on."""

import asyncio
import contextlib
import dataclasses
import json
import types
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from jaxrl.config import ChatConfig, Config, EnvConfig, TrainConfig
from jaxrl.data.problems import ProblemStream
from jaxrl.episodes import Player
from jaxrl.observe.metrics import PhaseTimer
from jaxrl.records import Group, Problem, RewardStatus, ToolCall, ToolStatus
from jaxrl.rl.selection import chooser
from jaxrl.text.chat import ChatFormat, ToolSchema
from jaxrl.train.collect import Collected, collect, open_queue
from jaxrl.train.group_queue import Choice, GroupQueue
from jaxrl.train.progress import RunProgress
from tests.scripted_engine import ScriptedEngine, answer, call, small_tokenizer

OWN, AHEAD = 2, 1
TRAIN = TrainConfig(problems=OWN, samples=4, prefetch_groups=AHEAD, max_draws=2)


class GatedTool:
    """A tool that answers once its gate is open."""

    schema = ToolSchema("python", "Runs Python.", {"type": "object", "properties": {"code": {"type": "string"}}})

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.calls = 0

    async def call(self, arguments, seconds):
        self.calls += 1
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


def make_session(**changes: object) -> types.SimpleNamespace:
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


@contextlib.asynccontextmanager
async def opened(
    script, progress: RunProgress | None = None, **changes: object
) -> AsyncIterator[tuple[GroupQueue, Player, Callable[[], Awaitable[Collected]]]]:
    """A queue, its player with a tool whose gate is shut, and what collects the next step."""
    session, player = make_session(**changes), make_player(script, GatedTool())
    rules = chooser(session.config.algorithm)
    progress = progress or RunProgress(stage="rl")
    async with contextlib.aclosing(open_queue(session.config, progress)) as queue:

        async def step() -> Collected:
            collected = await collect(session, RECORDER, queue, player, progress, rules)
            progress.step += 1
            return collected

        yield queue, player, step
    assert not player.engine.active and asyncio.all_tasks() == {asyncio.current_task()}, "nothing goes on"


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.001)


def draws(collected: Collected) -> list[int]:
    return sorted({trajectory.draw for trajectory in collected.played})


def half_right(draw: int, sample: int) -> list[str]:
    """The step's own groups answer at once, half of them right; the others wait for their tool."""
    final = answer("15" if sample % 2 else "16")
    return [final] if draw < OWN else [call("1"), final]


def at_once(draw: int, sample: int) -> list[str]:
    return [answer("15" if sample % 2 else "16")]


def test_groups_ahead_are_one_version_old_and_trained_on() -> None:
    async def run() -> None:
        async with opened(at_once) as (queue, player, step):
            player.engine.version = 0
            await step()
            await queue.settle()
            player.engine.version = 1
            collected = await step()
            assert {version for one in collected.trained for version in one.versions[one.mask > 0]} == {0, 1}
            assert not collected.too_old

    asyncio.run(run())


def test_groups_ahead_are_still_played_during_the_update() -> None:
    async def run() -> None:
        async with opened(half_right) as (queue, player, step):
            assert [chosen.kept[0].draw for chosen in (await step()).kept] == [0, 1]
            await asyncio.sleep(0.01)  # the update
            assert queue.unfinished == (OWN,) and not queue.pending
            player.tools[0].gate.set()
            await queue.settle()
            (group,) = queue.pending
            assert group.draw == OWN and len(group.trajectories) == TRAIN.samples
            assert draws(await step()) == [OWN, OWN + 1]
            await queue.settle()
            assert [group.draw for group in queue.pending] == [OWN + 2]

    asyncio.run(run())


def test_more_groups_ahead_than_a_step_needs_keep_their_order() -> None:
    async def run() -> None:
        async with opened(at_once, prefetch_groups=3) as (queue, _, step):
            for first in (0, 2, 4):
                assert draws(await step()) == [first, first + 1]
                await queue.settle()
                assert [group.draw for group in queue.pending] == [first + 2, first + 3, first + 4]

    asyncio.run(run())


def test_an_update_that_fails_leaves_no_episode_behind() -> None:
    async def run() -> None:
        with pytest.raises(FloatingPointError):
            async with opened(half_right) as (_, player, step):
                await step()
                await asyncio.sleep(0.01)
                assert player.engine.active
                raise FloatingPointError

    asyncio.run(run())


def test_an_episode_that_fails_is_heard_of_while_others_are_waited_for() -> None:
    """The step's own groups wait for ever; the group behind them breaks."""

    def script(draw: int, sample: int) -> list[str]:
        if draw == OWN:
            raise ZeroDivisionError
        return [call("1"), answer("15")]

    async def run() -> None:
        async with opened(script) as (_, _, step):
            await asyncio.wait_for(step(), 10)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run())


def test_groups_ahead_are_used_when_nothing_survived() -> None:
    """Draws 0 and 1 are all wrong, so the step goes on with draw 2, which was played ahead, and draw 3."""

    def script(draw: int, sample: int) -> list[str]:
        return [answer("15" if draw >= OWN and sample % 2 else "16")]

    async def run() -> None:
        progress = RunProgress(stage="rl")
        async with opened(script, progress) as (queue, _, step):
            collected = await step()
            assert draws(collected) == [0, 1, 2, 3]
            assert [chosen.kept[0].draw for chosen in collected.kept] == [2, 3]
            await queue.settle()
            assert [group.draw for group in queue.pending] == [4]
            assert progress.stream["next_draw"] == 5

    asyncio.run(run())


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_draw_is_begun_more_than_so_many_versions_before_its_step(staleness: int) -> None:
    """However long nothing is taken, and also when everything is played at once."""

    async def run() -> None:
        async with opened(at_once, prefetch_groups=0, max_staleness=staleness) as (queue, player, step):
            for number in range(4):
                player.engine.version = number
                collected = await step()
                assert draws(collected) == [number * OWN, number * OWN + 1]
                await asyncio.sleep(0.01)
                assert len(queue) == staleness * OWN, "during the update"
                oldest = max(0, number - staleness)
                assert {int(v) for t in collected.played for v in t.versions[t.mask > 0]} == {oldest}
                assert collected.too_old == 0 and collected.staleness["staleness/max"] == number - oldest

    asyncio.run(run())


def straggling(draw: int, sample: int) -> list[str]:
    """Draw 0 waits for its tool in its second turn."""
    return [call("1"), answer("15")] if draw == 0 else at_once(draw, sample)


def test_a_straggler_holds_up_the_step_that_it_belongs_to() -> None:
    async def run() -> None:
        async with opened(straggling, prefetch_groups=0, max_staleness=1) as (queue, player, step):
            first = asyncio.create_task(step())
            await until(lambda: len(queue) == 2 * OWN and queue.unfinished == (0,))
            await asyncio.sleep(0.01)
            assert not first.done()
            player.tools[0].gate.set()
            assert draws(await first) == [0, 1]

    asyncio.run(run())


def test_with_what_is_finished_first_a_straggler_holds_up_nobody_and_is_dropped_once_too_old() -> None:
    async def run() -> None:
        changes = {"prefetch_groups": 0, "max_staleness": 1, "next_groups": "finished"}
        async with opened(straggling, **changes) as (queue, player, step):
            for version, expected in enumerate(([1, 2], [3, 4])):
                player.engine.version = version
                collected = await step()
                assert draws(collected) == expected and collected.too_old == 0
                await until(lambda: player.tools[0].calls == TRAIN.samples)
            player.tools[0].gate.set()
            player.engine.version = 2
            await queue.settle()
            collected = await step()
            assert draws(collected) == [0, 5]
            assert collected.too_old == TRAIN.samples
            assert collected.staleness["staleness/dropped_share"] == 0.5
            assert [chosen.rejected for chosen in collected.selections] == ["untrainable", ""]
            assert {t.draw for chosen in collected.kept for t in chosen.kept} == {5}, "never reward 0"

    asyncio.run(run())


def test_a_group_that_fails_is_heard_of_while_others_are_still_to_agree() -> None:
    """They might wait for that very group."""

    async def fails(player: Player, problem: Problem, draw: int) -> Group:
        await asyncio.sleep(0.01)
        raise RuntimeError(f"draw {draw}")

    async def never(choose: Choice) -> list[int]:
        return await asyncio.get_running_loop().create_future()

    async def run() -> None:
        async with (
            asyncio.timeout(20),
            contextlib.aclosing(GroupQueue(fails, finished_first=True, agree=never)) as queue,
        ):
            queue.begin(None, [(0, Problem("p", "?", "1"))])
            with pytest.raises(RuntimeError, match="draw 0"):
                await queue.take(1)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing goes on"

    asyncio.run(run())


def test_what_a_run_left_is_kept_where_it_was_played_and_begun_again_where_not() -> None:
    async def run() -> None:
        changes = {"prefetch_groups": 0, "max_staleness": 2}
        progress = RunProgress(stage="rl")

        def script(draw: int, sample: int) -> list[str]:
            return [call("1"), answer("15")] if draw in (3, 4) else at_once(draw, sample)

        async with opened(script, progress, **changes) as (queue, _, step):
            await step()
            await until(lambda: queue.unfinished == (3, 4))
            progress.pending, progress.unfinished = queue.pending, queue.unfinished
        saved = RunProgress.from_json(json.loads(json.dumps(progress.to_json())))
        assert saved.unfinished == (2, 3, 4, 5) and not saved.pending, "what was played is no part of it"
        saved = saved.with_played(progress.pending)
        assert [group.draw for group in saved.pending] == [2, 5] and saved.unfinished == (3, 4)
        async with opened(at_once, saved, **changes) as (queue, player, step):
            assert draws(await step()) == [2, 3]
            assert {draw for draw, _ in player.engine.opened} == {3, 4, 6, 7}, "what was played is not played again"
            assert draws(await step()) == [4, 5]
            await queue.settle()
            assert {draw for draw, _ in player.engine.opened} == {3, 4, 6, 7, 8, 9}

    asyncio.run(run())


@pytest.mark.parametrize("refill", [False, True])
def test_a_step_is_filled_up_until_all_its_groups_teach_something(refill: bool) -> None:
    """Only every third draw has answers of both kinds; two problems a step."""

    def script(draw: int, sample: int) -> list[str]:
        return [answer("15" if draw % 3 or sample % 2 else "16")]

    async def run() -> None:
        async with opened(script, refill=refill, max_draws=5, prefetch_groups=1) as (queue, _, step):
            collected = await step()
            kept = [chosen.kept[0].draw for chosen in collected.kept]
            assert kept == ([0, 3] if refill else [0])
            assert len(collected.selections) == (4 if refill else 2)
            await queue.settle()
            assert [group.draw for group in queue.pending] == [len(collected.selections)]

    asyncio.run(run())


def test_filling_up_ends_with_the_last_draw() -> None:
    def script(draw: int, sample: int) -> list[str]:
        return [answer("15" if draw or sample % 2 else "16")]

    async def run() -> None:
        async with opened(script, refill=True, max_draws=2, prefetch_groups=0) as (_, _, step):
            collected = await step()
            assert [len(collected.kept), len(collected.selections)] == [1, 3]

    asyncio.run(run())
