"""Run by test_mesh.py with eight virtual devices: compares meshes with one device, prints a JSON line for each.

``mesh_process.py few|more`` and ``experts|"more experts"`` train, ``replicas|"split replicas"|"split experts"`` and
``"replicas apart"`` sample.
"""

import asyncio
import contextlib
import dataclasses
import gc
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from jaxrl.config import AlgorithmConfig, EngineConfig, MeshConfig, ModelConfig, OptimizerConfig
from jaxrl.mesh import AXES, PARAM_RULES, make_mesh, make_rollout_mesh, split_devices
from jaxrl.model.spec import initialize, shardings
from jaxrl.model.transformer import param_specs
from jaxrl.records import Batch
from jaxrl.rollout.engine import Engine
from jaxrl.rollout.fleet import Fleet
from jaxrl.train import transfer
from jaxrl.train.state import new_state, rl_optimizer
from jaxrl.train.sync import hand_over, rollout_params
from jaxrl.train.update import Updater, check_layout, policy_gradient_loss

MODEL = ModelConfig(
    vocab_size=48, layers=2, width=16, query_heads=8, kv_heads=4, head_width=8, ffn_width=32, init_scale=0.2,
    logprob_chunk=16, remat="full", tie_embeddings=False, sliding_window=5, sliding_layers=(1,),
)  # fmt: skip
ENGINE = EngineConfig(
    slots=9, page_size=4, round_steps=4, prefill_rows=2, prefill_chunk=8, max_prompt_tokens=16, max_response_tokens=24
)
EXPERTS = dataclasses.replace(
    MODEL, family="qwen3_moe", experts=8, expert_width=12, expert_chunk=40, sliding_window=0, sliding_layers=()
)
# Adam divides a gradient by its own size: with a tiny eps the rounding of a gradient near 0 would become its sign.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-2)
ROWS, TOKENS = 8, 24
MESHES = {
    "few": (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(slice=2, fsdp=2, context=2)),
    "more": (
        MeshConfig(data=8, fsdp=1),
        MeshConfig(fsdp=8),
        MeshConfig(data=4, fsdp=1, tensor=2),
        MeshConfig(fsdp=2, context=2, tensor=2),
    ),
    "experts": (MeshConfig(fsdp=2, expert=2, tensor=2), MeshConfig(slice=2, fsdp=1, expert=4)),
    "more experts": (
        MeshConfig(fsdp=1, expert=8),
        MeshConfig(fsdp=1, expert=2, context=2, tensor=2),
        MeshConfig(fsdp=4, tensor=2),
    ),
}
"""Meshes to train on, of all devices."""
RINGS = ("more", "more experts")
"""Where keys and values travel around the devices that split a row; elsewhere they are gathered."""
FLEETS = {
    "replicas": (MeshConfig(fsdp=2),),
    "split replicas": (
        MeshConfig(fsdp=2, tensor=2),
        MeshConfig(fsdp=1, context=4, rollout_tensor=4),
        MeshConfig(fsdp=4, rollout_tensor=4, rollout_devices=4),
    ),
    "split experts": (MeshConfig(fsdp=1, expert=2, tensor=2), MeshConfig(fsdp=4, tensor=2, rollout_tensor=8)),
    "replicas apart": (MeshConfig(fsdp=2, tensor=2, rollout_tensor=1, rollout_devices=2),),
}
"""Meshes to sample on; each has so many devices as it names, and those that only sample."""


def batch() -> Batch:
    draw = np.random.default_rng(1)
    mask = (draw.random((ROWS, TOKENS)) < 0.6).astype(np.float32)
    segment_ids = np.repeat([[1] * 9 + [2] * 11 + [0] * 4], ROWS, axis=0).astype(np.int32)
    mask *= (segment_ids > 0) & (np.diff(segment_ids, axis=1, prepend=0) == 0)
    tokens = draw.integers(0, MODEL.vocab_size, mask.shape).astype(np.int32)
    advantages = draw.normal(size=mask.shape).astype(np.float32) * mask
    behaviour = (-4 + 0.3 * draw.normal(size=mask.shape)).astype(np.float32) * mask
    return Batch.zeros(*mask.shape).replace(
        tokens=tokens,
        positions=np.repeat([[*range(9), *range(11), *range(4)]], ROWS, axis=0).astype(np.int32),
        segment_ids=segment_ids,
        mask=mask,
        rl_weights=mask / 40,
        advantages=advantages,
        behaviour_logprobs=behaviour,
        proximal_logprobs=behaviour,
    )


