"""config.json to ModelConfig and back."""

import dataclasses
import json
import math
import typing
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxrl.config import ConfigError, ModelConfig
from jaxrl.model import rotary
from jaxrl.model.config_json import check_exportable, config_from_hf, hf_config
from jaxrl.model.families import FAMILIES

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


def of_family(model_type: str, **changes: Any) -> dict[str, Any]:
    """QWEN3's sizes as another family, with only the keys that all families have."""
    sizes = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps",
    )  # fmt: skip
    return {"model_type": model_type, **{key: QWEN3[key] for key in sizes}, **changes}


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


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


def test_a_family_is_known_by_a_row_and_by_a_name_in_the_configuration() -> None:
    assert tuple(FAMILIES) == typing.get_args(typing.get_type_hints(ModelConfig)["family"])


def test_absent_keys_of_each_family() -> None:
    llama = config_from_hf(of_family("llama", num_key_value_heads=None))
    assert (llama.kv_heads, llama.head_width, llama.max_positions, llama.tie_embeddings) == (4, 8, 2048, False)
    mistral = config_from_hf(of_family("mistral"))
    assert (mistral.sliding_window, mistral.sliding_layers, mistral.rope_theta) == (4096, (0, 1, 2, 3), 1e4)
    gemma2 = config_from_hf(of_family("gemma2"))
    assert (gemma2.sliding_window, gemma2.sliding_layers) == (4096, (0, 2))
    assert (gemma2.attention_soft_cap, gemma2.logit_soft_cap, gemma2.score_width) == (50.0, 30.0, 0)
    assert (gemma2.head_width, gemma2.tie_embeddings, gemma2.local_rope_theta) == (256, True, 0.0)
    gemma3 = config_from_hf(of_family("gemma3_text", num_hidden_layers=8))
    assert gemma3.sliding_layers == (0, 1, 2, 3, 4, 6, 7)
    assert (gemma3.rope_theta, gemma3.local_rope_theta) == (1e6, 1e4)
    assert (gemma3.attention_soft_cap, gemma3.logit_soft_cap) == (0.0, 0.0)


def test_keys_of_one_family_only() -> None:
    gemma = {
        "query_pre_attn_scalar": 24, "attn_logit_softcapping": None, "final_logit_softcapping": 7, "sliding_window": 9,
    }  # fmt: skip
    found = config_from_hf(of_family("gemma2", **gemma))
    assert (found.score_width, found.attention_soft_cap, found.logit_soft_cap) == (24, 0.0, 7.0)
    assert found.sliding_window == 9
    assert config_from_hf(of_family("gemma3_text", sliding_window_pattern=3)).sliding_layers == (0, 1, 3)
    assert config_from_hf(of_family("mistral", sliding_window=None)).sliding_layers == ()
    moe = config_from_hf(of_family("qwen3_moe", **EXPERTS, use_sliding_window=False, sliding_window=4096))
    assert (moe.experts, moe.experts_per_token, moe.expert_width, moe.ffn_width) == (8, 3, 24, 48)
    assert not moe.normalize_expert_weights
    renamed = {**EXPERTS, "num_local_experts": EXPERTS["num_experts"], "norm_topk_prob": True}
    del renamed["num_experts"]
    assert config_from_hf(of_family("qwen3_moe", **renamed)) == dataclasses.replace(moe, normalize_expert_weights=True)
    assert config_from_hf(of_family("llama", attention_bias=True)).attention_bias
    assert not config_from_hf(of_family("mistral", attention_bias=True)).attention_bias


def test_scaled_rotary_frequencies_in_both_styles() -> None:
    found = config_from_hf(of_family("llama", rope_theta=500.0, rope_scaling=LLAMA3_SCALING))
    assert (found.rope_scaling, found.rope_theta, found.rope_factor) == ("llama3", 500.0, 8.0)
    assert (found.rope_low_frequency, rotary.high_frequency(found), found.rope_trained_positions) == (1.0, 4.0, 64)
    assert config_from_hf(of_family("llama", rope_parameters={**LLAMA3_SCALING, "rope_theta": 500.0})) == found
    linear = config_from_hf(of_family("qwen2", rope_scaling={"type": "linear", "factor": 4}))
    assert (linear.rope_scaling, linear.rope_factor, linear.rope_low_frequency) == ("linear", 4.0, 1.0)
    unsaid = {key: value for key, value in LLAMA3_SCALING.items() if key != "original_max_position_embeddings"}
    found = config_from_hf(of_family("llama", rope_scaling=unsaid, max_position_embeddings=99))
    assert found.rope_trained_positions == 99


