"""Meshes and rule tables; and that training gives the same loss and gradients on every mesh as on one device."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxrl.config import ConfigError, MeshConfig
from jaxrl.mesh import COMPUTE_RULES, PARAM_RULES, make_mesh, partition_spec, per_shard, to_compute

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
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=-1, fsdp=-1), "both -1"),
        (MeshConfig(data=3, fsdp=1), "asks for 3 x 1 x 1"),
        (MeshConfig(data=2), "asks for 2 x -1 x 1"),
        (MeshConfig(data=0), "at least 1"),
    ],
)
def test_impossible_meshes_are_refused(config: MeshConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mesh(config, devices=jax.devices()[:1])


def test_without_a_mesh_nothing_happens() -> None:
    x = jnp.arange(4.0)
    assert to_compute(x, ("batch",)) is x

    def double(x: jax.Array) -> jax.Array:
        return 2 * x

    assert per_shard(double, [("batch",)], ("batch",)) is double


def test_training_is_the_same_on_every_mesh() -> None:
    """Loss, gradients and the gradients' shardings on 2x2x2, 8x1x1 and 1x8x1 devices, in a process that has eight."""
    script = pathlib.Path(__file__).with_name("mesh_process.py")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [report["mesh"] for report in reports] == ["2x2x2", "8x1x1", "1x8x1"]
    for report in reports:
        assert report["loss_error"] < 1e-5, report
        assert report["gradient_error"] < 1e-5, report
        assert report["misplaced_gradients"] == [], report
        assert report["split_parameters"] == (0 if report["mesh"] == "8x1x1" else report["matrices"]), report
    assert reports[0]["rollout_error"] < 1e-5, reports[0]
