"""Reward models: trained on pairs or on judged steps, exported, loaded again, and used as a reward."""

import asyncio
import dataclasses
import io
import json
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.config import Config, ConfigError, ModelConfig, PreferConfig, RewardConfig
from jaxrl.data import packing
from jaxrl.data.demonstrations import story_demonstrations
from jaxrl.data.preferences import DataError, load
from jaxrl.model import hf, spec, value
from jaxrl.observe.progress import Progress
from jaxrl.records import Problem, Trajectory, Turn
from jaxrl.rewards.learned import RewardModel
from jaxrl.rewards.scorer import scorer
from jaxrl.rl.preference.scores import Scores, Steps, bradley_terry, step_cross_entropy
from jaxrl.statuses import StopReason
from jaxrl.train import prefer
from jaxrl.train.preference_loss import score_loss

MODEL = ModelConfig(vocab_size=24, layers=1, width=16, query_heads=2, kv_heads=1, head_width=8, ffn_width=32)


def config_of(folder: pathlib.Path, rows: list[dict[str, Any]], **prefer: Any) -> Config:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = [
        "ModelConfig.layers=1",
        "ModelConfig.width=32",
        "ModelConfig.query_heads=2",
        "ModelConfig.kv_heads=1",
        "ModelConfig.head_width=16",
        "ModelConfig.ffn_width=64",
        "TokenizerConfig.vocab_size=480",
        "ChatConfig.show_tools=False",
    ]
    config = configuration.load("", overrides)
    section = dataclasses.replace(
        PreferConfig(
            steps=30, rows=4, row_tokens=400, learning_rate=3e-3, warmup_steps=2, measure_every=0, held_out=16
        ),
        data=str(file),
        **prefer,
    )
    return dataclasses.replace(config, prefer=section)


def run(config: Config, folder: pathlib.Path) -> dict[str, Any]:
    with Progress("reward", file=io.StringIO(), live=False) as view:
        return prefer.prefer(config, folder, view)


@pytest.fixture(scope="module")
def steps_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, Any]]:
    """Programs as steps: those that run are right, those with a slip wrong."""
    folder = tmp_path_factory.mktemp("process")
    rows = [
        {"prompt": one.problem.question, "completions": [one.turns[0], one.turns[2]], "labels": [False, True]}
        for one in story_demonstrations(80, 0.0, 1.0, 5)
    ]
    return folder / "run", run(config_of(folder, rows, kind="process", loss="step_cross_entropy"), folder / "run")


@pytest.mark.slow
def test_a_reward_model_tells_good_answers_from_bad_and_serves_as_a_reward(tmp_path: pathlib.Path) -> None:
    good, bad = (story_demonstrations(80, 0.0, share, 5) for share in (0.0, 1.0))
    rows = [
        {"prompt": one.problem.question, "chosen": one.turns[0], "rejected": other.turns[0]}
        for one, other in zip(good, bad, strict=True)
    ]
    config = config_of(tmp_path, rows, kind="reward", loss="bradley_terry", loss_settings={"centring": 0.01})
    summary = run(config, tmp_path / "run")
    assert summary["after"]["accuracy"] > 0.9 and summary["after"]["preference_loss"] < 0.5
    # A policy's folder is a start as well: the head is new there.
    again = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=summary["export"]),
        prefer=dataclasses.replace(config.prefer, steps=0),
    )
    assert run(again, tmp_path / "again")["before"]["margin"] == pytest.approx(summary["after"]["margin"], rel=1e-4)


def test_a_process_reward_model_finds_wrong_steps_on_unseen_answers(steps_run: Any) -> None:
    _, summary = steps_run
    assert summary["after"]["accuracy"] > 0.9 > summary["before"]["accuracy"]
    assert summary["after"]["preference_loss"] < 0.5


