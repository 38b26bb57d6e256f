"""What moves beside the weights: coefficients, reference, proximal policy, and the KL that rewards pay for."""

import contextlib
import dataclasses
import types
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl import mesh as meshes
from jaxrl.config import AlgorithmConfig, Config, MeshConfig, ModelConfig, TrainConfig
from jaxrl.data import packing
from jaxrl.model import logprob, spec, transformer
from jaxrl.records import Batch, RewardStatus, Trajectory
from jaxrl.rl.advantages import ADVANTAGES
from jaxrl.rl.outcomes import Recorded, of_trajectories
from jaxrl.rl.targets import keeps_reference
from jaxrl.train.hints import AGAIN, SOLVED
from jaxrl.train.progress import RunProgress
from jaxrl.train.score import of_trajectories as of_trajectories_scored
from jaxrl.train.steering import Steering, proximal_shares
from tests.rl.test_outcomes import trajectory

MODEL = ModelConfig(vocab_size=8, layers=1, width=8, query_heads=1, kv_heads=1, head_width=8, ffn_width=16)
TRAIN = TrainConfig(rows=2, row_tokens=8, updates_per_step=2)


def played(count: int) -> list[Trajectory]:
    """Trajectories of two tokens of the policy around one of the tool, sampled by weights of version ``sample``."""
    made = [trajectory(i, [[1], [2], [3]], reward=float(i), draw=0) for i in range(count)]
    return [
        dataclasses.replace(one, versions=np.full(3, i, np.int32), logprobs=np.array([-1.0, 0.0, -0.5 * i], np.float32))
        for i, one in enumerate(made)
    ]


def steered(algorithm: AlgorithmConfig, train: TrainConfig = TRAIN) -> tuple[Steering, Any]:
    """Of a session with a tiny model, compiled; and the model's weights."""
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    session = types.SimpleNamespace(
        config=Config(algorithm=algorithm, train=train),
        model=MODEL,
        mesh=mesh,
        launches=contextlib.nullcontext(),
        base=None,
        recorded_experts=None,
        chat=types.SimpleNamespace(prompt=lambda question: np.array([len(question) % 8, 5], np.int32)),
    )
    specs = transformer.param_specs(MODEL)
    params = jax.device_put(spec.initialize(specs, jax.random.key(0)), spec.shardings(specs, mesh, meshes.PARAM_RULES))
    steering = Steering(session)
    steering.compile(params, params if keeps_reference(algorithm) else None)
    return steering, params


def packed(trajectories: list[Trajectory]) -> list:
    weights = [one.mask / 6 for one in trajectories]
    return packing.pack_trajectories(trajectories, [1.0] * len(trajectories), weights, rows=2, row_tokens=8)


def scores(params: Any, batch: Any) -> np.ndarray:
    stats = logprob.sequence_logprobs(params, MODEL, batch.tokens, batch.positions, batch.segment_ids)
    return np.asarray(stats.logprobs)


@pytest.mark.parametrize(
    ("proximal", "done", "expected"),
    [
        ("behaviour", 0.0, [0, 0, 0]),
        ("recomputed", 0.0, [1, 1, 1]),
        ("recomputed", 0.5, [0, 0, 0]),
        ("interpolated", 0.0, [1, 1, 0]),  # the present weights are the proximal ones; own tokens need no share
        ("interpolated", 0.5, [2 / 2.5, 1 / 1.5, 0]),
    ],
)
def test_where_the_proximal_policy_lies(proximal: Any, done: float, expected: list[float]) -> None:
    algorithm = AlgorithmConfig(proximal=proximal)
    np.testing.assert_allclose(proximal_shares(algorithm, np.array([1, 2, 3]), 3, done), expected, rtol=1e-6)


def test_later_updates_find_the_weights_of_the_steps_beginning_scored() -> None:
    steering, params = steered(AlgorithmConfig(proximal="recomputed"))
    updates = [packed(played(3)[:2]), packed(played(3)[2:])]
    first, later = steering.prepared(updates, params, RunProgress(step=5))
    np.testing.assert_array_equal(first[0].proximal_shares, updates[0][0].mask)
    np.testing.assert_array_equal(later[0].proximal_shares, 0)
    np.testing.assert_allclose(later[0].proximal_logprobs, scores(params, updates[1][0]), rtol=1e-5)


def test_every_pass_is_taken_against_the_policy_before_the_first() -> None:
    train = dataclasses.replace(TRAIN, updates_per_step=1, passes=2)
    steering, params = steered(AlgorithmConfig(proximal="recomputed"), train)
    (batch,) = packed(played(2))
    (first,), (again,) = steering.prepared([[batch]], params, RunProgress())
    np.testing.assert_array_equal(first.proximal_shares, batch.mask > 0)
    np.testing.assert_array_equal(again.proximal_shares, 0)
    np.testing.assert_allclose(again.proximal_logprobs, scores(params, batch), rtol=1e-5)
    as_sampled = steered(AlgorithmConfig(), train)[0].prepared([[batch]], params, RunProgress())
    for (one,) in as_sampled:
        np.testing.assert_array_equal(one.proximal_logprobs, batch.proximal_logprobs)