def test_yarn_in_both_styles() -> None:
    as_qwen = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    found = config_from_hf(of_family("qwen2", rope_theta=1e6, rope_scaling=as_qwen))
    assert (found.rope_scaling, found.rope_factor, found.rope_trained_positions) == ("yarn", 4.0, 32_768)
    assert (found.rope_low_frequency, rotary.high_frequency(found), found.rope_attention_factor) == (1.0, 32.0, 0.0)
    newer = {"rope_theta": 1e6, "rope_type": "yarn", **{key: as_qwen[key] for key in list(as_qwen)[1:]}}
    assert config_from_hf(of_family("qwen2", rope_parameters={**newer, "truncate": True})) == found
    said = {**as_qwen, "beta_slow": 2, "beta_fast": 16.0, "attention_factor": 1.5}
    found = config_from_hf(of_family("qwen2", rope_scaling=said, max_position_embeddings=99))
    assert (found.rope_low_frequency, found.rope_high_frequency, found.rope_attention_factor) == (2.0, 16.0, 1.5)
    ratio = config_from_hf(of_family("llama", rope_scaling={**as_qwen, "mscale": 1.0, "mscale_all_dim": 0.5}))
    assert ratio.rope_attention_factor == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))


def test_gemmas_sliding_layers_in_both_styles() -> None:
    """The pattern of files without ``layer_types``, and the list, which wins; rotary tables of either style."""
    slides, full = "sliding_attention", "full_attention"
    for family, every in (("gemma2", 2), ("gemma3_text", 6)):
        sizes = {"num_hidden_layers": 12, "sliding_window": 9}
        usual = tuple(layer for layer in range(12) if (layer + 1) % every)
        kinds = [slides if layer in usual else full for layer in range(12)]
        old = {"rope_theta": 1e4}
        new: dict[str, Any] = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
        if family == "gemma3_text":
            old["rope_local_base_freq"] = 50.0
            new = {"rope_parameters": {full: new["rope_parameters"], slides: {"rope_theta": 50.0}}}
        wanted = config_from_hf(of_family(family, **sizes, **old))
        assert (wanted.sliding_window, wanted.sliding_layers) == (9, usual)
        for style in (old, new):
            assert config_from_hf(of_family(family, **sizes, **style, layer_types=kinds)) == wanted
            for key in ("sliding_window_pattern", "_sliding_window_pattern"):
                thirds = of_family(family, **sizes, **style, **{key: 3})
                assert config_from_hf(thirds).sliding_layers == (0, 1, 3, 4, 6, 7, 9, 10)
                assert config_from_hf({**thirds, "layer_types": kinds}) == wanted


