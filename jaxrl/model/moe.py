"""Mixture of experts: a router chooses a few feed-forwards for every token, and no token is dropped.

Tokens are sorted by expert and multiplied in one grouped product (``jax.lax.ragged_dot``), whatever the load of each.
"""

import functools
import types
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.config import ModelConfig
from jaxrl.mesh import compute_axes, compute_spec, per_shard, to_compute
from jaxrl_kernels.chunks import cut, joined
from jaxrl_kernels.products import precision_of, product, rounded


@flax.struct.dataclass
class Choice:
    """What the router decided for each token of one layer."""

    experts: (
        jax.Array
    )  # [B, T, k] int32, the k = ModelConfig.experts_per_token, the most probable first if not recorded
    weights: jax.Array  # [B, T, k] float32, of each expert's output in the sum
    probabilities: jax.Array  # [B, T, E] float32


@flax.struct.dataclass
class Load:
    """How the tokens of a batch were spread over the experts. Two batches are one when their fields are added."""

    chosen: jax.Array  # [L, E] float32, tokens that chose each expert
    probability: jax.Array  # [L, E] float32, sum over tokens of the router's probability of each expert
    tokens: jax.Array  # [L] float32, tokens in all


def id_type(experts: int) -> np.dtype:
    """The smallest type for the indices of so many experts, and -1."""
    return np.min_scalar_type(-max(experts, 1))


def record(config: ModelConfig) -> jax.ShapeDtypeStruct:
    """What is recorded of a token: [L, k]."""
    return jax.ShapeDtypeStruct((config.layers, config.experts_per_token), id_type(config.experts))


Rows = tuple[str | None, str | None]
"""Logical names of the first two axes, B and T."""

Pairs = Mapping[str, tuple[jax.Array, jax.Array]]
"""Factors of low-rank adapters, [E, inputs, rank] and [E, rank, outputs], by the name of their matrix."""


def route(
    router: jax.Array,
    x: jax.Array,
    config: ModelConfig,
    rows: Rows = (None, None),
    recorded: jax.Array | None = None,
) -> Choice:
    """Choose the ``ModelConfig.experts_per_token`` most probable experts, or those that were recorded.

    Recorded ones get the weights that this router gives them: it is trained, and only the choice is fixed (Ma et al.
    2025, "Stabilizing MoE reinforcement learning by aligning training and inference routers").

    Only the router is rounded to the compute type, and nothing after it: that would change which experts are chosen.

    Args:
        router: [D, E].
        x: [B, T, D] float32.
        rows: names of B and T.
        recorded: [B, T, k] int, of every token different experts; -1 where the router chooses.
    """
    whole = rounded(to_compute(router, (None, None)), config.compute_dtype)
    scores = product("btd,de->bte", x, whole, out_sharding=compute_spec((*rows, None)))
    probabilities = jax.nn.softmax(scores, axis=-1)
    weights, experts = jax.lax.top_k(probabilities, config.experts_per_token)
    if recorded is not None:
        experts = jnp.where(recorded < 0, experts, recorded.astype(experts.dtype))
        pick = per_shard(functools.partial(jnp.take_along_axis, axis=-1), [(*rows, None)] * 2, (*rows, None))
        weights = pick(probabilities, experts)
    if config.normalize_expert_weights:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Choice(experts, weights, probabilities)


def load_of(choice: Choice, counts: jax.Array) -> Load:
    """The load of one layer, without its L axis, of tokens each of which counts ``counts`` [B, T] times."""
    counted, everywhere = counts.astype(jnp.float32), compute_spec((None,))
    chosen = jax.nn.one_hot(choice.experts, choice.probabilities.shape[-1], dtype=jnp.float32).sum(axis=2)
    return Load(
        chosen=product("bte,bt->e", chosen, counted, out_sharding=everywhere),
        probability=product("bte,bt->e", choice.probabilities, counted, out_sharding=everywhere),
        tokens=counted.sum(),
    )


def load_metrics(load: Load) -> dict[str, jax.Array]:
    """Numbers that show experts which have too much or nothing to do, over the layers of one batch.

    ``expert_load_max`` is the most loaded expert's tokens relative to an even load, ``idle_experts`` the share of
    experts that no token chose.
    """
    even = jnp.maximum(load.chosen.mean(axis=1, keepdims=True), 1.0 / load.chosen.shape[1])
    return {"expert_load_max": (load.chosen / even).max(), "idle_experts": (load.chosen == 0).mean()}


def balance_loss(load: Load) -> jax.Array:
    """E times the sum over experts of (share of tokens that chose it) x (mean probability), over all layers together.

    It is experts_per_token when the load is even and grows with its unevenness; the gradient goes through the
    probabilities (Fedus et al. 2022, equations 4 to 6).
    """
    tokens = jnp.maximum(load.tokens.sum(), 1.0)
    shares, probabilities = load.chosen.sum(axis=0) / tokens, load.probability.sum(axis=0) / tokens
    return load.chosen.shape[1] * jnp.sum(jax.lax.stop_gradient(shares) * probabilities)


