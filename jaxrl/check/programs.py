"""Every program of a run and what rests on the devices beside it, for shapes alone: no weights, no data, no devices."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl import mesh as meshes
from jaxrl.check import flops
from jaxrl.config import Config, ModelConfig
from jaxrl.data.tree_packing import sharing_of, without_sharing
from jaxrl.model import logprob, lora, moe, quantized, spec, transformer
from jaxrl.records import Batch
from jaxrl.rl.supervised import SupervisedLoss, supervised_loss
from jaxrl.rl.targets import keeps_reference
from jaxrl.rollout import programs as rollout
from jaxrl.train import transfer
from jaxrl.train.session import check_attention, check_rows, packed_sections
from jaxrl.train.shares import check_processes
from jaxrl.train.state import TrainState, abstract_params, abstract_state, rl_optimizer
from jaxrl.train.update import Updater, policy_gradient_loss
from jaxrl_kernels.interval_attention import plan
from jaxrl_kernels.paged_attention import xla as paged_attention

TRAINING = ("first", "more", "apply")
ROLLOUT = ("prefill", "copy", "decode")
NAMES = (*TRAINING, "score", *ROLLOUT)
"""Programs of a run: gradients of the first micro-batch, of one more, the update; log-probabilities; the engine's."""


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
        hand_over: weights cast to the compute type that have not yet travelled to the engine.
    """

    weights: int
    optimizer: int
    offloaded: int
    reference: int
    engine: int
    pages: int
    gradients: int
    hand_over: int


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A run on a mesh, for shapes alone."""

    config: Config
    model: ModelConfig
    mesh: Mesh
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

    @property
    def recorded_experts(self) -> jax.ShapeDtypeStruct | None:
        """What an episode records of each token, if it does."""
        return moe.record(self.model) if self.config.engine.record_experts else None

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
            reference=per_device(self.reference),
            engine=per_device(self.engine_params),
            pages=per_device(rollout.abstract_pages(self.config.engine, self.model, self.replica)),
            gradients=per_device(self.state.params),
            hand_over=max(map(per_device, jax.tree.leaves(cast))) + transfer.CHUNK_BYTES // self.mesh.size,
        )

    def mesh_of(self, name: str) -> Mesh:
        """The mesh that a program runs on."""
        return self.replica if name in ROLLOUT else self.mesh

    def data(self, name: str) -> flops.Data:
        """What the data decide of a program, if one longest sequence fills each row and the experts' load is even."""
        engine, tokens = self.config.engine, self.config.train.row_tokens
        turns = (plan.blocks_of(tokens, plan.block_of(tokens)) + 1) / 2
        if name in ROLLOUT:
            turns = max(1.0, (engine.max_prompt_tokens + engine.max_response_tokens) / paged_attention.BLOCK / 2)
        return flops.Data(turns, self.model.experts, self.model.experts_per_token)

    def traced(self, names: Sequence[str] = NAMES) -> dict[str, jax.stages.Traced]:
        """The programs of these names, traced."""
        config, found = self.config, {}
        if set(names) & set(TRAINING):
            loss = policy_gradient_loss(self.model, config.algorithm, config.engine.temperature, self._supervised())
            optimizer = rl_optimizer(config.optimizer, self.trained)
            form = {"experts": self.recorded_experts, "sharing": sharing_of(config.train)}
            updater = Updater(loss, optimizer, self.mesh, **form, base=self.base)
            found |= updater.traced(self.state, config.train.rows, config.train.row_tokens, self.reference)
        if "score" in names:
            found["score"] = self._scoring()
        if set(names) & set(ROLLOUT):
            found |= rollout.traced(config.engine, self.model, self.replica, self.engine_params)
        return {name: found[name] for name in names}

    def _supervised(self) -> SupervisedLoss | None:
        """The loss beside the policy's, if there is one."""
        mix = self.config.mix
        if mix.demonstrations == "off" and not mix.observation_weight:
            return None
        return supervised_loss("MixConfig.loss", mix.loss, mix.loss_settings)

    def _scoring(self) -> jax.stages.Traced:
        """Log-probabilities of packed rows, with no gradient."""
        train = self.config.train

        def score(params: Any, base: lora.Base | None, tokens: jax.Array, positions: jax.Array, segments: jax.Array):
            params = params if base is None else base.adapted(params)
            return logprob.sequence_logprobs(params, self.model, tokens, positions, segments)

        rows = meshes.partition_spec(("batch", None), meshes.COMPUTE_RULES, self.mesh)
        tokens = jax.ShapeDtypeStruct(
            (train.rows, train.row_tokens), jnp.int32, sharding=jax.sharding.NamedSharding(self.mesh, rows)
        )
        with jax.set_mesh(self.mesh):
            return jax.jit(score).trace(self.state.params, self.base, tokens, tokens, tokens)


def shapes(config: Config, devices: Sequence[jax.Device]) -> Shapes:
    """A run on these devices.

    Raises:
        ConfigError: the mesh does not divide the devices, the model or the rows; as ``jaxrl train`` would refuse it.
    """
    training, playing = meshes.split_devices(config.mesh, devices)
    mesh = meshes.make_mesh(config.mesh, training)
    check_processes(config, len({device.process_index for device in devices}))
    check_rows(packed_sections(config), mesh)
    check_attention(config.model, mesh)
    specs = transformer.param_specs(config.model)
    spec.shardings(specs, mesh, meshes.PARAM_RULES)
    apart = playing if config.mesh.rollout_devices else None
    replicas = meshes.make_rollout_mesh(mesh, config.mesh.rollout_tensor, apart)
    spec.shardings(specs, replicas, meshes.ROLLOUT_RULES)
    if config.lora.rank:
        frozen = lora.base_specs(specs, config.lora)
        quantized.check_blocks(frozen, mesh, meshes.PARAM_RULES)
        quantized.check_blocks(frozen, replicas, meshes.ROLLOUT_RULES)
    return Shapes(config, config.model, mesh, meshes.replica_meshes(replicas)[0])


def per_device(types: Any) -> int:
    """Bytes of one device's piece of a tree of arrays or of their types."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(types)
    )


def batch_bytes(config: Config, mesh: Mesh) -> int:
    """Bytes of one device's piece of a micro-batch."""
    train = config.train
    batch = without_sharing(Batch.zeros(train.rows, train.row_tokens), sharing_of(train))
    pieces = meshes.pieces("batch", meshes.COMPUTE_RULES, mesh)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch)) // pieces