def test_an_exported_head_is_read_back_and_scores_an_episode(steps_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder, summary = steps_run
    model = RewardModel(summary["export"])
    config, decoder = hf.load_folder(summary["export"])
    head = value.load_head(pathlib.Path(summary["export"]), config.width)
    ids = np.arange(5, 75, dtype=np.int32)
    row = (jnp.asarray(ids)[None], jnp.arange(70)[None], jnp.ones((1, 70), jnp.int32))
    params = jax.tree.map(jnp.asarray, {value.DECODER: decoder, value.HEAD: head})
    wanted = value.token_values(params, config, *row)[0]
    np.testing.assert_allclose(model.values(ids), wanted, atol=1e-5)
    episode = Trajectory(
        problem=Problem("p", "?", "1"),
        draw=0,
        sample=0,
        prompt_ids=ids[:40],
        ids=ids[40:],
        mask=np.array([1] * 10 + [0] * 10 + [1] * 10, np.int8),
        logprobs=np.zeros(30, np.float32),
        versions=np.zeros(30, np.int32),
        turns=(Turn(0, 10, "policy"), Turn(10, 20, "tool"), Turn(20, 30, "policy")),
        stop_reason=StopReason.ANSWERED,
    )
    chances = 1 / (1 + np.exp(-np.asarray(wanted)[[49, 69]]))
    rewards = scored(episode, summary["export"], "reward_model")
    assert rewards.reward == pytest.approx(2 * float(wanted[-1]), abs=1e-5)
    steps = scored(episode, summary["export"], "process_reward")
    np.testing.assert_allclose([turn.reward for turn in steps.turns if turn.author == "policy"], 2 * chances, atol=1e-5)
    model.compile(200)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        model.values(ids)
        model.values(np.zeros(201, np.int32))
        assert not caplog.records
        model.values(np.zeros(257, np.int32))
        assert caplog.records
    with pytest.raises(ValueError, match="beyond the reward model's vocabulary"):
        model.values([config.vocab_size])
    with pytest.raises(ConfigError, match="holds no value_head.safetensors"):
        RewardModel(str(folder))


def scored(episode: Trajectory, folder: str, name: str) -> Trajectory:
    config = RewardConfig(components={name: 2.0}, component_settings={f"{name}.folder": folder})
    return asyncio.run(scorer(config).score(episode, 100))


def test_the_losses_are_their_formulas() -> None:
    scores = Scores(jnp.array([1.0, -2.0]), jnp.array([0.5, 1.0]), jnp.ones(2))
    plain = np.log1p(np.exp(-np.array([0.5, -3.0])))
    np.testing.assert_allclose(bradley_terry(scores), plain, rtol=1e-6)
    np.testing.assert_allclose(bradley_terry(scores, centring=0.1), plain + 0.1 * np.array([2.25, 1.0]), rtol=1e-6)
    steps = Steps(jnp.array([0.3, 0.3]), jnp.array([True, False]), jnp.ones(2))
    np.testing.assert_allclose(
        step_cross_entropy(steps, wrong_weight=2.0), [np.log1p(np.exp(-0.3)), 2 * np.log1p(np.exp(0.3))], rtol=1e-6
    )


def test_the_score_of_a_packed_answer_is_the_value_of_its_last_token() -> None:
    draw = np.random.default_rng(0)
    answers = [(draw.integers(0, 24, n).astype(np.int32), (np.arange(n) > 1) * 1) for n in (5, 7, 6, 4)]
    (batch,) = packing.pack_couples([answers[:2], answers[2:]], [1.0, 1.0], rows=2, row_tokens=24)
    params = spec.initialize(value.value_specs(MODEL), jax.random.key(0))
    loss, metrics = score_loss(MODEL, PreferConfig(kind="reward", loss="bradley_terry"), 2)(params, batch, None)

    def last(ids: np.ndarray) -> float:
        row = (jnp.asarray(ids)[None], jnp.arange(len(ids))[None], jnp.ones((1, len(ids)), jnp.int32))
        return float(value.token_values(params, MODEL, *row)[0, -1])

    scores = [last(ids) for ids, _ in answers]
    margins = np.array([scores[0] - scores[1], scores[2] - scores[3]])
    assert float(loss) == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)
    assert float(metrics["margin"][0]) == pytest.approx(margins.sum(), rel=1e-4, abs=1e-6)


def test_steps_need_a_label_each(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "q", "completions": ["a", "b"], "labels": [True]}) + "\n")
    with pytest.raises(DataError, match="lists of the same length"):
        load(PreferConfig(data=str(file), kind="process"), 0)
