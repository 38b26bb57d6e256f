"""``config.json`` of a Hugging Face folder to ``ModelConfig`` and back.

Both ways of writing it are read: that of transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``), in which
most published checkpoints come, and that of transformers 5 (``rope_parameters``, ``dtype``). The former is written,
because every reader knows it. A key that changes the computation in a way the decoder does not know is refused by name.
"""

import dataclasses
from typing import Any

from jaxrl.config import ConfigError, ModelConfig

Document = dict[str, Any]
"""A parsed config.json."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes a ``model_type``, with the default values that transformers gives absent keys.

    Attributes:
        architecture: class name in transformers, the language model with its output head.
        head_width: of a config.json without ``head_dim``; None divides the model width by the query heads.
        optional_bias: whether ``attention_bias`` means something; otherwise the family fixes its biases.
    """

    architecture: str
    head_width: int | None
    optional_bias: bool


FAMILIES = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", head_width=None, optional_bias=False),
    "qwen3": Family(architecture="Qwen3ForCausalLM", head_width=128, optional_bias=True),
}
"""By ``model_type`` in config.json, which is ``ModelConfig.family`` here."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "dual_chunk_attention_config": (None,),
    "use_mrope": (False, None),
    "vision_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
"""Keys that switch on something the decoder does not compute, and the values with which they switch on nothing."""

SLIDING, FULL = "sliding_attention", "full_attention"


def config_from_hf(document: Document, base: ModelConfig | None = None) -> ModelConfig:
    """The ``ModelConfig`` of a config.json.

    Args:
        document: the parsed file.
        base: gives the fields that config.json says nothing about (types, remat, chunks); the defaults when None.

    Raises:
        ConfigError: another model type or architecture, a feature that is not supported, a missing key, or a value
            that makes no sense. The message names the key, the value and the remedy.
    """
    family = _family(document)
    for key, neutral in NEUTRAL.items():
        if key in document and document[key] not in neutral:
            raise ConfigError(
                f"config.json has {key}={_short(document[key])}, which is not supported (only {_short(neutral[0])}); "
                "use a checkpoint without it"
            )
    width = _whole(document, "hidden_size")
    query_heads = _whole(document, "num_attention_heads")
    kv_heads = _whole(document, "num_key_value_heads", query_heads, absent_is_default=False)
    if query_heads % kv_heads:
        raise ConfigError(
            f"config.json has num_attention_heads={query_heads}, no multiple of num_key_value_heads={kv_heads}"
        )
    head_width = _whole(document, "head_dim", family.head_width or width // query_heads)
    if head_width % 2:
        raise ConfigError(f"config.json has head_dim={head_width}, but rotary embeddings turn pairs: it must be even")
    layers = _whole(document, "num_hidden_layers")
    window, sliding_layers = _sliding(document, layers)
    return dataclasses.replace(
        base or ModelConfig(),
        family=document["model_type"],
        vocab_size=_whole(document, "vocab_size"),
        layers=layers,
        width=width,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_width=head_width,
        ffn_width=_whole(document, "intermediate_size"),
        rope_theta=_rope_theta(document),
        norm_eps=_positive(document, "rms_norm_eps", 1e-6),
        attention_bias=family.optional_bias and _flag(document, "attention_bias"),
        tie_embeddings=_flag(document, "tie_word_embeddings"),
        sliding_window=window,
        sliding_layers=sliding_layers,
        max_positions=_whole(document, "max_position_embeddings", 32_768),
    )


def hf_config(
    config: ModelConfig,
    *,
    dtype: str | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> Document:
    """The config.json with which transformers (4.51 or newer) computes what the decoder computes.

    Args:
        dtype: type of the saved weights; ``config.param_dtype`` when None.
        bos_token_id, eos_token_id, pad_token_id: from the tokenizer; null in the file when None.

    Raises:
        ConfigError: the vocabulary size is not set, or the family has no such biases.
    """
    family = FAMILIES[config.family]
    if config.vocab_size < 1:
        raise ConfigError(f"ModelConfig.vocab_size={config.vocab_size} is not set; take it from the tokenizer first")
    if config.attention_bias and not family.optional_bias:
        raise ConfigError(
            f"ModelConfig.attention_bias=True, but the biases of {config.family} are fixed; set it to False"
        )
    sliding = set(config.sliding_layers) if config.sliding_window else set()
    first = min(sliding, default=config.layers)
    document = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": bool(sliding),
        "sliding_window": config.sliding_window if sliding else None,
        "max_window_layers": first,  # for readers that know no layer_types: right when all layers from here on slide
        "layer_types": [SLIDING if layer in sliding else FULL for layer in range(config.layers)],
        "initializer_range": config.init_scale,
        "use_cache": True,
        "torch_dtype": dtype or config.param_dtype,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if family.optional_bias:
        document["attention_bias"] = config.attention_bias
    return document


def _family(document: Document) -> Family:
    model_type = document.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"config.json has model_type={model_type!r}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    architectures = document.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise ConfigError(
            f"config.json has architectures={architectures}; only the language model {family.architecture} is supported"
        )
    return family


def _sliding(document: Document, layers: int) -> tuple[int, tuple[int, ...]]:
    """Window and sliding layers: by ``layer_types``, or where that is absent those from ``max_window_layers`` on."""
    slides = _flag(document, "use_sliding_window")
    window = 0
    if slides and document.get("sliding_window", 4096) is not None:
        window = _whole(document, "sliding_window", 4096)
    kinds = document.get("layer_types")
    if kinds is None:
        first = document.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise ConfigError(f"config.json has max_window_layers={first!r}; it must be a whole number of at least 0")
        kinds = [SLIDING if window and layer >= first else FULL for layer in range(layers)]
    if len(kinds) != layers:
        raise ConfigError(
            f"config.json has {len(kinds)} layer_types but num_hidden_layers={layers}; give one for each layer"
        )
    unknown = sorted({str(kind) for kind in kinds} - {SLIDING, FULL})
    if unknown:
        raise ConfigError(f"config.json has layer_types {', '.join(unknown)}; supported: {FULL}, {SLIDING}")
    sliding_layers = tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING)
    if sliding_layers and not window:
        raise ConfigError(
            f"config.json has layer_types with {SLIDING}, but use_sliding_window={slides} and "
            f"sliding_window={document.get('sliding_window')}; set both, or make every layer {FULL}"
        )
    return (window, sliding_layers) if sliding_layers else (0, ())


def _rope_theta(document: Document) -> float:
    """The base of the rotary frequencies, from either style; any scaling of them is refused."""
    theta = document
    for key in ("rope_scaling", "rope_parameters"):
        table = document.get(key) or {}
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default" or set(table) - {"rope_type", "type", "rope_theta"}:
            raise ConfigError(
                f"config.json has {key}={_short(table)}; scaled rotary embeddings are not supported: "
                "use a checkpoint without scaling, or set it to null if only short texts are wanted"
            )
        if "rope_theta" in table:
            theta = table
    return _positive(theta, "rope_theta", 10_000.0)


def _whole(document: Document, key: str, default: int | None = None, absent_is_default: bool = True) -> int:
    """A whole number of at least 1; ``default`` for null, and for an absent key unless told otherwise."""
    value = document.get(key)
    if value is None and default is not None and (absent_is_default or key in document):
        return default
    if key not in document:
        raise ConfigError(f"config.json has no {key}; add it")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json has {key}={value!r}; it must be a whole number of at least 1")
    return value


def _positive(document: Document, key: str, default: float) -> float:
    value = document.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"config.json has {key}={value!r}; it must be a number above 0")
    return float(value)


def _flag(document: Document, key: str) -> bool:
    value = document.get(key)
    if not isinstance(value, bool | None):
        raise ConfigError(f"config.json has {key}={value!r}; it must be true or false")
    return bool(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
