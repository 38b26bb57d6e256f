"""What is fixed during a run, assembled once: tokenizer, problems, model specification, mesh, and the player."""

import asyncio
import contextlib
import dataclasses
import functools
import pathlib
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jax
import optax

from jaxrl import mesh as meshes
from jaxrl.config import Config, ConfigError, ModelConfig, PreferConfig, SftConfig, TrainConfig
from jaxrl.data import demonstrations, problems, recorded
from jaxrl.data.recorded import Worked
from jaxrl.envs.python_tool import PythonTool
from jaxrl.envs.rendering import check_limit
from jaxrl.episodes import Player
from jaxrl.model import adapter_folder, companions, folders, hf, lora, moe, quantized, spec, transformer, value
from jaxrl.model.config_json import check_exportable
from jaxrl.processes.exchange import is_first
from jaxrl.records import Problem
from jaxrl.rewards.comparing import MATH, comparison
from jaxrl.rewards.scorer import scorer
from jaxrl.rewards.verifier import open_verifier
from jaxrl.rl import algorithm
from jaxrl.rl.distillation import distillation
from jaxrl.rl.outcomes import Recorded
from jaxrl.rl.supervised import supervised_loss
from jaxrl.rollout.fleet import Fleet
from jaxrl.rollout.scheduler import Scheduler
from jaxrl.sandbox import pool_from_config
from jaxrl.text.chat import ChatFormat
from jaxrl.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from jaxrl.train.attention import (
    Crowding,
    check_attention,
    check_name,
    check_paged_attention,
    packed_kernels,
    paged_kernels,
    try_attention,
    try_paged_attention,
)
from jaxrl.train.joint_episodes import joint_play
from jaxrl.train.progress import RunProgress
from jaxrl.train.run import RunError, RunFolder
from jaxrl.train.shares import Shares, check_processes
from jaxrl.train.state import check_offload, initial_params, rl_optimizer
from jaxrl.train.sync import hand_over, rollout_base, rollout_params, with_adapters


