"""S11 and S14: sessions, and Ray as the carrier of batches."""

import asyncio
import time

from jaxrl.sandbox.bench.accounting import SLOTS, Effort, cpu_of, family, pool_cost
from jaxrl.sandbox.bench.rows import Row, judged, missing
from jaxrl.sandbox.pool import Pool

_BATCH = 64


async def cell(effort: Effort) -> list[Row]:
    """S11: a cell of a live session beside a call of its own."""
    what, demand = "fork per call over cell of a live session, CPU", ">= 10"
    try:
        from jaxrl.sandbox import session  # noqa: F401
    except ImportError:
        return [missing("S11", what, "ratio", demand, "this version has no sessions")]
    cells = effort.count(1000)
    async with Pool(slots=SLOTS, preload=()) as pool, pool.session() as live:
        await live.run("x = 0")

        async def work() -> None:
            for _ in range(cells):
                await live.run("x += 1")

        per_cell = await cpu_of(work, lambda: family(pool.warden_pid)) / cells
        per_call = await pool_cost(pool, "x = 1", effort.count(400), 1)
    return [judged("S11", what, per_call / per_cell, "ratio", demand, f"{1e3 * per_cell:.3f} ms a cell", effort.tells)]


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
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
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
