"""Import and export as one: the same tensors bit for bit; and no export takes its name that is not what it shall be."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxrl.config import ConfigError, ModelConfig
from jaxrl.model import compare, hf, tensor_files, transformer
from jaxrl.model.config_json import hf_config
from jaxrl.model.folders import write_json

UNTIED = ModelConfig(
    family="qwen3", vocab_size=12, layers=2, width=8, query_heads=2, kv_heads=1, head_width=4, ffn_width=6,
    tie_embeddings=False,
)  # fmt: skip
MODELS = {"untied": UNTIED, "tied": dataclasses.replace(UNTIED, family="qwen2", tie_embeddings=True)}


def random_tensors(config: ModelConfig, dtype: str, seed: int) -> dict[str, np.ndarray]:
    """A folder's tensors. Small and large values and both zeros are among them; infinities are not, nor NaN."""
    generator = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        values = generator.normal(size=shape) * 10.0 ** generator.integers(-6, 2, shape)
        return np.where(generator.random(shape) < 0.1, -0.0, values).astype(jnp.dtype(dtype))

    specs = jax.tree.leaves(transformer.param_specs(config))
    return {name: draw(spec.hf_shape) for spec in specs for name in spec.hf_names.values()}


def write_source(folder: pathlib.Path, config: ModelConfig, tensors: dict[str, np.ndarray], max_bytes: int) -> None:
    """A folder as somebody else would have written it."""
    folder.mkdir()
    write_json(folder / "config.json", hf_config(config))
    files = tensor_files.plan_files({name: tensor.nbytes for name, tensor in tensors.items()}, max_bytes)
    for number, names in enumerate(files):
        file = folder / tensor_files.file_name(number, len(files))
        safetensors.numpy.save_file({name: tensors[name] for name in names}, file)
    if len(files) > 1:
        tensor_files.write_index(folder, files, 0, 0)


def read_all(folder: pathlib.Path) -> dict[str, np.ndarray]:
    files = [safetensors.numpy.load_file(file) for file in folder.glob("*.safetensors")]
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


def assert_same_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].tobytes() == right[name].tobytes(), name


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    model=st.sampled_from(sorted(MODELS)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    max_bytes_in=st.integers(1, 3000),
    max_bytes_out=st.integers(1, 3000),
    seed=st.integers(0, 2**32 - 1),
)
def test_import_and_export_give_the_same_tensors_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, model: str, dtype: str, max_bytes_in: int, max_bytes_out: int, seed: int
) -> None:
    folder, tensors = tmp_path_factory.mktemp("trip"), random_tensors(MODELS[model], dtype, seed)
    write_source(folder / "in", MODELS[model], tensors, max_bytes_in)
    config, params = hf.load_folder(folder / "in")
    done = hf.save_folder(folder / "out", config, params, dtype=dtype, max_shard_bytes=max_bytes_out)
    assert_same_bits(read_all(folder / "out"), tensors)
    assert (done.tensors, done.bytes) == (len(tensors), sum(tensor.nbytes for tensor in tensors.values()))
    assert done.files == len(list((folder / "out").glob("*.safetensors")))
    assert done.logit_difference == 0


def spoiled(change: Callable[[dict[str, Any]], Any]) -> dict[str, np.ndarray]:
    tensors = random_tensors(UNTIED, "bfloat16", 0)
    change(tensors)
    return tensors


NORM, LAST = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("on_mesh", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: (t.pop(NORM), t.pop(LAST)), rf"missing tensors: {LAST} \(8, 6\), {NORM} \(8,\)\."),
        (lambda t: [t.pop(name) for name in list(t)[:9]], r"missing tensors: model.embed_tokens.* and 4 more\."),
        (lambda t: t.update(more=t[NORM]), r"tensors of another model: more \(8,\)\."),
        (lambda t: t.update({LAST: t[LAST].T.copy()}), rf"wrong shapes: {LAST} is \(6, 8\), wanted \(8, 6\)\."),
        (lambda t: t.update({LAST: t[LAST].astype(np.int64)}), rf"types other than F32, BF16, F16: {LAST} is I64\."),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_read(
    on_mesh: bool, change: Callable[[dict[str, Any]], Any], message: str, tmp_path: pathlib.Path
) -> None:
    write_source(tmp_path / "in", UNTIED, spoiled(change), 100)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor")) if on_mesh else None
    with pytest.raises(ConfigError, match=message):
        hf.load_folder(tmp_path / "in", mesh=mesh, on_bytes=lambda *_: pytest.fail("something was read"))


