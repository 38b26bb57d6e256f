"""Promise 5, from the sandbox to the inputs of the gradient: faults of ours leave trajectories out, and that is all.

Real sandbox, tool, verifier, collection, selection, advantages and packing; only the policy is a script.
"""

import asyncio
import collections
import contextlib
import dataclasses
import os
import random
import signal
import types
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from jaxrl.config import AlgorithmConfig, ChatConfig, Config, EnvConfig, RewardConfig, TrainConfig
from jaxrl.data.problems import ProblemStream
from jaxrl.envs.python_tool import PythonTool
from jaxrl.episodes import Player
from jaxrl.observe.metrics import PhaseTimer
from jaxrl.records import Batch, Problem, StopReason, ToolStatus, Trajectory
from jaxrl.rewards.verifier import MathVerifier
from jaxrl.rl.selection import Selection, chooser
from jaxrl.sandbox import Limits, Pool, Result
from jaxrl.text.chat import ChatFormat
from jaxrl.train.collect import Collected, collect, open_queue
from jaxrl.train.pack import pack
from jaxrl.train.progress import RunProgress
from tests.sandbox.driver import Driver
from tests.scripted_engine import ScriptedEngine, answer, call, small_tokenizer

CONFIG = Config(
    train=TrainConfig(problems=12, samples=8, max_draws=1, rows=4, row_tokens=512),
    algorithm=AlgorithmConfig(keep=4, selection_settings={"min_positive": 1, "min_negative": 1}),
)
RECORDER = types.SimpleNamespace(timer=PhaseTimer(lambda phase: None))
SHARES = (0.01, 0.1, 0.5)


def script(draw: int, sample: int) -> list[str]:
    """Up to two calls, some of which fail, talk of errors or take a moment, and a right or a wrong answer."""
    choose = random.Random(f"{draw}/{sample}")
    turns = []
    for number in range(choose.choice((0, 1, 1, 2))):
        name = f"{draw}_{sample}_{number}"
        codes = (
            "{} + 1",
            "undefined_{}",
            "'error {}'",
            "import time; time.sleep(0.02); '{}'",
            "raise ValueError('{}')",
        )
        turns.append(call(choose.choice(codes).format(name)))
    return [*turns, answer(choose.choice(("15", "15.0", "16")))]


class FaultyPool:
    """A pool whose results are lost for a share of the calls, drawn by their code: ``losses`` times each."""

    def __init__(self, pool: Pool, share: float, losses: int) -> None:
        self.limits = pool.limits
        self._pool = pool
        self._share = share
        self._losses = losses
        self._lost: collections.Counter[str] = collections.Counter()

    def doomed(self, code: str) -> bool:
        return random.Random(f"fault {code}").random() < self._share

    async def run(self, code: str, **options: object) -> Result:
        result = await self._pool.run(code, **options)
        if self.doomed(code) and self._lost[code] < self._losses:
            self._lost[code] += 1
            return dataclasses.replace(result, status=ToolStatus.INFRA_ERROR, stdout="", stderr="its template died")
        return result

    @property
    def faults(self) -> int:
        return self._lost.total()


class Table:
    """One pool and one verifier, at which steps are played."""

    def __init__(self, driver: Driver, verifier: MathVerifier) -> None:
        self.driver = driver
        self._verifier = verifier

    async def step(self, pool: Pool | FaultyPool, config: Config = CONFIG) -> Collected:
        """One step's episodes, played through the loop's own collection."""
        tokenizer = small_tokenizer()
        problems = tuple(Problem(f"sums/{n}", f"What is {n} + {15 - n}?", "15") for n in range(12))
        session = types.SimpleNamespace(config=config, problem_stream=lambda progress: ProblemStream(problems, 0))
        player = Player(
            engine=ScriptedEngine(tokenizer, script),
            chat=ChatFormat(ChatConfig(show_tools=False), (PythonTool.schema,), tokenizer),
            tokenizer=tokenizer,
            tools=(PythonTool(pool),),
            verifier=self._verifier,
            config=EnvConfig(infra_retries=2),
            max_response_tokens=400,
        )
        progress = RunProgress(stage="rl")
        async with contextlib.aclosing(open_queue(config, progress)) as queue:
            return await collect(session, RECORDER, queue, player, progress, chooser(config.algorithm))

    def faulty(self, share: float, losses: int, config: Config = CONFIG) -> tuple[Collected, FaultyPool]:
        pool = FaultyPool(self.driver.pool, share, losses)
        return self.driver.wait(self.step(pool, config)), pool


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    limits = Limits(cpu_seconds=5, wall_seconds=30)
    with Driver(limits=limits, workers=2, slots=4, preload=()) as driver:
        verifier = MathVerifier(RewardConfig(seconds=20.0))
        driver.wait(verifier.__aenter__())
        yield Table(driver, verifier)
        driver.wait(verifier.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def calm(table: Table) -> Collected:
    """The step without a fault."""
    return table.driver.wait(table.step(table.driver.pool))


def selected(trajectories: Iterable[Trajectory], config: Config) -> tuple[Selection, ...]:
    """What selection keeps of these, group by group, with the loop's own draws."""
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.draw, []).append(trajectory)
    seed = config.train.seed
    rules = chooser(config.algorithm)
    chosen = (rules.choose(g, np.random.default_rng((seed, d))) for d, g in groups.items())
    return tuple(one for one in chosen if one.kept)


