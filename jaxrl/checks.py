"""Which values a configuration may hold: ranges of single fields, and what must agree between them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the value, the limit and the remedy."""


_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "Engine.slots Engine.page_size Engine.prefill_rows Engine.prefill_chunk Engine.round_steps Engine.group_width "
        "Engine.max_prompt_tokens Engine.max_response_tokens Model.logprob_chunk Model.layers Model.width "
        "Model.query_heads Model.kv_heads Model.head_width Model.ffn_width Model.experts_per_token Model.expert_width "
        "Prefer.rows Prefer.row_tokens Model.max_positions "
        "Sft.count Sft.rows Sft.row_tokens Train.rows Train.row_tokens Train.problems "
        "Train.samples Train.max_draws Train.passes Train.tree_loss_rows "
        "Train.updates_per_step Algorithm.kl_horizon Eval.samples Eval.k Env.max_turns Env.max_parallel_calls "
        "Checkpoint.every Checkpoint.keep Data.train_problems Data.eval_problems Reward.workers Sandbox.workers "
        "Sandbox.slots Sandbox.queue Sandbox.output_kib Sandbox.output_hard_mib Sandbox.disk_mib Sandbox.open_files "
        "Sandbox.threads Sandbox.files_mib Sandbox.processes Sandbox.session_memory_mib Tokenizer.vocab_size "
        "Stages.until Stages.max_turns Stages.max_response_tokens",
        lambda value: value >= 1,
        "be at least 1",
    ),
    (
        "Train.steps Train.eval_every Train.prefetch_groups Sft.steps Sft.warmup_steps Sft.learning_rate "
        "Sft.variants Optimizer.warmup_steps Optimizer.learning_rate Optimizer.weight_decay Algorithm.keep "
        "Mix.warmup_steps Mix.decay_steps Mix.observation_weight Algorithm.kl_coefficient "
        "Algorithm.kl_target Algorithm.reference_every Algorithm.entropy_coefficient "
        "Algorithm.entropy_target Algorithm.entropy_step Algorithm.entropy_limit Env.infra_retries "
        "Env.max_turn_tokens Engine.pages Data.seed Train.seed Sandbox.slow_slots Model.vocab_size "
        "Model.sliding_window Model.sliding_layers Model.dense_layers Eval.temperature Model.experts "
        "Model.balance_coefficient Model.expert_chunk "
        "Model.local_rope_theta Model.rope_attention_factor Model.score_width "
        "Model.attention_soft_cap Model.logit_soft_cap "
        "Prefer.held_out Prefer.pairs_of_problem Prefer.sft_weight Prefer.length_weight Prefer.steps "
        "Prefer.learning_rate Prefer.warmup_steps Prefer.measure_every "
        "Critic.learning_rate Critic.warmup_steps Critic.first_steps Critic.huber Distill.task_weight "
        "Stages.drop_solved Stages.drop_unsolved Lora.rank Mesh.rollout_tensor Mesh.rollout_devices "
        "Train.max_staleness Model.rope_high_frequency",
        lambda value: value >= 0,
        "not be negative",
    ),
    (
        "Reward.seconds Reward.judge_seconds "
        "Env.wall_seconds Env.queue_seconds Sandbox.cpu_seconds Sandbox.wall_seconds Model.rope_theta "
        "Model.rope_factor Model.rope_low_frequency Model.rope_trained_positions Model.norm_eps Model.init_scale "
        "Optimizer.eps Optimizer.clip_norm Critic.clip Lora.alpha",
        lambda value: value > 0,
        "be above 0",
    ),
    ("Optimizer.beta1 Optimizer.beta2", lambda value: 0 <= value < 1, "be at least 0 and below 1"),
    (
        "Sft.wrong_share Sft.repair_share Mix.peak Mix.valley Critic.discount Critic.decay",
        lambda value: 0 <= value <= 1,
        "lie between 0 and 1",
    ),
    (
        "Algorithm.top_entropy Algorithm.reference_mix",
        lambda value: 0 < value <= 1,
        "be above 0 and at most 1",
    ),
    ("Engine.reserve_quantile", lambda value: 0 < value <= 1, "be above 0 and at most 1"),
    (
        "Engine.temperature",
        lambda value: value > 0,
        "be above 0: the policy is trained on what it samples; for greedy evaluation set EvalConfig.temperature=0",
    ),
    ("Sandbox.memory_mib", lambda value: value >= 16, "be at least 16, which a call needs to start"),
)
"""Fields by the range they must lie in, each entry of a tuple: names without "Config", what holds, the words for it."""


