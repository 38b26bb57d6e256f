"""Every program of a run and what rests on the devices beside it, for shapes alone: no weights, no data, no devices."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl import mesh as meshes
from jaxrl.check import flops
from jaxrl.config import Config, ModelConfig
from jaxrl.data.tree_packing import sharing_of, without_sharing
from jaxrl.model import logprob, lora, moe, quantized, spec, transformer, value
from jaxrl.records import Batch
from jaxrl.rl.supervised import SupervisedLoss, supervised_loss
from jaxrl.rl.targets import keeps_reference
from jaxrl.rollout import programs as rollout
from jaxrl.train import sync, transfer
from jaxrl.train.attention import check_attention, check_paged_attention, packed_kernels, paged_kernels
from jaxrl.train.critic import critic_optimizer, value_loss, values_for_all
from jaxrl.train.distill import distillation_loss, teacher_model
from jaxrl.train.session import check_rows, packed_sections
from jaxrl.train.shares import check_processes
from jaxrl.train.state import TrainState, abstract_params, abstract_state, rl_optimizer
from jaxrl.train.update import Updater, policy_gradient_loss
from jaxrl_kernels import choice
from jaxrl_kernels.interval_attention import plan
from jaxrl_kernels.paged_attention import xla as paged_attention

TRAINING = ("first", "more", "apply")
CRITIC = ("values", "critic more", "critic apply")
ROLLOUT = ("prefill", "copy", "decode")
HAND_OVER = "hand over"
NAMES = (*TRAINING, *CRITIC, "score", *ROLLOUT, HAND_OVER)
"""Programs of a run: gradients of the first micro-batch, of one more, the update; a critic's, if there is one;
log-probabilities; the engine's; what lays out weights anew that go to it."""


