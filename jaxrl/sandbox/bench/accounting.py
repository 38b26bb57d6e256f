"""What work costs in CPU time, and calls that keep a pool busy.

CPU time rather than wall time wherever it can be: it hardly depends on what else the machine does.
"""

import asyncio
import dataclasses
import resource
import statistics
import time
from collections.abc import Awaitable, Callable

from jaxrl.sandbox.bench.processes import cpu_seconds, family
from jaxrl.sandbox.pool import Pool
from jaxrl.sandbox.result import Result

TRIVIAL = "print(1+1)"
IMPORTING = "import numpy, sympy\nprint(1)"
SLOTS = 4  # calls, or processes, that run at once in every design


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured: ``rounds`` in which designs take turns, and a share of each figure's full count."""

    rounds: int = 5
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.scale <= 1:
            raise ValueError(f"--rounds {self.rounds} must be at least 1, --scale {self.scale} above 0 and at most 1")

    def count(self, full: int) -> int:
        return max(round(full * self.scale), 2)

    @property
    def tells(self) -> bool:
        """Whether verdicts may be drawn."""
        return self.scale >= 1.0


async def run_many(pool: Pool, codes: list[str], outstanding: int) -> list[Result]:
    """All snippets, at most so many outstanding; the results in their order."""
    gate = asyncio.Semaphore(outstanding)

    async def one(code: str) -> Result:
        async with gate:
            return await pool.run(code)

    return await asyncio.gather(*map(one, codes))


async def pool_cost(pool: Pool, code: str, calls: int, outstanding: int) -> float:
    """CPU seconds per call: pool, warden, templates and children."""

    async def work() -> None:
        for result in await run_many(pool, [code] * calls, outstanding):
            if result.status != "ok":
                raise RuntimeError(f"a call of the benchmark went wrong: {result}")
        await asyncio.sleep(0.05)  # the last deaths are accounted when their parents have waited

    return await cpu_of(work, lambda: family(pool.warden_pid)) / calls


async def cpu_of(work: Callable[[], Awaitable[object]], helpers: Callable[[], list[int]]) -> float:
    """CPU seconds that some work costs this process, its dead children and its helpers."""

    def own() -> float:
        usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    # Looking at the helpers costs this process CPU, so its own clock is read inside of both looks.
    helpers_before = cpu_seconds(helpers())
    own_before = own()
    await work()
    own_spent = own() - own_before
    return own_spent + cpu_seconds(helpers()) - helpers_before


async def latencies(call: Callable[[], Awaitable[object]], calls: int) -> list[float]:
    """Seconds of each of so many calls, one after the other."""
    found = []
    for _ in range(calls):
        began = time.perf_counter()
        await call()
        found.append(time.perf_counter() - began)
    return found


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
