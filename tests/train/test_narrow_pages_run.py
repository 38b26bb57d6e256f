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
def test_the_gap_is_said_and_measured_and_tokens_are_weighted_by_it(
    tmp_path: pathlib.Path, run_tiny: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_tiny(tmp_path / "run", more=tuple(part for override in NARROW for part in ("--set", override)))
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert said.count("EngineConfig.kv_dtype='int8' rounds keys and values") == 1
    rows = read_metrics(tmp_path / "run", "rl")
    assert len(rows) == 2
    for row in rows:
        assert 1e-6 < row["logprob_gap"] < 0.01
        # No bound cuts a weight here, so their mean is that of the ratios, which lie on both sides of 1.
        assert row["mismatch_kept"] == 1 and row["mismatch_weight"] == pytest.approx(row["ratio"], rel=1e-6)
        assert row["mismatch_p1"] < 1 - 1e-5 and row["mismatch_p99"] > 1 + 1e-5
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