@dataclasses.dataclass(frozen=True)
class Resident:
    """Bytes of one device that stay from step to step, and those of what a step adds.

    Attributes:
        weights: what the optimizer changes, and frozen weights beneath it, as they rest.
        optimizer: its state, where it rests on the devices.
        offloaded: the same where it rests in the host's memory.
        reference: weights of the reference policy.
        engine: the replica's copy of the weights.
        pages: KV pages.
        gradients: of all trained weights.
        hand_over: weights cast to the compute type that have not yet travelled to the engine, beside what the program
            needs that lays them out anew.
        critic: its weights as they rest, whose gradients take as much.
        critic_optimizer: as ``optimizer``, and
        critic_offloaded: as ``offloaded``.
        teacher: its weights.
    """

    weights: int
    optimizer: int
    offloaded: int
    reference: int
    engine: int
    pages: int
    gradients: int
    hand_over: int
    critic: int = 0
    critic_optimizer: int = 0
    critic_offloaded: int = 0
    teacher: int = 0


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A run on a mesh, for shapes alone."""

    config: Config
    model: ModelConfig
    mesh: Mesh
    rollout: Mesh
    replica: Mesh

    @functools.cached_property
    def specs(self) -> spec.Specs:
        return transformer.param_specs(self.model)

    @functools.cached_property
    def trained(self) -> spec.Specs:
        return lora.adapter_specs(self.specs, self.config.lora) if self.config.lora.rank else self.specs

    @functools.cached_property
    def state(self) -> TrainState:
        return abstract_state(self.trained, rl_optimizer(self.config.optimizer, self.trained), self.mesh)

    @functools.cached_property
    def base(self) -> lora.Base | None:
        """Frozen weights, in a run that trains adapters."""
        if not self.config.lora.rank:
            return None
        specs = lora.base_specs(self.specs, self.config.lora)
        return lora.Base(abstract_params(specs, self.mesh), lora.scale_of(self.config.lora))

    @functools.cached_property
    def critic(self) -> TrainState | None:
        if not self.config.critic.enabled:
            return None
        specs = value.value_specs(self.model)
        return abstract_state(specs, critic_optimizer(self.config, specs), self.mesh)

    @functools.cached_property
    def teacher_model(self) -> ModelConfig | None:
        return teacher_model(self.config.distill, self.model, "reinforcement")

    @functools.cached_property
    def teacher(self) -> Any | None:
        """The weights of a teacher."""
        if self.teacher_model is None:
            return None
        return abstract_params(transformer.param_specs(self.teacher_model), self.mesh)

    @property
    def recorded_experts(self) -> jax.ShapeDtypeStruct | None:
        """What an episode records of each token, if it does."""
        return recorded_experts(self.config)

    @property
    def reference(self) -> Any | None:
        return self.state.params if keeps_reference(self.config.algorithm) else None

    @functools.cached_property
    def engine_params(self) -> Any:
        """The weights of one replica, with adapters if there are any."""
        specs = lora.base_specs(self.specs, self.config.lora)
        params = rollout.abstract_params(self.model, self.replica, specs)
        if self.base is None:
            return params
        return lora.attached(params, rollout.abstract_params(self.model, self.replica, self.trained))

    def resident(self) -> Resident:
        """What rests on the devices."""
        moments, offload = per_device(self.state.opt_state), self.config.optimizer.offload
        critic_moments = 0 if self.critic is None else per_device(self.critic.opt_state)
        cast = jax.tree.map(
            lambda leaf, one: jax.ShapeDtypeStruct(
                leaf.shape, one.compute_dtype(self.model.compute_dtype), sharding=leaf.sharding
            ),
            self.state.params,
            self.trained,
        )
        return Resident(
            weights=per_device(self.state.params) + per_device(self.base),
            optimizer=0 if offload else moments,
            offloaded=moments if offload else 0,
            critic=0 if self.critic is None else per_device(self.critic.params),
            critic_optimizer=0 if offload else critic_moments,
            critic_offloaded=critic_moments if offload else 0,
            teacher=per_device(self.teacher),
            reference=per_device(self.reference),
            engine=per_device(self.engine_params),
            pages=per_device(rollout.abstract_pages(self.config.engine, self.model, self.replica)),
            gradients=per_device(self.state.params),
            hand_over=max(map(per_device, jax.tree.leaves(cast))) + transfer.CHUNK_BYTES // self.mesh.size,
        )

    def kernels(self) -> list[str]:
        """What computes attention, and why what might be quicker does not."""
        with warnings.catch_warnings(record=True) as said:
            choice.say_once.cache_clear()  # whatever of it was said before
            lines = packed_kernels(self.model, self.mesh, packed_sections(self.config))
            lines += paged_kernels(self.config.engine, self.model, self.rollout)
        return [*lines, *dict.fromkeys(str(warning.message) for warning in said)]

    def mesh_of(self, name: str) -> Mesh:
        """The mesh that a program runs on."""
        return self.replica if name in ROLLOUT else self._in_replicas if name == HAND_OVER else self.mesh

    def data(self, name: str) -> flops.Data:
        """What the data decide of a program, if one longest sequence fills each row and the experts' load is even."""
        engine, tokens = self.config.engine, self.config.train.row_tokens
        turns = (plan.blocks_of(tokens, plan.block_of(tokens)) + 1) / 2
        if name in ROLLOUT:
            turns = max(1.0, (engine.max_prompt_tokens + engine.max_response_tokens) / paged_attention.BLOCK / 2)
        return flops.Data(turns, self.model.experts, self.model.experts_per_token)

    def traced(self, names: Sequence[str] = NAMES) -> dict[str, jax.stages.Traced]:
        """The programs of these names that the run has, traced."""
        found: dict[str, jax.stages.Traced] = {}
        if set(names) & set(TRAINING):
            found |= self._training()
        if set(names) & set(CRITIC) and self.critic is not None:
            found |= self._critic(self.critic)
        if "score" in names:
            found["score"] = self._scoring()
        if set(names) & set(ROLLOUT):
            found |= rollout.traced(self.config.engine, self.model, self.replica, self.engine_params)
        if HAND_OVER in names and (handed := self._handed()) is not None:
            found[HAND_OVER] = handed
        return {name: found[name] for name in names if name in found}

    def _training(self) -> dict[str, jax.stages.Traced]:
        """The update's programs, with the teacher's in them."""
        config = self.config
        loss = policy_gradient_loss(self.model, config.algorithm, config.engine.temperature, self._supervised())
        if self.teacher_model is not None:
            models, temperature = (self.model, self.teacher_model), config.engine.temperature
            loss = distillation_loss(loss, models, config.distill, "reinforcement", temperature)
        optimizer = rl_optimizer(config.optimizer, self.trained)
        form = {"experts": self.recorded_experts, "sharing": sharing_of(config.train)}
        updater = Updater(loss, optimizer, self.mesh, **form, base=self.base, teacher=self.teacher)
        return updater.traced(self.state, config.train.rows, config.train.row_tokens, self.reference)

    def _critic(self, state: TrainState) -> dict[str, jax.stages.Traced]:
        """As ``critic.Critic`` compiles them."""
        config, train = self.config, self.config.train
        optimizer = critic_optimizer(config, value.value_specs(self.model))
        updater = Updater(value_loss(self.model, config.critic), optimizer, self.mesh)
        traced = updater.traced(state, train.rows, train.row_tokens)
        batch = jax.tree.map(lambda leaf: self._of_rows(leaf.dtype), Batch.zeros(train.rows, train.row_tokens))
        with jax.set_mesh(self.mesh):
            values = jax.jit(functools.partial(values_for_all, model=self.model)).trace(state.params, batch)
        return {"values": values, "critic more": traced["more"], "critic apply": traced["apply"]}

    def _supervised(self) -> SupervisedLoss | None:
        """The loss beside the policy's, if there is one."""
        mix = self.config.mix
        if mix.demonstrations == "off" and not mix.observation_weight:
            return None
        return supervised_loss("MixConfig.loss", mix.loss, mix.loss_settings)

    def _scoring(self) -> jax.stages.Traced:
        """Log-probabilities of packed rows, with no gradient."""

        def score(params: Any, base: lora.Base | None, tokens: jax.Array, positions: jax.Array, segments: jax.Array):
            params = params if base is None else base.adapted(params)
            return logprob.sequence_logprobs(params, self.model, tokens, positions, segments)

        tokens = self._of_rows(jnp.int32)
        with jax.set_mesh(self.mesh):
            return jax.jit(score).trace(self.state.params, self.base, tokens, tokens, tokens)

    def _of_rows(self, dtype: Any) -> jax.ShapeDtypeStruct:
        """The type of a field of a micro-batch."""
        rows = meshes.partition_spec(("batch", None), meshes.COMPUTE_RULES, self.mesh)
        shape = (self.config.train.rows, self.config.train.row_tokens)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(self.mesh, rows))

    @functools.cached_property
    def _in_replicas(self) -> Mesh:
        """The training mesh with its devices in the order in which replicas have them: no one program takes two."""
        ordered = self.rollout.devices.reshape(self.mesh.devices.shape)
        return Mesh(ordered, self.mesh.axis_names, axis_types=self.mesh.axis_types)

    def _handed(self) -> jax.stages.Traced | None:
        """The new layout of the largest part of a weight that travels at once; None where none changes its layout, or
        weights go to other devices, in blocks that count as ``Resident.hand_over``."""
        if self.config.mesh.rollout_devices:
            return None
        parts = []
        for one in jax.tree.leaves(self.trained):
            before, after = (
                jax.sharding.NamedSharding(mesh, meshes.partition_spec(one.axes, rules, mesh))
                for mesh, rules in ((self._in_replicas, meshes.PARAM_RULES), (self.rollout, meshes.ROLLOUT_RULES))
            )
            if not before.is_equivalent_to(after, len(one.shape)):
                dtype, shape = one.compute_dtype(self.model.compute_dtype), one.shape
                if sync.is_cut(before, after):
                    shape = (sync.layers_at_once(shape, dtype.itemsize), *shape[1:])
                parts.append((jax.ShapeDtypeStruct(shape, dtype, sharding=before), after))
        if not parts:
            return None
        part, after = max(parts, key=lambda pair: pair[0].size * pair[0].dtype.itemsize)
        return jax.jit(sync.same, out_shardings=after).trace(part)