_OF_WHOLE_DISTRIBUTIONS = ("generalised_jsd", "forward_kl_top")
"""Losses towards a teacher that any text will do for, whoever wrote it."""

_OF_POLICY_LOSS = (
    "loss",
    "loss_settings",
    "kl_coefficient",
    "entropy_coefficient",
    "entropy_target",
    "top_entropy",
    "proximal",
    "mismatch",
    "rejection",
)
"""Fields of ``AlgorithmConfig`` that only the policy loss reads, or the rewards that it is paid by."""


def check(config: Any) -> None:
    """Refuse values of a ``Config`` that are out of range or contradict each other.

    Raises:
        ConfigError: naming the values, the limit and the remedy.
    """
    algorithm, engine, train = config.algorithm, config.engine, config.train
    sections = {}
    for section in (getattr(config, field.name) for field in dataclasses.fields(config)):
        sections[type(section).__name__.removesuffix("Config")] = section
        for field in dataclasses.fields(section):
            key = f"{type(section).__name__}.{field.name}"
            if getattr(section, field.name) == "REQUIRED":
                raise ConfigError(f"{key} must be set; add --set {key}=…")
    _check_ranges(sections)
    if not all(part.strip() for part in config.data.train.split(",")):
        raise ConfigError(f'DataConfig.train="{config.data.train}" names no file; give paths, or "stories"')
    if algorithm.keep > train.samples:
        raise ConfigError(
            f"AlgorithmConfig.keep={algorithm.keep} is more than TrainConfig.samples={train.samples}; "
            "lower keep or play more samples"
        )
    longest = engine.max_prompt_tokens + engine.max_response_tokens
    if train.row_tokens < longest:
        raise ConfigError(
            f"TrainConfig.row_tokens={train.row_tokens} cannot hold the longest trajectory of {longest} tokens "
            "(EngineConfig.max_prompt_tokens + max_response_tokens); raise row_tokens"
        )
    if config.model.query_heads % config.model.kv_heads:
        raise ConfigError(
            f"ModelConfig.query_heads={config.model.query_heads} is no multiple of kv_heads={config.model.kv_heads}"
        )
    _check_stages(config)
    _check_lora(config.lora)
    _check_agents(config)
    if config.eval.temperature > 0 and max(config.eval.k, default=1) > config.eval.samples:
        raise ConfigError(
            f"EvalConfig.k={config.eval.k} asks for more than EvalConfig.samples={config.eval.samples}; "
            "raise samples or lower k"
        )
    _check_kl(algorithm, config.lora)
    _check_kl_target(config)
    _check_mix(config)
    if not config.data.eval and "stories" in config.data.train.split(","):
        raise ConfigError("DataConfig.eval is empty: stories have a split of their own; set DataConfig.eval='stories'")
    if train.prefetch_groups > train.problems:
        raise ConfigError(
            f"TrainConfig.prefetch_groups={train.prefetch_groups} is more than TrainConfig.problems={train.problems}: "
            "groups would wait longer than one step; lower it"
        )
    if train.prefetch_groups and train.max_staleness:
        raise ConfigError(
            f"TrainConfig.max_staleness={train.max_staleness} plays ahead already; set TrainConfig.prefetch_groups=0, "
            f"which is {train.prefetch_groups}"
        )
    if train.next_groups == "finished" and not train.max_staleness:
        raise ConfigError(
            "TrainConfig.next_groups='finished' needs groups to choose from; set TrainConfig.max_staleness to 1 or more"
        )
    if config.model.head_width % 2:
        raise ConfigError(f"ModelConfig.head_width={config.model.head_width} must be even, for rotary positions")
    if 0 < config.model.rope_high_frequency <= config.model.rope_low_frequency:
        raise ConfigError(
            f"ModelConfig.rope_high_frequency={config.model.rope_high_frequency} must be above "
            f"rope_low_frequency={config.model.rope_low_frequency}"
        )
    for field in ("sliding_layers", "dense_layers"):
        named = getattr(config.model, field)
        if outside := [layer for layer in named if layer >= config.model.layers]:
            raise ConfigError(
                f"ModelConfig.{field}={named} names layer {outside[0]} of {config.model.layers}; "
                "they are counted from 0"
            )
    if config.model.max_positions < longest:
        raise ConfigError(
            f"ModelConfig.max_positions={config.model.max_positions} is less than the longest trajectory of {longest} "
            "tokens; raise it"
        )


