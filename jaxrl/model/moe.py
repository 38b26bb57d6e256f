"""Mixture of experts: a router chooses a few feed-forwards for every token, and no token is dropped.

Tokens are sorted by expert and multiplied in one grouped product (``jax.lax.ragged_dot``), whatever the load of each.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.config import ModelConfig
from jaxrl.mesh import compute_spec, per_shard, to_compute
from jaxrl_kernels.products import product, rounded


@flax.struct.dataclass
class Choice:
    """What the router decided for each token of one layer."""

    experts: jax.Array  # [B, T, k] int32, the k = ModelConfig.experts_per_token most probable, best first
    weights: jax.Array  # [B, T, k] float32, of each expert's output in the sum
    probabilities: jax.Array  # [B, T, E] float32


@flax.struct.dataclass
class Load:
    """How the tokens of a batch were spread over the experts. Two batches are one when their fields are added."""

    chosen: jax.Array  # [L, E] float32, tokens that chose each expert
    probability: jax.Array  # [L, E] float32, sum over tokens of the router's probability of each expert
    tokens: jax.Array  # [L] float32, tokens in all


Rows = tuple[str | None, str | None]
"""Logical names of the first two axes, B and T."""


def route(router: jax.Array, x: jax.Array, config: ModelConfig, rows: Rows = (None, None)) -> Choice:
    """Choose the ``ModelConfig.experts_per_token`` most probable experts.

    Only the router is rounded to the compute type, and nothing after it: that would change which experts are chosen.

    Args:
        router: [D, E].
        x: [B, T, D] float32.
        rows: names of B and T.
    """
    whole = rounded(to_compute(router, (None, None)), config.compute_dtype)
    scores = product("btd,de->bte", x, whole, out_sharding=compute_spec((*rows, None)))
    probabilities = jax.nn.softmax(scores, axis=-1)
    weights, experts = jax.lax.top_k(probabilities, config.experts_per_token)
    if config.normalize_expert_weights:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Choice(experts, weights, probabilities)


def load_of(choice: Choice, real: jax.Array) -> Load:
    """The load of one layer, without its L axis, of the tokens where ``real`` [B, T] is true."""
    counted, everywhere = real.astype(jnp.float32), compute_spec((None,))
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
) -> jax.Array:
    """The weighted sum of the chosen experts' outputs, [B, T, D] float32.

    On a mesh the tokens are split over the devices, and each has all experts.

    Args:
        x: [B, T, D] in the compute type.
        gate, up: [E, D, F] in the compute type.
        down: [E, F, D] in the compute type.
        activation: of the gate.
        rows: names of B and T.
    """
    tokens = ("batch", "token_shards", None) if rows[0] else (None, None, None)
    compute = per_shard(
        lambda *arrays: _local_feed_forward(*arrays, activation), [tokens] * 3 + [(None,) * 3] * 3, tokens
    )
    return to_compute(compute(x, choice.experts, choice.weights, gate, up, down), (*rows, None))


def _local_feed_forward(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    batch, tokens, width = x.shape
    count = experts.shape[2]
    order = jnp.argsort(experts.reshape(-1), stable=True)
    back = jnp.argsort(order)
    group_sizes = jnp.bincount(experts.reshape(-1), length=gate.shape[0]).astype(jnp.int32)

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(
            left,
            right,
            group_sizes,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    # Repeated first and then permuted: the gradient is a sum over copies in a fixed order, and no scatter that adds.
    copies = jnp.repeat(x.reshape(-1, width), count, axis=0)
    grouped = copies.at[order].get(unique_indices=True, mode="promise_in_bounds")
    hidden = activation(multiply(grouped, gate)) * multiply(grouped, up)
    output = multiply(hidden.astype(x.dtype), down)
    output = output.at[back].get(unique_indices=True, mode="promise_in_bounds").reshape(batch, tokens, count, width)
    return jnp.sum(output * weights[..., None], axis=2)