def test_what_is_scored_comes_back_to_its_token() -> None:
    trajectories = [dataclasses.replace(one, ids=one.ids + 10 * i) for i, one in enumerate(played(5))]
    found = of_trajectories_scored(lambda batch: batch.tokens, trajectories, TRAIN)
    for values, one in zip(found, trajectories, strict=True):
        np.testing.assert_array_equal(values, one.ids * one.mask)


def test_rewards_pay_for_the_kl_of_every_token() -> None:
    steering, params = steered(AlgorithmConfig(kl_coefficient=0.5, kl_placement="reward", kl_estimator="k1"))
    trajectories, progress = played(3), RunProgress()
    outcomes = of_trajectories(trajectories, np.zeros(3, int), Recorded(), {})
    charged = steering.charged(outcomes, trajectories, params, progress)
    batches = packed(trajectories)
    paid = 0.0
    for batch in batches:
        differences = (batch.behaviour_logprobs - scores(params, batch)) * batch.mask
        paid += differences.sum()
    by_token = outcomes.rewards_by_token()
    costs = [before - after for before, after in zip(by_token, charged.token_rewards, strict=True)]
    assert all((cost[one.mask == 0] == 0).all() for cost, one in zip(costs, trajectories, strict=True))
    assert sum(cost.sum() for cost in costs) == pytest.approx(0.5 * paid, rel=1e-5)
    np.testing.assert_allclose(outcomes.rewards - charged.rewards, [cost.sum() for cost in costs], rtol=1e-6)
    alone = of_trajectories(trajectories[2:], np.zeros(1, int), Recorded(), {})
    by_itself = steering.charged(alone, trajectories[2:], params, RunProgress())
    np.testing.assert_allclose(charged.token_rewards[2], by_itself.token_rewards[0], rtol=1e-5)
    assert progress.coefficients["kl_found"] == pytest.approx(paid / 6, rel=1e-5)


def test_the_optimal_token_baseline_finds_every_token_scored() -> None:
    steering, params = steered(AlgorithmConfig(advantage="optimal_token_baseline", square_sums=True))
    trajectories = [dataclasses.replace(one, prompt_ids=np.array([5], np.int32)) for one in played(3)]
    outcomes = of_trajectories(trajectories, np.zeros(3, int), Recorded(), {})
    seen = steering.seen(outcomes, trajectories, params, None, RunProgress())
    for one, sums in zip(trajectories, seen.square_sums, strict=True):
        tokens = np.concatenate([one.prompt_ids, one.ids])[None]
        rows = tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens)
        hidden = transformer.hidden_states(params, MODEL, *rows)
        probabilities = jax.nn.softmax(logprob.logits(params, MODEL, hidden))[0, : len(one.ids)]
        expected = (np.asarray(probabilities) ** 2).sum(axis=-1) * one.mask
        np.testing.assert_allclose(sums, expected, rtol=1e-5)
    values = ADVANTAGES["optimal_token_baseline"](seen)
    assert np.isfinite(np.concatenate(values)).all() and values[2][0] > 0 > values[0][0]


def test_coefficients_move_and_stand_in_the_weights_of_the_next_step() -> None:
    algorithm = AlgorithmConfig(
        kl_coefficient=0.1, kl_target=1.0, kl_horizon=10, entropy_target=0.5, entropy_step=0.25, entropy_limit=0.3
    )
    steering, params = steered(algorithm)
    progress = RunProgress()
    shown = steering.adapt({"kl_to_reference": 3.0, "entropy": 0.4}, 5, progress)
    assert (shown["kl_coefficient"], shown["entropy_coefficient"]) == (0.1, 0.0)
    resumed = RunProgress.from_json(progress.to_json())
    batch = packed(played(2))[0]
    ((now,),) = steering.prepared([[batch]], params, resumed)
    np.testing.assert_allclose(now.kl_weights, 1.1 * batch.kl_weights, rtol=1e-6)  # 1 + 0.2 * 5 / 10
    np.testing.assert_allclose(now.entropy_weights, 0.25 * batch.rl_weights, rtol=1e-6)
    steering.adapt({"kl_to_reference": 0.0, "entropy": 0.5}, 5, progress)
    assert progress.coefficients["entropy"] == 0.3  # not 0.5
    steering.adapt({"kl_to_reference": 0.0, "entropy": 0.6}, 5, progress)
    ((now,),) = steering.prepared([[batch]], params, progress)
    np.testing.assert_array_equal(now.entropy_weights, 0)  # nothing is paid above the target
    assert progress.coefficients["entropy"] == pytest.approx(0.05)
    assert steering.adapt({}, 0, progress) == {}


