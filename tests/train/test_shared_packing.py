"""Sharing what trajectories have in common changes no loss, no gradient, no metric and no score."""

import dataclasses
import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import mesh as meshes
from jaxrl.config import AlgorithmConfig, Config, DistillConfig, EngineConfig, MeshConfig, ModelConfig, TrainConfig
from jaxrl.data import packing
from jaxrl.data.tree_packing import Sharing, sharing_of
from jaxrl.model import logprob, spec, transformer
from jaxrl.records import Batch, Trajectory
from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.policy_losses import POLICY_LOSSES
from jaxrl.rl.supervised import nll
from jaxrl.rl.tokens import sampled
from jaxrl.train.distill import distillation_loss
from jaxrl.train.pack import pack
from jaxrl.train.score import Scorer, of_trajectories
from jaxrl.train.state import initial_params, new_state, rl_optimizer
from jaxrl.train.update import Guides, Updater, policy_gradient_loss
from tests.data.test_tree_packing import trajectory
from tests.train.test_pack import groups

MODEL = ModelConfig(
    vocab_size=24,
    layers=2,
    width=16,
    query_heads=4,
    kv_heads=2,
    head_width=8,
    ffn_width=32,
    init_scale=0.3,
    sliding_window=4,
    sliding_layers=(1,),
)
"""One layer sees everything before a token, one the last four: fewer than the prompts have and the responses."""
EXPERTS = dataclasses.replace(MODEL, family="qwen3_moe", experts=4, expert_width=8, balance_coefficient=0.5)
ROWS, ROW_TOKENS = 8, 32
SHARED = {"shared_prompt": Sharing(False, ROW_TOKENS), "tree": Sharing(True, 3 * ROW_TOKENS)}
EVERYTHING = AlgorithmConfig(
    loss="luspo",
    proximal="recomputed",
    mismatch="tis",
    rejection="band",
    rejection_settings={"low": 0.7, "high": 1.4},
    entropy_coefficient=0.1,
    top_entropy=0.75,  # a threshold between two tokens: at one, rounding would decide about those that equal it
    kl_coefficient=0.2,
    kl_by_ratio=True,
)


@functools.cache
def played(experts: bool = False) -> tuple[Trajectory, ...]:
    """Two groups whose responses begin alike, end within each other, or are the same, with log-probabilities near
    those of the policy that differ even where tokens are shared: each was sampled by weights of another age."""
    draw = np.random.default_rng(5)
    made = []
    for group, prompt in enumerate(([3, 5, 7, 9, 11, 4], [3, 5, 2])):
        common = draw.integers(1, 24, 12).tolist()
        tails = [(0, 8), (4, 5), (7, 6), (7, 0), (9, 3), (12, 0), (12, 0)]
        for sample, (shared, own) in enumerate(tails):
            response = common[:shared] + draw.integers(1, 24, own).tolist()
            one = trajectory(group, sample, prompt, response)
            mask = (draw.random(len(response)) < 0.8).astype(np.int8)
            mask[0] = 1
            logprobs = ((-3 + 0.6 * draw.normal(size=len(response))) * mask).astype(np.float32)
            one = dataclasses.replace(one, mask=mask, logprobs=logprobs)
            if experts:
                # Half of the trajectories agree on the experts of what they share.
                of_token = np.random.default_rng(0 if sample < 4 else sample)
                length = len(prompt) + len(response)
                recorded = of_token.permuted(np.tile(np.arange(4, dtype=np.int8), (30, 2, 1)), axis=2)[:length, :, :2]
                recorded[-1] = -1
                one = dataclasses.replace(one, experts=recorded)
            made.append(one)
    return tuple(made)


def packed(trajectories: tuple[Trajectory, ...], sharing: Sharing | None, rows: int = ROWS) -> list[Batch]:
    advantages = [(-1) ** one.sample * (0.5 + one.draw + one.sample / 4) for one in trajectories]
    weights = aggregation_weights([one.mask for one in trajectories], "sequence")
    batches = packing.pack_trajectories(
        trajectories, advantages, weights, rows=rows, row_tokens=ROW_TOKENS, sharing=sharing
    )
    return [
        batch.replace(
            proximal_logprobs=batch.behaviour_logprobs + np.float32(0.3) * batch.mask * np.sin(batch.tokens),
            entropy_weights=0.1 * batch.rl_weights,
            ce_weights=0.05 * batch.mask * (batch.tokens % 3 == 0),
        )
        for batch in batches
    ]


@functools.cache
def params_of(model: ModelConfig, seed: int = 0) -> Any:
    return spec.initialize(transformer.param_specs(model), jax.random.key(seed))


