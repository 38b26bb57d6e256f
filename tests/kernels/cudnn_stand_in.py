"""What cuDNN gives on a GPU for the arguments that jax hands it, in plain JAX on a CPU: of packed sequences, with the
semantics that jax/_src/cudnn/fused_attention_stablehlo.py and XLA's cuda_dnn.cc document, and NaN where they leave it
undefined.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as entry
from jax._src.interpreters import mlir

Arrays = tuple[jax.Array, ...]

ON_A_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what stands in for cuDNN is for CPUs")


def install() -> None:
    """From now on programs for CPUs may contain jax's primitives for cuDNN."""
    for primitive, function in (
        (entry._dot_product_attention_fwd_p, _forward),
        (entry._dot_product_attention_bwd_p, _backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True), platform="cpu")


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, *integers: jax.Array, **options: object) -> list[jax.Array]:
    scale = _checked(options)

    def attend(part: Arrays) -> Arrays:
        q, k, v, length = part
        scores = _scores(q, k, length, scale)
        total = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - total[..., None]).astype(v.dtype)
        return jnp.einsum("kgts,skh->tkgh", weights, v, preferred_element_type=jnp.float32).reshape(q.shape), total

    own, theirs, lengths, inside = _sequences(q, k, integers)
    output, totals = jax.lax.map(attend, (*_taken(own, q), *_taken(theirs, k, v), lengths))
    totals = totals.reshape(len(lengths), q.shape[2], q.shape[1])
    totals = jnp.where(inside[:, None], totals, jnp.nan)
    return [_put(own, inside, output, q), totals] if options["is_training"] else [_put(own, inside, output, q)]


def _backward(q: jax.Array, k: jax.Array, v: jax.Array, *others: jax.Array, **options: object) -> list[jax.Array]:
    *integers, totals, output, gradient = others
    scale = _checked(options)

    def differentiate(part: Arrays) -> Arrays:
        q, output, gradient, k, v, length, total = part
        scores = _scores(q, k, length, scale)
        seen = (jnp.arange(len(q)) < length)[:, None, None]
        weights = jnp.exp(scores - total.reshape(*scores.shape[:2], -1, 1))
        weights = jnp.where((scores == -jnp.inf) | ~seen[:, 0], 0.0, weights)
        output, gradient = (jnp.where(seen, x, 0).astype(jnp.float32) for x in (output, gradient))
        delta = jnp.einsum("tkgh,tkgh->kgt", *(_grouped(x, k) for x in (output, gradient)))
        of_weights = jnp.einsum("tkgh,skh->kgts", _grouped(gradient, k), v.astype(jnp.float32))
        of_scores = scale * weights * (of_weights - delta[..., None])
        return (
            jnp.einsum("kgts,skh->tkgh", of_scores, k.astype(jnp.float32)).reshape(q.shape),
            jnp.einsum("kgts,tkgh->skh", of_scores, _grouped(q, k).astype(jnp.float32)),
            jnp.einsum("kgts,tkgh->skh", weights, _grouped(gradient, k)),
        )

    own, theirs, lengths, inside = _sequences(q, k, integers)
    parts = *_taken(own, q, output, gradient), *_taken(theirs, k, v), lengths, jnp.where(inside[:, None], totals, 0)
    gradients = jax.lax.map(differentiate, parts)
    places = own, theirs, theirs
    return [_put(place, inside, x, of) for place, x, of in zip(places, gradients, (q, k, v), strict=True)]


def _checked(options: dict) -> float:
    assert options["mask_type"] is entry.MaskType.PADDING_CAUSAL
    assert options["layout"] == entry.AttentionLayout.BTNH.value
    assert options["dropout_rate"] == 0.0
    assert options["variadic_args"] == (False, False)
    assert options["sliding_window_length"] is None
    return options["scale"]


def _sequences(q: jax.Array, k: jax.Array, integers: list[jax.Array] | Arrays) -> Arrays:
    """Of each sequence: where its queries and its keys lie among all tokens [S, T], its length, and which of the T
    places are inside of it."""
    bias, own_lengths, their_lengths, own_offsets, their_offsets, *pages = integers
    assert not bias.size and not any(page.size for page in pages)
    rows, tokens = q.shape[:2]
    assert own_lengths.shape == their_lengths.shape == (rows, own_offsets.shape[1] - 1)
    index, count = jnp.arange(tokens), own_lengths.size
    own, theirs = (
        offsets.reshape(-1)[:count, None] // (x.shape[2] * x.shape[3]) + index
        for offsets, x in ((own_offsets, q), (their_offsets, k))
    )
    lengths = own_lengths.reshape(-1)
    return own, theirs, lengths, index < lengths[:, None]


def _taken(places: jax.Array, *arrays: jax.Array) -> Arrays:
    return tuple(jnp.take(x.reshape(-1, *x.shape[2:]), places, axis=0, mode="clip") for x in arrays)


def _put(places: jax.Array, inside: jax.Array, values: jax.Array, like: jax.Array) -> jax.Array:
    tokens = like.shape[0] * like.shape[1]
    undefined = jnp.full((tokens, *like.shape[2:]), jnp.nan, like.dtype)
    put: Callable[..., jax.Array] = undefined.at[jnp.where(inside, places, tokens)].set
    return put(values.astype(like.dtype), mode="drop").reshape(like.shape)


def _grouped(x: jax.Array, k: jax.Array) -> jax.Array:
    return x.reshape(len(x), k.shape[1], -1, x.shape[2])


def _scores(q: jax.Array, k: jax.Array, length: jax.Array, scale: float) -> jax.Array:
    """[K, G, T, T], minus infinity where a key is behind its query, or both behind the end."""
    scores = jnp.einsum("tkgh,skh->kgts", _grouped(q, k), k, preferred_element_type=jnp.float32) * scale
    index = jnp.arange(len(q))
    return jnp.where((index <= index[:, None]) & (index < jnp.maximum(length, 1)), scores, -jnp.inf)
