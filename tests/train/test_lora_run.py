"""A whole run that trains adapters: it learns, its base stays, it resumes exactly, and goes out and in as PEFT's."""

import dataclasses
import functools
import pathlib
import shutil
import subprocess
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import commands
from jaxrl.config import Config, ConfigError, ModelConfig
from jaxrl.model import hf, logprob, lora, transformer
from jaxrl.observe.writers import read_metrics
from jaxrl.train import experiment
from jaxrl.train.checkpoint import CheckpointError, Checkpoints
from jaxrl.train.run import RunError, RunFolder
from jaxrl.train.session import reopen_session
from tests.train.conftest import write_sums

KILLED = -9

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run_lora(tmp_path_factory: pytest.TempPathFactory, tiny_run: pathlib.Path, run_tiny: Run) -> Run:
    """As ``run_tiny``, with adapters on the model that the tiny run exported and larger sums that it never saw."""
    larger = write_sums(
        tmp_path_factory.mktemp("larger") / "sums.jsonl", [(a, b) for a in range(6, 10) for b in range(6, 10)]
    )
    data = f"{RunFolder(tiny_run).read_config().data.train},{larger}"
    settings = ("LoraConfig.rank=8", f"ModelConfig.path='{tiny_run / 'export'}'", f"DataConfig.train='{data}'")
    more = tuple(word for setting in settings for word in ("--set", setting))
    return lambda folder, *by: run_tiny(folder, *by, more=more)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, run_lora: Run) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    done = run_lora(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trained parameters on" in done.stdout
    return folder


@pytest.fixture(scope="module")
def config(lora_run: pathlib.Path) -> Config:
    return RunFolder(lora_run).read_config()


def newest(folder: pathlib.Path, config: Config) -> tuple[lora.Adapters, lora.Adapters]:
    """Adapters of the policy and of the reference in the newest checkpoint."""
    session = reopen_session(config, RunFolder(folder))
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint, read_only=True)
    _, state, reference = experiment.restore(session, checkpoints, checkpoints.find("latest"))
    checkpoints.close()
    return jax.device_get(state.params), jax.device_get(reference)


@functools.partial(jax.jit, static_argnums=1)
def logits(params: dict, config: ModelConfig) -> jax.Array:
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    hidden = transformer.hidden_states(params, config, tokens, tokens, jnp.ones_like(tokens))
    return logprob.logits(params, config, hidden)


def test_a_run_learns_with_adapters(lora_run: pathlib.Path) -> None:
    cold = [row["nll"] for row in read_metrics(lora_run, "sft")]
    assert np.mean(cold[-5:]) < 0.6 * cold[0]
    steps = read_metrics(lora_run, "rl")
    assert len(steps) == 4
    assert any(row["grad_norm"] > 1e-3 for row in steps)
    assert any(0 < row["pass_rate"] < 1 for row in steps)
    first, last = (steps[place] for place in (0, -1))
    assert first["logprob_gap_max"] < 1e-5  # sampler and trainer agree about the adapters of the cold start
    assert 0 == first["kl_to_reference"] < last["kl_to_reference"]


def test_the_export_is_the_base_with_the_adapters_merged(lora_run: pathlib.Path, config: Config) -> None:
    model, exported = hf.load_folder(lora_run / "export")
    _, frozen = hf.load_folder(lora_run / "base")
    adapters, reference = newest(lora_run, config)
    base = lora.Base(frozen, lora.scale_of(config.lora))
    np.testing.assert_allclose(logits(base.adapted(adapters), model), logits(exported, model), atol=1e-4)
    np.testing.assert_array_equal(exported["embedding"], frozen["embedding"])
    moved = [np.abs(pair[lora.B] - reference[name][lora.B]).max() for name, pair in adapters.items()]
    assert all(np.any(pair[lora.B]) for pair in reference.values())  # as the cold start left them
    assert max(moved) > 0  # and reinforcement went on from there