@dataclasses.dataclass(frozen=True)
class Session:
    """Everything a run uses and never changes. Problems and demonstrations are only those it was opened with; ``base``
    is there in a run that trains adapters, once its weights were needed."""

    config: Config
    run: RunFolder
    tokenizer: Tokenizer
    chat: ChatFormat
    model: ModelConfig
    mesh: jax.sharding.Mesh
    train_problems: tuple[Problem, ...] = ()
    eval_problems: tuple[Problem, ...] = ()
    demonstrations: tuple[Worked, ...] = ()
    base: lora.Base | None = None
    valued: bool = False  # a decoder with a value head is trained, not a policy

    @functools.cached_property
    def rollout_mesh(self) -> jax.sharding.Mesh:
        config = self.config.mesh
        playing = meshes.split_devices(config)[1] if config.rollout_devices else None
        return meshes.make_rollout_mesh(self.mesh, config.rollout_tensor, playing, self.model.kv_heads)

    @functools.cached_property
    def launches(self) -> contextlib.AbstractContextManager[Any]:
        """Held while work is handed to devices that both train and roll out, see ``Engine``; a single one needs no
        order."""
        shared = self.mesh.size > 1 and not self.config.mesh.rollout_devices
        return threading.Lock() if shared else contextlib.nullcontext()

    @functools.cached_property
    def crowding(self) -> Crowding:
        """What is said of packed rows with too many segments."""
        return Crowding(self.model, self.mesh)

    @functools.cached_property
    def shares(self) -> Shares:
        """Divides what is played among the processes of the run."""
        return Shares()

    @functools.cached_property
    def specs(self) -> spec.Specs:
        """The table of the decoder, with a value head if it is to have one."""
        return value.value_specs(self.model) if self.valued else transformer.param_specs(self.model)

    @functools.cached_property
    def trained_specs(self) -> spec.Specs:
        """The table of what the optimizer changes: adapters if there are any, else all of the decoder's parameters."""
        return lora.adapter_specs(self.specs, self.config.lora) if self.config.lora.rank else self.specs

    @property
    def recorded_experts(self) -> jax.ShapeDtypeStruct | None:
        """What an episode records of each token, [L, experts of a token]; None if it does not."""
        return moe.record(self.model) if self.config.engine.record_experts else None

    @functools.cached_property
    def rl_optimizer(self) -> optax.GradientTransformation:
        return rl_optimizer(self.config.optimizer, self.trained_specs)

    def kernels(self) -> list[str]:
        """What computes attention while episodes are played and trained on, for the run folder."""
        packed = packed_kernels(self.model, self.mesh, packed_sections(self.config))
        return packed + paged_kernels(self.config.engine, self.model, self.rollout_mesh)

    def keep_tokenizer(self) -> None:
        """Write the tokenizer and its chat template into the run folder, and what came with the model it begins from;
        once, whole or not at all."""
        source = self.config.model.path
        if source and not self.run.source.is_dir():
            with folders.replaced_folder(self.run.source) as staging:
                if is_first():
                    companions.keep(source, staging, tokenizer=not self.config.tokenizer.path)
        if not self.run.tokenizer.is_dir():
            with folders.replaced_folder(self.run.tokenizer) as staging:
                if is_first():
                    self.chat.save(staging)

    def keep_base(self) -> None:
        """Write the frozen weights into the run folder, once, whole or not at all: checkpoints hold adapters alone, and
        a run must go on from the same bits even when the model it began from has been moved or changed."""
        if self.base is None:
            return
        if self.config.lora.base != "none" and self.config.model.path:
            hf.copy_folder(self.config.model.path, self.run.base, also=self.chat.save)  # floats that are nowhere else
            return
        with jax.set_mesh(self.mesh):
            params = quantized.all_rounded(self.base.params)
        hf.save_folder(self.run.base, self.model, params, also=self.chat.save)

    async def check_sandbox(self) -> None:
        """Start the sandbox and stop it, so that a machine that refuses it is known before anything is trained.

        Raises:
            SandboxUnavailable: with what is missing and the remedy.
        """
        async with pool_from_config(self.config.sandbox):
            pass

    def problem_stream(self, progress: RunProgress) -> problems.ProblemStream:
        """The endless stream of problems to train on, at the run's position; only those the stage keeps."""
        chosen = self.train_problems
        if progress.problems is not None:
            kept = set(progress.problems)
            chosen = tuple(problem for problem in chosen if problem.id in kept)
        stream = problems.ProblemStream(chosen, self.config.data.seed)
        if progress.stream:
            stream.restore(progress.stream)
        return stream

    def first_params(self, on_bytes: hf.OnBytes = hf.ignore) -> Any:
        """Parameters the run starts from: those of ``ModelConfig.path``, or random ones."""
        folder = self.config.model.path
        if folder and self.valued:
            return valued_params(self.model, self.mesh, folder, self.config.train.seed, on_bytes)
        if folder:
            return self._weights_in(folder, on_bytes)
        params = initial_params(self.specs, self.mesh, self.config.train.seed)
        if not self.config.lora.rank:
            return params
        layers = {name: self._frozen(("layers", name), weight) for name, weight in params["layers"].items()}
        return {**params, "layers": layers}

    def first_adapters(self) -> lora.Adapters:
        """Adapters the run starts from: those of ``LoraConfig.path``, or new ones, which add nothing."""
        if not self.config.lora.path:
            return initial_params(self.trained_specs, self.mesh, self.config.train.seed)
        adapters = adapter_folder.load_adapter(self.config.lora.path, self.config.lora, self.trained_specs)
        return jax.device_put(adapters, spec.shardings(self.trained_specs, self.mesh, meshes.PARAM_RULES))

    def on_base(self, *, kept: bool, on_bytes: hf.OnBytes = hf.ignore) -> "Session":
        """The session with the frozen weights beneath its adapters; unchanged if all weights are trained.

        Args:
            kept: those that ``keep_base`` wrote, for a run that goes on; otherwise those a run starts from.

        Raises:
            RunError: nothing was kept, since the run trains all weights.
        """
        if not self.config.lora.rank:
            return self
        if kept and not self.run.base.is_dir():
            raise RunError(
                f"{self.run.path} trained all weights, but LoraConfig.rank={self.config.lora.rank} asks for adapters; "
                "export it, and start a new run with ModelConfig.path set to the export"
            )
        params = self._weights_in(self.run.base, on_bytes) if kept else self.first_params(on_bytes)
        return dataclasses.replace(self, base=lora.Base(params, lora.scale_of(self.config.lora)))

    def rollout_weights(self, trained: Any) -> tuple[Any, ...]:
        """What the engines compute with, see ``sync``. Of weights with adapters only the adapters are copied."""
        if self.base is None:
            return rollout_params(trained, self.model, self.rollout_mesh)
        return with_adapters(self._rollout_base, trained, self.trained_specs, self.model, self.rollout_mesh)

    async def hand_over(self, trained: Any, fleet: Fleet, version: int) -> None:
        """Give every replica the trainer's weights; frozen ones stay where they are and are never freed."""
        if self.base is None:
            await hand_over(trained, self.model, fleet, version, self.launches)
            return

        def moved() -> tuple[Any, ...]:
            with self.launches:
                return self.rollout_weights(trained)

        fleet.set_weights(await asyncio.to_thread(moved), version)

    @functools.cached_property
    def _rollout_base(self) -> tuple[lora.Base, ...]:
        return rollout_base(self.base, self.model, self.rollout_mesh)

    def _weights_in(self, folder: str | pathlib.Path, on_bytes: hf.OnBytes) -> Any:
        dtype = self.config.model.param_dtype
        return hf.load_folder(folder, dtype, mesh=self.mesh, on_bytes=on_bytes, keep=self._frozen)[1]

    def _frozen(self, key: tuple[str, ...], weight: jax.Array) -> Any:
        """A parameter as the run keeps it: in codes where the weights beneath adapters are."""
        kind = self.config.lora.base
        if kind == "none" or key[0] != "layers":
            return weight
        with jax.set_mesh(self.mesh):
            return quantized.quantized(key[1], self.specs["layers"][key[1]], weight, kind)


