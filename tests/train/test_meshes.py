"""A whole run on a mesh of eight devices is the run on one device."""

import dataclasses
import inspect
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl.check import run as check_run
from jaxrl.config import Config, ConfigError, DataConfig, EngineConfig, LoraConfig, ModelConfig, SftConfig, TrainConfig
from jaxrl.mesh import AXES
from jaxrl.model.packed_attention import packed_attention
from jaxrl.observe.traces import read_episodes
from jaxrl.observe.writers import read_metrics
from jaxrl.records import Batch
from jaxrl.train import attention, session
from jaxrl.train.run import RunFolder
from jaxrl_kernels.interval_attention import backends as interval
from jaxrl_kernels.paged_attention import backends as paged

SHORT = (
    *("ModelConfig.kv_heads=2", "SftConfig.steps=20", "TrainConfig.steps=2", "TrainConfig.problems=2"),
    *("TrainConfig.samples=4", "AlgorithmConfig.reject_equal=False", "AlgorithmConfig.keep=4"),
)
EIGHT = (
    *("MeshConfig.slice=2", "MeshConfig.fsdp=1", "MeshConfig.context=2", "MeshConfig.tensor=2"),
    *("OptimizerConfig.offload=True", "ModelConfig.context_attention=ring"),
)
APART = ("MeshConfig.fsdp=2", "MeshConfig.tensor=2", "MeshConfig.rollout_devices=4", "MeshConfig.rollout_tensor=1")
GROUPED = ModelConfig(query_heads=64, kv_heads=8, head_width=128, compute_dtype="bfloat16")
MANY = EngineConfig(slots=256, group_width=32, max_prompt_tokens=1024, max_response_tokens=490 * 16 - 1024)
"""Slots that the kernel for TPUs has room for, but not for parties of them."""
RunTiny = Callable[..., subprocess.CompletedProcess[str]]


def settings(overrides: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(argument for override in overrides for argument in ("--set", override))


def on_a_tpu() -> jax.sharding.AbstractMesh:
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    return jax.sharding.AbstractMesh((1,) * len(AXES), AXES, abstract_device=device)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((2, 1, 2, 1, 1, 1), r"SftConfig.rows=6 cannot be split over 4 devices \(.*fsdp x expert\); make it 8, or"),
        (
            (1, 1, 1, 2, 1, 1),
            r"TrainConfig.rows=7 cannot be split over 2 devices \(.*expert\); make it 8, or another mult",
        ),
        (
            (1, 1, 1, 1, 4, 2),
            r"SftConfig.row_tokens=100 cannot be split over 8 devices .*context x tensor\); make it 104",
        ),
    ],
)
def test_rows_that_a_mesh_cannot_split_are_refused_with_what_it_could(lengths: tuple[int, ...], message: str) -> None:
    config = Config(sft=SftConfig(rows=6, row_tokens=100), train=TrainConfig(rows=7, row_tokens=512))
    with pytest.raises(ConfigError, match=message):
        session.check_rows(session.packed_sections(config), jax.sharding.AbstractMesh(lengths, AXES))


def test_the_run_folder_says_what_computes_attention_and_in_which_blocks(tmp_path: pathlib.Path) -> None:
    model, engine = ModelConfig(head_width=128, compute_dtype="bfloat16"), EngineConfig(group_decode="on")
    mesh, run = on_a_tpu(), RunFolder(tmp_path)

    def kernels() -> list[str]:
        packed = attention.packed_kernels(model, mesh, [SftConfig(rows=2, row_tokens=4096)] * 2)
        return packed + attention.paged_kernels(engine, model, mesh)

    rows, *pages = kernels()
    assert rows == "attention, 2 rows, 4096 queries to 4096 keys: tpu, in blocks of 512 queries by 512 keys"
    whats, blocks = zip(*(line.split(": tpu, in blocks of ") for line in pages), strict=True)
    assert whats == (
        "attention, 64 prompts in pages that rows read together, 16 queries each",
        "attention, 64 rows in pages behind their prompts, 1 query each",
        "attention, 4 rows in pages, 64 queries each",
    )
    assert blocks == tuple(f"{rows} rows of scores by 32 pages" for rows in (32, 16, 128))
    assert not run.write_kernels(kernels()) and not run.write_kernels(kernels())
    model = dataclasses.replace(model, attention="xla")
    assert run.write_kernels(kernels())[0] == "attention, 2 rows, 4096 queries to 4096 keys: xla"
    assert (tmp_path / "kernels.txt").read_text().splitlines() == kernels()