def summed(loss: Any, params: Any, batches: list[Batch], reference: Any) -> tuple[Any, Any, Any]:
    """Loss, gradient and metrics over micro-batches."""
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    results = [run(params, jax.tree.map(jnp.asarray, batch), reference) for batch in batches]
    (totals, metrics), gradients = zip(*(result[0] for result in results), strict=True), [one[1] for one in results]
    return sum(totals), functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), gradients), metrics


def assert_close(found: Any, wanted: Any) -> None:
    """Gradients that differ by no more than the order of their sums."""
    for left, right in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(right, left, atol=3e-6 * max(1.0, float(jnp.abs(left).max())))


def assert_same_update(loss: Any, model: ModelConfig, sharing: Sharing, rows: int = ROWS, **options: Any) -> None:
    trajectories = played(**options)
    params, reference = params_of(model), params_of(model, 1)
    plain, shared = packed(trajectories, None), packed(trajectories, sharing, rows)
    assert len(plain) == 1
    wanted, gradient, (metrics,) = summed(loss, params, plain, reference)
    found, other, others = summed(loss, params, shared, reference)
    assert abs(float(wanted)) > 1e-2
    assert float(found) == pytest.approx(float(wanted), rel=2e-6, abs=2e-6)
    assert_close(other, gradient)
    if rows == ROWS:
        (others,) = others
        assert metrics.keys() == others.keys()
        for name, (total, count) in metrics.items():
            assert float(others[name][1]) == float(count), name
            assert float(others[name][0]) == pytest.approx(float(total), rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        (AlgorithmConfig(), "shared_prompt"),
        (EVERYTHING, "tree"),
        pytest.param(AlgorithmConfig(), "tree", marks=pytest.mark.slow),
        pytest.param(EVERYTHING, "shared_prompt", marks=pytest.mark.slow),
    ],
    ids=["ppo_clip-shared_prompt", "everything-tree", "ppo_clip-tree", "everything-shared_prompt"],
)
def test_loss_gradient_and_metrics_are_those_without_sharing(algorithm: AlgorithmConfig, name: str) -> None:
    assert_same_update(policy_gradient_loss(MODEL, algorithm, 0.9, nll), MODEL, SHARED[name])


