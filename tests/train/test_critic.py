"""The critic: values of packed episodes, what it learns, and PPO end to end."""

import dataclasses
import pathlib
import shutil
import subprocess
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.config import AlgorithmConfig, Config, ConfigError, CriticConfig
from jaxrl.model import hf, value
from jaxrl.observe.writers import read_metrics
from jaxrl.records import Problem, Trajectory, Turn
from jaxrl.rl import algorithm
from jaxrl.rl.outcomes import Outcomes, Recorded
from jaxrl.statuses import StopReason
from jaxrl.train.critic import Critic, explained_variance, new_critic
from jaxrl.train.progress import RunProgress
from jaxrl.train.run import RunFolder
from jaxrl.train.session import Session, open_session
from jaxrl.train.state import initial_params
from jaxrl.train.steering import Steering


def episode(draw: int, good: bool) -> Trajectory:
    """Its third token tells whether it is good; the environment writes the two after that."""
    rng = np.random.default_rng(draw)
    ids = np.concatenate([rng.integers(10, 200, 2), [20 if good else 30], rng.integers(10, 200, int(3 + draw % 4))])
    mask = np.ones(len(ids), np.int8)
    mask[3:5] = 0
    return Trajectory(
        problem=Problem("p", "?", "1"),
        draw=draw,
        sample=0,
        prompt_ids=rng.integers(10, 200, 3 + draw % 3).astype(np.int32),
        ids=ids.astype(np.int32),
        mask=mask,
        logprobs=np.zeros(len(ids), np.float32),
        versions=np.zeros(len(ids), np.int32),
        turns=(Turn(0, 3, "policy"), Turn(3, 5, "tool"), Turn(5, len(ids), "policy")),
        stop_reason=StopReason.ANSWERED,
        reward=float(good),
    )


EPISODES = [episode(draw, draw % 2 == 0) for draw in range(24)]


def seen(values: list[np.ndarray], episodes: list[Trajectory] = EPISODES) -> Outcomes:
    rewards = np.array([one.reward for one in episodes])
    return Outcomes(rewards, np.zeros(len(episodes), int), [one.mask for one in episodes], values=values)


def mean_return(rewards: list[np.ndarray], masks: list[np.ndarray]) -> float:
    """Over the sampled tokens, of what is still to come from each."""
    to_come = [earned[mask > 0][::-1].cumsum() for earned, mask in zip(rewards, masks, strict=True)]
    return float(np.concatenate(to_come).mean())


@pytest.fixture(scope="module")
def session(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Session:
    critic = CriticConfig(enabled=True, learning_rate=3e-3, clip=5.0)
    train = dataclasses.replace(tiny_config.train, rows=4, row_tokens=160)
    algorithm = dataclasses.replace(tiny_config.algorithm, advantage="gae")
    config = dataclasses.replace(tiny_config, critic=critic, train=train, algorithm=algorithm)
    return open_session(config, RunFolder(tmp_path_factory.mktemp("critic")))


@pytest.fixture
def critic(session: Session) -> Critic:
    return new_critic(session, initial_params(session.specs, session.mesh, 0))


def test_values_are_those_of_each_episode_alone_before_its_token(session: Session, critic: Critic) -> None:
    got = critic.values(EPISODES[::-1])
    for one, values in list(zip(EPISODES[::-1], got, strict=True))[:5]:
        ids = jnp.asarray(np.concatenate([one.prompt_ids, one.ids]))[None]
        row = (ids, jnp.arange(ids.shape[1])[None], jnp.ones(ids.shape, jnp.int32))
        params = jax.tree.map(jnp.asarray, jax.device_get(critic.state.params))
        after = value.token_values(params, session.model, *row)[0]
        np.testing.assert_allclose(values, after[len(one.prompt_ids) - 1 : -1], atol=1e-5)


def test_it_learns_what_an_episode_will_earn(critic: Critic) -> None:
    """Before the telling token no better than the mean, after it nearly the reward; the environment's tokens aside."""
    first = critic.learn(EPISODES, seen(critic.values(EPISODES)))
    for _ in range(40):
        last = critic.learn(EPISODES, seen(critic.values(EPISODES)))
    assert last["critic/value_loss"] < 0.2 * first["critic/value_loss"] and last["critic/explained_variance"] > 0.5
    after = [values[5:].mean() for values in critic.values(EPISODES)]
    good = np.array([one.reward for one in EPISODES]) > 0
    assert np.mean(np.array(after)[good]) > 0.7 > 0.3 > np.mean(np.array(after)[~good])


def test_its_moments_rest_on_the_host_where_the_policys_do(session: Session) -> None:
    optimizer = dataclasses.replace(session.config.optimizer, offload=True)
    offloaded = dataclasses.replace(session, config=dataclasses.replace(session.config, optimizer=optimizer))
    critic = new_critic(offloaded, initial_params(session.specs, session.mesh, 0))
    for _ in range(2):
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(critic.state.opt_state) if leaf.ndim}
        assert kinds == {"pinned_host"}
        critic.learn(EPISODES[:2], seen(critic.values(EPISODES[:2]), EPISODES[:2]))


