"""Promise 9: an exported folder gives the same logits in transformers, and its import the same parameters."""

import dataclasses
import errno
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxrl.config import ConfigError, ModelConfig
from jaxrl.model import folders, hf, logprob, tensor_files, transformer

TINY = ModelConfig(
    family="qwen3", vocab_size=24, layers=3, width=16, query_heads=4, kv_heads=2, head_width=6, ffn_width=20,
    rope_theta=300.0, tie_embeddings=False, sliding_window=3, sliding_layers=(0, 2), max_positions=64, init_scale=0.3,
)  # fmt: skip
VARIANTS = {
    "qwen3 untied, sliding": TINY,
    "qwen3 tied, biases": dataclasses.replace(
        TINY, tie_embeddings=True, attention_bias=True, sliding_window=0, sliding_layers=()
    ),
    "qwen2 tied, sliding": dataclasses.replace(TINY, family="qwen2", tie_embeddings=True, sliding_layers=(1, 2)),
    "qwen2 untied": dataclasses.replace(TINY, family="qwen2", sliding_window=0, sliding_layers=()),
    "llama scaled": dataclasses.replace(
        TINY, family="llama", sliding_window=0, sliding_layers=(), rope_scaling="llama3", rope_factor=4.0,
        rope_trained_positions=8, attention_bias=True,
    ),
    "mistral": dataclasses.replace(TINY, family="mistral", sliding_layers=(0, 1, 2)),
    "gemma2": dataclasses.replace(
        TINY, family="gemma2", tie_embeddings=True, score_width=10, attention_soft_cap=2.0, logit_soft_cap=5.0
    ),
    "gemma3": dataclasses.replace(
        TINY, family="gemma3_text", tie_embeddings=True, local_rope_theta=30.0, rope_scaling="linear", rope_factor=4.0
    ),
    "qwen3 moe": dataclasses.replace(
        TINY, family="qwen3_moe", sliding_window=0, sliding_layers=(), experts=5, experts_per_token=3, expert_width=12,
        normalize_expert_weights=False,
    ),
    "qwen3 moe, some dense": dataclasses.replace(
        TINY, family="qwen3_moe", sliding_window=0, sliding_layers=(), experts=5, expert_width=12, dense_layers=(1,)
    ),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 11)).astype(np.int32)


@functools.cache
def random_params(config: ModelConfig) -> transformer.Params:
    """Parameters in which nothing is 0 or 1, so that every tensor matters."""
    generator = np.random.default_rng(1)
    specs = transformer.param_specs(config)
    return jax.tree.map(lambda leaf: (0.5 * generator.normal(size=leaf.shape)).astype(leaf.dtype), specs)


def our_logits(config: ModelConfig, params: transformer.Params, first_position: int = 0) -> np.ndarray:
    """[B, T, V] of TOKENS, float32."""

    @jax.jit
    def compute(params: transformer.Params) -> jax.Array:
        positions = jnp.broadcast_to(first_position + jnp.arange(TOKENS.shape[1]), TOKENS.shape)
        hidden = transformer.hidden_states(params, config, jnp.asarray(TOKENS), positions, jnp.ones_like(TOKENS))
        return logprob.logits(params, config, hidden)

    return np.asarray(compute(params))


def their_model(folder: pathlib.Path) -> Any:
    """What transformers makes of a folder; it must use every tensor and invent none."""
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def their_logits(model: Any, first_position: int = 0) -> np.ndarray:
    torch = pytest.importorskip("torch")
    positions = first_position + torch.arange(TOKENS.shape[1])[None]
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long), position_ids=positions).logits.float().numpy()


def assert_same_bits(left: transformer.Params, right: transformer.Params) -> None:
    left, right = flax.traverse_util.flatten_dict(left, sep="/"), flax.traverse_util.flatten_dict(right, sep="/")
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes(), name


def write_folder(folder: pathlib.Path, config: ModelConfig = TINY, **options: Any) -> dict[str, np.ndarray]:
    """Export random parameters, for a test to spoil; returns the tensors of an unsharded folder."""
    hf.save_folder(folder, config, random_params(config), **options)
    return (
        safetensors.numpy.load_file(folder / tensor_files.WEIGHTS) if (folder / tensor_files.WEIGHTS).exists() else {}
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_promise_9_export_gives_the_same_logits_and_import_the_same_bits(variant: str, tmp_path: pathlib.Path) -> None:
    config = VARIANTS[variant]
    params = random_params(config)
    hf.save_folder(tmp_path / "model", config, params, eos_token_id=2, pad_token_id=0)
    theirs = their_model(tmp_path / "model")
    assert (theirs.config.eos_token_id, theirs.generation_config.pad_token_id) == (2, 0)
    np.testing.assert_allclose(our_logits(config, params), their_logits(theirs), atol=1e-4, rtol=0)
    found_config, found = hf.load_folder(tmp_path / "model")
    assert found_config == dataclasses.replace(config, init_scale=found_config.init_scale)
    assert_same_bits(found, params)


@pytest.mark.parametrize("variant", VARIANTS)
def test_promise_9_a_model_made_by_transformers(variant: str, tmp_path: pathlib.Path) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    hf.save_folder(tmp_path / "ours", VARIANTS[variant], random_params(VARIANTS[variant]))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path / "ours"), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = hf.load_folder(tmp_path / "theirs")
    np.testing.assert_allclose(our_logits(config, params), their_logits(theirs), atol=1e-4, rtol=0)
    hf.save_folder(tmp_path / "back", config, params)
    back = their_model(tmp_path / "back").state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


