"""The kernels compiled for chips that are not there: they lower, lay out and fit into the memory of the chip."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from jaxrl.check import environment
from jaxrl_kernels.block_sizes import table
from jaxrl_kernels.choice import TPUS
from tests.kernels import compiled_for_hopper
from tests.kernels.compiled import PAGED_SHAPES, SHAPES
from tests.kernels.compositions import COMPOSITIONS

KINDS = {"v5e:2x2": "TPU v5 lite", "v5p:2x2x1": "TPU v5", "v6e:2x2": "TPU v6 lite", "tpu7x:2x2x1": "TPU7x"}


@pytest.mark.slow
@pytest.mark.parametrize("topology", KINDS)
@pytest.mark.timeout(600)
def test_every_kernel_compiles(topology: str) -> None:
    if not environment.installed("tpu"):
        pytest.skip("the compiler for tpu is not installed: jaxrl check --install tpu")
    command = [sys.executable, "-m", "tests.kernels.compiled", topology]
    done = subprocess.run(command, env=environment.variables("tpu"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *answers, too_large = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    composed = [answers.pop() for _ in COMPOSITIONS][::-1]
    check_compositions(composed)
    assert too_large["shape"] == "too_large" and "vmem" in too_large["refused"]
    assert [answer["shape"] for answer in answers] == [shape.name for shape in (*SHAPES, *PAGED_SHAPES)]
    assert "interval attention has no block sizes" not in done.stderr
    for shape, answer in zip((*SHAPES, *PAGED_SHAPES), answers, strict=True):
        assert answer["kind"] == KINDS[topology]
        # Of interval attention: forward, gradient of queries, gradients of keys and values.
        assert answer["kernels"] == (3 if shape in SHAPES else 1)
        # A whole matrix of scores, or a copy of the pages.
        assert answer["temporary"] < answer["too_much"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_for_hopper_use_its_matrix_units_and_spill_no_register_and_auto_calls_cudnn() -> None:
    if not environment.installed("gpu"):
        pytest.skip("the compiler for gpu is not installed: jaxrl check --install gpu")
    variables = environment.variables("gpu") | {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    command, both = [sys.executable, "-m", "tests.kernels.compiled_for_hopper"], subprocess.STDOUT
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=both, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"shape"')]
    assert [answer["shape"] for answer in answers] == [shape.name for shape in compiled_for_hopper.SHAPES]
    check_compositions([json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"composition"')])
    (said,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"cudnn"')]
    assert said["cudnn"] == {"fmhaSoftmax": 1, "fmhaSoftmaxBackward": 1}
    assert "core_count: 132" in said["description"]  # as of a GPU that is there: ``jaxrl bench kernels --dump-target``
    for answer in answers:
        assert answer["kernels"] == 3  # forward, gradient of queries, gradients of keys and values
        assert answer["temporary"] < answer["too_much"]
    assembly = re.split(r"\.visible \.entry", done.stdout)[1:]
    assert len(assembly) == 3 * len(compiled_for_hopper.SHAPES)
    for kernel in assembly:
        assert "wgmma.mma_async" in kernel and "mma.sync" not in kernel
        assert "tanh.approx" not in kernel  # which has 11 bits
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout)
    assert spilled == [("0", "0")] * len(assembly)


def check_compositions(answers: list[dict[str, Any]]) -> None:
    """Each was compiled, and none holds a copy of the pages, or all scores or logits of a device."""
    assert [answer["composition"] for answer in answers] == list(COMPOSITIONS)
    for answer, composition in zip(answers, COMPOSITIONS.values(), strict=True):
        assert answer["temporary"] < composition.too_much


def test_the_table_knows_every_generation() -> None:
    assert {key.device for key in table()} == set(KINDS.values()) == set(TPUS)