def test_a_checkpoint_holds_adapters_and_no_base(lora_run: pathlib.Path, config: Config) -> None:
    checkpoints = Checkpoints(lora_run / "checkpoints", config.checkpoint, read_only=True)
    metadata = checkpoints._manager.item_metadata(checkpoints.find("latest"))["state"]
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(metadata)}
    checkpoints.close()
    assert any("lora_a" in name for name in names) and not any("embedding" in name for name in names)


def test_the_adapter_alone_is_loaded_by_peft_and_gone_on_from(
    lora_run: pathlib.Path, config: Config, tmp_path: pathlib.Path
) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    commands.export(config, lora_run, "latest", tmp_path / "adapter", None, hf.MAX_FILE_BYTES, adapter=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(lora_run / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    model, exported = hf.load_folder(lora_run / "export")
    with torch.no_grad():
        found = theirs(torch.arange(12)[None]).logits.numpy()
    np.testing.assert_allclose(found, logits(exported, model), atol=1e-4)

    further = dataclasses.replace(
        config,
        lora=dataclasses.replace(config.lora, path=str(tmp_path / "adapter")),
        sft=dataclasses.replace(config.sft, demonstrations=""),
    )
    shutil.copytree(lora_run / "base", tmp_path / "source")
    commands.import_folder(further, tmp_path / "source", tmp_path / "further")
    shutil.rmtree(tmp_path / "source")  # from here on the run folder holds all there is
    shutil.rmtree(tmp_path / "adapter")
    begun = RunFolder(tmp_path / "further").read_config()
    adapters, reference = newest(tmp_path / "further", begun)
    jax.tree.map(np.testing.assert_array_equal, adapters, newest(lora_run, config)[0])
    jax.tree.map(np.testing.assert_array_equal, adapters, reference)
    commands.export(begun, tmp_path / "further", "latest", tmp_path / "model", None, hf.MAX_FILE_BYTES)
    merged = [folder / "model.safetensors" for folder in (tmp_path / "model", lora_run / "export")]
    assert merged[0].read_bytes() == merged[1].read_bytes()


def test_adapters_and_whole_weights_are_not_mixed_up(
    lora_run: pathlib.Path, tiny_run: pathlib.Path, config: Config, tmp_path: pathlib.Path
) -> None:
    whole = RunFolder(tiny_run).read_config()
    with pytest.raises(ConfigError, match=r"trains all weights and has no adapter; leave out --adapter"):
        commands.export(whole, tiny_run, "latest", tmp_path / "adapter", None, hf.MAX_FILE_BYTES, adapter=True)
    late = dataclasses.replace(whole, lora=config.lora)
    with pytest.raises(RunError, match=r"trained all weights, but LoraConfig.rank=8 asks for adapters; export it, and"):
        reopen_session(late, RunFolder(tiny_run)).on_base(kept=True)
    for changes, wanted in (({"rank": 0}, "params/embedding"), ({"rank": 4}, r"params/\w+/lora_a should have shape")):
        other = dataclasses.replace(config, lora=dataclasses.replace(config.lora, **changes))
        with pytest.raises(CheckpointError, match=wanted):
            newest(lora_run, other)


@pytest.mark.slow
def test_promise_8_killed_and_resumed_gives_the_same_bits(
    lora_run: pathlib.Path, tmp_path: pathlib.Path, run_lora: Run
) -> None:
    folder = tmp_path / "run"
    script = str(pathlib.Path(__file__).with_name("killed_run.py"))
    assert run_lora(folder, script, "update", "65").returncode == KILLED
    resumed = run_lora(folder)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "reinforcement: 4 steps, from step" in resumed.stdout  # it went on, and did not begin again
    clocks = ("seconds/", "engine/", "tokens_per_second", "tool_seconds", "trainer/idle_share")
    curves = [
        [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in read_metrics(run)]
        for run in (folder, lora_run)
    ]
    assert curves[0] == curves[1]
    for file in ("export/model.safetensors", "base/model.safetensors"):
        assert (folder / file).read_bytes() == (lora_run / file).read_bytes()
