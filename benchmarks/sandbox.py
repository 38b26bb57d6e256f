"""What a sandboxed call costs, against a fresh interpreter per call: figures S1, S2 and S4, one JSON object a line.

CPU time, not wall time, so that the figures hold on a busy machine: user and system time of the pool's process, of
the warden, of stems and templates, and of every child. Designs take turns round by round, and each figure is the
median ratio over the rounds.

    python benchmarks/sandbox.py --json
"""

import argparse
import asyncio
import json
import os
import pathlib
import statistics
import subprocess
import sys
import sysconfig
import time

from jaxrl.sandbox import Pool

TRIVIAL = "print(1+1)"
IMPORTING = "import numpy, sympy\nprint(1)"
_TICK = 1.0 / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def family(root: int) -> list[int]:
    """A process and all its descendants."""
    parents: dict[int, int] = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of the processes under ``pid``, with that of their dead children."""
    total = 0
    for member in family(pid):
        try:
            total += sum(int(word) for word in _stat(member)[11:15])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total * _TICK


async def pool_cost(pool: Pool, code: str, calls: int, outstanding: int) -> float:
    """CPU seconds per call with so many calls outstanding, this process included."""
    gate = asyncio.Semaphore(outstanding)

    async def one() -> None:
        async with gate:
            result = await pool.run(code)
            assert result.status == "ok", result

    before = cpu_seconds(pool.warden_pid) + time.process_time()
    await asyncio.gather(*(one() for _ in range(calls)))
    await asyncio.sleep(0.05)  # the last deaths are accounted when their parents have waited
    return (cpu_seconds(pool.warden_pid) + time.process_time() - before) / calls


def fresh_cost(code: str, calls: int) -> float:
    """CPU seconds per call of a new isolated interpreter, and of starting it from here."""
    packages = sysconfig.get_path("purelib")
    prologue = f"import sys; sys.path.append({packages!r})\n" if "import" in code else ""
    before = sum(os.times()[:4])
    for _ in range(calls):
        subprocess.run([sys.executable, "-I", "-S", "-c", prologue + code], check=True, stdout=subprocess.DEVNULL)
    return (sum(os.times()[:4]) - before) / calls


async def measure(rounds: int) -> list[dict]:
    samples: dict[str, list[float]] = {"S1": [], "S1 at 64": [], "S2": [], "S4": []}
    costs: dict[str, list[float]] = {}
    async with Pool() as jailed, Pool(unsafe=True) as bare:
        for pool in (jailed, bare):
            for code in (TRIVIAL, IMPORTING):
                await pool_cost(pool, code, 20, 4)
        for _ in range(rounds):
            now = {
                "fresh": fresh_cost(TRIVIAL, 20),
                "one": await pool_cost(jailed, TRIVIAL, 150, 1),
                "many": await pool_cost(jailed, TRIVIAL, 300, 64),
                "bare": await pool_cost(bare, TRIVIAL, 300, 64),
                "fresh_import": fresh_cost(IMPORTING, 1),
                "import": await pool_cost(jailed, IMPORTING, 100, 64),
                "bare_import": await pool_cost(bare, IMPORTING, 100, 64),
            }
            for name, value in now.items():
                costs.setdefault(name, []).append(value * 1e3)
            samples["S1"].append(now["fresh"] / now["one"])
            samples["S1 at 64"].append(now["fresh"] / now["many"])
            samples["S2"].append(now["fresh_import"] / now["import"])
            samples["S4"].append(now["bare"] / now["many"])
    demands = {"S1": 3.0, "S1 at 64": 4.0, "S2": 60.0, "S4": 0.75}
    what = {
        "S1": "trivial call against a fresh python -I -S, one outstanding, CPU",
        "S1 at 64": "the same with 64 outstanding",
        "S2": "call importing numpy and sympy against a fresh process, CPU",
        "S4": "CPU of an unjailed call over that of a jailed one, same pool",
    }
    lines = []
    for figure, values in samples.items():
        value = statistics.median(values)
        lines.append(
            {
                "figure": figure,
                "what": what[figure],
                "value": round(value, 3),
                "unit": "ratio",
                "demand": f">= {demands[figure]:g}",
                "holds": value >= demands[figure],
                "rounds": rounds,
                "load_average": round(os.getloadavg()[0], 1),
            }
        )
    milliseconds = {name: round(statistics.median(values), 2) for name, values in costs.items()}
    cost = {"figure": "cost", "what": "CPU per call", "value": milliseconds, "unit": "ms"}
    lines.append(cost | {"demand": None, "holds": None})
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median ratio counts (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args()
    lines = asyncio.run(measure(options.rounds))
    for line in lines:
        if options.json:
            print(json.dumps(line))
        else:
            print(f"{line['figure']:9} {line['value']!s:>8} {line['unit']}  demand {line['demand']}  {line['what']}")
    return 0 if all(line["holds"] is not False for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
