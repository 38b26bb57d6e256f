"""Every knob of jaxrl, as frozen dataclasses that gin binds, and nothing else is configurable.

A recipe (``configs/*.gin``) binds fields as ``Section.field = value``; ``--set Section.field=value`` on the
command line binds on top. ``load`` checks every key and every type before anything is compiled.
"""

import dataclasses
import difflib
import importlib.resources
import os
import pathlib
import re
import tokenize
import types
import typing
from collections.abc import Sequence
from typing import Literal

import gin

from jaxrl.checks import ConfigError, check


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
    normalize_expert_weights: bool = True
    """The weights of a token's experts sum to 1; otherwise they are the router's probabilities."""
    balance_coefficient: float = 0.0
    """Weight in the training loss of the term that evens the load of experts; 0 = the router is left to the reward."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    local_rope_theta: float = 0.0
    """Base of the rotary frequencies, never scaled, on the layers that slide (Gemma 3); 0 = as on the others."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """How the rotary frequencies are stretched for texts longer than those of the first training."""
    rope_factor: float = 1.0
    """By how much they are stretched."""
    rope_low_frequency: float = 1.0
    """llama3: pairs with fewer turns in rope_trained_positions are stretched wholly."""
    rope_high_frequency: float = 4.0
    """llama3: pairs with more turns in rope_trained_positions are not stretched."""
    rope_trained_positions: int = 8192
    """llama3: length of the texts of the first training."""
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
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, everything in a layer, or all but matrix products."""
    logprob_chunk: int = 1024
    """Tokens whose logits exist at once when log-probabilities are computed."""


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
    "all-linear" is all of attention and of a feed-forward without experts."""
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


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Problems to train and evaluate on."""

    train: str = "stories"
    """"stories" makes problems on the spot; anything else is a path to a JSONL file (comma-separated for several)."""
    eval: str = "stories"
    """As ``train``, for problems never trained on; empty keeps back ``eval_problems`` rows of ``train``."""
    train_problems: int = 4096
    """How many stories to make (files are used whole)."""
    eval_problems: int = 128
    """How many problems an evaluation uses at most."""
    seed: int = 0
    """Of the stories and of the shuffling."""


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Cold start on demonstrations: AdamW, second beta 0.95; first beta, decay and clipping as in OptimizerConfig."""

    demonstrations: Literal["stories", "gsm8k", ""] = "stories"
    """"stories" or "gsm8k" (calculator notes of DataConfig.train turned into Python); empty skips the cold start."""
    count: int = 8192
    """Stories: demonstrations to make. Files: at most so many of their rows."""
    variants: int = 0
    """Files: further demonstrations of each row, with other numbers in question and program."""
    wrong_share: float = 0.4
    """Stories: share of demonstrations with a wrong operation or operand."""
    repair_share: float = 0.25
    """Stories: share of demonstrations whose first call fails and is then repaired."""
    steps: int = 300
    rows: int = 32
    """Packed rows in one update."""
    row_tokens: int = 256
    learning_rate: float = 3e-3
    warmup_steps: int = 20


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The rollout engine: decode slots, KV pages, compiled shapes."""

    slots: int = 64
    """Sequences that decode together."""
    page_size: int = 16
    """Tokens in a KV page."""
    pages: int = 0
    """KV pages; 0 gives every slot its longest sequence."""
    round_steps: int = 16
    """Decode steps in one jitted round."""
    prefill_rows: int = 4
    """Chunks in one prefill call; empty ones cost as much as full ones."""
    prefill_chunk: int = 64
    """Tokens of a row that one prefill call takes; longer texts take several calls."""
    max_prompt_tokens: int = 256
    max_response_tokens: int = 256
    """Response tokens of all turns together, tool output included."""
    temperature: float = 1.0
    reserve_quantile: float = 1.0
    """Admission reserves this quantile of recent response lengths; 1 = the longest possible, never preempts. Below 1 a
    preempted sequence is prefilled anew, which may change the last bits of its log-probabilities."""


