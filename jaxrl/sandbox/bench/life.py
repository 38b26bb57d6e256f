"""S13 and S15: a killed template, and what is left when a pool has worked and is closed."""

import asyncio
import contextlib
import os
import pathlib
import signal
import statistics
import tempfile
import time

from jaxrl.sandbox.bench.accounting import SLOTS, TRIVIAL, Effort, run_many
from jaxrl.sandbox.bench.processes import family, resident_kib
from jaxrl.sandbox.bench.rows import Row, judged
from jaxrl.sandbox.pool import Pool


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
        await run_many(pool, [TRIVIAL] * 20, SLOTS)
    before = _census()
    async with Pool(slots=SLOTS, preload=()) as pool:
        await run_many(pool, [TRIVIAL] * (calls // 10), 64)
        early_kib = sum(map(resident_kib, family(pool.warden_pid)))
        await run_many(pool, [TRIVIAL] * calls, 64)
        late_kib = sum(map(resident_kib, family(pool.warden_pid)))
    after = _census()
    left = {name: sorted(after[name] - kept) for name, kept in before.items()}
    note = ", ".join(f"{name}: {found}" for name, found in left.items() if found)
    growth = 100 * (late_kib / early_kib - 1)
    what = f"left by {calls} calls and a close: processes, descriptors, mounts, cgroups, temporary files"
    return [
        judged("S15", what, sum(map(len, left.values())), "things", "<= 0", note),
        judged("S15", "growth of the pool's memory over them", growth, "%", "<= 5", "", effort.tells),
    ]


def _census() -> dict[str, set[str]]:
    """What this process and those below it hold of the machine."""
    own = os.getpid()
    mounts = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    cgroups = pathlib.Path("/sys/fs/cgroup").glob("**/")
    return {
        "processes": {str(pid) for pid in family(own)},
        "descriptors": set(filter(_is_open, os.listdir("/proc/self/fd"))),
        "mounts": set(mounts),
        "cgroups": {str(path) for path in cgroups},
        "temporary files": {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("jaxrl")},
    }


def _is_open(number: str) -> bool:
    """Not that of the listing itself."""
    with contextlib.suppress(OSError):
        os.fstat(int(number))
        return True
    return False
