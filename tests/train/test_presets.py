"""Presets by paper: each stands on a recipe, can be used, and takes a step with what it plays."""

import asyncio
import contextlib
import pathlib
import types

import jax
import numpy as np
import optax
import pytest

from jaxrl import config as configuration
from jaxrl.config import ChatConfig, Config, ConfigError, EnvConfig, ModelConfig
from jaxrl.data.problems import ProblemStream
from jaxrl.episodes import Player
from jaxrl.mesh import make_mesh
from jaxrl.model import transformer
from jaxrl.observe.metrics import PhaseTimer
from jaxrl.observe.traces import read_episodes
from jaxrl.observe.writers import read_metrics
from jaxrl.records import Problem, RewardStatus, ToolCall, ToolStatus
from jaxrl.rewards.scorer import scorer
from jaxrl.rl import algorithm
from jaxrl.rl.selection import chooser
from jaxrl.text.chat import ChatFormat, ToolSchema
from jaxrl.train.collect import collect, open_queue
from jaxrl.train.pack import earned, pack
from jaxrl.train.progress import RunProgress
from jaxrl.train.session import what_is_recorded
from jaxrl.train.state import initial_params, new_state
from jaxrl.train.update import Updater, policy_gradient_loss
from tests.scripted_engine import ScriptedEngine, answer, call, small_tokenizer
from tests.train.conftest import RunTiny

PRESETS = (
    *("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rstar2", "retool", "icepop", "fapo", "dars", "datamind", "verltool"),
    "ppo",
    "plain",
)
RECIPES = ("gsm8k_tool", "quickstart", "rstar2_14b", "smoke")
"""Those that say what is trained, on which data, and how large."""
SMALL = (
    *("ModelConfig.layers=1", "ModelConfig.width=16", "ModelConfig.query_heads=1", "ModelConfig.kv_heads=1"),
    *("ModelConfig.head_width=16", "ModelConfig.ffn_width=16", "TrainConfig.problems=2", "TrainConfig.rows=4"),
    *("EngineConfig.max_prompt_tokens=96", "EngineConfig.max_response_tokens=160", "TrainConfig.row_tokens=256"),
    *("OptimizerConfig.learning_rate=1e-3", "OptimizerConfig.warmup_steps=0"),
)
JUDGE = "async def says_nothing(trajectory):\n    return 'step \\\\boxed{0}' if trajectory.sample % 4 else None\n"


@pytest.fixture
def judge(tmp_path: pathlib.Path) -> str:
    (tmp_path / "judge.py").write_text(JUDGE)
    return f"RewardConfig.judge={tmp_path}/judge.py:says_nothing"


def preset(name: str, judge: str, *overrides: str, recipe: str = "quickstart") -> Config:
    return configuration.load(f"{recipe}+{name}", [*([judge] if name == "fapo" else []), *overrides])


def test_there_is_a_preset_for_every_file_that_is_no_recipe() -> None:
    assert sorted((*PRESETS, *RECIPES)) == configuration.recipe_names()
    with pytest.raises(ConfigError, match=r"RewardConfig.judge must be set"):
        configuration.load("quickstart+fapo")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_the_algorithm_and_leaves_the_rest_to_the_recipe(name: str, judge: str) -> None:
    config, plain = preset(name, judge), configuration.load("quickstart")
    algorithm.check(config.algorithm, what_is_recorded(config))
    for section in ("model", "tokenizer", "chat", "data", "sft", "engine", "sandbox", "env", "optimizer", "eval"):
        assert getattr(config, section) == getattr(plain, section), section
    assert config.algorithm != plain.algorithm or config.reward != plain.reward or name in ("rstar2", "plain")
    assert configuration.parse([configuration.dump(config)]) == config


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_stands_on_every_recipe(recipe: str, name: str, judge: str) -> None:
    required = {
        "gsm8k_tool": ["DataConfig.train=train.jsonl"],
        "rstar2_14b": ["DataConfig.train=train.jsonl", "DataConfig.eval=eval.jsonl", "ModelConfig.path=folder"],
    }
    if (recipe, name) == ("rstar2_14b", "datamind"):
        required["rstar2_14b"].append("SftConfig.demonstrations=demonstrations.jsonl")
    config = preset(name, judge, *required.get(recipe, ()), recipe=recipe)
    algorithm.check(config.algorithm, what_is_recorded(config))


@pytest.mark.parametrize("first", PRESETS)
def test_of_two_presets_the_second_wins_wholly(first: str, judge: str) -> None:
    for second in PRESETS:
        assert preset(second, judge, recipe=f"quickstart+{first}") == preset(second, judge), second


class Tool:
    """Says 15, or fails where the code is 0."""

    schema = ToolSchema("python", "Runs Python.", {"type": "object", "properties": {"code": {"type": "string"}}})

    async def call(self, arguments, seconds):
        status = ToolStatus.ERROR if arguments["code"] == "0" else ToolStatus.OK
        return ToolCall("python", arguments, status, stdout="15", seconds=0.01)


class Verifier:
    async def grade(self, text, gold):
        return RewardStatus.CORRECT if text == gold else RewardStatus.WRONG


def script(draw: int, sample: int) -> list[str]:
    """A quarter right, with and without calls, some of which fail; every third draw is all wrong."""
    final = answer("15" if sample % 4 == 0 and draw % 3 else "16")
    return [[final], [call("1"), final], [call("0"), call("1"), final]][sample % 3]


