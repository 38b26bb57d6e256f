"""config.json to ModelConfig and back."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.config import ConfigError, ModelConfig
from jaxrl.model.families import FAMILIES, config_from_hf, hf_config

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
    "rope_theta": 1_000_000,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
}


def changed(**changes: Any) -> dict[str, Any]:
    """QWEN3 with other values; ``...`` leaves the key out."""
    return {key: value for key, value in {**QWEN3, **changes}.items() if value is not ...}


def test_every_field_comes_from_its_key() -> None:
    assert config_from_hf(QWEN3) == ModelConfig(
        family="qwen3",
        vocab_size=96,
        layers=4,
        width=32,
        query_heads=4,
        kv_heads=2,
        head_width=16,
        ffn_width=48,
        rope_theta=1e6,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_positions=512,
    )


def test_what_config_json_says_nothing_about_is_kept() -> None:
    base = ModelConfig(path="x", param_dtype="bfloat16", remat="full", logprob_chunk=7, sliding_window=3, layers=99)
    found = config_from_hf(QWEN3, base)
    assert (found.path, found.param_dtype, found.remat, found.logprob_chunk) == ("x", "bfloat16", "full", 7)
    assert (found.layers, found.sliding_window, found.sliding_layers) == (4, 0, ())


def test_both_styles_say_the_same() -> None:
    new = changed(
        rope_theta=..., rope_scaling=..., torch_dtype=..., dtype="bfloat16",
        rope_parameters={"rope_theta": 1_000_000.0, "rope_type": "default"},
    )  # fmt: skip
    assert config_from_hf(new) == config_from_hf(QWEN3)
    assert config_from_hf(changed(rope_scaling={"type": "default"})) == config_from_hf(QWEN3)


def test_defaults_of_absent_keys() -> None:
    sparse = changed(**dict.fromkeys(("head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings"), ...))
    found = config_from_hf(sparse)
    assert (found.head_width, found.norm_eps, found.rope_theta, found.tie_embeddings) == (128, 1e-6, 1e4, False)
    qwen2 = {**sparse, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    assert config_from_hf(qwen2).head_width == 32 // 4
    assert config_from_hf(changed(num_key_value_heads=None)).kv_heads == 4


def test_qwen2_has_its_own_biases_whatever_the_key_says() -> None:
    qwen2 = changed(model_type="qwen2", architectures=["Qwen2ForCausalLM"], attention_bias=True)
    assert not config_from_hf(qwen2).attention_bias
    assert config_from_hf(changed(attention_bias=True)).attention_bias


@pytest.mark.parametrize(
    ("keys", "window", "layers"),
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, 8, (3,)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8, (0, 1, 2, 3)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28}, 0, ()),
        ({"use_sliding_window": True, "sliding_window": ..., "max_window_layers": 2}, 4096, (2, 3)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 2}, 0, ()),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, 0, ()),
        ({"use_sliding_window": ..., "sliding_window": 8, "max_window_layers": 0}, 0, ()),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            8,
            (0, 2),
        ),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 4}, 0, ()),
    ],
)
def test_sliding_layers(keys: dict[str, Any], window: int, layers: tuple[int, ...]) -> None:
    found = config_from_hf(changed(**keys))
    assert (found.sliding_window, found.sliding_layers) == (window, layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'; supported: qwen2, qwen3"),
        ({"model_type": ...}, "model_type=None; supported"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "only the language model Qwen3ForCausalLM"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling=.*yarn.*not supported: use a checkpoint"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0, "factor": 2.0}}, "rope_parameters=.*linear"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters=.*full_attention"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', which is not supported .only 'silu'."),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1, which is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}, which is not supported"),
        ({"use_mrope": True}, "use_mrope=True, which is not supported"),
        ({"hidden_size": ...}, "config.json has no hidden_size; add it"),
        ({"num_key_value_heads": ...}, "config.json has no num_key_value_heads; add it"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4, no multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15.*must be even"),
        ({"vocab_size": "96"}, "vocab_size='96'; it must be a whole number of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0; it must be a whole number of at least 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0; it must be a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'; it must be true or false"),
        ({"layer_types": ["full_attention"]}, "1 layer_types but num_hidden_layers=4"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types linear_attention; supported: full_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "use_sliding_window=False.*make every layer full_attention"),
        ({"max_window_layers": -1}, "max_window_layers=-1"),
    ],
)
def test_refusals_name_key_value_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf(changed(**changes))


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    """Any architecture that the decoder computes."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    layers, kv_heads = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    sliding_layers = tuple(sorted(draw(st.sets(st.integers(0, layers - 1)))))
    return ModelConfig(
        family=family,
        vocab_size=draw(st.integers(3, 200_000)),
        layers=layers,
        width=draw(st.integers(1, 9000)),
        query_heads=kv_heads * draw(st.integers(1, 8)),
        kv_heads=kv_heads,
        head_width=2 * draw(st.integers(1, 128)),
        ffn_width=draw(st.integers(1, 9000)),
        rope_theta=draw(st.floats(1e-3, 1e9)),
        norm_eps=draw(st.floats(1e-12, 1e-2)),
        attention_bias=FAMILIES[family].optional_bias and draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        sliding_window=draw(st.integers(1, 10_000)) if sliding_layers else 0,
        sliding_layers=sliding_layers,
        max_positions=draw(st.integers(1, 10**6)),
    )


@settings(deadline=None)
@given(model_configs())
def test_round_trip(config: ModelConfig) -> None:
    assert config_from_hf(json.loads(json.dumps(hf_config(config)))) == config


@settings(deadline=None)
@given(model_configs())
def test_readers_without_layer_types_slide_from_the_first_sliding_layer_on(config: ModelConfig) -> None:
    document = hf_config(config)
    del document["layer_types"]
    found = config_from_hf(document)
    first = min(config.sliding_layers, default=config.layers)
    assert found.sliding_layers == tuple(range(first, config.layers))


def test_a_window_without_layers_is_no_window() -> None:
    config = ModelConfig(vocab_size=8, sliding_window=4)
    assert config_from_hf(hf_config(config)) == dataclasses.replace(config, sliding_window=0)


def test_export_carries_ids_and_type() -> None:
    document = hf_config(ModelConfig(vocab_size=8), dtype="bfloat16", eos_token_id=2, pad_token_id=0)
    assert (document["torch_dtype"], document["eos_token_id"], document["pad_token_id"]) == ("bfloat16", 2, 0)
    assert document["bos_token_id"] is None


def test_export_refuses_what_the_file_cannot_say() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=0 is not set; take it from the tokenizer"):
        hf_config(ModelConfig())
    with pytest.raises(ConfigError, match=r"attention_bias=True, but the biases of qwen2 are fixed"):
        hf_config(ModelConfig(family="qwen2", vocab_size=8, attention_bias=True))


@pytest.mark.parametrize("name", ["llama_plain", "gemma2", "mistral_sliding", "qwen3_moe"])
def test_published_configurations_of_other_models_are_refused(shared: pathlib.Path, name: str) -> None:
    document = json.loads((shared / "golden" / "models" / name / "config.json").read_text())
    with pytest.raises(ConfigError, match=rf"model_type='{document['model_type']}'; supported: qwen2, qwen3"):
        config_from_hf(document)


@settings(deadline=None)
@given(model_configs())
def test_transformers_reads_the_same(config: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[config.family]
    again = theirs.from_dict(hf_config(config, dtype="bfloat16", eos_token_id=2))
    assert config_from_hf(again.to_dict()) == config
    assert str(again.dtype).removeprefix("torch.") == "bfloat16"
