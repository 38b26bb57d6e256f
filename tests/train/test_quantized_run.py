"""A whole run on a base in codes: it resumes to the same bits, and its export is the policy it trained."""

import pathlib
import subprocess
from collections.abc import Callable

import jax
import numpy as np
import pytest

from jaxrl.model import hf, logprob, quantized
from jaxrl.observe.writers import read_metrics
from jaxrl.train import experiment
from jaxrl.train.checkpoint import Checkpoints
from jaxrl.train.run import RunFolder
from jaxrl.train.session import reopen_session

CODES = (
    *("LoraConfig.rank=4", "LoraConfig.base=nf4", "AlgorithmConfig.reject_equal=False", "SftConfig.steps=20"),
    "TrainConfig.prefetch_groups=0",
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("from_folder", [False, True], ids=["from scratch", "from a folder"])
def test_a_run_on_codes(
    tmp_path: pathlib.Path,
    run_tiny: Callable[..., subprocess.CompletedProcess[str]],
    from_folder: bool,
    tiny_run: pathlib.Path,
) -> None:
    source = (f"ModelConfig.path='{tiny_run / 'export'}'",) if from_folder else ()

    def run(folder: pathlib.Path, steps: int) -> None:
        settings = [part for setting in (*CODES, *source, f"TrainConfig.steps={steps}") for part in ("--set", setting)]
        done = run_tiny(folder, more=tuple(settings))
        assert done.returncode == 0, done.stdout + done.stderr

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(whole, 2)
    run(halves, 1)
    run(halves, 2)
    for left, right in zip(read_metrics(whole, "rl"), read_metrics(halves, "rl"), strict=True):
        assert all(left[name] == right[name] for name in ("loss", "grad_norm", "ratio", "entropy"))
        assert left["ratio"] == pytest.approx(1, abs=1e-4)
    exports = [(folder / "export" / "model.safetensors").read_bytes() for folder in (whole, halves)]
    assert exports[0] == exports[1]

    config = RunFolder(whole).read_config()
    session = reopen_session(config, RunFolder(whole)).on_base(kept=True)
    assert isinstance(session.base.params["layers"]["query"], quantized.Quantized)
    checkpoints = Checkpoints(whole / "checkpoints", config.checkpoint, read_only=True)
    adapters = experiment.restore_params(session, checkpoints, checkpoints.find("latest"))
    tokens = np.random.default_rng(0).integers(0, session.model.vocab_size, (2, 30)).astype(np.int32)
    positions = np.broadcast_to(np.arange(30, dtype=np.int32), tokens.shape)
    score = jax.jit(logprob.sequence_logprobs, static_argnums=1)
    with jax.set_mesh(session.mesh):
        trained = score(session.base.adapted(adapters), session.model, tokens, positions, np.ones_like(tokens)).logprobs
    exported, params = hf.load_folder(whole / "export")
    found = score(params, exported, tokens, positions, np.ones_like(tokens)).logprobs
    np.testing.assert_allclose(found, trained, atol=1e-4)