def test_an_old_value_far_from_the_present_one_ends_the_gradient(session: Session) -> None:
    config = dataclasses.replace(session.config, critic=dataclasses.replace(session.config.critic, clip=1e-3))
    critic = new_critic(dataclasses.replace(session, config=config), initial_params(session.specs, session.mesh, 0))
    below = [values - 1.0 for values in critic.values(EPISODES)]  # the value rose by 1 since, more than clip allows
    high = [dataclasses.replace(one, reward=50.0) for one in EPISODES]
    metrics = critic.learn(high, seen(below, high))
    assert metrics["critic/value_clip_fraction"] == 1 and metrics["critic/grad_norm"] == 0


def test_it_learns_what_the_policy_is_paid(session: Session, critic: Critic) -> None:
    charge = AlgorithmConfig(kl_coefficient=0.5, kl_placement="reward", kl_estimator="k1")
    charging = dataclasses.replace(session, config=dataclasses.replace(session.config, algorithm=charge))
    plain, progress = seen(critic.values(EPISODES)), RunProgress()
    reference = initial_params(session.specs, session.mesh, 1)
    charged = Steering(charging).charged(plain, EPISODES, reference, progress)
    wanted, bare = (mean_return(one.rewards_by_token(), one.masks) for one in (charged, plain))
    assert abs(wanted - bare) > 0.5
    assert critic.learn(EPISODES, charged)["critic/return"] == pytest.approx(wanted, rel=1e-4)


def test_it_learns_from_what_is_trained_on_alone(critic: Critic) -> None:
    good = np.array([one.reward for one in EPISODES]) > 0
    outcomes = dataclasses.replace(seen(critic.values(EPISODES)), trained=good)
    metrics = critic.learn(EPISODES, outcomes)
    assert metrics["critic/return"] == pytest.approx(1.0) and metrics["critic/explained_variance"] == 0


def test_passes_go_through_the_updates_again(session: Session, critic: Critic) -> None:
    train = dataclasses.replace(session.config.train, updates_per_step=2, passes=3)
    often = dataclasses.replace(session, config=dataclasses.replace(session.config, train=train))
    repeated = new_critic(often, initial_params(session.specs, session.mesh, 0))
    repeated.learn(EPISODES, seen(repeated.values(EPISODES)))
    assert int(repeated.state.step) == 6


def test_explained_variance_has_its_ends() -> None:
    returns, masks = [np.array([0.0, 1.0, 9.0])], [np.array([1, 1, 0])]
    assert explained_variance(returns, returns, masks) == 1
    assert explained_variance([np.array([0.5, 0.5, 0.0])], returns, masks) == 0
    assert explained_variance(returns, [np.zeros(3)], masks) == 0


def test_an_advantage_that_needs_values_needs_a_critic() -> None:
    config = configuration.load("", ["AlgorithmConfig.advantage=gae"]).algorithm
    with pytest.raises(ConfigError, match="needs values: set CriticConfig.enabled=True"):
        algorithm.check(config, Recorded())
    algorithm.check(config, Recorded(values=True))


PPO = (
    *("AlgorithmConfig.advantage=gae", "AlgorithmConfig.kl_placement=reward", "AlgorithmConfig.kl_estimator=k1"),
    *("CriticConfig.enabled=True", "CriticConfig.learning_rate=1e-3", "TrainConfig.passes=2"),
)


@pytest.mark.slow
def test_ppo_trains_resumes_to_the_same_bits_and_exports_the_policy_alone(
    tmp_path: pathlib.Path, run_tiny: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    settings = [part for one in (*PPO, "CriticConfig.first_steps=1") for part in ("--set", one)]
    folder = tmp_path / "run"
    done = run_tiny(folder, more=tuple(settings))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_metrics(folder, "rl")
    assert len(rows) == 4 and all(np.isfinite(row["critic/value_loss"]) for row in rows if "critic/value_loss" in row)
    assert sum("critic/value_loss" in row for row in rows) >= 2
    assert "loss" not in rows[0] and any("loss" in row for row in rows[1:])  # the critic begins alone
    hf.load_folder(folder / "export")
    assert not (folder / "export" / value.HEAD_FILE).exists()
    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "export")
    done = run_tiny(again, more=(*settings, "--step", str(rows[-2]["step"])))
    assert done.returncode == 0, done.stdout + done.stderr
    weights = [(one / "export" / "model.safetensors").read_bytes() for one in (folder, again)]
    assert weights[0] == weights[1]
    assert read_metrics(again, "rl")[-1].get("critic/value_loss") == rows[-1].get("critic/value_loss")
