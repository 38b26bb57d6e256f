"""``config.json`` of a Hugging Face folder to ``ModelConfig`` and back, as the rows of ``families`` say.

Both ways of writing it are read: that of transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``), in which
most published checkpoints come, and that of transformers 5 (``rope_parameters``, ``dtype``). The former is written,
because every reader knows it. A key that changes the computation in a way the decoder does not know is refused by name.
"""

import dataclasses
import difflib
import itertools
from typing import Any

from jaxrl.config import ConfigError, ModelConfig
from jaxrl.model.families import FAMILIES, Family
from jaxrl.model.rotary import USUAL_HIGH_FREQUENCY, high_frequency, yarn_length

Document = dict[str, Any]
"""A parsed config.json."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "dual_chunk_attention_config": (None,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
    "vision_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
"""Keys that switch on something the decoder does not compute, and the values with which they switch on nothing."""

SCALINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low_frequency",
        "high_freq_factor": "rope_high_frequency",
        "original_max_position_embeddings": "rope_trained_positions",
    },
    "yarn": {
        "factor": "rope_factor",
        "beta_slow": "rope_low_frequency",
        "beta_fast": "rope_high_frequency",
        "original_max_position_embeddings": "rope_trained_positions",
    },
}
"""Kinds of scaled rotary embeddings, each with its keys and the fields of ``ModelConfig`` that hold them."""

USUAL = {"beta_slow": 1.0, "beta_fast": USUAL_HIGH_FREQUENCY["yarn"]}
"""Values of keys of those that may be absent."""

ATTENTION_KEYS = ("attention_factor", "mscale", "mscale_all_dim", "truncate")
"""Further keys of yarn."""

EXPERT_KEYS = {
    "num_experts": "experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_width",
    "norm_topk_prob": "normalize_expert_weights",
}
"""Keys of families with experts, and the fields of ``ModelConfig`` that hold them."""

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
    _refuse_unknown_features(document, family)
    width = _whole(document, "hidden_size")
    query_heads = _whole(document, "num_attention_heads")
    kv_heads = _whole(document, "num_key_value_heads", query_heads, absent_is_default=family.all_kv_heads)
    if query_heads % kv_heads:
        raise ConfigError(
            f"config.json has num_attention_heads={query_heads}, no multiple of num_key_value_heads={kv_heads}"
        )
    head_width = _whole(document, "head_dim", family.head_width or width // query_heads)
    if head_width % 2:
        raise ConfigError(f"config.json has head_dim={head_width}, but rotary embeddings turn pairs: it must be even")
    layers = _whole(document, "num_hidden_layers")
    window, sliding_layers = _sliding(document, family, layers)
    config = dataclasses.replace(
        base or ModelConfig(),
        family=document["model_type"],
        vocab_size=_whole(document, "vocab_size"),
        layers=layers,
        width=width,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_width=head_width,
        ffn_width=_whole(document, "intermediate_size"),
        **(_experts(document, layers) if family.experts else {"experts": 0, "dense_layers": ()}),
        norm_eps=_positive(document, "rms_norm_eps", 1e-6),
        attention_bias=family.biases == "optional" and _flag(document, "attention_bias"),
        score_width=_whole(document, "query_pre_attn_scalar", family.score_width) if family.score_width else 0,
        attention_soft_cap=_soft_cap(document, "attn_logit_softcapping", family.attention_soft_cap),
        logit_soft_cap=_soft_cap(document, "final_logit_softcapping", family.logit_soft_cap),
        tie_embeddings=_flag(document, "tie_word_embeddings", family.tied),
        sliding_window=window,
        sliding_layers=sliding_layers,
        max_positions=_whole(document, "max_position_embeddings", family.max_positions),
        **_rope(document, family),
    )
    return _canonical(config)


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
        ConfigError: the vocabulary size is not set, or the family's models have no feature that ``config`` has.
    """
    family = FAMILIES[config.family]
    if config.vocab_size < 1:
        raise ConfigError(f"ModelConfig.vocab_size={config.vocab_size} is not set; take it from the tokenizer first")
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
        family.activation_key: family.activation,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_scale,
        "use_cache": True,
        "torch_dtype": dtype or config.param_dtype,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        **_rope_keys(config, family),
        **_sliding_keys(config, family),
    }
    if family.experts:
        document |= _expert_keys(config)
    if family.biases == "optional":
        document["attention_bias"] = config.attention_bias
    if family.score_width:
        document["query_pre_attn_scalar"] = config.score_width or config.head_width
    if family.attention_soft_cap is not None:
        document["attn_logit_softcapping"] = config.attention_soft_cap or None
    if family.logit_soft_cap is not None:
        document["final_logit_softcapping"] = config.logit_soft_cap or None
    _check_says(document, config)
    return document


