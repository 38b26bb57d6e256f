"""What runs on the device: a round of decoding, a prefill, a copy of pages. Each has one compiled shape.

The only state on the device is the KV pages, donated from call to call. Everything else about a row travels up in one
int32 array per call and the sampled tokens come back in one, so a call costs two small transfers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxrl.config import EngineConfig, ModelConfig
from jaxrl.model.implementations import paged_implementation
from jaxrl.model.kv_pages import KVPages, page_dtype
from jaxrl.model.logprob import logits
from jaxrl.model.transformer import Params, paged_hidden_states, paged_shape
from jaxrl.rollout import sampler
from jaxrl.rollout.cache import pages_for
from jaxrl_kernels import choice, make_groups
from jaxrl_kernels.group_decode.prefixes import chosen_for_parties, shape_of_parties
from jaxrl_kernels.paged_attention.backends import BACKENDS
from jaxrl_kernels.paged_attention.blocks import Shape

TOKEN, POSITION, LEFT, PROMPT, DRAW, SAMPLE, TEMPERATURE, SHARED, TABLE = range(9)
"""Columns of a decode plan: the last token, its position, tokens it may still sample (0 = the slot is empty), prompt
length, draw, sample, bits of the float32 temperature, how many of its first pages its prompt's other samples have as
well, and from TABLE on the row's pages."""

START, COUNT, ROW_TABLE = range(3)
"""Columns of a prefill plan: position of the first token, number of tokens (0 = no row), and from ROW_TABLE on the
row's pages, followed by the tokens."""


STOP_IDS = 4
"""Stop ids are padded to a multiple of this, so that their number seldom changes the compiled shape."""


