"""Stages of one run: limits change, solved problems leave, the optimizer starts anew. The recipe of rStar2-Agent."""

import dataclasses
import io
import pathlib

import jax
import pytest

from jaxrl import config as configuration
from jaxrl.checks import check
from jaxrl.config import Config, ConfigError, StagesConfig
from jaxrl.model import spec, transformer
from jaxrl.observe.progress import Progress
from jaxrl.observe.traces import read_episodes
from jaxrl.observe.writers import read_metrics
from jaxrl.train import experiment, stages
from jaxrl.train.checkpoint import Checkpoints
from jaxrl.train.progress import RunProgress
from jaxrl.train.run import RunFolder
from jaxrl.train.session import open_session

STAGES = StagesConfig(
    until=(1, 2, 4),
    max_response_tokens=(30, 96, 96),
    max_turns=(1, 3, 3),
    drop_solved=(0, 0, 1),
    drop_unsolved=(0, 0, 0),
    reset_optimizer=(False, False, True),
)


def test_the_stage_of_every_step() -> None:
    config = Config(stages=dataclasses.replace(STAGES, until=(2, 5, 6)))
    assert [stages.index(config, step) for step in range(6)] == [0, 0, 1, 1, 1, 2]
    assert stages.index(Config(), 7) == 0


def test_a_run_in_three_stages(tiny_config: Config, tmp_path: pathlib.Path) -> None:
    train = dataclasses.replace(tiny_config.train, steps=4, eval_every=0, prefetch_groups=0)
    config = dataclasses.replace(tiny_config, train=train, stages=STAGES)
    shown = io.StringIO()
    with Progress("tiny", file=shown, live=False) as view:
        experiment.train(config, tmp_path / "run", view)
    played = [read_episodes(file) for file in sorted((tmp_path / "run" / "episodes").glob("rl_*.jsonl"))]
    assert {t.policy_turns for t in played[0]} == {1} and max(len(t.ids) for t in played[0]) <= 30
    assert max(t.policy_turns for t in played[1]) > 1 and max(len(t.ids) for t in played[1]) > 30
    # Nobody answers within one turn; the other steps make an update each.
    assert ["grad_norm" in row for row in read_metrics(tmp_path / "run", "rl")] == [False, True, True, True]
    evaluated = read_episodes(next((tmp_path / "run" / "episodes").glob("eval_*.jsonl")))
    assert max(t.policy_turns for t in evaluated) > 1  # a stage limits training, not what it is judged by
    assert "of 16 problems stay, " in shown.getvalue()

    run = RunFolder(tmp_path / "run")
    session = open_session(config, run)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    progress, state, _ = experiment.restore(session, checkpoints, checkpoints.find("latest"))
    assert int(state.step) == 2  # updates since the optimizer started anew
    assert progress.problems is not None and len(progress.problems) < 16
    assert {t.problem.id for step in played[2:] for t in step} <= set(progress.problems)
    assert {t.problem.id for t in played[3]} != {t.problem.id for t in played[2]}  # the stream went on
    assert len({(t.draw, t.sample) for step in played for t in step}) == sum(map(len, played))


def test_what_one_stage_drops_as_solved_another_drops_all_but(tiny_config: Config, tmp_path: pathlib.Path) -> None:
    kept = []
    for solved, unsolved in ((1, 0), (0, 1)):
        train = dataclasses.replace(tiny_config.train, steps=1, eval_every=0, prefetch_groups=0)
        only = StagesConfig((1,), (96,), (3,), (solved,), (unsolved,), (False,))
        folder = tmp_path / f"{solved}{unsolved}"
        with Progress("tiny", file=io.StringIO(), live=False) as view:
            experiment.train(dataclasses.replace(tiny_config, train=train, stages=only), folder, view)
        checkpoints = Checkpoints(RunFolder(folder).checkpoints, tiny_config.checkpoint, read_only=True)
        kept.append(set(RunProgress.from_json(checkpoints.host(checkpoints.find("latest"))).problems or ()))
        checkpoints.close()
    assert not kept[0] & kept[1]
    assert len(kept[0] | kept[1]) == 16
    assert all(kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_turns": (1,)}, "has not one entry for each of the 3 stages"),
        ({"until": (3, 3, 4)}, "must rise from stage to stage"),
        ({"until": (1, 2, 9)}, "the last stage ends at step 9 but TrainConfig.steps=4"),
        ({"max_response_tokens": (64, 64, 9999)}, "exceeds EngineConfig.max_response_tokens"),
    ],
)
def test_stages_that_contradict_the_rest_are_refused(tiny_config: Config, change: dict, message: str) -> None:
    train = dataclasses.replace(tiny_config.train, steps=4)
    config = dataclasses.replace(tiny_config, train=train, stages=dataclasses.replace(STAGES, **change))
    with pytest.raises(ConfigError, match=message):
        check(config)


def test_rstar2_has_the_values_of_the_paper_and_its_model_initialises_abstractly() -> None:
    """arXiv 2508.20722, section 4: Qwen3-14B, 512 problems, 32 samples of which 16 stay, three stages."""
    config = configuration.load(
        "rstar2_14b", ["DataConfig.train=train.jsonl", "DataConfig.eval=aime.jsonl", "ModelConfig.path=model"]
    )
    assert (config.train.problems, config.train.samples, config.algorithm.keep) == (512, 32, 16)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (1e-6, 20)
    assert (
        config.algorithm.loss_settings == {"clip_low": 0.2, "clip_high": 0.28} and not config.algorithm.kl_coefficient
    )
    assert config.stages.until == (300, 385, 510)
    assert config.stages.max_response_tokens == (8192, 12288, 12288)
    assert config.stages.max_turns == (10, 10, 15)
    assert config.stages.drop_solved == (0, 0, 8) and config.stages.reset_optimizer == (False, False, True)
    specs = transformer.param_specs(config.model)
    assert 14.7e9 < spec.count(specs) < 14.8e9
    shapes = jax.eval_shape(lambda key: spec.initialize(specs, key), jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, spec.abstract(specs))
