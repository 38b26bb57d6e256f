"""What the kernels cost beside plain alternatives, in CPU time of one run in turns: one JSON object a line.

K1 is interval attention, forward and backward, against ``jax.nn.dot_product_attention`` with the same mask made dense.
"rows" compares rows that are packed differently; "memory" is what the compiler reserves, doubled tokens over single.
K2 is decoding of groups that share their prompt's pages, against K3, which reads them for every row.

    python benchmarks/kernels.py --json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels import group_decode, interval_attention, make_groups, paged_attention

QUERY_HEADS, KV_HEADS, WIDTH = 4, 2, 64
SLOTS, PARTY, PAGE = 64, 16, 16


def row_of_segments(tokens: int, segments: int) -> tuple[jax.Array, ...]:
    """q, k, v and end of one row of equal segments."""
    generator = np.random.default_rng(0)
    edges = np.linspace(0, tokens, segments + 1).astype(int)
    end = np.repeat(edges[1:], np.diff(edges))[None].astype(np.int32)
    shapes = [(1, tokens, heads, WIDTH) for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS)]
    return (*(jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes), jnp.asarray(end))


def dense(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> jax.Array:
    query, key = jnp.arange(q.shape[1])[:, None], jnp.arange(q.shape[1])[None, :]
    mask = (key <= query) & (query < end[:, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def forward_and_backward(attention: Callable[..., jax.Array]) -> Callable[..., tuple]:
    return jax.jit(jax.value_and_grad(lambda q, k, v, end: (attention(q, k, v, end) ** 2).sum(), argnums=(0, 1, 2)))


def cpu_seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, taken in turns; each runs once before."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            jax.block_until_ready(run())
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def figures(tokens: int, rounds: int) -> list[dict]:
    ours, plain = forward_and_backward(interval_attention), forward_and_backward(dense)
    packed, whole = row_of_segments(tokens, 8), row_of_segments(tokens, 1)
    cost = cpu_seconds(
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
        cost = cpu_seconds(runs, rounds)
        what = f"groups of {group} with {prompt} shared and 64 own tokens: K3 over K2"
        found.append(_figure("K2", what, cost["plain"] / cost["grouped"], "", f"{SLOTS} slots, parties of {PARTY}"))
    return found


def _figure(name: str, what: str, value: float, demand: str, note: str) -> dict:
    holds = None
    if demand:
        sign, limit = demand.split()
        holds = value >= float(limit) if sign == ">=" else value <= float(limit)
    shown = {"figure": name, "what": what, "value": round(value, 2), "unit": "ratio", "demand": demand, "holds": holds}
    return shown | {"note": note, "device": jax.devices()[0].device_kind, "jax": jax.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of a row (default: 4096)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object a line (there is no other form)")
    options = parser.parse_args()
    for figure in figures(options.tokens, options.rounds) + decode_figures(options.rounds):
        print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
