"""The pool over a Ray cluster: figure S14, and many calls at once while a node is killed; one JSON object a line.

Two simulated nodes on this machine, in a network of their own. What Ray and the batches cost is measured with a pool
that does nothing; the killed node with real calls, each of which must be answered once, rightly, and as ``ok``.

    python benchmarks/cluster.py --json
"""

import argparse
import asyncio
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
import tracemalloc

import ray

from jaxrl.sandbox import ClusterPool, Limits, Result
from jaxrl.sandbox.node_link import NodeLink
from jaxrl.sandbox.node_orders import CallOrder
from jaxrl.statuses import ToolStatus

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for the simulated nodes of the tests, which no installation has

from tests.sandbox import own_network  # noqa: E402 - found by the line above
from tests.sandbox.ray_nodes import QUIET, RayNodes, output_for_us, temporary_folder  # noqa: E402 - likewise

BATCH = 64


class NullPool:
    """Answers at once."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def run(self, code: str, **_: object) -> Result:
        return Result(ToolStatus.OK, "2\n", "", 0, None, 0.0, 0.0, 0.0, 0, 1, False, False, "none")


class Echo:
    """An actor that gives back what it gets."""

    async def run(self, orders: list[CallOrder]) -> list[CallOrder]:
        return orders


def orders(count: int) -> list[CallOrder]:
    limits = Limits()
    return [CallOrder(number, "print(1+1)", "", True, limits, "", None, (), "python", False) for number in range(count)]


async def ray_rate(actor: ray.actor.ActorHandle, size: int, batches: int) -> float:
    """Calls a second in batches of ``size``, with 64 batches under way."""
    gate = asyncio.Semaphore(64)
    batch = orders(size)

    async def one() -> None:
        async with gate:
            assert len(await actor.run.remote(batch)) == size

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(batches)))
    return size * batches / (time.perf_counter() - started)


async def path_rate(link: NodeLink, calls: int) -> float:
    """Null calls a second through the whole way: batching, Ray, the actor, its tasks, and back."""
    started = time.perf_counter()
    answers = await asyncio.gather(*(link.run(order) for order in orders(calls)))
    assert all(answer.outcome is not None for answer in answers)
    return calls / (time.perf_counter() - started)


async def carrier(nodes: RayNodes, rounds: int) -> list[dict]:
    """S14 proper."""
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    node = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    echo = ray.remote(Echo).options(num_cpus=0).remote()
    link = NodeLink(node, "node", NullPool, 1 << 20, 60.0, on_room=lambda places: None, on_lost=lambda lost_link: None)
    await link.start()
    samples: dict[str, list[float]] = {"batched": [], "single": [], "path": []}
    for _ in range(rounds):
        samples["single"].append(await ray_rate(echo, 1, 1000))
        samples["batched"].append(await ray_rate(echo, BATCH, 500))
        samples["path"].append(await path_rate(link, 20_000))
    await link.close()
    ray.shutdown()
    middle = {name: statistics.median(values) for name, values in samples.items()}
    ratio = statistics.median(b / s for b, s in zip(samples["batched"], samples["single"], strict=True))
    return [
        row("S14", f"null calls a second over Ray in batches of {BATCH}", middle["batched"], "calls/s", 20_000),
        row("S14 ratio", "the same over one call at a time", ratio, "ratio", 10),
        row("S14 path", "the same through all of the pool but its jail", middle["path"], "calls/s", None),
    ]


def row(figure: str, what: str, value: float, unit: str, least: float | None) -> dict:
    return {
        "figure": figure,
        "what": what,
        "value": round(value, 1),
        "unit": unit,
        "demand": None if least is None else f">= {least:g}",
        "holds": None if least is None else value >= least,
        "load_average": round(os.getloadavg()[0], 1),
    }


async def killed_node(nodes: RayNodes, calls: int) -> list[dict]:
    """So many calls at once over two nodes, one of which is killed when half have been answered."""
    answers: dict[int, list[Result]] = {number: [] for number in range(calls)}
    half = asyncio.Event()
    answered = itertools.count(1)

    async def one(number: int) -> None:
        answers[number].append(await pool.run(f"print({number})"))
        if next(answered) == calls // 2:
            half.set()

    async with ClusterPool(nodes.address, workers=1, slots=2, preload=()) as pool:
        memory = await waiting_bytes(pool, 10_000)
        started, cpu = time.perf_counter(), time.process_time()
        tasks = [asyncio.create_task(one(number)) for number in range(calls)]
        await asyncio.sleep(0)
        submitted = time.process_time() - cpu
        await half.wait()
        nodes.kill_node(0)
        await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
    right = sum(
        len(results) == 1 and (results[0].status, results[0].stdout) == (ToolStatus.OK, f"{number}\n")
        for number, results in answers.items()
    )
    again = sum(results[0].attempts > 1 for results in answers.values())
    return [
        row("S14 nodes", f"of {calls} calls answered once and rightly, a node killed half-way", right, "calls", calls),
        row("S14 again", "of these calls run again", again, "calls", None),
        row("S14 rate", "the same, calls a second", calls / seconds, "calls/s", None),
        row("S14 submit", "CPU seconds to submit them", submitted, "s", None) | at_most(submitted, 2.0),
        row("S14 memory", "of the driver for each waiting call", memory, "bytes", None) | at_most(memory, 2048),
    ]


def at_most(value: float, limit: float) -> dict:
    return {"demand": f"<= {limit:g}", "holds": value <= limit}


async def waiting_bytes(pool: ClusterPool, calls: int) -> float:
    """Memory of this process for a call that waits for room on a node, the caller's task included."""
    tracemalloc.start()
    tasks = [asyncio.create_task(pool.run(f"print({number})")) for number in range(calls)]
    await asyncio.sleep(0)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return size / calls


async def measure(nodes: RayNodes, rounds: int, calls: int) -> list[dict]:
    nodes.have(2)
    return [*await carrier(nodes, rounds), *await killed_node(nodes, calls)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median counts (default 5)")
    parser.add_argument("--calls", type=int, default=45_000, help="calls at once over two nodes (default 45000)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args()
    os.environ.update(QUIET)
    if not own_network.alone():
        os.execv(sys.executable, own_network.command(*sys.argv))
    output = output_for_us()
    with temporary_folder():
        nodes = RayNodes()
        try:
            lines = asyncio.run(measure(nodes, options.rounds, options.calls))
        finally:
            nodes.close()
    for line in lines:
        if options.json:
            print(json.dumps(line), file=output)
        else:
            words = f"{line['figure']:11} {line['value']!s:>10} {line['unit']}  demand {line['demand']}  {line['what']}"
            print(words, file=output)
    return 0 if all(line["holds"] is not False for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
