"""Training adapters: what is trained and what stays, the reference, memory, hand-over to the engine, learning."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import mesh as meshes
from jaxrl.config import AlgorithmConfig, LoraConfig, MeshConfig, ModelConfig, OptimizerConfig
from jaxrl.model import lora, transformer
from jaxrl.model.spec import count
from jaxrl.records import Batch
from jaxrl.train.state import TrainState, abstract_state, copied, initial_params, new_state, rl_optimizer
from jaxrl.train.sync import rollout_base, rollout_params, with_adapters
from jaxrl.train.update import Updater, cross_entropy_loss, policy_gradient_loss

MODEL = ModelConfig(
    vocab_size=64, layers=2, width=32, query_heads=2, kv_heads=1, head_width=16, ffn_width=64, init_scale=0.2
)
LORA = LoraConfig(rank=2, alpha=4.0)
SPECS = transformer.param_specs(MODEL)
ADAPTERS = lora.adapter_specs(SPECS, LORA)
OPTIMIZER = rl_optimizer(OptimizerConfig(learning_rate=2e-2, warmup_steps=0, weight_decay=0.0), ADAPTERS)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return meshes.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def base(mesh: jax.sharding.Mesh) -> lora.Base:
    return lora.Base(initial_params(SPECS, mesh, 0), lora.scale_of(LORA))


def new_adapters(mesh: jax.sharding.Mesh) -> TrainState:
    return new_state(initial_params(ADAPTERS, mesh, 1), OPTIMIZER, mesh)


def batch_of(tokens: np.ndarray, advantage: float = 1.0) -> Batch:
    mask = np.ones(tokens.shape, np.float32)
    mask[:, 0] = 0
    return Batch.zeros(*mask.shape).replace(
        tokens=tokens.astype(np.int32),
        positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        segment_ids=np.ones(tokens.shape, np.int32),
        mask=mask,
        rl_weights=mask / mask.sum(),
        kl_weights=mask / mask.sum(),
        ce_weights=mask / mask.sum(),
        advantages=advantage * mask,
        behaviour_logprobs=-3.0 * mask,
        proximal_logprobs=-3.0 * mask,
    )


BATCH = batch_of(np.random.default_rng(0).integers(0, MODEL.vocab_size, (4, 16)))


def size_of(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_only_adapters_are_trained_and_they_learn(mesh: jax.sharding.Mesh, base: lora.Base) -> None:
    before = jax.device_get(base.params)
    updater = Updater(cross_entropy_loss(MODEL), OPTIMIZER, mesh, base=base)
    state, losses = new_adapters(mesh), []
    for _ in range(60):
        state, metrics = updater.step(state, [BATCH])
        losses.append(metrics["nll"])
    assert losses[-1] < 0.5 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(base.params))
    assert all(np.any(pair[lora.B]) for pair in state.params.values())


def test_gradients_and_optimizer_state_are_those_of_the_adapters(mesh: jax.sharding.Mesh, base: lora.Base) -> None:
    """Beside the one copy of the frozen weights an update needs a few times the adapters, far less than a gradient."""
    state = new_adapters(mesh)
    assert size_of(state) == pytest.approx(3 * 4 * count(ADAPTERS), abs=64)
    updater = Updater(cross_entropy_loss(MODEL), OPTIMIZER, mesh, base=base)
    gradients, _ = updater._accumulate(state, [BATCH, BATCH], None)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(lambda leaf: leaf.shape, ADAPTERS)
    target = abstract_state(ADAPTERS, OPTIMIZER, mesh)
    assert jax.tree.map(lambda leaf: leaf.shape, target) == jax.tree.map(lambda leaf: leaf.shape, state)
    assert 3 * count(ADAPTERS) < 0.3 * count(SPECS)


def test_the_reference_is_the_base_with_adapters_off_and_no_second_copy(
    mesh: jax.sharding.Mesh, base: lora.Base
) -> None:
    algorithm = AlgorithmConfig(kl_coefficient=1.0, kl_estimator="k2")
    idle = BATCH.replace(advantages=0 * BATCH.advantages)
    state = new_adapters(mesh)
    reference = copied(state.params)  # as a run keeps it when reinforcement begins
    assert size_of(reference) < 0.1 * size_of(base.params)
    state = state.replace(params=jax.tree.map(lambda leaf: leaf + 0.05, state.params))
    updater = Updater(policy_gradient_loss(MODEL, algorithm, 1.0), OPTIMIZER, mesh, base=base)
    whole = Updater(policy_gradient_loss(MODEL, algorithm, 1.0), rl_optimizer(OptimizerConfig(), SPECS), mesh)
    merged = new_state(copied(base.merged(state.params)), rl_optimizer(OptimizerConfig(), SPECS), mesh)
    _, wanted = whole.step(merged, [idle], base.params)
    divergences = []
    for _ in range(20):
        state, metrics = updater.step(state, [idle], reference)
        divergences.append(metrics["kl_to_reference"])
    assert divergences[0] == pytest.approx(wanted["kl_to_reference"], rel=1e-3)
    assert divergences[0] > 1e-3
    assert divergences[-1] < 0.3 * divergences[0]


def test_the_gradient_is_that_of_the_merged_weights(mesh: jax.sharding.Mesh, base: lora.Base) -> None:
    """By the chain rule: dB = scale * A^T dW and dA = scale * dW B^T, with dW of the merged weights."""
    adapters = jax.tree.map(lambda leaf: leaf + 0.03, initial_params(ADAPTERS, mesh, 1))
    loss = policy_gradient_loss(MODEL, AlgorithmConfig(), 1.0)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(lambda tree: loss(base.adapted(tree), BATCH, None)[0]))(adapters)
        whole = jax.jit(jax.grad(lambda tree: loss(tree, BATCH, None)[0]))(base.merged(adapters))["layers"]
    got, whole, adapters = jax.device_get((got, whole, adapters))
    for name, pair in adapters.items():
        layers, rank = pair[lora.A].shape[0], LORA.rank
        first, second = pair[lora.A].reshape(layers, -1, rank), pair[lora.B].reshape(layers, rank, -1)
        weight = whole[name].reshape(layers, first.shape[1], -1)
        wanted = {
            lora.A: base.scale * jnp.einsum("lio,lro->lir", weight, second),
            lora.B: base.scale * jnp.einsum("lio,lir->lro", weight, first),
        }
        for part, value in wanted.items():
            np.testing.assert_allclose(got[name][part].reshape(value.shape), value, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_gets_the_frozen_weights_once(mesh: jax.sharding.Mesh, base: lora.Base, dtype: str) -> None:
    model = dataclasses.replace(MODEL, compute_dtype=dtype)
    replicas = meshes.make_rollout_mesh(mesh)
    (shared,) = rollout_base(base, model, replicas)
    adapters = initial_params(ADAPTERS, mesh, 1)
    (first,) = with_adapters((shared,), adapters, ADAPTERS, model, replicas)
    (second,) = with_adapters((shared,), jax.tree.map(lambda leaf: leaf + 1, adapters), ADAPTERS, model, replicas)
    pointers = [
        [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]
        for tree in (shared.params, *[{**tree, "layers": without(tree["layers"])} for tree in (first, second)])
    ]
    assert pointers[0] == pointers[1] == pointers[2]
    own, engines = (tree["layers"]["gate"].unsafe_buffer_pointer() for tree in (base.params, shared.params))
    assert (own == engines) == (dtype == "float32")  # nothing to cast: the trainer's own
    handed = first["layers"][lora.ADAPTERS]
    assert not {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(adapters)} & {
        leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(handed)
    }  # the next update consumes the trainer's adapters
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(handed)} == {dtype}
    np.testing.assert_array_equal(handed["up"][lora.A], adapters["up"][lora.A].astype(dtype))
    assert jax.tree.structure(without(first["layers"])) == jax.tree.structure(
        rollout_params(base.params, model, replicas)[0]["layers"]
    )


def without(layers: dict) -> dict:
    return {name: leaf for name, leaf in layers.items() if name != lora.ADAPTERS}


def test_other_adapters_than_the_tables_are_not_handed_over(mesh: jax.sharding.Mesh, base: lora.Base) -> None:
    adapters, replicas = initial_params(ADAPTERS, mesh, 1), meshes.make_rollout_mesh(mesh)
    shared = rollout_base(base, MODEL, replicas)
    with pytest.raises(ValueError, match="the trees differ"):
        with_adapters(shared, {"query": adapters["query"]}, ADAPTERS, MODEL, replicas)
    wide = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf], axis=-1), adapters)
    with pytest.raises(ValueError, match="has shape"):
        with_adapters(shared, wide, ADAPTERS, MODEL, replicas)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "split", "adapters"),
    [("none", 7, 14), ("int8", 14, 14), ("nf4", 14, 14), ("none experts", 9, 18), ("nf4 experts", 16, 18)],
)
def test_adapters_on_eight_devices_are_updated_and_handed_over_as_on_one(
    arguments: str, split: int, adapters: int
) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, str(pathlib.Path(__file__).with_name("adapters_on_mesh.py")), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "adapters near: True, merged near: True, handed over near: True" in done.stdout, done.stdout + done.stderr
    assert f"split weights: {split}, split adapters: {adapters}" in done.stdout, done.stdout
