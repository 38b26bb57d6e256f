"""Episodes with real engine, sandbox, verifier and tokenizer, played by a decoder that knows two solutions by heart."""

import asyncio
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl.config import ChatConfig, EngineConfig, EnvConfig, EvalConfig, ModelConfig, RewardConfig, SandboxConfig
from jaxrl.data.arithmetic import run as run_arithmetic
from jaxrl.envs.python_tool import PythonTool
from jaxrl.envs.rendering import render
from jaxrl.episodes import Player, play_groups
from jaxrl.evaluate.run import evaluate
from jaxrl.model import spec, transformer
from jaxrl.model.logprob import sequence_logprobs
from jaxrl.records import Demonstration, Problem, StopReason, ToolStatus
from jaxrl.rewards.verifier import MathVerifier
from jaxrl.rollout.engine import Engine
from jaxrl.sandbox import SandboxUnavailable, pool_from_config
from jaxrl.text.chat import ChatFormat
from tests.scripted_engine import answer, call, small_tokenizer

SUM = Problem("sum", "What is 12 + 3?", "15")
RATIO = Problem("ratio", "What is 1 / 2?", "0.5")
SOLUTIONS = (
    # A call that fails, its repair, and the answer.
    Demonstration(SUM, (call("x"), "NameError: name 'x' is not defined", call("12+3"), "15", answer("15"))),
    # No call; an answer that only mathematics can tell to be right.
    Demonstration(RATIO, (answer("\\frac{1}{2}"),)),
)
MODEL = ModelConfig(layers=2, width=64, query_heads=2, kv_heads=1, head_width=32, ffn_width=128)
ENGINE = EngineConfig(
    slots=4, page_size=8, round_steps=8, prefill_rows=2, prefill_chunk=32, max_prompt_tokens=64, max_response_tokens=192
)


def pad(rows):
    """Rows of different lengths as one array [rows, longest], zeros behind them."""
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


