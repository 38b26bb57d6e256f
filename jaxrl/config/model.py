"""The policy: its decoder, adapters, tokenizer and chat format, and the devices it lies on."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder. With ``path`` set, the architecture is read from that folder's config.json instead."""

    path: str = ""
    """Hugging Face folder to start from; empty initialises from scratch."""
    family: Literal["qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "qwen3_moe"] = "qwen3"
    """What is the same in all models of a kind: activation, norms, biases (``jaxrl/model/families.py``)."""
    vocab_size: int = 0
    """Rows of the embedding; 0 takes the tokenizer's size rounded up to a multiple of 8."""
    layers: int = 4
    width: int = 128
    """Model width D."""
    query_heads: int = 4
    kv_heads: int = 2
    head_width: int = 32
    ffn_width: int = 384
    experts: int = 0
    """Feed-forwards of each layer among which a router chooses; 0 = one, for all tokens."""
    experts_per_token: int = 2
    """How many of them compute a token."""
    expert_width: int = 384
    """ffn_width of one expert."""
    dense_layers: tuple[int, ...] = ()
    """Indices of the layers that have one feed-forward of ffn_width and no experts."""
    normalize_expert_weights: bool = True
    """The weights of a token's experts sum to 1; otherwise they are the router's probabilities."""
    balance_coefficient: float = 0.0
    """Weight in the training loss of the term that evens the load of experts; 0 = the router is left to the reward."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    local_rope_theta: float = 0.0
    """Base of the rotary frequencies, never scaled, on the layers that slide (Gemma 3); 0 = as on the others."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How the rotary frequencies are stretched for texts longer than those of the first training."""
    rope_factor: float = 1.0
    """By how much they are stretched."""
    rope_low_frequency: float = 1.0
    """llama3, yarn: pairs with fewer turns in rope_trained_positions are stretched wholly (yarn's beta_slow)."""
    rope_high_frequency: float = 0.0
    """llama3, yarn: pairs with more turns in rope_trained_positions are not stretched (yarn's beta_fast); 0 = as usual,
    4 for llama3 and 32 for yarn."""
    rope_trained_positions: int = 8192
    """llama3, yarn: length of the texts of the first training."""
    rope_attention_factor: float = 0.0
    """yarn: by which rotated queries and keys are longer; 0 = 0.1 ln(rope_factor) + 1."""
    norm_eps: float = 1e-6
    attention_bias: bool = False
    """Add biases to q, k, v and the output projection (not Qwen2, whose biases on q, k, v are always there)."""
    score_width: int = 0
    """Attention scores are scaled by score_width ** -0.5; 0 takes head_width (Gemma)."""
    attention_soft_cap: float = 0.0
    """Attention scores become cap * tanh(score / cap); 0 = they stay (Gemma 2)."""
    logit_soft_cap: float = 0.0
    """The same for the logits (Gemma 2)."""
    tie_embeddings: bool = True
    sliding_window: int = 0
    """Query i sees keys j with 0 <= i - j < window on the layers that slide; 0 = no window."""
    sliding_layers: tuple[int, ...] = ()
    """Indices of the layers that slide."""
    max_positions: int = 32_768
    init_scale: float = 0.02
    """Standard deviation of the initial weights."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the trainer keeps the weights in."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products, in training and in rollout alike."""
    attention: str = "auto"
    """Who computes attention, over packed rows in training and scoring and over KV pages in rollout:

    * "auto": "tpu" or "cudnn" where they run and take the shapes, and "xla" elsewhere;
    * "xla": plain JAX, everywhere;
    * "tpu": kernels for TPU v5e, v5p, v6e and 7x;
    * "cudnn": cuDNN on Hopper and Blackwell GPUs, for packed rows; pages as with "auto";
    * "mosaic_gpu": kernels for Hopper GPUs, for packed rows; pages as with "auto";
    * "reference", "tpu_interpreted", "mosaic_gpu_interpreted": everywhere and slowly, for tests.

    What is proven of each is in ``docs/kernels.md``."""
    context_attention: Literal["gather", "ring"] = "gather"
    """How queries meet the keys of a row that MeshConfig.context splits: every device gathers them all, or they travel
    around the devices, each of which then holds one part at a time (``docs/meshes.md``)."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, everything in a layer, or all but matrix products."""
    logprob_chunk: int = 1024
    """Tokens whose logits exist at once when log-probabilities are computed."""
    expert_chunk: int = 0
    """Tokens that a device's experts compute at once in training, and once more in the backward pass; 0 = all."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters. With a rank, they alone are trained, beside weights that stay as they are."""

    rank: int = 0
    """Of every adapter; 0 has none and trains all weights."""
    alpha: float = 16.0
    """What the adapters add is scaled by alpha / rank."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (PEFT's use_rslora)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Matrices with an adapter: names of their modules ("q_proj", "mlp.up_proj") or names here ("query", "up");
    "all-linear" is all of attention, feed-forwards and experts; "embed_tokens" and "lm_head" are asked for by name."""
    base: Literal["none", "int8", "nf4"] = "none"
    """Keep the frozen matrices of the layers in codes of 8 or 4 bits."""
    path: str = ""
    """Adapter in PEFT's format to start from; empty starts from the weights as they are."""


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from."""

    path: str = ""
    """A tokenizer.json, a sentencepiece .model, or a folder with one; empty trains sentencepiece on the demonstrations
    (or takes the one in ModelConfig.path)."""
    vocab_size: int = 512
    """Pieces to train, special tokens included."""


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How a conversation becomes tokens (ChatML with Hermes tool calls)."""

    system: str = ""
    """System message; empty leaves the system turn out unless tool schemas are shown."""
    show_tools: bool = True
    """List the tool schemas in the system turn."""
    preamble: str = ""
    """Text put before the problem in the user turn."""
    open_reason: bool = True
    """Begin every assistant turn with an opened <reason> tag that the environment writes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh; -1 on one axis takes all devices that remain."""

    slice: int = 1
    """Groups of devices between which the network is slow: TPU slices, or nodes. Rows are split, and nothing but the
    sum of a micro-batch's gradients passes between groups."""
    data: int = 1
    """Rows are split, weights are not."""
    fsdp: int = -1
    """Rows are split, and weights, gradients and optimizer state at rest."""
    expert: int = 1
    """Rows are split, and weights at rest as by ``fsdp``, but the experts of a layer stay split: tokens travel to them.
    Experts are split by ``tensor`` too."""
    context: int = 1
    """The tokens of every row are split, for everything but the keys and values of attention."""
    tensor: int = 1
    """Heads, feed-forward width and vocabulary are split."""
    rollout_tensor: int = 0
    """Devices that share one replica of the rollout engine; 0 = as many as ``tensor``. With a multiple of the KV heads,
    several devices hold the same ones."""
    rollout_devices: int = 0
    """So many devices, the last ones, roll out and do not train, and the others train and do not roll out; 0 = all of
    them do both."""
