"""S13 and S15: a killed template, and what is left when a pool has worked and is closed."""

import asyncio
import contextlib
import os
import pathlib
import signal
import statistics
import tempfile
import time

from jaxrl.sandbox import cgroups
from jaxrl.sandbox.bench.accounting import SLOTS, TRIVIAL, Effort, run_many
from jaxrl.sandbox.bench.processes import family, resident_kib
from jaxrl.sandbox.bench.rows import Row, judged
from jaxrl.sandbox.jail import SandboxUnavailable
from jaxrl.sandbox.pool import Pool
from jaxrl.sandbox.result import Result


async def loss(effort: Effort) -> list[Row]:
    """S13: SIGKILL to the only template while calls run on it."""
    seconds, lost = [], 0
    async with Pool(slots=8, workers=1, preload=()) as pool:
        await run_many(pool, [TRIVIAL] * 20, SLOTS)
        for _ in range(effort.rounds):
            running = [asyncio.create_task(pool.run(f"import time; time.sleep(0.2); print({n})")) for n in range(8)]
            await asyncio.sleep(0.1)
            began = time.perf_counter()
            os.kill(_template(pool.warden_pid), signal.SIGKILL)
            results = await asyncio.gather(*running)
            # Each sleeps anew on the new template.
            seconds.append(time.perf_counter() - began - 0.2)
            lost += sum((str(r.status), r.stdout) != ("ok", f"{n}\n") for n, r in enumerate(results))
    return [
        judged(
            "S13", "a killed template: until its calls have run on a new one", statistics.median(seconds), "s", "<= 2"
        ),
        judged("S13", "calls lost or scored by it", lost, "calls", "<= 0"),
    ]


def _template(warden: int) -> int:
    """The only template of a pool without modules: child of the warden's only child."""
    _, _, template, *_ = family(warden)
    return template


async def leftovers(effort: Effort) -> list[Row]:
    """S15: what many calls and a close leave behind, and how the memory of the pool grows before that."""
    calls = effort.count(10_000)
    async with Pool(slots=SLOTS, preload=()) as pool:  # what a first pool makes the interpreter load
        without_processes = _why_no_processes(pool)
        await _portion(pool, 20, not without_processes)
    before = _census()
    async with Pool(slots=SLOTS, preload=()) as pool:
        await _portion(pool, max(calls // 10, 100), not without_processes)
        early_kib = sum(map(resident_kib, family(pool.warden_pid)))
        await _portion(pool, calls, not without_processes)
        late_kib = sum(map(resident_kib, family(pool.warden_pid)))
    after = _census()
    left = {name: sorted(after[name] - kept) for name, kept in before.items()}
    notes = [f"{name}: {found}" for name, found in left.items() if found] + without_processes
    growth = 100 * (late_kib / early_kib - 1)
    what = f"left by {calls} calls and a close: processes, descriptors, mounts, cgroups, temporary files"
    return [
        judged("S15", what, sum(map(len, left.values())), "things", "<= 0", ", ".join(notes)),
        judged("S15", "growth of the pool's memory over them", growth, "%", "<= 5", "", effort.tells),
    ]


def _why_no_processes(pool: Pool) -> list[str]:
    try:
        pool.check(pool.limits, {}, processes=True)
    except SandboxUnavailable:
        return ["without calls that start processes, for want of a memory cgroup"]
    return []


async def _portion(pool: Pool, calls: int, processes: bool) -> None:
    """So many calls; one in a hundred starts a process, or is a cell of a session that is copied."""
    rare = max(calls // 200, 1)
    few = asyncio.Semaphore(SLOTS)

    async def with_process() -> Result:
        async with few:
            return await pool.run("import os; os.system('true')", processes=True)

    async def with_copy() -> Result:
        async with few, pool.session() as session:
            await session.run("x = 1")
            (copy,) = await session.fork(1)
            async with copy:
                return await copy.run("x")

    results, *others = await asyncio.gather(
        run_many(pool, [TRIVIAL] * calls, 64),
        *(with_copy() for _ in range(rare)),
        *(with_process() for _ in range(rare if processes else 0)),
    )
    wrong = [result for result in (*results, *others) if result.status != "ok"]
    if wrong:
        raise RuntimeError(f"a call of the benchmark went wrong: {wrong[0]}")


def _census() -> dict[str, set[str]]:
    """What this process and those below it hold of the machine. A control group that others use is locked by them."""
    return {
        "processes": {str(pid) for pid in family(os.getpid())},
        "descriptors": set(filter(_is_open, os.listdir("/proc/self/fd"))),
        "mounts": set(pathlib.Path("/proc/self/mountinfo").read_text().splitlines()),
        "cgroups": set(cgroups.abandoned()),
        "temporary files": {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("jaxrl")},
    }


def _is_open(number: str) -> bool:
    """Not that of the listing itself."""
    with contextlib.suppress(OSError):
        os.fstat(int(number))
        return True
    return False
