"""What a configuration needs, added up without compiling: which ways to make a run fit are worth a compilation."""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jaxrl import mesh as meshes
from jaxrl.check.programs import Resident
from jaxrl.config import Config, ConfigError, LoraConfig, ModelConfig
from jaxrl.model import kv_pages, lora, moe, spec, transformer, value
from jaxrl.rl.targets import keeps_reference
from jaxrl.rollout.scheduler import pages_of
from jaxrl.train import transfer
from jaxrl.train.distill import teacher_model


def lengths(config: Config, devices: int) -> dict[str, int]:
    """Length of every axis of the training mesh on so many devices.

    Raises:
        ConfigError: they do not divide.
    """
    devices -= config.mesh.rollout_devices
    asked = {axis: getattr(config.mesh, axis) for axis in meshes.AXES}
    known = math.prod(length for length in asked.values() if length > 0)
    found = {axis: devices // known if length < 0 else length for axis, length in asked.items()}
    if math.prod(found.values()) != devices:
        raise ConfigError(f"MeshConfig asks for {found} of {devices} devices")
    return found


def resident(config: Config, devices: int) -> Resident:
    """What rests on a device, as ``programs.Shapes.resident`` finds it from the types.

    Raises:
        ConfigError: the mesh cannot split the model.
    """
    model, axes = config.model, lengths(config, devices)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    tensor = config.mesh.rollout_tensor or axes["tensor"]
    shares = meshes.replica_lengths(tensor, model.kv_heads)
    replica = AbstractMesh(tuple(shares.values()), tuple(shares))
    trained, base = _tables(model, config.lora)
    weights = _bytes(trained, meshes.PARAM_RULES, mesh)
    frozen = _bytes(base, meshes.PARAM_RULES, mesh) if config.lora.rank else 0
    adapters = _bytes(trained, meshes.ROLLOUT_RULES, replica, model.compute_dtype) if config.lora.rank else 0
    token = kv_pages.token_bytes(model, config.engine.kv_dtype)
    record = moe.record(model)
    recorded = record.size * record.dtype.itemsize if config.engine.record_experts else 0
    critic = _bytes(value.value_specs(model), meshes.PARAM_RULES, mesh) if config.critic.enabled else 0
    teacher = teacher_model(config.distill, model, "reinforcement")
    return Resident(
        weights=weights + frozen,
        optimizer=0 if config.optimizer.offload else 2 * weights,
        offloaded=2 * weights if config.optimizer.offload else 0,
        critic=critic,
        critic_optimizer=0 if config.optimizer.offload else 2 * critic,
        critic_offloaded=2 * critic if config.optimizer.offload else 0,
        teacher=0 if teacher is None else _bytes(transformer.param_specs(teacher), meshes.PARAM_RULES, mesh),
        reference=weights if keeps_reference(config.algorithm) else 0,
        engine=_bytes(base, meshes.ROLLOUT_RULES, replica, model.compute_dtype) + adapters,
        pages=pages_of(config.engine)[1] * config.engine.page_size * (token // shares["tensor"] + recorded),
        gradients=weights,
        hand_over=transfer.CHUNK_BYTES // mesh.size
        + max(_bytes(one, meshes.PARAM_RULES, mesh, model.compute_dtype) for one in jax.tree.leaves(trained)),
    )


@functools.lru_cache(maxsize=64)
def _tables(model: ModelConfig, adapters: LoraConfig) -> tuple[spec.Specs, spec.Specs]:
    """What is trained, and all weights, in codes where the adapters stand on such."""
    specs = transformer.param_specs(model)
    trained = lora.adapter_specs(specs, adapters) if adapters.rank else specs
    return trained, lora.base_specs(specs, adapters)


def row_pieces(config: Config, devices: int) -> int:
    """Into how many pieces the rows of a micro-batch are split.

    Raises:
        ConfigError: as for ``lengths``.
    """
    axes = lengths(config, devices)
    return meshes.pieces("batch", meshes.COMPUTE_RULES, AbstractMesh(tuple(axes.values()), tuple(axes)))


def tokens_per_device(config: Config, devices: int) -> int:
    """Tokens of a micro-batch that one device computes.

    Raises:
        ConfigError: rows cannot be split over the devices.
    """
    axes, pieces = lengths(config, devices), row_pieces(config, devices)
    shards = axes["context"] * axes["tensor"]
    if config.train.rows % pieces or config.train.row_tokens % shards:
        raise ConfigError(f"{config.train.rows} rows of {config.train.row_tokens} tokens over {axes}")
    return config.train.rows // pieces * (config.train.row_tokens // axes["context"])


def temporary(config: Config, devices: int, platform: str) -> int:
    """A guess at what the gradients of a micro-batch need while they are computed: inputs of every layer, one layer's
    values and its gathered weights, or else embedding and head, when no layer's are there; and the gradients themselves
    before they are added up.

    The shares for TPUs are fitted to what its compiler found for one dense model on meshes of 4 to 64 devices, with and
    without adapters: it never needed more than 1 % beyond this, nor less than 88 % of it.

    Args:
        platform: of a ``Target``.
    """
    model, tokens = config.model, tokens_per_device(config, devices)
    tensor, size = lengths(config, devices)["tensor"], jax.numpy.dtype(model.compute_dtype).itemsize
    kept = model.layers * (model.width if model.remat == "full" else 8 * model.width + 3 * model.ffn_width // tensor)
    largest = 6 * model.width + 4 * (model.ffn_width + model.query_heads * model.head_width)
    values = tokens * 4 * (kept + largest) + _experts(config, devices)
    layer = 4 * size * (_layer_count(model) // tensor)
    tables = model.vocab_size * model.width * (2 * size if config.lora.rank else 4 + 2 * size)
    axes = lengths(config, devices)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    gradients = _bytes(_tables(model, config.lora)[0], meshes.PARAM_RULES, mesh)
    if platform == "tpu":
        return values * 13 // 10 + tables * 5 // 6 + 2 * gradients
    return max(values + layer, tables) + gradients


@functools.lru_cache(maxsize=64)
def _layer_count(model: ModelConfig) -> int:
    """Parameters of one layer."""
    return spec.count(transformer.param_specs(dataclasses.replace(model, layers=1, dense_layers=(), vocab_size=8)))


def _experts(config: Config, devices: int) -> int:
    """Bytes of tokens that travelled to a device's experts, and of the rows that these may have to compute at once: of
    each token as many as it may choose of those that are here."""
    model, axes = config.model, lengths(config, devices)
    if not model.experts:
        return 0
    travelled = tokens_per_device(config, devices) * axes["expert"]
    here = max(1, model.experts // (axes["expert"] * axes["tensor"]))
    rows = min(travelled, model.expert_chunk or travelled) * min(model.experts_per_token, here)
    return 8 * (travelled * model.width + rows * (3 * model.width + model.expert_width))


def _bytes(specs: Any, rules: meshes.Rules, mesh: AbstractMesh, dtype: str | None = None) -> int:
    total = 0
    for one in jax.tree.leaves(specs):
        length = dict(zip(one.axes, one.shape, strict=True))
        size = (one.compute_dtype(dtype) if dtype else one.dtype).itemsize
        pieces = 1
        for axis in one.axes:
            parts = meshes.pieces(axis, rules, mesh)
            if length[axis] % parts:
                raise ConfigError(f"axis {axis!r} of length {length[axis]} cannot be split over {parts} devices")
            pieces *= parts
        total += math.prod(one.shape) // pieces * size
    return total