def trained(model: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[float, Any, dict[str, int], Any]:
    """Loss, gradients, how many arrays are split, and the parameters after the update."""
    specs = param_specs(model)
    optimizer = rl_optimizer(OPTIMIZER, specs)
    placed = jax.device_put(initialize(specs, jax.random.key(0)), shardings(specs, mesh, PARAM_RULES))
    state = new_state(placed, optimizer, mesh)
    updater = Updater(policy_gradient_loss(model, AlgorithmConfig(), 0.7), optimizer, mesh)
    with jax.set_mesh(mesh):
        gradients, metrics = updater._accumulate(state, [batch()], None)
        after, _ = updater._apply(state, gradients)
    check_layout("the gradient of", jax.tree.map(lambda leaf: leaf.sharding, gradients), placed)
    moments = [tree for tree in jax.tree.leaves(after.opt_state, is_leaf=_is_adam) if _is_adam(tree)]
    for tree in (after.params, moments[0].mu, moments[0].nu):
        check_layout("after the update,", jax.tree.map(lambda leaf: leaf.sharding, tree), placed)
    trees = {"gradients": gradients, "params": after.params, "moments": [moments[0].mu, moments[0].nu]}
    split = {name: sum(_split(leaf) for leaf in jax.tree.leaves(tree)) for name, tree in trees.items()}
    return float(metrics["loss"][0]), jax.device_get(gradients), split, jax.device_get(after.params)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _split(leaf: jax.Array) -> bool:
    return leaf.ndim > 2 and not leaf.is_fully_replicated


@contextlib.contextmanager
def brought_to_the_host() -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the arrays that any thread reads as a whole meanwhile; jax's own transfer guard sees none on CPUs."""
    shapes, array_type = [], type(jax.numpy.zeros(()))
    value = array_type._value

    def read(array: jax.Array) -> np.ndarray:
        shapes.append(array.shape)
        return value.fget(array)

    array_type._value = property(read)
    try:
        yield shapes
    finally:
        array_type._value = value


def sampled(
    model: ModelConfig, config: MeshConfig, devices: int
) -> tuple[dict[tuple[int, int], tuple], dict[str, float]]:
    """Tokens and log-probabilities of a few sequences, each played with version 0 and again with version 1."""
    training, playing = split_devices(config, jax.devices()[:devices])
    mesh = make_mesh(config, training)
    apart = playing if config.rollout_devices else None
    rollout_mesh = make_rollout_mesh(mesh, config.rollout_tensor, apart, model.kv_heads)
    specs = param_specs(model)
    params = jax.device_put(initialize(specs, jax.random.key(0)), shardings(specs, mesh, PARAM_RULES))
    fleet = Fleet(ENGINE, model, rollout_params(params, model, rollout_mesh), rollout_mesh, stop_ids=(3,), seed=5)
    fleet.compile()

    async def play(draw: int, sample: int, on: Fleet | Engine = fleet) -> tuple[list[int], np.ndarray, set[int]]:
        prompt = np.random.default_rng(draw).integers(4, 48, 3 + draw)
        sequence = await on.open(prompt, draw=draw, sample=sample, max_tokens=24)
        first = await sequence.generate(8)
        sequence.append([7, 9])
        second = await sequence.generate(12)
        sequence.close()
        ids, logprobs = [[getattr(part, name) for part in (first, second)] for name in ("ids", "logprobs")]
        return np.concatenate(ids).tolist(), np.concatenate(logprobs), {*first.versions, *second.versions}

    async def play_all() -> dict[tuple[int, int], tuple]:
        names = [(draw, sample) for draw in range(6) for sample in range(3)]
        async with fleet.serving():
            return dict(zip(names, await asyncio.gather(*(play(*name) for name in names)), strict=True))

    async def play_once_on_each() -> list[tuple]:
        async with fleet.serving():
            return [await play(5, 2, engine) for engine in fleet._engines]

    compiled = []
    before = asyncio.run(play_all())
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    held = device_bytes()
    with brought_to_the_host() as shapes:
        asyncio.run(hand_over(params, model, fleet, 1))
    report = {"grown_bytes": device_bytes() - held, "through_the_host": shapes}
    after = asyncio.run(play_all())
    jax.monitoring.clear_event_listeners()
    report |= {
        "compiled": len(compiled),
        "same_after_sync": all(before[name][0] == after[name][0] for name in before),
        "versions": sorted(int(version) for version in set.union(*(after[name][2] for name in after))),
        "opened": [engine.counters.opened for engine in fleet._engines],
        "total_opened": fleet.stats()["opened"],
        "prefill_tokens": fleet.stats()["prefill_tokens"],
        "weights_finite": all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(jax.device_get(params))),
    }
    on_each = asyncio.run(play_once_on_each())
    same = [ids == on_each[0][0] and np.array_equal(logprobs, on_each[0][1]) for ids, logprobs, _ in on_each]
    return before, report | {"replicas_agree": all(same)}


