"""The rows of log-probabilities over the vocabulary (K4)."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxrl_kernels.bars import rows
from jaxrl_kernels.bars.rows import Sizes
from jaxrl_kernels.linear_logprob import linear_logprob
from jaxrl_kernels.products import product

GIB = 2**30


def measured(sizes: Sizes) -> Iterator[dict]:
    """K4 by its products, of which a chunk has one forward and three backward."""
    hidden = rows.random(0, sizes.dtype, sizes.scored, sizes.hidden)
    matrix = rows.random(1, sizes.dtype, sizes.vocabulary, sizes.hidden) * sizes.hidden**-0.5
    targets = jnp.arange(sizes.scored, dtype=jnp.int32) % sizes.vocabulary

    def loss(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        return linear_logprob(hidden, (matrix,), targets, chunk=sizes.chunk).logprob.sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    time = rows.seconds_of(gradient, (hidden, matrix), sizes)
    chunk = jax.jit(lambda hidden, matrix: product("td,vd->tv", hidden, matrix))
    products = 4 * sizes.scored / sizes.chunk * rows.seconds_of(chunk, (hidden[: sizes.chunk], matrix), sizes)
    what, note = f"{sizes.scored} tokens of {sizes.vocabulary}, forward and backward", f"{1000 * time:.3g} ms"
    yield rows.row("K4", f"{what}: time over its products", time / products, "ratio", "<= 1.2", "<= 1.05", note)
    reserved = gradient.lower(hidden, matrix).compile().memory_analysis().temp_size_in_bytes
    extra = max(0, reserved - 4 * matrix.size) / GIB
    note = "beside the gradient of the matrix in float32"
    yield rows.row("K4", f"{what}: memory", extra, "GiB", "<= 1", "", note)
