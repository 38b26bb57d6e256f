"""What live sessions cost: a copy of one, the memory of many. One JSON object a line with --json.

CPU time, not wall time, so that the figures hold on a busy machine: user and system time of this process, of the
warden and of all below it, dead children included. What a cell costs is figure S11 of ``jaxrl sandbox bench``.

    python benchmarks/sessions.py --json
"""

import argparse
import asyncio
import json
import os
import pathlib
import re
import statistics
import time

from jaxrl.sandbox import Pool

STATE = "import sympy\nx = sympy.symbols('x')\nsympy.solve(x**3 - 2*x + 1, x)"
TRIVIAL = "print(1+1)"
_TICK = 1.0 / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def below(root: int) -> list[int]:
    """A process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found


def helpers_seconds(pool: Pool) -> float:
    total = 0
    for pid in below(pool.warden_pid):
        try:
            total += sum(int(word) for word in _stat(pid)[11:15])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total * _TICK


class Cost:
    """CPU seconds of a stretch of work, without those of looking."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._helpers = helpers_seconds(pool)
        self._own = time.process_time()

    def seconds(self) -> float:
        own = time.process_time() - self._own
        return own + helpers_seconds(self._pool) - self._helpers


def proportional_mib(pid: int) -> float:
    rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss: +(\d+)", rollup, re.MULTILINE)[1]) / 1024


async def fork_milliseconds(pool: Pool, copies: int, rounds: int) -> float:
    """CPU of one copy of a session that has sympy loaded and has solved something."""
    costs = []
    async with pool.session() as session:
        await session.run(STATE)
        for _ in range(rounds):
            cost = Cost(pool)
            made = await session.fork(copies)
            costs.append(cost.seconds() / copies * 1e3)
            rebuilt = [(await copy.run("x")).rebuilt for copy in made[:2]]
            assert not any(rebuilt), "the copies are not live"
            for copy in made:
                await copy.close()
    return statistics.median(costs)


async def session_mib(pool: Pool, count: int) -> float:
    """Memory of a session after five cells, its keeper included, when there are so many; by proportional shares."""
    before = set(below(pool.warden_pid))
    sessions = [pool.session() for _ in range(count)]
    for session in sessions:
        for code in (STATE, "y = [i for i in range(1000)]", "import math", "sum(y)", TRIVIAL):
            await session.run(code)
    total = sum(map(proportional_mib, set(below(pool.warden_pid)) - before))
    for session in sessions:
        await session.close()
    return total / count


async def measure(arguments: argparse.Namespace) -> list[dict]:
    async with Pool(workers=1, session_memory_mib=1 << 20) as pool:
        fork = await fork_milliseconds(pool, arguments.copies, arguments.rounds)
        memory = await session_mib(pool, arguments.sessions)
    return [
        row("fork", "CPU of a copy of a session with sympy loaded", fork, "ms", "< 10", fork < 10),
        row("memory", f"of one of {arguments.sessions} sessions, by shares", memory, "MiB", "<= 12", memory <= 12),
    ]


def row(figure: str, what: str, value: float, unit: str, demand: str, holds: bool) -> dict:
    load = round(os.getloadavg()[0], 1)
    return {
        "figure": figure,
        "what": what,
        "value": round(value, 3),
        "unit": unit,
        "demand": demand,
        "holds": holds,
        "load": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=40)
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for found in asyncio.run(measure(arguments)):
        if arguments.json:
            print(json.dumps(found))
        else:
            print("{figure:8} {value:9.3f} {unit:6} {demand:6} {holds!s:6} {what}".format(**found))


if __name__ == "__main__":
    main()