@dataclasses.dataclass(frozen=True)
class SandboxConfig:
    """Where tool code runs."""

    workers: int = 2
    """Template processes of each kind, from which calls are forked."""
    slots: int = 4
    """Calls that run at once, over all workers."""
    slow_slots: int = 8
    """Further calls that may run on, at lower priority, once they have lasted a quarter second."""
    queue: int = 4096
    """Calls that may wait before submitting blocks."""
    cpu_seconds: float = 4.0
    """CPU time of a call, all threads together. This and the next nine are ``Limits`` of one call."""
    wall_seconds: float = 8.0
    """For code that sleeps; stretched by the time the code waited for a core."""
    memory_mib: int = 512
    """Address space a call may add; with ``disk_mib`` what a call that starts processes may use."""
    output_kib: int = 64
    """Kept of stdout and of stderr, head and tail."""
    output_hard_mib: int = 16
    """Output beyond this ends the call."""
    disk_mib: int = 64
    """A call's working directory, which lies in memory."""
    open_files: int = 64
    threads: int = 128
    """Each takes 3 MiB of ``memory_mib``."""
    files_mib: int = 16
    """Files that a call returns, together."""
    processes: int = 32
    """Processes and threads of a call that may start processes."""
    session_memory_mib: int = 4096
    """Live sessions together; beyond it those unused for longest are put out, and rebuilt when they are needed."""
    preload: tuple[str, ...] = ("numpy", "scipy", "sympy")
    """Modules that are loaded once: calls that mention one find it already imported."""
    program_folders: tuple[str, ...] = ()
    """Further folders of the host, by absolute path, for calls that start programs; the code can read all of them."""
    processes_without_cgroup: bool = False
    """Let calls start processes also where no memory cgroup bounds them together. Named in their results."""
    cluster: str = ""
    """Where the calls run: "" on this machine; otherwise on every node of a Ray cluster, each with so many workers and
    slots: "auto" for the cluster that this machine belongs to, or the address of its head as "host:port"."""
    unsafe: bool = False
    """Run tool code without isolation. Named in every result. For machines without namespaces, at your own risk."""


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """Limits of one episode."""

    max_turns: int = 4
    """Policy turns."""
    max_turn_tokens: int = 0
    """Tokens of one policy turn; 0 = only the response budget."""
    max_tool_tokens: int = 64
    """A tool's output is cut once, in the middle, to this many tokens."""
    max_parallel_calls: int = 1
    """Calls of one turn that run; the rest are answered with an error."""
    traceback: Literal["last", "full"] = "last"
    """What the policy reads of an error: its final message, or the whole traceback."""
    wall_seconds: float = 60.0
    """Seconds of the episode's own: engine rounds it takes part in and calls that run, without any waiting."""
    queue_seconds: float = 600.0
    """A call that has no result after this, on top of its run time, counts as a fault of ours."""
    infra_retries: int = 2
    """Fresh tries of a call after a fault of ours; then the trajectory leaves the batch."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Grading."""

    workers: int = 1
    """Verifier processes."""
    seconds: float = 5.0
    """Hard deadline for one answer."""


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """Selection, advantages and loss (GRPO-RoC unless changed)."""

    reject_equal: bool = True
    """Drop groups in which all answers are right or all are wrong."""
    roc: Literal["off", "greedy", "inverse"] = "greedy"
    """Resample on Correct: greedy keeps the cleanest correct trajectories, inverse draws them with weight
    1 / (penalty + roc_epsilon)."""
    keep: int = 8
    """Trajectories kept of every group (with roc = off the first ``keep`` by sample index)."""
    min_positive: int = 2
    min_negative: int = 2
    roc_epsilon: float = 0.1
    error_penalty: bool = True
    format_penalty: bool = True
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0
    """Bound of the loss for negative advantages; 0 = off."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    kl_coefficient: float = 0.0
    """Weight of the KL to the reference (the policy RL started from); 0 keeps no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for the RL updates; the cold start takes ``beta1``, ``weight_decay`` and ``clip_norm`` from here too."""

    learning_rate: float = 1e-6
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    offload: bool = False
    """Keep the moments in the host's memory and bring them to the devices only to apply an update, when no activations
    are there."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    seed: int = 0
    steps: int = 100
    problems: int = 16
    """Problems a step trains on."""
    samples: int = 16
    """Trajectories played for each problem."""
    max_draws: int = 4
    """When nothing survives selection, problems are drawn again at most this many times before the step is skipped."""
    prefetch_groups: int = 0
    """Groups of the next step that are played, with the present weights, while this step's stragglers wait for their
    tools and during its update."""
    updates_per_step: int = 1
    """Optimizer updates on one collected batch (mini-batches)."""
    rows: int = 16
    """Packed rows in one micro-batch."""
    row_tokens: int = 512
    """Tokens in a packed row; must hold the longest prompt and response."""
    eval_every: int = 20
    """Steps between evaluations; 0 = only before and after."""
    dump_episodes: bool = True


