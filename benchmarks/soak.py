"""Does anything grow? Many calls of every kind, and what they leave behind: figure S15, one JSON object a line.

Calls that succeed, fail, run out of time or memory, flood their output and return files, while templates are killed
now and then. Between portions of them nothing runs; then memory, descriptors, processes, mounts and files are counted,
of this process, of the warden and of the processes in the jail.

    python benchmarks/soak.py --json
"""

import argparse
import asyncio
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator

from jaxrl.sandbox import Limits, Pool
from jaxrl.sandbox.bench.processes import descendants, rollup_kib, state

PORTIONS = 20
_OUTSTANDING = 64
_USUAL = Limits(cpu_seconds=5, wall_seconds=30, memory_mib=64, output_hard_mib=1, disk_mib=8)
_SHORT = dataclasses.replace(_USUAL, cpu_seconds=0.1, wall_seconds=0.2)
_GROWTH = 0.05  # of resident memory, from the first portion after the warm-up to the last

# (share of all calls, code, limits, status)
_MIX = (
    (0.004, "while True: pass", _SHORT, "timeout"),
    (0.004, "import time; time.sleep(60)", _SHORT, "timeout"),
    (0.004, "while True: print('x' * 1000)", _USUAL, "output_limit"),
    (0.004, "x = bytearray(10**9)", _USUAL, "out_of_memory"),
    (0.01, "import ctypes; ctypes.string_at(0)", _USUAL, "error"),
    (0.03, "1 / 0", _USUAL, "error"),
    (0.03, "raise SystemExit(3)", _USUAL, "error"),
    (0.01, "print('x' * 300_000)", _USUAL, "ok"),
    (0.01, "import threading\nfor n in range(5): threading.Thread(target=print, args=(n,)).start()", _USUAL, "ok"),
    (0.02, "open('out.txt', 'w').write('x' * 1000)\nprint(open('in.txt').read())", _USUAL, "ok"),
    (0.02, "sum(range(100_000))", _USUAL, "ok"),
)
_REST = ("print(1 + 1)", _USUAL, "ok")


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What one pool holds while nothing runs."""

    driver_kib: int  # resident, of this process
    warden_kib: int
    jail_kib: int  # proportional share of stems and templates
    driver_descriptors: int
    warden_descriptors: int
    jail_descriptors: int
    processes: int  # below this one, zombies included
    zombies: int
    mounts: int  # in this process's namespace and in the jail's
    files: int  # left by a pool in the folder for temporary files


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def footprint(pool: Pool) -> Footprint:
    warden, own = pool.warden_pid, os.getpid()
    jail = descendants(warden)
    everybody = descendants(own)
    mounts = sum(len(pathlib.Path(f"/proc/{pid}/mountinfo").read_text().splitlines()) for pid in (own, warden, jail[0]))
    return Footprint(
        driver_kib=rollup_kib(own, "Rss"),
        warden_kib=rollup_kib(warden, "Rss"),
        jail_kib=sum(rollup_kib(pid, "Pss") for pid in jail),
        driver_descriptors=_descriptors(own),
        warden_descriptors=_descriptors(warden),
        jail_descriptors=sum(map(_descriptors, jail)),
        processes=len(everybody),
        zombies=sum(state(pid) == "Z" for pid in everybody),
        mounts=mounts,
        files=sum(name.startswith("jaxrl") for name in os.listdir(tempfile.gettempdir())),
    )


async def settled(pool: Pool, processes: int) -> None:
    """Wait until as many processes as at the start are there, each of them at rest."""
    for _ in range(250):
        below = descendants(os.getpid())
        if len(below) == processes and all(state(pid) == "S" for pid in below):
            return
        await asyncio.sleep(0.02)


def programs(count: int) -> Iterator[tuple[str, Limits, str]]:
    """So many of the mix, evenly spread: (code, limits, status)."""
    debts = [0.0] * len(_MIX)
    for _ in range(count):
        for index, (share, *_) in enumerate(_MIX):
            debts[index] += share
        due = max(range(len(debts)), key=debts.__getitem__)
        if debts[due] >= 1.0:
            debts[due] -= 1.0
            yield _MIX[due][1:]
        else:
            yield _REST


async def soak(pool: Pool, calls: int) -> tuple[list[Footprint], collections.Counter[str]]:
    """Footprints before and after each of ``PORTIONS`` portions, and how often each status came, "wrong" included."""
    gate = asyncio.Semaphore(_OUTSTANDING)
    statuses: collections.Counter[str] = collections.Counter()

    async def one(code: str, limits: Limits, status: str) -> None:
        async with gate:
            result = await pool.run(code, limits=limits, files={"in.txt": b"given"}, wanted=["out.txt"])
        statuses[result.status] += 1
        right = result.status == status and ("out.txt" in result.files) == ("out.txt" in code)
        statuses["wrong"] += not right

    processes = len(descendants(os.getpid()))
    found = [footprint(pool)]
    stream = programs(calls)
    for portion in range(PORTIONS):
        size = calls * (portion + 1) // PORTIONS - calls * portion // PORTIONS
        templates = [pid for pid in descendants(pool.warden_pid) if not descendants(pid)]
        working = [asyncio.create_task(one(*program)) for program in itertools.islice(stream, size)]
        if portion % 4 == 1:
            await asyncio.sleep(0.1)
            os.kill(templates[-1], signal.SIGKILL)
        await asyncio.gather(*working)
        await settled(pool, processes)
        found.append(footprint(pool))
    return found, statuses


def judge(found: list[Footprint], statuses: collections.Counter[str]) -> list[dict]:
    """The figures: growth of memory between the first portions and the last, and counts that must not change."""
    lines = []
    quarter = max(len(found) // 4, 1)
    warm = found[1:]  # the first portion is what brings every part into use
    for name in (field.name for field in dataclasses.fields(Footprint)):
        values = [getattr(one, name) for one in warm]
        early, late = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
        if name.endswith("_kib"):
            growth = (late - early) / early
            line = {"value": round(growth, 4), "unit": "ratio", "demand": f"<= {_GROWTH}", "holds": growth <= _GROWTH}
        else:
            change = int(late - early)
            line = {"value": change, "unit": "count", "demand": "== 0", "holds": change == 0}
        lines.append({"figure": "S15", "what": name, **line, "from": early, "to": late})
    zombies = max(one.zombies for one in found)
    rows = (("zombies at any rest", zombies), ("misclassified", statuses["wrong"]), ("infra", statuses["infra_error"]))
    for what, value in rows:
        line = {"figure": "S15", "what": what, "value": value, "unit": "count", "demand": "== 0", "holds": value == 0}
        lines.append(line)
    lines.append(
        {"figure": "S15", "what": "calls", "value": dict(statuses), "unit": "calls", "demand": None, "holds": None}
    )
    return lines


async def measure(calls: int) -> list[dict]:
    async with Pool(_USUAL, preload=("numpy",)) as pool:
        return judge(*await soak(pool, calls))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000, help="calls in all (default 100000: some ten minutes)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args()
    lines = asyncio.run(measure(options.calls))
    for line in lines:
        if options.json:
            print(json.dumps(line))
        else:
            print(f"{line['what']:24} {line['value']!s:>10} {line['unit']}  demand {line['demand']}")
    return 0 if all(line["holds"] is not False for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