def test_logits_agree_at_far_positions(tmp_path: pathlib.Path) -> None:
    """The angle of a far position is large: a last-bit difference of a rotary frequency would move the logits."""
    config = dataclasses.replace(TINY, head_width=64, rope_theta=10_000.0, sliding_window=0, sliding_layers=())
    hf.save_folder(tmp_path / "model", config, random_params(config))
    theirs = their_logits(their_model(tmp_path / "model"), first_position=30_000)
    np.testing.assert_allclose(our_logits(config, random_params(config), 30_000), theirs, atol=5e-6, rtol=0)


def test_bfloat16_keeps_every_bit_and_agrees(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(VARIANTS["qwen2 tied, sliding"], param_dtype="bfloat16")
    params = random_params(config)
    hf.save_folder(tmp_path / "model", config, params)
    found_config, found = hf.load_folder(tmp_path / "model")
    assert found_config.param_dtype == "bfloat16"
    assert_same_bits(found, params)
    theirs = their_model(tmp_path / "model")
    assert str(theirs.dtype) == "torch.bfloat16"
    np.testing.assert_allclose(our_logits(found_config, found), their_logits(theirs.float()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_in_a_narrower_type(dtype: str, tmp_path: pathlib.Path) -> None:
    tensors = write_folder(tmp_path / "model", dtype=dtype)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {dtype}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == dtype
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), random_params(TINY))
    assert_same_bits(hf.load_folder(tmp_path / "model", "float32")[1], rounded)
    assert hf.load_folder(tmp_path / "model")[0].param_dtype == ("bfloat16" if dtype == "bfloat16" else "float32")


def test_mixed_types_are_read_without_loss(tmp_path: pathlib.Path) -> None:
    tensors = write_folder(tmp_path / "model", dtype="bfloat16")
    exact = np.full_like(tensors["model.norm.weight"], 1 / 3, dtype=np.float32)
    safetensors.numpy.save_file({**tensors, "model.norm.weight": exact}, tmp_path / "model" / tensor_files.WEIGHTS)
    config, params = hf.load_folder(tmp_path / "model")
    assert config.param_dtype == "float32"
    assert (params["final_norm"] == np.float32(1 / 3)).all()


def test_float16_overflow_is_refused(tmp_path: pathlib.Path) -> None:
    params = {**random_params(TINY), "final_norm": np.full(TINY.width, 1e5, np.float32)}
    with pytest.raises(ConfigError, match=r"model.norm.weight has values above 65504.*export as bfloat16"):
        hf.save_folder(tmp_path / "model", TINY, params, dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("max_shard_bytes", [1, 3000, 10**9])
def test_shards(max_shard_bytes: int, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    write_folder(folder, max_shard_bytes=max_shard_bytes)
    assert_same_bits(hf.load_folder(folder)[1], random_params(TINY))
    their_model(folder)
    shards = sorted(folder.glob("model*.safetensors"))
    sizes = {shard.name: safetensors.numpy.load_file(shard) for shard in shards}
    for tensors in sizes.values():
        assert len(tensors) == 1 or 0 < sum(tensor.nbytes for tensor in tensors.values()) <= max_shard_bytes
    if max_shard_bytes == 10**9:
        assert [shard.name for shard in shards] == [tensor_files.WEIGHTS]
        assert not (folder / tensor_files.INDEX).exists()
    else:
        index = json.loads((folder / tensor_files.INDEX).read_text())
        assert index["weight_map"] == {name: shard for shard, tensors in sizes.items() for name in tensors}
        total = sum(tensor.nbytes for tensors in sizes.values() for tensor in tensors.values())
        assert index["metadata"]["total_size"] == total
        assert len(shards) > 1


def test_arrays_on_a_device_are_exported(tmp_path: pathlib.Path) -> None:
    hf.save_folder(tmp_path / "model", TINY, jax.device_put(random_params(TINY)))
    assert_same_bits(hf.load_folder(tmp_path / "model")[1], random_params(TINY))


def test_generation_samples_as_the_policy_was_trained(tmp_path: pathlib.Path) -> None:
    write_folder(tmp_path / "model", eos_token_id=5, pad_token_id=0)
    generation = their_model(tmp_path / "model").generation_config
    assert (generation.do_sample, generation.temperature, generation.top_k, generation.top_p) == (True, 1.0, 0, 1.0)
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (5, 0, None)


# A folder with something wrong in it.


def rewrite(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[pathlib.Path], None]:
    """A spoiler of the tensors of a folder."""

    def spoil(folder: pathlib.Path) -> None:
        tensors = safetensors.numpy.load_file(folder / tensor_files.WEIGHTS)
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / tensor_files.WEIGHTS)

    return spoil


def set_config(**changes: Any) -> Callable[[pathlib.Path], None]:
    """A spoiler of config.json."""

    def spoil(folder: pathlib.Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**document, **changes}))

    return spoil


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rewrite(lambda t: t.pop(NORM)), rf"missing tensors: {NORM} \(16,\)"),
        (rewrite(lambda t: t.update(score=np.zeros((2, 3)))), r"tensors of another model: score \(2, 3\)"),
        (rewrite(lambda t: t.update({NORM: np.zeros((4, 4))})), rf"wrong shapes: {NORM} is \(4, 4\), wanted \(16,\)"),
        (rewrite(lambda t: t.update({NORM: np.zeros(16, np.int8)})), rf"F32, BF16, F16: {NORM} is I8"),
        (set_config(num_hidden_layers=2, layer_types=None), r"another model: model.layers.2.* and 6 more"),
        (set_config(vocab_size=32), r"model.embed_tokens.weight is \(24, 16\), wanted \(32, 16\)"),
        (
            set_config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
            r"does not hold the qwen2 .*missing tensors: .*q_proj.bias.*tensors of another model: .*q_norm",
        ),
        (
            set_config(model_type="qwen3_next"),
            r"model: config.json has model_type='qwen3_next'; the nearest .* is qwen3_moe ",
        ),
        (set_config(tie_word_embeddings=True), r"word_embeddings=true, but lm_head.weight differs from .*set it to"),
        (lambda folder: (folder / "config.json").unlink(), r"config.json is not there; give the path of a Hugging"),
        (lambda folder: (folder / "config.json").write_text("{,"), r"config.json is no JSON: .*line 1"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config.json holds no JSON object"),
        (
            lambda folder: (folder / tensor_files.WEIGHTS).unlink(),
            r"neither model.safetensors nor .*only safetensors are read",
        ),
        (
            lambda folder: (folder / tensor_files.WEIGHTS).write_bytes(b"\x08"),
            r"model.safetensors is damaged .*; fetch it again",
        ),
    ],
)
def test_every_fault_of_a_folder_is_named(
    spoil: Callable[[pathlib.Path], None], message: str, tmp_path: pathlib.Path
) -> None:
    write_folder(tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        hf.load_folder(tmp_path / "model")


def test_a_cut_off_file_is_damaged(tmp_path: pathlib.Path) -> None:
    write_folder(tmp_path / "model")
    content = (tmp_path / "model" / tensor_files.WEIGHTS).read_bytes()
    (tmp_path / "model" / tensor_files.WEIGHTS).write_bytes(content[:-10])
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
        hf.load_folder(tmp_path / "model")


def test_faults_of_shards_are_named(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    write_folder(folder, max_shard_bytes=3000)
    index = json.loads((folder / tensor_files.INDEX).read_text())
    shards = sorted(folder.glob("model-*"))
    (folder / tensor_files.INDEX).write_text(
        json.dumps({"weight_map": {**index["weight_map"], "more": shards[0].name}})
    )
    with pytest.raises(ConfigError, match=r"index.json names more, in no file; fetch the shards again"):
        hf.load_folder(folder)
    (folder / tensor_files.INDEX).write_text(json.dumps(index))
    second = shards[1].read_bytes()
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ConfigError, match=r"stands in two files"):
        hf.load_folder(folder)
    shards[1].write_bytes(second)
    hf.load_folder(folder)
    shards[1].unlink()
    with pytest.raises(ConfigError, match=rf"names \d+ files, but {shards[1].name} is not there; fetch what"):
        hf.load_folder(folder)


def test_a_tied_folder_may_hold_its_head_as_well(tmp_path: pathlib.Path) -> None:
    config = VARIANTS["qwen3 tied, biases"]
    tensors = write_folder(tmp_path / "model", config)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "model" / tensor_files.WEIGHTS)
    assert_same_bits(hf.load_folder(tmp_path / "model")[1], random_params(config))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused() -> None:
    hf.check_vocabulary(TINY, 24)
    hf.check_vocabulary(TINY, 20)
    with pytest.raises(ConfigError, match=r"vocab_size=24 is smaller than the tokenizer's 25 pieces; use"):
        hf.check_vocabulary(TINY, 25)