@dataclasses.dataclass(frozen=True)
class StagesConfig:
    """Stages of one run with their own limits. Every tuple has one entry a stage; all empty = a single stage."""

    until: tuple[int, ...] = ()
    """Cumulative step at which each stage ends."""
    max_response_tokens: tuple[int, ...] = ()
    """At most EngineConfig.max_response_tokens, for which everything is compiled."""
    max_turns: tuple[int, ...] = ()
    drop_solved: tuple[int, ...] = ()
    """On entering the stage play every problem this often and drop those always solved; 0 drops none."""
    drop_unsolved: tuple[int, ...] = ()
    """The same for those never solved, so that a weak policy's steps are not spent on groups that are all wrong."""
    reset_optimizer: tuple[bool, ...] = ()
    """Begin the stage with a fresh optimizer, and the present policy as the reference."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training and by ``jaxrl eval``."""

    samples: int = 8
    """Samples for each problem."""
    temperature: float = 1.0
    """0 = greedy."""
    k: tuple[int, ...] = (1, 8)
    """Values of k for pass@k; maj@k uses all samples."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk."""

    every: int = 20
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept, beside the best by pass rate."""


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
    context: int = 1
    """The tokens of every row are split, for everything but the keys and values of attention."""
    tensor: int = 1
    """Heads, feed-forward width and vocabulary are split."""
    rollout_tensor: int = 0
    """Devices that share one replica of the rollout engine; 0 = as many as ``tensor``."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections of one run."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    chat: ChatConfig = ChatConfig()
    data: DataConfig = DataConfig()
    sft: SftConfig = SftConfig()
    engine: EngineConfig = EngineConfig()
    sandbox: SandboxConfig = SandboxConfig()
    env: EnvConfig = EnvConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    stages: StagesConfig = StagesConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()


SECTIONS: dict[str, type] = {type(field.default).__name__: type(field.default) for field in dataclasses.fields(Config)}
_BOUND = {name: gin.external_configurable(section, name=name, module="jaxrl") for name, section in SECTIONS.items()}


def recipe_names() -> list[str]:
    """Names of the recipes that come with jaxrl."""
    folder = importlib.resources.files("jaxrl_configs")
    return sorted(entry.name.removesuffix(".gin") for entry in folder.iterdir() if entry.name.endswith(".gin"))


