"""Log-probabilities and entropies of tokens, without ever holding the logits of a long row."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.config import ModelConfig
from jaxrl.mesh import compute_spec, per_shard, to_compute
from jaxrl.model.chunks import cut, joined
from jaxrl.model.moe import Load
from jaxrl.model.transformer import Params, hidden_states_and_load
from jaxrl.records import Tree
from jaxrl_kernels.products import product
from jaxrl_kernels.softmax import soft_capped


@flax.struct.dataclass
class TokenStats:
    """What the policy thinks of given tokens, in nats, float32."""

    logprobs: jax.Array  # [B, T]
    entropy: jax.Array  # [B, T], of the whole distribution at that place
    load: Load | None = None  # of the experts, where rows were scored by a model that has any


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D], rows and vocabulary unsplit: for few rows, as in sampling."""
    head = to_compute(_head(params).astype(hidden.dtype), ("vocab", "embed"))
    spec = compute_spec((*[None] * (hidden.ndim - 1), "vocab"))
    split = product("...d,vd->...v", hidden, head, out_sharding=spec)
    return to_compute(soft_capped(split, config.logit_soft_cap), (None,) * hidden.ndim)


def token_logprobs(
    params: Params,
    config: ModelConfig,
    hidden: jax.Array,
    targets: jax.Array,
    temperature: float | jax.Array = 1.0,
) -> TokenStats:
    """Score ``targets[b, t]`` under the distribution that ``hidden[b, t]`` predicts.

    The rows are flattened and scored ``ModelConfig.logprob_chunk`` tokens at a time; the backward pass computes each
    chunk's logits again. On a mesh the tokens are split over all devices, and each has the whole vocabulary.

    Args:
        hidden: [B, T, D] from ``hidden_states``.
        targets: [B, T] int32.
        temperature: logits are divided by it; > 0.
    """
    tokens, head = ("batch", "token_shards"), _head(params).astype(hidden.dtype)
    score = per_shard(
        functools.partial(_score_chunks, chunk=config.logprob_chunk, soft_cap=config.logit_soft_cap),
        [(*tokens, None), (None, None), tokens, ()],
        [tokens, tokens],
    )
    logprobs, entropy = score(hidden, head, targets, jnp.asarray(temperature, jnp.float32))
    return TokenStats(logprobs=to_compute(logprobs, ("batch", None)), entropy=to_compute(entropy, ("batch", None)))


def sequence_logprobs(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    temperature: float | jax.Array = 1.0,
    experts: jax.Array | None = None,
    tree: Tree | None = None,
) -> TokenStats:
    """Score every token of packed rows given its prefix in its segment.

    ``logprobs[b, t]`` and ``entropy[b, t]`` belong to ``tokens[b, t]``; both are 0 on the first token of a segment,
    which nothing predicts, and on padding. Arguments as in ``hidden_states_and_load``; with a tree the rows are [B, U],
    and may lack the beginnings of their segments, which the tree has.
    """
    hidden, load = hidden_states_and_load(params, config, tokens, positions, segment_ids, experts, tree)
    targets = jnp.roll(tokens if tree is None else tree.tokens, -1, axis=1)
    stats = token_logprobs(params, config, hidden, targets, temperature)
    logprobs, entropy = (_of_tokens(values, segment_ids, tree) for values in (stats.logprobs, stats.entropy))
    return TokenStats(logprobs, entropy, load)


def square_sums(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    temperature: float | jax.Array = 1.0,
    experts: jax.Array | None = None,
    tree: Tree | None = None,
) -> jax.Array:
    """[B, T] Σ π(v)² over the vocabulary, of the distribution that each token of packed rows was drawn from.

    Arguments as in ``sequence_logprobs``; 0 where nothing predicts a token.
    """
    split = ("batch", "token_shards")
    measure = per_shard(
        functools.partial(_measure_chunks, chunk=config.logprob_chunk, soft_cap=config.logit_soft_cap),
        [(*split, None), (None, None), ()],
        [split],
    )
    hidden, _ = hidden_states_and_load(params, config, tokens, positions, segment_ids, experts, tree)
    (values,) = measure(hidden, _head(params).astype(hidden.dtype), jnp.asarray(temperature, jnp.float32))
    return _of_tokens(to_compute(values, ("batch", None)), segment_ids, tree)


def square_sum(logits: jax.Array) -> jax.Array:
    """[...] Σ π(v)² of logits [..., V]: the chance that two draws are the same."""
    return jnp.exp(jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1))


