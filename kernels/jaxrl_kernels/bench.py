"""What the kernels cost on the devices at hand, beside plain alternatives.

Times are medians of one run in turns: of the CPU where the devices are one, otherwise of the clock.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_kernels.bars.attention import ends_of, row_of
from jaxrl_kernels.bars.decoding import slots
from jaxrl_kernels.bars.rows import Sizes, row, seconds
from jaxrl_kernels.group_decode import group_decode, make_groups
from jaxrl_kernels.interval_attention import interval_attention
from jaxrl_kernels.paged_attention import paged_attention

SIZES = Sizes(query_heads=4, kv_heads=2, width=64, slots=64, page=16, dtype="float32")
"""Of these the heads, the slots, the pages and the type; rows and rounds are arguments."""
PARTY = 16


def figures(tokens: int, rounds: int) -> list[dict]:
    """Interval attention, forward and backward, against ``jax.nn.dot_product_attention`` with the same mask made dense.

    "rows" compares rows that are packed differently; "memory" is what the compiler reserves, of doubled tokens over
    single.

    Args:
        tokens: of the row.
        rounds: in which the alternatives take turns.
    """
    ours, plain = forward_and_backward(interval_attention), forward_and_backward(dense)
    packed, whole = _row(8, tokens), _row(1, tokens)
    cost = seconds(
        {
            "dense": lambda: plain(*packed),
            "packed": lambda: ours(*packed),
            "whole": lambda: ours(*whole),
        },
        rounds,
    )

    def reserved(length: int) -> int:
        return ours.lower(*_row(8, length)).compile().memory_analysis().temp_size_in_bytes

    ratios = {
        "row of 8 segments: dense mask over ours": (cost["dense"] / cost["packed"], ">= 3"),
        "one segment: dense mask over ours": (cost["dense"] / cost["whole"], ">= 1"),
        "rows: one segment over 8": (cost["whole"] / cost["packed"], ""),
        "memory: twice the tokens over once": (reserved(2 * tokens) / reserved(tokens), "<= 2.5"),
    }
    note = f"{tokens} tokens"
    return [row("K1", what, value, "ratio", demand, note=note) for what, (value, demand) in ratios.items()]


def _row(segments: int, tokens: int) -> tuple[jax.Array, ...]:
    return row_of(SIZES, ends_of(segments, tokens))


def dense(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> jax.Array:
    """Attention with the whole mask."""
    query, key = jnp.arange(q.shape[1])[:, None], jnp.arange(q.shape[1])[None, :]
    mask = (key <= query) & (query < end[:, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def forward_and_backward(attention: Callable[..., jax.Array]) -> Callable[..., tuple]:
    """A compiled sum of squares of what is attended to, with its gradients."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> jax.Array:
        return (attention(q, k, v, end).astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def decode_figures(rounds: int) -> list[dict]:
    """Decoding of groups that share their prompt's pages (K2), against K3, which reads them for every row."""

    @jax.jit
    def plain(*arguments: jax.Array) -> jax.Array:
        return paged_attention(*arguments[:5])

    @jax.jit
    def grouped(*arguments: jax.Array) -> jax.Array:
        return group_decode(*arguments[:5], make_groups(arguments[3], arguments[5], PARTY))

    found = []
    for group, prompt in ((16, 1024), (16, 4096), (4, 1024), (1, 1024), (1, 0)):
        arguments = slots(SIZES, group, prompt, own=64)
        runs = {"plain": lambda given=arguments: plain(*given), "grouped": lambda given=arguments: grouped(*given)}
        cost = seconds(runs, rounds)
        what = f"groups of {group} with {prompt} shared and 64 own tokens: K3 over K2"
        note = f"{SIZES.slots} slots, parties of {PARTY}"
        found.append(row("K2", what, cost["plain"] / cost["grouped"], "ratio", note=note))
    return found