def test_local_and_global_rotary_frequencies_in_both_styles() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = of_family("gemma3_text", rope_theta=1000, rope_local_base_freq=50, rope_scaling=scaling)
    new = of_family(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_theta": 1000.0, **scaling},
            "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"},
        },
    )
    assert config_from_hf(old) == config_from_hf(new)
    found = config_from_hf(new)
    assert (found.rope_theta, found.local_rope_theta) == (1000.0, 50.0)
    assert (found.rope_scaling, found.rope_factor) == ("linear", 8.0)


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
        ({"model_type": "mixtral"}, "model_type='mixtral'; the nearest that is supported is mistral .MistralFor"),
        ({"model_type": "gemma3"}, "nearest that is supported is gemma3_text .Gemma3ForCausalLM., of qwen2, qwen3, "),
        ({"model_type": ...}, "model_type=None; the nearest"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "only the language model Qwen3ForCausalLM"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "=.*longrope.*only linear, llama3 and yarn .*: use a"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate=False for yarn, which is not"),
        ({"rope_scaling": {"type": "yarn", "beta_fast": 8}}, "config.json has no factor; add it"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "low_freq_factor": 1}}, "low_freq_factor.*own keys"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling=.*dynamic.*set it to null if only short"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, "rope_scaling=.*beta_fast.*own keys"),
        ({"rope_scaling": {"type": "linear"}}, "config.json has no factor; add it"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "rope_parameters=.*mrope_section"),
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
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": -1}, "max_window_layers=-1"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0, which is not supported .only None"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0, which is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True, which is not supported"),
    ],
)
def test_refusals_name_key_value_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf(changed(**changes))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (of_family("qwen3_moe"), "config.json has no num_experts; add it"),
        (of_family("qwen3_moe", **EXPERTS, decoder_sparse_step=9), "decoder_sparse_step=9 .* none of 4 layers has exp"),
        (
            of_family("qwen3_moe", **EXPERTS, mlp_only_layers=[3, 2, 1, 0]),
            "none of 4 layers has experts; that is no qw",
        ),
        (of_family("qwen3_moe", **{**EXPERTS, "num_experts_per_tok": 9}), "num_experts_per_tok=9, but only 8 experts"),
        (of_family("qwen3_moe", **EXPERTS, sliding_window=9), "sliding_window=9, which is not supported"),
        (of_family("llama", sliding_window=8), "sliding_window=8, which is not supported .only None"),
        (of_family("llama", layer_types=["sliding_attention"] * 4), "sliding_window=None all layers of a llama are"),
        (
            of_family("mistral", layer_types=["sliding_attention", "full_attention"] * 2),
            "layers .0, 2. slide, but with sliding_window=None all layers of a mistral are alike; remove layer_types",
        ),
        (of_family("gemma2", hidden_activation="gelu"), "hidden_activation='gelu'.*only 'gelu_pytorch_tanh'"),
        (of_family("gemma2", use_bidirectional_attention=True), "use_bidirectional_attention=True, which is not"),
        (of_family("gemma2", final_logit_softcapping=-1.0), "final_logit_softcapping=-1.0; it must be a number above"),
        (of_family("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0, which is not supported"),
        (of_family("gemma3_text", query_pre_attn_scalar=0.5), "query_pre_attn_scalar=0.5; it must be a whole number"),
        (
            of_family("gemma3_text", rope_parameters={"rope_theta": 5.0}),
            "rope_parameters=.*a gemma3_text has one table for full_attention and one for sliding_attention",
        ),
        (
            of_family("gemma3_text", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
            "rope_parameters=.*linear.*of scaled rotary embeddings",
        ),
    ],
)
def test_refusals_of_one_family(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf(document)


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    """Any architecture that the decoder computes."""
    name = draw(st.sampled_from(sorted(FAMILIES)))
    family = FAMILIES[name]
    layers, kv_heads, groups = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 8))
    sets = {"never": st.just(set()), "always": st.sampled_from([set(), set(range(layers))])}
    sliding_layers = tuple(sorted(draw(sets.get(family.sliding, st.sets(st.integers(0, layers - 1))))))
    head_width, rope_theta = 2 * draw(st.integers(1, 128)), draw(st.floats(1e-3, 1e9))
    score_width = draw(st.integers(0, 300)) if family.score_width else 0
    local_rope_theta = draw(st.floats(1e-3, 1e9)) if family.local_rope_theta else 0.0
    assume(score_width != head_width and local_rope_theta != rope_theta)  # said without the field
    caps = st.just(0.0) | st.floats(0.1, 100.0)
    return ModelConfig(
        family=name,
        vocab_size=draw(st.integers(3, 200_000)),
        layers=layers,
        width=kv_heads * groups * draw(st.integers(1, 900)),
        query_heads=kv_heads * groups,
        kv_heads=kv_heads,
        head_width=head_width,
        ffn_width=draw(st.integers(1, 9000)),
        **(draw(expert_fields(layers)) if family.experts else {}),
        rope_theta=rope_theta,
        local_rope_theta=local_rope_theta,
        norm_eps=draw(st.floats(1e-12, 1e-2)),
        attention_bias=family.biases == "optional" and draw(st.booleans()),
        score_width=score_width,
        attention_soft_cap=draw(caps) if family.attention_soft_cap is not None else 0.0,
        logit_soft_cap=draw(caps) if family.logit_soft_cap is not None else 0.0,
        tie_embeddings=draw(st.booleans()),
        sliding_window=draw(st.integers(1, 10_000)) if sliding_layers else 0,
        sliding_layers=sliding_layers,
        max_positions=draw(st.integers(1, 10**6)),
        **draw(rope_scalings()),
    )


