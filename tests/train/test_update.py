"""The optimizer step on a tiny decoder: independence of the micro-batch cut, compilation, gradient of masked tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl import mesh as meshes
from jaxrl.config import AlgorithmConfig, ConfigError, MeshConfig, ModelConfig, OptimizerConfig
from jaxrl.model import logprob, moe, spec, transformer
from jaxrl.records import Batch
from jaxrl.train import state as states
from jaxrl.train.state import abstract_state, check_offload, initial_params, new_state, rl_optimizer
from jaxrl.train.update import (
    LayoutError,
    Updater,
    check_layout,
    cross_entropy_loss,
    over_updates,
    policy_gradient_loss,
)

MODEL = ModelConfig(
    vocab_size=24, layers=1, width=16, query_heads=2, kv_heads=1, head_width=8, ffn_width=32, init_scale=0.3
)
SPECS = transformer.param_specs(MODEL)
OPTIMIZER = rl_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), SPECS)
PLAIN = AlgorithmConfig()


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return meshes.make_mesh(MeshConfig(), jax.devices()[:1])


def random_batch(seed: int, rows: int, tokens: int = 12, experts: jax.ShapeDtypeStruct | None = None) -> Batch:
    draw = np.random.default_rng(seed)
    shape = (rows, tokens)
    mask = (draw.random(shape) < 0.6).astype(np.float32)
    mask[:, 0] = 0
    behaviour = (np.log(1 / MODEL.vocab_size) + 0.3 * draw.normal(size=shape)).astype(np.float32) * mask
    return Batch.zeros(*mask.shape, experts).replace(
        tokens=draw.integers(0, MODEL.vocab_size, shape).astype(np.int32),
        positions=np.broadcast_to(np.arange(tokens, dtype=np.int32), shape),
        segment_ids=np.ones(shape, np.int32),
        mask=mask,
        rl_weights=mask / 40,
        ce_weights=mask / 40,
        advantages=draw.normal(size=shape).astype(np.float32) * mask,
        behaviour_logprobs=behaviour,
        proximal_logprobs=behaviour,
    )


def cut(batch: Batch, rows: int) -> list[Batch]:
    return [
        jax.tree.map(lambda field, start=start: field[start : start + rows], batch)
        for start in range(0, batch.tokens.shape[0], rows)
    ]


def updated(
    batches: list[Batch], mesh: jax.sharding.Mesh, algorithm: AlgorithmConfig = PLAIN
) -> tuple[dict, dict[str, float]]:
    state = new_state(initial_params(SPECS, mesh, 0), OPTIMIZER, mesh)
    updater = Updater(policy_gradient_loss(MODEL, algorithm, 1.0), OPTIMIZER, mesh)
    state, metrics = updater.step(state, batches)
    return jax.device_get(state.params), metrics


@pytest.mark.parametrize(
    "algorithm",
    [
        PLAIN,
        AlgorithmConfig(
            loss="luspo",
            proximal="recomputed",
            mismatch="tis",
            rejection="band",
            rejection_settings={"low": 0.7, "high": 1.3},
            entropy_coefficient=0.1,
        ),
    ],
)
def test_promise_3_an_update_does_not_depend_on_the_micro_batch_cut(
    mesh: jax.sharding.Mesh, algorithm: AlgorithmConfig
) -> None:
    batch = random_batch(1, 4)
    shifted = batch.behaviour_logprobs + 0.4 * batch.advantages * batch.mask
    batch = batch.replace(proximal_logprobs=shifted, entropy_weights=0.1 * batch.rl_weights)
    (whole, metrics), (parts, other) = updated([batch], mesh, algorithm), updated(cut(batch, 1), mesh, algorithm)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole, parts)
    assert ("mismatch_kept" in metrics) == (algorithm.loss == "luspo")
    assert metrics.get("mismatch_kept", 0.5) not in (0, 1)
    for name in metrics.keys() - {"mismatch_p1", "mismatch_p50", "mismatch_p99"}:  # which are means over micro-batches
        assert metrics[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_an_update_moves_the_policy_towards_what_had_an_advantage(mesh: jax.sharding.Mesh) -> None:
    batch = random_batch(2, 4)
    batch = batch.replace(advantages=batch.mask * np.where(np.arange(4) < 2, 1.0, -1.0)[:, None].astype(np.float32))
    before = jax.device_get(initial_params(SPECS, mesh, 0))
    on_policy = np.asarray(score(before, batch))
    after, _ = updated(
        [batch.replace(behaviour_logprobs=on_policy * batch.mask, proximal_logprobs=on_policy * batch.mask)], mesh
    )
    change = ((np.asarray(score(after, batch)) - on_policy) * batch.mask).sum(axis=1)
    assert (change[:2] > 0).all() and (change[2:] < 0).all()


@pytest.mark.parametrize("stage", ["demonstrations", "policy gradient"])
def test_experts_add_a_balance_term_and_show_their_load(stage: str) -> None:
    def loss_of(coefficient: float) -> tuple[float, dict, moe.Load]:
        model = dataclasses.replace(
            MODEL, family="qwen3_moe", experts=4, expert_width=8, balance_coefficient=coefficient
        )
        params = spec.initialize(transformer.param_specs(model), jax.random.key(0))
        loss = cross_entropy_loss(model)
        if stage == "policy gradient":
            loss = policy_gradient_loss(model, AlgorithmConfig(), 1.0)
        value, metrics = jax.jit(loss)(params, batch, None)
        stats = logprob.sequence_logprobs(params, model, batch.tokens, batch.positions, batch.segment_ids)
        return float(value), metrics, stats.load

    batch = random_batch(3, 2)
    (plain, metrics, load), (balanced, _, _) = loss_of(0.0), loss_of(0.5)
    wanted = 0.5 * float(moe.balance_loss(load)) * (batch.rl_weights + batch.ce_weights).sum()
    assert balanced - plain == pytest.approx(wanted, rel=1e-3) and wanted > 0.1
    assert float(metrics["balance_loss"][0]) == pytest.approx(float(moe.balance_loss(load)), rel=1e-5)
    assert float(metrics["expert_load_max"][0]) >= 1 and 0 <= float(metrics["idle_experts"][0]) < 1


def test_a_gradient_that_is_not_finite_changes_nothing(mesh: jax.sharding.Mesh) -> None:
    batch = random_batch(5, 2)
    after, metrics = updated([batch.replace(rl_weights=batch.rl_weights * np.float32(np.inf))], mesh)
    assert not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after, jax.device_get(initial_params(SPECS, mesh, 0)))


def test_offloaded_moments_rest_on_the_host_and_change_no_bit(mesh: jax.sharding.Mesh) -> None:
    states = []
    for offload in (False, True):
        state = new_state(initial_params(SPECS, mesh, 0), OPTIMIZER, mesh, offload=offload)
        updater = Updater(policy_gradient_loss(MODEL, AlgorithmConfig(), 1.0), OPTIMIZER, mesh, offload=offload)
        updater.compile(state, 4, 12)
        for seed in (1, 2):
            kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
            assert kinds == {"pinned_host" if offload else "device"}
            state, _ = updater.step(state, [random_batch(seed, 4)])
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
        states.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_old_moments_are_free_before_there_are_new_ones(
    mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = new_state(initial_params(SPECS, mesh, 0), OPTIMIZER, mesh)

    def made(*arguments: Any, **options: Any) -> states.TrainState:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.opt_state))
        return new_state(*arguments, **options)

    monkeypatch.setattr(states, "new_state", made)
    after = states.restarted(before, OPTIMIZER, mesh)
    assert after.params is before.params
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_offloading_is_refused_without_pinned_memory() -> None:
    class Device:
        def addressable_memories(self) -> list:
            return [dataclasses.make_dataclass("Memory", ["kind"])("device")]

    mesh = dataclasses.make_dataclass("Mesh", ["devices"])(np.array([Device()], dtype=object))
    with pytest.raises(ConfigError, match="needs pinned_host memory, but the devices reach device; set it to False"):
        check_offload(mesh)


def test_a_layout_that_changes_is_refused_by_name(mesh: jax.sharding.Mesh) -> None:
    two = jax.sharding.AbstractMesh((2,), ("fsdp",))
    resting = {"gate": jax.ShapeDtypeStruct((4, 6), "float32", sharding=NamedSharding(two, PartitionSpec("fsdp")))}
    check_layout("the gradient of", {"gate": NamedSharding(two, PartitionSpec("fsdp", None))}, resting)
    with pytest.raises(LayoutError, match=r"the gradient of \['gate'\] \(4, 6\) would rest as .*None, 'fsdp'"):
        check_layout("the gradient of", {"gate": NamedSharding(two, PartitionSpec(None, "fsdp"))}, resting)


def test_a_reset_keeps_the_parameters_and_nothing_else(mesh: jax.sharding.Mesh) -> None:
    updater = Updater(policy_gradient_loss(MODEL, AlgorithmConfig(), 1.0), OPTIMIZER, mesh)
    state, _ = updater.step(new_state(initial_params(SPECS, mesh, 0), OPTIMIZER, mesh), [random_batch(6, 2)])
    params = jax.device_get(state.params)
    state = updater.reset(state)
    jax.tree.map(np.testing.assert_array_equal, state, new_state(params, OPTIMIZER, mesh))


def test_metrics_of_several_updates_are_means_but_the_gap_is_the_first(mesh: jax.sharding.Mesh) -> None:
    updates = [{"loss": 1.0, "ratio": 1.0, "logprob_gap": 0.0}, {"loss": 2.0, "ratio": 1.5, "logprob_gap": 0.3}]
    assert over_updates(updates) == {"loss": 1.5, "ratio": 1.0, "logprob_gap": 0.0}
    assert over_updates([]) == {}


def score(params: dict, batch: Batch) -> jax.Array:
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    return logprob.sequence_logprobs(params, MODEL, batch.tokens, batch.positions, batch.segment_ids).logprobs


def test_the_kl_to_the_reference_pulls_back(mesh: jax.sharding.Mesh) -> None:
    batch = random_batch(3, 4)
    batch = batch.replace(advantages=0 * batch.advantages)
    algorithm = AlgorithmConfig(kl_coefficient=1.0, kl_estimator="k2")
    params = initial_params(SPECS, mesh, 0)
    reference = initial_params(SPECS, mesh, 1)
    updater = Updater(policy_gradient_loss(MODEL, algorithm, 1.0), OPTIMIZER, mesh)
    state = new_state(params, OPTIMIZER, mesh)
    divergences = []
    for _ in range(5):
        state, metrics = updater.step(state, [batch], reference)
        divergences.append(metrics["kl_to_reference"])
    assert divergences[-1] < divergences[0]


def test_the_loss_computes_with_the_experts_of_the_batch() -> None:
    model = dataclasses.replace(MODEL, family="qwen3_moe", experts=4, expert_width=8)
    params = spec.initialize(transformer.param_specs(model), jax.random.key(0))
    batch = random_batch(3, 2, experts=jax.ShapeDtypeStruct((1, 2), np.dtype(np.int8)))
    loss = jax.jit(policy_gradient_loss(model, AlgorithmConfig(), 1.0))
    chosen, _ = loss(params, batch, None)
    plain, _ = loss(params, batch.replace(experts=None), None)
    given, _ = loss(params, batch.replace(experts=batch.experts + np.array([1, 2], np.int8)), None)
    assert float(chosen) == pytest.approx(float(plain), rel=1e-5) and abs(float(given) / float(plain) - 1) > 1e-3


@pytest.mark.parametrize("recorded", [False, True])
def test_promise_11_compile_covers_every_number_of_micro_batches(mesh: jax.sharding.Mesh, recorded: bool) -> None:
    model, experts = MODEL, None
    if recorded:
        model = dataclasses.replace(MODEL, family="qwen3_moe", experts=4, expert_width=8)
        experts = jax.ShapeDtypeStruct((model.layers, model.experts_per_token), np.dtype(np.int8))
    specs = transformer.param_specs(model)
    optimizer = rl_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), specs)
    state = new_state(initial_params(specs, mesh, 0), optimizer, mesh)
    updater = Updater(policy_gradient_loss(model, AlgorithmConfig(), 1.0), optimizer, mesh, experts=experts)
    updater.compile(state, 2, 12)
    state, _ = updater.step(
        state, cut(random_batch(4, 2, experts=experts), 2)
    )  # the host's own conversions are warm after one step
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    try:
        for rows in (2, 4, 8):  # demonstrations have no experts
            state, _ = updater.step(state, cut(random_batch(rows, rows, experts=experts if rows > 2 else None), 2))
        assert compiled == []
        jax.jit(lambda x: x * 3.25 + 1)(jnp.ones(17))
        assert compiled  # the listener hears a compilation
    finally:
        jax.monitoring.clear_event_listeners()


def test_abstract_state_is_the_state(mesh: jax.sharding.Mesh) -> None:
    state = new_state(initial_params(SPECS, mesh, 0), OPTIMIZER, mesh)
    target = abstract_state(SPECS, OPTIMIZER, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(target)
    for have, want in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert (have.shape, have.dtype) == (want.shape, want.dtype)
        assert have.sharding.is_equivalent_to(want.sharding, have.ndim)


def test_traced_programs_are_those_that_are_compiled(mesh: jax.sharding.Mesh) -> None:
    """For shapes alone, and with no device work: what ``jaxrl check`` compiles."""
    loss = policy_gradient_loss(MODEL, AlgorithmConfig(kl_coefficient=0.1), 1.0)
    updater = Updater(loss, OPTIMIZER, mesh)
    abstract = abstract_state(SPECS, OPTIMIZER, mesh)
    traced = updater.traced(abstract, rows=2, row_tokens=12, reference=abstract.params)
    state = new_state(initial_params(SPECS, mesh, seed=0), OPTIMIZER, mesh)
    batch = jax.device_put(random_batch(0, rows=2), updater._place.rows)
    with jax.set_mesh(mesh):
        arguments = (state.params, updater._fixed, batch, state.params)
        total = updater._first(*arguments)
        real = {
            "first": updater._first.lower(*arguments),
            "more": updater._more.lower(total, *arguments),
            "apply": updater._apply.lower(state, total[0]),
        }
        assert traced.keys() == real.keys()
        for name, program in real.items():
            assert traced[name].lower().as_text() == program.as_text(), name
