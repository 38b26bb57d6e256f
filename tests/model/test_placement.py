"""Folders read straight onto meshes and written from there, in processes with several devices."""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import ModelConfig
from jaxrl.model import hf, transformer
from jaxrl.model.config_json import hf_config
from jaxrl.model.folders import write_json
from jaxrl.model.placement import load_parameter
from jaxrl.model.tensor_files import file_name, plan_files, write_index, write_tensors

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
CONFIG = ModelConfig(
    vocab_size=48, layers=4, width=32, query_heads=8, kv_heads=4, head_width=8, ffn_width=40, tie_embeddings=False,
    param_dtype="bfloat16", init_scale=0.2,
)  # fmt: skip


def run_script(name: str, *arguments: Any, devices: int) -> list[dict[str, Any]]:
    """The JSON lines that a script beside this file prints."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "MALLOC_ARENA_MAX": "1",  # or else freed memory stays with the allocators of the threads
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels"), *sys.path]),
    }
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def run_processes(source: pathlib.Path, target: pathlib.Path, *more: Any) -> list[dict[str, Any]]:
    """What two processes with two devices each say that read ``source`` and write ``target`` together."""
    with socket.socket() as held, concurrent.futures.ThreadPoolExecutor() as threads:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # the coordinator may listen, no other gets it
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        runs = [
            threads.submit(run_script, "folder_process.py", process, 2, port, source, target, *more, devices=2)
            for process in range(2)
        ]
        return [line for run in runs for line in run.result()]


def random_params(config: ModelConfig) -> transformer.Params:
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda spec: generator.normal(size=spec.shape).astype(spec.dtype), transformer.param_specs(config)
    )


def write_tensor_files(folder: pathlib.Path, config: ModelConfig, max_bytes: int) -> None:
    """A folder too large to be made and compared in a test: written without reading it back, file by file."""
    folder.mkdir()
    write_json(folder / "config.json", hf_config(config))
    shapes = {
        name: spec.hf_shape
        for spec in jax.tree.leaves(transformer.param_specs(config))
        for name in spec.hf_names.values()
    }
    files = plan_files({name: 2 * math.prod(shape) for name, shape in shapes.items()}, max_bytes)
    generator = np.random.default_rng(0)
    for number, names in enumerate(files):
        tensors = {name: generator.random(shapes[name], np.float32).astype(jnp.bfloat16) for name in names}
        write_tensors(folder / file_name(number, len(files)), tensors)
    write_index(folder, files, parameters=sum(map(math.prod, shapes.values())), total_bytes=0)


def digests(folder: pathlib.Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("model*")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sharded")
    hf.save_folder(folder / "source", CONFIG, random_params(CONFIG), max_shard_bytes=20_000)
    return folder


@pytest.fixture(scope="module")
def reports(folder: pathlib.Path) -> list[dict[str, Any]]:
    return run_script("sharded_folders.py", folder / "source", folder, devices=8)


def test_every_mesh_gets_the_values_where_they_shall_rest(reports: list[dict[str, Any]]) -> None:
    meshes = ["1x2x2x1x1x2", "1x8x1x1x1x1", "1x1x8x1x1x1", "1x2x1x1x1x4", "2x1x1x1x2x2", "1x2x2x1x1x2"]
    assert [report["mesh"] for report in reports] == meshes
    assert all(report["equal"] and not report["misplaced"] for report in reports)
    assert [report["most_split"] for report in reports] == [4, 1, 8, 4, 2, 8]
    assert all(report["progress"] == [True, "read", report["bytes"], report["bytes"]] for report in reports)


def test_no_byte_is_read_twice(reports: list[dict[str, Any]]) -> None:
    """Devices that hold the same share have it read once; others read their own share and no more."""
    assert all(report["bytes_read"] == report["bytes"] for report in reports)


def test_an_export_is_the_same_from_every_mesh(reports: list[dict[str, Any]], folder: pathlib.Path) -> None:
    written = digests(folder / "source")
    assert len(written) > 3
    assert all(report["tensors_back"] for report in reports)
    assert all(report["files"] == written and report["logit_difference"] == 0 for report in reports[:-1])


@pytest.mark.slow
def test_processes_read_their_own_shares_and_write_their_own_files(folder: pathlib.Path) -> None:
    reports = run_processes(folder / "source", folder / "together")
    assert all(report["read"] == report["share"] and not report["failure"] for report in reports)
    assert digests(folder / "together") == digests(folder / "source")
    files = sorted(file.name for file in (folder / "source").glob("*.safetensors"))
    assert [report["written"] for report in reports] == [files[::2], files[1::2]]


@pytest.mark.parametrize(("fault", "words"), [("write", "write"), ("tell", "write"), ("read", "read back")])
def test_a_failure_of_one_process_is_a_failure_of_all_and_leaves_nothing(
    fault: str, words: str, folder: pathlib.Path
) -> None:
    before = sorted(folder.iterdir())
    first, second = run_processes(folder / "source", folder / "failed", 1, fault)
    assert second["failure"] == "the disk is full"
    assert first["failure"] == f"process 1 could not {words} the folder; its own message says why"
    assert sorted(folder.iterdir()) == before


def test_a_split_inside_a_merged_axis_is_refused() -> None:
    spec = transformer.param_specs(CONFIG)["layers"]["query"]
    mesh = jax.sharding.AbstractMesh((2,), ("tensor",))
    sharding = jax.NamedSharding(mesh, jax.P(None, None, None, "tensor"))
    with pytest.raises(ValueError, match=r"q_proj.weight: axis 'head' is split, but only 'query_heads' can be; change"):
        load_parameter(spec, sharding, {}, list)


@pytest.mark.slow
def test_the_host_holds_no_more_than_two_files_beside_the_parameters(tmp_path: pathlib.Path) -> None:
    """On a CPU the parameters themselves are in the memory measured here, once: they are split over all devices."""
    large = dataclasses.replace(
        CONFIG, vocab_size=16_000, layers=12, width=1024, query_heads=16, head_width=64, ffn_width=2816
    )
    hf.save_folder(tmp_path / "small", CONFIG, random_params(CONFIG))
    write_tensor_files(tmp_path / "large", large, max_bytes=70_000_000)
    (figures,) = run_script("folder_memory.py", tmp_path / "small", tmp_path / "large", tmp_path, devices=8)
    print(figures)
    assert figures["params"] > 4 * figures["file"]
    assert figures["read"] - figures["params"] <= 2 * figures["file"]
    assert figures["written"] - figures["params"] <= 2 * figures["file"]
    assert figures["read back"] - 2 * figures["params"] <= 2 * figures["file"]
