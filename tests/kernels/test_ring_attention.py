"""Attention over a ring of devices against the reference on one, and what the ring leaves out."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxrl_kernels.ring_attention import make_ring_plan, ring_attention
from tests.kernels.ring_process import FEW, WHOLE_ROWS


def printed(which: str) -> list[dict]:
    """What ring_process.py reports, in a process that has eight devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.kernels.ring_process", which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_as_one_device(result: dict) -> None:
    """Output and gradients, at most twice as far from float32 as one device is, that has the whole row."""
    for ours, one in zip(result["ours"], result["one"], strict=True):
        assert ours <= 2 * one + 1e-5, result
    assert result["padding"] == 0, result


def test_a_ring_attends_as_one_device_and_computes_nothing_that_the_mask_leaves_empty() -> None:
    """Of 64 pairs of chunks: the causal half; a device's own; that and, for every second device, the one before."""
    *compared, counted = printed("few")
    assert {result["case"] for result in compared} == set(FEW)
    for result in compared:
        assert_as_one_device(result)
    assert counted["parts"] == {"causal": 36, "own": 8, "pairs": 12}


@pytest.mark.slow
def test_every_case_of_whole_rows_is_that_of_one_device() -> None:
    *compared, interpreted = printed("all")
    assert [result["case"] for result in compared] == [case.name for case in WHOLE_ROWS]
    assert interpreted["implementation"] == "tpu_interpreted"
    for result in (*compared, interpreted):
        assert_as_one_device(result)


def test_chunks_that_are_no_part_of_the_rows_are_refused() -> None:
    def run(end: jax.Array) -> jax.Array:
        q = jnp.zeros((1, 16, 2, 8))
        return ring_attention(q, q, q, end, axis="ring")

    with pytest.raises(ValueError, match=r"2 chunks of q \(1, 16, 2, 8\).* end \[B, 32\] of whole rows; got"):
        jax.make_jaxpr(run, axis_env=[("ring", 2)])(jnp.zeros((1, 31), jnp.int32))


def test_a_row_that_cannot_be_cut_equally_is_refused() -> None:
    def run(end: jax.Array) -> jax.Array:
        make_ring_plan(end, axis="ring", groups=1, head_width=8, dtype="float32")
        return end

    with pytest.raises(ValueError, match="rows of 15 tokens cannot be cut into 2 equal chunks; pad them"):
        jax.make_jaxpr(run, axis_env=[("ring", 2)])(jnp.zeros((1, 15), jnp.int32))