def valued_params(
    model: ModelConfig, mesh: jax.sharding.Mesh, folder: str, seed: int, on_bytes: hf.OnBytes = hf.ignore
) -> Any:
    """The decoder in a folder with the value head that lies there, or with a new one."""
    decoder = hf.load_folder(folder, model.param_dtype, mesh=mesh, on_bytes=on_bytes)[1]
    specs = {value.HEAD: value.value_specs(model)[value.HEAD]}
    head = value.load_head(pathlib.Path(folder), model.width)
    if head is None:
        return {value.DECODER: decoder} | initial_params(specs, mesh, seed)
    return {value.DECODER: decoder} | jax.device_put(
        {value.HEAD: head}, spec.shardings(specs, mesh, meshes.PARAM_RULES)
    )


def open_session(config: Config, run: RunFolder) -> Session:
    """Read or make everything training needs, cheap checks first.

    Raises:
        ConfigError: values that the data shows to be wrong, such as prompts longer than the engine takes.
        DataError: problems or demonstrations that cannot be used.
    """
    check_name(config.model)
    check_processes(config, jax.process_count())
    algorithm.check(config.algorithm, what_is_recorded(config))
    joint_play(config.env, config.engine.max_prompt_tokens)
    if config.reward.verifier != MATH:
        comparison(config.reward.verifier)
    supervised_loss("SftConfig.loss", config.sft.loss, config.sft.loss_settings)
    distillation(config.distill)
    supervised_loss("MixConfig.loss", config.mix.loss, config.mix.loss_settings)
    Scheduler(config.engine)  # refuses pages that cannot hold one sequence
    train, held_out = problems.load_split(config.data)
    scorer(config.reward, train[0])  # refuses components that fail on the run's own problems
    worked = demonstrations.load(config.sft, config.data, train) if config.sft.demonstrations else ()
    texts = (problem.question for problem in train)
    session = _session(config, run, _tokenizer(config, run, [*texts, *recorded.texts_of(worked)]))
    _check_prompts(config, session.chat, (*train, *held_out))
    check_rows(packed_sections(config), session.mesh)
    check_attention(session.model, session.mesh, packed_sections(config))
    check_paged_attention(config.engine, session.model, session.rollout_mesh)
    try_attention(session.model, session.mesh, packed_sections(config))
    try_paged_attention(config.engine, session.model, session.rollout_mesh)
    if config.optimizer.offload:
        check_offload(session.mesh)
    return dataclasses.replace(session, train_problems=train, eval_problems=held_out, demonstrations=worked)


