"""Soft caps, scanned frequencies, double norms and experts on a mesh: the same loss and gradients as on one device."""

import json
import os
import subprocess
import sys


def test_families_give_the_same_numbers_on_eight_devices() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "tests.model.families_process"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    reports = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [report["family"] for report in reports] == ["gemma3_text", "qwen3_moe"]
    for report in reports:
        assert report["loss_error"] < 1e-5, report
        assert report["gradient_error"] < 1e-5, report
        assert report["at_rest"], report