def most_trajectories(config: Any, problems: int) -> int | None:
    """How many trajectories of so many problems are trained on at most. None = that depends on what is played: several
    agents share an episode, or problems get extra samples and all are kept."""
    algorithm = config.algorithm
    if not algorithm.keep and (config.env.joint_episode or algorithm.extra_samples):
        return None
    return problems * (algorithm.keep or config.train.samples)


def _check_ranges(sections: Mapping[str, Any]) -> None:
    for names, holds, words in _RANGES:
        for name in names.split():
            section, field = name.split(".")
            value = getattr(sections[section], field)
            if not all(map(holds, value if isinstance(value, tuple) else (value,))):
                raise ConfigError(f"{section}Config.{field}={value} must {words}")


def _check_mix(config: Any) -> None:
    if config.mix.demonstrations != "off" and not config.sft.demonstrations:
        raise ConfigError(
            f"MixConfig.demonstrations={config.mix.demonstrations!r} but SftConfig.demonstrations is empty; name some, "
            "with SftConfig.steps=0 for no cold start"
        )
    if config.distill.stages != "reinforcement" and config.distill.loss not in _OF_WHOLE_DISTRIBUTIONS:
        raise ConfigError(
            f"DistillConfig.loss={config.distill.loss!r} is of tokens that the policy sampled; on demonstrations "
            f"(DistillConfig.stages={config.distill.stages!r}) take "
            f"one of {', '.join(_OF_WHOLE_DISTRIBUTIONS)}"
        )
    _check_task(config)
    if config.algorithm.hint == "demonstration" and not config.sft.demonstrations:
        raise ConfigError(
            "AlgorithmConfig.hint='demonstration' but SftConfig.demonstrations is empty; name some, with "
            "SftConfig.steps=0 for no cold start"
        )
    if config.mix.observation_weight and config.mix.loss != "nll":
        raise ConfigError(
            f"MixConfig.observation_weight={config.mix.observation_weight} is of the cross-entropy, but "
            f"MixConfig.loss={config.mix.loss!r} would hold for observations too; set it to 'nll', or the weight to 0"
        )


def _check_task(config: Any) -> None:
    """Refuse settings of a policy loss that a teacher takes the place of."""
    distill = config.distill
    if not distill.teacher or distill.task_weight or distill.stages == "cold_start":
        return
    fields = [(config.algorithm, name) for name in _OF_POLICY_LOSS]
    fields += [(config.mix, "demonstrations"), (config.mix, "observation_weight")]
    unused = [
        f"{type(section).__name__}.{name}={getattr(section, name)!r}"
        for section, name in fields
        if getattr(section, name) != getattr(type(section)(), name)
    ]
    if unused:
        raise ConfigError(
            f"{', '.join(unused)} would do nothing: with DistillConfig.task_weight=0 the policy learns from "
            "DistillConfig.teacher alone; set a task_weight above 0, or these to their defaults"
        )