def test_parameters_of_another_configuration_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"head is \(24, 16\), wanted none"):
        hf.save_folder(tmp_path / "model", dataclasses.replace(TINY, tie_embeddings=True), random_params(TINY))
    with pytest.raises(ConfigError, match=r"layers/attention_norm is \(3, 16\), wanted \(2, 16\)"):
        hf.save_folder(tmp_path / "model", dataclasses.replace(TINY, layers=2, sliding_layers=()), random_params(TINY))
    with pytest.raises(ConfigError, match=r"cannot export as 'int8'; choose one of float32, bfloat16, float16"):
        hf.save_folder(tmp_path / "model", TINY, random_params(TINY), dtype="int8")
    assert not list(tmp_path.iterdir())


# Writing that fails, or is interrupted.


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_new_export_replaces_the_old_one_and_takes_further_files(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    write_folder(folder, VARIANTS["qwen2 untied"], max_shard_bytes=3000)
    write_folder(folder, also=lambda staging: (staging / "tokenizer.json").write_text("{}"))
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert set(content(folder)) == {*names, folders.MANIFEST}
    assert hf.load_folder(folder)[0].family == "qwen3"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


class DiskFull:
    """Stands in for a writer and lets so many calls through before the disk is full."""

    def __init__(self, write: Callable[..., Any], calls: int, error: Exception) -> None:
        self.write, self.calls, self.error = write, calls, error

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return self.write(*arguments, **options)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("error", [FULL, safetensors.SafetensorError("I/O error: No space left"), KeyboardInterrupt()])
def test_a_full_disk_leaves_the_old_folder_and_nothing_else(
    before: bool, calls: int, error: Exception, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    if before:
        write_folder(folder, VARIANTS["qwen2 untied"])
    old = content(tmp_path)
    monkeypatch.setattr(safetensors.numpy, "save_file", DiskFull(safetensors.numpy.save_file, calls, error))
    with pytest.raises((OSError, KeyboardInterrupt), match=r"No space left|^$"):
        hf.save_folder(folder, TINY, random_params(TINY), max_shard_bytes=3000)
    assert content(tmp_path) == old
    assert len(list(tmp_path.iterdir())) == before


def test_a_full_disk_in_the_tokenizer_files_leaves_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "model", also=DiskFull(print, 0, FULL))
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_seen_before_writing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError, match=r"needs \d+ bytes but its disk has \d+ free; make room or choose another path"):
        with folders.replaced_folder(tmp_path / "model", needed_bytes=10**18):
            pytest.fail("entered")
    assert not list(tmp_path.iterdir())


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    write_folder(folder)
    old = content(tmp_path)
    rename = pathlib.Path.rename

    def fail_once(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, "broken")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail_once)
    with pytest.raises(OSError, match="broken"):
        write_folder(folder, VARIANTS["qwen2 untied"])
    assert content(tmp_path) == old


