"""CPU time and memory of processes, from /proc, and calls that keep a pool busy.

CPU time rather than wall time wherever it can be: it hardly depends on what else the machine does.
"""

import asyncio
import dataclasses
import os
import pathlib
import resource
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable

from jaxrl.sandbox.pool import Pool
from jaxrl.sandbox.result import Result

TRIVIAL = "print(1+1)"
IMPORTING = "import numpy, sympy\nprint(1)"
SLOTS = 4  # calls, or processes, that run at once in every design
_TICK = 1.0 / os.sysconf("SC_CLK_TCK")
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") >> 10


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


def family(root: int) -> list[int]:
    """A process and all its descendants."""
    parents: dict[int, int] = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time of these processes, with that of their dead children. Dead ones count nothing."""
    return sum(own_cpu_seconds(pid) + _TICK * sum(map(int, _stat(pid)[13:15])) for pid in pids)


def own_cpu_seconds(pid: int) -> float:
    """CPU time of a process, all its threads, without its children."""
    total = 0
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total * 1e-9


def resident_kib(pid: int) -> int:
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_KIB


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


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; none where the process is dead."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
