"""Why both attentions subtract a rounded maximum: in bfloat16 the paged one gives the packed one's bits."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels import interval_attention, paged_attention
from jaxrl_kernels.softmax import MASKED, round_up


def test_the_rounded_maximum_bounds_the_scores() -> None:
    scores = jnp.asarray([-3.0, -0.1, 0.0, 0.5, 100.0, MASKED])
    rounded = round_up(scores)
    assert (rounded >= scores - 1e-5 * jnp.abs(scores)).all()
    assert (rounded[:-1] < scores[:-1] + 0.7).all()


def test_paged_and_packed_attention_agree_in_bfloat16_over_several_blocks() -> None:
    generator = np.random.default_rng(0)
    tokens, page, rows = 384, 16, 24
    q = jnp.asarray(3 * generator.normal(size=(1, tokens, 4, 16)), jnp.bfloat16)
    k, v = (jnp.asarray(generator.normal(size=(1, tokens, 2, 16)), jnp.bfloat16) for _ in range(2))
    packed = jax.jit(interval_attention)(q, k, v, jnp.full((1, tokens), tokens, jnp.int32))[0]
    positions = np.linspace(130, tokens - 1, rows).astype(np.int32)
    table = np.broadcast_to(np.arange(tokens // page, dtype=np.int32), (rows, tokens // page))
    pages = [x[0].reshape(tokens // page, page, 2, 16).swapaxes(1, 2) for x in (k, v)]
    paged = jax.jit(paged_attention)(q[0, positions][:, None], *pages, table, positions[:, None])[:, 0]
    assert float(jnp.mean(paged == packed[positions])) > 0.99
