"""S11 and S14: sessions, and Ray as the carrier of batches."""

import asyncio
import os
import statistics
import time

from jaxrl.sandbox.bench.accounting import SLOTS, Effort, cpu_of, pool_cost
from jaxrl.sandbox.bench.processes import family
from jaxrl.sandbox.bench.rows import Row, judged, missing
from jaxrl.sandbox.pool import Pool

_BATCH = 64


async def cell(effort: Effort) -> list[Row]:
    """S11: a cell of a live session beside a call of its own, both with sympy loaded, taking turns."""
    cells = effort.count(1000)
    ratios, costs = [], []
    async with Pool(slots=SLOTS, workers=1) as pool, pool.session() as live:
        await live.run("import sympy\nx = 0")

        async def work() -> None:
            for _ in range(cells):
                result = await live.run("x += 1")
                if result.status != "ok" or result.rebuilt:
                    raise RuntimeError(f"a cell of the benchmark went wrong: {result}")
            await asyncio.sleep(0.05)  # the last deaths are accounted when their parents have waited

        for _ in range(effort.rounds):
            per_call = await pool_cost(pool, "x = 1  # sympy", effort.count(400), 1)
            per_cell = await cpu_of(work, lambda: family(pool.warden_pid)) / cells
            ratios.append(per_call / per_cell)
            costs.append(per_cell)
    what = "call over cell of a live session, sympy loaded for both: CPU"
    note = f"{1e3 * statistics.median(costs):.3f} ms a cell"
    return [judged("S11", what, statistics.median(ratios), "ratio", ">= 10", note, effort.tells)]


async def carrier(effort: Effort) -> list[Row]:
    """S14: null calls through one Ray actor, in batches and one by one."""
    what = f"null calls a second through a Ray actor in batches of {_BATCH}"
    try:
        import ray
    except ImportError:
        return [
            missing("S14", what, "1/s", ">= 20000", "ray is not installed"),
            missing("S14", "the same over one by one", "ratio", ">= 10", "ray is not installed"),
        ]
    batched, single = await asyncio.to_thread(_rates, ray, effort)
    return [
        judged(
            "S14",
            what,
            batched,
            "1/s",
            ">= 20000",
            "two nodes, one killed: tests/sandbox/test_cluster.py",
            effort.tells,
        ),
        judged("S14", "the same over one by one", batched / single, "ratio", ">= 10", "", effort.tells),
    ]


def _rates(ray, effort: Effort) -> tuple[float, float]:
    """Calls a second, in batches and one by one."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)  # no cluster it finds around
    try:

        @ray.remote(num_cpus=0)
        class Null:
            def answer(self, batch: list[int]) -> list[int]:
                return batch

        actor = Null.remote()
        ray.get(actor.answer.remote([0]))
        found = []
        for size, count in ((_BATCH, effort.count(500)), (1, effort.count(1000))):
            began = time.perf_counter()
            ray.get([actor.answer.remote([0] * size) for _ in range(count)])
            found.append(size * count / (time.perf_counter() - began))
    finally:
        ray.shutdown()
    return found[0], found[1]