def check_exportable(config: ModelConfig) -> None:
    """Refuse an architecture that no config.json of its family describes, before it is trained.

    Raises:
        ConfigError: naming the field, its value, and what the family makes of it.
    """
    hf_config(config)


def _check_says(document: Document, config: ModelConfig) -> None:
    """Read the document again: whatever it cannot say comes out differently."""
    wanted, found = _canonical(config), config_from_hf(document, config)
    for field in dataclasses.fields(ModelConfig):
        want, have = getattr(wanted, field.name), getattr(found, field.name)
        if want != have:
            raise ConfigError(
                f"ModelConfig.{field.name}={want!r}, but with its other fields a {config.family} has {have!r} there; "
                "set it so, or choose another family"
            )


def _canonical(config: ModelConfig) -> ModelConfig:
    """The same architecture with fields that have no effect at their defaults."""
    neutral = {}
    if not config.experts:
        neutral = {name: getattr(ModelConfig, name) for name in (*EXPERT_KEYS.values(), "dense_layers")}
    if not (config.sliding_window and config.sliding_layers):
        neutral |= {"sliding_window": 0, "sliding_layers": ()}
    if config.score_width == config.head_width:
        neutral["score_width"] = 0
    used = SCALINGS["default" if config.rope_scaling == "none" else config.rope_scaling].values()
    for name in set(SCALINGS["llama3"].values()) - set(used):
        neutral[name] = getattr(ModelConfig, name)
    if config.rope_scaling != "yarn":
        neutral["rope_attention_factor"] = 0.0
    if config.rope_high_frequency == USUAL_HIGH_FREQUENCY.get(config.rope_scaling):
        neutral["rope_high_frequency"] = 0.0
    if config.local_rope_theta == config.rope_theta and config.rope_scaling == "none":
        neutral["local_rope_theta"] = 0.0
    return dataclasses.replace(config, **neutral)


def _family(document: Document) -> Family:
    model_type = document.get("model_type")
    if model_type not in FAMILIES:
        nearest = max(FAMILIES, key=lambda name: _likeness(name, str(model_type)))
        raise ConfigError(
            f"config.json has model_type={model_type!r}; the nearest that is supported is {nearest} "
            f"({FAMILIES[nearest].architecture}), of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    architectures = document.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise ConfigError(
            f"config.json has architectures={architectures}; only the language model {family.architecture} is supported"
        )
    return family


