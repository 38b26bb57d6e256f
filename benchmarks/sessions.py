"""What live sessions cost: a copy of one, the memory of many. One JSON object a line with --json.

CPU time, not wall time, so that the figures hold on a busy machine: user and system time of this process, of the
warden and of all below it, dead children included. What a cell costs is figure S11 of ``jaxrl sandbox bench``.

    python benchmarks/sessions.py --json
"""

import argparse
import asyncio
import json
import os
import statistics

from jaxrl.sandbox import Pool, Session
from jaxrl.sandbox.bench.accounting import TRIVIAL, cpu_of
from jaxrl.sandbox.bench.processes import family, rollup_kib

STATE = "import sympy\nx = sympy.symbols('x')\nsympy.solve(x**3 - 2*x + 1, x)"


async def fork_milliseconds(pool: Pool, copies: int, rounds: int) -> float:
    """CPU of one copy of a session that has sympy loaded and has solved something."""
    async with pool.session() as session:
        await session.run(STATE)
        return statistics.median([await fork_round(pool, session, copies) for _ in range(rounds)])


async def fork_round(pool: Pool, session: Session, copies: int) -> float:
    """CPU milliseconds of each of so many copies."""
    made: list[Session] = []

    async def fork() -> None:
        made.extend(await session.fork(copies))

    cost = await cpu_of(fork, lambda: family(pool.warden_pid))
    rebuilt = [(await copy.run("x")).rebuilt for copy in made[:2]]
    assert not any(rebuilt), "the copies are not live"
    for copy in made:
        await copy.close()
    return cost / copies * 1e3


async def session_mib(pool: Pool, count: int) -> float:
    """Memory of a session after five cells, its keeper included, when there are so many; by proportional shares."""
    before = set(family(pool.warden_pid))
    sessions = [pool.session() for _ in range(count)]
    for session in sessions:
        for code in (STATE, "y = [i for i in range(1000)]", "import math", "sum(y)", TRIVIAL):
            await session.run(code)
    total = sum(rollup_kib(pid, "Pss") for pid in set(family(pool.warden_pid)) - before) / 1024
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