def _check_kl(algorithm: Any, lora: Any) -> None:
    estimator = algorithm.kl_estimator
    if algorithm.kl_coefficient and algorithm.kl_placement == "loss" and estimator == "k1":
        raise ConfigError(
            "AlgorithmConfig.kl_estimator='k1' has no gradient in expectation; use 'k2', 'k3' or 'k1+' in a loss"
        )
    if algorithm.kl_placement == "reward" and estimator.endswith("+"):
        raise ConfigError(
            f"AlgorithmConfig.kl_estimator={estimator!r} differs from {estimator[:-1]!r} by its gradient, and "
            f"kl_placement='reward' has none; use {estimator[:-1]!r}"
        )
    if algorithm.kl_by_ratio and not (algorithm.kl_coefficient and algorithm.kl_placement == "loss"):
        raise ConfigError(
            "AlgorithmConfig.kl_by_ratio=True is of a KL in the loss, but "
            f"kl_coefficient={algorithm.kl_coefficient} and kl_placement={algorithm.kl_placement!r}; "
            "set kl_coefficient above 0 with kl_placement='loss', or kl_by_ratio=False"
        )
    if algorithm.reference_every and algorithm.reference_mix < 1 and lora.rank:
        raise ConfigError(
            f"AlgorithmConfig.reference_mix={algorithm.reference_mix} of adapters is not that of the weights they add "
            "up to; set it to 1"
        )


def _check_kl_target(config: Any) -> None:
    algorithm = config.algorithm
    if not algorithm.kl_target:
        return
    if not algorithm.kl_coefficient:
        raise ConfigError(
            f"AlgorithmConfig.kl_target={algorithm.kl_target} does nothing without a KL; set kl_coefficient above 0"
        )
    trained = most_trajectories(config, config.train.problems)
    if trained is None:
        several = f"EnvConfig.joint_episode={config.env.joint_episode!r} has several agents; set kl_target to 0"
        extra = f"AlgorithmConfig.extra_samples={algorithm.extra_samples!r} is played and all is kept; set keep above 0"
        raise ConfigError(
            f"AlgorithmConfig.kl_target={algorithm.kl_target} moves the KL's weight by the number of trajectories of a "
            f"step, which has no bound: {several if config.env.joint_episode else extra}"
        )
    if trained >= 5 * algorithm.kl_horizon:
        raise ConfigError(
            f"AlgorithmConfig.kl_horizon={algorithm.kl_horizon} must be above a fifth of the {trained} trajectories of "
            "a step, one of which could bring the KL's weight to 0 for good; raise it"
        )


def _check_agents(config: Any) -> None:
    if not config.env.joint_episode:
        return
    for field in ("keep", "extra_samples", "greedy_baseline"):
        if value := getattr(config.algorithm, field):
            raise ConfigError(
                f"AlgorithmConfig.{field}={value!r} counts trajectories of one agent, but "
                f"EnvConfig.joint_episode={config.env.joint_episode!r} has several in an episode; "
                f"set it to {type(value)()!r}"
            )


def _check_lora(lora: Any) -> None:
    if lora.path and not lora.rank:
        raise ConfigError(
            f"LoraConfig.path={lora.path!r} but LoraConfig.rank=0 has no adapters; set the adapter's rank"
        )
    if lora.base != "none" and not lora.rank:
        raise ConfigError(f"LoraConfig.base={lora.base!r} but LoraConfig.rank=0 trains all weights; set a rank")
    if lora.rank and not lora.targets:
        raise ConfigError(f"LoraConfig.rank={lora.rank} but LoraConfig.targets is empty; name matrices or 'all-linear'")


def _check_stages(config: Any) -> None:
    stages = config.stages
    for field in dataclasses.fields(stages):
        if len(getattr(stages, field.name)) != len(stages.until):
            raise ConfigError(
                f"StagesConfig.{field.name}={getattr(stages, field.name)} has not one entry for each of the "
                f"{len(stages.until)} stages of StagesConfig.until={stages.until}"
            )
    if list(stages.until) != sorted(set(stages.until)):
        raise ConfigError(f"StagesConfig.until={stages.until} must rise from stage to stage")
    if stages.until and stages.until[-1] != config.train.steps:
        raise ConfigError(f"the last stage ends at step {stages.until[-1]} but TrainConfig.steps={config.train.steps}")
    if stages.until and max(stages.max_response_tokens) > config.engine.max_response_tokens:
        raise ConfigError(
            f"StagesConfig.max_response_tokens={stages.max_response_tokens} exceeds "
            f"EngineConfig.max_response_tokens={config.engine.max_response_tokens}; raise the latter"
        )
