"""What the kernels cost on the devices at hand, beside plain alternatives.

Times are medians of one run in turns: of the CPU where the devices are one, otherwise of the clock.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels.choice import device_kind
from jaxrl_kernels.group_decode import group_decode, make_groups
from jaxrl_kernels.interval_attention import interval_attention
from jaxrl_kernels.paged_attention import paged_attention

QUERY_HEADS, KV_HEADS, WIDTH = 4, 2, 64
SLOTS, PARTY, PAGE = 64, 16, 16


def figures(tokens: int, rounds: int) -> list[dict]:
    """Interval attention, forward and backward, against ``jax.nn.dot_product_attention`` with the same mask made dense.

    "rows" compares rows that are packed differently; "memory" is what the compiler reserves, of doubled tokens over
    single.

    Args:
        tokens: of the row.
        rounds: in which the alternatives take turns.
    """
    ours, plain = forward_and_backward(interval_attention), forward_and_backward(dense)
    packed, whole = row_of_segments(tokens, 8), row_of_segments(tokens, 1)
    cost = seconds(
        {
            "dense": lambda: plain(*packed),
            "packed": lambda: ours(*packed),
            "whole": lambda: ours(*whole),
        },
        rounds,
    )

    def reserved(length: int) -> int:
        return ours.lower(*row_of_segments(length, 8)).compile().memory_analysis().temp_size_in_bytes

    ratios = {
        "row of 8 segments: dense mask over ours": (cost["dense"] / cost["packed"], ">= 3"),
        "one segment: dense mask over ours": (cost["dense"] / cost["whole"], ">= 1"),
        "rows: one segment over 8": (cost["whole"] / cost["packed"], ""),
        "memory: twice the tokens over once": (reserved(2 * tokens) / reserved(tokens), "<= 2.5"),
    }
    return [_figure("K1", what, value, demand, f"{tokens} tokens") for what, (value, demand) in ratios.items()]


def row_of_segments(tokens: int, segments: int) -> tuple[jax.Array, ...]:
    """q, k, v and end of one row of equal segments."""
    generator = np.random.default_rng(0)
    edges = np.linspace(0, tokens, segments + 1).astype(int)
    end = np.repeat(edges[1:], np.diff(edges))[None].astype(np.int32)
    shapes = [(1, tokens, heads, WIDTH) for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS)]
    return (*(jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes), jnp.asarray(end))


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


def seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns; each runs once before."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            jax.block_until_ready(run())
            taken[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def slots_with_prompts(group: int, prompt: int, own: int) -> tuple[jax.Array, ...]:
    """Arguments of ``group_decode`` but the groups: slots in groups of this size, each with as many tokens of its own,
    and how many pages they share."""
    generator = np.random.default_rng(0)
    shared, table = prompt // PAGE, (prompt + own) // PAGE
    page_table = np.arange(SLOTS * table).reshape(SLOTS, table)
    leader = np.arange(SLOTS) // group * group
    page_table[:, :shared] = page_table[leader, :shared]
    q = generator.normal(size=(SLOTS, 1, QUERY_HEADS, WIDTH))
    pages = generator.normal(size=(2, SLOTS * table, KV_HEADS, PAGE, WIDTH))
    positions, counts = np.full((SLOTS, 1), prompt + own - 1), np.full(SLOTS, shared)
    integers = (jnp.asarray(x, jnp.int32) for x in (page_table, positions, counts))
    return (*(jnp.asarray(x, jnp.float32) for x in (q, *pages)), *integers)


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
        arguments = slots_with_prompts(group, prompt, own=64)
        runs = {"plain": lambda given=arguments: plain(*given), "grouped": lambda given=arguments: grouped(*given)}
        cost = seconds(runs, rounds)
        what = f"groups of {group} with {prompt} shared and 64 own tokens: K3 over K2"
        found.append(_figure("K2", what, cost["plain"] / cost["grouped"], "", f"{SLOTS} slots, parties of {PARTY}"))
    return found


def _figure(name: str, what: str, value: float, demand: str, note: str) -> dict:
    holds = None
    if demand:
        sign, limit = demand.split()
        holds = value >= float(limit) if sign == ">=" else value <= float(limit)
    shown = {"figure": name, "what": what, "value": round(value, 2), "unit": "ratio", "demand": demand, "holds": holds}
    return shown | {"note": note, "device": device_kind(), "jax": jax.__version__}