def compared(
    params: Params,
    config: ModelConfig,
    other: Params,
    other_config: ModelConfig,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    of_logits: Callable[[jax.Array, jax.Array], jax.Array],
    experts: jax.Array | None = None,
    tree: Tree | None = None,
) -> jax.Array:
    """Compare what two models predict of every token of packed rows, without ever holding the logits of a long row.

    Args:
        params: gradients flow through these only.
        other: parameters of the other model, whose vocabulary has as many rows.
        rows: tokens, positions and segment ids, [B, T] each, as in ``hidden_states``.
        of_logits: from float32 logits [t, V] of both to [t].
        experts: of the first model, as in ``sequence_logprobs``; the other always chooses its own.
        tree: as in ``sequence_logprobs``, for both.

    Returns:
        [B, T] float32; as in ``sequence_logprobs`` 0 where nothing predicts a token.
    """
    tokens, head = ("batch", "token_shards"), (None, None)
    caps = config.logit_soft_cap, other_config.logit_soft_cap
    hidden, _ = hidden_states_and_load(params, config, *rows, experts, tree)
    their_hidden, _ = hidden_states_and_load(other, other_config, *rows, tree=tree)
    compare = per_shard(
        functools.partial(_compare_chunks, chunk=config.logprob_chunk, soft_caps=caps, of_logits=of_logits),
        [(*tokens, None), head, (*tokens, None), head],
        [tokens],
    )
    heads = _head(params).astype(hidden.dtype), _head(other).astype(their_hidden.dtype)
    (values,) = compare(hidden, heads[0], *map(jax.lax.stop_gradient, (their_hidden, heads[1])))
    return _of_tokens(to_compute(values, ("batch", None)), rows[2], tree)


def _of_tokens(values: jax.Array, segment_ids: jax.Array, tree: Tree | None) -> jax.Array:
    """Values [B, T] of predictions, moved to the tokens that are predicted; 0 where nothing predicts one."""
    if tree is not None:
        rows, predictors = ("batch", None), tree.predictors
        pick = per_shard(functools.partial(jnp.take_along_axis, axis=1, mode="clip"), [rows, rows], rows)
        return jnp.where(predictors >= 0, pick(values, jnp.maximum(predictors, 0)), 0.0)
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where((segment_ids > 0) & (segment_ids == before), jnp.roll(values, 1, axis=1), 0.0)


def _head(params: Params) -> jax.Array:
    """The output matrix [V, D]; the embedding where the two are tied."""
    return params["head"] if "head" in params else params["embedding"]


def _score_chunks(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: jax.Array, chunk: int, soft_cap: float
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies, [B, T] each, of local rows."""
    batch, tokens, _ = hidden.shape

    @jax.checkpoint
    def score(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        scaled = soft_capped(product("td,vd->tv", hidden, head), soft_cap) / temperature
        log_total = jax.nn.logsumexp(scaled, axis=-1)
        hit = targets[:, None] == jnp.arange(head.shape[0], dtype=targets.dtype)
        logprob = jnp.sum(jnp.where(hit, scaled, 0.0), axis=-1) - log_total
        mean = jnp.sum(jnp.exp(scaled - log_total[:, None]) * scaled, axis=-1)
        return logprob, log_total - mean

    pieces = cut(hidden, chunk), cut(targets, chunk)
    _, (logprobs, entropy) = jax.lax.scan(lambda _, piece: (None, score(*piece)), None, pieces)
    return joined(logprobs, batch, tokens), joined(entropy, batch, tokens)


def _compare_chunks(
    hidden: jax.Array,
    head: jax.Array,
    their_hidden: jax.Array,
    their_head: jax.Array,
    chunk: int,
    soft_caps: tuple[float, float],
    of_logits: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array]:
    """What ``of_logits`` says of local rows, [B, T]."""
    batch, tokens, _ = hidden.shape

    @jax.checkpoint
    def compare(own: jax.Array, theirs: jax.Array) -> jax.Array:
        logits = (product("td,vd->tv", states, matrix) for states, matrix in ((own, head), (theirs, their_head)))
        return of_logits(*(soft_capped(values, cap) for values, cap in zip(logits, soft_caps, strict=True)))

    pieces = cut(hidden, chunk), cut(their_hidden, chunk)
    _, values = jax.lax.scan(lambda _, piece: (None, compare(*piece)), None, pieces)
    return (joined(values, batch, tokens),)


def _measure_chunks(
    hidden: jax.Array, head: jax.Array, temperature: jax.Array, chunk: int, soft_cap: float
) -> tuple[jax.Array]:
    """``square_sum`` of local rows, [B, T]."""
    batch, tokens, _ = hidden.shape

    def measure(states: jax.Array) -> jax.Array:
        return square_sum(soft_capped(product("td,vd->tv", states, head), soft_cap) / temperature)

    _, values = jax.lax.scan(lambda _, piece: (None, measure(piece)), None, cut(hidden, chunk))
    return (joined(values, batch, tokens),)
