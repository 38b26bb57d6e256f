"""S1 to S7: what a call costs beside other designs, which take turns; each figure is a median of ratios by round."""

import asyncio
import contextlib
import dataclasses
import statistics
from collections.abc import Awaitable, Callable

from jaxrl.sandbox.bench.accounting import IMPORTING, SLOTS, TRIVIAL, Effort, latencies, pool_cost, run_many
from jaxrl.sandbox.bench.anchors import ForkLimit, Judge, fresh, fresh_cost
from jaxrl.sandbox.bench.processes import own_cpu_seconds, resident_kib
from jaxrl.sandbox.bench.rows import Row, judged, told
from jaxrl.sandbox.pool import Pool

_MODULES = ("numpy", "scipy", "sympy")
_QUEUED = 20_000  # calls that wait while the warden's memory is looked at


@dataclasses.dataclass(frozen=True)
class _Ratio:
    figure: str
    what: str
    above: str  # name of a cost
    below: str
    demand: str


_RATIOS = (
    _Ratio("S1", "trivial call: CPU of a fresh python -I -S over ours, one outstanding", "fresh", "one", ">= 3"),
    _Ratio("S1", "the same with 64 outstanding (aim 5)", "fresh at once", "many", ">= 4"),
    _Ratio(
        "S2", "call importing numpy and sympy: fresh process over ours (aim 100)", "fresh import", "import", ">= 60"
    ),
    _Ratio("S3", "trivial call: stand-in of code-judge over ours", "judge", "many", ">= 5"),
    _Ratio("S3", "call importing numpy and sympy: the same", "judge import", "import", ">= 60"),
    _Ratio("S4", "un-jailed pool over jailed pool, trivial call", "unjailed", "many", ">= 0.75"),
    _Ratio("S5", "bare fork, exec, pipe, exit over our call, bare template (aim 0.45)", "fork", "many", ">= 0.3"),
    _Ratio("S5", "the same with numpy, scipy and sympy loaded (aim 0.65)", "loaded fork", "loaded", ">= 0.5"),
)
_NOTES = {"S3": "no queue server: calls wait in the judge's memory, which flatters it"}


async def measure(effort: Effort) -> list[Row]:
    """S1 to S5."""
    costs: dict[str, list[float]] = {}
    async with contextlib.AsyncExitStack() as open_things:
        designs = await _open_designs(open_things, effort)
        for round_number in range(effort.rounds + 1):
            for name, cost in designs.items():
                value = await cost()
                if round_number:  # the first one warms
                    costs.setdefault(name, []).append(value)
    rows = []
    for ratio in _RATIOS:
        pairs = zip(costs[ratio.above], costs[ratio.below], strict=True)
        value = statistics.median(above / below for above, below in pairs)
        note = _NOTES.get(ratio.figure, "")
        rows.append(judged(ratio.figure, ratio.what, value, "ratio", ratio.demand, note, effort.tells))
    for name, values in costs.items():
        rows.append(told("cost", f"CPU per call: {name}", 1e3 * statistics.median(values), "ms"))
    return rows


async def _open_designs(
    open_things: contextlib.AsyncExitStack, effort: Effort
) -> dict[str, Callable[[], Awaitable[float]]]:
    """The cost of one call by design, each measured anew when called."""
    jailed = await open_things.enter_async_context(Pool(slots=SLOTS, preload=_MODULES))
    unjailed = await open_things.enter_async_context(Pool(slots=SLOTS, preload=_MODULES, unsafe=True))
    bare_fork = open_things.enter_context(ForkLimit(()))
    loaded_fork = open_things.enter_context(ForkLimit(_MODULES))
    judge = open_things.enter_context(Judge())
    few, some, many = effort.count(4), effort.count(30), effort.count(400)
    loaded_call = "1+1  # numpy"  # to the template that has it, and nothing else

    async def forked(limit: ForkLimit, code: str) -> float:
        return limit.cost(code, many)

    return {
        "fresh": lambda: fresh_cost(TRIVIAL, some, at_once=1),
        "one": lambda: pool_cost(jailed, TRIVIAL, many, 1),
        "fresh at once": lambda: fresh_cost(TRIVIAL, some, at_once=SLOTS),
        "many": lambda: pool_cost(jailed, TRIVIAL, many, 64),
        "unjailed": lambda: pool_cost(unjailed, TRIVIAL, many, 64),
        "fork": lambda: forked(bare_fork, TRIVIAL),
        "judge": lambda: judge.cost(TRIVIAL, some, 64),
        "fresh import": lambda: fresh_cost(IMPORTING, few, at_once=1),
        "import": lambda: pool_cost(jailed, IMPORTING, many, 64),
        "judge import": lambda: judge.cost(IMPORTING, few, 64),
        "loaded": lambda: pool_cost(jailed, loaded_call, many, 64),
        "loaded fork": lambda: forked(loaded_fork, "print(1+1)"),
    }


async def warden(effort: Effort) -> list[Row]:
    """S6: the trusted process in the middle."""
    calls, queued = effort.count(1000), effort.count(_QUEUED)
    shares, seconds = [], []
    async with Pool(slots=SLOTS, preload=()) as pool:
        for _ in range(effort.rounds):
            before = own_cpu_seconds(pool.warden_pid)
            whole = await pool_cost(pool, TRIVIAL, calls, 64) * calls
            spent = own_cpu_seconds(pool.warden_pid) - before
            shares.append(spent / whole)
            seconds.append(spent / calls)
    async with Pool(slots=1, preload=(), queue=queued) as pool:
        await run_many(pool, [TRIVIAL] * 200, 64)  # what a warden at work needs anyway
        before_kib = resident_kib(pool.warden_pid)
        waiting = [asyncio.create_task(pool.run(f"print({number})")) for number in range(queued)]
        await waiting[0]
        queued_kib = (resident_kib(pool.warden_pid) - before_kib) / queued
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    milliseconds, share = 1e3 * statistics.median(seconds), statistics.median(shares)
    tenth = f"{100 * share:.0f} % of the call; 10 % would hold too"
    holds = (milliseconds <= 0.5 or share <= 0.1) if effort.tells else None
    return [
        Row("S6", "CPU of the warden per trivial call", round(milliseconds, 3), "ms", "<= 0.5", holds, tenth),
        judged("S6", "memory of the warden per queued call", queued_kib, "KiB", "<= 2", "", effort.tells),
    ]


async def latency(effort: Effort) -> list[Row]:
    """S7: one call in an idle pool."""
    calls = effort.count(60)
    ratios, ours = [], []
    async with Pool(slots=SLOTS, preload=()) as pool:
        await run_many(pool, [TRIVIAL] * 20, SLOTS)

        async def one_fresh() -> None:
            fresh(TRIVIAL)

        for _ in range(effort.rounds):
            pooled = statistics.median(await latencies(lambda: pool.run(TRIVIAL), calls))
            alone = statistics.median(await latencies(one_fresh, effort.count(20)))
            ratios.append(pooled / alone)
            ours.append(pooled)
    what = "median latency of an idle pool over that of a fresh process"
    note = f"{1e3 * statistics.median(ours):.1f} ms"
    return [judged("S7", what, statistics.median(ratios), "ratio", "<= 0.3333", note, effort.tells)]