def _likeness(left: str, right: str) -> tuple[int, float]:
    """Names that begin alike come first: those of a family's generations do."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return len(list(same)), difflib.SequenceMatcher(None, left, right).ratio()


def _refuse_unknown_features(document: Document, family: Family) -> None:
    neutral = NEUTRAL | {family.activation_key: (family.activation, None)}
    if family.sliding == "never" and document.get("use_sliding_window", True):
        neutral["sliding_window"] = (None,)
    if family.attention_soft_cap is None:
        neutral["attn_logit_softcapping"] = (None,)
    if family.logit_soft_cap is None:
        neutral["final_logit_softcapping"] = (None,)
    for key, values in neutral.items():
        if key in document and document[key] not in values:
            raise ConfigError(
                f"config.json has {key}={_short(document[key])}, which is not supported (only {_short(values[0])}); "
                "use a checkpoint without it"
            )


def _experts(document: Document, layers: int) -> dict[str, Any]:
    """The fields of the experts; transformers 5 calls their number ``num_local_experts``.

    A layer has experts if its number, counted from 1, is a multiple of ``decoder_sparse_step``, unless
    ``mlp_only_layers`` names it, counted from 0.
    """
    experts = _whole(document, "num_local_experts" if "num_local_experts" in document else "num_experts")
    per_token = _whole(document, "num_experts_per_tok")
    if per_token > experts:
        raise ConfigError(f"config.json has num_experts_per_tok={per_token}, but only {experts} experts; lower it")
    step, named = _whole(document, "decoder_sparse_step", 1), document.get("mlp_only_layers") or []
    dense = tuple(layer for layer in range(layers) if (layer + 1) % step or layer in named)
    if len(dense) == layers:
        raise ConfigError(
            f"config.json has decoder_sparse_step={step} and mlp_only_layers={_short(named)}, with which none of "
            f"{layers} layers has experts; that is no {document['model_type']}"
        )
    return {
        "dense_layers": dense,
        "experts": experts,
        "experts_per_token": per_token,
        "expert_width": _whole(document, "moe_intermediate_size"),
        "normalize_expert_weights": _flag(document, "norm_topk_prob"),
    }


def _expert_keys(config: ModelConfig) -> Document:
    """What ``_experts`` reads."""
    if not 1 <= config.experts_per_token <= config.experts:
        raise ConfigError(
            f"ModelConfig.experts={config.experts}, but a {config.family} needs at least the "
            f"experts_per_token={config.experts_per_token} of one token; raise experts"
        )
    keys = {key: getattr(config, field) for key, field in EXPERT_KEYS.items()}
    dense = list(config.dense_layers)
    return {**keys, "decoder_sparse_step": 1, "mlp_only_layers": dense, "output_router_logits": False}


def _sliding(document: Document, family: Family, layers: int) -> tuple[int, tuple[int, ...]]:
    """Window and sliding layers: by ``layer_types``, or where that is absent as the family does."""
    slides = {"never": False, "last": _flag(document, "use_sliding_window")}.get(family.sliding, True)
    window = 0
    if slides and document.get("sliding_window", family.sliding_window) is not None:
        window = _whole(document, "sliding_window", family.sliding_window)
    usual = _usual_layers(document, family, layers) if window else set()
    kinds = document.get("layer_types") or [SLIDING if layer in usual else FULL for layer in range(layers)]
    if len(kinds) != layers:
        raise ConfigError(
            f"config.json has {len(kinds)} layer_types but num_hidden_layers={layers}; give one for each layer"
        )
    unknown = sorted({str(kind) for kind in kinds} - {SLIDING, FULL})
    if unknown:
        raise ConfigError(f"config.json has layer_types {', '.join(unknown)}; supported: {FULL}, {SLIDING}")
    sliding_layers = tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING)
    if family.sliding in ("never", "always") and set(sliding_layers) != usual:
        raise ConfigError(
            f"config.json has layer_types in which layers {_short(sliding_layers)} slide, but with sliding_window="
            f"{document.get('sliding_window')} all layers of a {document['model_type']} are alike; remove layer_types"
        )
    if sliding_layers and not window:
        raise ConfigError(
            f"config.json has layer_types with {SLIDING}, but use_sliding_window={slides} and "
            f"sliding_window={document.get('sliding_window')}; set both, or make every layer {FULL}"
        )
    return (window, sliding_layers) if sliding_layers else (0, ())


def _usual_layers(document: Document, family: Family, layers: int) -> set[int]:
    """Layers that slide, if there is a window, when the file does not list them."""
    match family.sliding:
        case "always":
            return set(range(layers))
        case "last":
            first = document.get("max_window_layers", 28)
            if not isinstance(first, int) or isinstance(first, bool) or first < 0:
                raise ConfigError(
                    f"config.json has max_window_layers={first!r}; it must be a whole number of at least 0"
                )
            return set(range(first, layers))
        case "most":
            named = [key for key in ("sliding_window_pattern", "_sliding_window_pattern") if key in document]
            every = _whole(document, named[0], family.full_every) if named else family.full_every
            return {layer for layer in range(layers) if (layer + 1) % every}
    return set()


def _sliding_keys(config: ModelConfig, family: Family) -> Document:
    """What ``_sliding`` reads, for readers that know ``layer_types`` and for those that do not."""
    sliding = set(config.sliding_layers) if config.sliding_window else set()
    window = {"sliding_window": config.sliding_window if sliding else None}
    kinds = {"layer_types": [SLIDING if layer in sliding else FULL for layer in range(config.layers)]}
    match family.sliding:
        case "always":
            return window
        case "last":
            first = min(sliding, default=config.layers)
            return {"use_sliding_window": bool(sliding), "max_window_layers": first, **window, **kinds}
        case "most":
            every = min(set(range(config.layers)) - sliding, default=config.layers) + 1
            width = config.sliding_window or family.sliding_window
            # transformers makes the mask of the sliding layers even where there are none, and does not run with null
            return {"sliding_window_pattern": every, "sliding_window": width, **kinds}
    return {}


def _rope(document: Document, family: Family) -> dict[str, Any]:
    """The fields of the rotary frequencies, from either style."""
    key = "rope_scaling" if document.get("rope_scaling") else "rope_parameters"
    table = document.get(key) or {}
    local: Document = {"rope_theta": document.get("rope_local_base_freq")}
    if family.local_rope_theta and key == "rope_parameters" and table:
        unknown = set(table) - {FULL, SLIDING}
        if unknown:
            raise ConfigError(
                f"config.json has rope_parameters={_short(table)}; a {document['model_type']} has one table for "
                f"{FULL} and one for {SLIDING}"
            )
        table, local = table.get(FULL) or {}, table.get(SLIDING) or {}
    kind = table.get("rope_type", table.get("type", "default"))
    local_kind = local.get("rope_type", "default")
    known = {"rope_type", "type", "rope_theta", *SCALINGS.get(kind, {}), *(ATTENTION_KEYS if kind == "yarn" else ())}
    if kind not in SCALINGS or set(table) - known or local_kind != "default":
        raise ConfigError(
            f"config.json has {key}={_short(document[key])}; of scaled rotary embeddings only linear, llama3 and yarn "
            "are supported, with their own keys: use a checkpoint without, or set it to null if only short texts are "
            "wanted"
        )
    fields: dict[str, Any] = {"rope_scaling": "none" if kind == "default" else kind}
    for name, field in SCALINGS[kind].items():
        if name == "original_max_position_embeddings":
            fields[field] = _whole(table, name, document.get("max_position_embeddings"))
        else:
            fields[field] = _positive(table, name, USUAL.get(name))
    fields["rope_attention_factor"] = _attention_factor(table) if kind == "yarn" else 0.0
    fields["rope_theta"] = _positive(table if "rope_theta" in table else document, "rope_theta", family.rope_theta)
    fields["local_rope_theta"] = 0.0
    if family.local_rope_theta:
        fields["local_rope_theta"] = _positive(local, "rope_theta", family.local_rope_theta)
    return fields


def _attention_factor(table: Document) -> float:
    """Of yarn; 0 for the usual one."""
    if table.get("truncate") not in (None, True):
        raise ConfigError(
            f"config.json has truncate={table['truncate']!r} for yarn, which is not supported (only True); use a "
            "checkpoint without it"
        )
    if table.get("attention_factor") is not None:
        return _positive(table, "attention_factor")
    if table.get("mscale") and table.get("mscale_all_dim"):
        ours, whole = (yarn_length(_positive(table, "factor"), _positive(table, key)) for key in ATTENTION_KEYS[1:3])
        return ours / whole
    return 0.0


def _rope_keys(config: ModelConfig, family: Family) -> Document:
    """What ``_rope`` reads."""
    scaling = None
    if config.rope_scaling != "none":
        fields = vars(config)
        if config.rope_scaling in USUAL_HIGH_FREQUENCY:
            fields = fields | {"rope_high_frequency": high_frequency(config)}
        numbers = {key: fields[field] for key, field in SCALINGS[config.rope_scaling].items()}
        scaling = {"rope_type": config.rope_scaling, **numbers}
        if config.rope_scaling == "yarn" and config.rope_attention_factor:
            scaling["attention_factor"] = config.rope_attention_factor
    keys = {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    if family.local_rope_theta:
        keys["rope_local_base_freq"] = config.local_rope_theta or config.rope_theta
    return keys


def _soft_cap(document: Document, key: str, default: float | None) -> float:
    """0 for null, and for families that do not know the key."""
    if default is None or (key in document and document[key] is None):
        return 0.0
    return _positive(document, key, default) if key in document else default


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


def _positive(document: Document, key: str, default: float | None = None) -> float:
    """A number above 0; ``default``, if there is one, for null and for an absent key."""
    value = document.get(key)
    if value is None and default is not None:
        return default
    if key not in document:
        raise ConfigError(f"config.json has no {key}; add it")
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"config.json has {key}={value!r}; it must be a number above 0")
    return float(value)


def _flag(document: Document, key: str, default: bool = False) -> bool:
    """``default`` for null and for an absent key."""
    value = document.get(key)
    if not isinstance(value, bool | None):
        raise ConfigError(f"config.json has {key}={value!r}; it must be true or false")
    return default if value is None else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
