"""A whole run whose sampler keeps keys and values in 8 bits: it says what that means, and the correction weighs by it.

Which weights those are is for ``test_corrected_update.py``, with log-probabilities of both at hand.
"""

import math
import pathlib
import subprocess
from collections.abc import Callable

import pytest

from jaxrl.observe.writers import read_metrics

NARROW = (
    *("EngineConfig.kv_dtype=int8", "TrainConfig.steps=2", "EvalConfig.samples=1", "EvalConfig.k=(1,)"),
    *("AlgorithmConfig.proximal=recomputed", "AlgorithmConfig.mismatch=tis"),
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_gap_is_said_and_measured_and_no_weight_but_by_chance_is_one(
    tmp_path: pathlib.Path, run_tiny: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_tiny(tmp_path / "run", more=tuple(part for override in NARROW for part in ("--set", override)))
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert said.count("EngineConfig.kv_dtype='int8' rounds keys and values") == 1
    first = read_metrics(tmp_path / "run", "rl")[0]
    assert 1e-6 < first["logprob_gap"] < 0.01
    assert first["mismatch_kept"] == 1 and first["mismatch_weight"] == pytest.approx(1, abs=0.05) != 1
    assert math.isfinite(first["loss"]) and first["grad_norm"] > 0
