"""Losses and corrections on a mesh that splits rows over devices."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxrl.rl.mismatch import MISMATCH, REJECTIONS
from jaxrl.rl.policy_losses import POLICY_LOSSES


@pytest.mark.slow
def test_a_mesh_changes_no_loss_and_no_correction() -> None:
    script = pathlib.Path(__file__).with_name("losses_on_mesh.py")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert {*POLICY_LOSSES, *MISMATCH, *REJECTIONS, "mismatch_p99"} <= differences.keys()
    assert max(differences.values()) < 1e-5, differences
