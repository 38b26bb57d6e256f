"""Frozen matrices in codes: how near they are, that they are stable, small, and the same model to everything else."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from jaxrl.config import ConfigError, MeshConfig, ModelConfig
from jaxrl.mesh import AXES, PARAM_RULES, ROLLOUT_RULES, Rules, make_mesh
from jaxrl.model import hf, lora, quantized
from jaxrl.model.logprob import sequence_logprobs
from jaxrl.model.spec import initialize
from jaxrl.model.transformer import param_specs
from tests.model.test_lora import CONFIG, POSITIONS, SEGMENTS, TOKENS, decoded_logprobs, random_adapters

MODEL = ModelConfig(
    family="qwen3_moe", vocab_size=40, layers=2, width=128, query_heads=4, kv_heads=2, head_width=32, ffn_width=96,
    experts=4, expert_width=48, init_scale=0.08,
)  # fmt: skip
DENSE = dataclasses.replace(MODEL, family="qwen2", experts=0)
score = jax.jit(sequence_logprobs, static_argnums=1)


def weights(model: ModelConfig) -> dict:
    return initialize(param_specs(model), jax.random.key(0))


def base(model: ModelConfig, kind: str) -> lora.Base:
    params, specs = weights(model), param_specs(model)["layers"]
    layers = {name: quantized.quantized(name, specs[name], leaf, kind) for name, leaf in params["layers"].items()}
    return lora.Base({**params, "layers": layers}, lora.scale_of(CONFIG))


@pytest.mark.parametrize(
    ("kind", "lengths", "rules", "message"),
    [
        (
            "nf4",
            {"fsdp": 4},
            PARAM_RULES,
            "'embed' of length 128 in 2 blocks of 64 .* fsdp = 4 .* 1, 2, or",
        ),
        ("int8", {"fsdp": 2, "expert": 2}, PARAM_RULES, "'int8': .*'embed' of length 128 .* fsdp x expert = 4 devices"),
        (
            "int8",
            {"tensor": 2},
            ROLLOUT_RULES,
            "down_proj.* 'ffn' of length 96 in 3 blocks of 32 .* 1, 3, or",
        ),
    ],
)
def test_a_mesh_that_cuts_through_blocks_is_refused(kind: str, lengths: dict, rules: Rules, message: str) -> None:
    """It would divide the matrices themselves."""
    mesh = jax.sharding.AbstractMesh(tuple(lengths.get(axis, 1) for axis in AXES), AXES)
    specs = param_specs(DENSE)
    with pytest.raises(ConfigError, match=message):
        quantized.check_blocks(quantized.quantized_specs(specs, kind), mesh, rules)
    quantized.check_blocks(specs, mesh, rules)


def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution() -> None:
    """Dettmers et al. 2023, equation 4, as their code has it: 8 levels above 0, 7 below, and 0, scaled to end at 1."""
    ends = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    above, below = norm.ppf(np.linspace(ends, 0.5, 9)[:-1]), -norm.ppf(np.linspace(ends, 0.5, 8)[:-1])
    levels = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(quantized.NF4, levels / levels.max(), atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_every_number_takes_its_nearest_level(kind: str) -> None:
    spec = param_specs(MODEL)["layers"]["expert_down"]  # [L, E, F, D]; blocks of 16 along F
    weight = weights(MODEL)["layers"]["expert_down"].at[0, 0, :16, 0].set(0.0)
    got = np.asarray(quantized.quantized("expert_down", spec, weight, kind).rounded(), np.float64)
    blocks = np.asarray(weight, np.float64).reshape(2, 4, 3, 16, 128)
    largest = np.asarray(jnp.abs(weight).reshape(2, 4, 3, 16, 128).max(axis=3).astype(jnp.bfloat16), np.float64)
    levels = np.array(quantized.NF4) if kind == "nf4" else np.arange(-127, 128) / 127
    possible = largest[:, :, :, None, :, None] * levels
    nearest = np.abs(blocks[..., None] - possible).min(axis=-1)
    error = np.abs(got.reshape(blocks.shape) - blocks)
    np.testing.assert_allclose(error, nearest, atol=1e-6)
    assert (got[0, 0, :16, 0] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_codes_are_the_same_again_after_a_folder_of_floats(kind: str, dtype: str) -> None:
    spec = dataclasses.replace(param_specs(MODEL)["layers"]["query"], dtype=jnp.dtype(dtype))
    generator = np.random.default_rng(1)
    for scale in (1e-6, 1.0, 3e4):
        weight = jnp.asarray(scale * generator.standard_t(2, size=spec.shape), dtype)
        once = quantized.quantized("query", spec, weight, kind)
        again = quantized.quantized("query", spec, once.rounded(), kind)
        jax.tree.map(np.testing.assert_array_equal, once, again)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("nf4", 4)])
def test_the_base_takes_the_bytes_it_should(kind: str, bits: int) -> None:
    model = dataclasses.replace(MODEL, head_width=64, expert_width=64, param_dtype="bfloat16")
    params, table = base(model, kind).params, quantized.quantized_specs(param_specs(model), kind)
    jax.tree.map(
        lambda leaf, spec: (leaf.shape, leaf.dtype) == (spec.shape, spec.dtype) or pytest.fail(), params, table
    )
    matrices = {"query", "key", "value", "output", "expert_gate", "expert_up", "expert_down"}
    in_codes = {name for name, leaf in params["layers"].items() if isinstance(leaf, quantized.Quantized)}
    assert in_codes == matrices
    numbers = sum(math.prod(param_specs(model)["layers"][name].shape) for name in matrices)
    held = sum(leaf.nbytes for name in matrices for leaf in jax.tree.leaves(params["layers"][name]))
    assert held == numbers * bits // 8 + numbers // 64 * 2


@pytest.mark.parametrize(("kind", "largest", "mean"), [("int8", 0.1, 0.02), ("nf4", 1.5, 0.3)])
@pytest.mark.parametrize("model", [DENSE, MODEL], ids=["dense", "experts"])
def test_logprobs_are_near_those_of_the_floats(model: ModelConfig, kind: str, largest: float, mean: float) -> None:
    floats = score(weights(model), model, TOKENS, POSITIONS, SEGMENTS).logprobs
    codes = score(base(model, kind).params, model, TOKENS, POSITIONS, SEGMENTS).logprobs
    difference = np.abs(np.asarray(codes - floats))
    assert 0 < difference.mean() < mean and difference.max() < largest, (difference.mean(), difference.max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_promise_1_decoding_training_and_the_merged_model_agree(kind: str, dtype: str) -> None:
    model = dataclasses.replace(MODEL, compute_dtype=dtype)
    frozen, adapters = base(model, kind), random_adapters(model, CONFIG)
    adapters = jax.tree.map(lambda leaf: 0.2 * leaf, adapters)
    params = frozen.adapted(adapters)
    trained = np.asarray(score(params, model, TOKENS, POSITIONS, SEGMENTS).logprobs)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(decoded_logprobs(params, model, 9), trained[:, 1:], atol=tolerance)
    if dtype == "float32":
        merged = frozen.merged(adapters)
        assert jax.tree.map(lambda leaf: leaf.shape, merged) == jax.tree.map(
            lambda leaf: leaf.shape, param_specs(model)
        )
        np.testing.assert_allclose(score(merged, model, TOKENS, POSITIONS, SEGMENTS).logprobs, trained, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_gradients_reach_the_adapters_as_through_floats(kind: str) -> None:
    adapters, codes = random_adapters(MODEL, CONFIG), base(MODEL, kind)
    floats = codes.replace(params=quantized.all_rounded(codes.params))

    @jax.jit
    def gradient(adapters: lora.Adapters, base: lora.Base) -> lora.Adapters:
        def total(adapters: lora.Adapters) -> jax.Array:
            return score(base.adapted(adapters), MODEL, TOKENS, POSITIONS, SEGMENTS).logprobs.sum()

        return jax.grad(total)(adapters)

    through_codes, through_floats = gradient(adapters, codes), gradient(adapters, floats)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(through_codes))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), through_codes, through_floats
    )


def test_a_copied_folder_is_read_into_the_same_codes(tmp_path: pathlib.Path) -> None:
    """One parameter after the other, on a mesh; the copy is the folder byte for byte, and whole or not there."""
    params, specs, mesh = weights(DENSE), param_specs(DENSE)["layers"], make_mesh(MeshConfig(), jax.devices()[:1])
    hf.save_folder(tmp_path / "source", DENSE, params, max_shard_bytes=200_000)
    hf.copy_folder(tmp_path / "source", tmp_path / "copy", also=lambda folder: (folder / "more").write_text("x"))
    for file in (tmp_path / "source").glob("*.safetensors*"):
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "copy" / "more").is_file()

    def keep(key: tuple[str, ...], weight: jax.Array) -> jax.Array | quantized.Quantized:
        with jax.set_mesh(mesh):
            return quantized.quantized(key[1], specs[key[1]], weight, "nf4") if key[0] == "layers" else weight

    _, found = hf.load_folder(tmp_path / "copy", mesh=mesh, keep=keep)
    wanted = {**params, "layers": base(DENSE, "nf4").params["layers"]}
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    with pytest.raises(ConfigError, match="neither model.safetensors nor"):
        hf.copy_folder(tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_in_codes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'head' of .*o_proj.weight has length 9; use 'int8'"):
        quantized.quantized_specs(param_specs(dataclasses.replace(MODEL, head_width=9)), "nf4")