@st.composite
def expert_fields(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    """Fields of ModelConfig."""
    experts = draw(st.integers(1, 128))
    return {
        "dense_layers": tuple(sorted(draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1)))),
        "experts": experts,
        "experts_per_token": draw(st.integers(1, experts)),
        "expert_width": draw(st.integers(1, 2000)),
        "normalize_expert_weights": draw(st.booleans()),
    }


@st.composite
def rope_scalings(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of ModelConfig."""
    kind = draw(st.sampled_from(["none", "linear", "llama3", "yarn"]))
    factor = {"rope_factor": draw(st.floats(1.0, 64.0))} if kind != "none" else {}
    if kind == "yarn":
        factor["rope_attention_factor"] = draw(st.just(0.0) | st.floats(0.5, 2.0))
    if kind not in ("llama3", "yarn"):
        return {"rope_scaling": kind, **factor}
    low = draw(st.floats(0.5, 3.5))
    high = draw(st.just(0.0) | st.floats(0.5, 10.0).map(lambda more: low + more))
    usual = rotary.USUAL_HIGH_FREQUENCY[kind]
    turns = {"rope_low_frequency": low, "rope_high_frequency": 0.0 if high == usual else high}
    return {"rope_scaling": kind, **factor, **turns, "rope_trained_positions": draw(st.integers(1, 100_000))}


@settings(deadline=None)
@given(model_configs())
def test_round_trip(config: ModelConfig) -> None:
    assert config_from_hf(json.loads(json.dumps(hf_config(config)))) == config


@settings(deadline=None)
@given(model_configs())
def test_readers_without_layer_types_come_as_close_as_they_can(config: ModelConfig) -> None:
    """Exact where all layers from one on slide (Qwen), and where every n-th does not (Gemma)."""
    document = hf_config(config)
    if document.pop("layer_types", None) is None:
        return
    first = min(config.sliding_layers, default=config.layers)
    every = min(set(range(config.layers)) - set(config.sliding_layers), default=config.layers) + 1
    wanted = {
        "last": tuple(range(first, config.layers)),
        "most": tuple(layer for layer in range(config.layers) if (layer + 1) % every and config.sliding_layers),
    }
    assert config_from_hf(document).sliding_layers == wanted[FAMILIES[config.family].sliding]


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
    for fields, message in (
        (
            {"family": "qwen2", "attention_bias": True},
            r"attention_bias=True, but .* a qwen2 has False there; set it",
        ),
        ({"family": "llama", "attention_soft_cap": 5.0}, r"attention_soft_cap=5.0, but .* a llama has 0.0 there"),
        ({"family": "llama", "sliding_window": 5, "sliding_layers": (0,)}, r"sliding_window=5, but .*a llama has 0"),
        ({"family": "mistral", "sliding_window": 5, "sliding_layers": (0,)}, r"sliding_layers=.0,., but .*a mistral"),
        ({"family": "qwen3", "score_width": 5}, r"score_width=5, but .* a qwen3 has 0 there"),
        ({"family": "qwen3", "experts": 5}, r"experts=5, but .* a qwen3 has 0 there"),
        ({"family": "qwen3_moe"}, r"experts=0, but a qwen3_moe needs at least the experts_per_token=2 of one token; r"),
        ({"family": "gemma2", "local_rope_theta": 5.0}, r"local_rope_theta=5.0, but .* a gemma2 has 0.0 there"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_exportable(ModelConfig(vocab_size=8, **fields))


@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": [0, 3]}, (0, 3)),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (0, 1, 2)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": None}, (0, 1, 3)),
    ],
)
def test_layers_without_experts_are_those_of_transformers(keys: dict[str, Any], dense: tuple[int, ...]) -> None:
    """``Qwen3MoeDecoderLayer`` makes the same choice."""
    assert config_from_hf(of_family("qwen3_moe", **EXPERTS, **keys)).dense_layers == dense


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_scratch_needs_nothing_but_its_family_and_experts(family: str) -> None:
    check_exportable(ModelConfig(family=family, vocab_size=8, experts=4 if FAMILIES[family].experts else 0))


@settings(deadline=None)
@given(model_configs())
def test_transformers_reads_the_same(config: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CONFIG_MAPPING[config.family]
    again = theirs.from_dict(hf_config(config, dtype="bfloat16", eos_token_id=2))
    assert config_from_hf(again.to_dict()) == config
    assert str(again.dtype).removeprefix("torch.") == "bfloat16"
