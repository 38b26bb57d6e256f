"""The families of models: one row for each ``model_type``, and nothing else anywhere knows a family by its name.

A row says what is the same in every model of a family. What differs between its models (sizes, biases, windows, soft
caps, rotary frequencies) stands in ``ModelConfig``, and the row says which keys of config.json hold it. The decoder
reads the first half of a row, ``config_json`` the second.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes a ``model_type``, with the default values that transformers gives absent keys.

    What the decoder computes:

    Attributes:
        biases: on the query, key and value projections always; there and on the output projection where
            ``ModelConfig.attention_bias`` says so; or never.
        query_key_norm: RMS norms on queries and keys, before they are rotated.
        post_norms: RMS norms also on what attention and feed-forward add to the residual stream.
        norm_offset: added to the stored scale of every norm.
        scaled_embedding: embeddings are multiplied by the square root of the model width.
        activation: of the gate, as config.json names it.

    What its config.json says, and how:

    Attributes:
        architecture: class name in transformers, the language model with its output head.
        activation_key: that names the activation.
        experts: the feed-forward has experts, whose number, width and weights the file gives.
        head_width: of a file without ``head_dim``; None divides the model width by the query heads.
        all_kv_heads: a file without ``num_key_value_heads`` has as many as query heads; otherwise it is incomplete.
        tied: of a file without ``tie_word_embeddings``.
        max_positions: of a file without ``max_position_embeddings``.
        sliding: layers that slide where ``layer_types`` is absent. "never"; "always", if there is a ``sliding_window``;
            "last", those from ``max_window_layers`` on, if ``use_sliding_window``; "most", all but every n-th.
        full_every: that n, of a file without ``sliding_window_pattern``.
        sliding_window: of a file without the key.
        rope_theta, local_rope_theta: of files without the keys; a family without local frequencies has None.
        score_width: of a file without ``query_pre_attn_scalar``; None where the family does not know the key.
        attention_soft_cap, logit_soft_cap: of files without ``attn_logit_softcapping``, ``final_logit_softcapping``;
            None where the family does not know the key.
    """

    architecture: str
    biases: Literal["never", "query_key_value", "optional"] = "never"
    query_key_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"

    activation_key: str = "hidden_act"
    experts: bool = False
    head_width: int | None = None
    all_kv_heads: bool = False
    tied: bool = False
    max_positions: int = 32_768
    sliding: Literal["never", "always", "last", "most"] = "never"
    full_every: int = 0
    sliding_window: int = 4096
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None
    score_width: int | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None


_QWEN2 = Family("Qwen2ForCausalLM", biases="query_key_value", sliding="last")
_GEMMA2 = Family(
    "Gemma2ForCausalLM",
    biases="optional",
    post_norms=True,
    norm_offset=1.0,
    scaled_embedding=True,
    activation="gelu_pytorch_tanh",
    activation_key="hidden_activation",
    head_width=256,
    tied=True,
    max_positions=8192,
    sliding="most",
    full_every=2,
    score_width=256,
    attention_soft_cap=50.0,
    logit_soft_cap=30.0,
)

FAMILIES = {
    "qwen2": _QWEN2,
    "qwen3": dataclasses.replace(
        _QWEN2, architecture="Qwen3ForCausalLM", biases="optional", query_key_norm=True, head_width=128
    ),
    "llama": Family("LlamaForCausalLM", biases="optional", all_kv_heads=True, max_positions=2048),
    "mistral": Family("MistralForCausalLM", max_positions=131_072, sliding="always"),
    "gemma2": _GEMMA2,
    "gemma3_text": dataclasses.replace(
        _GEMMA2,
        architecture="Gemma3ForCausalLM",
        query_key_norm=True,
        max_positions=131_072,
        full_every=6,
        rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
        attention_soft_cap=None,
        logit_soft_cap=0.0,
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", biases="optional", query_key_norm=True, experts=True),
}
"""By ``model_type`` in config.json, which is ``ModelConfig.family`` here."""
