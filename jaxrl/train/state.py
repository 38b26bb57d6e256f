"""What an optimizer step changes: parameters, optimizer state, step count."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxrl import mesh as meshes
from jaxrl.config import ConfigError, OptimizerConfig, PreferConfig, SftConfig
from jaxrl.model import spec

HOST, DEVICE = "pinned_host", "device"
"""Kinds of memory, as jax names them: the host's, from which the devices copy, and their own."""


@flax.struct.dataclass
class TrainState:
    """One pytree; every leaf of ``params`` and of the moments rests where ``mesh.PARAM_RULES`` puts it."""

    params: Any
    opt_state: Any
    step: jax.Array  # [] int32, optimizer updates done


def rl_optimizer(config: OptimizerConfig, specs: Any) -> optax.GradientTransformation:
    """AdamW with linear warm-up to a constant rate, global-norm clipping, and no decay on norms and biases."""
    peak, warmup = config.learning_rate, config.warmup_steps
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            optax.linear_schedule(peak / (warmup + 1), peak, warmup),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=spec.decay_mask(specs),
        ),
    )


def sft_optimizer(
    config: SftConfig | PreferConfig, optimizer: OptimizerConfig, specs: Any
) -> optax.GradientTransformation:
    """AdamW with linear warm-up and cosine decay to a tenth of the rate."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rate = optax.warmup_cosine_decay_schedule(
        peak / (warmup + 1), peak, warmup, max(config.steps, warmup + 1), 0.1 * peak
    )
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            rate, b1=optimizer.beta1, b2=0.95, weight_decay=optimizer.weight_decay, mask=spec.decay_mask(specs)
        ),
    )


def new_state(
    params: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, *, offload: bool = False
) -> TrainState:
    """A state at step 0; ``params`` are kept as they are, the moments take their shardings.

    Args:
        offload: the moments rest in the host's memory.
    """
    with jax.set_mesh(mesh):
        opt_state, step = jax.jit(lambda p: (optimizer.init(p), jnp.zeros((), jnp.int32)))(params)
    return TrainState(params, in_memory(opt_state, HOST) if offload else opt_state, step)


def restarted(
    state: TrainState, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, *, offload: bool = False
) -> TrainState:
    """As ``new_state`` with the parameters of ``state``, which is consumed: its moments are freed before there are
    others."""
    jax.tree.map(lambda leaf: leaf.delete(), state.opt_state)
    return new_state(state.params, optimizer, mesh, offload=offload)


def in_memory(opt_state: Any, kind: str) -> Any:
    """The optimizer state moved to ``HOST`` or ``DEVICE`` memory, split as it is; ``opt_state`` is consumed.

    Scalars stay where they are.
    """

    def move(leaf: jax.Array) -> jax.Array:
        if not leaf.ndim or leaf.sharding.memory_kind == kind:
            return leaf
        moved = jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))
        leaf.delete()  # jax donates nothing across kinds of memory
        return moved

    return jax.tree.map(move, opt_state)


def check_offload(mesh: jax.sharding.Mesh) -> None:
    """Refuse to offload where the devices cannot reach pinned host memory.

    Raises:
        ConfigError: with the kinds of memory there are.
    """
    kinds = [memory.kind for memory in mesh.devices.flat[0].addressable_memories()]
    if HOST not in kinds:
        raise ConfigError(
            f"OptimizerConfig.offload needs {HOST} memory, but the devices reach {', '.join(kinds)}; set it to False"
        )


def copied(params: Any) -> Any:
    """A real copy where they rest; the next update consumes the original. Compiles nothing."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding, may_alias=False), params)


def initial_params(specs: Any, mesh: jax.sharding.Mesh, seed: int) -> Any:
    """Random parameters, made directly where they will rest."""
    shardings = spec.shardings(specs, mesh, meshes.PARAM_RULES)
    return jax.jit(lambda key: spec.initialize(specs, key), out_shardings=shardings)(jax.random.key(seed))


def abstract_params(specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, types and shardings of the parameters on ``mesh``, without values."""
    shardings = spec.shardings(specs, mesh, meshes.PARAM_RULES)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        spec.abstract(specs),
        shardings,
    )


def abstract_state(specs: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, types and shardings of a state on ``mesh``, without values: the target of a restore."""
    params = abstract_params(specs, mesh)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda p: TrainState(p, optimizer.init(p), jnp.zeros((), jnp.int32)), params)
    return on_mesh(state, mesh)


def on_mesh(types: Any, mesh: jax.sharding.Mesh) -> Any:
    """The types of traced values as those of arrays on a mesh of devices; what says no layout is on all of them."""

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        partition = leaf.sharding.spec if leaf.sharding is not None else jax.sharding.PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, partition))

    return jax.tree.map(placed, types)
