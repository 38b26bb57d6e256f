"""S8, S9, S10 and S12: many calls at once, time-outs among them, deadlines, and a second core."""

import asyncio
import dataclasses
import os
import statistics
import time

from jaxrl.sandbox.bench.accounting import SLOTS, TRIVIAL, Effort, cpu_of, percentile, pool_cost, run_many
from jaxrl.sandbox.bench.processes import busy_seconds, family, resident_kib
from jaxrl.sandbox.bench.rows import Row, judged, missing, told
from jaxrl.sandbox.pool import Pool
from jaxrl.sandbox.protocol import Limits

_AT_ONCE = 45_000
_MIX = (
    "sum(k * k for k in range(100))",
    "def f(n):\n    return n / 0\nf(3)",
    "import numpy as np\nprint(np.linalg.det(np.arange(9.0).reshape(3, 3) + np.eye(3)))",
    "print([n for n in range(2, 600) if all(n % d for d in range(2, n))][-1])",
    "import sympy as sp\nx = sp.symbols('x')\nprint(sp.solve(x**2 - 5*x + 6, x))",
    "total = 0\nfor k in range(150_000):\n    total += k\nprint(total)",
)
_ENDLESS = ("while True: pass", "import time\ntime.sleep(60)")
_TWO_OVER_ONE = "calls a second on two cores over one"
_LIMITS = Limits(cpu_seconds=3.0, wall_seconds=3.0)
_QUIET = 0.05  # share of the cores' time that others may take of a stretch that is to be judged


async def burst(effort: Effort) -> list[Row]:
    """S8: every call of a training step at the same moment."""
    calls = effort.count(_AT_ONCE)
    async with Pool(slots=SLOTS, preload=(), queue=calls) as pool:
        steady = statistics.median([await pool_cost(pool, TRIVIAL, effort.count(400), 64) for _ in range(3)])
        outcome = _Burst(pool, calls)
        await outcome.weigh_tasks()
        cost = await cpu_of(outcome.run, lambda: family(pool.warden_pid)) / calls
    task = f"without the {outcome.kib_per_task:.1f} KiB of asyncio's task that waits for it"
    flawless = "each answered once, with its own answer"
    return [
        judged(
            "S8", f"of {calls} calls at once, not answered exactly once", outcome.missed(), "calls", "<= 0", flawless
        ),
        judged("S8", "infrastructure faults among them", outcome.infra, "calls", "<= 0"),
        judged("S8", "misclassified", outcome.wrong, "calls", "<= 0"),
        judged("S8", "time to submit them", outcome.submitted_seconds, "s", "<= 2", "", effort.tells),
        judged("S8", "memory of this process per queued call", outcome.kib_per_call, "KiB", "<= 2", task, effort.tells),
        judged(
            "S8", "throughput of a core, burst over 64 outstanding", steady / cost, "ratio", ">= 0.9", "", effort.tells
        ),
        told("S8", "calls answered in a second", calls / outcome.seconds, "1/s"),
    ]


class _Burst:
    """So many calls at once, and what became of them."""

    def __init__(self, pool: Pool, calls: int) -> None:
        self._pool = pool
        self._answers = [0] * calls
        self.wrong = self.infra = 0
        self._before_kib = resident_kib(os.getpid())
        self.submitted_seconds = self.seconds = self.kib_per_call = self.kib_per_task = 0.0

    async def weigh_tasks(self) -> None:
        """What asyncio itself takes for so many tasks that wait, whatever they wait for."""
        end = asyncio.Event()
        tasks = [asyncio.create_task(end.wait()) for _ in self._answers]
        await asyncio.sleep(0)
        self.kib_per_task = (resident_kib(os.getpid()) - self._before_kib) / len(tasks)
        end.set()
        await asyncio.gather(*tasks)

    async def run(self) -> None:
        began = time.perf_counter()
        tasks = [asyncio.create_task(self._pool.run(f"print({number})")) for number in range(len(self._answers))]
        await asyncio.sleep(0)  # each runs to where it waits
        self.submitted_seconds = time.perf_counter() - began
        await tasks[0]  # by now all have been written to the warden
        self.kib_per_call = (resident_kib(os.getpid()) - self._before_kib) / len(tasks) - self.kib_per_task
        for done in asyncio.as_completed(tasks):
            result = await done
            self.infra += result.status == "infra_error"
            if str(result.status) == "ok" and result.stdout.strip().isdigit():
                self._answers[int(result.stdout)] += 1
            else:
                self.wrong += 1
        self.seconds = time.perf_counter() - began

    def missed(self) -> int:
        return sum(count != 1 for count in self._answers)


