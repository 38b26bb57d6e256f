"""Meshes and rule tables; and that training gives the same loss and gradients on every mesh as on one device."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrl.config import ConfigError, MeshConfig, ModelConfig
from jaxrl.mesh import (
    AXES,
    COMPUTE_RULES,
    PARAM_RULES,
    ROLLOUT_RULES,
    Rules,
    by_slice,
    make_mesh,
    make_rollout_mesh,
    partition_spec,
    per_shard,
    pieces,
    split_devices,
    to_compute,
)
from jaxrl.model.spec import shardings
from jaxrl.model.transformer import param_specs


def abstract_mesh(**lengths: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh(tuple(lengths.get(axis, 1) for axis in AXES), AXES)


EIGHT = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))


def test_specs_follow_the_rules() -> None:
    assert partition_spec(("layers", "embed", "ffn"), PARAM_RULES, EIGHT) == PartitionSpec(None, "fsdp", "tensor")
    assert partition_spec(("batch", None), COMPUTE_RULES, EIGHT) == PartitionSpec(("data", "fsdp"), None)


def test_mesh_axes_of_length_one_are_left_out() -> None:
    mesh = jax.sharding.AbstractMesh((8, 1, 1), ("data", "fsdp", "tensor"))
    assert partition_spec(("batch", "embed"), COMPUTE_RULES, mesh) == PartitionSpec("data", None)


def test_one_mesh_axis_never_splits_two_axes() -> None:
    with pytest.raises(ValueError, match="'tensor' would split both 'vocab' and 'ffn'"):
        partition_spec(("vocab", "ffn"), PARAM_RULES, EIGHT)
    with pytest.raises(ValueError, match="'width' is not in the rule table"):
        partition_spec(("width",), PARAM_RULES, EIGHT)


def test_one_open_axis_takes_the_devices_that_remain() -> None:
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=-1, fsdp=-1), "both -1"),
        (
            MeshConfig(data=3, fsdp=1),
            "asks for 1 x 3 x 1 x 1 x 1 x 1 devices .* but 1 are there; let the lengths multiply",
        ),
        (MeshConfig(data=2), "asks for 1 x 2 x -1 x 1 x 1 x 1"),
        (MeshConfig(data=0), "at least 1"),
    ],
)
def test_impossible_meshes_are_refused(config: MeshConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mesh(config, devices=jax.devices()[:1])


def test_lengths_are_given_by_name() -> None:
    """Or else a new axis would silently take the length meant for another."""
    with pytest.raises(TypeError, match="positional"):
        MeshConfig(2, 2, 2)


def test_without_a_mesh_nothing_happens() -> None:
    x = jnp.arange(4.0)
    assert to_compute(x, ("batch",)) is x

    def double(x: jax.Array) -> jax.Array:
        return 2 * x

    assert per_shard(double, [("batch",)], ("batch",)) is double


@dataclasses.dataclass(frozen=True)
class Device:
    """What ``by_slice`` reads of a device; several slices or processes cannot be had here."""

    id: int
    platform: str = "tpu"
    slice_index: int = 0
    process_index: int = 0


def test_a_tpu_slice_is_a_group() -> None:
    devices = [Device(index, slice_index=index % 2) for index in range(8)]
    assert [[device.id for device in group] for group in by_slice(devices, 2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(ConfigError, match=r"MeshConfig.slice=1 but the devices belong to 2 slices; set .*slice=2"):
        by_slice(devices, 1)
    with pytest.raises(ConfigError, match=r"the slices have different numbers of devices: \{0: 4, 1: 3\}"):
        by_slice(devices[:7], 2)


def test_elsewhere_whole_processes_are_a_group() -> None:
    devices = [Device(index, platform="gpu", process_index=index // 2) for index in range(8)]
    assert [[device.id for device in group] for group in by_slice(devices, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(by_slice(devices, 1)) == 1
    with pytest.raises(ConfigError, match="MeshConfig.slice=3 but the devices belong to 4 processes"):
        by_slice(devices, 3)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_processes_with_unequal_numbers_of_devices_are_refused(platform: str) -> None:
    """What is gathered between them is cut by how many one has, so that some would wait for others for ever."""
    devices = [Device(index, platform=platform, process_index=index // 4) for index in range(6)]
    training, _ = split_devices(MeshConfig(rollout_devices=2), devices)
    with pytest.raises(ConfigError, match=r"processes have different numbers of devices that train: \{0: 3, 1: 1\}"):
        by_slice(training, 1)


def test_a_mesh_that_does_not_divide_says_what_would() -> None:
    specs = param_specs(ModelConfig(vocab_size=48, kv_heads=2, query_heads=8, width=36, ffn_width=64))
    mesh = abstract_mesh(tensor=4)
    with pytest.raises(ConfigError, match=r"k_proj.weight: axis 'kv_heads' of length 2 .*= 4 devices; choose .* 1, 2"):
        shardings(specs, mesh, ROLLOUT_RULES)
    mesh = abstract_mesh(fsdp=8)
    with pytest.raises(ConfigError, match=r"'embed' of length 36 cannot be split over fsdp = 8 .* 1, 2, 3, 4, 6, 9,"):
        shardings(specs, mesh, PARAM_RULES)


@pytest.mark.parametrize(
    ("rules", "lengths", "message"),
    [
        (PARAM_RULES, {"expert": 4}, "over expert = 4 devices; choose one of 1, 2, 3, 6"),
        (PARAM_RULES, {"expert": 2, "tensor": 2}, "over expert x tensor = 4 devices; choose one of 1, 2, 3, 6"),
        (ROLLOUT_RULES, {"tensor": 4}, "over tensor = 4 devices; choose one of 1, 2, 3, 6"),
    ],
)
def test_a_mesh_that_does_not_divide_the_experts_says_what_would(
    rules: Rules, lengths: dict[str, int], message: str
) -> None:
    specs = param_specs(ModelConfig(family="qwen3_moe", vocab_size=48, width=96, kv_heads=4, experts=6))
    shardings(specs, abstract_mesh(expert=3, tensor=2), PARAM_RULES)
    with pytest.raises(ConfigError, match=f"experts.*: axis 'experts' of length 6 cannot be split {message}"):
        shardings(specs, abstract_mesh(**lengths), rules)


def test_replicas_never_cross_slices_and_must_divide_one() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1] * 12).reshape(2, 1, 3, 1, 1, 2), AXES)
    assert dict(make_rollout_mesh(mesh).shape) == {"replica": 6, "tensor": 2}
    assert dict(make_rollout_mesh(mesh, 3).shape) == {"replica": 4, "tensor": 3}
    with pytest.raises(ConfigError, match=r"rollout_tensor=4 does not divide the 6 devices of a slice; .* 1, 2, 3, 6"):
        make_rollout_mesh(mesh, 4)


def test_a_replica_of_more_devices_than_kv_heads_holds_each_several_times() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1] * 16).reshape(1, 1, 16, 1, 1, 1), AXES)
    wide = make_rollout_mesh(mesh, 8, kv_heads=2)
    assert dict(wide.shape) == {"replica": 2, "tensor": 2, "query": 4}
    assert pieces("kv_heads", ROLLOUT_RULES, wide) == 2
    assert {pieces(axis, ROLLOUT_RULES, wide) for axis in ("query_heads", "ffn", "vocab", "experts")} == {8}
    for kv_heads in (0, 3, 8, 16):  # 3: refused where the heads are split
        assert dict(make_rollout_mesh(mesh, 8, kv_heads=kv_heads).shape) == {"replica": 2, "tensor": 8}


def test_a_replica_has_devices_of_one_process_in_whatever_order_the_mesh_has_them() -> None:
    """A plane of a TPU slice: four processes hold two by two devices each, and the mesh goes along its lines."""
    lines = [Device(4 * y + x, process_index=10 + y // 2 * 2 + x // 2) for y in range(4) for x in range(4)]
    mesh = jax.sharding.Mesh(np.array(lines).reshape(1, 1, 16, 1, 1, 1), AXES)
    replicas = make_rollout_mesh(mesh, 4).devices.tolist()
    assert [[device.id for device in one] for one in replicas[:2]] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    with pytest.raises(ConfigError, match=r"needs 8 devices of one process.*divisor of the 4 devices of a process"):
        make_rollout_mesh(mesh, 8)


def test_the_last_devices_roll_out_and_the_others_train() -> None:
    devices = [Device(index, platform="cpu") for index in range(8)]
    training, playing = split_devices(MeshConfig(rollout_devices=3), devices)
    assert [device.id for device in training] == [0, 1, 2, 3, 4] and [device.id for device in playing] == [5, 6, 7]
    assert split_devices(MeshConfig(), devices) == (devices, devices)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1] * 6).reshape(1, 1, 3, 1, 1, 2), AXES)
    assert dict(make_rollout_mesh(mesh, 0, devices[-4:]).shape) == {"replica": 2, "tensor": 2}
    with pytest.raises(ConfigError, match=r"rollout_tensor=2 does not divide the 3 devices"):
        make_rollout_mesh(mesh, 0, playing)
    with pytest.raises(ConfigError, match=r"rollout_devices=8 leaves none of the 8 devices to train; lower it"):
        split_devices(MeshConfig(rollout_devices=8), devices)


def test_every_process_gives_as_many_devices_to_roll_out() -> None:
    crossing = [Device(index, process_index=index // 2 % 2) for index in range(8)]
    training, playing = split_devices(MeshConfig(rollout_devices=4), crossing)
    assert [device.id for device in training] == [0, 1, 2, 3] and [device.id for device in playing] == [4, 5, 6, 7]
    training, playing = split_devices(MeshConfig(rollout_devices=2), crossing)
    assert [device.id for device in training] == [0, 1, 2, 3, 4, 6] and [device.id for device in playing] == [5, 7]
    with pytest.raises(ConfigError, match=r"rollout_devices=3 cannot be .* equal parts from 2 processes; make it 4"):
        split_devices(MeshConfig(rollout_devices=3), crossing)
    with pytest.raises(ConfigError, match=r"rollout_devices=8 leaves none of the 4 devices of a process to train"):
        split_devices(MeshConfig(rollout_devices=8), crossing)


def compared(which: str) -> list[dict]:
    """What mesh_process.py reports, in a process that has eight devices."""
    script = pathlib.Path(__file__).with_name("mesh_process.py")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script), which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("which", "meshes"),
    [
        ("few", ["1x2x2x1x1x2", "2x1x2x1x2x1"]),
        ("experts", ["1x1x2x2x1x2", "2x1x1x4x1x1"]),
        pytest.param("more", ["1x8x1x1x1x1", "1x1x8x1x1x1", "1x4x1x1x1x2", "1x1x2x1x2x2"], marks=pytest.mark.slow),
        pytest.param("more experts", ["1x1x1x8x1x1", "1x1x1x2x2x2", "1x1x4x1x1x2"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_training_is_the_same_on_every_mesh(which: str, meshes: list[str]) -> None:
    """Loss, gradients, update; and gradients, parameters and moments rest split as the rules say."""
    reports = compared(which)
    assert [report["mesh"] for report in reports] == meshes
    for report in reports:
        assert report["loss_error"] < 1e-5, report
        assert report["gradient_error"] < 1e-5, report
        assert report["update_error"] < 1e-3, report
        matrices = 0 if report["mesh"] == "1x8x1x1x1x1" else report["matrices"]
        assert report["split"] == {"gradients": matrices, "params": matrices, "moments": 2 * matrices}, report


@pytest.mark.parametrize(
    ("which", "replicas"),
    [
        ("replicas", [2]),
        ("split experts", [2, 1]),  # the one on twice as many devices as there are KV heads
        ("replicas apart", [2]),
        pytest.param("split replicas", [2, 1, 1], marks=pytest.mark.slow),
    ],
)
def test_promise_2_sampling_is_the_same_on_every_mesh(which: str, replicas: list[int]) -> None:
    """Bit for bit where a replica has one device as the engine it is compared with; else to rounding."""
    for report, count in zip(compared(which), replicas, strict=True):
        assert report["different"] == 0 and report["logprob_error"] < 1e-5, report
        if not which.startswith("split"):
            assert report["bits_differ"] == 0, report
        assert report["replicas_agree"], "which replica plays a sequence changes no bit"
        assert len(report["opened"]) == count and set(report["opened"]) == {36 // count}, "groups are spread evenly"
        assert report["total_opened"] == 36, "counters add up"
        prompts, tools = sum(draw + 2 for draw in range(6)), 18 * 2
        assert report["prefill_tokens"] == 2 * (prompts + tools), "a group's prompt is prefilled once, on one replica"
        assert report["same_after_sync"] and report["versions"] == [1], report
        assert report["through_the_host"] == [], "weights go from device to device"
        assert report["grown_bytes"] == 0, "one copy of the weights, before and after"
        assert report["weights_finite"], "the trainer keeps its own"
        assert report["compiled"] == 0, "promise 11: weights and episodes compile nothing once both were there"
