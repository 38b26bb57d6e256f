"""The decoder (Qwen2 and Qwen3, dense): one parameter table, one layer function, two ways to attend.

Training and scoring attend over packed rows; rollout attends over KV pages. Everything else is the same code on the
same weights, so the log-probabilities of both agree to rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.config import ModelConfig
from jaxrl.model.spec import ParamSpec, Specs

Params = dict[str, Any]


def param_specs(config: ModelConfig) -> Specs:
    """The table of all parameters of the decoder, layer parameters stacked on a leading L axis.

    Raises:
        ValueError: the vocabulary size is not set.
    """
    if config.vocab_size < 1:
        raise ValueError(f"ModelConfig.vocab_size={config.vocab_size} is not set; take it from the tokenizer first")
    length = {
        "layers": config.layers,
        "vocab": config.vocab_size,
        "embed": config.width,
        "query_heads": config.query_heads,
        "kv_heads": config.kv_heads,
        "head": config.head_width,
        "ffn": config.ffn_width,
    }
    dtype = jnp.dtype(config.param_dtype)
    normal = jax.nn.initializers.normal(config.init_scale)
    ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros

    def weight(name: str, axes: str, layout: str) -> ParamSpec:
        names = tuple(axes.split())
        merged = tuple(tuple(part.split("*")) for part in layout.split())
        return ParamSpec(tuple(length[axis] for axis in names), dtype, names, normal, name, merged)

    def vector(name: str, axes: str, init: Any) -> ParamSpec:
        names = tuple(axes.split())
        merged = (tuple(axis for axis in names if axis != "layers"),)
        return ParamSpec(tuple(length[axis] for axis in names), dtype, names, init, name, merged, decay=False)

    layer, attention = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
    queries, keys = "query_heads*head", "kv_heads*head"
    layers = {
        "attention_norm": vector(layer + "input_layernorm.weight", "layers embed", ones),
        "query": weight(attention + "q_proj.weight", "layers embed query_heads head", f"{queries} embed"),
        "key": weight(attention + "k_proj.weight", "layers embed kv_heads head", f"{keys} embed"),
        "value": weight(attention + "v_proj.weight", "layers embed kv_heads head", f"{keys} embed"),
        "output": weight(attention + "o_proj.weight", "layers query_heads head embed", f"embed {queries}"),
        "ffn_norm": vector(layer + "post_attention_layernorm.weight", "layers embed", ones),
        "gate": weight(layer + "mlp.gate_proj.weight", "layers embed ffn", "ffn embed"),
        "up": weight(layer + "mlp.up_proj.weight", "layers embed ffn", "ffn embed"),
        "down": weight(layer + "mlp.down_proj.weight", "layers ffn embed", "embed ffn"),
    }
    if config.family == "qwen2":
        layers["query_bias"] = vector(attention + "q_proj.bias", "layers query_heads head", zeros)
        layers["key_bias"] = vector(attention + "k_proj.bias", "layers kv_heads head", zeros)
        layers["value_bias"] = vector(attention + "v_proj.bias", "layers kv_heads head", zeros)
    if config.family == "qwen3":
        layers["query_norm"] = vector(attention + "q_norm.weight", "layers head", ones)
        layers["key_norm"] = vector(attention + "k_norm.weight", "layers head", ones)
    specs: Specs = {
        "embedding": weight("model.embed_tokens.weight", "vocab embed", "vocab embed"),
        "layers": layers,
        "final_norm": vector("model.norm.weight", "embed", ones),
    }
    if not config.tie_embeddings:
        specs["head"] = weight("lm_head.weight", "vocab embed", "vocab embed")
    return specs