def shapes(config: Config, devices: Sequence[jax.Device]) -> Shapes:
    """A run on these devices.

    Raises:
        ConfigError: the mesh does not divide the devices, the model or the rows; as ``jaxrl train`` would refuse it.
    """
    training, playing = meshes.split_devices(config.mesh, devices)
    mesh = meshes.make_mesh(config.mesh, training)
    check_processes(config, len({device.process_index for device in devices}))
    check_rows(packed_sections(config), mesh)
    check_attention(config.model, mesh, packed_sections(config))
    specs = transformer.param_specs(config.model)
    spec.shardings(specs, mesh, meshes.PARAM_RULES)
    apart = playing if config.mesh.rollout_devices else None
    replicas = meshes.make_rollout_mesh(mesh, config.mesh.rollout_tensor, apart, config.model.kv_heads)
    spec.shardings(specs, replicas, meshes.ROLLOUT_RULES)
    check_paged_attention(config.engine, config.model, replicas)
    if config.lora.rank:
        frozen = lora.base_specs(specs, config.lora)
        quantized.check_blocks(frozen, mesh, meshes.PARAM_RULES)
        quantized.check_blocks(frozen, replicas, meshes.ROLLOUT_RULES)
    return Shapes(config, config.model, mesh, replicas, meshes.replica_meshes(replicas)[0])


def per_device(types: Any) -> int:
    """Bytes of one device's piece of a tree of arrays or of their types."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(types)
    )


def batch_bytes(config: Config, mesh: Mesh) -> int:
    """Bytes of one device's piece of a micro-batch."""
    train = config.train
    batch = without_sharing(Batch.zeros(train.rows, train.row_tokens), sharing_of(train))
    held = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    if (recorded := recorded_experts(config)) is not None:
        held += (batch.tree or batch).tokens.size * recorded.size * recorded.dtype.itemsize
    return held // meshes.pieces("batch", meshes.COMPUTE_RULES, mesh)


def recorded_experts(config: Config) -> jax.ShapeDtypeStruct | None:
    """What an episode records of each token, if it does."""
    return moe.record(config.model) if config.engine.record_experts else None
