"""From selected groups to packed rows: advantages over the whole step, weights by update, what a method remembers."""

import json

import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.config import AlgorithmConfig, Config, EngineConfig, TrainConfig
from jaxrl.rl.selection import Selection
from jaxrl.train.pack import pack, ranked_in_parts
from jaxrl.train.progress import RunProgress
from tests.rl.test_outcomes import trajectory


def config(advantage: str, updates: int = 1, **settings: float) -> Config:
    return Config(
        algorithm=AlgorithmConfig(advantage=advantage, advantage_settings=settings),
        engine=EngineConfig(max_response_tokens=4),
        train=TrainConfig(rows=2, row_tokens=8, updates_per_step=updates),
    )


def groups(*rewards: list[float]) -> tuple[Selection, ...]:
    """One selection for each list of rewards; a trajectory has two turns of one token and a token of the tool."""
    return tuple(
        Selection(
            tuple(trajectory(i, [[1], [2], [3]], reward=reward, draw=draw) for i, reward in enumerate(of_group)), "", {}
        )
        for draw, of_group in enumerate(rewards)
    )


def advantages(updates: list) -> list[np.ndarray]:
    """Of each update, those of its sampled tokens."""
    return [np.concatenate([batch.advantages[batch.mask > 0] for batch in batches]) for batches in updates]


def test_what_is_scaled_over_the_batch_is_scaled_over_the_step_however_many_updates_there_are() -> None:
    played = groups([1.0, 0.0], [5.0, 0.0])
    (one,) = advantages(pack(config("reinforce_plus_plus_baseline"), played, {}))
    two = advantages(pack(config("reinforce_plus_plus_baseline", updates=2), played, {}))
    assert len(two) == 2
    np.testing.assert_allclose(np.sort(one), np.sort(np.concatenate(two)), rtol=1e-6)
    assert one.std(ddof=1) == pytest.approx(1.0, abs=1e-5) and two[0].std() < 0.5 < two[1].std()


def test_weights_are_those_of_the_update() -> None:
    for batches in pack(config("grpo", updates=2), groups([1.0, 0.0], [1.0, 0.0, 0.0]), {}):
        assert sum(batch.rl_weights.sum() for batch in batches) == pytest.approx(1.0)


def test_a_running_mean_goes_on_after_a_resume() -> None:
    progress = RunProgress()
    pack(config("rae", decay=0.5), groups([1.0, 0.0]), progress.memory)
    assert progress.memory == {"rae/": 0.25}
    resumed = RunProgress.from_json(json.loads(json.dumps(progress.to_json())))
    (values,) = advantages(pack(config("rae", decay=0.5), groups([1.0, 0.0]), resumed.memory))
    assert resumed.memory == {"rae/": 0.375}
    np.testing.assert_allclose(np.unique(values), [-0.375, 0.625])
    assert pack(config("rae"), (), resumed.memory) == [] and resumed.memory == {"rae/": 0.375}


def test_what_is_masked_counts_in_the_mean_and_is_not_packed() -> None:
    (group,) = groups([1.0, 0.0, 0.0])
    masked = (Selection(group.kept, "", {}, (False, False, True)),)
    (batches,) = pack(config("dr_grpo"), masked, {})
    assert sorted(np.concatenate(advantages([batches]))) == pytest.approx([-1 / 3, -1 / 3, 2 / 3, 2 / 3])
    assert sum(batch.rl_weights.sum() for batch in batches) == pytest.approx(1.0)


def test_whitening_is_over_what_is_trained_on() -> None:
    """The outlier pulls its group's mean and neither the mean nor the std of the batch."""
    first, second = groups([1.0, 0.0, 50.0], [1.0, 0.0, 2.0])
    masked = Selection(first.kept, "", {}, (False, False, True))
    for advantage in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        (batches,) = pack(config(advantage), (masked, second), {})
        (values,) = advantages([batches])
        assert len(values) == 10
        assert values.mean() == pytest.approx(0.0, abs=1e-5) and values.std(ddof=1) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("AlgorithmConfig.loss=clip_cov", "loss='clip_cov'"),
        ("AlgorithmConfig.rejection=m2po", "rejection='m2po'"),
        ("AlgorithmConfig.top_entropy=0.2", "top_entropy=0.2"),
        ("AlgorithmConfig.mismatch_settings={'normalize': True}", "mismatch_settings={'normalize': True}"),
        ("AlgorithmConfig.loss=gspo", ""),
    ],
)
def test_a_run_is_told_where_cutting_an_update_would_matter(setting: str, named: str) -> None:
    """16 problems of 8 kept in two updates, two to a row: 32 rows hold whatever may be trained on at once."""
    sizes = ("EngineConfig.max_prompt_tokens=100", "EngineConfig.max_response_tokens=150", "TrainConfig.row_tokens=512")
    common = [setting, *sizes, "TrainConfig.updates_per_step=2"]
    cut, whole = (ranked_in_parts(configuration.load("", [*common, f"TrainConfig.rows={rows}"])) for rows in (31, 32))
    assert whole == "" and (named in cut and "rows=32" in cut if named else cut == "")
    for more in ("EnvConfig.joint_episode=draft_and_revise", "AlgorithmConfig.extra_samples=dars_hard"):
        unbounded = [*common, "AlgorithmConfig.keep=0", more, "TrainConfig.rows=9999"]
        warning = ranked_in_parts(configuration.load("", unbounded))
        assert (named in warning and "depends on what is played" in warning) if named else warning == ""