@functools.partial(jax.jit, static_argnums=1)
def score(params, model, tokens, segments):
    """What the training path makes of whole conversations, [rows, T] log-probabilities."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return sequence_logprobs(params, model, tokens, positions, segments).logprobs


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(ChatConfig(show_tools=False), (PythonTool.schema,), small_tokenizer())


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return dataclasses.replace(MODEL, vocab_size=-(-small_tokenizer().vocab_size // 8) * 8)


@pytest.fixture(scope="module")
def params(chat, model):
    """Weights that have memorised the solutions."""
    rows = [chat.demonstration(solution) for solution in SOLUTIONS]
    tokens, mask = pad([ids for ids, _ in rows]), pad([mask for _, mask in rows])
    segments = pad([np.ones_like(ids) for ids, _ in rows])
    optimizer = optax.adam(3e-3)

    def loss(params):
        return -jnp.sum(score(params, model, tokens, segments) * mask) / mask.sum()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), None, 150)
        return params, values[-1]

    params, value = train(spec.initialize(transformer.param_specs(model), jax.random.key(0)))
    assert value < 0.02, "the solutions were not memorised"
    return params


@contextlib.asynccontextmanager
async def open_player(chat, model, params):
    tokenizer = small_tokenizer()
    serving = Engine(ENGINE, model, params, stop_ids=(tokenizer.end_id,), seed=7)
    pool = pool_from_config(SandboxConfig(workers=1, slots=2, preload=()))
    async with pool, MathVerifier(RewardConfig(seconds=20.0)) as verifier, serving.serving():
        yield Player(
            engine=serving,
            chat=chat,
            tokenizer=tokenizer,
            tools=(PythonTool(pool),),
            verifier=verifier,
            config=EnvConfig(),
            max_response_tokens=ENGINE.max_response_tokens,
        )


def run(scenario, chat, model, params):
    async def main():
        async with open_player(chat, model, params) as player:
            result = await scenario(player)
            assert player.engine.stats()["admitted"] == 0, "a sequence was left open"
            return result

    try:
        return asyncio.run(main())
    except SandboxUnavailable as reason:
        pytest.skip(str(reason))


async def groups_of(player, draws, samples):
    return [group async for group in play_groups(player, draws, samples)]


def test_memorised_solutions_are_played_graded_and_scored_alike(chat, model, params):
    """Greedy: the ids are those of the demonstrations, tool turns included, since the real tool says the same."""

    async def scenario(player):
        player = dataclasses.replace(player, temperature=0.0)
        return await groups_of(player, [(0, SUM), (1, RATIO)], 2)

    groups = run(scenario, chat, model, params)
    for solution, group in zip(SOLUTIONS, groups, strict=True):
        ids, mask = chat.demonstration(solution)
        for trajectory in group.trajectories:
            assert [*trajectory.prompt_ids, *trajectory.ids] == ids.tolist()
            assert [0] * len(trajectory.prompt_ids) + trajectory.mask.tolist() == mask.tolist()
            assert (trajectory.stop_reason, trajectory.reward) == (StopReason.ANSWERED, 1.0)
    calls = groups[0].trajectories[0].calls
    assert [call.status for call in calls] == [ToolStatus.ERROR, ToolStatus.OK]
    assert all(call.isolation for call in calls)


def test_promise_1_recorded_logprobs_are_the_trainers(chat, model, params):
    """Sampled episodes with tool turns in them, scored again by the training path."""
    groups = run(lambda player: groups_of(player, [(0, SUM), (1, RATIO)], 6), chat, model, params)
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    assert any(trajectory.calls for trajectory in trajectories)
    rows = [np.concatenate([trajectory.prompt_ids, trajectory.ids]) for trajectory in trajectories]
    tokens, segments = pad(rows), pad([np.ones_like(row) for row in rows])
    trained = score(params, model, tokens, segments)
    for trajectory, row, scores in zip(trajectories, rows, trained, strict=True):
        policy = trajectory.mask == 1
        scores = scores[len(trajectory.prompt_ids) : len(row)]
        np.testing.assert_allclose(trajectory.logprobs[policy], scores[policy], atol=2e-5)
        assert np.all(trajectory.versions[policy] == 0)


def test_promise_2_episodes_do_not_depend_on_what_runs_beside_them(chat, model, params):
    """Alone or among others, three times as many as there are slots, in one order or the other: the same ids."""

    def ids(groups):
        return {(t.draw, t.sample): t.ids.tolist() for group in groups for t in group.trajectories}

    draws = [(0, SUM), (1, RATIO), (2, SUM)]
    forwards = ids(run(lambda player: groups_of(player, draws, 4), chat, model, params))
    backwards = ids(run(lambda player: groups_of(player, draws[::-1], 4), chat, model, params))
    alone = ids(run(lambda player: groups_of(player, draws[2:], 1), chat, model, params))
    assert forwards == backwards
    assert alone == {(2, 0): forwards[2, 0]}


def test_evaluation_and_its_figures(chat, model, params):
    config = EvalConfig(samples=4, temperature=0.0, k=(1,))
    report = run(lambda player: evaluate(player, [SUM, RATIO], config), chat, model, params)
    assert (report.average.value, report.excluded, report.trajectories) == (1.0, 0, 2)
    assert report.tool_error_share_in_correct == 0.5
    assert report.calls == 1.0


def test_demonstrations_say_what_the_real_tool_says():
    """Outputs in demonstrations are computed by an interpreter of arithmetic; the policy must meet the same text."""
    programs = [
        "12+3",
        "7//2",
        "1/3",
        "x+1",
        "(1+2",
        "1+2)",
        "5+",
        "1/0",
        "a = 2\na*3",
        "a = 2",
        "-3 % 5",
        "2**10",
        "5x",
    ]

    async def main():
        async with pool_from_config(SandboxConfig(workers=1, slots=2, preload=())) as pool:
            tool = PythonTool(pool)
            return [render(await tool.call({"code": code}, 20.0)) for code in programs]

    try:
        shown = asyncio.run(main())
    except SandboxUnavailable as reason:
        pytest.skip(str(reason))
    assert dict(zip(programs, shown, strict=True)) == {
        code: run_arithmetic(code).text or "(no output)" for code in programs
    }