def read_recipe(name: str, within: tuple[str, ...] = ()) -> str:
    """The text of a recipe, given by path or by the name of one that comes with jaxrl, its includes expanded.

    Args:
        within: the recipes that include this one.

    Raises:
        ConfigError: no such file and no such name; the message lists the nearest names. Or a file that is no text, or
            includes itself.
    """
    if name in within:
        raise ConfigError(f"recipe {name} includes itself: {' → '.join((*within, name))}")
    if name.endswith(".gin") or os.sep in name:
        path = pathlib.Path(name)
        if not path.is_file():
            raise ConfigError(
                f"no recipe file {name}; give the path of a .gin file or one of: {', '.join(recipe_names())}"
            )
        data = path.read_bytes()
    elif name in recipe_names():
        data = (importlib.resources.files("jaxrl_configs") / f"{name}.gin").read_bytes()
    else:
        raise ConfigError(
            f"no recipe called {name!r}{_nearest(name, recipe_names())}; recipes: {', '.join(recipe_names())}"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {name} is no UTF-8 text: {error}") from error
    return re.sub(
        r"^include\s+['\"](.+?)['\"]\s*$",
        lambda match: read_recipe(match.group(1), (*within, name)),
        text,
        flags=re.MULTILINE,
    )


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Resolve a recipe and overrides into a checked configuration.

    Args:
        recipe: name of a shipped recipe, path of a .gin file, or "" for the defaults.
        overrides: ``Section.field=value`` bindings that win over the recipe; a bare word is taken as a string.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a value of the wrong type, or values that
            contradict each other.
    """
    return parse([read_recipe(recipe) if recipe else ""], overrides)


def parse(texts: Sequence[str], overrides: Sequence[str] = ()) -> Config:
    """As ``load``, from gin text."""
    gin.clear_config()
    macros = {name for text in texts for name in re.findall(r"%(\w+)", text)}
    try:
        for text in texts:
            _parse_gin(text, macros)
        for override in overrides:
            _parse_override(override, macros)
        sections = {}
        for field in dataclasses.fields(Config):
            section = type(field.default)
            try:
                bound = _BOUND[section.__name__]()
            except (TypeError, ValueError) as error:  # a macro that nobody defined
                raise ConfigError(f"cannot resolve {section.__name__}: {str(error).splitlines()[0]}") from error
            sections[field.name] = section(
                **{f.name: _typed(section, f, getattr(bound, f.name)) for f in dataclasses.fields(section)}
            )
    finally:
        gin.clear_config()
    config = Config(**sections)
    check(config)
    return config


def dump(config: Config) -> str:
    """Every value of every section as gin text; ``parse([dump(config)]) == config``."""
    lines = []
    for field in dataclasses.fields(Config):
        section = getattr(config, field.name)
        lines += [
            f"{type(section).__name__}.{f.name} = {getattr(section, f.name)!r}" for f in dataclasses.fields(section)
        ]
        lines.append("")
    return "\n".join(lines)


def _parse_gin(text: str, macros: set[str]) -> None:
    _check_keys(text, macros)
    try:
        gin.parse_config(text)
    except ValueError as error:
        raise ConfigError(_explain(str(error))) from error
    except (SyntaxError, TypeError, AttributeError, OSError, tokenize.TokenError) as error:
        raise ConfigError(f"cannot read the configuration: {str(error).splitlines()[0]}") from error


def _check_keys(text: str, macros: set[str]) -> None:
    """Refuse what gin would take and never use: scopes, and names that are neither fields nor macros in use."""
    for line in text.splitlines():
        if line.startswith(("import ", "from ")):
            raise ConfigError(f"{line.strip()!r}: a recipe imports nothing; it binds fields and includes recipes")
        match = re.match(r"([\w./]+)\s*=", line)
        if match is None or re.fullmatch(r"\w+\.\w+", match[1]) or match[1] in macros:
            continue
        fields = [f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)]
        ends = [key for key in fields if key.endswith("." + match[1].rpartition(".")[2])]
        hint = f"; did you mean {ends[0]}?" if ends else _nearest(match[1], fields)
        raise ConfigError(f"unknown key {match[1]}{hint}")


def _parse_override(override: str, macros: set[str]) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r} has no value; write --set Section.field=value")
    try:
        _parse_gin(f"{key.strip()} = {value.strip()}", macros)
    except ConfigError as error:
        if not isinstance(error.__cause__, SyntaxError | tokenize.TokenError):
            raise
        _parse_gin(f"{key.strip()} = {value.strip()!r}", macros)


def _explain(message: str) -> str:
    """Turn gin's complaint about a name into one with the nearest valid name."""
    if match := re.search(r"Configurable '(\w+)' doesn't have a parameter named '(\w+)'", message):
        section, name = match.groups()
        fields = [field.name for field in dataclasses.fields(SECTIONS[section])]
        return f"unknown key {section}.{name}{_nearest(name, fields, prefix=section + '.')}"
    if match := re.search(r"No configurable matching '([\w.]+)'", message):
        return (
            f"unknown section {match.group(1)!r}{_nearest(match.group(1), SECTIONS)}; sections: {', '.join(SECTIONS)}"
        )
    return message.splitlines()[0]


def _nearest(name: str, valid: typing.Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _typed(section: type, field: dataclasses.Field, value: object) -> object:
    """``value`` as the field's type; an int serves as a float, a list as a tuple, nothing else is converted."""
    wanted = typing.get_type_hints(section)[field.name]
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        if value not in arguments:
            nearest = _nearest(str(value), [str(a) for a in arguments])
            raise ConfigError(
                f"{section.__name__}.{field.name}={value!r} is none of {', '.join(map(repr, arguments))}{nearest}"
            )
        return value
    if origin is tuple and isinstance(value, list | tuple):
        if all(type(item) is arguments[0] for item in value):
            return tuple(value)
    elif wanted is float and type(value) is int:
        return float(value)
    elif isinstance(wanted, type) and not isinstance(wanted, types.GenericAlias) and type(value) is wanted:
        return value
    name = f"tuple of {arguments[0].__name__}" if origin is tuple else wanted.__name__
    raise ConfigError(f"{section.__name__}.{field.name}={value!r} has type {type(value).__name__}; it must be {name}")