def test_the_reference_moves_towards_the_policy_when_it_is_due() -> None:
    steering, params = steered(AlgorithmConfig(kl_coefficient=0.1, reference_every=2, reference_mix=0.75))
    reference = jax.tree.map(lambda leaf: leaf + 4, params)
    before = jax.device_get(reference)
    assert steering.refreshed(reference, params, 3) is reference
    after = steering.refreshed(reference, params, 4)
    jax.tree.map(
        lambda new, old, policy: np.testing.assert_allclose(new, 0.25 * old + 0.75 * policy, rtol=1e-5, atol=1e-6),
        jax.device_get(after),
        before,
        jax.device_get(params),
    )
    assert steered(AlgorithmConfig())[0].refreshed(None, params, 4) is None


@pytest.mark.parametrize("name", ["gvpo", "flowrl"])
def test_targets_are_of_the_weights_that_the_update_begins_with(name: str) -> None:
    """The trajectories of a group lie in micro-batches of their own; what is left of them sums to 0."""
    algorithm = AlgorithmConfig(loss=name, loss_settings={"beta": 2.0})
    steering, params = steered(algorithm, dataclasses.replace(TRAIN, rows=1, row_tokens=4))
    batches = packing.pack_trajectories(played(2), [0.5, -0.5], [np.ones(3)] * 2, rows=1, row_tokens=4, groups=[7, 7])
    (prepared,) = steering.prepared([batches], params, RunProgress())
    shown = Batch.zeros(1, 9)  # a demonstration, of a shape that nothing is compiled for
    reference = params if keeps_reference(algorithm) else None
    *completed, left = steering.completed([*prepared, shown], params, reference)
    assert len(completed) == 2 and left is shown
    fitted, wanted = [], []
    for batch, target in zip(batches, completed, strict=True):
        here, own = batch.mask > 0, scores(params, batch)
        advantage, of_target = batch.advantages[here].mean(), target.advantages[here].mean()
        if name == "gvpo":
            drift = 2.0 * (own - batch.behaviour_logprobs)[here].sum()
            fitted.append(drift - of_target)
            wanted.append(drift - advantage)
        else:  # the policy is its own reference
            fitted.append(own[here].mean() - of_target)
            wanted.append(-2.0 * advantage)
        assert not target.advantages[~here].any() and target.groups is None
    np.testing.assert_allclose(fitted, np.subtract(wanted, np.mean(wanted)), rtol=1e-4, atol=1e-5)


def test_online_dpo_finds_the_log_ratio_of_whole_trajectories() -> None:
    steering, params = steered(AlgorithmConfig(advantage="online_dpo", reference_ratios=True))
    trajectories = played(3)
    outcomes = of_trajectories(trajectories, np.zeros(3, int), Recorded(), {})
    seen = steering.seen(outcomes, trajectories, params, params, RunProgress())
    for one, ratio in zip(trajectories, seen.reference_ratios, strict=True):
        (batch,) = packed([one])
        wanted = ((batch.behaviour_logprobs - scores(params, batch)) * batch.mask).sum()
        assert ratio == pytest.approx(float(wanted), rel=1e-4)


def test_the_policy_scores_what_it_wrote_with_a_hint_and_without() -> None:
    """The first trajectory is right and nobody else is: the others are told it, it is told nothing. That other weights
    sampled, which had other log-probabilities, makes no difference."""
    steering, params = steered(AlgorithmConfig(advantage="self_distillation", hint="attempts"))
    first, *rest = (dataclasses.replace(one, prompt_ids=np.array([5], np.int32)) for one in played(3))
    trajectories = [dataclasses.replace(first, reward_status=RewardStatus.CORRECT), *rest]
    outcomes, progress = of_trajectories(trajectories, np.zeros(3, int), Recorded(), {}), RunProgress()
    found = steering.seen(outcomes, trajectories, params, None, progress).hint_gains
    assert found[0] is None and progress.coefficients["hinted"] == pytest.approx(2 / 3)

    def said(prompt: Any, ids: np.ndarray) -> np.ndarray:
        tokens = np.concatenate([prompt, ids])[None]
        rows = tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens)
        whole = jax.nn.log_softmax(logprob.logits(params, MODEL, transformer.hidden_states(params, MODEL, *rows)))[0]
        return np.asarray(whole)[len(prompt) - 1 + np.arange(len(ids)), ids]

    for one, values in zip(trajectories[1:], found[1:], strict=True):
        question = f"{one.problem.question}\n\n{SOLVED}\n{first.text}\n\n{AGAIN}"
        gain = said([len(question) % 8, 5], one.ids) - said(one.prompt_ids, one.ids)
        np.testing.assert_allclose(values, gain * one.mask, rtol=1e-4, atol=1e-6)