@pytest.mark.parametrize(
    ("changes", "train", "context", "reason"),
    [
        ({"context_attention": "ring"}, {}, 2, "packed segments are needed"),
        ({"context_attention": "gather"}, {}, 2, "whole rows are needed"),
        ({"attention_soft_cap": 50.0}, {}, 1, "it has no soft cap"),
        ({}, {"packing": "tree"}, 1, "packed segments are needed"),
        ({}, {"packing": "shared_prompt"}, 1, "packed segments are needed"),
    ],
)
def test_cudnn_is_neither_had_nor_recorded_where_it_would_compute_nothing(
    changes: dict[str, Any], train: dict[str, str], context: int, reason: str
) -> None:
    lengths = tuple(context if axis == "context" else 1 for axis in AXES)
    mesh = jax.sharding.AbstractMesh(
        lengths, AXES, abstract_device=jax.sharding.AbstractDevice("NVIDIA H200", 1, "gpu")
    )
    model = ModelConfig(head_width=128, compute_dtype="bfloat16", **changes)
    sections = [TrainConfig(**train)]
    with pytest.raises(ConfigError, match=f"ModelConfig.attention='cudnn' cannot take this: {reason}"):
        attention.check_attention(dataclasses.replace(model, attention="cudnn"), mesh, sections)
    with pytest.warns(UserWarning, match=f"'cudnn' is passed over: {reason}"):
        (line,) = attention.packed_kernels(model, mesh, sections)
    assert line.endswith(" keys: xla")
    plain = dataclasses.replace(model, attention="cudnn", context_attention="gather", attention_soft_cap=0.0)
    one = jax.sharding.AbstractMesh((1,) * len(AXES), AXES, abstract_device=mesh.abstract_device)
    attention.check_attention(plain, one, [TrainConfig()])


def test_rows_with_more_segments_than_there_is_room_for_are_said_once() -> None:
    lengths = tuple(2 if axis == "data" else 1 for axis in AXES)
    device = jax.sharding.AbstractDevice("NVIDIA H200", 1, "gpu")
    mesh = jax.sharding.AbstractMesh(lengths, AXES, abstract_device=device)
    model, section = ModelConfig(head_width=128, compute_dtype="bfloat16"), TrainConfig(rows=4, row_tokens=256)
    room = 2 * 32
    full, crowded = Batch.zeros(4, 256), Batch.zeros(4, 256)
    for row in range(4):  # of which a device has two
        full.segment_ids[row, :64] = np.arange(64) // 2 + 1
        crowded.segment_ids[row, : room // 2] = np.arange(room // 2) + 1
    crowded.segment_ids[3, 100:200] = 1
    crowding = attention.Crowding(model, mesh)
    assert crowding.note(section, [full]) == "" == crowding.note(section, [])
    said = crowding.note(section, [full, crowded])
    assert "65 segments in 2 rows of a device, and 'cudnn' has room for 64: " in said
    assert "TrainConfig.row_tokens=256" in said and "TrainConfig.rows=4" in said
    assert crowding.note(section, [crowded]) == ""
    plain = dataclasses.replace(model, attention="xla")
    assert attention.Crowding(plain, mesh).note(section, [crowded]) == ""
    (line,) = attention.packed_kernels(model, mesh, [section])
    flag = "gradients repeat to the bit with XLA_FLAGS=--xla_gpu_deterministic_ops=true alone"
    assert line == f"attention, 2 rows, 256 queries to 256 keys: cudnn; {flag}"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("cpu", {"attention": "tpu"}, "'tpu' needs a TPU v5 lite or .* TPU7x, not 'cpu'"),
        ("NVIDIA A100-SXM4-40GB", {}, "'mosaic_gpu' needs a NVIDIA H100 or .*, not 'NVIDIA A100-SXM4-40GB'"),
        ("NVIDIA H100 80GB HBM3", {"compute_dtype": "float32"}, "'mosaic_gpu' cannot take this: heads 64 or 128 wide"),
        ("NVIDIA H100 80GB HBM3", {"head_width": 96}, "'mosaic_gpu' cannot take this: heads 64 or 128 wide"),
        ("TPU v5 lite", {"attention": "tpu", "head_width": 64}, "'tpu' cannot take this: a head of width 64"),
    ],
)
def test_kernels_that_cannot_be_had_are_refused_at_start(kind: str, changes: dict[str, Any], message: str) -> None:
    wide = ModelConfig(head_width=128, compute_dtype="bfloat16")
    device = jax.sharding.AbstractDevice(kind, 1, {"T": "tpu", "N": "gpu"}.get(kind[0], "cpu"))
    mesh = jax.sharding.AbstractMesh((1,) * len(AXES), AXES, abstract_device=device)

    def check(model: ModelConfig) -> None:
        attention.check_attention(model, mesh, [TrainConfig()])
        attention.check_paged_attention(EngineConfig(), model, mesh)

    check(wide)
    if kind != "NVIDIA A100-SXM4-40GB":
        check(dataclasses.replace(wide, attention={"T": "tpu", "N": "mosaic_gpu"}.get(kind[0], "xla")))
    with pytest.raises(ConfigError, match=f"ModelConfig.attention={message}.*; set it to 'auto'"):
        check(dataclasses.replace(wide, **({"attention": "mosaic_gpu"} | changes)))


