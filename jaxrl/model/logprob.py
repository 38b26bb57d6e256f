"""Log-probabilities and entropies of tokens, without ever holding the logits of a long row."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.config import ModelConfig
from jaxrl.mesh import compute_axes, compute_spec, per_shard, to_compute
from jaxrl.model.lora import ADAPTERS, RANK, A, B
from jaxrl.model.moe import Load
from jaxrl.model.transformer import Params, hidden_states_and_load
from jaxrl.records import Tree
from jaxrl_kernels import linear_logprob
from jaxrl_kernels.chunks import cut, joined
from jaxrl_kernels.linear_logprob.scores import linear_scores
from jaxrl_kernels.softmax import soft_capped

HEAD_AXES = ("vocab", "embed"), ("embed", RANK), (RANK, "vocab")
"""Of the output matrix and of its adapter's factors."""


@flax.struct.dataclass
class TokenStats:
    """What the policy thinks of given tokens, in nats, float32."""

    logprobs: jax.Array  # [B, T]
    entropy: jax.Array  # [B, T], of the whole distribution at that place
    load: Load | None = None  # of the experts, where rows were scored by a model that has any


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D], rows and vocabulary unsplit: for few rows, as in sampling."""
    head = [to_compute(matrix, own) for matrix, own in zip(_head(params, hidden.dtype), HEAD_AXES, strict=False)]
    spec = compute_spec((*[None] * (hidden.ndim - 1), "vocab"))
    split = linear_scores(hidden, head, spec)
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
    chunk's logits again. On a mesh tokens and vocabulary are split, and no device has the whole output matrix.

    Args:
        hidden: [B, T, D] from ``hidden_states``.
        targets: [B, T] int32.
        temperature: logits are divided by it; > 0.
    """
    rows, head = ("batch", "tokens"), _head(params, hidden.dtype)
    axes = compute_axes("vocab") or None
    options = {"soft_cap": config.logit_soft_cap, "chunk": config.logprob_chunk, "vocab_axis": axes}

    def score(
        hidden: jax.Array, targets: jax.Array, temperature: jax.Array, *head: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        flat = hidden.reshape(-1, hidden.shape[2]), head, targets.reshape(-1)
        result = linear_logprob(*flat, temperature=temperature, **options)
        return result.logprob.reshape(targets.shape), result.entropy.reshape(targets.shape)

    split = per_shard(score, [(*rows, None), rows, (), *HEAD_AXES[: len(head)]], [rows, rows])
    logprobs, entropy = split(hidden, targets, jnp.asarray(temperature, jnp.float32), *head)
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
    hidden, _ = hidden_states_and_load(params, config, tokens, positions, segment_ids, experts, tree)
    head = _head(params, hidden.dtype)
    measure = per_shard(
        functools.partial(_measure_chunks, chunk=config.logprob_chunk, soft_cap=config.logit_soft_cap),
        [(*split, None), (), *[(None, None)] * len(head)],
        [split],
    )
    (values,) = measure(hidden, jnp.asarray(temperature, jnp.float32), *head)
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
    tokens = ("batch", "token_shards")
    caps = config.logit_soft_cap, other_config.logit_soft_cap
    hidden, _ = hidden_states_and_load(params, config, *rows, experts, tree)
    their_hidden, _ = hidden_states_and_load(other, other_config, *rows, tree=tree)
    head, their_head = _head(params, hidden.dtype), _head(other, their_hidden.dtype)
    compare = per_shard(
        functools.partial(
            _compare_chunks, own=len(head), chunk=config.logprob_chunk, soft_caps=caps, of_logits=of_logits
        ),
        [*[(*tokens, None)] * 2, *[(None, None)] * (len(head) + len(their_head))],
        [tokens],
    )
    their_hidden, *their_head = map(jax.lax.stop_gradient, (their_hidden, *their_head))
    (values,) = compare(hidden, their_hidden, *head, *their_head)
    return _of_tokens(to_compute(values, ("batch", None)), rows[2], tree)


def _of_tokens(values: jax.Array, segment_ids: jax.Array, tree: Tree | None) -> jax.Array:
    """Values [B, T] of predictions, moved to the tokens that are predicted; 0 where nothing predicts one."""
    if tree is not None:
        rows, predictors = ("batch", None), tree.predictors
        pick = per_shard(functools.partial(jnp.take_along_axis, axis=1, mode="clip"), [rows, rows], rows)
        return jnp.where(predictors >= 0, pick(values, jnp.maximum(predictors, 0)), 0.0)
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where((segment_ids > 0) & (segment_ids == before), jnp.roll(values, 1, axis=1), 0.0)


def _head(params: Params, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """The output matrix [V, D], the embedding where the two are tied; and the factors [D, rank] and [rank, V] of its
    adapter if it has one."""
    if "head" not in params:
        return (params["embedding"].astype(dtype),)
    pair = params.get(ADAPTERS, {}).get("head", {})
    return params["head"].astype(dtype), *(pair[factor].astype(dtype) for factor in (A, B) if pair)


def _compare_chunks(
    hidden: jax.Array,
    their_hidden: jax.Array,
    *heads: jax.Array,
    own: int,
    chunk: int,
    soft_caps: tuple[float, float],
    of_logits: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array]:
    """What ``of_logits`` says of local rows, [B, T]; the first ``own`` of ``heads`` are of the first model."""
    batch, tokens, _ = hidden.shape

    @jax.checkpoint
    def compare(states: jax.Array, their_states: jax.Array) -> jax.Array:
        logits = linear_scores(states, heads[:own]), linear_scores(their_states, heads[own:])
        return of_logits(*(soft_capped(values, cap) for values, cap in zip(logits, soft_caps, strict=True)))

    pieces = cut(hidden, chunk), cut(their_hidden, chunk)
    _, values = jax.lax.scan(lambda _, piece: (None, compare(*piece)), None, pieces)
    return (joined(values, batch, tokens),)


def _measure_chunks(
    hidden: jax.Array, temperature: jax.Array, *head: jax.Array, chunk: int, soft_cap: float
) -> tuple[jax.Array]:
    """``square_sum`` of local rows, [B, T]."""
    batch, tokens, _ = hidden.shape

    def measure(states: jax.Array) -> jax.Array:
        return square_sum(soft_capped(linear_scores(states, head), soft_cap) / temperature)

    _, values = jax.lax.scan(lambda _, piece: (None, measure(piece)), None, cut(hidden, chunk))
    return (joined(values, batch, tokens),)
