"""Whether the kernels that ModelConfig.attention names can be had: asked at start, before anything is traced."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxrl import mesh as meshes
from jaxrl.config import ConfigError, EngineConfig, ModelConfig, PreferConfig, SftConfig, TrainConfig
from jaxrl.rollout.rounds import attention_shapes
from jaxrl_kernels import choice
from jaxrl_kernels.interval_attention import backends as interval
from jaxrl_kernels.paged_attention import backends as paged


def check_attention(
    model: ModelConfig, mesh: Mesh | AbstractMesh, sections: Sequence[SftConfig | PreferConfig | TrainConfig]
) -> None:
    """What computes attention over packed rows must run on the devices and take the rows.

    Args:
        model: the architecture.
        mesh: that trains.
        sections: that say how large a micro-batch is.

    Raises:
        ConfigError: kernels are asked for whose devices these are not, or that cannot take the model or the rows.
    """
    batch, parts = (meshes.pieces(axis, meshes.COMPUTE_RULES, mesh) for axis in ("batch", "tokens"))
    ring = model.context_attention == "ring" and parts > 1
    heads = model.query_heads // model.kv_heads, model.head_width, model.compute_dtype
    shapes = [
        interval.Shape(section.rows // batch, part, part if ring else section.row_tokens, *heads, behind=ring)
        for section in sections
        for part in [section.row_tokens // parts]
    ]
    _check_backend(model, mesh, interval.BACKENDS, shapes)


def check_paged_attention(engine: EngineConfig, model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """What computes attention over KV pages must run on the devices and take the engine's shapes.

    Args:
        engine: the shapes.
        model: the architecture.
        mesh: of one replica or of all.

    Raises:
        ConfigError: as ``check_attention``.
    """
    _check_backend(model, mesh, paged.BACKENDS, attention_shapes(engine, model, mesh))


def _check_backend(
    model: ModelConfig,
    mesh: Mesh | AbstractMesh,
    table: Mapping[str, choice.Backend],
    shapes: Sequence[Any],
) -> None:
    if model.attention not in table:  # "auto", or a kernel for packed rows only
        return
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if reason := choice.refusal(table[model.attention], shapes):
            raise ConfigError(f"ModelConfig.attention={model.attention!r} {reason}; set it to 'auto'")
