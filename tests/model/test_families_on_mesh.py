"""Soft caps, scanned frequencies, double norms and experts on a mesh: the same loss and gradients as on one device."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_families_give_the_same_numbers_on_eight_devices() -> None:
    script = pathlib.Path(__file__).with_name("families_process.py")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [report["family"] for report in reports] == ["gemma3_text"] * 2 + ["qwen3_moe"] * 3
    for report in reports:
        assert report["loss_error"] < 1e-5, report
        assert report["gradient_error"] < 1e-5, report
        assert report["at_rest"], report