def test_every_policy_loss_is_exact_in_a_tree() -> None:
    """Each by its value, and all by the gradient of a sum in which each has a weight of its own."""
    names = sorted(POLICY_LOSSES)
    shares = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, len(names)), jnp.float32)

    def losses(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        rows = batch.tokens, batch.positions, batch.segment_ids
        stats = logprob.sequence_logprobs(params, MODEL, *rows, tree=batch.tree)
        tokens = sampled(
            batch.mask,
            stats.logprobs,
            proximal_logprobs=batch.proximal_logprobs,
            behaviour_logprobs=batch.behaviour_logprobs,
            advantages=batch.advantages,
            segment_ids=batch.segment_ids,
            entropy=stats.entropy,
        )
        values = jnp.stack([(batch.rl_weights * POLICY_LOSSES[name](tokens).loss).sum() for name in names])
        return values @ shares, values

    run = jax.jit(jax.value_and_grad(losses, has_aux=True))
    ((_, wanted), gradient), ((_, found), other) = (
        run(params_of(MODEL), *jax.tree.map(jnp.asarray, packed(played(), sharing)))
        for sharing in (None, SHARED["tree"])
    )
    assert len({float(value) for value in wanted}) > len(names) - 4  # those that are the same within their limits
    for name, left, right in zip(names, wanted, found, strict=True):
        assert float(right) == pytest.approx(float(left), rel=1e-5, abs=1e-6), name
    assert_close(other, gradient)


def test_a_tree_cut_into_micro_batches_adds_up() -> None:
    sharing = Sharing(True, ROW_TOKENS)
    assert len(packed(played(), sharing, rows=1)) > 2
    assert_same_update(policy_gradient_loss(MODEL, AlgorithmConfig(), 1.0), MODEL, sharing, rows=1)


ONE = ("tree", pytest.param("shared_prompt", marks=pytest.mark.slow))
"""Both ways to share; the one that shares more is enough for a quick look."""


@pytest.mark.parametrize("name", ONE)
def test_recorded_experts_and_their_balance_are_those_without_sharing(name: str) -> None:
    assert_same_update(policy_gradient_loss(EXPERTS, AlgorithmConfig(), 1.0), EXPERTS, SHARED[name], experts=True)


@pytest.mark.parametrize("kind", ["generalised_jsd", pytest.param("on_policy", marks=pytest.mark.slow)])
def test_a_teacher_says_the_same_of_a_tree(kind: str) -> None:
    config = DistillConfig(teacher="somewhere", stages="reinforcement", loss=kind)
    taught = distillation_loss(
        policy_gradient_loss(MODEL, AlgorithmConfig(), 1.0), (MODEL, MODEL), config, "reinforcement"
    )

    def loss(params: Any, batch: Batch, teacher: Any) -> tuple[jax.Array, Any]:
        return taught(params, batch, Guides(None, teacher))

    assert_same_update(loss, MODEL, SHARED["tree"])


@pytest.mark.parametrize(
    ("name", "statistic"), [("tree", None), ("shared_prompt", logprob.square_sums)], ids=["logprobs", "square_sums"]
)
def test_scores_of_trajectories_are_those_without_sharing(name: str, statistic: Any) -> None:
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.device_put(params_of(MODEL), jax.NamedSharding(mesh, jax.P()))
    scores = []
    for chosen in ("rows", name):
        train = TrainConfig(rows=3, row_tokens=ROW_TOKENS, packing=chosen, tree_loss_rows=3)
        options = {} if statistic is None else {"statistic": statistic}
        scorer = Scorer(
            lambda _, values: values, MODEL, 0.8, mesh, jax.default_device(None), sharing=sharing_of(train), **options
        )
        scorer.compile(params, train.rows, train.row_tokens)
        scores.append(of_trajectories(functools.partial(scorer, params), played(), train))
    for one, left, right in zip(played(), *scores, strict=True):
        np.testing.assert_allclose(right, left, atol=2e-6)
        assert np.abs(left[one.mask > 0]).min() > 0 and not left[one.mask == 0].any()


@pytest.mark.parametrize("name", ONE)
@pytest.mark.slow
def test_an_update_takes_trees_and_demonstrations_in_one_program(name: str) -> None:
    """One compilation for both, as without sharing, and the same parameters after it."""
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = rl_optimizer(dataclasses.replace(Config().optimizer, eps=1e-3), transformer.param_specs(MODEL))
    demonstrations = packing.pack_sequences(
        [(np.arange(1, 9), np.r_[0, np.ones(7)]), (np.arange(3, 20), np.r_[0, np.ones(16)])],
        rows=ROWS,
        row_tokens=ROW_TOKENS,
    )
    demonstrations = [batch.replace(mask=np.zeros_like(batch.mask)) for batch in demonstrations]
    after = []
    for sharing in (None, SHARED[name]):
        updater = Updater(policy_gradient_loss(MODEL, AlgorithmConfig(), 1.0, nll), optimizer, mesh, sharing=sharing)
        state = new_state(initial_params(transformer.param_specs(MODEL), mesh, 0), optimizer, mesh)
        updater.compile(state, ROWS, ROW_TOKENS)
        batches = [batch.replace(ce_weights=0 * batch.ce_weights) for batch in packed(played(), sharing)]
        state, metrics = updater.step(state, [*batches, *demonstrations])
        after.append((jax.device_get(state.params), metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after[0][0], after[1][0])
    for metric, value in after[0][1].items():
        assert after[1][1][metric] == pytest.approx(value, rel=1e-4, abs=1e-5), metric


def test_a_node_without_a_weight_gets_no_gradient_and_padding_no_say() -> None:
    (batch,) = packed(played(), SHARED["tree"])
    loss = policy_gradient_loss(MODEL, AlgorithmConfig(), 1.0)

    def total(embedding: jax.Array, batch: Batch) -> jax.Array:
        return loss({**params_of(MODEL), "embedding": embedding}, batch, None)[0]

    padding = batch.tree.copies == 0
    assert padding.any()
    spoilt = batch.replace(tree=batch.tree.replace(tokens=np.where(padding, 23, batch.tree.tokens)))
    run = jax.jit(jax.value_and_grad(total))
    embedding = params_of(MODEL)["embedding"]
    jax.tree.map(np.testing.assert_array_equal, run(embedding, batch), run(embedding, spoilt))


def test_pack_does_what_the_configuration_says() -> None:
    for name in ("rows", "shared_prompt", "tree"):
        config = Config(
            engine=EngineConfig(max_response_tokens=4), train=TrainConfig(rows=2, row_tokens=8, packing=name)
        )
        ((batch, *_),) = pack(config, groups([1.0, 0.0], [1.0, 0.0]), {})
        assert (batch.tree is None) == (name == "rows")
        assert batch.tokens.shape == (2, 32 if name == "tree" else 8)


@pytest.mark.slow
def test_a_tree_may_be_split_over_a_mesh() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.train.trees_on_mesh"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    wanted = "mesh: parameters True, metrics True\none device: parameters True, metrics True\n"
    assert done.stdout == wanted, done.stdout + done.stderr