def test_what_a_killed_process_left_is_cleared_or_put_back(tmp_path: pathlib.Path) -> None:
    folder, partial, previous = (tmp_path / name for name in ("model", ".model.partial", ".model.previous"))
    write_folder(folder)
    old = content(folder)
    folder.rename(previous)
    partial.mkdir()
    (partial / "half").write_text("")
    with pytest.raises(RuntimeError), folders.replaced_folder(folder):
        assert content(folder) == old
        raise RuntimeError
    assert content(tmp_path) == {f"model/{name}": data for name, data in old.items()}


def test_what_is_no_export_is_never_replaced(tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ConfigError, match=r"exists and is no (such export of jaxrl|folder); choose"):
            hf.save_folder(path, TINY, random_params(TINY))
    assert content(tmp_path) == {"notes.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty")
    assert (tmp_path / "empty" / tensor_files.WEIGHTS).is_file()


@pytest.mark.parametrize("foreign", ["README.md", "onnx/model.onnx", "checkpoints/"])
def test_an_export_to_which_something_was_added_is_not_replaced(foreign: str, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    write_folder(folder)
    if foreign.endswith("/"):
        (folder / foreign).mkdir()
    else:
        (folder / foreign).parent.mkdir(exist_ok=True)
        (folder / foreign).write_text("mine")
    before = content(folder)
    message = rf"holds '{foreign.rstrip('/')}', which no export wrote; choose another path or move it"
    with pytest.raises(ConfigError, match=message):
        write_folder(folder)
    assert content(folder) == before
    assert (folder / foreign).exists()


def test_a_model_of_others_is_not_replaced_though_all_its_files_are_of_an_export(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "Qwen3"
    write_folder(folder)
    (folder / folders.MANIFEST).unlink()
    with pytest.raises(ConfigError, match="exists and is no such export of jaxrl"):
        write_folder(folder)