async def lanes(effort: Effort) -> list[Row]:
    """S9: one call in twenty does not end by itself; what that does to the others, with a slow lane and without."""
    calls = effort.count(400)
    late, rate = [], []
    for _ in range(2 if effort.tells else 1):
        two = await _mixed(Pool(_LIMITS, slots=SLOTS, slow_slots=32), calls)
        wide = await _mixed(Pool(_LIMITS, slots=32, slow_slots=0), calls)
        late.append(two[0] / wide[0])
        rate.append(two[1] / wide[1])
    rounds = f"{len(late)} rounds of {calls} calls"
    what = "mix with 5 % time-outs, two lanes over one wide lane: "
    return [
        judged("S9", what + "p99 of other calls", statistics.median(late), "ratio", "<= 0.5", rounds, effort.tells),
        judged(
            "S9", what + "calls a second (aim 0.85)", statistics.median(rate), "ratio", ">= 0.7", rounds, effort.tells
        ),
    ]


async def _mixed(pool: Pool, calls: int) -> tuple[float, float]:
    """(p99 of the time from a slot to the end of calls that do not run out of time, calls a second)."""
    codes = [_ENDLESS[n // 20 % 2] if n % 20 == 10 else _MIX[n % len(_MIX)] for n in range(calls)]
    async with pool:
        await run_many(pool, list(_MIX), SLOTS)
        began = time.perf_counter()
        results = await run_many(pool, codes, 64)
        seconds = time.perf_counter() - began
    timeouts = sum(result.status == "timeout" for result in results)
    if timeouts != sum(code in _ENDLESS for code in codes):
        raise RuntimeError(f"{timeouts} time-outs in a mix with another number of endless calls")
    normal = [r.wall_seconds for r in results if r.status != "timeout"]
    return percentile(normal, 99), calls / seconds


async def deadlines(effort: Effort) -> list[Row]:
    """S10: how long after its wall limit a sleeping call ends, in an idle pool and in one full of busy ones."""
    sleepers, batches = 4, effort.count(25)
    limits = Limits(cpu_seconds=60.0, wall_seconds=0.3)
    rows = []
    async with Pool(slots=2 * sleepers, slow_slots=0, preload=()) as pool:
        for what, bound, busy in (("in an idle pool", 0.1, 0), ("beside busy loops in half its slots", 0.5, sleepers)):
            forever = dataclasses.replace(limits, wall_seconds=600.0, cpu_seconds=600.0)
            loops = [asyncio.create_task(pool.run("while True: pass", limits=forever)) for _ in range(busy)]
            late: list[float] = []
            for _ in range(batches):
                calls = (pool.run("import time; time.sleep(60)", limits=limits) for _ in range(sleepers))
                late += [result.wall_seconds - limits.wall_seconds for result in await asyncio.gather(*calls)]
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            what = f"p99 of how late a call is ended, {what}"
            rows.append(judged("S10", what, percentile(late, 99), "s", f"<= {bound}", "", effort.tells))
    return rows


async def cores(effort: Effort) -> list[Row]:
    """S12: calls a second on two cores over those on one, in the rounds in which nobody else used them."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        return [missing("S12", _TWO_OVER_ONE, "ratio", ">= 1.8", "this machine has one core")]
    rounds = []
    try:
        for _ in range(effort.rounds):
            one, two = [await stretch(allowed[:count], effort.count(300)) for count in (1, 2)]
            rounds.append((two[0] / one[0], max(one[1], two[1])))
    finally:
        os.sched_setaffinity(0, allowed)
    return [cores_row(rounds, effort.tells)]


async def stretch(cores: list[int], calls: int) -> tuple[float, float]:
    """(calls a second on these cores alone, share of the cores' time that others used meanwhile)."""
    os.sched_setaffinity(0, cores)  # the pool's processes inherit it
    async with Pool(slots=SLOTS, preload=()) as pool:
        await run_many(pool, [TRIVIAL] * 20, SLOTS)
        busy, began = busy_seconds(cores), time.perf_counter()
        own = await cpu_of(lambda: run_many(pool, [_MIX[-1]] * calls, 64), lambda: family(pool.warden_pid))
        seconds, busy = time.perf_counter() - began, busy_seconds(cores) - busy
    return calls / seconds, max(busy - own, 0.0) / (seconds * len(cores))


def cores_row(rounds: list[tuple[float, float]], tells: bool) -> Row:
    """S12 of (ratio of the rates, share of the cores' time that others took) by round."""
    quiet = [ratio for ratio, others in rounds if others <= _QUIET]
    value = statistics.median(quiet or [ratio for ratio, _ in rounds])
    others = 100 * min(others for _, others in rounds)
    note = f"{len(quiet)} of {len(rounds)} rounds, in which others took at most {100 * _QUIET:g} % of the cores"
    if not quiet:
        note = f"cannot be judged: others took {others:.0f} % of the cores and more"
    return judged("S12", _TWO_OVER_ONE, value, "ratio", ">= 1.8", note, tells and bool(quiet))