def test_parties_that_the_named_kernel_has_no_room_for_are_left_out_and_refused_by_name_where_asked_for() -> None:
    mesh, model = on_a_tpu(), dataclasses.replace(GROUPED, attention="tpu")
    attention.check_paged_attention(MANY, model, mesh)
    assert len(attention.paged_kernels(MANY, model, mesh)) == 2
    message = "'tpu' for prompts .* need 133376 entries .*; lower EngineConfig.group_width=32, or .*group_decode='off'"
    with pytest.raises(ConfigError, match=message):
        attention.check_paged_attention(dataclasses.replace(MANY, group_decode="on"), model, mesh)


def test_windowed_layers_have_a_line_of_their_own_where_rows_decode_together() -> None:
    """They read whole rows, by a kernel that need not have room for parties."""
    model = dataclasses.replace(GROUPED, sliding_window=512, sliding_layers=(1,))
    lines = attention.paged_kernels(dataclasses.replace(MANY, group_decode="on"), model, on_a_tpu())
    assert [line.split(": ")[1].split(",")[0] for line in lines] == ["xla", "xla", "tpu", "tpu"]
    assert "256 rows in pages in layers with a window, 1 query each: tpu, in blocks of" in lines[2]


def test_a_kernel_for_pages_alone_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(paged.BACKENDS, "other", paged.BACKENDS["xla"])
    model, mesh = ModelConfig(attention="other"), jax.sharding.AbstractMesh((1,) * len(AXES), AXES)
    attention.check_attention(model, mesh, [TrainConfig()])
    attention.try_attention(model, mesh, [TrainConfig()])
    assert [line.rsplit(": ")[1] for line in attention.packed_kernels(model, mesh, [TrainConfig()])] == ["xla"]
    assert {line.rsplit(": ")[1] for line in attention.paged_kernels(EngineConfig(), model, mesh)} == {"other"}
    end = jax.ShapeDtypeStruct((1, 8), "int32")
    heads = [jax.ShapeDtypeStruct((1, 8, count, model.head_width), "float32") for count in (model.query_heads, 2, 2)]
    jax.eval_shape(lambda end, *qkv: packed_attention(model, end, None)(*qkv, 0), end, *heads)


def test_an_unknown_name_is_refused_with_the_one_most_like_it(tmp_path: pathlib.Path) -> None:
    data, lora = DataConfig(train=str(tmp_path / "none.jsonl")), LoraConfig(rank=8)
    config = Config(model=ModelConfig(attention="mosiac_gpu"), data=data, lora=lora)
    model, mesh = ModelConfig(attention="mosiac_gpu"), jax.sharding.AbstractMesh((1,) * len(AXES), AXES)
    message = "attention='mosiac_gpu' names no kernels; did you mean mosaic_gpu.; there are auto, tpu, .*xla"
    for check in (
        lambda: attention.check_attention(model, mesh, [TrainConfig()]),
        lambda: attention.check_paged_attention(EngineConfig(), model, mesh),
        lambda: check_run.configuration("smoke", ["ModelConfig.attention=mosiac_gpu"]),
        # Before files are read that are not there, and in place of what else is wrong.
        lambda: session.open_session(config, RunFolder(tmp_path)),
        lambda: session.reopen_session(config, RunFolder(tmp_path)),
        lambda: session.open_offline_session(config, RunFolder(tmp_path), [], valued=True),
    ):
        with pytest.raises(ConfigError, match=message):
            check()


def test_the_field_says_what_it_may_be() -> None:
    for name in ("auto", *interval.BACKENDS, *paged.BACKENDS):
        assert f'"{name}"' in inspect.getsource(ModelConfig)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory, run_tiny: RunTiny) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    one = run_tiny(folder, more=settings(SHORT))
    assert one.returncode == 0, one.stdout + one.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mesh", [EIGHT, APART], ids=["all train and play", "four train and four play"])
def test_a_run_on_eight_devices_has_the_curve_of_one(
    mesh: tuple[str, ...],
    one_device: pathlib.Path,
    tmp_path: pathlib.Path,
    run_tiny: RunTiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cold start, episodes of the next step played during the update, four replicas, and a resume."""
    folder = tmp_path / "eight"
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    half = run_tiny(folder, more=settings((*SHORT, *mesh, "TrainConfig.steps=1")))
    assert half.returncode == 0, half.stdout + half.stderr
    rest = run_tiny(folder, more=settings((*SHORT, *mesh)))
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert "reinforcement: 2 steps, from step" in rest.stdout
    folders = (one_device, folder)
    played = [[t for file in sorted((f / "episodes").glob("rl_*.jsonl")) for t in read_episodes(file)] for f in folders]
    assert [t.ids.tolist() for t in played[0]] == [t.ids.tolist() for t in played[1]]
    for one_row, row in zip(*(read_metrics(folder, "rl") for folder in folders), strict=True):
        for name in ("loss", "grad_norm", "entropy", "ratio", "pass_rate"):
            assert row[name] == pytest.approx(one_row[name], rel=1e-3, abs=1e-5), name