def test_eight_bit_floats_are_refused_by_name(tmp_path: pathlib.Path) -> None:
    write_source(tmp_path / "in", UNTIED, random_tensors(UNTIED, "bfloat16", 0), 10**9)
    file = tmp_path / "in" / tensor_files.WEIGHTS
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start, end = header[LAST]["data_offsets"]
    header[LAST] |= {"dtype": "F8_E4M3", "shape": [16, 6]}  # as many bytes as 8 x 6 of two bytes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert end - start == 16 * 6
    with pytest.raises(ConfigError, match=rf"types other than F32, BF16, F16: {LAST} is F8_E4M3"):
        hf.load_folder(tmp_path / "in")


# What is read back decides.


def numbers(config: ModelConfig) -> transformer.Params:
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda spec: generator.normal(size=spec.shape).astype(spec.dtype), transformer.param_specs(config)
    )


def test_a_config_that_describes_another_model_is_noticed(tmp_path: pathlib.Path) -> None:
    def spoil(folder: pathlib.Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**document, "rope_theta": 1.5 * document["rope_theta"]}))

    with pytest.raises(
        OSError, match=r"was written, but its logits differ by .* where the largest is .* there; nothing"
    ):
        hf.save_folder(tmp_path / "model", UNTIED, numbers(UNTIED), also=spoil)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bit_that_flips_on_its_way_is_noticed(
    dtype: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
        tensor_files.write_tensors(file, tensors)
        content = bytearray(file.read_bytes())
        content[-4] ^= 1  # the lowest bit of a value, whether it has two bytes or four
        file.write_bytes(content)

    monkeypatch.setattr(hf, "write_tensors", flip)
    with pytest.raises(OSError, match=r"was written, but [\w/]+ has other values there; nothing was kept"):
        hf.save_folder(tmp_path / "model", UNTIED, numbers(UNTIED), dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_values_are_rounded_before_anything_is_compiled_with_them(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that sees a cast there and back may drop both, and a correct export would look wrong."""
    seen: dict[str, set[str]] = {}

    def noted(name: str, position: int) -> None:
        function = getattr(compare, name)

        def note(*arguments: Any) -> Any:
            seen.setdefault(name, set()).update(str(leaf.dtype) for leaf in jax.tree.leaves(arguments[position]))
            return function(*arguments)

        monkeypatch.setattr(compare, name, note)

    noted("_same", 0)
    noted("_last_logits", 1)
    for dtype in ("bfloat16", "float16"):
        seen.clear()
        hf.save_folder(tmp_path / dtype, UNTIED, numbers(UNTIED), dtype=dtype)
        assert seen == {"_same": {dtype}, "_last_logits": {dtype}}


def test_progress_counts_all_bytes_of_every_pass(tmp_path: pathlib.Path) -> None:
    seen: list[tuple[str, int, int]] = []
    done = hf.save_folder(
        tmp_path / "m", UNTIED, numbers(UNTIED), max_shard_bytes=300, on_bytes=lambda *now: seen.append(now)
    )
    for what in ("written", "read back"):
        steps = [step for name, step, total in seen if name == what and total == done.bytes]
        assert len(steps) > 3 and steps == sorted(steps) and steps[-1] == done.bytes


# Writing that cannot begin, or is killed.

KILLED = """
import os, pathlib, signal, sys
from jaxrl.model import hf, tensor_files
folder, stage = pathlib.Path(sys.argv[1]), sys.argv[2]
config, params = hf.load_folder(folder / "old")
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def watch(what, done, total):
    if what == stage and done > total / 2:
        kill()
hf.save_folder(folder / "model", config, params, max_shard_bytes=300, on_bytes=watch)
"""


@pytest.mark.parametrize("stage", ["written", "read back"])
def test_a_killed_export_never_looks_complete(stage: str, tmp_path: pathlib.Path) -> None:
    hf.save_folder(tmp_path / "old", UNTIED, numbers(UNTIED))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(tmp_path), stage]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.partial", "old"]
    hf.save_folder(tmp_path / "model", UNTIED, numbers(UNTIED))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "old"]
    assert_same_bits(read_all(tmp_path / "model"), read_all(tmp_path / "old"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for target in (tmp_path / "file" / "model", pathlib.Path("/proc/model")):  # not even root writes there
        with pytest.raises(OSError, match=rf"{target} cannot be written: .*; choose another path or change its perm"):
            hf.save_folder(target, UNTIED, numbers(UNTIED))
