"""The devices of a target as jax describes them, without having them."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jaxlib import xla_client

from jaxrl.check.targets import CHIPS, GPU_SHARE, GPUS_PER_HOST, Target
from jaxrl.config import ConfigError

GPU_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""
"""What XLA asks of a Hopper GPU; H100 and H200 differ in their memory alone."""


def described(target: Target) -> list[jax.Device]:
    """The devices, in jax's order."""
    match target.platform:
        case "tpu":
            several = {"num_slices": target.slices} if target.slices > 1 else {}
            return list(topologies.get_topology_desc(target.topology, platform="tpu", **several).devices)
        case "gpu":
            chip = CHIPS[target.chip]
            description = GPU_DESCRIPTION.format(
                memory=chip.memory, bandwidth=int(chip.memory_rate), name=target.chip.upper()
            )
            return list(
                topologies.get_topology_desc(
                    "", platform="cuda", topology=target.topology, target_config=description
                ).devices
            )
    return list(jax.devices())


def target_config(devices: Sequence[jax.Device]) -> str:
    """What XLA knows of GPUs that are there, in the form of ``GPU_DESCRIPTION``.

    Raises:
        ConfigError: these are no GPUs.
    """
    if devices[0].platform != "gpu":
        raise ConfigError(f"only GPUs have a description to compile for them elsewhere, and this is {devices[0]}")
    return xla_client.get_topology_for_devices(list(devices)).target_config


def of_one_process(target: Target, mesh: Mesh) -> Mesh:
    """The mesh of a replica, on a slice as large as a process.

    Where links are limited, the compiler for TPUs takes no program for some devices of a slice alone.
    """
    if target.platform != "tpu":
        return mesh
    alone = dataclasses.replace(target, slices=1, count=target.of_process)
    chosen = np.array(described(alone)[: mesh.size]).reshape(mesh.devices.shape)
    return Mesh(chosen, mesh.axis_names, axis_types=mesh.axis_types)


def platforms(target: Target) -> tuple[str, ...] | None:
    """What programs are lowered for; None leaves it to the devices."""
    return {"tpu": ("tpu",), "gpu": ("cuda",)}.get(target.platform)


def memory(target: Target, devices: Sequence[jax.Device]) -> int:
    """Bytes of one device that jax can use. Devices that do not say share the memory of this machine."""
    if target.chip:
        return target.memory(float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_SHARE)))
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


def inner(target: Target, devices: Sequence[jax.Device]) -> int:
    """Devices between which the network is fast: those of a slice, or of a host with GPUs."""
    if target.platform == "tpu":
        return len(devices) // target.slices
    return min(len(devices), GPUS_PER_HOST)


def compiler_version(target: Target) -> str:
    """Version of what compiles for these devices."""
    package = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}.get(target.platform, "jaxlib")
    return f"{package} {importlib.metadata.version(package)}"