def padded_stops(count: int) -> int:
    """How many stop ids ``decode_round`` is given, the padding included, where there are ``count``."""
    return -(-max(1, count) // STOP_IDS) * STOP_IDS


def attention_shapes(config: EngineConfig, model: ModelConfig, mesh: Mesh | AbstractMesh) -> tuple[Shape, Shape]:
    """What a decode round and a prefill ask of paged attention, on each device of a replica."""
    table = pages_for(config.max_prompt_tokens + config.max_response_tokens, config.page_size)
    pages = config.page_size, table, page_dtype(model, config.kv_dtype).name
    queries = (config.slots, 1), (config.prefill_rows, config.prefill_chunk)
    decode, prefill = (paged_shape(model, each, *pages, mesh) for each in queries)
    return decode, prefill


def party_of(config: EngineConfig, model: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """The most slots that read the pages of their prompt together on the devices of this mesh; 0 = each by itself."""
    width = min(config.group_width, config.slots)
    if config.group_decode != "auto":
        return width if config.group_decode == "on" else 0
    decode, _ = attention_shapes(config, model, mesh)
    named, both = paged_implementation(model), (decode, shape_of_parties(decode, config.slots, width))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if named in BACKENDS and choice.refusal(BACKENDS[named], both):
            return 0
        backend = chosen_for_parties(named, decode, config.slots, width)
    return width if BACKENDS[backend].skips_empty else 0


def empty_plans(config: EngineConfig, table_width: int, pages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Plans of a prefill, a copy and a decode round that do nothing, in the only shapes an engine runs.

    Args:
        table_width: M, the most pages of a row.
        pages: P, of the engine.
    """
    row = np.zeros((config.prefill_rows, ROW_TABLE + table_width + config.prefill_chunk), np.int32)
    copies = np.full((2, config.slots), pages, np.int32)
    return row, copies, np.zeros((config.slots, TABLE + table_width), np.int32)


@functools.partial(jax.jit, static_argnames=("model", "steps", "party"), donate_argnames=("kv_pages",))
def decode_round(
    params: Params,
    kv_pages: KVPages,
    plan: jax.Array,
    exit_at: jax.Array,
    key: jax.Array,
    stop_ids: jax.Array,
    *,
    model: ModelConfig,
    steps: int,
    party: int = 0,
) -> tuple[KVPages, jax.Array]:
    """Decode up to ``steps`` tokens in every slot; a slot ends at a stop id or when it has sampled all it may.

    Where a round is cut has no influence on what is sampled, so it may end early.

    Args:
        plan: [S, TABLE + M] int32.
        exit_at: () int32, the round also ends when no more than this many slots go on.
        key: the run's key.
        stop_ids: [n] int32, -1 where there is none.
        party: the most slots that read the pages of their prompt together, see ``party_of``.

    Returns:
        The pages, and [2, steps, S] int32: sampled tokens (-1 = none), and the bits of their float32 log-probabilities.
    """
    table = plan[:, TABLE:]
    temperatures = jax.lax.bitcast_convert_type(plan[:, TEMPERATURE], jnp.float32)
    keys = sampler.row_keys(key, plan[:, DRAW], plan[:, SAMPLE])
    groups = make_groups(table, plan[:, SHARED], party) if party else None

    def going(carry: tuple[jax.Array, ...]) -> jax.Array:
        step, _, _, _, left, _ = carry
        return (step < steps) & ((left > 0).sum() > exit_at)

    def decode(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step, kv_pages, token, position, left, output = carry
        active = left > 0
        here = jnp.where(active, position, -1)
        hidden, kv_pages = paged_hidden_states(params, model, token[:, None], here[:, None], kv_pages, table, groups)
        uniform = sampler.uniforms(keys, position + 1 - plan[:, PROMPT])
        sampled, logprob = sampler.sample(logits(params, model, hidden[:, 0]), temperatures, uniform)
        token = jnp.where(active, sampled, -1)
        bits = jax.lax.bitcast_convert_type(logprob, jnp.int32)
        output = jax.lax.dynamic_update_slice_in_dim(output, jnp.stack([token, bits])[:, None], step, axis=1)
        stopped = (token[:, None] == stop_ids).any(axis=-1)
        left = jnp.where(stopped, 0, jnp.maximum(left - 1, 0))
        return step + 1, kv_pages, token, position + 1, left, output

    output = jnp.full((2, steps, plan.shape[0]), -1, jnp.int32)
    start = (jnp.int32(0), kv_pages, plan[:, TOKEN], plan[:, POSITION], plan[:, LEFT], output)
    _, kv_pages, _, _, _, output = jax.lax.while_loop(going, decode, start)
    return kv_pages, output


def read_round(output: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [steps, S] int32 and log-probabilities [steps, S] float32 of a round, on the host (waits for it)."""
    tokens, bits = np.asarray(output)
    return tokens, bits.view(np.float32)


@functools.partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames=("kv_pages",))
def prefill(params: Params, kv_pages: KVPages, plan: jax.Array, *, model: ModelConfig, chunk: int) -> KVPages:
    """Write the keys and values of given tokens. Two rows may be successive chunks of one sequence.

    A chunk sees the chunks before it even in the same call, because every layer writes its keys and values before it
    attends.

    Args:
        plan: [R, ROW_TABLE + M + chunk] int32.
    """
    table, tokens = plan[:, ROW_TABLE:-chunk], plan[:, -chunk:]
    offset = jnp.arange(chunk, dtype=jnp.int32)
    positions = jnp.where(offset < plan[:, COUNT, None], plan[:, START, None] + offset, -1)
    _, kv_pages = paged_hidden_states(params, model, tokens, positions, kv_pages, table)
    return kv_pages


@jax.jit
def recorded_experts(experts: jax.Array, table: jax.Array) -> jax.Array:
    """[M * page, L, experts of a token]: what ``KVPages.experts`` has of the tokens of one row.

    Args:
        table: [M] int32, the row's pages.
    """
    layers, _, size, count = experts.shape
    return jnp.moveaxis(experts[:, table], 0, 2).reshape(table.shape[0] * size, layers, count)


@functools.partial(jax.jit, donate_argnames=("kv_pages",))
def copy_pages(kv_pages: KVPages, plan: jax.Array) -> KVPages:
    """Copy whole pages.

    Args:
        plan: [2, S] int32, sources and targets; a target that is no page (P or more) is skipped.
    """
    return jax.tree.map(lambda pool: pool.at[:, plan[1]].set(pool[:, plan[0]], mode="drop"), kv_pages)