def reopen_session(config: Config, run: RunFolder, eval_problems: tuple[Problem, ...] = ()) -> Session:
    """What it takes to use a checkpoint of a run: its tokenizer and model, no training data.

    Raises:
        TokenizerError, FileNotFoundError: the run folder has no tokenizer.
        ConfigError: ``eval_problems`` longer than the engine takes, or kernels for them that cannot be had.
    """
    check_name(config.model)
    session = _session(config, run, load_tokenizer(run.tokenizer))
    _check_prompts(config, session.chat, eval_problems)
    if eval_problems:
        check_paged_attention(config.engine, session.model, session.rollout_mesh)
        try_paged_attention(config.engine, session.model, session.rollout_mesh)
    return dataclasses.replace(session, eval_problems=eval_problems)


def open_offline_session(config: Config, run: RunFolder, texts: Sequence[str], *, valued: bool = False) -> Session:
    """What it takes to train without episodes.

    Args:
        texts: what a tokenizer is trained on where none is configured.
        valued: train a decoder with a value head.

    Raises:
        ConfigError, TokenizerError, FileNotFoundError: a model or tokenizer that cannot be used.
    """
    check_name(config.model)
    if valued and config.lora.rank:
        raise ConfigError(
            f"LoraConfig.rank={config.lora.rank}: a model with a value head is trained whole; set it to 0"
        )
    session = dataclasses.replace(_session(config, run, _tokenizer(config, run, texts)), valued=valued)
    check_rows((config.prefer,), session.mesh)
    check_attention(session.model, session.mesh, (config.prefer,))
    try_attention(session.model, session.mesh, (config.prefer,))
    if config.optimizer.offload:
        check_offload(session.mesh)
    return session


@contextlib.asynccontextmanager
async def open_player(session: Session, params: Any, version: int) -> AsyncIterator[Player]:
    """Engines, sandbox and verifier, started and compiled; everything is stopped on the way out.

    Args:
        params: from ``rollout_params``, one tree for each replica of the rollout mesh.
        version: name of these weights.
    """
    config = session.config
    engine = Fleet(
        config.engine,
        session.model,
        params,
        session.rollout_mesh,
        stop_ids=(session.tokenizer.end_id,),
        seed=config.train.seed,
        version=version,
        launches=session.launches,
    )
    del params  # the engines free theirs when they get new ones
    engine.compile()
    scoring = scorer(config.reward)
    await asyncio.to_thread(scoring.compile, config.engine.max_prompt_tokens + config.engine.max_response_tokens)
    async with pool_from_config(config.sandbox) as pool, open_verifier(config.reward) as verifier, engine.serving():
        yield Player(
            engine=engine,
            chat=session.chat,
            tokenizer=session.tokenizer,
            tools=(PythonTool(pool),),
            verifier=verifier,
            config=config.env,
            max_response_tokens=config.engine.max_response_tokens,
            scorer=scoring,
        )


def what_is_recorded(config: Config) -> Recorded:
    """What the trajectories of a run hold for an advantage."""
    rewarded = scorer(config.reward)
    whole = {name: weight for name, weight in rewarded.weights.items() if name not in rewarded.of_turns}
    return Recorded(
        whole,
        turn_rewards=bool(rewarded.of_turns),
        greedy_rewards=config.algorithm.greedy_baseline,
        values=config.critic.enabled,
        contents=jax.process_count() == 1,
        square_sums=config.algorithm.square_sums,
        reference_ratios=config.algorithm.reference_ratios,
        hint_gains=bool(config.algorithm.hint),
        several_agents=bool(config.env.joint_episode),
    )


