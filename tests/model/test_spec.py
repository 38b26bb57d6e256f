"""Everything derived from the parameter table."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import ModelConfig
from jaxrl.mesh import PARAM_RULES
from jaxrl.model.families import FAMILIES
from jaxrl.model.spec import ParamSpec, abstract, count, decay_mask, initialize, shardings
from jaxrl.model.transformer import param_specs

CONFIG = ModelConfig(vocab_size=24, layers=3, width=16, query_heads=4, kv_heads=2, head_width=6, ffn_width=20)


def test_a_linear_layer_is_stored_as_outputs_by_inputs() -> None:
    spec = param_specs(CONFIG)["layers"]["query"]
    assert spec.hf_shape == (4 * 6, 16)
    ours = np.arange(16 * 4 * 6).reshape(16, 4, 6)
    theirs = spec.to_hf(ours)
    assert theirs[2 * 6 + 5, 7] == ours[7, 2, 5]
    output = param_specs(CONFIG)["layers"]["output"]
    assert output.to_hf(np.arange(4 * 6 * 16).reshape(4, 6, 16))[9, 3 * 6 + 1] == (3 * 6 + 1) * 16 + 9


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_survives_the_way_to_hugging_face_and_back(family: str) -> None:
    experts = 5 if FAMILIES[family].experts else 0
    specs = param_specs(dataclasses.replace(CONFIG, family=family, tie_embeddings=False, experts=experts))
    for spec in jax.tree.leaves(specs):
        shape = spec.shape[len(spec.stacked_axes) :]
        array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        np.testing.assert_array_equal(spec.from_hf(spec.to_hf(array)), array)
        assert [f"{{{axis[:-1]}}}" in spec.hf_name for axis in spec.stacked_axes] == [True] * len(spec.stacked_axes)
        assert len(set(spec.hf_names.values())) == math.prod(spec.shape[: len(spec.stacked_axes)])


def test_the_tensors_of_experts_are_named_by_layer_and_expert() -> None:
    specs = param_specs(dataclasses.replace(CONFIG, family="qwen3_moe", experts=5))["layers"]
    assert specs["expert_down"].hf_names[2, 4] == "model.layers.2.mlp.experts.4.down_proj.weight"
    assert specs["router"].hf_names[2,] == "model.layers.2.mlp.gate.weight"
    assert specs["expert_down"].hf_shape == (16, CONFIG.expert_width)


def test_a_tensor_of_another_model_is_refused_by_name() -> None:
    spec = param_specs(CONFIG)["layers"]["gate"]
    with pytest.raises(ValueError, match=r"gate_proj.weight has shape \(20, 15\); .* makes it \(20, 16\)"):
        spec.from_hf(np.zeros((20, 15)))


def test_initial_values_depend_on_key_and_path_only() -> None:
    tied = initialize(param_specs(CONFIG), jax.random.key(3))
    untied = initialize(param_specs(dataclasses.replace(CONFIG, tie_embeddings=False)), jax.random.key(3))
    assert "head" in untied and "head" not in tied
    np.testing.assert_array_equal(tied["layers"]["down"], untied["layers"]["down"])
    assert float(jnp.std(tied["layers"]["up"])) == pytest.approx(CONFIG.init_scale, rel=0.1)
    assert not jnp.array_equal(tied["layers"]["up"], tied["layers"]["gate"])
    np.testing.assert_array_equal(tied["layers"]["ffn_norm"], 1.0)


def test_abstract_count_and_decay_agree_with_the_parameters() -> None:
    specs = param_specs(dataclasses.replace(CONFIG, family="qwen2"))
    params = initialize(specs, jax.random.key(0))
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert described == abstract(specs)
    assert count(specs) == sum(x.size for x in jax.tree.leaves(params))
    mask = decay_mask(specs)
    assert mask.pop("embedding") and not mask.pop("final_norm")
    decayed = {name for name, decays in mask["layers"].items() if decays}
    assert decayed == {"query", "key", "value", "output", "gate", "up", "down"}


def test_an_axis_that_cannot_be_split_is_named() -> None:
    mesh = jax.sharding.AbstractMesh((1, 1, 4), ("data", "fsdp", "tensor"))
    with pytest.raises(ValueError, match=r"k_proj.weight: axis 'kv_heads' of length 2 cannot be split over tensor = 4"):
        shardings({"key": param_specs(CONFIG)["layers"]["key"]}, mesh, PARAM_RULES)


def test_the_vocabulary_must_be_known() -> None:
    with pytest.raises(ValueError, match="vocab_size=0 is not set"):
        param_specs(ModelConfig())


def test_specs_are_leaves() -> None:
    assert all(isinstance(leaf, ParamSpec) for leaf in jax.tree.leaves(param_specs(CONFIG)))
