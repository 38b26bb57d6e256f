"""The TPU kernels compiled for every generation of chips, without one: they lower, lay out and fit into VMEM."""

import json
import subprocess
import sys

import pytest

from jaxrl.check import environment
from jaxrl_kernels.interval_attention.blocks import TABLE
from tests.kernels.compiled import PAGED_SHAPES, SHAPES

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
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [answer["shape"] for answer in answers] == [shape.name for shape in (*SHAPES, *PAGED_SHAPES)]
    assert "has no block sizes" not in done.stderr
    for shape, answer in zip((*SHAPES, *PAGED_SHAPES), answers, strict=True):
        assert answer["kind"] == KINDS[topology]
        # Of interval attention: forward, gradient of queries, gradients of keys and values.
        assert answer["kernels"] == (3 if shape in SHAPES else 1)
        # A whole matrix of scores, or a copy of the pages.
        assert answer["temporary"] < answer["too_much"]


def test_the_table_knows_every_generation() -> None:
    assert {kind for kind, _ in TABLE} == set(KINDS.values())
