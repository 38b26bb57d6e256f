"""The programs of one replica of the engine, for shapes alone: what it compiles, without devices, weights or pages."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl import mesh as meshes
from jaxrl.config import EngineConfig, ModelConfig
from jaxrl.model import spec
from jaxrl.model.kv_pages import init_pages, page_shardings
from jaxrl.model.transformer import param_specs
from jaxrl.rollout import rounds
from jaxrl.rollout.scheduler import pages_of


def abstract_params(model: ModelConfig, mesh: Mesh, specs: spec.Specs | None = None) -> Any:
    """Shapes, types and shardings of the weights as ``train/sync.py`` hands them to a replica.

    Args:
        specs: the table of the weights; the decoder's when None.

    Raises:
        ConfigError: the mesh cannot split a weight.
    """
    specs = specs or param_specs(model)
    return jax.tree.map(
        lambda one, sharding: jax.ShapeDtypeStruct(
            one.shape, one.compute_dtype(model.compute_dtype), sharding=sharding
        ),
        specs,
        spec.shardings(specs, mesh, meshes.ROLLOUT_RULES),
    )


def abstract_pages(config: EngineConfig, model: ModelConfig, mesh: Mesh) -> Any:
    """Shapes, types and shardings of a replica's KV pages."""
    sizes = pages_of(config)[1], config.page_size, config.record_experts, config.kv_dtype
    pages = jax.eval_shape(lambda: init_pages(model, *sizes))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        pages,
        page_shardings(mesh, pages),
    )


def traced(
    config: EngineConfig, model: ModelConfig, mesh: Mesh, params: Any, stop_ids: int = 1
) -> dict[str, jax.stages.Traced]:
    """Every program that ``Engine.compile`` compiles, by name; nothing is compiled or run.

    Args:
        mesh: of one replica, see ``mesh.replica_meshes``.
        params: from ``abstract_params``.
        stop_ids: how many there are.
    """
    (width, count), pages = pages_of(config), abstract_pages(config, model, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    row, copies, decode = rounds.empty_plans(config, width, count)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        programs = {
            "prefill": rounds.prefill.trace(params, pages, row, model=model, chunk=config.prefill_chunk),
            "copy": rounds.copy_pages.trace(pages, copies),
            "decode": rounds.decode_round.trace(
                params,
                pages,
                decode,
                np.int32(0),
                jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere),
                jax.ShapeDtypeStruct((rounds.padded_stops(stop_ids),), jnp.int32, sharding=everywhere),
                model=model,
                steps=config.round_steps,
                party=rounds.party_of(config, model, mesh),
            ),
        }
        if config.record_experts:
            programs["record"] = rounds.recorded_experts.trace(pages.experts, decode[0, rounds.TABLE :])
    return programs