def play_and_pack(config: Config):
    """What one step plays and packs."""
    tokenizer, tool = small_tokenizer(), Tool()
    problems = tuple(Problem(f"sums/{i}", f"{i}?", "15") for i in range(8))

    def problem_stream(progress: RunProgress) -> ProblemStream:
        stream = ProblemStream(problems, 0)
        if progress.stream:
            stream.restore(progress.stream)
        return stream

    session = types.SimpleNamespace(config=config, problem_stream=problem_stream)
    recorder = types.SimpleNamespace(timer=PhaseTimer(lambda phase: None))
    player = Player(
        ScriptedEngine(tokenizer, script),
        ChatFormat(ChatConfig(show_tools=False), (tool.schema,), tokenizer),
        tokenizer,
        (tool,),
        Verifier(),
        EnvConfig(),
        max_response_tokens=config.engine.max_response_tokens,
        scorer=scorer(config.reward),
    )

    async def step():
        progress = RunProgress(stage="rl")
        async with contextlib.aclosing(open_queue(config, progress)) as queue:
            return await collect(session, recorder, queue, player, progress, chooser(config.algorithm))

    collected = asyncio.run(step())
    values = [np.zeros(len(one.ids)) for one in collected.trained] if config.critic.enabled else None
    return collected, pack(config, collected.kept, {}, earned(what_is_recorded(config), collected.kept, {}, values))


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_plays_and_packs(name: str, judge: str) -> None:
    config = preset(name, judge, *SMALL)
    collected, updates = play_and_pack(config)
    kept = [trajectory for chosen in collected.kept for trajectory in chosen.kept]
    assert len(updates) == min(config.train.updates_per_step, len(collected.kept))
    advantages = np.concatenate([batch.advantages[batch.mask > 0] for update in updates for batch in update])
    assert advantages.min() < 0 < advantages.max()
    sizes = {len(chosen.kept) for chosen in collected.kept}
    right = {trajectory.reward for trajectory in kept if trajectory.correct}
    wrong = {trajectory.reward for trajectory in kept if not trajectory.correct}
    if name == "rstar2":
        assert sizes == {8}
    if name == "dars":
        assert max(sizes) > 8, "a quarter right: more were played"
    if name in ("dapo", "cispo", "datamind"):
        assert len(collected.kept) == 2 and len(collected.selections) == 3, "one group was all wrong"
    if name == "retool":
        assert right == {1.0} and wrong == {-1.0, -0.9, -0.8}
    if name == "fapo":
        assert right == {1.0} and all(t.components["judge_failed"] for t in kept if t.correct), "all are multiples of 4"


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_a_step(name: str, judge: str) -> None:
    config = preset(name, judge, *SMALL)
    _, updates = play_and_pack(config)
    model = ModelConfig(**{**vars(config.model), "vocab_size": 384})
    mesh = make_mesh(config.mesh)
    optimizer = optax.adam(1e-3)
    params = initial_params(transformer.param_specs(model), mesh, 0)
    reference = jax.tree.map(lambda leaf: leaf.copy(), params) if config.algorithm.kl_coefficient else None
    updater = Updater(policy_gradient_loss(model, config.algorithm, 1.0), optimizer, mesh)
    before = jax.device_get(params)
    state, metrics = updater.step(new_state(params, optimizer, mesh), updates[0], reference)
    assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0
    moved = jax.tree.map(lambda new, old: bool((np.asarray(new) != old).any()), state.params, before)
    assert any(jax.tree.leaves(moved))


@pytest.mark.slow
def test_a_run_that_plays_more_fills_up_masks_and_takes_greedy_baselines(
    tmp_path: pathlib.Path, run_tiny: RunTiny
) -> None:
    changes = (
        *("AlgorithmConfig.advantage=remax", "AlgorithmConfig.greedy_baseline=True", "AlgorithmConfig.keep=0"),
        *(
            "AlgorithmConfig.selection=first",
            "AlgorithmConfig.selection_settings={}",
            "AlgorithmConfig.reject_equal=True",
        ),
        *("AlgorithmConfig.extra_samples=dars_hard", "AlgorithmConfig.extra_samples_settings={'most': 8}"),
        *("AlgorithmConfig.mask_out=('truncated',)", "TrainConfig.refill=True", "TrainConfig.max_draws=3"),
        *("RewardConfig.components={'correct': 1, 'tool_use': 0.1, 'overlong': 0.1}", "TrainConfig.steps=2"),
    )
    settings = tuple(argument for change in changes for argument in ("--set", change))
    done = run_tiny(tmp_path / "run", more=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_metrics(tmp_path / "run", "rl")
    assert len(rows) == 2
    for row in rows:
        assert row["reward"] == pytest.approx(
            row["reward/correct"] + 0.1 * row["reward/tool_use"] + 0.1 * row["reward/overlong"], abs=1e-6
        )
        assert {"select/masked_truncated", "select/groups_kept", "select/group_size"} <= row.keys()
    played = [t for file in sorted((tmp_path / "run" / "episodes").glob("rl_*.jsonl")) for t in read_episodes(file)]
    assert {t.greedy_reward is not None for t in played} == {True}
    sizes = {draw: sum(t.draw == draw for t in played) for draw in {t.draw for t in played}}
    solved = {draw: np.mean([t.correct for t in played if t.draw == draw and t.sample < 6]) for draw in sizes}
    assert all((size > 6) == (solved[draw] < 0.5) for draw, size in sizes.items())
