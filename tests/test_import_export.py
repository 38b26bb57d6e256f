"""The verbs import and export: what comes in goes out, with everything that lies beside the weights."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxrl import cli
from jaxrl import config as configuration
from jaxrl.config import ModelConfig
from jaxrl.data import problems
from jaxrl.model import hf, logprob, transformer
from jaxrl.text.tokenizer import Tokenizer, train_sentencepiece

TEXTS = ["Ann has 3 apples and buys 4 more. How many apples are there? <tool_call> print(3 + 4) #### 7"] * 3
OVERRIDES = (
    "ModelConfig.param_dtype=bfloat16",
    "ChatConfig.show_tools=False",
    "SftConfig.demonstrations=''",
    "EngineConfig.max_prompt_tokens=1024",
    "TrainConfig.row_tokens=2048",
)
SMALL = [argument for override in OVERRIDES for argument in ("--set", override)]
SOURCE_GENERATION = {"bos_token_id": 7, "eos_token_id": [9, 11], "temperature": 0.6, "top_k": 20, "max_length": 99}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_sentencepiece(TEXTS, 300)


@pytest.fixture
def source(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> pathlib.Path:
    """A folder as published models are: two shards, vocabulary in two forms, template, generation config."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 5, layers=2, width=16, query_heads=2, kv_heads=1, head_width=8, ffn_width=24,
        param_dtype="bfloat16",
    )  # fmt: skip
    generator = np.random.default_rng(0)
    specs = transformer.param_specs(config)
    params = jax.tree.map(lambda spec: generator.normal(size=spec.shape).astype(spec.dtype), specs)
    folder = tmp_path / "source"
    hf.save_folder(folder, config, params, max_shard_bytes=16_000)
    tokenizer.save(folder)
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "chat_template.jinja").write_text("{{ the_source }}")
    (folder / "generation_config.json").write_text(json.dumps(SOURCE_GENERATION))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def read_all(folder: pathlib.Path) -> dict[str, np.ndarray]:
    files = [safetensors.numpy.load_file(file) for file in folder.glob("*.safetensors")]
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


def test_what_comes_in_goes_out(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, source: pathlib.Path, tokenizer: Tokenizer
) -> None:
    code, shown, errors = run(capsys, "import", source, "smoke", "--run", tmp_path / "run", *SMALL)
    assert code == cli.DONE, errors
    tensors = read_all(source)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert f"{len(tensors)} tensors of {size:,} bytes in 2 files, every name, shape and type as its config" in shown
    (source / "config.json").unlink()  # from here on the run folder holds all there is
    code, shown, errors = run(capsys, "export", tmp_path / "run", "--to", tmp_path / "out", "--max-shard-size", "4KB")
    assert code == cli.DONE, errors
    files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert files > 2 and f"{len(tensors)} tensors of {size:,} bytes in {files} files, read back with equal val" in shown
    assert "logits that differ by at most 0.0e+00" in shown

    back = read_all(tmp_path / "out")
    assert back.keys() == tensors.keys()
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in tensors)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert (tmp_path / "out" / "source_chat_template.jinja").read_text() == "{{ the_source }}"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    own = {"eos_token_id": [tokenizer.end_id, 9, 11], "pad_token_id": tokenizer.pad_id}
    assert generation == SOURCE_GENERATION | own

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXTS[0], add_special_tokens=False).input_ids == tokenizer.encode(TEXTS[0], special=True)
    prompt = theirs.apply_chat_template([{"role": "user", "content": "3 + 4?"}], tokenize=False)
    assert prompt == "<|im_start|>user\n3 + 4?<|im_end|>\n"  # the form it is trained with, not the source's
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.temperature == 0.6


def test_an_export_in_a_narrower_type(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, source: pathlib.Path
) -> None:
    wide = [*SMALL, "--set", "ModelConfig.param_dtype=float32"]
    assert run(capsys, "import", source, "smoke", "--run", tmp_path / "run", *wide)[0] == cli.DONE
    code, _, errors = run(capsys, "export", tmp_path / "run", "--to", tmp_path / "out", "--dtype", "bfloat16")
    assert code == cli.DONE, errors
    tensors, back = read_all(source), read_all(tmp_path / "out")
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in tensors)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("tokenizer.json", "no tokenizer.json and no sentencepiece .model in "),
        ("config.json", "config.json is not there; give the path of a Hugging Face folder"),
        ("model-00002-of-00002.safetensors", "names 2 files, but model-00002-of-00002.safetensors is not there; fetch"),
        ("model.safetensors.index.json", "has neither model.safetensors nor model.safetensors.index.json; only safe"),
    ],
)
def test_a_folder_that_lacks_something_makes_no_run(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, source: pathlib.Path, lost: str, message: str
) -> None:
    (source / lost).unlink()
    code, _, shown = run(capsys, "import", source, "smoke", "--run", tmp_path / "run", *SMALL)
    assert (code, shown.count("\n")) == (cli.BAD_USAGE, 1), shown
    assert message in shown
    assert not (tmp_path / "run").exists()


