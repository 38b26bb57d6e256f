"""Compiled for TPUs and GPUs that are not there. The small ones run wherever their compiler is installed."""

import contextlib
import os
import pathlib
import re
import resource
from collections.abc import Callable
from typing import Any

import jax
import pytest

from jaxrl.check import environment, mending, programs, report, run, targets
from jaxrl.check.worker import asked_for, reserved_by_cudnn
from jaxrl_kernels import interval_attention
from tests.check.conftest import SMALL, needs_compiler
from tests.kernels.test_lowering import mesh_of

POD_BYTES = 4 * targets.GIB


@pytest.mark.parametrize("name", ["v5e-4", "h200x4"])
@pytest.mark.timeout(900)
def test_a_small_model(name: str) -> None:
    target = targets.parse(name)
    needs_compiler(target.platform)
    config = run.configuration("smoke", SMALL)
    result = run.compile_for(config, target, lambda line: None, cached=False, names=programs.NAMES)
    assert result.fits and result.devices == 4
    assert result.memory == target.memory()
    assert any({"tpu": ": tpu, in blocks of", "gpu": ": cudnn"}[target.platform] in line for line in result.kernels)
    more = result.compiled["more"]
    assert more.temporary > 0 and more.traffic
    assert not any(one["beyond"] for one in more.traffic)  # one slice, one host
    assert result.compiled["copy"].arguments == pytest.approx(result.resident.pages, abs=1 << 16)
    totals = {moment.name: moment.total for moment in result.moments}
    assert totals["first"] <= totals["more"] and totals["score"] <= totals["more"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experts_in_bfloat16_compile_for_tpus() -> None:
    """Forward and backward; the compiler takes no grouped product of such operands in the highest precision."""
    needs_compiler("tpu")
    sparse = ("family=qwen3_moe", "layers=1", "experts=8", "experts_per_token=2", "expert_width=256")
    config = run.configuration("smoke", (*SMALL, *(f"ModelConfig.{setting}" for setting in sparse)))
    result = run.compile_for(config, targets.parse("v5e-4"), lambda line: None, cached=False, names=("more",))
    assert result.fits and result.compiled["more"].temporary > 0


@pytest.mark.timeout(900)
def test_a_tpu_has_the_memory_that_its_compiler_grants() -> None:
    """Pages beyond the memory are found before anything is compiled; a program beyond it by the compiler."""
    needs_compiler("tpu")
    target = targets.parse("v5e-4")
    config = run.configuration("smoke", (*SMALL, "TrainConfig.rows=65536", "ModelConfig.remat=none"))
    result = run.compile_for(config, target, lambda line: None, cached=False, names=("score",))
    refused = result.compiled["score"]
    assert not result.fits and refused.refused and refused.temporary > result.memory
    granted = re.search(r"of ([\d.]+)G hbm|available HBM \(([\d.]+)G\)", refused.refused)
    assert granted and float(granted[1] or granted[2]) == pytest.approx(result.memory / targets.GIB, abs=0.01)
    assert "does not fit" in report.verdict(result)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (2.50G) exceeds",
            2.5,
        ),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 56.75G of 15.75G hbm. Exceeded by 41.00G.", 56.75),
        ("RESOURCE_EXHAUSTED: Used 512.00M of 256.00M vmem", 0.5),
        ("INVALID_ARGUMENT: Used 1.00G of nothing", None),
    ],
)
def test_what_a_compiler_asked_for(message: str, gib: float | None) -> None:
    assert asked_for(message) == (None if gib is None else int(gib * targets.GIB))


def test_what_cudnn_may_reserve_is_counted() -> None:
    """Two rows of 1,024 tokens have room for 64 segments; of eight heads, 128 wide, in float32."""
    q, k, end = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [((2, 1024, 8, 128), "bfloat16"), ((2, 1024, 2, 128), "bfloat16"), ((2, 1024), "int32")]
    )

    def lowered(run: Callable[..., Any]) -> str:
        with jax.sharding.use_abstract_mesh(mesh_of("NVIDIA H200")):
            return jax.jit(run).trace(q, k, k, end).lower(lowering_platforms=("cuda",)).as_text()

    gradient = jax.grad(lambda *row: interval_attention(*row).astype("float32").sum())
    assert reserved_by_cudnn(lowered(gradient)) == 64 * 1024 * 8 * 128 * 4
    assert reserved_by_cudnn(lowered(interval_attention)) == 0


@pytest.fixture(scope="module")
def compilers() -> pathlib.Path:
    """The compilers of both, installed from the package registry where they are not there yet."""
    if not os.environ.get("JAXRL_COMPILE_PODS"):
        pytest.skip("compiling for pods takes twenty minutes: make test-pods")
    for platform in ("tpu", "gpu"):
        with contextlib.suppress(environment.CompilerError):
            environment.install(platform, print)
    return environment.cache_folder()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["v5p-64", "h200x64"])
def test_the_large_recipe_fits(compilers: pathlib.Path, name: str) -> None:
    needs_compiler(targets.parse(name).platform)
    config = run.configuration("rstar2_14b", [])
    result = run.compile_for(config, targets.parse(name), print)
    print(report.verdict(result))
    assert result.fits, report.verdict(result)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < POD_BYTES  # of the largest process


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eight_small_chips_are_not_enough_and_the_remedies_are(compilers: pathlib.Path) -> None:
    needs_compiler("tpu")
    found = run.check(run.configuration("rstar2_14b", []), targets.parse("v5e-8"), print)
    assert not found.result.fits
    assert len(found.mended) == mending.REMEDIES
    assert all(outcome.fits for _, outcome in found.mended)
