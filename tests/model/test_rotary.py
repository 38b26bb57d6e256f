"""Rotary frequencies against those of transformers, to the last bit."""

import dataclasses

import numpy as np
import pytest

from jaxrl.config import ConfigError, ModelConfig
from jaxrl.model.config_json import hf_config
from jaxrl.model.rotary import frequencies, lengths, rotation

CONFIG = ModelConfig(family="gemma3_text", vocab_size=8, layers=3, head_width=128, rope_theta=500_000.0)
LLAMA3 = dataclasses.replace(
    CONFIG, family="llama", rope_scaling="llama3", rope_factor=8.0, rope_low_frequency=1.0, rope_high_frequency=4.0
)


YARN = dataclasses.replace(
    CONFIG,
    family="llama",
    rope_scaling="yarn",
    rope_factor=4.0,
    rope_trained_positions=32_768,
)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, family="llama"),
        dataclasses.replace(CONFIG, family="llama", rope_scaling="linear", rope_factor=3.0),
        LLAMA3,
        dataclasses.replace(LLAMA3, head_width=64, rope_factor=32.0, rope_theta=10_000.0),
        YARN,
        dataclasses.replace(YARN, rope_theta=1e6),  # as Qwen2.5 and Qwen3 say it
        dataclasses.replace(YARN, rope_factor=40.0, rope_trained_positions=64, rope_attention_factor=1.25),
        dataclasses.replace(YARN, head_width=64, rope_low_frequency=3.0, rope_high_frequency=3.01, rope_factor=0.5),
    ],
)
def test_frequencies_are_those_of_transformers(config: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig.from_dict(hf_config(config))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    wanted = rotary.inv_freq.numpy()
    assert len(set(wanted)) == config.head_width // 2
    found = frequencies(config)
    # torch's power of 1e6 is a last bit away from the nearest number in one pair of 64.
    np.testing.assert_array_max_ulp(found, np.stack([wanted] * config.layers), int(config.rope_theta == 1e6))
    longer = [1.0] * config.layers if lengths(config) is None else lengths(config)
    np.testing.assert_array_equal(longer, np.float32([rotary.attention_scaling] * config.layers))


def test_llama3_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    plain = frequencies(dataclasses.replace(LLAMA3, rope_scaling="none"))[0]
    ratio = plain / frequencies(LLAMA3)[0]
    turns = LLAMA3.rope_trained_positions * plain / (2 * np.pi)
    assert (turns > 4).any() and (turns < 1).any()
    np.testing.assert_array_equal(ratio[turns > 4], 1)
    np.testing.assert_allclose(ratio[turns < 1], 8, rtol=1e-6)
    between = ratio[(turns < 4) & (turns > 1)]
    assert (np.diff(between) > 0).all() and 1 < between[0] < between[-1] < 8


@pytest.mark.parametrize(("scaling", "high"), [("llama3", 4.0), ("yarn", 32.0)])
def test_zero_is_the_usual_high_frequency_of_the_method(scaling: str, high: float) -> None:
    by_hand = dataclasses.replace(CONFIG, rope_scaling=scaling, rope_factor=4.0)
    assert ModelConfig().rope_high_frequency == 0
    found = frequencies(by_hand)
    np.testing.assert_array_equal(found, frequencies(dataclasses.replace(by_hand, rope_high_frequency=high)))
    assert (found != frequencies(dataclasses.replace(by_hand, rope_high_frequency=high + 1))).any()
    with pytest.raises(ConfigError, match=f"rope_low_frequency={high} must be below the {high} that .*='{scaling}'"):
        frequencies(dataclasses.replace(by_hand, rope_low_frequency=high))


def test_layers_that_slide_have_their_own_unscaled_base() -> None:
    config = dataclasses.replace(
        CONFIG,
        local_rope_theta=10_000.0,
        rope_scaling="linear",
        rope_factor=8.0,
        sliding_window=4,
        sliding_layers=(0, 2),
    )
    local, full, last = frequencies(config)
    np.testing.assert_array_equal(local, last)
    np.testing.assert_array_equal(local, frequencies(dataclasses.replace(CONFIG, rope_theta=10_000.0))[0])
    np.testing.assert_allclose(full, frequencies(CONFIG)[0] / 8, rtol=1e-6)
    same = dataclasses.replace(config, local_rope_theta=0.0)
    np.testing.assert_array_equal(frequencies(same), np.stack([full] * 3))


def test_yarn_lengthens_what_is_rotated_but_not_on_layers_with_a_base_of_their_own() -> None:
    config = dataclasses.replace(
        YARN, family="gemma3_text", local_rope_theta=1e4, sliding_window=4, sliding_layers=(0, 2)
    )
    usual = np.float32(0.1 * np.log(4.0) + 1)
    np.testing.assert_array_equal(lengths(config), [1, usual, 1])
    np.testing.assert_array_equal(lengths(dataclasses.replace(config, rope_attention_factor=1.5)), [1, 1.5, 1])
    np.testing.assert_array_equal(lengths(dataclasses.replace(config, local_rope_theta=0.0)), [usual] * 3)
    positions = np.arange(5)[None]
    cosine, sine = rotation(positions, frequencies(config)[1], usual)
    np.testing.assert_allclose(cosine**2 + sine**2, usual**2, rtol=1e-5)