def test_export_refuses_what_is_in_the_way(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, source: pathlib.Path
) -> None:
    assert run(capsys, "import", source, "smoke", "--run", tmp_path / "run", *SMALL)[0] == cli.DONE
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    code, _, shown = run(capsys, "export", tmp_path / "run", "--to", tmp_path / "notes")
    assert code == cli.BAD_USAGE and "notes exists and is no such export of jaxrl; choose another" in shown
    code, _, shown = run(capsys, "export", tmp_path / "run", "--to", tmp_path / "notes" / "mine.txt" / "model")
    assert code == cli.FAILED and "model cannot be written: " in shown
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("size", ["0", "0GB", "5XB", "-1MB", "many", "1.5GB"])
def test_a_size_that_is_none_is_bad_usage(capsys: pytest.CaptureFixture[str], size: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["export", "run", "--to", "out", f"--max-shard-size={size}"])
    assert exit_.value.code == cli.BAD_USAGE
    assert "is no size; write it as 500MB or 5GB" in capsys.readouterr().err


def run_measured(*arguments: Any) -> tuple[str, int]:
    """What a verb prints in a process of its own, and the most memory it had, in bytes."""
    command = [sys.executable, "-m", "jaxrl.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        shown = output.read()
    assert process.returncode == cli.DONE, shown[-3000:]
    return shown, 1024 * usage.ru_maxrss


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_model_of_published_width_goes_in_trains_a_step_and_comes_out(tmp_path: pathlib.Path) -> None:
    """Width, heads and vocabulary of Qwen3-1.7B, and so few layers that all of it fits into 12 GB."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = configuration.load("smoke")
    texts = [problem.question for problem in problems.load_split(config.data)[0]]
    architecture = transformers.Qwen3Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, rope_theta=1e6, max_position_embeddings=40_960,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    made.save_pretrained(tmp_path / "source", max_shard_size="700MB")
    count = made.num_parameters()
    del made
    train_sentencepiece(texts, 500).save(tmp_path / "source")
    overrides = (
        *OVERRIDES[:2],
        "ModelConfig.remat=full",
        "ModelConfig.logprob_chunk=64",
        "SftConfig.count=8",
        "SftConfig.steps=1",
        "SftConfig.rows=1",
        "SftConfig.row_tokens=384",
        "SftConfig.warmup_steps=0",
    )
    settings = [argument for override in overrides for argument in ("--set", override)]
    folder = tmp_path / "run"
    shown, peak = {}, {}
    shown["import"], peak["import"] = run_measured("import", tmp_path / "source", "smoke", "--run", folder, *settings)
    shown["sft"], peak["sft"] = run_measured("sft", "--run", folder)
    shown["export"], peak["export"] = run_measured(
        "export", folder, "--to", tmp_path / "out", "--max-shard-size", "700MB"
    )
    print(f"{count:,} parameters of two bytes; peak bytes: {peak}", *shown.values(), sep="\n")
    assert f"{count:,} parameters imported as bfloat16" in shown["import"]
    assert max(peak["import"], peak["export"]) < 5e9 and peak["sft"] < 12e9

    before, after = read_all(tmp_path / "source"), read_all(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in before.items()}
    moved = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    assert len(moved) > len(before) / 2
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.default_rng(0).integers(0, 500, (1, 12)).astype(np.int32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    model, params = hf.load_folder(tmp_path / "out")
    hidden = jax.jit(transformer.hidden_states, static_argnums=1)(
        params, model, tokens, np.arange(12, dtype=np.int32)[None], np.ones_like(tokens)
    )
    np.testing.assert_allclose(
        np.asarray(logprob.logits(params, model, hidden)), wanted, atol=1e-4 * np.abs(wanted).max()
    )