def inputs(config: Config, kept: tuple[Selection, ...]) -> list[list[dict[str, bytes]]]:
    """Every array that the gradient is computed from, by update and micro-batch."""

    def arrays(batch: Batch) -> dict[str, bytes]:
        names = (field.name for field in dataclasses.fields(batch))
        return {name: np.asarray(getattr(batch, name)).tobytes() for name in names}

    return [[arrays(batch) for batch in update] for update in pack(config, kept, {})]


def told(trajectory: Trajectory) -> tuple[object, ...]:
    """All of a trajectory that does not depend on time."""
    t = trajectory
    calls = [(c.status, c.arguments["code"], c.stdout, c.stderr) for c in t.calls]
    arrays = (t.prompt_ids, t.ids, t.mask, t.logprobs, t.versions)
    return (t.draw, t.sample, t.stop_reason, t.reward_status, t.reward, calls, *(a.tobytes() for a in arrays))


def test_the_calm_step_has_something_of_everything(calm: Collected) -> None:
    """Else the comparisons below would say little."""
    statuses = collections.Counter(call.status for t in calm.played for call in t.calls)
    assert statuses[ToolStatus.OK] > 20 and statuses[ToolStatus.ERROR] > 20
    assert len(calm.kept) >= 8 and {t.correct for t in calm.played} == {True, False}
    assert len(inputs(CONFIG, calm.kept)[0]) >= 3


@pytest.mark.parametrize("selection", ["roc", "roc_sampled"])
@pytest.mark.parametrize("share", SHARES)
def test_promise_5_lasting_faults_only_leave_trajectories_out(
    table: Table, calm: Collected, share: float, selection: str
) -> None:
    config = dataclasses.replace(CONFIG, algorithm=dataclasses.replace(CONFIG.algorithm, selection=selection))
    stormy, pool = table.faulty(share, losses=10**9, config=config)
    hit = {(t.draw, t.sample) for t in calm.played if any(pool.doomed(call.arguments["code"]) for call in t.calls)}
    assert hit and pool.faults == 3 * len(hit), "tried once and twice again"

    left_out = {(t.draw, t.sample) for t in stormy.played if not t.trainable}
    assert left_out == hit
    assert {t.stop_reason for t in stormy.played if not t.trainable} == {StopReason.INFRA_ERROR}
    survivors = [t for t in calm.played if (t.draw, t.sample) not in hit]
    assert [told(t) for t in stormy.played if t.trainable] == [told(t) for t in survivors]
    assert inputs(config, stormy.kept) == inputs(config, selected(survivors, config))
    counted = sum(chosen.statistics["untrainable_share"][0] for chosen in stormy.selections)
    assert counted == len(hit), "what is left out is shown"


@pytest.mark.parametrize("share", SHARES)
def test_promise_5_faults_that_pass_change_nothing(table: Table, calm: Collected, share: float) -> None:
    stormy, pool = table.faulty(share, losses=2)
    assert pool.faults > 0
    assert [told(t) for t in stormy.played] == [told(t) for t in calm.played]
    assert inputs(CONFIG, stormy.kept) == inputs(CONFIG, calm.kept)


def test_promise_5_templates_that_are_killed_change_nothing(table: Table, calm: Collected) -> None:
    """The fault where it arises: processes of the jail die while the step is played."""
    driver = table.driver

    async def play_and_kill() -> tuple[Collected, int]:
        step = asyncio.create_task(table.step(driver.pool))
        choose, kills = random.Random(5), 0
        while not step.done():
            await asyncio.wait([step], timeout=0.08)
            _, templates = driver.family()
            if templates:
                os.kill(choose.choice(templates), signal.SIGKILL)
                kills += 1
        return step.result(), kills

    stormy, kills = driver.wait(play_and_kill())
    assert kills >= 1
    assert [told(t) for t in stormy.played] == [told(t) for t in calm.played]
    assert inputs(CONFIG, stormy.kept) == inputs(CONFIG, calm.kept)