def _session(config: Config, run: RunFolder, tokenizer: Tokenizer) -> Session:
    chat = ChatFormat(config.chat, (PythonTool.schema,), tokenizer)
    check_limit(tokenizer, config.env.max_tool_tokens)
    training, _ = meshes.split_devices(config.mesh)
    mesh = meshes.make_mesh(config.mesh, training)
    session = Session(config, run, tokenizer, chat, _model(config.model, tokenizer), mesh)
    if config.engine.record_experts and not session.model.experts:
        raise ConfigError(
            f"EngineConfig.record_experts=True, but this {session.model.family} has no experts; set it to False"
        )
    spec.shardings(session.specs, session.mesh, meshes.PARAM_RULES)  # refuses meshes that cannot split the model
    spec.shardings(session.specs, session.rollout_mesh, meshes.ROLLOUT_RULES)
    if config.lora.rank:
        lora.adapter_specs(session.specs, config.lora)  # refuses targets that name nothing
        frozen = lora.base_specs(session.specs, config.lora)
        quantized.check_blocks(frozen, session.mesh, meshes.PARAM_RULES)
        quantized.check_blocks(frozen, session.rollout_mesh, meshes.ROLLOUT_RULES)
    return session


def _tokenizer(config: Config, run: RunFolder, texts: Sequence[str]) -> Tokenizer:
    """The run's, or the one that is configured, or one trained on ``texts``."""
    if run.tokenizer.is_dir():
        return load_tokenizer(run.tokenizer)
    if path := config.tokenizer.path or config.model.path:
        return load_tokenizer(path)
    return train_sentencepiece(texts, config.tokenizer.vocab_size)


def _model(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The architecture, with the vocabulary the tokenizer needs."""
    if config.path:
        config = dataclasses.replace(hf.read_config(config.path, base=config), path=config.path)
    elif not config.vocab_size:
        config = dataclasses.replace(config, vocab_size=-(-tokenizer.vocab_size // 8) * 8)
    hf.check_vocabulary(config, tokenizer.vocab_size)
    check_exportable(config)
    return config


def packed_sections(config: Config) -> tuple[SftConfig | TrainConfig, ...]:
    """The sections that say how large a micro-batch of ``jaxrl train`` is."""
    return (config.sft, config.train) if config.sft.demonstrations else (config.train,)


def check_rows(sections: Sequence[SftConfig | PreferConfig | TrainConfig], mesh: jax.sharding.Mesh) -> None:
    """Every micro-batch must be cut into equal pieces.

    Raises:
        ConfigError: rows or their tokens cannot be; the message names a number that can.
    """
    for axis, field, over in (
        ("batch", "rows", "MeshConfig.slice x data x fsdp x expert"),
        ("token_shards", "row_tokens", "MeshConfig.context x tensor"),
    ):
        pieces = meshes.pieces(axis, meshes.COMPUTE_RULES, mesh)
        for section in sections:
            if rest := getattr(section, field) % pieces:
                raise ConfigError(
                    f"{type(section).__name__}.{field}={getattr(section, field)} cannot be split over {pieces} devices "
                    f"({over}); make it {getattr(section, field) + pieces - rest}, or another multiple of {pieces}"
                )


def _check_prompts(config: Config, chat: ChatFormat, questions: tuple[Problem, ...]) -> None:
    limit = config.engine.max_prompt_tokens
    lengths = [(len(chat.prompt(problem.question)), problem.id) for problem in questions]
    too_long = [length for length in lengths if length[0] > limit]
    if too_long:
        tokens, name = max(too_long)
        raise ConfigError(
            f"max_prompt_tokens={limit} but {len(too_long)} of {len(lengths)} problems have more, the longest, "
            f'"{name}", {tokens}; raise EngineConfig.max_prompt_tokens (and TrainConfig.row_tokens), or '
            "take them out of the file"
        )