def device_bytes() -> int:
    """Memory of all arrays that live, each buffer counted once."""
    gc.collect()
    shards = [shard for array in jax.live_arrays() for shard in array.addressable_shards]
    return sum({(s.device, s.data.unsafe_buffer_pointer()): s.data.nbytes for s in shards}.values())


def _model(which: str) -> ModelConfig:
    return EXPERTS if "experts" in which else MODEL


def largest(errors: Any) -> float:
    return max(float(error) for error in jax.tree.leaves(errors))


def compare_training(which: str) -> None:
    model = _model(which)
    loss, gradients, _, params = trained(model, make_mesh(MeshConfig(), jax.devices()[:1]))
    start = initialize(param_specs(model), jax.random.key(0))
    moved = largest(jax.tree.map(lambda a, b: np.abs(a - b).max(), params, start))
    for config in MESHES[which]:
        mesh, around = make_mesh(config), dataclasses.replace(model, context_attention="ring")
        got_loss, got, split, got_params = trained(around if which in RINGS else model, mesh)
        report = {
            "mesh": "x".join(str(mesh.shape[axis]) for axis in AXES),
            "loss_error": abs(got_loss - loss) / abs(loss),
            "gradient_error": largest(jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), got, gradients)),
            "update_error": largest(jax.tree.map(lambda a, b: np.abs(a - b).max() / moved, got_params, params)),
            "split": split,
            "matrices": sum(leaf.ndim > 2 for leaf in jax.tree.leaves(start)),
        }
        print(json.dumps(report), flush=True)


def compare_sampling(which: str) -> None:
    model = _model(which)
    transfer.CHUNK_BYTES = 320  # weights change their layout one layer at a time, embeddings 5 of their 48 rows
    plain, _ = sampled(model, MeshConfig(), 1)
    for config in FLEETS[which]:
        lengths = [getattr(config, axis) for axis in AXES]
        got, report = sampled(model, config, math.prod(lengths) + config.rollout_devices)
        report |= {
            "mesh": "x".join(map(str, lengths)),
            "different": sum(got[name][0] != plain[name][0] for name in plain),
            "bits_differ": sum(not np.array_equal(got[name][1], plain[name][1]) for name in plain),
            "logprob_error": max(
                float(np.abs(got[name][1] - plain[name][1]).max()) for name in plain if got[name][0] == plain[name][0]
            ),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    (compare_training if sys.argv[1] in MESHES else compare_sampling)(sys.argv[1])