def experts_feed_forward(
    x: jax.Array,
    choice: Choice,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    rows: Rows = (None, None),
    chunk: int = 0,
    adapters: Pairs = types.MappingProxyType({}),
) -> jax.Array:
    """The weighted sum of the chosen experts' outputs, [B, T, D] float32.

    On a mesh each device has some of the experts. It gets the tokens of all devices that split the rows and have the
    others, computes what its experts add to each, and the parts are summed where the tokens came from. A ragged
    exchange would send a token to as many devices as it chose experts, this sends it to every device of the ``expert``
    axis: no more, as long as that axis is no longer than ``ModelConfig.experts_per_token``. It is made of collectives
    that XLA has on every platform.

    Args:
        x: [B, T, D] in the compute type.
        gate, up: [E, D, F] in the compute type.
        down: [E, F, D] in the compute type.
        activation: of the gate.
        rows: names of B and T.
        chunk: tokens that a device's experts compute at once; the backward pass computes each chunk again. 0 is all.
        adapters: of any of "gate", "up" and "down"; they lie and are multiplied as the matrices are.
    """
    holders = compute_axes("experts")
    travelled = tuple(axis for axis in holders if axis in compute_axes(rows[0]))
    shared = tuple(axis for axis in holders if axis not in travelled)

    def compute(x: jax.Array, experts: jax.Array, weights: jax.Array, *matrices: jax.Array) -> jax.Array:
        if travelled:
            x, experts, weights = (jax.lax.all_gather(y, travelled, tiled=True) for y in (x, experts, weights))
        first = jax.lax.axis_index(holders) * matrices[0].shape[0] if holders else 0
        added = _in_chunks(x, experts - first, weights, matrices, activation, tuple(adapters), chunk)
        if travelled:
            added = jax.lax.psum_scatter(added, travelled, tiled=True)
        return jax.lax.psum(added, shared) if shared else added

    tokens, matrices = (*rows, None), ("experts", None, None)
    factors = [factor for pair in adapters.values() for factor in pair]
    split = per_shard(compute, [tokens] * 3 + [matrices] * (3 + len(factors)), tokens)
    return split(x, choice.experts, choice.weights, gate, up, down, *factors)


def _in_chunks(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    matrices: tuple[jax.Array, ...],
    activation: Callable[[jax.Array], jax.Array],
    adapted: tuple[str, ...],
    chunk: int,
) -> jax.Array:
    """``_local_feed_forward`` of so many tokens after each other, whose gradients of the matrices add up in float32."""
    batch, tokens, _ = x.shape
    if not 0 < chunk < batch * tokens:
        return _local_feed_forward(x, experts, weights, matrices, activation, adapted)
    exact = tuple(matrix.astype(jnp.float32) for matrix in matrices)

    @jax.checkpoint
    def compute(*piece: jax.Array) -> jax.Array:
        rounded_back = tuple(matrix.astype(x.dtype) for matrix in exact)
        return _local_feed_forward(*(part[None] for part in piece), rounded_back, activation, adapted)[0]

    # Tokens that fill the last chunk have no weight.
    pieces = [cut(part, chunk) for part in (x, experts, weights)]
    _, added = jax.lax.scan(lambda _, piece: (None, compute(*piece)), None, pieces)
    return joined(added, batch, tokens)


def _local_feed_forward(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    matrices: tuple[jax.Array, ...],
    activation: Callable[[jax.Array], jax.Array],
    adapted: tuple[str, ...],
) -> jax.Array:
    """What the experts here add to [B, T, D]; ``experts`` [B, T, k] counts from the first of them.

    ``matrices`` are gate, up and down, and two factors for each of them that ``adapted`` names.
    """
    gate, up, down, *factors = matrices
    adapters = dict(zip(adapted, zip(factors[::2], factors[1::2], strict=True), strict=True))
    batch, tokens, width = x.shape
    count, here = experts.shape[2], gate.shape[0]
    group = jnp.where((experts >= 0) & (experts < here), experts, here).reshape(-1)
    order = jnp.argsort(group, stable=True)
    back = jnp.argsort(order)
    group_sizes = jnp.bincount(group, length=here + 1)[:here].astype(jnp.int32)
    # A token chooses different experts: of a few that are here, no more than these few.
    order = order[: batch * tokens * min(count, here)]
    chosen = (jnp.arange(len(order)) < group_sizes.sum())[:, None]

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        exact = precision_of(left.dtype)
        return jax.lax.ragged_dot(left, right, group_sizes, precision=exact, preferred_element_type=jnp.float32)

    def multiply_adapted(left: jax.Array, right: jax.Array, name: str) -> jax.Array:
        if name not in adapters:
            return multiply(left, right)
        first, second = adapters[name]
        return multiply(left, right) + multiply(multiply(left, first).astype(left.dtype), second)

    # Repeated first and then permuted: the gradient is a sum over copies in a fixed order, and no scatter that adds.
    # What ragged_dot makes of rows after the last group is not defined, nor are their gradients.
    copies = jnp.repeat(x.reshape(-1, width), count, axis=0)
    grouped = jnp.where(chosen, copies.at[order].get(unique_indices=True, mode="promise_in_bounds"), 0)
    hidden = activation(multiply_adapted(grouped, gate, "gate")) * multiply_adapted(grouped, up, "up")
    output = jnp.where(chosen, multiply_adapted(hidden.astype(x.dtype), down, "down"), 0)
    output = output.at[back].get(unique_indices=True, mode="fill", fill_value=0)
    return jnp.sum(output.reshape(batch, tokens, count, width) * weights[..., None], axis=2)
